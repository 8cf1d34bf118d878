"""False wins and power of the statistics behind a plan, by simulation. Seeded; no torch, no clock.

    python benchmarks/proof_simulation.py [--sessions 2000] [--only timing|lag]

Timing: blocks of one 32 ms step in ABBA quads with random sign, 20 s of measuring, decided after every quad by
`Sequential`. Noise of a block (log scale): slow AR(1) drift with lag-1 correlation 0.85 (standard deviation 6 %),
white noise 1.5 %, stalls (2 % of blocks, Pareto), stolen-core episodes (20 blocks on average, 1.2 to 2 times slower).

Lag: pairs of loss curves with common mini-batch noise and an independent, wandering difference that grows with time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator

from upshift.measure.lag import lag
from upshift.measure.paired import Sequential, quad_log_ratios


def block_noise(rng: random.Random, scale: float = 1.0, rho: float = 0.85) -> Iterator[float]:
    """Multiplicative noise of successive blocks. `scale` multiplies drift and white noise."""
    drift = rng.gauss(0.0, 0.06 * scale)
    stolen, factor = 0, 1.0
    while True:
        drift = rho * drift + math.sqrt(1.0 - rho * rho) * rng.gauss(0.0, 0.06 * scale)
        value = math.exp(drift + rng.gauss(0.0, 0.015 * scale))
        if rng.random() < 0.02:
            value *= rng.paretovariate(2.0)
        if stolen == 0 and rng.random() < 0.002:
            stolen, factor = rng.randint(5, 35), rng.uniform(1.2, 2.0)
        if stolen:
            stolen -= 1
            value *= factor * math.exp(rng.gauss(0.0, 0.1))
        yield value


def quads(rng: random.Random, gain: float, step: float = 0.032, **noise: float) -> Iterator[tuple[float, float]]:
    """Endless (log ratio, seconds of measuring so far) of ABBA quads; `gain` is the true ratio."""
    source, elapsed = block_noise(rng, **noise), 0.0
    while True:
        arms = "ABBA" if rng.random() < 0.5 else "BAAB"
        blocks = [(arm, step * next(source) / (gain if arm == "B" else 1.0)) for arm in arms]
        elapsed += sum(seconds for _, seconds in blocks)
        yield quad_log_ratios(blocks)[0], elapsed


def session(rng: random.Random, gain: float, seconds: float, **noise: float) -> tuple[str, float, Sequential]:
    """One measurement to its decision: (decision, seconds taken, the test)."""
    test = Sequential(seconds)
    for value, elapsed in quads(rng, gain, **noise):
        if test.add(value, elapsed) != "go on":
            return test.decision, elapsed, test
    raise AssertionError("unreachable")


def curves(
    rng: random.Random, true_lag: float, steps: int, wander: float = 1.0, noise: float = 0.1
) -> tuple[list[float], list[float]]:
    """Losses of a stock and a planned arm: a power law as of a small character model, on shared batches.

    `noise` is the heavy-tailed mini-batch noise both arms share. Their own difference is white noise and a slow wander
    of 0.0003 to 0.0013 each, growing with time, as measured between float32 and bf16; `wander` multiplies both.
    """
    stock, planned, slow = [], [], rng.gauss(0.0, 1.0)
    for t in range(1, steps + 1):
        shared = noise * rng.gauss(0.0, 1.0) / math.sqrt(rng.gammavariate(2.5, 0.4))
        slow = 0.95 * slow + math.sqrt(1.0 - 0.95**2) * rng.gauss(0.0, 1.0)
        own = wander * (0.0003 + 0.001 * t / steps) * (slow + rng.gauss(0.0, 1.0))
        stock.append(1.2 + 3.3 * t**-0.3 + shared)
        planned.append(1.2 + 3.3 * (t / (1.0 + true_lag)) ** -0.3 + shared + own)
    return stock, planned


def lags(sessions: int) -> None:
    """Print how often a lag is called non-inferior, or shown to be harm, by true lag."""
    print(f"lag, {sessions} pairs each: non-inferior = upper 99 % bound <= 1 %; harm = lower 99 % bound > 0")
    print("  steps  own noise  true lag   non-inferior (95 % upper)   harm      flat   median smallest lag")
    for steps, wander in ((20, 1.0), (60, 1.0), (200, 1.0), (200, 5.0), (200, 30.0)):
        for true_lag in (0.0, 0.005, 0.01, 0.02, 0.05):
            rng = random.Random(steps * 1000 + int(true_lag * 1000) + int(wander))
            found = [lag(*curves(rng, true_lag, steps, wander)) for _ in range(sessions)]
            yes = sum(item.non_inferior for item in found)
            harm = sum(item.low is not None and item.low > 0.0 and not item.non_inferior for item in found)
            smallest = sorted(item.smallest for item in found if item.smallest is not None)
            print(
                f"  {steps:5d}  {wander:9.0f}  {true_lag:8.3f}   {yes / sessions:8.2%} (<{upper(yes, sessions):7.2%})"
                f"          {harm / sessions:8.2%}  {sum(item.flat for item in found) / sessions:7.2%}"
                f"   {smallest[len(smallest) // 2] if smallest else math.nan:.4f}"
            )


def upper(hits: int, n: int) -> float:
    """One-sided 95 % Clopper-Pearson bound on a rate."""
    if hits == n:
        return 1.0
    low, high = hits / n, 1.0 - 1e-12
    for _ in range(60):
        p = (low + high) / 2.0
        tail = sum(
            math.exp(
                math.lgamma(n + 1)
                - math.lgamma(k + 1)
                - math.lgamma(n - k + 1)
                + k * math.log(p)
                + (n - k) * math.log1p(-p)
            )
            for k in range(hits + 1)
        )
        low, high = (p, high) if tail > 0.05 else (low, p)
    return high


def timing(sessions: int) -> None:
    """Print decisions by true gain."""
    print(f"timing, {sessions} sessions each; 'faster' needs a lower bound above 1.01, 20 s cap unless said")
    print(
        "  noise              true gain   faster (95 % upper)   slower  no change  mean seconds  bound missed low/high"
    )
    cases: list[tuple[str, float, float, dict[str, float]]] = [
        ("as seen", g, 20.0, {}) for g in (1.0, 1.01, 1.03, 1.05, 1.3, 0.95)
    ]
    cases += [
        ("as seen, 60 s", 1.03, 60.0, {}),
        ("as seen, 60 s", 1.0, 60.0, {}),
        ("stronger drift", 1.0, 20.0, {"scale": 3.0, "rho": 0.9}),
        ("white, wide", 1.0, 20.0, {"scale": 3.0, "rho": 0.0}),
    ]
    for name, gain, cap, noise in cases:
        rng = random.Random(int(gain * 1000) + int(cap) + len(noise))
        seen = {"faster": 0, "slower": 0, "no change": 0}
        spent, low, high = 0.0, 0, 0
        for _ in range(sessions):
            decision, elapsed, test = session(rng, gain, cap, **noise)
            seen[decision] += 1
            spent += elapsed
            found = test.pairing()
            low += found is not None and found.low > gain
            high += found is not None and found.high < gain
        print(
            f"  {name:18s} {gain:8.2f}   {seen['faster'] / sessions:6.2%} (<{upper(seen['faster'], sessions):6.2%})"
            f"   {seen['slower'] / sessions:8.2%}  {seen['no change'] / sessions:8.2%}  {spent / sessions:9.1f}"
            f"       {low / sessions:.2%} / {high / sessions:.2%}"
        )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--only", choices=("timing", "lag"), default="")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.only != "lag":
        timing(arguments.sessions)
    if arguments.only != "timing":
        lags(max(100, arguments.sessions // 4))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
