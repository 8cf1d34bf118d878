"""`upshift watch`: a screen on a terminal, a snapshot elsewhere, never a word on stdout, never a hand on the run."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from upshift.cli import show
from upshift.cli.watch import command
from upshift.errors import RecordError, UsageError
from upshift.records import codec
from upshift.records.runlog import RunLog
from upshift.report.current import Snapshot

#: As `upshift watch`, whatever the list of commands holds.
WATCH = [sys.executable, "-c", "from upshift.cli import main; main.COMMANDS.setdefault('watch', ''); main.main()",
         "watch"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_rates(monkeypatch, tmp_path):
    """Whatever price and region this machine knows of."""
    for name in ("UPSHIFT_PRICE", "UPSHIFT_REGION", "UPSHIFT_PUE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def started(folder, steps: int = 50, **more: object) -> RunLog:
    log = RunLog(folder)
    log.append("start", **{"script": "train.py", "arguments": [], "started": "2026-01-01 00:00:00",
                           "pid": os.getpid(), "clock": time.time(), **more})  # fmt: skip
    for i in range(steps // 10):
        log.append("steps", first=10 * i, n=10, at=i + 1.0, seconds=1.0, loss=2.0, phases={"forward": 0.5})
    return log


def test_once_speaks_on_stderr_only_and_writes_json(tmp_path):
    started(tmp_path / "run", steps_planned=100)
    result = CliRunner().invoke(
        command, ["--once", "--json", str(tmp_path / "now.json"), "--price", "3.6", str(tmp_path / "run")]
    )
    assert result.exit_code == 0 and result.stdout == ""
    for wanted in ("train.py", "running", "step 50 of 100", "10 steps/s", "loss", "cost"):
        assert wanted in result.stderr
    assert "\x1b" not in result.stderr
    seen = codec.read(tmp_path / "now.json", Snapshot)
    assert (seen.steps, seen.steps_planned, seen.status) == (50, 100, "running")
    assert seen.left.value == pytest.approx(5.0) and seen.left.basis == "estimated"
    assert seen.cost.value.value == pytest.approx(3.6 / 3600 * 5, rel=0.5)


def test_without_a_terminal_it_says_once_how_it_stands(tmp_path):
    started(tmp_path / "run")
    result = CliRunner().invoke(command, [str(tmp_path / "run")])
    assert result.exit_code == 0 and "step 50" in result.stderr


def test_the_newest_run_is_taken_and_none_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, [])
    assert isinstance(result.exception, RecordError) and "upshift run" in result.exception.remedy
    started(tmp_path / ".upshift" / "runs" / "20260101-1", script="old.py")
    started(tmp_path / ".upshift" / "runs" / "20260102-1", script="new.py")
    assert "new.py" in CliRunner().invoke(command, ["--once"]).stderr


@pytest.mark.parametrize(("arguments", "kind"), [
    (["--price", "cheap"], UsageError), (["--price", "-1"], UsageError), (["--region", "Atlantis"], UsageError),
    (["nowhere"], RecordError),
])  # fmt: skip
def test_bad_input_has_a_remedy(tmp_path, monkeypatch, arguments, kind):
    monkeypatch.chdir(tmp_path)
    started(tmp_path / ".upshift" / "runs" / "20260101-1")
    result = CliRunner().invoke(command, ["--once", *arguments])
    assert isinstance(result.exception, kind) and result.exception.remedy


def test_json_that_cannot_be_written_is_told(tmp_path):
    started(tmp_path / "run")
    (tmp_path / "file").touch()
    result = CliRunner().invoke(command, ["--once", "--json", str(tmp_path / "file" / "x.json"), str(tmp_path / "run")])
    assert "cannot be written" in str(result.exception)


def test_it_ends_with_the_run_and_leaves_the_last_state_on_the_screen(tmp_path, monkeypatch):
    log = started(tmp_path / "run")
    log.append("end", code=0, seconds=5.0)
    file = io.StringIO()
    monkeypatch.setattr(show, "console", lambda: Console(file=file, force_terminal=True, width=60, height=20))
    monkeypatch.setenv("TERM", "xterm-256color")
    result = CliRunner().invoke(command, ["--json", str(tmp_path / "now.json"), str(tmp_path / "run")])
    assert result.exit_code == 0 and "the run is over" in result.stderr
    screen, _, after = file.getvalue().rpartition("\x1b[?1049l")
    assert "\x1b[?1049h" in screen and "finished with exit code 0" in after and "finished" in screen
    assert codec.read(tmp_path / "now.json", Snapshot).status == "finished"


class Terminal:
    """`upshift watch` on a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 60, **env: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns)
        self.process = subprocess.Popen(
            [*WATCH, *arguments], stdin=slave, stdout=slave, stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", **env}, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def until(self, *signs: str) -> str:
        """Everything shown so far, once it holds all of `signs` in what is new; fails after a while."""
        new, end = "", time.monotonic() + 60
        while not all(sign in new for sign in signs):
            assert time.monotonic() < end, f"not shown: {signs}\n{new}"
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    new += os.read(self.master, 1 << 16).decode(errors="replace")
                except OSError:
                    assert all(sign in new for sign in signs), f"ended without {signs}:\n{new}"
        self.seen += new
        return new

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_on_a_terminal_it_follows_the_run_and_ctrl_c_leaves_it_alone(tmp_path):
    log = started(tmp_path / "run", script="train\x1b]0;owned\x07\x9b31m.py", pid=os.getpid())
    terminal = Terminal(str(tmp_path / "run"), "--every", "0.1s", NO_COLOR="1")
    try:
        first = terminal.until("\x1b[?1049h", "step 50")
        assert "owned" not in first and "\x9b" not in first
        log.append("steps", first=50, n=10, at=6.0, seconds=1.0)
        terminal.until("step 60")
        terminal.resize(80)
        terminal.until("running")
        terminal.process.send_signal(signal.SIGINT)
        after = terminal.until("left alone")
        assert terminal.process.wait(30) == 0
        # The terminal is as it was: the other screen is left, the cursor shown.
        assert "\x1b[?1049l" in after and after.rfind("\x1b[?25h") > after.rfind("\x1b[?25l")
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.seen), "colour in spite of NO_COLOR"
        assert "Traceback" not in terminal.seen
    finally:
        terminal.close()
