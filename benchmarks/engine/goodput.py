"""How much of the time is training, where the machine is taken away again and again: kill -9, and the same command.

    python benchmarks/engine/goodput.py [--minutes 8] [--interval 3] [--into FILE]

A job of so many minutes is trained once without interruption and once with `kill -9` of its process group at
exponentially distributed times whose mean is ten save intervals; after each kill the same `upshift run --out` in a
fresh process goes on. Goodput is the time of the uninterrupted run over that of all attempts together, both from the
start of the process to its end. The last states must be equal bit by bit. What was lost is told apart by the moments
of every step, which the job notes in a file:

start-up    from the start of a process to its first step (the interpreter, torch, the data, the checkpoint)
repeated    steps that no checkpoint held when the kill came
stalls      what saves kept the loop, as far as the record was written
end         from the last step of the job to the end of its process

The interval is set by hand, so that a short session sees many kills; start-up weighs in it as it would not elsewhere.
So the parts are also put into Daly's model (FGCS 22, 2006) at the interval that would be chosen: estimated, and the
measured figure stands beside the model's for the session itself. No way of saving at even intervals can do better than
0.951 at one kill in ten intervals: half an interval is lost each time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cli_runs import ROOT, Record, kill, records, said, start, stop
from tables import publish

from upshift import Job
from upshift.checkpoint.compare import differences
from upshift.checkpoint.interval import seconds_between
from upshift.checkpoint.store import Store
from upshift.units import seconds as in_words

#: Names the file to which a job's process writes the moment of each step.
STAMPS = "GOODPUT_STAMPS"

#: Mean time between kills, in save intervals.
INTERVALS = 10.0
A_DAY = 86_400.0


def job(steps: int = 100_000, width: int = 64, block: int = 64) -> Job:
    """The character GPT of the examples, smaller and without evaluations, which notes the moments of its steps."""
    spec = importlib.util.spec_from_file_location("char_gpt_job", ROOT / "examples" / "jobs" / "char_gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    declared: Job = module.char_gpt(steps=steps, width=width, block=block)
    fd = os.open(os.environ.get(STAMPS, os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def loss(output: Any, target: torch.Tensor) -> Any:
        os.write(fd, f"{time.monotonic()}\n".encode())  # one clock for all processes of the machine
        return module.loss(output, target)

    return declared.set(loss=loss, eval_data=None, eval_every=None, metrics={}, target=None)


@dataclass
class Attempt:
    """One process: the monotonic seconds of its start, steps and end; the step where it went on; its record."""

    began: float
    ended: float
    steps: list[float]
    first: int
    record: Record

    def lost_from(self, kept: int) -> float:
        """The moment from which on nothing of it was kept, when `kept` steps were."""
        inside = kept - self.first
        return self.steps[inside] if 0 <= inside < len(self.steps) else self.ended


@dataclass
class Parts:
    """Where the seconds of one or more attempts went."""

    total: float
    start_up: float
    steps: float
    repeated: float
    stalls: float
    end: float


def attempt(out: Path, options: tuple[str, ...], life: float | None, first: int) -> tuple[Attempt, int | None]:
    """Start the run, or go on with it; None for the exit code where it was killed after `life` seconds."""
    stamps = out.parent / "stamps"
    stamps.unlink(missing_ok=True)
    before = len(records(out))
    began = time.monotonic()
    process = start(f"{Path(__file__).resolve()}:job", out, *options, **{STAMPS: str(stamps)})
    code: int | None = None
    try:
        code = process.wait(life)
    except subprocess.TimeoutExpired:
        pass
    finally:
        kill(process)
    ended = time.monotonic()
    text = stamps.read_text() if stamps.exists() else ""
    steps = [float(line) for line in text.split("\n")[:-1]]
    return Attempt(began, ended, steps, first, [*records(out)[before:], Record()][0]), code


def split(attempts: list[Attempt], kept: list[int]) -> Parts:
    """Tell the seconds apart; `kept[i]` steps were on disk when attempt `i` ended, the last one at its end."""
    start_up = repeated = steps = stalls = 0.0
    for item, reached in zip(attempts, kept, strict=True):
        start_up += (item.steps[0] if item.steps else item.ended) - item.began
        if not item.steps:
            continue
        whole = item is attempts[-1]
        lost = item.steps[-1] if whole else max(item.lost_from(reached), item.steps[0])
        repeated += 0.0 if whole else item.ended - lost
        # The save before the first step is part of the start, that after the last one of the end.
        windows = item.record.windows[int(item.first == 0) : -1 if whole else None]
        stall = sum(window["checkpoint"] for window in windows if window["first"] + window["n"] <= reached)
        steps += lost - item.steps[0] - stall
        stalls += stall
    end = attempts[-1].ended - attempts[-1].steps[-1]
    return Parts(attempts[-1].ended - attempts[0].began, start_up, steps, repeated, stalls, end)


def newest(out: Path) -> int:
    """The step from which the run would go on."""
    found = Store(out).newest()
    return 0 if found is None else found.step


def model(interval: float, between: float, stall: float, restart: float) -> float:
    """Share of the time that is training: Daly's T_w = M e^(R/M) (e^((tau+delta)/M) - 1) T_s / tau.

    Args:
        interval: tau, seconds of training between two saves. between: M, mean seconds between kills.
        stall: delta, seconds of a save. restart: R, seconds from a start to the first step.
    """
    return interval / (between * math.exp(restart / between) * math.expm1((interval + stall) / between))


def starts_needed(goal: float = 0.95) -> float:
    """M / R at which `goal` is reached at one kill in ten intervals where a save holds nothing up."""
    return 1.0 / math.log(model(1.0, INTERVALS, 0.0, 0.0) / goal)


def bracket(attempts: list[Attempt], kept: list[int], pace: float) -> tuple[float, float]:
    """95 % of the goodput, by drawing the attempts anew (percentile bootstrap, 2,000 draws)."""
    gains = [pace * (reached - item.first) for item, reached in zip(attempts, kept, strict=True)]
    lives = [item.ended - item.began for item in attempts]
    draw = random.Random(0)
    found = []
    for _ in range(2000):
        rows = draw.choices(range(len(attempts)), k=len(attempts))
        found.append(sum(gains[row] for row in rows) / sum(lives[row] for row in rows))
    found.sort()
    return found[50], found[1949]


def final(out: Path) -> Any:
    """The last state, without what only tells how long it took."""
    store = Store(out)
    checkpoint = store.newest()
    assert checkpoint is not None, f"no checkpoint in {out}"
    state = store.load(checkpoint)[0]
    state["progress"].pop("seconds", None)
    return state


def steps_of(minutes: float, folder: Path, options: tuple[str, ...], seconds: float) -> int:
    """How many steps take so many minutes, from a short training."""
    stamps = folder / "pace"
    process = start(f"{Path(__file__).resolve()}:job", folder / "trial", *options, **{STAMPS: str(stamps)})
    try:
        while not (stamps.exists() and len(stamps.read_text().split("\n")) > 5):
            if process.poll() is not None:
                raise SystemExit(f"the job ended: {said(folder / 'trial')}")
            time.sleep(0.2)
        time.sleep(seconds)
        at = [float(line) for line in stamps.read_text().split("\n")[:-1]]
        stop(process)
    finally:
        kill(process)
    return max(int(60.0 * minutes / ((at[-1] - at[3]) / (len(at) - 4))), 10)


def main() -> None:
    """Train, kill, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training without interruption")
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help="append the tables to this file")
    given = parser.parse_args()
    mean = INTERVALS * given.interval
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = ("--save-every", f"{given.interval:g}s")
        steps = steps_of(given.minutes, folder, saved, 3.0 * given.interval)
        options = (*saved, "--set", f"steps={steps}")
        alone, code = attempt(folder / "alone", options, None, 0)
        if code != 0:
            raise SystemExit(f"the uninterrupted run ended with {code}: {said(folder / 'alone')}")
        without = split([alone], [steps])
        print(f"{time.strftime('%H:%M:%S')} {steps} steps in {without.total:.0f} s", file=sys.stderr, flush=True)
        out, attempts, kept = folder / "killed", [], []
        while True:
            item, code = attempt(out, options, draw.expovariate(1.0 / mean), kept[-1] if kept else 0)
            if code not in (None, 0):
                raise SystemExit(f"attempt {len(attempts) + 1} ended with {code}: {said(out)}")
            attempts.append(item)
            kept.append(newest(out))
            print(f"{time.strftime('%H:%M:%S')} {len(attempts)}: {item.ended - item.began:.1f} s, step {kept[-1]}",
                  file=sys.stderr, flush=True)  # fmt: skip
            if code == 0:
                break
            if item.ended - attempts[0].began > 10.0 * without.total:
                raise SystemExit("it does not come to its end: a longer --interval gives it more time between kills")
        problems = differences(final(folder / "alone"), final(out))
        text = report(given.interval, steps, without, alone, attempts, kept, problems)
    publish(text, given.into)


