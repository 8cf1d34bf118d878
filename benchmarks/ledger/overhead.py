"""What the record of a run and its companion process cost a short training step.

    python benchmarks/ledger/overhead.py [--quads 60] [--tracker tensorboard] [--block 2.0] [--json FILE]

In one process, a training of some 300 us a step (an MLP on the CPU, one thread) alternates in ABBA blocks: in the one
arm its companion runs (resources once a second, alarms, trackers if named) and the loop writes the record as `upshift
run` does; in the other the companion is stopped (SIGSTOP) and nothing is written. A block lasts `--block` seconds of
wall time, so that each holds looks of the companion; its first tenth is left out. The clock is wall time, since what
is asked is how much longer a run takes; the interval is that of `upshift.measure.paired`. On a busy machine the
interval is wide: the companion's own CPU time is printed too, as a share of one core, which bounds what it can take.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import math
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn

from upshift.measure.paired import arm_steps, pairing, quad_log_ratios
from upshift.records import resources
from upshift.records.runlog import RunLog
from upshift.sinks.beside import start


def training(width: int, batch: int) -> Callable[[int], float]:
    """An MLP with SGD; the function makes n steps and returns the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(batch, width), torch.randn(batch, 1)

    def steps(n: int) -> float:
        for _ in range(n):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return float(loss.item())

    return steps


class Beside:
    """The companion of this process and the record it would write; both can be switched off and on."""

    def __init__(self, folder: Path, trackers: tuple[str, ...]) -> None:
        self.log = RunLog(folder)
        self.log.append("start", script="bench", arguments=[], started="now", pid=os.getpid(), clock=time.time())
        if trackers:
            from upshift.sinks.trackers import check

            trackers = tuple(check(trackers))
        found = start(folder, os.getpid(), sinks=trackers)
        if found.pid is None:
            raise SystemExit(f"no companion: {found.reason}")
        self.process = psutil.Process(found.pid)
        self.began = time.perf_counter()
        self.steps = 0

    def switch(self, on: bool) -> None:
        """Let it go on, or stop it."""
        self.process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def window(self, n: int, seconds: float, loss: float) -> None:
        """A line of the record, as once a second in a run."""
        self.log.append(
            "steps", first=self.steps, n=n, at=time.perf_counter() - self.began, seconds=seconds,
            phases={"data": 0.0, "forward": seconds / 3, "backward": seconds / 3, "optimizer": seconds / 3},
            loss=loss, last_loss=loss, evaluation=0.0, checkpoint=0.0,
        )  # fmt: skip
        self.steps += n

    def cpu(self) -> float:
        """CPU seconds of the companion so far."""
        spent = self.process.cpu_times()
        return float(spent.user + spent.system)

    def close(self) -> None:
        """End the companion; this process goes on."""
        self.switch(True)
        self.process.terminate()
        self.log.append("end", code=0, seconds=time.perf_counter() - self.began)
        self.log.close()


def block(steps: Callable[[int], float], beside: Beside, on: bool, seconds: float, each: int) -> float:
    """Mean seconds of a step over a block, without its first tenth."""
    beside.switch(on)
    began = time.perf_counter()
    while time.perf_counter() - began < 0.1 * seconds:
        steps(each)
    mark = window = time.perf_counter()
    made = since = 0
    while (now := time.perf_counter()) - mark < 0.9 * seconds:
        loss = steps(each)
        made, since = made + each, since + each
        if on and now - window >= 1.0:
            beside.window(since, now - window, loss)
            window, since = now, 0
    return (time.perf_counter() - mark) / made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quads", type=int, default=60)
    parser.add_argument("--block", type=float, default=2.0, help="seconds of a block; several looks each")
    parser.add_argument("--tracker", action="append", default=[], help="a tracker that the companion feeds")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = training(options.width, 64)
    steps(500)
    mark = time.perf_counter()
    steps(200)
    step = (time.perf_counter() - mark) / 200
    each = max(int(0.02 / step), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        beside = Beside(folder, tuple(options.tracker))
        time.sleep(3.0)  # its start is not what is asked
        blocks: list[tuple[str, float]] = []
        own, lasted = 0.0, 0.0
        for quad in range(options.quads):
            for arm in "ABBA" if quad % 2 else "BAAB":
                before, mark = beside.cpu(), time.perf_counter()
                # A is the arm with the companion, so that a ratio above 1 is what it costs.
                blocks.append((arm, block(steps, beside, arm == "A", options.block, each)))
                if arm == "A":
                    own, lasted = own + beside.cpu() - before, lasted + time.perf_counter() - mark
        beside.close()
        time.sleep(1.0)
        recorded = resources.read(folder)
    quads = quad_log_ratios(blocks)
    found = pairing(quads, 0.95, steps=arm_steps(blocks))
    order = sorted(quads)
    result = {
        "step_us": found.candidate_step * 1e6,
        "overhead": found.ratio - 1.0,
        "low": found.low - 1.0,
        "high": found.high - 1.0,
        "median": math.exp(order[len(order) // 2]) - 1.0,
        "quads": len(quads),
        "companion_share_of_a_core": own / lasted,
        "samples": len(recorded.samples) if recorded else 0,
        "trackers": options.tracker,
    }
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, 1 thread, "
        f"{len(quads)} quads of {options.block:g} s blocks, trackers: {', '.join(options.tracker) or 'none'}"
    )
    print(
        f"step {result['step_us']:.0f} us; record and companion add {found.ratio - 1.0:+.3%} "
        f"(one-sided 95 % bounds {found.low - 1.0:+.3%} to {found.high - 1.0:+.3%}); "
        f"the companion takes {own / lasted:.3%} of one core, {result['samples']} samples"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if recorded and recorded.samples else 1)


if __name__ == "__main__":
    main()
