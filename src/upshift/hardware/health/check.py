"""What a check of this machine is, and how one that fails is kept from ending the others."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

State = Literal["ok", "note", "wrong", "unknown"]
Group = Literal["machine", "torch", "accelerator", "memory and disk", "environment"]

#: Longer messages of other programs are cut: their end says little.
MAX_MESSAGE = 300


class Check(msgspec.Struct, frozen=True):
    """One thing looked at. `note` could be better; `wrong` gives failures or wrong figures; `unknown` was not seen.

    `mend` is a command; each check that is wrong has one.
    """

    name: str
    state: State
    found: str
    why: str
    mend: str = ""
    group: Group = "machine"


class Health(msgspec.Struct, frozen=True):
    """All checks of a machine, group by group."""

    checks: tuple[Check, ...]

    def wrong(self) -> tuple[str, ...]:
        """Names of the checks that found something wrong."""
        return tuple(check.name for check in self.checks if check.state == "wrong")

    def count(self, state: State) -> int:
        """How many checks are in this state."""
        return sum(check.state == state for check in self.checks)


def one_line(text: object) -> str:
    """The text in one line, cut to `MAX_MESSAGE` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def carefully(name: str, group: Group, look: Callable[[], Check | None]) -> Check | None:
    """What `look` finds, in its group; where it raises, a check that is `unknown`, with the reason."""
    try:
        found = look()
    except Exception as error:  # whatever a strange machine raises: the other checks still count
        found = Check(
            name, "unknown", f"could not be looked at: {type(error).__name__}: {one_line(error)}",
            "This was not seen; the other checks do not depend on it.",
        )  # fmt: skip
    if found is None:
        return None
    # Paths and variables that are no UTF-8 could not be written as JSON.
    text = {name: getattr(found, name).encode("utf-8", "replace").decode() for name in ("found", "why", "mend")}
    return msgspec.structs.replace(found, group=group, **text)


class Ran(msgspec.Struct, frozen=True):
    """How a command ended. `code` is None where it could not be started or did not end in time: see `problem`."""

    code: int | None
    out: str = ""
    err: str = ""
    problem: str = ""


Run = Callable[[Sequence[str], float], Ran]

_LIVE: set[subprocess.Popen[bytes]] = set()


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command for at most `seconds`; messages are asked for in English.

    A process that cannot even be killed (a driver that hangs holds it) is left behind.
    """
    # LC_ALL of a person may translate what is read here; LANGUAGE overrules it.
    own = {**(os.environ if env is None else env), "LC_ALL": "C.UTF-8", "LANGUAGE": ""}
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        return Ran(None, problem=f"{command[0]} cannot be started: {getattr(error, 'strerror', None) or error}")
    _LIVE.add(process)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        _kill(process)
        out, err = expired.stdout or b"", expired.stderr or b""
        try:
            out, err = process.communicate(timeout=1.0)
        except (subprocess.TimeoutExpired, ValueError):
            pass
        return Ran(None, _text(out), _text(err), f"{command[0]} did not end within {seconds:g} s")
    finally:
        _LIVE.discard(process)
    return Ran(process.returncode, _text(out), _text(err))


def end_all() -> None:
    """End every command that still runs: it has a process group of its own, so Ctrl-C does not reach it."""
    for process in tuple(_LIVE):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (OSError, AttributeError):  # no process groups there
        process.kill()


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
