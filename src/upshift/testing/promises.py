"""The promises of a card, and of a technique that finds nothing to act on."""

from __future__ import annotations

from collections.abc import Callable

from upshift.records.codec import dumps
from upshift.records.measurement import PHASES
from upshift.sites import Card, ModelSeen, NoEffect, Numerics, ProcessEnv, ProcessStart, Technique, Verdict
from upshift.sites.moments import SITES
from upshift.techniques import registry
from upshift.testing.seen import WORLDS, defaults, measurement
from upshift.testing.state import snapshot
from upshift.testing.tiny import same_random, staged


def check_card(technique: Technique) -> None:
    """The card is complete, and its settings' defaults obey their own rules."""
    card = getattr(technique, "card", None)
    assert isinstance(card, Card), f"{type(technique).__name__} has no card"
    for method in ("numerics", "check", "at"):
        assert callable(getattr(technique, method, None)), f"{card.name} has no method {method}"
    assert card.name and card.summary and card.source, f"{card.name}: name, summary and source are owed"
    assert card.sites and set(card.sites) <= set(SITES), f"unknown sites: {set(card.sites) - set(SITES)}"
    assert set(card.targets) <= set(PHASES), f"unknown phases: {set(card.targets) - set(PHASES)}"
    assert card.targets, "the phases it acts on are owed"
    assert isinstance(card.numerics, Numerics), f"numerics is none of {', '.join(Numerics)}"
    for key, spec in card.settings.items():
        assert spec.doc, f"setting {key} has no description"
        assert not spec.problem(spec.default), f"default of {key}: {spec.problem(spec.default)}"
        assert spec.problem(object()), f"setting {key} accepts anything"
        if spec.choices:
            wrong = "no such choice" if isinstance(spec.default, str) else -12345
            assert spec.problem(wrong), f"setting {key} accepts what is not among its choices"
    owed = technique.numerics(defaults(technique), measurement().facts)
    assert isinstance(owed, Numerics), f"numerics() returns {owed!r}, which is none of {', '.join(Numerics)}"
    assert not set(card.after) & set(card.conflicts), "a technique cannot come after one it excludes"


def check_relations(technique: Technique) -> None:
    """`after` and `conflicts` name known techniques; the order of the registry obeys `after`."""
    card, known = technique.card, registry.names()
    for other in (*card.after, *card.conflicts):
        assert other in known, f"{card.name} refers to {other}, which is not registered"
        assert other != card.name, f"{card.name} refers to itself"
    if card.name in known:
        for other in card.after:
            assert known.index(other) < known.index(card.name), f"{card.name} must be applied after {other}"


def check_pure(technique: Technique) -> None:
    """`check` reads the measurement, changes nothing, answers the same twice, and proposes only valid settings."""
    for facts in WORLDS:
        seen = measurement(**facts)
        before, world = dumps(seen), snapshot()
        first, second = technique.check(seen), technique.check(seen)
        assert isinstance(first, Verdict) and first == second, "check is not deterministic"
        assert dumps(seen) == before, "check changed the measurement"
        assert snapshot() == world, "check changed global state"
        assert first.reason, "a verdict gives its reason"
        assert first.gain is None or first.gain > 0, "a predicted speed-up is positive"
        assert first.gain is None or first.rests_on, "a predicted gain says what it rests on"
        for item in first.candidates:
            for key, value in item.items():
                assert key in technique.card.settings, f"candidate sets {key}, which the card does not have"
                problem = technique.card.settings[key].problem(value)
                assert not problem, f"candidate {key}={value!r}: {problem}"


def check_nothing_seen(technique: Technique) -> None:
    """Where no model, optimizer or loader was seen, nothing that acts on one applies."""
    acts_on = set(technique.card.sites) - {"process_env", "process_start"}
    if not acts_on or "process_start" in technique.card.sites:
        return
    verdict = technique.check(measurement(models=(), optimizers=(), loaders=(), attention=False))
    assert not verdict.applies, f"applies to a script without anything to act on: {verdict.reason}"


def check_says_nothing_done(technique: Technique) -> None:
    """Applied a second time to the same object, or to an empty one, it either acts or says why not; it never raises."""
    import torch

    world = snapshot()
    with same_random(), staged(technique) as (stage, heard):
        empty = torch.nn.Identity()
        stage.raise_site(ProcessEnv(env={}))
        stage.raise_site(ProcessStart())
        stage.raise_site(ModelSeen(module=empty, args=(torch.ones(2),)))
        assert not heard.failures(), heard.said
        for name, reason in stage.effects().items():
            acted = name in stage.acted
            assert acted or reason, f"{name} neither acted nor gave a reason"
        if "model_created" in technique.card.sites and "process_start" not in technique.card.sites:
            outcome = technique.at(ModelSeen(module=empty, args=(torch.ones(2),)), defaults(technique))
            assert outcome is None or isinstance(outcome, NoEffect), "acts on a module without parameters"
    now = snapshot()
    assert now == world, f"global state was not restored: {[key for key in now if now[key] != world[key]]}"


def check_registered(technique: Technique) -> None:
    """upshift finds the technique under the name on its card."""
    name = technique.card.name
    kind = type(technique)
    target = f"{kind.__module__}:{kind.__qualname__}"
    assert name in registry.names(), (
        f'nothing is registered as {name!r}: declare the entry point {name} = "{target}" in the group '
        f"{registry.GROUP}, and install the package (pip install -e .)"
    )
    found = type(registry.get(name))
    assert found is kind, f"{name!r} is registered, but as {found.__module__}:{found.__qualname__}, not {target}"


#: Checks that need no training. `check_registered` is apart: a technique may be tried before it is registered.
CHECKS: tuple[Callable[[Technique], None], ...] = (
    check_card,
    check_relations,
    check_pure,
    check_nothing_seen,
    check_says_nothing_done,
)
