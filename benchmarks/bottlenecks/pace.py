"""How much faster the fixed script makes its steps: both run, and take turns.

One runs while the other is stopped with its whole process group, in turns ABBA, so that the drift of the machine meets
both alike. All time between two optimizer steps of a turn counts: evaluation and checkpoints too.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACED = Path(__file__).parent / "paced.py"

#: Seconds after a switch that do not count: caches are cold, and queues of loader workers are full.
SETTLE = 0.2


class Arm:
    """A running script, stopped unless it is its turn."""

    def __init__(self, script: Path, arguments: tuple[str, ...], folder: Path) -> None:
        self.stamps = folder / f"stamps{len(arguments)}"
        self.stamps.touch()
        self.process = subprocess.Popen(
            [sys.executable, str(PACED), str(self.stamps), str(script), *arguments],
            stdout=(folder / "output").open("a"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.steps = 0
        self.seconds = 0.0

    def seen(self) -> list[float]:
        """When its steps ended."""
        raw = self.stamps.read_bytes()
        return [item[0] for item in struct.iter_unpack("d", raw[: len(raw) // 8 * 8])]

    def warm_up(self, steps: int, patience: float = 60.0) -> None:
        """Wait for its first steps, and stop it."""
        deadline = time.monotonic() + patience
        while len(self.seen()) < steps:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.process.args} made no {steps} steps")
            time.sleep(0.05)
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        """Let it run for a while, and count the steps that lie within."""
        self._signal(signal.SIGCONT)
        begin = time.monotonic() + SETTLE
        time.sleep(SETTLE + seconds)
        self._signal(signal.SIGSTOP)
        inside = [stamp for stamp in self.seen() if stamp >= begin]
        if len(inside) > 1:
            self.steps += len(inside) - 1
            self.seconds += inside[-1] - inside[0]

    def end(self) -> None:
        """End it and its workers."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


def achieved(script: Path, *, quads: int = 3, seconds: float = 0.8, warm: int = 10) -> float:
    """Steps a second of the fixed script over those of the script as it is."""
    with tempfile.TemporaryDirectory() as name:
        arms: list[Arm] = []
        try:
            for arguments in ((), ("--fixed",)):
                arms.append(Arm(script, arguments, Path(name)))
                arms[-1].warm_up(warm)
            for _ in range(quads):
                for index in (0, 1, 1, 0):
                    arms[index].turn(seconds)
            stock, fixed = arms
            if not stock.steps or not fixed.steps:
                raise RuntimeError(f"{script.name}: no two steps fell into a turn")
            return (fixed.steps / fixed.seconds) / (stock.steps / stock.seconds)
        finally:
            for arm in arms:
                arm.end()
