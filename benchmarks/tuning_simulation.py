"""How often the unpaired looks of `run --tune` turn down an honest technique, and what harm they see. Seeded; seconds.

    python benchmarks/tuning_simulation.py [--sessions 1000]

A session: 17 quads of one step a block; loss and the norms of two parameters' gradients scatter log-normally from step
to step, all on a falling trend. The replayed batches, the sharp look, are not simulated.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter

from upshift.measure.inrun import Sample, judge_losses, judge_norms

NAMES = ("weight", "bias")
QUADS = 17


def session(seed: int, scatter: float, loss: float, norm: float) -> list[Sample]:
    """The samples of one trial; with the technique, loss and norms are these times as large."""
    draw = random.Random(seed)
    found = []
    for quad in range(QUADS):
        first = draw.random() < 0.5
        for place, with_it in enumerate((first, not first, not first, first)):
            trend = math.exp(-0.005 * (4 * quad + place))
            values = [trend * math.exp(draw.gauss(0.0, scatter)) for _ in range(3)]
            if with_it:
                values = [values[0] * loss, *(value * norm for value in values[1:])]
            found.append(Sample(quad, with_it, values[0], values[1:]))
    return found


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    sessions = parser.parse_args().sessions
    print(f"{'scatter':>7} {'loss':>5} {'norm':>5}  {'passes':>7} {'apart':>7} {'not shown':>10}")
    cases = [(0.1, 1.0, 1.0), (0.3, 1.0, 1.0), (0.1, 1.0, 0.95), (0.1, 1.0, 0.9), (0.3, 1.0, 0.5), (0.1, 0.95, 1.0),
             (0.1, 0.9, 1.0)]  # fmt: skip
    for scatter, loss, norm in cases:
        counts: Counter[str] = Counter()
        for seed in range(sessions):
            samples = session(seed, scatter, loss, norm)
            answers = {judge_losses(samples).answer, judge_norms(samples, NAMES).answer}
            counts["apart" if "apart" in answers else "not shown" if "not shown" in answers else "passes"] += 1
        shares = [counts[name] / sessions for name in ("passes", "apart", "not shown")]
        print(f"{scatter:7.0%} {loss:5.2f} {norm:5.2f}  {shares[0]:7.1%} {shares[1]:7.1%} {shares[2]:10.1%}")


if __name__ == "__main__":
    main()
