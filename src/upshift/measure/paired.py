"""Paired timing: two arms alternate in ABBA quads; is the candidate faster, and by how much?

The noise of a training step is slow drift (clock, neighbours, heat) with rare heavy spikes. Inside an ABBA or BAAB
quad a linear drift cancels; the sign of each quad is drawn at random, so that what is left of the drift has mean
zero. The quad is the unit of evidence. Its value is log(mean A / mean B), positive where the candidate is faster.

Estimate: 20 % trimmed mean with Winsorised variance (Yuen 1974; Tukey and McLaughlin 1963), the variance raised by
the autocorrelation that is left. A trimmed mean cannot see an arm that stalls now and then (a queue that refills),
so where far quads lie on one side clearly more often than on the other (binomial test), the plain mean of time
ratios speaks instead. A gain that fades while it is measured counts as what is left of it.

Bounds: Student's t, and below 60 quads Wilcoxon's signed-rank bounds too (`ranks.py`), whichever is further out: a few
quads that agree by chance look like a gain without scatter to the former. So seven quads are the least for a decision
at 99 %. Where they scatter by more than 15 %, as many times more: on a busy machine one process may be at an advantage
for seconds.

Looks: `Sequential` decides while measuring. Looks come at geometrically spaced numbers of quads; each spends part of
the error by the power family of Kim and DeMets (1987) on elapsed time (alpha * t^1.5), shares added up by
Bonferroni; the interval reported is the repeated confidence interval of that look (Jennison and Turnbull 1989), valid
whenever one stops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal, NamedTuple

import msgspec

from upshift.measure import ranks
from upshift.measure.stats import long_run_variance, normal_quantile, t_quantile
from upshift.records.trial import Pairing

Decision = Literal["go on", "faster", "slower", "no change"]

#: A gain below this is not kept. It equals the margin of the lag: a plan whose lower bound is above it stays
#: faster even if it needs as many more steps as the proof of quality allows.
AT_LEAST = 1.01
#: Quads that are waited for when the time is up: fewer hardly show anything.
LEAST_QUADS = 8
#: Scatter of a quad (log) up to which `LEAST_QUADS` can decide; beyond it, as many times more as the scatter is larger.
QUIET = 0.15
#: Share trimmed at each end.
TRIM = 0.2
#: Spread of a quad (log) below which no clock is believed.
FLOOR = 1e-3
#: From so many quads on, halves are compared; the level at which the earlier half is called better than the later.
FADE_QUADS, FADE_LEVEL = 12, 0.999
FADES = ", of the later part: the gain fades"


class Block(NamedTuple):
    """a few steps of one arm: `A` the reference, `B` the candidate; `seconds` is their mean step time."""

    arm: str
    seconds: float


class Estimate(NamedTuple):
    """Log of reference time / candidate time, its standard error and degrees of freedom.

    `middle_of`: the quads whose middle it is; none where it is no middle.
    """

    value: float
    error: float
    df: int
    method: str
    middle_of: Sequence[float] = ()

    def bounds(self, tail: float) -> tuple[float, float]:
        """One-sided bounds (log), each wrong with probability `tail` at most."""
        half = t_quantile(1.0 - tail, self.df) * self.error
        low, high = self.value - half, self.value + half
        if 0 < len(self.middle_of) <= ranks.ENOUGH:
            below, above = ranks.bounds(self.middle_of, tail)
            if math.isinf(below):
                # Too few to exclude anything: no bound is known, and what is said must hold "no change".
                below, above = min(*self.middle_of, 0.0), max(*self.middle_of, 0.0)
            low, high = min(low, below), max(high, above)
        return low, high


def quad_log_ratios(blocks: Sequence[tuple[str, float]]) -> list[float]:
    """One value per complete ABBA or BAAB quad, in time order: log(mean A / mean B).

    Args:
        blocks: (arm, mean step seconds) in time order. After a lost block the scan finds the next complete quad;
            a quad with a time that is not finite and positive is left out.
    """
    values: list[float] = []
    index = 0
    while index + 4 <= len(blocks):
        four = blocks[index : index + 4]
        if "".join(block[0] for block in four) not in ("ABBA", "BAAB"):
            index += 1
            continue
        index += 4
        if all(math.isfinite(block[1]) and block[1] > 0.0 for block in four):
            outer, inner = four[0][1] + four[3][1], four[1][1] + four[2][1]
            values.append(math.log(outer / inner) if four[0][0] == "A" else math.log(inner / outer))
    return values


def arm_steps(blocks: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Trimmed mean step seconds of the reference and of the candidate (0.0 where an arm has no block)."""
    result = []
    for arm in "AB":
        ordered = sorted(seconds for name, seconds in blocks if name == arm and math.isfinite(seconds))
        cut = int(0.1 * len(ordered))
        kept = ordered[cut : len(ordered) - cut]
        result.append(math.fsum(kept) / len(kept) if kept else 0.0)
    return result[0], result[1]


