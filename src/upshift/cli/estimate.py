"""`upshift estimate`."""

from __future__ import annotations

import click

from upshift.cli import show


@click.command("estimate", cls=show.ForTarget, context_settings=show.TARGET_SETTINGS)
@click.option("--gpu", "devices", multiple=True, metavar="NAME", help="A device of the catalogue; may be repeated.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples of a pass, where they are to be others than now.")
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), help="Another precision than now.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the whole training.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Epochs of the whole training.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Money that it may cost.")
@click.option("--deadline", type=show.Duration(), help="Time that it may take: 12h.")
@click.option("--region", help="Where the electricity comes from: FR, us-east-1, or grams of CO2 per kWh.")
@click.option("--price", help="Price an hour of one device, in place of the catalogue's: 2.5, EUR 2.5/h.")
@click.option("--pue", help="Energy of the building over that of its machines: 1.2.")
@click.option("--on-premises", is_flag=True, help="The data may not leave the house: no clouds.")
@click.option("--measure", is_flag=True, help="Measure on this machine what was estimated, and remember the error.")
@click.option("--seconds", type=show.Duration(), default="20s", show_default=True, help="Watch for at most this long.")
@click.option("--patience", type=show.Duration(), default="10m", show_default=True, help="Wait so long for a step.")
@click.option("--allow-remote-writes", is_flag=True, help="Let the script write to hubs and object stores.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write the estimate as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
@show.target_options
def command(
    devices: tuple[str, ...],
    batch: int | None,
    precision: str | None,
    steps: int | None,
    epochs: float | None,
    budget: float | None,
    deadline: float | None,
    region: str | None,
    price: str | None,
    pue: str | None,
    on_premises: bool,
    measure: bool,
    seconds: float,
    patience: float,
    allow_remote_writes: bool,
    json_file: str | None,
    quiet: bool,
    module: str | None,
    rest: tuple[str, ...],
) -> None:
    """Memory, time, cost and energy of TARGET on catalogued hardware.

    The training is watched here for some seconds, as `upshift diagnose` does, then predicted. Every figure says how it
    is known; on another device the time of a step is an order of magnitude.

    \b
    Examples:
      upshift estimate --epochs 30 train.py
      upshift estimate --gpu H100 --gpu L4 --steps 100000 --budget 50 --deadline 12h train.py
      upshift estimate --measure train.py
    """
    from upshift.advise.memory import AS_IS
    from upshift.api.estimating import EstimateOptions, estimate
    from upshift.report.estimated import render_estimate

    options = EstimateOptions(
        devices=devices, batch=batch, precision=precision or AS_IS, steps=steps, epochs=epochs, budget=budget,
        deadline=deadline, region=region, price=price, pue=pue, on_premises=on_premises, measure=measure,
        seconds=min(seconds, 600.0), patience=patience, allow_remote_writes=allow_remote_writes,
    )  # fmt: skip
    with show.Progress(quiet) as say:
        found = estimate(show.target(module, rest), options, say)
    show.console().print(render_estimate(found))
    if json_file:
        show.write_json(json_file, found)
