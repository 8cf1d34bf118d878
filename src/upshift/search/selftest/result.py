"""What a self-test found on this machine, and the bounds of the rates in it."""

from __future__ import annotations

import math

from upshift.measure.paired import AT_LEAST
from upshift.records import Pairing
from upshift.records.quantity import Record
from upshift.records.trial import Rung

#: The rate of false wins the decisions promise to stay below.
PROMISED = 0.01
#: Confidence of the bounds of a rate.
LEVEL = 0.95


def _at_most_seen(k: int, n: int, p: float) -> float:
    """P(X <= k) of n trials that each happen with probability p."""
    ways = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return math.fsum(math.exp(w + i * math.log(p) + (n - i) * math.log1p(-p)) for i, w in enumerate(ways))


def rate_high(k: int, n: int, level: float = LEVEL) -> float:
    """One-sided upper bound of a rate of which k of n were seen (Clopper and Pearson 1934); 1.0 without trials.

    Raises:
        ValueError: k is not in 0..n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"cannot have seen {k} of {n}")
    if k == n:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2.0
        if _at_most_seen(k, n, middle) > 1.0 - level:
            low = middle
        else:
            high = middle
    return high


def rate_low(k: int, n: int, level: float = LEVEL) -> float:
    """The lower bound; 0.0 without trials."""
    return 1.0 - rate_high(n - k, n, level)


class Identical(Record, frozen=True):
    """Decisions about two arms that do not differ. All but `no change` are false."""

    decisions: int = 0
    faster: int = 0
    slower: int = 0
    pairs: int = 0
    """Pairs of processes they were taken on."""
    seconds: float = 0.0

    @property
    def high(self) -> float:
        """Upper bound of the rate of false wins."""
        return rate_high(self.faster, self.decisions)


class Truth(Record, frozen=True):
    """One thing planted and what the confirmation made of it.

    `kept` says whether it would have entered a plan; `shown` whether the proof of quality passed; `reason` is the
    proof's, `rung` the one it reached, `steps` those it rests on. `seconds` is how long the arms alternated at most.
    """

    name: str
    kept: bool
    shown: bool
    decision: str
    reason: str
    seconds: float
    rung: Rung = "none"
    steps: int = 0
    pairing: Pairing | None = None
    failure: str = ""
    """Why the trial could not be made, empty where it was."""


class SelftestReport(Record, frozen=True):
    """What this machine's own trials show about the decisions upshift takes on it."""

    created: str
    machine: dict[str, str]
    seconds: float
    identical: Identical
    gains: tuple[Truth, ...] = ()
    faults: tuple[Truth, ...] = ()
    problems: tuple[str, ...] = ()
    """Trials that could not be made, with the reason."""
    left_out: tuple[str, ...] = ()
    """What was to be planted, and was not for lack of time."""
    interrupted: bool = False

    def wrong(self) -> tuple[str, ...]:
        """What must not be, one sentence each; empty where all is well."""
        found = list(self.problems)
        same = self.identical
        if rate_low(same.faster, same.decisions) > PROMISED:
            found.append(
                f"{same.faster} of {same.decisions} decisions called one of two identical arms faster: more than the "
                f"{PROMISED:.0%} promised can explain."
            )
        found += [f"A planted fault was accepted: {item.name}." for item in self.faults if item.shown]
        for item in self.gains:
            if item.failure:
                continue
            if not item.shown:
                found.append(f"A harmless change was rejected ({item.name}): {item.reason}.")
            elif item.pairing is not None and item.pairing.high < 1.0:
                found.append(f"A faster arm was called slower: {item.name}.")
        return tuple(found)

    def detectable(self) -> tuple[float, float] | None:
        """The smallest true gain (share) that would be kept nine times in ten, and the seconds of alternation for it.

        The median over the planted gains; None where none was timed.
        """
        # A gain is kept when its lower bound is above the margin, so the margin comes on top.
        found = sorted(
            AT_LEAST * (1.0 + item.pairing.smallest) - 1.0
            for item in self.gains
            if item.pairing is not None and item.pairing.smallest is not None
        )
        return (found[len(found) // 2], self.gains[0].seconds) if found else None
