"""Start hooked children in their own process group, with their scratch folder, and end them without a trace."""

from __future__ import annotations

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
from upshift.hook.boot import spec_bytes
from upshift.hook.channel import VARIABLE, Channel, ChannelClosed
from upshift.hook.isolate import remove_scratch
from upshift.hook.isolate.trackers import trial_environment
from upshift.records.plan import Setting
from upshift.sites import ProcessEnv
from upshift.sites.runner import ChildGone, ChildSpec
from upshift.techniques import registry

START = Path(__file__).parent / "start" / "upshift_start.py"


def command(spec_file: Path, python: str = sys.executable) -> list[str]:
    """The command line of a hooked process."""
    return [python, str(START), str(spec_file)]


def environment(plan: dict[str, dict[str, Setting]], base: dict[str, str] | None = None) -> dict[str, str]:
    """The environment for a plan: what the techniques with a `process_env` site add to `base`."""
    env = dict(os.environ if base is None else base)
    for technique, settings in registry.in_order(plan):
        if "process_env" in technique.card.sites:
            technique.at(ProcessEnv(env=env), settings)
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

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the child."""
        try:
            self._channel.send(message)
        except ChannelClosed:
            raise ChildGone(self.name) from None

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, None after `timeout` seconds, or {"kind": "gone", "code": n}."""
        try:
            return self._channel.receive(timeout)
        except ChannelClosed:
            try:
                code = self._process.wait(5)
            except subprocess.TimeoutExpired:
                code = None
            return {"kind": "gone", "code": code}

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
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

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
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            family = []
        self._signal(signal.SIGKILL)
        for member in family:
            try:
                member.kill()
            except psutil.Error:
                pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        self._channel.close()
        remove_scratch(self._scratch)


class HookRunner:
    """Starts hooked children. `python` is the interpreter of the script's environment."""

    def __init__(self, python: str = sys.executable, scratch: Path | None = None) -> None:
        self.python = python
        self.base = scratch

    def start(self, spec: ChildSpec, *, name: str = "") -> HookedChild:
        """Start a child for `spec`; `scratch` and `record` of the spec are filled in here.

        Raises:
            EnvironmentError_: there is no room for its scratch folder.
        """
        try:
            scratch = Path(tempfile.mkdtemp(prefix="upshift-", dir=self.base))
            record = scratch / "record"
            record.mkdir()
            spec = msgspec.structs.replace(spec, scratch=str(scratch), record=str(record))
            (scratch / "spec.json").write_bytes(spec_bytes(spec))
            if shutil.disk_usage(scratch).free < 64 * 2**20:
                raise OSError(28, "less than 64 MiB are free")
        except OSError as error:
            raise EnvironmentError_(
                f"there is no room for trials in {tempfile.gettempdir()}: {error.strerror}.",
                remedy="Free some space, or set TMPDIR to a folder with room.",
            ) from None
        ours, theirs = socket.socketpair()
        env = environment(spec.plan)
        env.update(trial_environment(scratch / "trackers"))
        env.update({VARIABLE: str(theirs.fileno()), "PYTHONHASHSEED": str((spec.seed or 0) % 2**32)})
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
        theirs.close()
        return HookedChild(process, Channel(ours), scratch, name)
