"""What to try, in which order, and what a budget buys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from upshift.records import Measurement, Trial
from upshift.records.plan import Setting
from upshift.records.quantity import Record
from upshift.sites import Numerics, Technique
from upshift.units import seconds as in_words

#: Seconds a search may take that nobody limited.
DEFAULT_BUDGET = 180.0

#: Why a technique is no candidate of a search by step time.
CHANGES_TRAINING = (
    "changes the training: takes part only with --objective time-to-target or cost, a --metric and a --target"
)

#: Why a technique that trades time for memory is no candidate.
SAVES_MEMORY = "saves memory and takes time: takes part only with --fit, or --only {name}"


class Candidate(Record, frozen=True):
    """One technique with settings to try. `gain` is the predicted speed-up (1.0 where nothing can be predicted)."""

    name: str
    settings: dict[str, Setting]
    live: bool
    gain: float
    reason: str
    targets: frozenset[str] = frozenset()
    """Phases it acts on."""
    fills: bool = False
    """Reaches its steady state only after an epoch (a cache of the data)."""
    prepares: bool = False
    """Does work of its own before the first step (compiles)."""

    @property
    def label(self) -> str:
        """`loader(workers=2)`."""
        inside = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.name}({inside})" if inside else self.name


def candidates(
    techniques: Iterable[Technique],
    seen: Measurement,
    *,
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    untested: bool = False,
    predicted: Mapping[str, float] | None = None,
    training: bool = False,
    fit: bool = False,
) -> tuple[list[Candidate], list[Trial]]:
    """The candidates, the most promising first, and a trial record for every technique that is not one.

    Args:
        training: only techniques that change the training; otherwise those are refused.
        predicted: technique -> speed-up a finding of the diagnosis predicts, where that is more than its own check.
        fit: memory is limited, so techniques that save it at the cost of time take part.
    """
    predicted = predicted or {}
    found: list[Candidate] = []
    refused: list[Trial] = []
    for technique in techniques:
        card = technique.card
        reason = ""
        changes = card.numerics == Numerics.CHANGES_TRAINING
        if training and not changes:
            continue
        if changes and not training:
            reason = CHANGES_TRAINING
        elif only and card.name not in only:
            reason = "not asked for"
        elif card.name in leave_out:
            reason = "left out on request"
        elif card.saves_memory and not fit and card.name not in only:
            reason = SAVES_MEMORY.format(name=card.name)
        verdict = None
        if not reason:
            verdict = technique.check(seen)
            reason = "" if verdict.applies else verdict.reason
        kind = seen.facts.device.partition(":")[0]
        if not reason and kind not in card.tested_on and not (untested or card.name in only):
            reason = f"untested on {kind}; --untested or --only {card.name} would try it"
        if reason or verdict is None:
            refused.append(
                Trial(name=card.name, candidate={card.name: {}}, reference={}, outcome="not applicable",
                      reason=reason, stage="check")
            )  # fmt: skip
            continue
        for settings in verdict.candidates or ({},):
            found.append(
                Candidate(
                    name=card.name,
                    settings=dict(settings),
                    live=card.switchable == "live",
                    gain=max(verdict.gain or 1.0, predicted.get(card.name, 1.0)),
                    reason=verdict.reason,
                    targets=frozenset(card.targets),
                    fills=card.one_off and "data" in card.targets,
                    prepares=card.one_off and "data" not in card.targets,
                )
            )
    found.sort(key=lambda item: -item.gain)
    return found, refused


def conflicting(name: str, chosen: Iterable[str], techniques: dict[str, Technique]) -> str:
    """The name of a chosen technique that conflicts with `name`, or the empty string."""
    for other in chosen:
        if other == name:
            continue
        if other in techniques[name].card.conflicts or name in techniques[other].card.conflicts:
            return other
    return ""


def forecast(startup: float, step: float, budget: float, live: int, process: int) -> str:
    """What the budget buys, said before it is spent: `start-up 9 s, step 0.5 s: this buys 14 trials`."""
    spare = max(budget * 0.6 - startup, 0.0)
    each_live = max(8 * 4 * step, 4.0)
    each_process = startup + max(8 * 4 * step, 10.0)
    buys = 0
    for cost, count in ((each_live, live), (each_process, process)):
        n = min(count, int(spare // cost)) if cost > 0 else count
        buys += n
        spare -= n * cost
    return (
        f"start-up {in_words(startup)}, step {in_words(step)}: {in_words(budget)} buy about {buys} of "
        f"{live + process} trials and the confirmation"
    )


def promised(found: Sequence[Candidate], training: float) -> float:
    """Seconds the predictions promise to save over `training` seconds of stock training.

    Gains overlap: the largest counts in full, of the others the square root. At least 10 % are expected, since a
    trial ends as soon as it excludes a gain.
    """
    best: dict[str, float] = {}
    for item in found:
        best[item.name] = max(best.get(item.name, 1.0), item.gain)
    logs = sorted((math.log(gain) for gain in best.values()), reverse=True)
    gain = math.exp(math.fsum(logs[:1]) + math.fsum(logs[1:]) / 2)
    return training * (1.0 - 1.0 / max(gain, 1.1))


def affordable(saved: float, spent: float, least: float) -> float | None:
    """Seconds a whole search may take (what is `spent` included) so that it can pay for itself; None: it cannot.

    Half of what it may save (seconds), but enough for `least`, the seconds in which something can be tried and
    confirmed; never more than the default budget.
    """
    if saved < least:
        return None
    return min(max(saved / 2, spent + least), DEFAULT_BUDGET)
