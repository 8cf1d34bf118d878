"""Records as one screen of a terminal: rich renderables that carry no markup from outside.

Everything is a `rich.text.Text`, so brackets and emoji codes in a script's name mean nothing, and every text from a
record passes `words.clean` first. Meaning never rests on colour alone: it survives NO_COLOR.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement as Span
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from upshift.records.finding import Finding
from upshift.records.measurement import PHASE_TITLES, LineCost, Measurement
from upshift.records.plan import Plan
from upshift.records.run import Run
from upshift.records.trial import Trial, TuneReport
from upshift.report import digest, sentences, words
from upshift.report.blocks import facts as _facts
from upshift.report.blocks import grid as _grid
from upshift.report.blocks import head as _head
from upshift.report.blocks import indent as _indent
from upshift.report.blocks import joined as _join
from upshift.report.blocks import line as _text
from upshift.report.blocks import title as _title
from upshift.report.verified import times, whole_runs

_OUTCOMES = {
    "faster": "green", "less energy": "green", "slower": "yellow", "more energy": "yellow", "failed": "red",
    "no change": "dim",
}  # fmt: skip
_SEVERITY = {"major": "bold yellow", "minor": "yellow", "note": "dim"}


class Bar:
    """A horizontal bar of `share` (0..1) of the width it is given; empty where the share is unknown."""

    def __init__(self, share: float | None, style: str = "cyan") -> None:
        self.share = min(max(share, 0.0), 1.0) if words.finite(share) else None
        self.style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self.share is None:
            yield Segment(" " * width)
            return
        eighths = round(self.share * width * 8)
        full, part = divmod(eighths, 8)
        if options.ascii_only:
            text = "#" * round(self.share * width)
        else:
            text = "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
        if not text and self.share > 0:
            text = "|" if options.ascii_only else "▏"
        yield Segment(text, Style.parse(self.style))
        yield Segment(" " * max(width - len(text), 0))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Span:
        return Span(min(4, options.max_width), options.max_width)


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [_indent(_text(f"- {words.clean(note)}", "dim")) for note in notes if note]


# ---------------------------------------------------------------------------------------------------- diagnosis


def render_diagnosis(
    measurement: Measurement, findings: Sequence[Finding], verdict: str, width: int = 100
) -> RenderableType:
    """One screen: verdict, anatomy of a step, what stands apart from it, where it is spent, the floor, findings.

    Args:
        measurement: what was seen.
        findings: in the order of their rank.
        verdict: the paragraph that sums it up.
        width: columns of the terminal.
    """
    parts: list[RenderableType] = [
        _title("diagnose", measurement.script, measurement.arguments),
        _machine_line(measurement.machine, measurement.facts.device),
        Text(),
        *map(_text, words.lines(verdict)),
        Text(),
        _step_line(measurement),
        _indent(_phases(measurement, width)),
        *_not_applicable(measurement),
        _indent(_join((f"{name} {value}" for name, value in _apart(measurement)), "dim")),
    ]
    if measurement.lines:
        parts += [Text(), _head("Where in the script"), _indent(_lines(measurement.lines[:5]))]
    if measurement.device_phases:
        times = [f"{PHASE_TITLES.get(name, name)} {words.quantity_text(value, n=False)}"
                 for name, value in measurement.device_phases.items()]  # fmt: skip
        parts += [Text(), _text(f"On the device, by events: {', '.join(times)}")]
    if measurement.syncs:
        parts += [Text(), _head("Waiting for the device"), _indent(_lines(measurement.syncs[:5]))]
    else:
        parts += [Text(), _text(f"Waiting for the device: {measurement.syncs_note or words.UNKNOWN}", "dim")]
    parts += [Text(), _head("The floor"), _indent(_text(sentences.floor_text(measurement.floor)))]
    parts += [Text(), _head("Findings")]
    parts += list(_findings(findings)) or [_indent(_text("No bottleneck stood out: nothing to report.", "dim"))]
    overhead = words.quantity_text(measurement.overhead, unit="fraction", n=False)
    parts += [Text(), _join((f"upshift's own cost: {overhead} of the step", measurement.isolation), "dim")]
    parts += _notes(measurement.notes)
    parts.append(_text("± is half of the 95 % interval, n the steps observed; nothing unknown is counted as 0.", "dim"))
    return Group(*parts)


def _machine_line(machine: dict[str, str], device: str) -> Text:
    wanted = [machine[key] for key in ("device", "gpu", "cpu") if machine.get(key)]
    wanted += [f"{key} {machine[key]}" for key in ("cores", "memory", "torch") if machine.get(key)]
    wanted += [machine[key] for key in ("python", "os") if machine.get(key)]
    return _join(wanted or list(machine.values())[:5] or [device], "dim")


def _step_line(measurement: Measurement) -> Text:
    anatomy = measurement.anatomy
    parts = [f"Step {words.quantity_text(anatomy.step)}"]
    if words.known(anatomy.samples):
        parts.append(f"{words.number(anatomy.samples.value)} samples")
    else:
        parts.append("samples unknown")
    if words.known(anatomy.micro_batches):
        count = words.number(anatomy.micro_batches.value)
        parts.append(f"{count} micro-batch{'' if count == '1' else 'es'}")
    if anatomy.optimizers_per_step > 1:
        parts.append(f"{anatomy.optimizers_per_step} optimizers")
    return _join(parts, "bold")


def _phases(measurement: Measurement, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold", max_width=max(14, width // 3))
    table.add_column(width=max(6, min(36, width - 58)))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    by_name = {phase.name: phase for phase in measurement.anatomy.phases}
    same_n = all(phase.seconds.n in (0, measurement.anatomy.step.n) for phase in by_name.values())
    largest = max((p.share.or_else(0.0) for p in by_name.values() if words.known(p.share)), default=0.0)
    for name in digest.phase_order(measurement):
        phase = by_name[name]
        if not words.applies(phase.seconds, phase.note):
            continue
        share = phase.share.value if words.known(phase.share) else None
        top = words.finite(share) and share > 0 and share == largest
        label = _text(PHASE_TITLES.get(name, name))
        if phase.note:
            label.append(f" ({words.clean(phase.note, 80)})", style="dim")
        table.add_row(
            label,
            Bar(share, "bold cyan" if top else "cyan"),
            _text(words.percent(share), "bold" if top else ""),
            _text(words.quantity_text(phase.seconds, n=not same_n)),
        )
    return table


def _not_applicable(measurement: Measurement) -> Iterable[RenderableType]:
    """One line for the phases that cannot exist here."""
    by_note: dict[str, list[str]] = {}
    for phase in measurement.anatomy.phases:
        if not words.applies(phase.seconds, phase.note):
            by_note.setdefault(phase.note, []).append(PHASE_TITLES.get(phase.name, phase.name))
    for note, names in by_note.items():
        yield _indent(_text(f"{note}: {', '.join(names)}", "dim"))


def _apart(measurement: Measurement) -> list[tuple[str, str]]:
    anatomy = measurement.anatomy
    warmup = words.quantity_text(anatomy.warmup)
    return [
        ("apart from it: start-up", words.quantity_text(anatomy.startup)),
        ("warm-up", f"{warmup} over the first {anatomy.warmup_steps:,} steps" if anatomy.warmup_steps else warmup),
        ("evaluation", words.quantity_text(anatomy.evaluation)),
        ("checkpoints", words.quantity_text(anatomy.checkpointing)),
    ]


def _lines(lines: Sequence[LineCost]) -> Table:
    table = _grid(("line", ""), ("share", "right"), ("per step", "right"), ("what", ""))
    for line in lines:
        table.add_row(
            _text(words.place_text(line.file, line.line), "cyan"),
            _text(words.quantity_text(line.share, unit="fraction", n=False)),
            _text(words.quantity_text(line.seconds, n=False)),
            _text(f"[{line.kind}] {words.clean(line.text.strip() or line.function, 120)}", "dim"),
        )
    return table


def _findings(findings: Sequence[Finding]) -> Iterable[RenderableType]:
    for index, finding in enumerate(findings, 1):
        head = Text(overflow="fold")
        head.append(f"{index}. ", style="dim")
        head.append(words.clean(finding.title, 300), style=_SEVERITY.get(finding.severity, ""))
        head.append(f"  {finding.severity}", style="dim")
        share = words.quantity_text(finding.share, unit="fraction", n=False)
        rows = [("evidence", f"{words.clean(finding.evidence, 600)} (share of the step: {share})")]
        if finding.helps:
            names = f" ({', '.join(finding.techniques)})" if finding.techniques else ""
            rows.append(("would help", finding.helps + names))
        if finding.edit:
            rows.append(("edit", finding.edit))
        rows.append(("predicted", sentences.gain_text(finding)))
        yield _indent(head)
        yield _indent(_facts(rows), 5)


# ------------------------------------------------------------------------------------------------------- tune


def render_tune(report: TuneReport, report_file: str = "", plan: Plan | None = None) -> RenderableType:
    """Verdict, what was tried, the final pairing, proofs, attribution and break-even.

    Args:
        report: what the search saw and decided.
        report_file: path of the HTML report, named at the end.
        plan: the plan that came of it: attribution and break-even are recorded there.
    """
    parts: list[RenderableType] = [_title("tune", report.script, report.arguments), Text()]
    kind = digest.claim(report)
    style = {"win": "bold green", "baseline": "bold", "unproven": "bold yellow", "interrupted": "bold yellow"}[kind]
    parts += [_text(sentences.headline(report), style), *map(_text, words.lines(report.verdict)), Text()]
    tried, left_out = _split([t for t in digest.ordered(report.trials) if t.stage != "attribution"])
    parts += [_head("Tried"), _indent(_trials(report, tried))]
    if left_out:
        parts += [Text(), _head("Not tried"), _indent(_facts(left_out))]
    levels = sentences.levels_text(report.trials)
    if levels:
        note = f"ratio: reference step time over candidate step time; {levels}; screening picks, it proves nothing"
        parts.append(_indent(_text(note, "dim")))
    if report.final is not None:
        parts += [Text(), _head("Confirmation against the untouched script"), _indent(_facts(_final(report)))]
    if report.verification is not None:
        parts += [Text(), _head("Whole runs, stock and plan in turn"), _indent(whole_runs(report.verification))]
    if report.kept:
        parts += [Text(), _head("Proof")]
        parts.append(_indent(_facts(_proofs(report))))
    alone = [trial for trial in report.trials if trial.stage == "attribution"]
    worth = [(name, words.speedup_text(pairing)) for name, pairing in digest.attribution(plan)]
    if alone or worth:
        parts += [Text(), _head("Attribution (secondary: one test each, not corrected for their number)")]
        parts += [_indent(_facts(worth))] if worth else []
        parts += [_indent(_trials(report, alone))] if alone else []
    parts += [Text(), _indent(_facts(_ending(report, report_file, plan)), 0)]
    return Group(*parts)


def _split(trials: Sequence[Trial]) -> tuple[list[Trial], list[tuple[str, str]]]:
    """Trials with something to show, and the others as (names, reason), those with one reason together."""
    tried = [trial for trial in trials if trial.outcome not in ("not tried", "not applicable")]
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        if trial.outcome in ("not tried", "not applicable"):
            reasons.setdefault(trial.reason, []).append(trial.name)
    return tried, [(", ".join(names), words.clean(reason, 240)) for reason, names in reasons.items()]


def _trials(report: TuneReport, trials: Sequence[Trial]) -> Table:
    table = _grid(("technique", ""), ("outcome", ""), ("ratio", "right"), ("bounds", "right"), ("why", ""))
    table.columns[1].no_wrap = True
    table.columns[2].no_wrap = True
    for trial in trials:
        name = _text(trial.name)
        inner = sentences.detail_text(trial)
        if inner:
            name.append(f" {inner}", style="dim")
        pairing = trial.pairing
        known = pairing is not None and words.direction(pairing) != words.UNKNOWN
        why = trial.reason + (f": {trial.failure}" if trial.failure else "")
        table.add_row(
            name,
            _text(*_outcome(report, trial)),
            _text(words.ratio(pairing.ratio) if pairing is not None and known else "-"),
            _text(f"{words.ratio(pairing.low)}..{words.ratio(pairing.high)}" if pairing is not None and known else ""),
            _text(words.clean(why, 240), "dim"),
        )
    if not trials:
        table.add_row(_text("nothing", "dim"), _text(""), _text(""), _text(""), _text("no technique was tried", "dim"))
    return table


def _outcome(report: TuneReport, trial: Trial) -> tuple[str, str]:
    """Outcome and its colour; the stage is named, and what screening saw stays pale."""
    told = sentences.outcome_text(report, trial)
    if trial.stage == "screen":
        return f"{told} (screen)", "dim"
    if trial.stage == "confirm":
        return f"{told} (confirmed)", _OUTCOMES.get(trial.outcome, "dim")
    return told, _OUTCOMES.get(trial.outcome, "dim")


def _final(report: TuneReport) -> list[tuple[str, str]]:
    final = report.final
    assert final is not None
    rows = [
        ("speed-up", words.speedup_text(final)),
        ("step", f"{sentences.step_text(final.reference_step)} -> {sentences.step_text(final.candidate_step)}"),
        ("pairs", f"{final.quads:,} quads, {words.clean(final.method, 200) or 'method not recorded'}"),
        ("could tell", f"a gain of {words.smallest_text(final)} or more"),
    ]
    if not report.kept and report.proof is not None:
        rows.append(("result", words.proof_text(report.proof)))
    return rows


def _proofs(report: TuneReport) -> list[tuple[str, str]]:
    """A line per proof; techniques that share the plan's proof share its line."""
    rows = digest.proof_rows(report)
    shared = [row for row in rows if not row.own]
    lines = [(row.name, row) for row in rows if row.own]
    if shared:
        lines.append((", ".join(row.name for row in shared), shared[0]))
    return [
        (
            names,
            words.proof_text(row.proof)
            + (f"; {row.pairs:,} quads" if row.pairs is not None else "")
            + ("" if row.own else " (the plan as a whole)"),
        )
        for names, row in lines
    ]


