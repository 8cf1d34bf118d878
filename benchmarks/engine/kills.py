"""Trainings killed at random, compared bit by bit with ones that were not.

    python benchmarks/engine/kills.py --kills 3000 --into FILE

Each training is killed up to ten times (SIGKILL to its process group, half of them while a checkpoint is being
written) and then ends; weights, optimizer, averages, random states and the samples of every step are compared with
those of an uninterrupted run. Kinds of trainings alternate.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tables import publish

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "engine"))


def main() -> None:
    """Kill, count, print."""
    import tiny_jobs

    from upshift.testing.kills import Counts, killed_until_done

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help="append the table to this file")
    options = parser.parse_args()
    long = tiny_jobs.full.set(epochs=12, schedule=None)
    kinds = {
        "everything": (long, {"save_steps": 2}),
        "micro-batches": (long, {"save_steps": 3, "micro_batch": 20}),
        "augmented": (tiny_jobs.augmented.set(epochs=6, schedule=None), {"save_steps": 2}),
        "two workers": (tiny_jobs.augmented.set(epochs=4, schedule=None),
                        {"save_steps": 2, "loader": {"num_workers": 2}}),
    }  # fmt: skip
    totals = {name: Counts() for name in kinds}
    seed, until = options.seed, time.monotonic() + 60 * options.minutes
    try:
        while sum(item.kills for item in totals.values()) < options.kills and time.monotonic() < until:
            for name, (job, settings) in kinds.items():
                seed += 1
                with tempfile.TemporaryDirectory() as folder:
                    found = killed_until_done(
                        job, Path(folder), kills=10, seed=seed, settings=settings, longest=0.6
                    )  # fmt: skip
                totals[name].add(found)
            done = sum(item.kills for item in totals.values())
            print(f"{time.strftime('%H:%M:%S')} {done} kills", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: the table holds what was seen by now", file=sys.stderr)
    lines = ["| training | runs | kills | while saving | unreadable | acknowledged and lost | different | failed |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    everything = Counts()
    for name, item in totals.items():
        lines.append(_row(name, item))
        everything.add(item)
    lines.append(_row("**all**", everything))
    text = "\n".join([*lines, *everything.notes])
    publish(text, options.into)


def _row(name: str, item: object) -> str:
    fields = ("runs", "kills", "in_save", "unreadable", "lost", "different", "failed")
    return f"| {name} | " + " | ".join(str(getattr(item, field)) for field in fields) + " |"


if __name__ == "__main__":
    main()
