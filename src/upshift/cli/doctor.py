"""`upshift doctor`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from upshift.cli import show

if TYPE_CHECKING:
    from upshift.hardware.health import Health
    from upshift.search.selftest import SelftestReport, Truth


@click.command("doctor")
@click.option("--selftest", is_flag=True, help="Try the decisions themselves: trials whose truth is known.")
@click.option("--minutes", type=click.FloatRange(0.1, 24 * 60), default=2.0, show_default=True,
              help="How long the self-test may take.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write what was found as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
def command(selftest: bool, minutes: float, json_file: str | None, quiet: bool) -> int:
    """Is this machine fit for training and for trials that can be believed?

    Without options: a short check, with the command that mends what is wrong. With --selftest: how often upshift would
    be wrong on this machine, measured with trials whose truth is known. Exit code 1 when something is wrong.

    \b
    Examples:
      upshift doctor
      upshift doctor --selftest --minutes 5
    """
    from upshift import api

    found: Health | SelftestReport
    with show.Progress(quiet) as say:
        if selftest:
            found = api.selftest(minutes * 60.0, say)
            text = selftest_words(found)
        else:
            found = api.doctor(say)
            text = health_words(found)
    if json_file:
        show.write_json(json_file, found)
    click.echo(show.safe(text), err=True)
    if selftest and getattr(found, "interrupted", False):
        raise KeyboardInterrupt
    return 1 if found.wrong() else 0


def health_words(found: Health) -> str:
    """The checks as text: state, what was found, why it matters, what mends it."""
    lines = []
    for check in found.checks:
        lines.append(f"{check.state:<6}{check.name}: {check.found}")
        if check.state != "ok":
            lines.append(textwrap.fill(check.why, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
            if check.mend:
                lines.append(f"      mend it: {check.mend}")
    return "\n".join(lines)


def selftest_words(found: SelftestReport) -> str:
    """What the self-test found, in sentences."""
    from upshift.units import percent
    from upshift.units import seconds as in_words

    same = found.identical
    lines = []
    if same.decisions:
        lines.append(
            f"False wins: {same.faster} of {same.decisions} decisions about two identical arms (pairs of processes: "
            f"{same.pairs}; {in_words(same.seconds)} each) called one faster. With 95 % confidence the rate on this "
            f"machine, as busy as it was, is at most {percent(same.high)}."
        )
        lines.append(f"False losses: {same.slower} of {same.decisions} called one slower.")
    else:
        lines.append("False wins: no decision about identical arms could be taken in this time.")
    for item in found.gains:
        lines.append(f"A true gain, {item.name}: {_gain(item)}")
    least = found.detectable()
    if least is not None:
        gain, seconds = least
        lines.append(
            f"Smallest gain: alternating for {in_words(seconds)}, a true gain of {percent(gain)} would be kept nine "
            f"times in ten; four times as long resolves about half as much."
        )
    for item in found.faults:
        lines.append(f"A fault, {item.name}: {_fault(item)}")
    if found.left_out:
        lines.append(f"Not tried in this time: {'; '.join(found.left_out)}. A larger --minutes buys it.")
    problems = found.wrong()
    lines += [f"Wrong: {text}" for text in problems]
    if found.interrupted:
        lines.append("Interrupted: this is what was known by then.")
    elif not problems:
        lines.append(f"Nothing wrong was found in {in_words(found.seconds)}.")
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)


def _gain(item: Truth) -> str:
    if item.failure:
        return f"not tried: {item.failure}."
    pairing = item.pairing
    figures = (
        "" if pairing is None else f" ({pairing.ratio:.3f}x, {pairing.low:.3f} to {pairing.high:.3f}, at 99 % each)"
    )
    if item.kept:
        return f"kept{figures}."
    return f"not found{figures}: this machine is too noisy for it in {item.seconds:.0f} s."


def _fault(item: Truth) -> str:
    if item.failure:
        return f"not tried: {item.failure}."
    return f"accepted ({item.reason})." if item.shown else f"rejected: {item.reason}."
