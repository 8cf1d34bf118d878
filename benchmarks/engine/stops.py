"""SIGTERM at random moments: is a checkpoint of the step under way on disk within the grace?

    python benchmarks/engine/stops.py --times 100 --into FILE

A training gets SIGTERM (to its process group, loader workers included) while it trains, evaluates or saves, with 5 s
grace. It has to exit with 143 and leave a checkpoint of the step it said it stopped after, which verifies. Reported are
the seconds from the signal to the end of the process, the checkpoint being durable before that.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "engine"))


def main() -> None:
    """Stop, count, print."""
    import tiny_jobs

    from upshift.checkpoint.store import Store
    from upshift.testing.kills import samples_by_step, train_in_child

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help="append the table to this file")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    held_out = (tiny_jobs.X[320:].repeat(300, 1), tiny_jobs.Y[320:].repeat(300))
    long = tiny_jobs.full.set(epochs=10_000, schedule=None, eval_data=None, metrics={})
    evaluates = long.set(eval_data=held_out, metrics={"accuracy": "accuracy"}, eval_batch=48)
    augmented = tiny_jobs.augmented.set(epochs=10_000, schedule=None, eval_data=None, metrics={})
    kinds = {
        "training": (long, {"save_steps": 500}),
        "training, two workers": (augmented, {"save_steps": 500, "loader": {"num_workers": 2}}),
        "mostly evaluating": (evaluates, {"save_steps": 500}),
        "mostly saving": (long, {"save_steps": 1}),
    }
    lines = ["| SIGTERM while | times | 143 and durable | seconds to the end: median | most |", "|---|---|---|---|---|"]
    for name, (job, settings) in kinds.items():
        good, times = 0, []
        for number in range(options.times // len(kinds)):
            with tempfile.TemporaryDirectory() as folder:
                out, log = Path(folder) / "run", Path(folder) / "log"
                pid = train_in_child(job, out, log, {**settings, "grace": 5.0})
                # Until the first checkpoint is there, so that the handler is.
                until = time.monotonic() + 60
                while not any((out / "checkpoints").glob("step-*")) and time.monotonic() < until:
                    time.sleep(0.005)
                time.sleep(draw.uniform(0.05, 1.0))
                sent = time.monotonic()
                os.killpg(pid, signal.SIGTERM)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                times.append(time.monotonic() - sent)
                trained = max(samples_by_step(log)) + 1
                store = Store(out)
                found = store.newest()
                # The last update that was begun was also saved, or it was the one before (begun, and not made).
                good += code == 143 and found is not None and found.step in (trained, trained - 1)
            print(f"{time.strftime('%H:%M:%S')} {name} {number + 1}: {times[-1]:.2f} s", file=sys.stderr, flush=True)
        lines.append(f"| {name} | {len(times)} | {good} | {statistics.median(times):.2f} | {max(times):.2f} |")
    text = "\n".join(lines)
    print(text)
    if options.into:
        with open(options.into, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
