"""`upshift explain`."""

from __future__ import annotations

import click


@click.command("explain")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """The catalogue of techniques and findings, or the page of one.

    \b
    Examples:
      upshift explain
      upshift explain bf16
    """
    from upshift.diagnose import registry as findings
    from upshift.errors import UsageError
    from upshift.techniques import registry as techniques

    cards = {item.card.name: item.card for item in techniques.all_techniques()}
    rules = {item.name: item for item in findings.cards()}
    if name is None:
        click.echo("techniques")
        width = max(map(len, cards)) + 1
        for card in cards.values():
            click.echo(f"  {card.name:<{width}}{card.numerics:<17}{card.summary}")
        click.echo("\nfindings")
        for rule in rules.values():
            click.echo(f"  {rule.name:<26}{rule.summary}")
        click.echo("\nupshift explain NAME shows one in full")
        return
    if name in cards:
        card = cards[name]
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
        return
    if name in rules:
        rule = rules[name]
        click.echo(f"{rule.name}: {rule.summary}\n")
        click.echo(f"triggers     {rule.triggers}")
        click.echo(f"limits       {rule.limits or 'none known'}")
        click.echo(f"techniques   {', '.join(rule.techniques) or 'none: it needs an edit'}")
        click.echo(f"source       {rule.source}")
        return
    raise UsageError(
        f"there is no technique or finding called {name!r}.",
        remedy=f"Known: {', '.join([*cards, *rules])}.",
    )
