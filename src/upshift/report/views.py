"""What the page shows of a record, as plain cells, facts and charts: the templates only lay it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from upshift.records.finding import Finding
from upshift.records.measurement import PHASE_TITLES, LineCost, Measurement
from upshift.records.plan import Plan
from upshift.records.run import Run
from upshift.records.trial import Trial, TuneReport
from upshift.report import curves, digest, sentences, svg, words
from upshift.report.drawing import drawable

#: Widths in px a chart is drawn for: beside text on a desk, and on a phone.
WIDE, NARROW = 910.0, 350.0


class Column(NamedTuple):
    """A column of a table."""

    title: str
    right: bool = False


class Cell(NamedTuple):
    """A cell: text, a quieter second line, a phase's colour, or the colour of a pill around the text."""

    text: str
    detail: str = ""
    swatch: str = ""
    pill: str = ""


class Fact(NamedTuple):
    """A figure of the strip under the verdict."""

    name: str
    value: str
    detail: str = ""


class Claim(NamedTuple):
    """The top of the page."""

    kind: str
    big: str
    unit: str
    under: tuple[str, ...]
    verdict: list[str]
    more: str = ""

    @property
    def long(self) -> bool:
        """Whether the claim is a phrase and not a number."""
        return len(self.big) > 6


class Figure(NamedTuple):
    """A chart in two widths with its caption."""

    drawings: tuple[dict[str, Any], ...]
    caption: str = ""


def _figure(draw: Callable[[float, str], Markup | None], ident: str, caption: str = "") -> Figure | None:
    """Draw a chart once per width; None where there is nothing to draw."""
    drawings = []
    for cls, width in (("wide", WIDE), ("narrow", NARROW)):
        drawing = draw(width, f"{ident}-{cls[0]}")
        if drawing is not None:
            drawings.append({"cls": cls, "svg": drawing})
    return Figure(tuple(drawings), caption) if drawings else None


TUNE_NOTES = (
    "A speed-up is the step time of the untouched script over that of the candidate, both timed in quick alternation "
    "on the same machine; a quad is one block in the order A B B A. Each bound is one-sided.",
    "Screening only picks what to confirm. A plan rests on its confirmed pairing; the rows of single techniques and "
    "the attribution are secondary and not corrected for their number.",
    "Lag is how many more steps the plan needs for the same loss. It says nothing beyond the steps that were compared.",
)


def tune_claim(report: TuneReport) -> Claim:
    kind = digest.claim(report)
    if kind == "win" and report.verification is not None and report.objective != "step":
        sooner = report.verification.target_speedup if report.energy is None else report.energy
        big, unit = (words.ratio(sooner.mean).removesuffix("x"), "×") if sooner and sooner.mean else ("Reached", "")
        under = (sentences.headline(report), words.rung_text(report.proof))
        return Claim(kind, big, unit, under, words.lines(report.verdict), report.forecast)
    if report.energy is not None and kind != "interrupted":
        big = "Not shown" if kind == "unproven" else "Keep your baseline"
        return Claim(kind, big, "", (sentences.headline(report),), words.lines(report.verdict))
    if report.fitted is not None and kind != "interrupted":
        big = "Fits" if kind == "win" else "Not shown" if kind == "unproven" else "Keep your baseline"
        shown = (words.rung_text(report.proof),) if kind == "win" else ()
        return Claim(kind, big, "", (sentences.headline(report), *shown), words.lines(report.verdict))
    if kind == "win" and report.final is not None:
        under = (f"faster, {words.bounds_text(report.final)}", words.rung_text(report.proof))
        big = words.ratio(report.final.ratio).removesuffix("x")
        return Claim(kind, big, "×", under, words.lines(report.verdict), report.forecast)
    if kind == "unproven":
        return Claim(kind, "Not shown", "", (sentences.headline(report),), words.lines(report.verdict), report.forecast)
    big = "Interrupted" if kind == "interrupted" else "Keep your baseline"
    return Claim(
        kind, big, "", (sentences.headline(report),) if kind == "interrupted" else (), words.lines(report.verdict)
    )