def _ending(report: TuneReport, report_file: str, plan: Plan | None) -> list[tuple[str, str]]:
    rows = []
    if report.kept:
        rows.append(("break-even", sentences.break_even_text(report, plan)))
    if report.forecast:
        rows.append(("forecast", report.forecast))
    if report.energy is not None:
        rows.append(("energy", sentences.energy_text(report.energy)))
        rows.append(("read from", words.clean(report.energy.how, 400)))
    if report.cost:
        rows.append(("cost", report.cost))
    rows.append(("search took", f"{words.duration(report.seconds)} of {words.duration(report.budget)} allowed"))
    if report.interrupted:
        rows.append(("interrupted", "yes: what had been measured by then is shown"))
    if report.isolation:
        rows.append(("isolation", report.isolation))
    rows.append(("plan", report.plan_file or "none written"))
    if report_file:
        rows.append(("report", report_file))
    return rows


# --------------------------------------------------------------------------------------------------------- run


def render_run(run: Run) -> RenderableType:
    """What a run did: step time, phases, losses, techniques, guard and events."""
    times = digest.step_times(run)
    parts: list[RenderableType] = [_title("run", run.script, run.arguments), _text(sentences.run_status(run)), Text()]
    parts.append(_facts(sentences.run_rows(run)))
    if times.phases and times.step:
        table = Table.grid(padding=(0, 1))
        table.add_column(overflow="fold", max_width=30)
        table.add_column(width=24)
        table.add_column(justify="right")
        table.add_column(justify="right")
        for name, seconds in times.phases.items():
            share = seconds / times.step
            title = _text(PHASE_TITLES.get(name, name))
            table.add_row(title, Bar(share), _text(words.percent(share)), _text(words.duration(seconds)))
        parts += [Text(), _head("A step, on average over the run"), _indent(table)]
    if run.events:
        parts += [Text(), _head("Events"), _indent(_events(run))]
    return Group(*parts)


