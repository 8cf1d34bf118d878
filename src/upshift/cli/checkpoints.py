"""`upshift checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from upshift.cli import show

if TYPE_CHECKING:
    from upshift.api.checkpoints import Inventory, Stored


@click.command("checkpoints")
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--export", "export_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the model's weights of the checkpoint that would be resumed: FILE.safetensors or FILE.pt.",
              )  # fmt: skip
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write what was found as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
def command(run_folder: Path, export_file: Path | None, json_file: str | None, quiet: bool) -> None:
    """The checkpoints in RUN_FOLDER: every file is read and checked against its digest; nothing is changed.

    Shows which one a resumed run begins from, and exports its weights under the model's own keys.

    \b
    Examples:
      upshift checkpoints runs/cifar
      upshift checkpoints --export model.safetensors runs/cifar
    """
    from upshift import api

    with show.Progress(quiet) as say:
        found = api.checkpoints(run_folder, say)
    click.echo(show.safe(words(found)), err=True)
    if json_file:
        show.write_json(json_file, found)
    if export_file is not None:
        name = api.export(run_folder, export_file)
        show.say(f"weights of {name}: {export_file}")


def words(found: Inventory) -> str:
    """The checkpoints as text, newest last."""
    from upshift.units import binary

    lines = [f"{found.run}: {len(found.checkpoints)} checkpoints"]
    width = max((len(item.name) for item in found.checkpoints), default=0)
    for item in found.checkpoints:
        state = "whole  " if item.whole else "damaged"
        about = ", ".join(filter(None, (_marks(item, found), _metrics(item), item.problem)))
        lines.append(f"  {item.name:<{width}}  {state}  {binary(item.bytes):>9}  {item.created}  {about}".rstrip())
    if found.quarantined:
        lines.append(f"  set aside: {', '.join(found.quarantined)}")
    if found.checkpoints and not found.resumed:
        lines.append("None is whole: a resumed run would begin anew.")
    return "\n".join(lines)


def _marks(item: Stored, found: Inventory) -> str:
    marks = (
        ("would be resumed", item.name == found.resumed),
        ("best", item.best),
        ("before a spike", item.before_spike),
    )
    ranks = [f"{item.world} ranks"] if item.world > 1 else []
    return ", ".join([text for text, holds in marks if holds] + ranks)


def _metrics(item: Stored) -> str:
    """The scalar values among the facts under `metrics`, or epoch and samples where there are none."""
    metrics = item.facts.get("metrics")
    known = metrics if isinstance(metrics, dict) and metrics else item.facts
    keys = list(known)[:4] if known is metrics else ["epoch", "samples"]
    shown = ((key, known.get(key)) for key in keys)
    return " ".join(f"{key:.40} {value:.5g}" for key, value in shown if isinstance(value, (int, float)))
