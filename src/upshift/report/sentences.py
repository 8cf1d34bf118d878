"""Sentences about whole records, shared by the terminal and the page, so that both claim the same."""

from __future__ import annotations

import math
from collections.abc import Iterable

from upshift import units
from upshift.records.finding import Finding
from upshift.records.measurement import Floor
from upshift.records.plan import Pace, Plan
from upshift.records.run import Run
from upshift.records.trial import Fitted, Trial, TuneReport
from upshift.records.verification import Energy, Verification
from upshift.report import digest, words

#: Metrics of a run that are named.
MOST_METRICS = 8


def headline(report: TuneReport) -> str:
    """The claim the figures allow, in one line."""
    kind = digest.claim(report)
    if report.energy is not None and kind != "interrupted":
        return _energy_headline(report, report.energy, kind)
    if kind == "win" and report.verification is not None and report.objective != "step":
        return target_text(report.verification)
    if report.fitted is not None and kind != "interrupted":
        return fitted_text(report.fitted, kind)
    if kind == "win":
        return words.speedup_text(report.final)
    if kind == "interrupted":
        return "Interrupted before anything was shown: keep your baseline."
    if kind == "baseline":
        return "Keep your baseline: nothing tried was shown to be both faster and harmless."
    if words.direction(report.final) != "faster":
        return f"The plan's gain is not shown ({words.speedup_text(report.final)})."
    return f"{words.speedup_text(report.final)}, but that the result is unharmed is not shown."


def target_text(found: Verification) -> str:
    """How much sooner the target is reached, or in how many more runs."""
    sooner = found.target_speedup
    if sooner is None or sooner.mean is None or sooner.low is None:
        return f"The target is reached in {found.reached[1]} runs, by the untouched script in {found.reached[0]}."
    return f"Target {words.ratio(sooner.mean)} sooner (at least {words.ratio(sooner.low)} at 95 %, {sooner.n} seeds)"


def fitted_text(found: Fitted, kind: digest.Claim) -> str:
    """What fits in the limit of memory, or that nothing does; speed is said elsewhere."""
    limit, held = units.binary(found.limit), words.UNKNOWN if found.held is None else units.binary(found.held)
    if not found.fits:
        tried = "Nothing that was tried fits" if found.untried else "Nothing fits"
        return f"{tried} in {limit}: the least was {held}."
    script = "ran out of memory" if found.script is None else f"needs {units.binary(found.script)}"
    unproven = "" if kind == "win" else ", but that the result is unharmed is not shown"
    return f"Fits in {limit}: {held} (measured peak){unproven}; the untouched script {script}."


def less_energy(energy: Energy) -> str:
    """`less energy (estimated)`: the basis is part of the claim."""
    return f"less energy ({energy.basis})"


def energy_text(energy: Energy) -> str:
    """`1.31x less energy (estimated) to the target (1.12x to 1.52x at 95 %), 1.2 kJ -> 0.9 kJ, 3 pairs`."""
    if not words.finite(energy.mean):
        return f"{words.UNKNOWN} ({energy.basis}): too few whole runs reached the target with their joules known"
    # The factor may be below 1: the words must not claim what the figure denies.
    what = less_energy(energy) if energy.mean > 1 else f"as a ratio of energies ({energy.basis}), stock over plan,"
    bounds = ""
    if words.finite(energy.low) and words.finite(energy.high):
        bounds = f" ({words.ratio(energy.low)} to {words.ratio(energy.high)} at {words.percent(energy.level)})"
    amounts = f", {joules_text(energy.stock)} -> {joules_text(energy.plan)}"
    return f"{words.ratio(energy.mean)} {what} to the target{bounds}{amounts}, {energy.n} pairs"


