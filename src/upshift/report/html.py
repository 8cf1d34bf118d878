"""Records as one offline HTML file: no script at all, nothing loaded, a strict content security policy.

What comes from a record is escaped twice over: every value passes `words.clean` and jinja2's autoescape. The policy
allows the one style sheet by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from upshift.records.finding import Finding
from upshift.records.ledger import Ledger
from upshift.records.measurement import Measurement
from upshift.records.plan import Plan
from upshift.records.quantity import Quantity
from upshift.records.resources import Resources
from upshift.records.run import Run
from upshift.records.trial import TuneReport
from upshift.report import digest, resource_views, sentences, views, words


def _finalize(value: object) -> object:
    """What autoescape gets to see: markup of our own as it is, everything else as one clean line."""
    if isinstance(value, Markup):
        return value
    return words.UNKNOWN if value is None else words.clean(value)


@cache
def environment() -> Environment:
    return Environment(
        loader=PackageLoader("upshift.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _style() -> tuple[Markup, str]:
    """The style sheet, and the policy that allows exactly it."""
    css = files("upshift.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    digest_ = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest_}'; img-src data:; base-uri 'none'; form-action 'none'"
    return Markup(css), policy


def _page(template: str, kind: str, script: str, arguments: tuple[str, ...], when: str, label: str, **view: Any) -> str:
    css, csp = _style()
    command = words.command_text(script, arguments)
    page = {
        "title": f"upshift {kind}: {command}",
        "kind": kind,
        "when": words.when_text(when),
        "command": command,
        "label": label,
    }
    return environment().get_template(template).render(page=page, css=css, csp=Markup(csp), **view)


def render_tune(report: TuneReport, runs: Sequence[Run] = (), *, plan: Plan | None = None, label: str = "") -> str:
    """A search as one page: verdict, trials, proof, anatomy, findings, roofline, runs, machine and limits.

    Args:
        report: what the search saw and decided.
        runs: runs to show along with it; the first with techniques gives the planned anatomy.
        plan: the plan that came of it: attribution and break-even are recorded there.
        label: a remark under the title, such as that the figures are an example.
    """
    return _page(
        "tune.html.j2", "tune", report.script, report.arguments, report.created, label,
        claim=views.tune_claim(report),
        strip=views.tune_strip(report, plan),
        tried=views.tried(report, plan),
        proof=views.proof_view(report),
        where=views.where(report.measurement, views.planned_bars(report, runs)),
        findings=[views.finding_view(item) for item in report.findings],
        limit=views.limit(report.measurement),
        runs=[views.run_view(run, f"run{index}") for index, run in enumerate(runs)],
        about=views.about(
            report.measurement,
            [
                ("search", f"{words.duration(report.seconds)} of {words.duration(report.budget)} allowed"),
                ("isolation", report.isolation or report.measurement.isolation or words.UNKNOWN),
                ("plan", report.plan_file or "none written"),
            ],
            views.TUNE_NOTES,
        ),
    )  # fmt: skip


def render_diagnosis(
    measurement: Measurement, findings: Sequence[Finding], verdict: str, *, label: str = ""
) -> str:  # fmt: skip
    """A diagnosis as one page: verdict, anatomy, lines, findings, roofline, machine and limits."""
    step = measurement.anatomy.step
    text = words.quantity_text(Quantity(step.value, step.unit, basis=step.basis), n=False)
    big, _, unit = text.partition(" ")
    under = (f"per training step {words.interval_text(step)}".strip(), f"over {step.n:,} steady steps")
    strip = [views.Fact("Steps watched", words.number(measurement.anatomy.steps_seen), "warm-up included")]
    if words.known(measurement.anatomy.samples) and words.known(step) and (step.value or 0) > 1e-12:
        per_step, seconds = measurement.anatomy.samples.or_else(0), step.or_else(1)
        rate = words.number(words.three(per_step / seconds))
        strip.append(views.Fact("Throughput", f"{rate} samples/s", f"{words.number(per_step)} samples a step"))
    mfu = measurement.floor.mfu if measurement.floor else None
    strip.append(
        views.Fact("MFU", words.quantity_text(mfu, unit="fraction", n=False), "model FLOPs over the measured peak")
    )
    watching = words.quantity_text(measurement.overhead, unit="fraction", n=False)
    strip.append(views.Fact("Cost of watching", watching, "of the step"))
    return _page(
        "diagnosis.html.j2", "diagnosis", measurement.script, measurement.arguments, measurement.created, label,
        claim=views.Claim("baseline", big, unit, under if words.known(step) else (), words.lines(verdict)),
        strip=strip,
        where=views.where(measurement, []),
        findings=[views.finding_view(item) for item in findings],
        limit=views.limit(measurement),
        about=views.about(measurement, [("isolation", measurement.isolation or words.UNKNOWN)], ()),
    )  # fmt: skip


def render_run(
    run: Run, *, resources: Resources | None = None, ledger: Ledger | None = None, label: str = ""
) -> str:  # fmt: skip
    """A run as one page: speed, loss, phases and events over its steps, and what it used of its machine.

    Args:
        run: its record.
        resources: what was sampled beside it, if anything was.
        ledger: its books: energy, carbon, cost.
        label: a remark under the title.
    """
    speed = sentences.steps_per_second(run)
    big, _, unit = speed.partition(" ")
    rows = dict(sentences.run_rows(run))
    times = digest.step_times(run)
    strip = [
        views.Fact("Steps", rows["steps"], f"{times.steps:,} timed"),
        views.Fact("A step", words.duration(times.step), "on average"),
        views.Fact("Whole run", words.duration(run.seconds), f"evaluation {rows['evaluation']}"),
        views.Fact("Guard", rows["guard"]),
    ]
    told = f"The run {'is ' if run.status == 'running' else ''}{sentences.run_status(run)}. Loss: {rows['loss']}."
    about = {
        "machine": list(run.environment.items()),
        "facts": [(name, rows[name]) for name in ("run", "plan", "techniques", "checkpoints", "log") if name in rows],
        "notes": ("Two runs at different times are no evidence of a gain: a machine drifts by more than most gains.",),
    }  # fmt: skip
    return _page(
        "run.html.j2", "run", run.script, run.arguments, run.started, label,
        claim=views.Claim("baseline", big, unit, ("training steps, evaluation and checkpoints apart",), [told]),
        strip=strip,
        view=views.run_view(run, "run"),
        used=resource_views.resources_view(resources, ledger),
        about=about,
    )  # fmt: skip
