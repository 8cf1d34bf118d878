"""`upshift explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from upshift.diagnose.card import FindingCard
    from upshift.hardware.catalog import Device
    from upshift.sites.protocol import Card


@click.command("explain")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """The catalogue of techniques, findings and devices, or the page of one.

    The figures of a device are those its maker states, each with source and date, beside what it costs to rent. Your
    own .upshift/hardware.toml adds devices and offers, or overrides figures.

    \b
    Examples:
      upshift explain
      upshift explain bf16
      upshift explain H100
    """
    from upshift.diagnose import registry as findings
    from upshift.techniques import registry as techniques

    cards = {item.card.name: item.card for item in techniques.all_techniques()}
    rules = {item.name: item for item in findings.cards()}
    if name in cards:
        _technique(cards[name])
    elif name in rules:
        _finding(rules[name])
    else:
        from upshift.hardware import catalog

        devices = catalog.devices(catalog.own_files())
        if name is None:
            _everything(cards, rules, devices)
        else:
            _device(name, devices, [*cards, *rules])


def _everything(cards: Mapping[str, Card], rules: Mapping[str, FindingCard], devices: Mapping[str, Device]) -> None:
    from upshift.report import device_words

    click.echo("techniques")
    width = max(map(len, cards)) + 1
    for card in cards.values():
        click.echo(f"  {card.name:<{width}}{card.numerics:<17}{card.summary}")
    click.echo("\nfindings")
    for rule in rules.values():
        click.echo(f"  {rule.name:<26}{rule.summary}")
    click.echo("\ndevices")
    for line in device_words.listing(devices):
        click.echo(line)
    click.echo("\nupshift explain NAME shows one in full")


def _technique(card: Card) -> None:
    click.echo(f"{card.name}: {card.summary}\n")
    if card.details:
        click.echo(f"{card.details}\n")
    click.echo(f"numerics     {card.numerics}")
    click.echo(f"switchable   {card.switchable}")
    click.echo(f"acts on      {', '.join(card.targets)}")
    click.echo(f"sites        {', '.join(card.sites)}")
    click.echo(f"conflicts    {', '.join(card.conflicts) or 'none'}")
    click.echo(f"tested on    {', '.join(card.tested_on) or 'nothing yet (untested on cuda)'}")
    click.echo(f"source       {card.source}")
    for key, spec in card.settings.items():
        choices = f" ({', '.join(map(str, spec.choices))})" if spec.choices else ""
        click.echo(f"setting      {key} = {spec.default}{choices}: {spec.doc}")


def _finding(rule: FindingCard) -> None:
    click.echo(f"{rule.name}: {rule.summary}\n")
    click.echo(f"triggers     {rule.triggers}")
    click.echo(f"limits       {rule.limits or 'none known'}")
    click.echo(f"techniques   {', '.join(rule.techniques) or 'none: it needs an edit'}")
    click.echo(f"source       {rule.source}")


def _device(name: str, devices: Mapping[str, Device], others: list[str]) -> None:
    """The page of a device; `others` are the names of all that is no device, for hints."""
    from upshift.cli.show import safe
    from upshift.errors import UsageError
    from upshift.hardware import catalog, prices
    from upshift.report import device_words

    if not catalog.lookup(name, devices):
        near = catalog.close(name, [*others, *devices])
        raise UsageError(
            f"there is no technique, finding or device called {name!r}.",
            remedy=(f"Did you mean {' or '.join(near)}? " if near else "")
            + f"Known: {', '.join(others)}, and the devices that `upshift explain` lists.",
        )
    key, device = catalog.pick(name, devices)
    offers = prices.for_device(key, prices.known(say=lambda line: click.echo(safe(f"upshift: {line}"), err=True)))
    family = [item for item in devices if item != key and item.startswith(f"{key}-")]
    for line in device_words.page(key, device, offers, family):
        click.echo(line)
