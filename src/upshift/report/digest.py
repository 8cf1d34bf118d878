"""What is picked out of a record, or summed from it, before it is drawn: no drawing, no words for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from upshift.records.measurement import PHASES, Measurement
from upshift.records.plan import Plan, Setting
from upshift.records.run import Run
from upshift.records.trial import Pairing, Proof, Trial, TuneReport
from upshift.report import words

Claim = Literal["win", "baseline", "unproven", "interrupted"]

STAGES = ("confirm", "screen", "attribution", "check")


def claim(report: TuneReport) -> Claim:
    """What the figures of a search allow to say, whatever its verdict sentence says.

    `win` needs a kept technique, a final pairing whose lower bound exceeds 1, and a proof that passed; or, where whole
    runs decided, that these show the plan sooner at the target (or to need less energy) and as good at the end. Where
    the script exceeds a limit of memory, the plan has to fit and to be proven, and may be slower.
    """
    if report.kept and report.proof is not None and report.proof.rung == "metric":
        found = report.verification
        if report.objective == "energy" and not less_energy(report):
            return "unproven"
        return "win" if report.proof.passed and found is not None and found.answer == "as good" else "unproven"
    if report.kept:
        proven = report.proof is not None and report.proof.passed and report.proof.rung != "none"
        if report.fitted is not None:
            return "win" if proven and report.fitted.fits else "unproven"
        return "win" if proven and words.direction(report.final) == "faster" else "unproven"
    return "interrupted" if report.interrupted else "baseline"


def less_energy(report: TuneReport) -> bool:
    """Whether whole runs show less energy to the target, measured or estimated, or that only the plan reaches it."""
    found, energy = report.verification, report.energy
    if found is None or energy is None:
        return False
    if energy.mean is None:
        return found.reached == (0, found.seeds)
    return words.finite(energy.low) and energy.low > 1.0


def added(trial: Trial) -> dict[str, dict[str, Setting]]:
    """What the candidate of a trial has beyond its reference."""
    return {name: chosen for name, chosen in trial.candidate.items() if trial.reference.get(name) != chosen}


def final_trial(report: TuneReport) -> Trial | None:
    """The confirmed trial that the final pairing comes from, if it is among the trials."""
    for trial in reversed(report.trials):
        same = trial.pairing is not None and trial.pairing == report.final
        whole = bool(trial.candidate) and set(trial.candidate) == set(report.kept)
        if trial.stage == "confirm" and (same or whole):
            return trial
    return None


def costs(report: TuneReport, plan: Plan | None = None) -> tuple[float | None, float | None]:
    """(steps until the one-off costs are won back, one-off seconds); None where not known.

    A trial's one-off cost of 0 means that none was recorded, so it is not known here.
    """
    if plan is not None:
        return plan.break_even_steps, plan.one_off_seconds
    trial = final_trial(report)
    cost = trial.one_off_seconds if trial is not None and trial.one_off_seconds > 0 else None
    return break_even(cost, report.final), cost


def break_even(one_off: float | None, pairing: Pairing | None) -> float | None:
    """Steps after which the one-off seconds are won back; None where that cannot be known or never happens."""
    if pairing is None or not words.finite(one_off) or one_off < 0 or words.direction(pairing) != "faster":
        return None
    saved = pairing.reference_step - pairing.candidate_step
    if not (words.finite(saved) and saved > 0 and pairing.candidate_step > 0):
        return None
    steps = one_off / saved
    return math.ceil(steps) if math.isfinite(steps) else None


class ProofRow(NamedTuple):
    """The proof of one kept technique, and whether it is its own or that of the whole plan."""

    name: str
    proof: Proof | None
    pairs: int | None
    own: bool


def proof_rows(report: TuneReport) -> list[ProofRow]:
    """One row per kept technique, in the order of the plan."""
    rows = []
    for name in report.kept:
        own = [trial for trial in report.trials if trial.name == name and trial.proof is not None]
        own.sort(key=lambda trial: trial.stage != "confirm")
        timed = [trial for trial in report.trials if trial.name == name and trial.pairing is not None]
        timed.sort(key=lambda trial: STAGES.index(trial.stage))
        if own:
            pairing = own[0].pairing or (timed[0].pairing if timed else None)
            rows.append(ProofRow(name, own[0].proof, pairing.quads if pairing else None, True))
        else:
            rows.append(ProofRow(name, report.proof, report.final.quads if report.final else None, False))
    return rows


def is_kept(report: TuneReport, trial: Trial) -> bool:
    """Whether this row speaks for something in the plan: seen to be better, and all that it adds was kept."""
    if trial.outcome not in ("faster", "less energy") or trial.stage not in ("confirm", "screen") or not report.kept:
        return False
    names = set(added(trial))
    return bool(names) and (names <= set(report.kept) or trial is final_trial(report))


def attribution(plan: Plan | None) -> list[tuple[str, Pairing]]:
    """What each kept technique is worth within the plan: (name, factor lost when it alone is taken out)."""
    rows = []
    for item in plan.kept if plan is not None else ():
        ratio, low, high = item.attribution, item.attribution_low, item.attribution_high
        if words.finite(ratio) and words.finite(low) and words.finite(high):
            rows.append((item.name, Pairing(ratio, low, high, 0)))
    return rows


def ordered(trials: Sequence[Trial]) -> list[Trial]:
    """Confirmed rows first, then screening, attribution and what was never timed; otherwise as they happened."""
    return sorted(trials, key=lambda trial: STAGES.index(trial.stage))


def compared_losses(report: TuneReport) -> Proof | None:
    """The proof whose two loss curves are to be drawn: that of the plan, else that of a kept technique."""
    candidates = [report.proof, *(row.proof for row in proof_rows(report)), *(t.proof for t in report.trials)]
    for proof in candidates:
        if proof is not None and len(proof.stock_losses) > 1 and len(proof.planned_losses) > 1:
            return proof
    return None


class StepTimes(NamedTuple):
    """A run's steps: seconds per step and per phase, over `steps` steps (None: not seen)."""

    step: float | None
    phases: dict[str, float]
    steps: int
    evaluation: float | None
    checkpoint: float | None


