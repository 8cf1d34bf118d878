"""`upshift doctor`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from upshift.cli import show

if TYPE_CHECKING:
    from rich.text import Text

    from upshift.hardware.health import Check, Health
    from upshift.search.selftest import SelftestReport, Truth

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red", "unknown": "magenta"}
#: Width of the longest of them.
_STATE = 7


@click.command("doctor")
@click.option("--selftest", is_flag=True, help="Try the decisions themselves: trials whose truth is known.")
@click.option("--minutes", type=click.FloatRange(0.1, 24 * 60), default=2.0, show_default=True,
              help="How long the self-test may take.")  # fmt: skip
@click.option(
    "--quick", is_flag=True, help="Leave out what takes seconds: disk speed, a test of the compiler, imports."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write what was found as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
def command(selftest: bool, minutes: float, quick: bool, json_file: str | None, quiet: bool) -> int:
    """Is this machine fit for training and for trials that can be believed?

    Without options: what of the machine, torch, the accelerator, memory, disks and the Python environment stands in
    the way, with the command that mends it. Nothing is changed. With --selftest: how often upshift would be wrong on
    this machine, measured with trials whose truth is known. Exit code 1 when something is wrong.

    \b
    Examples:
      upshift doctor
      upshift doctor --quick --json health.json
      upshift doctor --selftest --minutes 5
    """
    from upshift import api

    if selftest:
        with show.Progress(quiet) as say:
            report = api.selftest(minutes * 60.0, say)
        if json_file:
            show.write_json(json_file, report)
        click.echo(show.safe(selftest_words(report)), err=True)
        if report.interrupted:
            raise KeyboardInterrupt
        return 1 if report.wrong() else 0
    with show.Progress(quiet) as say:
        found = api.doctor(say, quick)
    if json_file:
        show.write_json(json_file, found)
    console = show.console()
    for line in drawn(found, console.width):
        console.print(line, soft_wrap=True)
    return 1 if found.wrong() else 0


def drawn(found: Health, width: int) -> Iterator[Text]:
    """The checks under their headings: state, what was found; of those that are not well also why, and the mend.

    Lines are at most `width` long, but for commands: what is to be copied is never broken. The state is always a
    word: nothing rests on colour.
    """
    from rich.text import Text

    group = ""
    for check in found.checks:
        if check.group != group:
            yield Text("\n" * bool(group) + check.group, style="bold")
            group = check.group
        yield from _drawn(check, width)
    counts = (f"{found.count('ok')} ok", f"{found.count('note')} to note", f"{found.count('wrong')} wrong",
              f"{found.count('unknown')} unknown")  # fmt: skip
    yield Text(f"\n{', '.join(counts)}")


def _drawn(check: Check, width: int) -> Iterator[Text]:
    from rich.text import Text

    first, *more = _wrapped(f"{check.name}: {check.found}", width)
    yield Text.assemble(
        (f"{check.state:<{_STATE}}", _STYLES[check.state]), " ", (first[: len(check.name)], "bold"),
        first[len(check.name) :],
    )  # fmt: skip
    margin = " " * (_STATE + 1)
    yield from (Text(f"{margin}{line}") for line in more)
    if check.state != "ok":
        yield from (Text(f"{margin}{line}", style="dim") for line in _wrapped(check.why, width))
        if check.mend:
            yield Text(f"{margin}mend it: {show.safe(check.mend)}", style="cyan")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(show.safe(text), max(width - _STATE - 1, 20), break_on_hyphens=False) or [""]


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