def tune_strip(report: TuneReport, plan: Plan | None) -> list[Fact]:
    final, strip = report.final, []
    if final is not None:
        times = f"{sentences.step_text(final.reference_step)} → {sentences.step_text(final.candidate_step)}"
        strip.append(Fact("Training step, paired", times, f"could tell a gain of {words.smallest_text(final)}"))
    if report.kept:
        proof = report.proof
        lag = words.lag_text(proof) if proof is not None else "no proof recorded"
        strip.append(Fact("Proof of the result", words.rung_name(proof), lag))
        paid, _, cost = sentences.break_even_text(report, plan).partition(" (")
        strip.append(Fact("Break-even", paid, cost.removesuffix(")")))
    else:
        tried = sum(trial.pairing is not None for trial in report.trials)
        strip.append(Fact("Timed trials", f"{tried}", f"of {len(report.trials)} considered"))
    if report.energy is not None:
        amounts = f"{sentences.joules_text(report.energy.stock)} → {sentences.joules_text(report.energy.plan)}"
        strip.append(Fact(f"Energy to the target, {report.energy.basis}", amounts, words.clean(report.energy.how, 300)))
    strip.append(Fact("Search", words.duration(report.seconds), f"of {words.duration(report.budget)} allowed"))
    return strip


def _kind(report: TuneReport, trial: Trial) -> str:
    if digest.is_kept(report, trial):
        return "kept"
    way = words.direction(trial.pairing)
    return {"faster": "faster", "slower": "slower"}.get(way, "same")


_PILLS = {"faster": "good", "less energy": "good", "slower": "warn", "more energy": "warn", "failed": "bad"}


_GROUPS = {
    "confirm": "Confirmed in fresh processes",
    "screen": "Screened: picks what to confirm",
    "attribution": "Worth within the plan: secondary",
    "check": "Checked",
}


def tried(report: TuneReport, plan: Plan | None) -> dict[str, Any]:
    trials = digest.ordered(report.trials)
    rows = []
    for trial in trials:
        if trial.pairing is not None:
            detail = sentences.detail_text(trial)
            group = _GROUPS.get(trial.stage, trial.stage)
            confirmed = trial.stage == "confirm"
            label = words.clean(trial.name)
            rows.append(svg.Row(label, detail, trial.pairing, _kind(report, trial), confirmed, group))
    for name, worth in digest.attribution(plan):
        rows.append(svg.Row(words.clean(name), "", worth, "faster", False, _GROUPS["attribution"]))
    forest = _figure(
        lambda width, ident: svg.forest(rows, width, ident),
        "forest",
        f"Filled: confirmed; hollow: not evidence on its own. Green: in the plan; grey: no change told from noise. "
        f"Whiskers: {sentences.levels_text(trials)}.",
    )
    cells = []
    for trial in trials:
        pairing = trial.pairing
        ratio = words.ratio(pairing.ratio) if pairing is not None else "not timed"
        bounds = words.bounds_text(pairing) if pairing is not None else ""
        pill = _PILLS.get(trial.outcome, "plain") if trial.stage in ("confirm", "check") else "plain"
        why = trial.reason + (f": {trial.failure}" if trial.failure else "")
        cost = f"one-off cost {words.duration(trial.one_off_seconds)}" if trial.one_off_seconds > 0 else ""
        cells.append((
            Cell(words.clean(trial.name), sentences.detail_text(trial)),
            Cell(sentences.outcome_text(report, trial), trial.stage, pill=pill),
            Cell(ratio, bounds),
            Cell(words.clean(why, 2000), cost),
        ))  # fmt: skip
    return {
        "lead": "Two arms a row, timed side by side. Screening starts from the untouched script and keeps what is "
        "faster; only what is confirmed against the untouched script in fresh processes counts.",
        "forest": forest,
        "columns": (Column("technique"), Column("outcome"), Column("ratio"), Column("why")),
        "rows": cells,
    }


