"""What `upshift run` costs on top of `python`: per step, and at the start.

    python benchmarks/overhead.py [--quads 60]

Per step: in one process, a training alternates in ABBA blocks between plain torch and torch under the hook of `run`
(no techniques), so that both arms see the same drift of the machine. A block is about 300 ms; patching and 100 warm-up
steps stand outside its clock, which is the thread's CPU time (everything runs in one thread; being preempted by others
is not counted). Reported is the median over quads of the difference, with the interval of its 95 % order statistics.
Start: whole processes in ABBA order, of a script that only imports torch. One thread each.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from upshift.hook.guarded import RunController
from upshift.hook.watch import Watch
from upshift.sites import Stage
from upshift.sites.runner import ChildSpec


def mlp(width: int, depth: int, batch: int) -> Callable[[int], None]:
    """A training of an MLP with a loader, a criterion module and SGD or AdamW; the function makes n steps."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if depth == 1 else torch.optim.AdamW(model.parameters())
    criterion = nn.MSELoss()
    rows = TensorDataset(torch.randn(batch, width), torch.randn(batch, 1))
    loader = DataLoader(rows, batch_size=None, sampler=[slice(None)] * 50)

    def batches() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    source = batches()

    def steps(n: int) -> None:
        for _ in range(n):
            x, y = next(source)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    return steps


class Hooked:
    """torch under the hook of `run`, while in context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        controller = RunController(ChildSpec(mode="run", target="train.py", record=str(self.folder)))
        controller.quiet = True
        self.watch = Watch(
            Stage([], controller.say), controller.on_step, rescue=controller.rescue, window=controller.window
        )
        controller.attach(self.watch.stage, self.watch)
        self.controller = controller
        self.watch.install(torch)
        controller.torch_ready(torch)

    def __exit__(self, *error: object) -> None:
        self.watch.close()
        self.controller.log.close()


def per_step(steps: Callable[[int], None], quads: int, folder: Path) -> tuple[float, list[float]]:
    """Median seconds of a plain step, and the difference hooked - plain per step of every quad."""
    steps(20)
    start = time.thread_time()
    steps(20)
    # Patching makes the interpreter specialise the code anew, and the first steps are all timed.
    warm = 100
    n = max(int(0.3 / ((time.thread_time() - start) / 20)), 5)

    def block(hooked: bool) -> float:
        def timed() -> float:
            steps(warm)
            start = time.thread_time()
            steps(n)
            return (time.thread_time() - start) / n

        if not hooked:
            return timed()
        with Hooked(folder):
            return timed()

    plain, differences = [], []
    for quad in range(quads):
        order = (False, True, True, False) if quad % 2 else (True, False, False, True)
        found = [(hooked, block(hooked)) for hooked in order]
        a = [seconds for hooked, seconds in found if not hooked]
        b = [seconds for hooked, seconds in found if hooked]
        plain.append(min(a))
        differences.append((sum(b) - sum(a)) / 2)
    return statistics.median(plain), differences


def start_up(pairs: int, folder: Path) -> list[float]:
    """Seconds that `upshift run` takes longer than `python`, one figure a pair."""
    script = folder / "train.py"
    script.write_text("import torch\n")
    upshift = str(Path(sys.executable).with_name("upshift"))
    commands = ([sys.executable, str(script)], [upshift, "run", "-q", "--runs", str(folder / "runs"), str(script)])

    def timed(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return time.perf_counter() - start

    for command in commands:
        timed(command)
    found = []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 else (1, 0)
        seconds = {arm: timed(commands[arm]) for arm in order}
        found.append(seconds[1] - seconds[0])
    return found


def middle_of(values: list[float]) -> tuple[float, float, float]:
    """The median and its distribution-free 95 % interval (order statistics of the binomial)."""
    ordered = sorted(values)
    n = len(ordered)
    reach = 0.98 * n**0.5
    low = ordered[max(int(n / 2 - reach), 0)]
    high = ordered[min(int(n / 2 + reach), n - 1)]
    return low, statistics.median(ordered), high


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quads", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=8, help="process pairs for the start-up; 0 leaves it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, 1 thread, "
          f"{options.quads} quads")  # fmt: skip
    print(f"{'training':<32}{'plain step':>12}{'hook adds':>12}{'95 % interval':>20}{'share':>9}")
    sizes = (
        ("MLP 64 x 1, SGD, batch 32", 64, 1, 32),
        ("MLP 64 x 2, AdamW, batch 32", 64, 2, 32),
        ("MLP 192 x 4, AdamW, batch 64", 192, 4, 64),
        ("MLP 256 x 8, AdamW, batch 128", 256, 8, 128),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, *size in sizes:
            plain, differences = per_step(mlp(*size), options.quads, folder / "run")
            low, middle, high = middle_of(differences)
            print(
                f"{label:<32}{plain * 1e6:>9.0f} us{middle * 1e6:>9.1f} us"
                f"{f'{low * 1e6:.1f} .. {high * 1e6:.1f} us':>20}{middle / plain:>9.2%}"
            )
        if options.pairs:
            low, middle, high = middle_of(start_up(options.pairs, folder))
            print(f"start-up: {middle:+.3f} s ({low:+.3f} .. {high:+.3f}, {options.pairs} pairs)")


if __name__ == "__main__":
    main()