def step_times(run: Run) -> StepTimes:
    """Sum the windows of a run. Windows without steps or with figures that are not finite are left out."""
    good = [item for item in run.windows if item.n > 0 and words.finite(item.seconds) and item.seconds >= 0]
    steps = sum(item.n for item in good)
    if not steps:
        return StepTimes(None, {}, 0, None, None)
    names = [*PHASES, *sorted({name for item in good for name in item.phases} - set(PHASES))]
    phases = {}
    for name in names:
        seen = [(item.phases[name], item.n) for item in good if words.finite(item.phases.get(name))]
        if seen:
            phases[name] = sum(seconds for seconds, _ in seen) / sum(n for _, n in seen)
    total = sum(item.seconds for item in good) / steps
    return StepTimes(
        total if math.isfinite(total) else None,
        phases,
        steps,
        sum(item.evaluation for item in good if words.finite(item.evaluation)),
        sum(item.checkpoint for item in good if words.finite(item.checkpoint)),
    )


class LastMetric(NamedTuple):
    """The newest value of a metric, and the step it was told at; None: not known, or not finite."""

    value: float | None
    step: int | None


def last_metrics(run: Run) -> dict[str, LastMetric]:
    """The newest value of each metric in the log, the newest first."""
    found: dict[str, LastMetric] = {}
    for event in reversed(run.events):
        for name, value in event.values.items() if event.kind == "metrics" else ():
            found.setdefault(name, LastMetric(value if words.finite(value) else None, event.step))
    return found


def losses(run: Run) -> list[tuple[int, float]]:
    """(last step of the window, mean loss) for the windows that read a loss."""
    return [(item.first + item.n, item.loss) for item in run.windows if item.loss is not None]


def phase_order(measurement: Measurement) -> list[str]:
    """Phases as recorded, the known ones in the order of a step."""
    recorded = [phase.name for phase in measurement.anatomy.phases]
    return [*(name for name in PHASES if name in recorded), *(name for name in recorded if name not in PHASES)]


def smooth(values: Sequence[float], window: int) -> list[float | None]:
    """Centred moving mean over up to `window` finite values; None where the centre itself is not finite."""
    gaps, half = _gaps(values), max(window, 1) // 2
    result: list[float | None] = []
    for index, centre in enumerate(values):
        first, last = max(index - half, 0), min(index + half + 1, len(values))
        around = values[first:last]
        if gaps[last] > gaps[first]:
            around = [v for v in around if math.isfinite(v)]
        result.append(sum(around) / len(around) if math.isfinite(centre) else None)
    return result


def spread(values: Sequence[float], window: int) -> list[float | None]:
    """Standard deviation within the same moving window; None with fewer than three values."""
    gaps, half = _gaps(values), max(window, 1) // 2
    seen = [v for v in values if math.isfinite(v)]
    # Squares of deviations from the overall mean: one sum per window instead of one pass per window.
    shift = sum(seen) / len(seen) if seen else 0.0
    moved = [v - shift for v in values]
    squares = [v * v for v in moved]
    result: list[float | None] = []
    for index, centre in enumerate(values):
        first, last = max(index - half, 0), min(index + half + 1, len(values))
        around, squared = moved[first:last], squares[first:last]
        if gaps[last] > gaps[first]:
            around = [v for v in around if math.isfinite(v)]
            squared = [v * v for v in around]
        count = len(around)
        if not math.isfinite(centre) or count < 3:
            result.append(None)
            continue
        mean = sum(around) / count
        result.append(math.sqrt(max(sum(squared) - count * mean * mean, 0.0) / (count - 1)))
    return result


def _gaps(values: Sequence[float]) -> list[int]:
    """How many of the first i values are not finite, for every i."""
    return list(accumulate((not math.isfinite(v) for v in values), initial=0))
