"""SIGTERM at random moments: is a checkpoint of the step under way on disk within the grace?

    python benchmarks/engine/stops.py --times 100 --into FILE

A training gets SIGTERM (to its process group: loader workers and compilers included) while it trains, evaluates,
compiles or saves, with 5 s grace. It has to exit with 143 and leave a checkpoint of the step it stopped after, which
verifies. Reported are the seconds from the signal to the end of the process, the checkpoint being durable before that.
"Compiling" trains under the technique `compile`, with an empty cache each time, and is stopped within the seconds that
its first update takes; "in a long call" has updates of 0.3 s, one of which stands 30 s in one call of C.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import publish

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "engine"))


def wait_for(found: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that is bound to come."""
    until = time.monotonic() + seconds
    while not found() and time.monotonic() < until:
        time.sleep(0.005)


def with_long_call(job: Any, inside: Path, at: int) -> Any:
    """Updates of 0.3 s; in number `at` the main thread does not come back from C for 30 s, nor see the signal."""
    calls = [0]

    def forward(model: Any, batch: Any) -> Any:
        found = model(batch[0])
        if calls[0] == at:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            inside.touch()
            time.sleep(30.0)
        calls[0] += 1
        time.sleep(0.3)
        return found

    return job.set(forward=forward, loss=lambda output, batch: job.loss(output, batch[1]))


def main() -> None:
    """Stop, count, print."""
    import tiny_jobs

    from upshift.checkpoint.store import Store
    from upshift.engine.run import train_job
    from upshift.testing.kills import samples_by_step, train_in_child

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows, with commas between them")
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
        "compiling": (long, {"plan": {"compile": {"mode": "default"}}}),
        "in a long call": (long, {}),
    }
    chosen = {name: kinds[name] for name in (options.only.split(",") if options.only else kinds)}
    # What torch imports at the first update is then there in every child.
    train_job(tiny_jobs.plain.set(epochs=1))
    lines = ["| SIGTERM while | times | 143 and durable | seconds to the end: median | most |", "|---|---|---|---|---|"]
    for name, (job, settings) in chosen.items():
        good, times = 0, []
        for number in range(options.times // len(kinds)):
            with tempfile.TemporaryDirectory() as folder:
                out, log, inside = Path(folder) / "run", Path(folder) / "log", Path(folder) / "inside"
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "cache")
                if name == "in a long call":
                    job = with_long_call(long, inside, draw.randrange(1, 6))
                pid = train_in_child(job, out, log, {**settings, "grace": 5.0, "process_ends": True})
                # Until the first checkpoint is there, so that the handler is.
                wait_for(lambda out=out: any((out / "checkpoints").glob("step-*")))
                if name == "in a long call":
                    wait_for(inside.exists)
                time.sleep(draw.uniform(0.05, 5.0 if name == "compiling" else 1.0))
                sent = time.monotonic()
                os.killpg(pid, signal.SIGTERM)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                times.append(time.monotonic() - sent)
                trained = max(samples_by_step(log)) + 1
                store = Store(out)
                found = store.newest()
                # The last update that was begun was also saved, or it was the one before (begun, and not made).
                fine = code == 143 and found is not None and found.step in (trained, trained - 1)
                good += fine
                if not fine:
                    step = found.step if found is not None else None
                    print(f"{name}: code {code}, step {step}, begun {trained}", file=sys.stderr)
            print(f"{time.strftime('%H:%M:%S')} {name} {number + 1}: {times[-1]:.2f} s", file=sys.stderr, flush=True)
        lines.append(f"| {name} | {len(times)} | {good} | {statistics.median(times):.2f} | {max(times):.2f} |")
    text = "\n".join(lines)
    publish(text, options.into)


if __name__ == "__main__":
    main()
