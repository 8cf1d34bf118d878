"""What the engine's loop costs a step, over the loop a person would write; other frameworks in the same command.

    python benchmarks/engine/overhead.py [--rounds 15] [--steps 2000] [--tiny] [--into FILE]

MLP 64-128-10, batch 32, AdamW (the default implementation), one thread, data in memory. Every arm trains in this
process, arms in a new random order each round; the clock stands in the loss function, which is the same in all arms,
and leaves out the first quarter of the steps. It is the thread's CPU time, so that being preempted by others does not
count (writing a checkpoint, which is another thread's work, does not count either; the copy before it does).
Reported: median over rounds of the difference to the raw loop of the same round, with the order statistics that bound
it at 95 %, and the difference of the least times. `--tiny` takes a model of 18 parameters and plain SGD in place of the
MLP: the loop's own cost is the same, and what surrounds it is less noisy. Every arm's loss must fall.

raw               slices of a tensor permuted once an epoch: the cheapest data path there is
raw, DataLoader   torch's DataLoader over a TensorDataset, no workers
upshift           `train_job`, nothing written
upshift, all on   with metrics, the record, and three checkpoints inside the window
others            see frameworks.py; one that cannot be imported is named with the reason
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from frameworks import OTHERS, PACKAGES, accept_torchvision
from loop_task import BATCH, SAMPLES, Clock, X, Y, loader, model, optimizer
from tables import publish

from upshift import Job
from upshift.engine.run import train_job
from upshift.engine.settings import Execution


def raw(steps: int, loss: Clock) -> None:
    """The loop a person would write for data in memory."""
    net = model()
    step = optimizer(net.parameters())
    done = 0
    while done < steps:
        rows = torch.randperm(SAMPLES)
        x, y = X[rows], Y[rows]
        for start in range(0, SAMPLES, BATCH):
            value = loss(net(x[start : start + BATCH]), y[start : start + BATCH])
            value.backward()
            step.step()
            step.zero_grad()
            done += 1
            if done == steps:
                break


def raw_loader(steps: int, loss: Clock) -> None:
    """The same with a DataLoader."""
    net = model()
    step = optimizer(net.parameters())
    batches = loader()
    done = 0
    while done < steps:
        for x, y in batches:
            loss(net(x), y).backward()
            step.step()
            step.zero_grad()
            done += 1
            if done == steps:
                break


def job(steps: int, loss: Clock) -> Job:
    """The same, declared."""
    return Job(model=model, train_data=(X, Y), loss=loss, optimizer=optimizer, global_batch=BATCH, steps=steps)


def bare(steps: int, loss: Clock) -> None:
    """The engine, nothing written."""
    train_job(job(steps, loss), Execution(signals=False))


def everything(steps: int, loss: Clock) -> None:
    """The engine with all that a run has; the evaluation comes after the window."""
    held_out = (X[:512], Y[:512])
    with tempfile.TemporaryDirectory() as folder:
        full = job(steps, loss).set(metrics={"accuracy": "accuracy"}, eval_data=held_out, eval_every=steps)
        train_job(full, Execution(out=Path(folder), save_steps=steps // 4, signals=False))


ARMS: dict[str, Callable[[int, Clock], None]] = {
    "raw": raw,
    "raw, DataLoader": raw_loader,
    "upshift": bare,
    "upshift, all on": everything,
}


def usable(steps: int) -> tuple[dict[str, Callable[[int, Clock], None]], dict[str, str]]:
    """The arms that train here, each tried once, and why the others do not."""
    arms, left_out = dict(ARMS), {}
    accept_torchvision()
    for name, (packages, arm) in OTHERS.items():
        missing = [package for package in packages if find_spec(package) is None]
        left_out[name] = f"{missing[0]} is not installed" if missing else once(arm, steps)
        if not left_out[name]:
            arms[name] = arm
            del left_out[name]
    return arms, left_out


def once(arm: Callable[[int, Clock], None], steps: int) -> str:
    """What keeps an arm from training, found by doing it once; empty where nothing does."""
    clock = Clock(steps)
    try:
        with quiet():
            arm(steps, clock)
    except Exception as error:  # foreign code may raise anything, at its import too
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return clock.problem()


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """What the arms print is not part of the table."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--into", type=Path, help="append the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    arms, left_out = usable(min(options.steps, 512))
    for name, why in left_out.items():
        print(f"{name}: left out, {why}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in arms}
    draw = random.Random(0)
    for number in range(options.rounds):
        order = list(arms)
        draw.shuffle(order)
        for name in order:
            clock = Clock(options.steps)
            with quiet():
                arms[name](options.steps, clock)
            if clock.problem():
                raise SystemExit(f"{name}: {clock.problem()}")
            times[name].append(clock.microseconds)
        print(f"{time.strftime('%H:%M:%S')} round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    text = table(times, left_out, options.steps)
    publish(text, options.into)


def table(times: dict[str, list[float]], left_out: dict[str, str], steps: int) -> str:
    """The rounds as Markdown."""
    n = len(times["raw"])
    lines = [
        f"{n} rounds of {steps} steps, one thread, torch {torch.__version__}, {', '.join(versions())}",
        "",
        "| loop | us a step | over raw | 95 % | least over least | against raw with a DataLoader |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in times.items():
        over = sorted(a - b for a, b in zip(found, times["raw"], strict=True))
        ratio = statistics.median(b / a for a, b in zip(found, times["raw, DataLoader"], strict=True))
        low, high = bounds(over)
        lines.append(
            f"| {name} | {statistics.median(found):.1f} | {statistics.median(over):+.1f} | {low:+.1f} to {high:+.1f} | "
            f"{min(found) - min(times['raw']):+.1f} | {ratio:.2f}x |"
        )
    lines += [f"| {name} | not measured: {why} | | | | |" for name, why in left_out.items()]
    return "\n".join(lines)


def versions() -> list[str]:
    """The frameworks that are installed."""
    found = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found or ["no other framework"]


def bounds(values: list[float]) -> tuple[float, float]:
    """Order statistics that hold the median with at least 95 % (binomial); all of the values where they are too few."""
    from math import comb

    n, drop = len(values), 0
    while 2 * sum(comb(n, k) for k in range(drop + 1)) / 2**n <= 0.05:
        drop += 1
    drop = max(drop - 1, 0)
    return values[drop], values[n - 1 - drop]


if __name__ == "__main__":
    main()