def proof_view(report: TuneReport) -> dict[str, Any]:
    drawn = digest.compared_losses(report)
    figure = None
    if drawn is not None:
        steps = min(len(drawn.stock_losses), len(drawn.planned_losses))
        figure = _figure(
            lambda width, ident: curves.losses(drawn.stock_losses, drawn.planned_losses, width, ident),
            "losses",
            f"Same seeds, same data, step by step. Bold: moving mean over {curves.smoothing(steps)} steps; pale: raw. "
            "Below: the smoothed difference; its band is one standard deviation of the differences, which is not a "
            "confidence interval.",
        )
    rows, updates = [], []
    for row in digest.proof_rows(report):
        proof = row.proof
        passed = proof is not None and proof.passed
        lag = words.lag_text(proof) if proof is not None else words.UNKNOWN
        steps_text = f"over {proof.steps:,} steps" if proof is not None and proof.steps > 0 else ""
        if proof is not None and proof.bitwise:
            lag = "none: identical bits"
        finest = words.percent(proof.smallest_lag) if proof is not None else words.UNKNOWN
        remark = "own trial" if row.own else "as part of the plan"
        weaker = f"weaker than usual: {proof.weaker}" if proof is not None and proof.weaker else ""
        rows.append((
            Cell(words.clean(row.name), remark),
            Cell(words.rung_name(proof), weaker, pill="good" if passed else "warn"),
            Cell(lag, steps_text),
            Cell(finest),
            Cell(words.UNKNOWN if row.pairs is None else f"{row.pairs:,}"),
        ))  # fmt: skip
    whole = report.proof
    for check in whole.updates if whole is not None else ():
        cosine = f"{check.cosine:.6g}" if words.finite(check.cosine) else words.UNKNOWN
        norm = f"{check.norm_ratio:.6g}" if words.finite(check.norm_ratio) else words.UNKNOWN
        worst = f"{check.worst_cosine:.6g}" if words.finite(check.worst_cosine) else words.UNKNOWN
        updates.append((
            Cell(f"step {check.step:,}"),
            Cell(cosine, f"worst {worst} in {check.worst}" if check.worst else ""),
            Cell(norm),
            Cell(words.percent(check.relative_error), f"mini-batch noise {words.percent(check.noise)}"),
            Cell("passed" if check.passed else "failed", pill="good" if check.passed else "bad"),
        ))  # fmt: skip
    lead = words.proof_text(whole)
    unkept = "Nothing was kept, so nothing had to be proven." if whole is None else f"Nothing was kept: {lead}."
    return {
        "lead": f"{lead[:1].upper()}{lead[1:]}." if report.kept else unkept,
        "losses": figure,
        "columns": (
            Column("technique"), Column("shown"), Column("lag"), Column("smallest lag it could show"), Column("quads"),
        ),
        "rows": rows,
        "update_columns": (
            Column("update"), Column("cosine"), Column("norm ratio"), Column("relative error"), Column("check"),
        ),
        "updates": updates,
    }  # fmt: skip


def planned_bars(report: TuneReport, runs: Sequence[Run]) -> list[svg.Bar]:
    bars = []
    final = report.final
    if final is not None and final.reference_step > 0 and final.candidate_step > 0:
        stock, planned = words.duration(final.reference_step), words.duration(final.candidate_step)
        bars.append(svg.Bar("Untouched (paired trial)", final.reference_step, stock))
        bars.append(svg.Bar("With the plan (paired trial)", final.candidate_step, planned, highlight=True))
    for run in runs:
        if run.techniques:
            bars += _run_bars(run, "With the plan (its run)")
            break
    return bars


def _run_bars(run: Run, title: str) -> list[svg.Bar]:
    times = digest.step_times(run)
    if not times.step:
        return []
    parts = tuple(
        svg.Part(name, seconds, words.percent(seconds / times.step)) for name, seconds in times.phases.items()
    )
    return [svg.Bar(title, times.step, words.duration(times.step), parts)]


_WHEN = (
    "Bars of different occasions share one scale but not one machine state: only the two of the paired trial were "
    "timed side by side."
)