def _events(run: Run, most: int = 12) -> Table:
    table = _grid(("at", "right"), ("what", ""), ("", ""), header=False)
    events = [event for event in run.events if event.kind != "metrics"]
    hidden = max(len(events) - most, 0)
    for event in events[-most:]:
        table.add_row(_text(words.duration(event.at), "dim"), _text(event.kind, "cyan"), _text(event.text))
    if hidden:
        table.add_row(_text(""), _text(f"{hidden:,} earlier", "dim"), _text("in the HTML report", "dim"))
    return table


# -------------------------------------------------------------------------------------------------------- plan


def render_plan(plan: Plan) -> RenderableType:
    """A plan in words: what it does, what it rests on, and what was turned down."""
    evidence = words.UNKNOWN
    if words.finite(plan.speedup):
        evidence = words.ratio(plan.speedup)
        if words.finite(plan.low) and words.finite(plan.high):
            evidence += f" (99 % bounds {words.ratio(plan.low)} to {words.ratio(plan.high)}, {plan.pairs:,} quads)"
    paid = "at once" if plan.break_even_steps == 0 else f"after {words.number(plan.break_even_steps)} steps"
    if plan.to_target is not None:
        evidence = times(plan.to_target, "time to target")
    rows = [
        ("time" if plan.energy is not None else "speed-up", evidence),
        ("proof", words.proof_text(plan.proof)),
        ("step", words.duration(plan.step_seconds)),
        *([("step with it", sentences.pace_text(plan.pace))] if plan.pace is not None else []),
        ("break-even", paid if words.finite(plan.break_even_steps) else words.UNKNOWN),
        ("one-off", words.duration(plan.one_off_seconds)),
        ("device", plan.device),
        ("made", f"{plan.created} in {words.duration(plan.search_seconds)}"),
    ]
    if plan.energy is not None:
        energy = [("energy", sentences.energy_text(plan.energy)), ("read from", words.clean(plan.energy.how, 400))]
        rows = [*energy, *rows]
    parts: list[RenderableType] = [_title("plan", plan.script, plan.arguments), *map(_text, words.lines(plan.verdict))]
    parts += [Text(), _facts(rows), Text(), _head("Kept")]
    for item in plan.kept:
        line = _text(item.name, "bold")
        settings = words.settings_text(item.settings)
        line.append(f"  {settings}" if settings else "", style="cyan")
        line.append(f"  {words.NUMERICS_WORDS.get(item.numerics, words.clean(item.numerics, 60))}", style="dim")
        parts.append(_indent(line))
        alone = _bounds(item.speedup, item.low, item.high)
        taken_out = _bounds(item.attribution, item.attribution_low, item.attribution_high)
        parts.append(
            _indent(_text(f"in its trial {alone}, {item.pairs:,} quads; worth {taken_out} within the plan"), 4)
        )
        if item.note:
            parts.append(_indent(_text(item.note, "dim"), 4))
    if not plan.kept:
        parts.append(_indent(_text("nothing: the untouched script", "dim")))
    if plan.rejected:
        table = _grid(("turned down", ""), ("ratio", "right"), ("why", ""))
        for gone in plan.rejected:
            shown = words.ratio(gone.speedup) if words.finite(gone.speedup) else "-"
            table.add_row(_text(gone.name), _text(shown), _text(words.clean(gone.reason, 240), "dim"))
        parts += [Text(), table]
    return Group(*parts)


def _bounds(value: float | None, low: float | None, high: float | None) -> str:
    if not words.finite(value):
        return words.UNKNOWN
    if not (words.finite(low) and words.finite(high)):
        return words.ratio(value)
    return f"{words.ratio(value)} ({words.ratio(low)} to {words.ratio(high)})"