def pace_text(pace: Pace) -> str:
    """`8.21 ms (8.1 ms to 8.6 ms over 9 stretches; measured), 3,897 samples/s`."""
    text = (
        f"{words.duration(pace.seconds)} ({words.duration(pace.low)} to {words.duration(pace.high)} over "
        f"{pace.stretches:,} stretches; measured)"
    )
    rate = pace.samples_per_second
    return f"{text}, {words.number(rate)} samples/s" if words.finite(rate) else text


def joules_text(value: float | None) -> str:
    """`1.2 kJ`."""
    return units.si(value, "J") if words.finite(value) else words.UNKNOWN


def outcome_text(report: TuneReport, trial: Trial) -> str:
    """The outcome, with the basis where it is about energy: `less energy (estimated)`."""
    about = trial.outcome in ("less energy", "more energy")
    # Without a record of what was read nothing may pass for measured.
    basis = report.energy.basis if report.energy is not None else words.UNKNOWN
    return f"{trial.outcome} ({basis})" if about else trial.outcome


def _energy_headline(report: TuneReport, energy: Energy, kind: digest.Claim) -> str:
    less, found = less_energy(energy), report.verification
    if kind == "baseline":
        return f"Keep your baseline: nothing tried was shown to need {less} to the target and to be as good."
    if kind != "win" or found is None:
        return f"That the plan needs {less} to the target is not shown."
    if energy.mean is None or energy.low is None:
        return target_text(found)
    bound = f"at least {words.ratio(energy.low)} at {words.percent(energy.level)}, {energy.n} seeds"
    return f"Target for {words.ratio(energy.mean)} {less}: {bound}"


def break_even_text(report: TuneReport, plan: Plan | None = None) -> str:
    """After how many steps the one-off costs are won back."""
    steps, cost = digest.costs(report, plan)
    if not words.finite(steps):
        return words.UNKNOWN
    spent = f" (one-off cost {words.duration(cost)})" if words.finite(cost) else ""
    return f"after {words.number(math.ceil(steps))} steps{spent}" if steps > 0 else f"at once{spent}"


def detail_text(trial: Trial) -> str:
    """What a trial's name leaves out: the settings of what it adds, and what it is on top of."""
    new = digest.added(trial) or trial.candidate
    chosen = [(name, words.settings_text(settings)) for name, settings in new.items()]
    parts = []
    if len(chosen) == 1 and trial.name.startswith(f"{chosen[0][0]}("):
        pass  # the name says it all
    elif len(chosen) == 1 and trial.name == chosen[0][0]:
        parts += [chosen[0][1]]
    elif trial.name == " + ".join(new):
        parts += [f"{words.clean(name, 80)}: {settings}" for name, settings in chosen if settings]
    else:
        parts += [words.arm_text(new)]
    if trial.reference:
        parts.append(f"on top of {words.names_text(trial.reference)}")
    return "; ".join(part for part in parts if part)


def step_text(seconds: float) -> str:
    """A step time of a pairing, in which 0 stands for not recorded."""
    return words.duration(seconds) if seconds > 0 else words.UNKNOWN


def floor_text(floor: Floor | None) -> str:
    """MFU, peaks and floors in one paragraph, each unknown said to be so."""
    if floor is None:
        return "unknown: FLOPs or the machine's peaks were not measured"
    parts = [
        f"MFU {words.quantity_text(floor.mfu, unit='fraction', n=False)} of the {words.clean(floor.dtype, 40)} peak, "
        f"{words.quantity_text(floor.peak_flops, n=False)}",
        f"{words.quantity_text(floor.flops, n=False)} per step",
        f"arithmetic alone would take {words.quantity_text(floor.arithmetic_floor, n=False)}",
        f"memory traffic alone {words.quantity_text(floor.bandwidth_floor, n=False)}",
    ]
    if floor.best_dtype and floor.best_dtype != floor.dtype:
        best = words.quantity_text(floor.best_peak_flops, n=False)
        parts.append(f"fastest type here {words.clean(floor.best_dtype, 40)}: {best}")
    text = "; ".join(parts)
    return f"{text}. {words.clean(floor.note, 400)}" if floor.note else text