def where(measurement: Measurement, more: list[svg.Bar]) -> dict[str, Any]:
    anatomy = measurement.anatomy
    by_name = {phase.name: phase for phase in anatomy.phases}
    order = [by_name[name] for name in digest.phase_order(measurement)]
    bars = list(more)
    if words.known(anatomy.step):
        parts = tuple(
            svg.Part(phase.name, phase.seconds.or_else(0.0), words.percent(phase.share.value))
            for phase in order
            if words.known(phase.seconds)
        )
        text = words.quantity_text(anatomy.step)
        bars.insert(0, svg.Bar("Untouched (diagnosis)", anatomy.step.or_else(0.0), text, parts))
    rows = [
        (
            Cell(
                PHASE_TITLES.get(phase.name, words.clean(phase.name, 80)),
                words.clean(phase.note, 400),
                svg.phase_class(phase.name),
            ),
            Cell(words.noted_text(phase.share, phase.note, unit="fraction", n=False)),
            Cell(words.noted_text(phase.seconds, phase.note)),
            Cell(words.noted_text(None, phase.note) if not words.known(phase.seconds) else phase.seconds.basis),
        )
        for phase in order
    ]
    warmup = words.quantity_text(anatomy.warmup)
    return {
        "lead": f"A training step takes {words.quantity_text(anatomy.step)}. Warm-up, evaluation, checkpoints and "
        "start-up stand apart from it.",
        "bars": _figure(lambda width, ident: svg.anatomy(bars, width, ident), "anatomy", _WHEN if more else ""),
        "phase_columns": (Column("phase"), Column("share", True), Column("seconds per step", True), Column("basis")),
        "phases": rows,
        "apart": [
            ("start-up", words.quantity_text(anatomy.startup)),
            ("warm-up", f"{warmup}, first {anatomy.warmup_steps:,} steps" if anatomy.warmup_steps else warmup),
            ("evaluation", words.quantity_text(anatomy.evaluation)),
            ("checkpoints", words.quantity_text(anatomy.checkpointing)),
        ],
        "line_columns": (Column("line"), Column("share", True), Column("per step", True), Column("what")),
        "lines": [_line(item) for item in measurement.lines[:20]],
        "syncs": [_line(item) for item in measurement.syncs[:20]],
        "syncs_note": measurement.syncs_note or words.UNKNOWN,
    }


def _line(line: LineCost) -> tuple[Cell, ...]:
    return (
        Cell(words.place_text(line.file, line.line), line.function),
        Cell(words.quantity_text(line.share, unit="fraction", n=False)),
        Cell(words.quantity_text(line.seconds, n=False)),
        Cell(words.clean(line.text.strip(), 300) or words.clean(line.function, 100), line.kind),
    )


def finding_view(finding: Finding) -> dict[str, Any]:
    rows = [("share", f"{words.quantity_text(finding.share, unit='fraction')} of the step")]
    if not words.known(finding.share):
        rows = [("share", words.UNKNOWN)]
    if finding.helps:
        rows.append(("would help", finding.helps))
    if finding.techniques:
        rows.append(("techniques", ", ".join(finding.techniques)))
    if finding.edit:
        rows.append(("edit", finding.edit))
    rows.append(("predicted", sentences.gain_text(finding)))
    pill = {"major": "warn", "minor": "plain", "note": "plain"}[finding.severity]
    return {
        "title": finding.title, "severity": finding.severity, "pill": pill, "evidence": finding.evidence, "rows": rows,
    }  # fmt: skip