def binomial_tail(successes: int, n: int) -> float:
    """P(X >= successes) of n fair coins."""
    return sum(math.comb(n, k) for k in range(successes, n + 1)) / 2.0**n


def estimate(quads: Sequence[float]) -> Estimate:
    """Where the quads lie at the end: trimmed mean, or the mean time ratio where one arm alone has far quads.

    A gain that fades was not one of the steady step: where the earlier half lies clearly above the later one, the
    later half speaks alone.

    Raises:
        ValueError: fewer than two quads.
    """
    n = len(quads)
    if n < 2:
        raise ValueError(f"need at least two quads, got {n}")
    if n >= FADE_QUADS:
        earlier, later = _middle_of(quads[: n // 2]), _middle_of(quads[n // 2 :])
        apart = math.hypot(earlier.error, later.error)
        if earlier.value - later.value > t_quantile(FADE_LEVEL, min(earlier.df, later.df)) * apart:
            rest = estimate(quads[n // 2 :])
            return rest if rest.method.endswith(FADES) else rest._replace(method=rest.method + FADES)
    return _middle_of(quads)


def _middle_of(quads: Sequence[float]) -> Estimate:
    """The estimate, of quads that are alike from the first to the last."""
    n = len(quads)
    ordered = sorted(quads)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0
    spread = max(1.4826 * median(abs(value - middle) for value in quads), FLOOR)
    slow = sum(value < middle - 5.0 * spread for value in quads)
    fast = sum(value > middle + 5.0 * spread for value in quads)
    if n >= 8 and binomial_tail(max(slow, fast), slow + fast) < 0.01:
        # The arm that stalls goes into the numerator: the mean of its time over the other's is what a run pays.
        sign = -1.0 if slow > fast else 1.0
        ratios = [math.exp(sign * value) for value in quads]
        mean = math.fsum(ratios) / n
        error = math.sqrt(max(long_run_variance(ratios), FLOOR**2) / n) / mean
        return Estimate(sign * math.log(mean), error, n - 1, "mean time ratio (one arm stalls)")
    cut = int(TRIM * n)
    kept = ordered[cut : n - cut]
    low, high = kept[0], kept[-1]
    winsorised = [low if value < low else high if value > high else value for value in quads]
    variance = max(long_run_variance(winsorised), FLOOR**2)
    # Yuen: the variance of a trimmed mean is (n - 1) s_w^2 / (h (h - 1)) with h values kept.
    error = math.sqrt((n - 1) * variance / (len(kept) * (len(kept) - 1)))
    return Estimate(math.fsum(kept) / len(kept), error, len(kept) - 1, "trimmed mean of ABBA quads", quads)


def _record(found: Estimate, quads: int, tail: float, level: float, steps: tuple[float, float], how: str) -> Pairing:
    low, high = found.bounds(tail)
    return Pairing(
        ratio=_exp(found.value),
        low=_exp(low),
        high=_exp(high),
        quads=quads,
        level=level,
        reference_step=steps[0],
        candidate_step=steps[1],
        smallest=_exp(found.value - low + normal_quantile(0.9) * found.error) - 1.0,
        method=f"{found.method}{how}",
    )


def _undecided(found: Pairing) -> Pairing:
    """Figures that rest on too few quads for their scatter exclude nothing."""
    return msgspec.structs.replace(
        found, low=min(found.low, 1.0), high=max(found.high, 1.0),
        method=f"{found.method}, too few quads for such scatter: the machine is busy",
    )  # fmt: skip


def _exp(value: float) -> float:
    """exp, held inside what JSON can carry."""
    return math.exp(max(-50.0, min(50.0, value)))


def pairing(quads: Sequence[float], level: float = 0.99, *, steps: tuple[float, float] = (0.0, 0.0)) -> Pairing:
    """The speed-up these quads show, with one-sided bounds at `level` each, for a number of quads fixed beforehand.

    Where measuring stopped depending on what was seen, use `Sequential.pairing`.

    Args:
        quads: values of `quad_log_ratios`, in time order.
        steps: seconds per step of the reference and the candidate, to be shown (see `arm_steps`).

    Raises:
        ValueError: fewer than four quads, or a value that is not finite.
    """
    if len(quads) < 4 or not all(map(math.isfinite, quads)):
        raise ValueError(f"need at least four finite quads, got {len(quads)}")
    return _record(estimate(quads), len(quads), 1.0 - level, level, steps, "")


class Sequential:
    """Decides after each quad whether to go on measuring.

    `faster` when the lower bound exceeds `at_least`, `slower` when the upper bound is below 1, `no change` when the
    upper bound is below `at_least` (an improvement worth keeping is excluded) or the time is up.

    Args:
        max_seconds: when to stop, or as soon after it as there are `LEAST_QUADS`; also the scale on which error is
            spent.
        level: one-sided level of each bound over all looks together.
        at_least: the ratio the lower bound must exceed.
        first: quads before the first look.
        growth: each look comes at this many times the quads of the one before.
    """

    def __init__(
        self,
        max_seconds: float,
        *,
        level: float = 0.99,
        at_least: float = AT_LEAST,
        first: int = 6,
        growth: float = 1.25,
    ) -> None:
        if not max_seconds > 0.0 or not 0.5 < level < 1.0 or first < 4 or growth <= 1.0:
            raise ValueError(f"unusable: {max_seconds=}, {level=}, {first=}, {growth=}")
        self.max_seconds = max_seconds
        self.level = level
        self.at_least = at_least
        self.growth = growth
        self.quads: list[float] = []
        self.decision: Decision = "go on"
        self._next = first
        self._spent = 0.0
        self._look: Pairing | None = None

    def add(self, log_ratio: float, elapsed: float) -> Decision:
        """Take in one quad (see `quad_log_ratios`); `elapsed` is seconds of measuring so far.

        A value that is not finite is left out. After a decision further quads are ignored.
        """
        if self.decision != "go on":
            return self.decision
        if math.isfinite(log_ratio):
            self.quads.append(log_ratio)
        if self.time_is_up(elapsed):
            return self.finish()
        if elapsed >= self.max_seconds:
            return self.decision  # the last look waits for quads that can show something
        if len(self.quads) >= self._next:
            self._next = max(self._next + 1, math.ceil(len(self.quads) * self.growth))
            self._decide(elapsed / self.max_seconds)
        return self.decision

    def time_is_up(self, elapsed: float) -> bool:
        """Whether measuring ends after so many seconds: at `max_seconds`, or up to twice that for the least quads."""
        return elapsed >= self.max_seconds * (1.0 if len(self.quads) >= LEAST_QUADS else 2.0)

    def least(self) -> int:
        """Quads a decision needs: more where they scatter more, whatever their middle is."""
        if len(self.quads) < 4:
            return LEAST_QUADS
        middle = median(self.quads)
        scatter = 1.4826 * median(abs(value - middle) for value in self.quads)
        return math.ceil(LEAST_QUADS * scatter / QUIET) if scatter > QUIET else 0

    def finish(self) -> Decision:
        """The last look, with all error that is left: what is not shown by now is `no change`."""
        if self.decision == "go on":
            if len(self.quads) >= 4:
                self._decide(1.0, last=True)
            if self.decision == "go on":
                self.decision = "no change"
        return self.decision

    def _decide(self, time: float, last: bool = False) -> None:
        spent = (1.0 - self.level) * min(1.0, time) ** 1.5
        share = spent - self._spent
        if share <= 1e-12:
            return
        if not last and 2.0 ** -len(self.quads) > share:
            return  # no pattern of so few quads could decide: the error is kept for a look that can
        if not last and len(self.quads) < self.least():
            return  # so busy a machine favours one process for seconds: more turns, over more time, must agree
        self._spent = spent
        self._look = _record(estimate(self.quads), len(self.quads), share, self.level, (0.0, 0.0), ", repeated looks")
        if len(self.quads) < self.least():
            self._look = _undecided(self._look)
            return
        if self._look.low > self.at_least:
            self.decision = "faster"
        elif self._look.high < 1.0:
            self.decision = "slower"
        elif self._look.high < self.at_least:
            self.decision = "no change"

    def pairing(self, steps: tuple[float, float] = (0.0, 0.0)) -> Pairing | None:
        """The interval of the last look, valid under the stopping rule; None before the first.

        `steps` are seconds per step of the reference and the candidate, to be shown (see `arm_steps`).
        """
        if self._look is None:
            return None
        return msgspec.structs.replace(self._look, reference_step=steps[0], candidate_step=steps[1])