def report(interval: float, steps: int, without: Parts, alone: Attempt, attempts: list[Attempt], kept: list[int],
           problems: list[str]) -> str:  # fmt: skip
    """The tables."""
    found = split(attempts, kept)
    goodput = without.total / found.total
    low, high = bracket(attempts, kept, without.total / steps)
    starts = [item.steps[0] - item.began for item in attempts if item.steps]
    restart = statistics.median(starts)
    stalls = [item["checkpoint"] for item in alone.record.windows[1:-1] if item["checkpoint"] > 0]
    stall = statistics.median(stalls) if stalls else 0.0
    mean = INTERVALS * interval
    chosen = seconds_between(stall, between=A_DAY)
    lives = [item.ended - item.began for item in attempts[:-1]]
    rest = found.total - found.start_up - found.steps - found.repeated - found.stalls - found.end
    average = f", after {in_words(statistics.mean(lives))} on average" if lives else ""
    states = f"differ in {', '.join(problems[:3])}" if problems else "equal bit by bit"
    lines = [
        f"{steps} steps, a save every {in_words(interval)}, {len(lives)} kills{average} (drawn with a mean of "
        f"{in_words(mean)}), torch {torch.__version__}, one thread; last states {states}",
        "",
        f"**Goodput {goodput:.1%}** ({low:.1%} to {high:.1%}), measured: {in_words(without.total)} without "
        f"interruption, {in_words(found.total)} with.",
        "",
        "| part | uninterrupted | with kills | of the time with kills |",
        "|---|---|---|---|",
        _part("steps that were kept", without.steps, found.steps, found.total),
        _part("start-up", without.start_up, found.start_up, found.total),
        _part("steps that were repeated", 0.0, found.repeated, found.total),
        _part("save stalls", without.stalls, found.stalls, found.total),
        _part("end of the job", without.end, found.end, found.total),
        _part("between processes", 0.0, rest, found.total),
        "",
        f"A start takes {in_words(restart)} (median of {len(starts)}), a save holds the loop for {in_words(stall)} "
        f"(median of {len(stalls)}). With these in Daly's model:",
        "",
        "| save every | a kill every | goodput | |",
        "|---|---|---|---|",
        _modelled("set by hand", interval, mean, stall, restart),
        _modelled("the default", chosen, INTERVALS * chosen, stall, restart),
        _modelled("ten times the default", 10.0 * chosen, 10.0 * INTERVALS * chosen, stall, restart),
        _modelled("the default, and the day it is meant for", chosen, A_DAY, stall, restart),
        f"| any | ten intervals | {model(1.0, INTERVALS, 0.0, 0.0):.2%} | the most, with no start-up and no stall |",
        "",
        f"95 % at a kill every ten intervals asks for a start of at most 1/{starts_needed():,.0f} of the time between "
        f"kills: here a kill every {in_words(starts_needed() * restart)}.",
    ]
    return "\n".join(lines)


def _part(name: str, without: float, found: float, total: float) -> str:
    return f"| {name} | {in_words(without)} | {in_words(found)} | {found / total:.1%} |"


def _modelled(name: str, interval: float, between: float, stall: float, restart: float) -> str:
    found = model(interval, between, stall, restart)
    return f"| {in_words(interval)}, {name} | {in_words(between)} | {found:.2%} | estimated |"


if __name__ == "__main__":
    main()