def limit(measurement: Measurement) -> dict[str, Any]:
    floor = measurement.floor
    if floor is None:
        return {"lead": f"{sentences.floor_text(None).capitalize()}.", "roofline": None, "rows": []}
    step = measurement.anatomy.step.value if words.known(measurement.anatomy.step) else None
    figure = _figure(
        lambda width, ident: svg.roofline(floor, step, width, ident),
        "roofline",
        "Roofline (Williams et al. 2009): the line is what peak and bandwidth allow. Bytes are counted without caches, "
        f"so a step that stays in cache can lie above its slope. Peak: {words.basis_text(floor.peak_flops)}; "
        f"bandwidth: {words.basis_text(floor.bandwidth)}; FLOPs: {words.basis_text(floor.flops)}; "
        f"bytes: {words.basis_text(floor.bytes_moved)}.",
    )
    rows = [
        ("MFU", words.quantity_text(floor.mfu, unit="fraction")),
        ("FLOPs per step", words.quantity_text(floor.flops)),
        ("bytes per step", words.quantity_text(floor.bytes_moved)),
        (f"peak, {words.clean(floor.dtype, 40)}", words.quantity_text(floor.peak_flops)),
        ("memory bandwidth", words.quantity_text(floor.bandwidth)),
        ("arithmetic alone", words.quantity_text(floor.arithmetic_floor)),
        ("memory traffic alone", words.quantity_text(floor.bandwidth_floor)),
    ]
    if floor.best_dtype and floor.best_dtype != floor.dtype:
        rows.insert(4, (f"peak, {words.clean(floor.best_dtype, 40)}", words.quantity_text(floor.best_peak_flops)))
    lead = "What the arithmetic and the memory traffic of a step cost at least, against what the step takes."
    if figure is None:
        lead += " Too little is known here to draw the roofline."
    if floor.note:
        rows.append(("note", floor.note))
    return {"lead": lead, "roofline": figure, "rows": rows}


def run_view(run: Run, ident: str) -> dict[str, Any]:
    speed = [
        (float(item.first + item.n), item.seconds / item.n)
        for item in run.windows
        if item.n > 0 and words.finite(item.seconds)
    ]
    seen = digest.losses(run)
    points = [(float(step), loss) for step, loss in seen]
    times = digest.step_times(run)
    bad = sum(not drawable(loss) for _, loss in seen)
    events = [event for event in run.events if event.kind != "metrics"]
    lead = f"Mean over each window of the log; {len(seen):,} of {len(run.windows):,} windows read a loss."
    return {
        "id": run.id,
        "status": sentences.run_status(run),
        "rows": sentences.run_rows(run),
        "loss_lead": f"{lead} {bad:,} were not finite." if bad else lead,
        "loss": _figure(
            lambda width, i: curves.series(points, width, i, title="Training loss over the run"), f"{ident}-loss"
        ),
        "speed": _figure(
            lambda width, i: curves.series(
                speed, width, i, title="Seconds per step over the run", form=words.duration, from_zero=True
            ),
            f"{ident}-speed",
        ),
        "bars": _figure(lambda width, i: svg.anatomy(_run_bars(run, "A step, on average"), width, i), f"{ident}-bars"),
        "phase_columns": (Column("phase"), Column("share", True), Column("seconds per step", True)),
        "phases": [
            (
                Cell(PHASE_TITLES.get(name, words.clean(name, 80)), swatch=svg.phase_class(name)),
                Cell(words.percent(seconds / times.step) if times.step else words.UNKNOWN),
                Cell(words.duration(seconds)),
            )
            for name, seconds in times.phases.items()
        ],
        "event_columns": (Column("what"), Column("at"), Column("text")),
        "events": [(Cell(event.kind), Cell(words.duration(event.at)), Cell(event.text)) for event in events[-500:]],
    }  # fmt: skip


def about(measurement: Measurement, rows: list[tuple[str, str]], notes: Sequence[str]) -> dict[str, Any]:
    overhead = words.quantity_text(measurement.overhead, unit="fraction", n=False)
    return {
        "machine": list(measurement.machine.items()),
        "facts": [
            ("device", measurement.facts.device),
            ("measured", words.when_text(measurement.created)),
            ("cost of watching", overhead if overhead == words.UNKNOWN else f"{overhead} of the step"),
            *rows,
        ],
        "notes": [
            *notes,
            "± is half of the 95 % interval where the text names no other, n the number of observations. What was not "
            "seen is unknown and never counted as zero.",
            *measurement.notes,
        ],
    }
