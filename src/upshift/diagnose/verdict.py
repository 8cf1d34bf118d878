"""One paragraph that sums a diagnosis up."""

from __future__ import annotations

from collections.abc import Sequence

from upshift import units
from upshift.diagnose.evidence import known
from upshift.records import Finding, Measurement
from upshift.records.measurement import PHASE_TITLES

_FRACTIONS = (
    (0.95, "Nearly all"),
    (0.85, "Nine tenths"),
    (0.71, "Three quarters"),
    (0.62, "Two thirds"),
    (0.55, "More than half"),
    (0.45, "Half"),
    (0.37, "Two fifths"),
    (0.29, "A third"),
    (0.22, "A quarter"),
    (0.17, "A fifth"),
    (0.12, "An eighth"),
    (0.0, "At most a tenth"),
)

_DOING = {
    "data": "waiting for data",
    "h2d": "copying batches to the device",
    "forward": "in the forward pass",
    "loss": "between forward and backward",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer",
    "sync": "waiting for the device",
    "other": "in other work of the host",
}


def fraction(share: float) -> str:
    """A share as people say it: 0.66 is `Two thirds`."""
    return next(words for least, words in _FRACTIONS if share >= least)


def verdict(m: Measurement, findings: Sequence[Finding]) -> str:
    """The paragraph: where a step's time goes, what would help most, and what is not known."""
    sentences = [_broken(findings), _where(m), _what(findings), _floor(m), _apart(m), _unknown(m)]
    return " ".join(sentence for sentence in sentences if sentence)


def _broken(findings: Sequence[Finding]) -> str:
    """What must be mended before speed matters."""
    found = [item.title for item in findings if item.severity == "major" and item.gain.value is None]
    return f"Before speed: {'; '.join(title[0].lower() + title[1:] for title in found)}." if found else ""


def _where(m: Measurement) -> str:
    step = known(m.anatomy.step)
    phases = sorted(
        ((share, item.name) for item in m.anatomy.phases if (share := known(item.share)) is not None), reverse=True
    )
    if not step:
        return "The duration of a step is not known, so nothing is said about where the time goes."
    text = f"A step takes {units.seconds(step)}."
    if phases:
        share, name = phases[0]
        text += f" {fraction(share)} of it ({units.percent(share)}) is spent {_DOING.get(name, name)}"
        if len(phases) > 1 and phases[1][0] >= 0.1:
            text += f", {units.percent(phases[1][0])} {_DOING.get(phases[1][1], phases[1][1])}"
        text += "."
    return text


def _what(findings: Sequence[Finding]) -> str:
    useful = [item for item in findings if item.severity != "note" and item.gain.or_else(1.0) >= 1.01]
    if any(item.rule == "near_floor" for item in findings) and not any(i.severity == "major" for i in useful):
        return "That is near the floor of this machine: there is nothing much to gain here, so keep your baseline."
    if not useful:
        others = [item for item in findings if item.severity != "note"]
        if others:
            return f"Worth a look: {others[0].title[0].lower()}{others[0].title[1:]}; what it would gain is not known."
        return "No rule found anything to gain; keeping your baseline is an answer."
    best = useful[0]
    gain = best.gain
    text = f"What would help most: {best.helps} (predicted {units.ratio(gain.or_else(1.0))}"
    if gain.low is not None and gain.high is not None:
        text += f", between {units.ratio(gain.low)} and {units.ratio(gain.high)}"
    text += "; a prediction, not a measurement)."
    if len(useful) > 1:
        text += f" Next: {useful[1].title[0].lower()}{useful[1].title[1:]}."
    return text


def _floor(m: Measurement) -> str:
    mfu = known(m.floor.mfu) if m.floor is not None else None
    if m.floor is None or mfu is None:
        return ""
    least = "at least " if m.floor.flops.basis == "estimated" else ""
    return f"Its arithmetic runs at {least}{units.percent(mfu)} of this machine's measured {m.floor.dtype} peak."


def _apart(m: Measurement) -> str:
    evaluation = known(m.anatomy.evaluation)
    step = known(m.anatomy.step)
    if not evaluation or not step:
        return ""
    return f"Evaluation, {units.seconds(evaluation)} in the time watched, is not part of this."


def _unknown(m: Measurement) -> str:
    missing = [
        PHASE_TITLES.get(item.name, item.name)
        for item in m.anatomy.phases
        if item.share.value is None and "not applicable" not in item.note
    ]
    if not m.anatomy.phases:
        missing.append("the parts of a step")
    if m.floor is None or m.floor.mfu.value is None:
        missing.append("the floor of this machine")
    if not missing:
        return ""
    listed = missing[0] if len(missing) == 1 else ", ".join(missing[:-1]) + " and " + missing[-1]
    return f"Not known: {listed}."
