"""The companion process of a run: it samples resources, raises alarms and feeds trackers, and training never waits.

It is no child of the training (a script that waits for all its children must not meet it), has a session of its own
(Ctrl-C in the terminal ends the training only), and holds none of its files (a pipe ends when the training ends).
It gives way to everybody: lowest but some in priority, first to go where memory runs out.

    python -m upshift.sinks.beside SPEC.json
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from upshift.errors import RecordError
from upshift.measure.tree import Sums, Tree

#: Environment variable: where it is 1, no companion is started.
OFF = "UPSHIFT_NO_COMPANION"

SPEC = "beside.json"

#: How much nicer than the training it is.
NICER = 10

_ADOPTED = (
    "resources are not recorded: this process would have to adopt the companion, and its script might wait for it "
    "(first process of a container: start that with --init)"
)


class Spec(msgspec.Struct, frozen=True):
    """What the companion is told.

    `born`: as the function of that name says it of `pid`.
    `began`: `time.monotonic()` of this machine; `cpu`, `read`, `written`: what `pid` had used by then.
    """

    pid: int
    born: float | None
    folder: str
    began: float
    period: float = 1.0
    sinks: tuple[str, ...] = ()
    cpu: float = 0.0
    read: float | None = None
    written: float | None = None
    pace: dict[str, Any] | None = None
    """The step time of the run's plan, a `records.plan.Pace`; None: there is nothing to hold it against."""

    @property
    def spent(self) -> Sums:
        """What `pid` had used when the run began."""
        return Sums(self.cpu, self.read, self.written)


class Started(NamedTuple):
    """The companion's process id, or None and why there is none, in a sentence (empty: it was not wanted)."""

    pid: int | None
    reason: str = ""
    born: float | None = None


def start(
    folder: Path, pid: int, *, period: float = 1.0, sinks: Sequence[str] = (), pace: dict[str, Any] | None = None
) -> Started:
    """Start the companion of the run that process `pid` is or becomes by `exec`. Takes milliseconds, never raises.

    Args:
        folder: of the run, made already; `resources.jsonl`, `beside.json` and `beside.log` are written there.
        period: seconds between two looks at first.
        sinks: trackers as `upshift.sinks.trackers.check` returns them.
        pace: see `Spec`.
    """
    if os.environ.get(OFF) == "1":
        return Started(None)
    if not hasattr(os, "fork"):
        return Started(None, "resources are not recorded: this system has no fork")
    try:
        spent = Tree(pid).spent()
        spec = Spec(
            pid=pid, born=born(pid), folder=str(folder.absolute()), began=time.monotonic(), period=period,
            sinks=tuple(sinks), cpu=spent.cpu, read=spent.read, written=spent.written, pace=pace,
        )  # fmt: skip
        file = Path(spec.folder) / SPEC
        file.write_bytes(msgspec.json.encode(spec))
        # -P: a module in the current folder must not stand in for one of ours.
        found = _detached([sys.executable, "-P", "-m", "upshift.sinks.beside", str(file)], pid)
        return found if found.pid is None else found._replace(born=born(found.pid))
    except OSError as error:
        return Started(None, f"resources are not recorded: {error.strerror or error}")


def stop(started: Started) -> None:
    """End a companion whose run is over while the process goes on (a job in a notebook). It writes the rest itself."""
    if started.pid is None or started.born is None or born(started.pid) != started.born:
        return
    try:
        os.kill(started.pid, signal.SIGTERM)
    except OSError:
        pass


def born(pid: int) -> float | None:
    """What tells this process from a later one of the same number; None where it has ended. `exec` leaves it alone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else float(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError, IndexError):
        return None
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


# -- leaving the family ---------------------------------------------------------------------------------------------


def _detached(command: Sequence[str], watched: int) -> Started:
    """Start a process whose parent is whoever adopts orphans here, unless that is us or the watched one."""
    ends = os.pipe()
    here = os.getpid()
    middle = os.fork()
    if middle == 0:
        try:
            _middle(command, ends[1], (here, watched))
        finally:
            os._exit(1)
    os.close(ends[1])
    try:
        os.waitpid(middle, 0)
    except ChildProcessError:
        pass  # children are not waited for here: SIGCHLD is ignored
    told = os.read(ends[0], 64).split()
    os.close(ends[0])
    if len(told) != 2:
        return Started(None, "resources are not recorded: no process could be started")
    adopted, pid = told[0] == b"adopted", int(told[1])
    if not adopted:
        return Started(pid)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass
    return Started(None, _ADOPTED)


def _middle(command: Sequence[str], told: int, not_by: tuple[int, ...]) -> NoReturn:
    os.setsid()
    middle = os.getpid()
    if os.fork() != 0:
        os._exit(0)
    while os.getppid() == middle:
        time.sleep(0.0005)
    adopted = os.getppid() in not_by
    os.write(told, b"%s %d" % (b"adopted" if adopted else b"free", os.getpid()))
    if adopted:
        os._exit(0)
    os.nice(NICER)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    # A file left open would keep a pipe, a lock or a mount of the training alive.
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:
                pass
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(command[0], list(command), {**os.environ, OFF: "1"})


def main(arguments: Sequence[str]) -> NoReturn:
    """The companion: watch until the run is over. Leaves without the exit handlers of any tracker.

    Raises:
        RecordError: no readable spec is named.
    """
    from upshift.sinks.companion import Companion

    try:
        spec = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Spec)
    except (OSError, IndexError, msgspec.DecodeError) as error:
        raise RecordError(
            f"the companion cannot read what to watch: {error}.", remedy="It is started by upshift run."
        ) from None
    _give_way()
    Companion(spec).watch()
    os._exit(0)


def _give_way() -> None:
    """Priority counts within a session only where the scheduler groups by sessions; memory is taken from us first."""
    for name, value in (("autogroup", NICER), ("oom_score_adj", 800)):
        try:
            Path(f"/proc/self/{name}").write_text(str(value))
        except OSError:
            pass


if __name__ == "__main__":
    main(sys.argv[1:])
