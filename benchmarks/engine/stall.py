"""What saving costs a training at the interval that is chosen for it (Young/Daly), as a share of its time.

    python benchmarks/engine/stall.py [--seconds 300] [--pairs 6] [--jobs tiny,char_gpt,cifar] [--into FILE]

Each job is trained by `upshift run`, on one process and on two, with nothing said about saving. Two figures:

stall   what the record says the loop was kept by saves, added up, over the time of training in the same windows.
        The first window (it holds the save before the first update) and the last one (the save at the end) are apart.
whole   also what a save costs the steps that are made beside its writing: pairs of runs in alternating order, one of
        which saves every second and the other never; the difference of their times a step, over the saves made, is the
        cost of one save. At the chosen interval that is too little to be seen, so its share there is worked out: cost
        of a save / interval. A bracket that holds 0 was not resolved.

cifar needs `python examples/get_data.py cifar10`. With the defaults about an hour and a quarter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from cli_runs import ROOT, Record, bounds, train_for
from tables import publish

from upshift import Job
from upshift.units import seconds as in_words

#: Name -> reference, and options that keep it from coming to its end.
JOBS = {
    "tiny": (f"{Path(__file__).resolve()}:tiny", ("--set", "steps=1000000000")),
    "char_gpt": ("examples/jobs/char_gpt.py:char_gpt", ("--set", "steps=1000000")),
    "cifar": ("examples/jobs/cifar.py:cifar", ("--set", "epochs=10000")),
}

#: The arms of a pair: seconds between saves.
OFTEN, NEVER = ("--save-every", "1s"), ("--save-every", "10000h")


def tiny(steps: int = 100_000) -> Job:
    """An MLP whose step takes a fraction of a millisecond."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8192, 64, generator=draw)
    return Job(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)),
        train_data=(x, (x @ torch.randn(64, 10, generator=draw)).argmax(1)), loss=F.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=1e-3), global_batch=32, steps=steps,
    )  # fmt: skip


def seconds_of(window: dict[str, float]) -> float:
    """Seconds of a window, saves and evaluations included."""
    return window["seconds"] + window["checkpoint"] + window["evaluation"]


def step_seconds(record: Record) -> float:
    """Seconds of a step, saves included and evaluations not, without the first and the last window."""
    inner = record.windows[1:-1]
    return sum(item["seconds"] + item["checkpoint"] for item in inner) / sum(item["n"] for item in inner)


def gaps(record: Record) -> list[float]:
    """Seconds between neighbouring saves, without the first and the last of the run."""
    at = [item["at"] for item in record.windows[1:-1] if item["checkpoint"] > 0]
    return [b - a for a, b in pairwise(at)]


def direct(name: str, ranks: int, record: Record) -> tuple[str, float | None]:
    """A row of the first table, and the seconds between saves."""
    inner = record.windows[1:-1]
    stalls = [item["checkpoint"] for item in inner if item["checkpoint"] > 0]
    told = next((item["text"] for item in record.events if "Young/Daly" in item.get("text", "")), "")
    every = statistics.median(gaps(record)) if len(stalls) > 1 else None
    total = sum(seconds_of(item) for item in inner)
    share = f"{sum(stalls) / total:.3%}" if stalls else "unknown"
    ends = [item["checkpoint"] for item in (record.windows[0], record.windows[-1])]
    row = (
        f"| {name} | {ranks} | {in_words(step_seconds(record))} | {in_words(total)} | {len(stalls)} | "
        f"{in_words(statistics.median(stalls)) if stalls else '-'} | {in_words(max(stalls)) if stalls else '-'} | "
        f"{in_words(every) if every else '-'} | **{share}** | {in_words(ends[0])}, {in_words(ends[1])} |"
    )
    print(f"{time.strftime('%H:%M:%S')} {row}\n    {told}", file=sys.stderr, flush=True)
    return row, every


def whole(name: str, ranks: int, pairs: int, seconds: float, every: float | None) -> str:
    """A row of the second table: pairs of runs with saves and without."""
    reference, options = JOBS[name]
    ranked = ("--nproc", str(ranks)) if ranks > 1 else ()
    over: list[float] = []
    spacing: list[float] = []
    for number in range(pairs):
        found: dict[tuple[str, ...], Record] = {}
        for arm in (OFTEN, NEVER) if number % 2 else (NEVER, OFTEN):
            with tempfile.TemporaryDirectory() as folder:
                found[arm] = train_for(seconds, reference, Path(folder) / "run", *options, *ranked, *arm)
        often, never = found[OFTEN], found[NEVER]
        spacing += gaps(often)
        # Of the time without saves, so that what a save costs is seconds a save.
        over.append(1.0 - step_seconds(never) / step_seconds(often))
        print(f"{time.strftime('%H:%M:%S')} {name}, {ranks}: pair {number + 1}: {over[-1]:+.2%}", file=sys.stderr,
              flush=True)  # fmt: skip
    if not spacing:
        return f"| {name} | {ranks} | {pairs} | no saves were seen: train longer | | | |"
    apart = statistics.median(spacing)
    (low, high), middle = bounds(over), statistics.median(over)
    cost = " to ".join(f"{1000.0 * item * apart:.1f}" for item in (low, high))
    share = f"{middle * apart / every:.3%} ({low * apart / every:.3%} to {high * apart / every:.3%})" if every else "-"
    return (
        f"| {name} | {ranks} | {pairs} | {in_words(apart)} | {middle:+.2%} ({low:+.2%} to {high:+.2%}) | "
        f"{1000.0 * middle * apart:.1f} ms ({cost}) | {share} |"
    )


def missing(name: str) -> str:
    """Why a job cannot be trained here; empty where it can."""
    if name == "cifar" and not (ROOT / "examples" / "data" / "cifar10.npz").exists():
        return "its data is not there: python examples/get_data.py cifar10"
    return ""


def main() -> None:
    """Train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of training at the chosen interval, each")
    parser.add_argument("--pairs", type=int, default=6, help="runs with and without saves; 0: none")
    parser.add_argument("--pair-seconds", type=float, default=20.0, help="of training of each run of a pair")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--ranks", default="1,2", help="numbers of processes")
    parser.add_argument("--into", type=Path, help="append the tables to this file")
    options = parser.parse_args()
    names, worlds = options.jobs.split(","), [int(item) for item in options.ranks.split(",")]
    for name in [item for item in names if missing(item)]:
        names.remove(name)
        print(f"{name}: left out, {missing(name)}", file=sys.stderr)
    rows: list[str] = []
    whole_rows: list[str] = []
    for name in names:
        reference, set_up = JOBS[name]
        for ranks in worlds:
            ranked = ("--nproc", str(ranks)) if ranks > 1 else ()
            with tempfile.TemporaryDirectory() as folder:
                record = train_for(options.seconds, reference, Path(folder) / "run", *set_up, *ranked)
            row, every = direct(name, ranks, record)
            rows.append(row)
            if options.pairs:
                whole_rows.append(whole(name, ranks, options.pairs, options.pair_seconds, every))
    lines = [
        f"torch {torch.__version__}, one thread a process; nothing said about saving; median of stalls and intervals",
        "",
        "| job | processes | a step | trained | saves | a stall | longest | interval | of the time | first and last |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    if whole_rows:
        lines += [
            "",
            "The whole effect: 95 % brackets over pairs; the last column is estimated from the cost of a save.",
            "",
            "| job | processes | pairs | saves every | share of the time | a save costs | at the chosen interval |",
            "|---|---|---|---|---|---|---|",
            *whole_rows,
        ]
    text = "\n".join(lines)
    publish(text, options.into)


if __name__ == "__main__":
    main()