def gain_text(finding: Finding) -> str:
    """The predicted speed-up and what it rests on; a prediction is never evidence."""
    gain = words.quantity_text(finding.gain, unit="x", n=False)
    return f"{gain}; rests on {words.clean(finding.rests_on, 300)}" if finding.rests_on else gain


def run_status(run: Run) -> str:
    """`finished with exit code 0 after 3 min 20 s`."""
    code = "" if run.exit_code is None else f" with exit code {run.exit_code}"
    after = f" after {words.duration(run.seconds)}" if words.finite(run.seconds) else ", for how long is unknown"
    return f"{run.status}{code}{after}"


def steps_per_second(run: Run) -> str:
    """Training steps per second of training time, evaluation and checkpoints apart."""
    step = digest.step_times(run).step
    return f"{words.number(words.three(1 / step))} steps/s" if step and step > 1e-12 else words.UNKNOWN


def run_rows(run: Run) -> list[tuple[str, str]]:
    """The figures of a run, as (name, value)."""
    times = digest.step_times(run)
    seen = digest.losses(run)
    loss = words.UNKNOWN if not seen else f"{_loss(seen[0][1])} to {_loss(seen[-1][1])} at step {seen[-1][0]:,}"
    speed = f"{steps_per_second(run)} ({words.duration(times.step)} a step, {times.steps:,} steps timed)"
    speed = speed if times.step is not None else words.UNKNOWN
    evaluation = words.duration(times.evaluation) if times.steps else words.UNKNOWN
    checkpoints = words.duration(times.checkpoint) if times.steps else words.UNKNOWN
    rows = [
        ("steps", f"{run.steps:,}"),
        ("speed", speed),
        ("loss", loss),
        ("evaluation", evaluation),
        ("checkpoints", checkpoints),
        *_quality_rows(run),
        ("techniques", words.arm_text(run.techniques)),
        ("plan", run.plan or "none"),
        ("guard", guard_text(run)),
        ("run", run.id),
    ]
    if run.torn_lines:
        rows.append(("log", f"{run.torn_lines:,} lines could not be read"))
    return rows


def _quality_rows(run: Run) -> list[tuple[str, str]]:
    """Metrics, epochs and inference time, where the record holds them."""
    rows = []
    if found := digest.last_metrics(run):
        told = []
        for name, item in list(found.items())[:MOST_METRICS]:
            value = words.UNKNOWN if item.value is None else f"{item.value:.4g}"
            told.append(f"{words.clean(name, 60)} {value}{'' if item.step is None else f' at step {item.step:,}'}")
        more = f" and {len(found) - len(told)} more" if len(found) > len(told) else ""
        rows.append(("metrics", ", ".join(told) + more))
    if run.epochs is not None and words.finite(run.epochs.value):
        rows.append(("epochs", f"{run.epochs.value:.4g} ({words.basis_text(run.epochs)})"))
    inference = next((item for item in reversed(run.events) if "inference_seconds" in item.values), None)
    if inference is not None and words.finite(inference.values["inference_seconds"]):
        rows.append(("inference", words.clean(inference.text, 300)))
    return rows


def guard_text(run: Run) -> str:
    """Whether the guard of a planned run fired; a run without techniques has none."""
    if run.guard_fired:
        return "FIRED: see the events"
    return "did not fire" if run.techniques else "not applicable: nothing was applied"


def _loss(value: float) -> str:
    return f"{value:.4g}"


def levels_text(trials: Iterable[Trial]) -> str:
    """What the bounds of these trials are: `one-sided bounds at 99 % each`; empty where nothing was timed."""
    levels = sorted({trial.pairing.level for trial in trials if trial.pairing is not None})
    return f"one-sided bounds at {' or '.join(words.percent(level) for level in levels)} each" if levels else ""
