"""What the engine's loop costs a step, over the loop a person would write; other frameworks in the same command.

    python benchmarks/engine/overhead.py [--rounds 15] [--steps 2000] [--tiny] [--into FILE]

MLP 64-128-10, batch 32, AdamW (the default implementation), one thread, data in memory. Every arm trains in this
process, arms in a new random order each round; the clock stands in the loss function, which is the same in all arms,
and leaves out the first quarter of the steps. It is the thread's CPU time, so that being preempted by others does not
count (writing a checkpoint, which is another thread's work, does not count either; the copy before it does).
Reported: median over rounds of the difference to the raw loop of the same round, with the order statistics that bound
it at 95 %, and the difference of the least times. `--tiny` takes a model of 18 parameters and plain SGD in place of the
MLP: the loop's own cost is the same, and what surrounds it is less noisy.

raw               slices of a tensor permuted once an epoch: the cheapest data path there is
raw, DataLoader   torch's DataLoader over a TensorDataset, no workers
upshift           `train_job`, nothing written
upshift, all on   with metrics, the record, and three checkpoints inside the window
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from upshift import Job
from upshift.engine.run import train_job
from upshift.engine.settings import Execution

SAMPLES, BATCH = 8192, 32
TINY = "--tiny" in sys.argv


def model() -> torch.nn.Module:
    """The MLP, or one layer of 8 inputs and 2 outputs."""
    if TINY:
        return torch.nn.Linear(8, 2)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


X = torch.randn(SAMPLES, 8 if TINY else 64)
Y = torch.randint(0, 2 if TINY else 10, (SAMPLES,))
optimizer = partial(torch.optim.SGD, lr=1e-3) if TINY else partial(torch.optim.AdamW, lr=1e-3)


class Clock:
    """Cross entropy that notes the time at two of its calls."""

    def __init__(self, steps: int) -> None:
        self.first, self.last, self.calls = steps // 4, steps, 0
        self.began = self.ended = 0.0

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if output.requires_grad:
            self.calls += 1
            if self.calls == self.first:
                self.began = time.thread_time()
            elif self.calls == self.last:
                self.ended = time.thread_time()
        return F.cross_entropy(output, target)

    @property
    def microseconds(self) -> float:
        """Microseconds a step."""
        return (self.ended - self.began) / (self.last - self.first) * 1e6


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
    loader = DataLoader(TensorDataset(X, Y), batch_size=BATCH, shuffle=True)
    done = 0
    while done < steps:
        for x, y in loader:
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


def fabric(steps: int, loss: Clock) -> None:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    f = Fabric(accelerator="cpu", devices=1)
    net = model()
    net, step = f.setup(net, optimizer(net.parameters()))
    loader = f.setup_dataloaders(DataLoader(TensorDataset(X, Y), batch_size=BATCH, shuffle=True))
    done = 0
    while done < steps:
        for x, y in loader:
            f.backward(loss(net(x), y))
            step.step()
            step.zero_grad()
            done += 1
            if done == steps:
                break


def accelerate(steps: int, loss: Clock) -> None:
    """Accelerate."""
    from accelerate import Accelerator

    a = Accelerator(cpu=True)
    net = model()
    loader = DataLoader(TensorDataset(X, Y), batch_size=BATCH, shuffle=True)
    net, step, loader = a.prepare(net, optimizer(net.parameters()), loader)
    done = 0
    while done < steps:
        for x, y in loader:
            a.backward(loss(net(x), y))
            step.step()
            step.zero_grad()
            done += 1
            if done == steps:
                break


def lightning(steps: int, loss: Clock) -> None:
    """Lightning's Trainer, without logger, bar and checkpoints."""
    import logging

    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):  # type: ignore[no-untyped-def]
            return loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):  # type: ignore[no-untyped-def]
            return optimizer(self.parameters())

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(X, Y), batch_size=BATCH, shuffle=True))


ARMS: dict[str, Callable[[int, Clock], None]] = {
    "raw": raw,
    "raw, DataLoader": raw_loader,
    "upshift": bare,
    "upshift, all on": everything,
}
OTHERS = {
    "fabric": ("lightning", fabric),
    "accelerate": ("accelerate", accelerate),
    "lightning": ("lightning", lightning),
}


def main() -> None:
    """Time, print."""
    from importlib.util import find_spec

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--into", type=Path, help="append the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    arms = dict(ARMS)
    for name, (package, arm) in OTHERS.items():
        if find_spec(package) is not None:
            arms[name] = arm
        else:
            print(f"{name}: {package} is not installed, left out", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in arms}
    draw = random.Random(0)
    for number in range(options.rounds):
        order = list(arms)
        draw.shuffle(order)
        for name in order:
            clock = Clock(options.steps)
            arms[name](options.steps, clock)
            times[name].append(clock.microseconds)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    lines = [
        "| loop | us a step | over raw | 95 % | least over least | against raw with a DataLoader |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in times.items():
        over = sorted(a - b for a, b in zip(found, times["raw"], strict=True))
        ratio = statistics.median(b / a for a, b in zip(found, times["raw, DataLoader"], strict=True))
        low, high = _bounds(over)
        lines.append(
            f"| {name} | {statistics.median(found):.1f} | {statistics.median(over):+.1f} | {low:+.1f} to {high:+.1f} | "
            f"{min(found) - min(times['raw']):+.1f} | {ratio:.2f}x |"
        )
    text = f"{options.rounds} rounds of {options.steps} steps, torch {torch.__version__}, one thread\n\n" + "\n".join(
        lines
    )
    print(text)
    if options.into:
        with open(options.into, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")


def _bounds(values: list[float]) -> tuple[float, float]:
    """Order statistics that hold the median with at least 95 % (binomial)."""
    from math import comb

    n, drop = len(values), 0
    while 2 * sum(comb(n, k) for k in range(drop + 1)) / 2**n <= 0.05:
        drop += 1
    drop = max(drop - 1, 0)
    return values[drop], values[n - 1 - drop]


if __name__ == "__main__":
    main()
