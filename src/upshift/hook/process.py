"""Start hooked children in their own process group, with their scratch folder, and end them without a trace."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from upshift.errors import EnvironmentError_
from upshift.hardware.machine import memory_limit
from upshift.hook.boot import OUTSIDE, spec_bytes
from upshift.hook.channel import VARIABLE, Channel, ChannelClosed
from upshift.hook.isolate import remove_scratch
from upshift.hook.isolate.trackers import trial_environment
from upshift.hook.scalars import FILE as SCALARS
from upshift.hook.written import SUFFIXES
from upshift.records.plan import Setting
from upshift.sites import NoEffect, ProcessEnv
from upshift.sites.runner import ChildGone, ChildSpec
from upshift.techniques import registry

#: Environment variable that marks every process of a trial, with its scratch folder: daemons leave the process group.
MARK = "UPSHIFT_TRIAL"

#: How often a silent child is looked at: a descendant may keep the channel of a dead one open.
LOOK_EVERY = 0.5

START = Path(__file__).parent / "start" / "upshift_start.py"


def command(spec_file: Path, python: str = sys.executable) -> list[str]:
    """The command line of a hooked process."""
    return [python, str(START), str(spec_file)]


def environment(plan: dict[str, dict[str, Setting]], base: dict[str, str] | None = None) -> dict[str, str]:
    """The environment for a plan: what the techniques with a `process_env` site add to `base`.

    What came of them is told to the child, whose stage cannot see it.
    """
    env = dict(os.environ if base is None else base)
    outside: dict[str, str] = {}
    for technique, settings in registry.in_order(plan):
        if "process_env" in technique.card.sites:
            outcome = technique.at(ProcessEnv(env=env), settings)
            outside[technique.card.name] = outcome.reason if isinstance(outcome, NoEffect) else ""
    if outside:
        env[OUTSIDE] = json.dumps(outside)
    return env


class HookedChild:
    """One trial process. See `sites.runner.Child`."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel, scratch: Path, name: str) -> None:
        self.name = name
        self.record = scratch / "record"
        self._process = process
        self._channel = channel
        self._scratch = scratch
        self._output = ""
        self._dead = False

    @property
    def pid(self) -> int:
        """The main process."""
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the child."""
        try:
            self._channel.send(message)
        except ChannelClosed:
            raise ChildGone(self.name) from None

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, None after `timeout` seconds, or {"kind": "gone", "code": n}."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                left = max(deadline - time.monotonic(), 0.0)
                message = self._channel.receive(min(left, LOOK_EVERY))
                if message is not None:
                    return message
                code = self._exit_code()
                if code is not None:
                    # It may have spoken between the last look and its end.
                    return self._channel.receive(0) or {"kind": "gone", "code": code}
                if left <= LOOK_EVERY:
                    return None
        except ChannelClosed:
            patience = time.monotonic() + 5.0
            while (code := self._exit_code()) is None and time.monotonic() < patience:
                time.sleep(0.01)
            return {"kind": "gone", "code": code}

    def _exit_code(self) -> int | None:
        """The exit code of an ended process, which stays a zombie: its number, and its group's, must not be reused."""
        if self._process.returncode is None:
            try:
                found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return self._process.poll()
            if found is None:
                return None
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return self._process.returncode

    def pause(self) -> None:
        """Stop the process group; returns when the main process has stopped."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            try:
                if psutil.Process(self._process.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    return
            except psutil.Error:
                return

    def resume(self) -> None:
        """Let the process group go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process.returncode is not None:
            return  # the number may belong to somebody else by now
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the whole family, and bytes available (container limits included)."""
        held = 0
        try:
            main = psutil.Process(self._process.pid)
            for member in (main, *main.children(recursive=True)):
                held += member.memory_info().rss
        except psutil.Error:
            pass
        available = min(int(psutil.virtual_memory().available), max(memory_limit() - held, 0))
        return held, available

    def written(self) -> list[Path]:
        """The script's output, and copies of what it logs and writes as text."""
        copies = [file for file in self.record.glob("[0-9]*.*") if file.suffix in SUFFIXES]
        return [self._scratch / "output.txt", self.record / SCALARS, *sorted(copies)]

    def output(self) -> str:
        """The tail of what the script wrote."""
        if self._output:
            return self._output
        try:
            with open(self._scratch / "output.txt", "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - 8192, 0))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def kill(self) -> None:
        """End the whole group, children that left it included, and remove the scratch folder."""
        if self._dead:
            return
        self._dead = True
        self._output = self.output()
        family = _family(self._process.pid, self._scratch)
        self._signal(signal.SIGKILL)
        for _ in range(3):
            for member in family:
                try:
                    member.kill()
                except psutil.Error:
                    pass
            family = _family(self._process.pid, self._scratch)
            if not family:
                break
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        self._channel.close()
        remove_scratch(self._scratch)


def _family(pid: int, scratch: Path) -> list[psutil.Process]:
    """Descendants of `pid`, and whoever carries the mark of this trial although it left the family (a daemon)."""
    found: dict[int, psutil.Process] = {}
    try:
        found = {item.pid: item for item in psutil.Process(pid).children(recursive=True)}
    except psutil.Error:
        pass
    if not sys.platform.startswith("linux"):
        return list(found.values())
    wanted = f"{MARK}={scratch}".encode()
    for item in psutil.pids():
        try:
            carried = Path(f"/proc/{item}/environ").read_bytes().split(b"\0")
            if item != pid and item not in found and wanted in carried:
                found[item] = psutil.Process(item)
        except (OSError, psutil.Error):
            continue
    return [item for item in found.values() if _runs(item)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class HookRunner:
    """Starts hooked children. `python` is the interpreter of the script's environment."""

    def __init__(
        self, python: str = sys.executable, scratch: Path | None = None, extra: dict[str, str] | None = None
    ) -> None:
        """
        Args:
            extra: environment variables for every child.
        """
        self.python = python
        self.base = scratch
        self.extra = dict(extra or {})

    def start(self, spec: ChildSpec, *, name: str = "") -> HookedChild:
        """Start a child for `spec`; `scratch` and `record` of the spec are filled in here.

        Raises:
            EnvironmentError_: there is no room for its scratch folder.
        """
        try:
            scratch = Path(tempfile.mkdtemp(prefix="upshift-", dir=self.base))
        except OSError as error:
            raise _no_room(error) from None
        try:
            return self._start(spec, name, scratch)
        except BaseException as error:
            remove_scratch(scratch)
            if isinstance(error, OSError):
                raise _no_room(error) from None
            raise

    def _start(self, spec: ChildSpec, name: str, scratch: Path) -> HookedChild:
        record = scratch / "record"
        record.mkdir()
        spec = msgspec.structs.replace(spec, scratch=str(scratch), record=str(record))
        (scratch / "spec.json").write_bytes(spec_bytes(spec))
        if shutil.disk_usage(scratch).free < 64 * 2**20:
            raise OSError(errno.ENOSPC, "less than 64 MiB are free")
        env = environment(spec.plan)
        env.update(trial_environment(scratch / "trackers"))
        env.update(self.extra)
        ours, theirs = socket.socketpair()
        env.update({VARIABLE: str(theirs.fileno()), MARK: str(scratch)})
        env["PYTHONHASHSEED"] = str((spec.seed or 0) % 2**32)
        try:
            with open(scratch / "output.txt", "wb") as output:
                process = subprocess.Popen(
                    command(scratch / "spec.json", self.python),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return HookedChild(process, Channel(ours), scratch, name)


def _no_room(error: OSError) -> EnvironmentError_:
    return EnvironmentError_(
        f"a trial cannot be started in {tempfile.gettempdir()}: {error.strerror}.",
        remedy="Free some space, or set TMPDIR to a folder with room.",
    )
