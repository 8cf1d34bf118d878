"""How long `report` and `watch` take on a run of a million steps, and how large its page is. Under two minutes.

    python benchmarks/ledger/long_run.py [--steps 1000000] [--step 0.1] [--folder DIR] [--repeats 3]

Two records of the same run (0.1 s a step, a bit over a day, one evaluation in 5,000 steps): one with windows of a
second, as runs write them, and one with a window per step, as where steps take longer than a second; each with the
samples of the machine as the companion takes them (every second at first, every 30 s in the end; eight GPUs) and 500
evaluations. Timed from the start of a fresh process: until `report --html` has ended, and until `watch` has drawn its
first screen on a terminal (the first screen that names the step the run is at).
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import pty
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from statistics import median

import msgspec

from upshift.records.resources import FILE
from upshift.records.runlog import LOG

PHASES = ("data", "h2d", "forward", "loss", "backward", "optimizer", "sync", "other")

#: `upshift` of this environment, whether or not its command is installed.
UPSHIFT = [sys.executable, "-c", "from upshift.cli import main; main.COMMANDS.setdefault('watch', ''); main.main()"]


def write_log(folder: Path, steps: int, step: float, window: int, pid: int) -> None:
    """A log with windows of so many steps."""
    rng = random.Random(1)
    with open(folder / LOG, "wb") as file:

        def line(kind: str, **fields: object) -> None:
            file.write(msgspec.json.encode({"kind": kind, **fields}) + b"\n")

        line("start", script="train.py", arguments=["--epochs", "200"], started="2026-01-01 00:00:00",
             clock=time.time(), pid=pid, plan="", techniques={}, environment={"torch": "2.13.0"},
             steps_planned=2 * steps)  # fmt: skip
        for first in range(0, steps, window):
            n = min(window, steps - first)
            took = sum(step * (1 + rng.gauss(0, 0.02)) for _ in range(min(n, 4))) * n / min(n, 4)
            phases = {name: took / len(PHASES) * (1 + rng.gauss(0, 0.01)) for name in PHASES}
            loss = 0.3 + 2.0 * math.exp(-first / steps * 5) + rng.gauss(0, 0.05)
            at = (first + n) * step
            line("steps", first=first, n=n, at=at, seconds=took, phases=phases, loss=loss, last_loss=loss,
                 evaluation=0.0, checkpoint=0.0)  # fmt: skip
            if first // 2000 != (first + n) // 2000:
                line("metrics", at=at, text="accuracy", step=first + n, values={"accuracy": 1 - loss / 3})


def write_resources(folder: Path, seconds: float) -> int:
    """Samples as they are taken beside a run: rarer as it grows older. How many there are."""
    rng = random.Random(2)
    at, count = 0.0, 0
    with open(folder / FILE, "wb") as file:
        head = {"kind": "head", "pid": 1, "cores": 32.0, "memory_limit": 128 * 2**30, "energy": "NVML and RAPL",
                "energy_basis": "measured"}  # fmt: skip
        file.write(msgspec.json.encode(head) + b"\n")
        while at < seconds:
            gpus = [
                {"name": "NVIDIA H200", "utilisation": rng.uniform(0.6, 1.0), "memory": 6e10 + rng.gauss(0, 1e9),
                 "memory_total": 1.5e11, "watts": rng.uniform(300, 700), "joules": 500 * at, "temperature": 60.0,
                 "clock": 1.9e9, "clock_most": 1.98e9, "throttled": []}
                for _ in range(8)
            ]  # fmt: skip
            sample = {"kind": "sample", "at": at, "cpu_seconds": 20 * at, "machine_cpu_seconds": 22 * at,
                      "memory": 4e10 + rng.gauss(0, 1e8), "memory_available": 8e10, "read": 1e8 * at,
                      "written": 1e6 * at, "sent": 1e3 * at, "received": 1e3 * at, "swapped": 0.0, "shm": 1e9,
                      "disk_free": 1e12, "processes": 9, "threads": 100, "clock": 3e9, "temperature": 55.0,
                      "watts": 4200.0, "joules": 4200 * at, "gpus": gpus}  # fmt: skip
            file.write(msgspec.json.encode(sample) + b"\n")
            count += 1
            at += min(max(1.0, at / 600), 30.0)
    return count


def report_seconds(folder: Path, page: Path) -> float:
    """Until `upshift report --html` has ended."""
    began = time.perf_counter()
    subprocess.run([*UPSHIFT, "report", "--html", str(page), str(folder)], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def watch_seconds(folder: Path, sign: bytes) -> float:
    """Until `upshift watch` has drawn a screen with `sign` on a terminal of 100 x 40."""
    began = time.perf_counter()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(UPSHIFT[0], [*UPSHIFT, "watch", str(folder)])
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        seen = b""
        while sign not in seen:
            if time.perf_counter() - began > 60 or not select.select([terminal], [], [], 10)[0]:
                raise SystemExit(f"watch drew nothing: {seen[-2000:]!r}")
            seen += os.read(terminal, 1 << 16)
        return time.perf_counter() - began
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)


def main() -> None:
    """Write both records, time both commands on each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--step", type=float, default=0.1, help="seconds")
    parser.add_argument("--folder", type=Path, help="where the records go; else a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for name, window in (("a window a second", max(round(1 / options.step), 1)), ("a window a step", 1)):
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            # Of this process, so that the run counts as going on.
            write_log(folder, options.steps, options.step, window, os.getpid())
            samples = write_resources(folder, options.steps * options.step)
            size = (folder / LOG).stat().st_size / 2**20
            lines = math.ceil(options.steps / window)
            page = folder / "run.html"
            sign = f"{options.steps:,}".encode()
            reports = [report_seconds(folder, page) for _ in range(options.repeats)]
            watches = [watch_seconds(folder, sign) for _ in range(options.repeats)]
            print(f"{name}: {options.steps:,} steps, {lines:,} windows, {samples:,} samples, log {size:.0f} MiB")
            print(f"  report --html     {median(reports):.2f} s (worst {max(reports):.2f} s), limit 10 s")
            print(f"  page              {page.stat().st_size / 1e6:.2f} MB, limit 5 MB")
            print(f"  watch, first sight {median(watches):.2f} s (worst {max(watches):.2f} s), limit 1 s", flush=True)


if __name__ == "__main__":
    main()
