"""The search against a world whose truth is known: what is kept must be true, and nothing else may be kept."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_runner import FakeRunner, World
from made_techniques import make_technique

from upshift.measure.anatomy import anatomy
from upshift.measure.steps import StepRecord
from upshift.records import Measurement, ScriptFacts
from upshift.search import duel as duel_module
from upshift.search.autopilot import Autopilot, Options
from upshift.search.concluding import Outcome
from upshift.sites import Numerics
from upshift.sites.runner import ChildSpec


def seen(step: float = 0.1, **facts: Any) -> Measurement:
    records = [
        StepRecord(i, i * step, step, 0.0, 0.0, step / 3, 0.0, step / 3, step / 3, 0.0, 0.0, 0, 0.0, 1, 0, 1, (1.0,))
        for i in range(30)
    ]
    filled = {"loss_seen": True, "losses": (1.0,), **facts}
    return Measurement(
        script="train.py", arguments=(), created="", anatomy=anatomy(records, startup=1.0), facts=ScriptFacts(**filled)
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    # The search reads the world's clock, so that budgets mean what they say without anybody waiting.
    for module in ("upshift.search.duel", "upshift.search.autopilot", "upshift.search.confirm"):
        monkeypatch.setattr(f"{module}.time.monotonic", lambda: made.clock)
    assert duel_module.time.monotonic() == 0.0
    return made


def search(world: World, *techniques: Any, measurement: Measurement | None = None, **options: Any) -> Outcome:
    pilot = Autopilot(
        FakeRunner(world),
        ChildSpec(mode="arm", target="train.py"),
        measurement or seen(world.step),
        {item.card.name: item for item in techniques},
        Options(**{"budget": 180.0, **options}),
        say=lambda text: None,
    )
    return pilot.run()


def names(outcome: Outcome) -> set[str]:
    return {item.name for item in outcome.kept}


def outcome_of(outcome: Outcome, name: str) -> str:
    return next(trial.outcome for trial in outcome.trials if trial.name == name)


def test_a_true_gain_is_kept_with_an_interval_that_holds_the_truth(world: World) -> None:
    world.factor["good"] = 1 / 1.5
    world.rounding["good"] = 1e-6
    outcome = search(world, make_technique("good"), make_technique("idle"))
    assert names(outcome) == {"good"}
    pairing = outcome.confirmation.pairing  # type: ignore[union-attr]
    assert pairing is not None and pairing.low <= 1.5 <= pairing.high
    proof = outcome.confirmation.proof  # type: ignore[union-attr]
    assert proof.rung == "trajectory" and proof.band is not None and proof.band.horizon == proof.steps
    assert outcome_of(outcome, "idle") == "no change"


@pytest.mark.parametrize("seed", range(12))
def test_identical_arms_are_never_kept(world: World, seed: int) -> None:
    world.random.seed(seed)
    outcome = search(world, make_technique("a"), make_technique("b", live=False), make_technique("c"))
    assert not outcome.kept
    assert "Keep your baseline" in outcome.verdict


def test_a_slower_technique_is_said_to_be_slower(world: World) -> None:
    world.factor["bad"] = 1.4
    outcome = search(world, make_technique("bad"))
    assert outcome_of(outcome, "bad") == "slower" and not outcome.kept


def test_process_techniques_are_confirmed_too(world: World) -> None:
    world.factor["fast"] = 0.6
    outcome = search(world, make_technique("fast", live=False, numerics=Numerics.BITWISE))
    assert names(outcome) == {"fast"}
    assert outcome.confirmation.proof.rung == "bitwise"  # type: ignore[union-attr]


def test_a_bitwise_technique_that_changes_bits_is_not_kept(world: World) -> None:
    world.factor["liar"] = 0.5
    world.rounding["liar"] = 1e-7
    outcome = search(world, make_technique("liar", numerics=Numerics.BITWISE))
    assert not outcome.kept and "quality was not shown" in outcome.verdict


@pytest.mark.parametrize("fault", ["lag", "scale"])
def test_a_fast_technique_that_hurts_is_not_kept(world: World, fault: str) -> None:
    world.factor["harm"] = 0.4
    getattr(world, fault)["harm"] = 0.05 if fault == "lag" else 1.1
    outcome = search(world, make_technique("harm"))
    assert not outcome.kept


def test_the_harmful_one_is_dropped_and_the_good_one_confirmed_without_it(world: World) -> None:
    world.factor.update(good=0.6, harm=0.6)
    world.scale["harm"] = 1.2
    outcome = search(world, make_technique("good", numerics=Numerics.BITWISE), make_technique("harm"), budget=400.0)
    assert names(outcome) == {"good"}
    reason = next(item.reason for item in outcome.rejected if item.name == "harm")
    assert "updates" in reason


def test_failures_and_no_effects_are_reported_and_the_search_goes_on(world: World) -> None:
    world.factor["good"] = 0.6
    world.fails.update({"live-fails", "process-fails"})
    world.no_effect.add("idle")
    outcome = search(
        world, make_technique("live-fails"), make_technique("process-fails", live=False), make_technique("idle"),
        make_technique("good"),
    )  # fmt: skip
    assert names(outcome) == {"good"}
    reasons = {trial.name: trial.reason for trial in outcome.trials}
    assert "boom" in reasons["live-fails"] and "boom" in reasons["process-fails"]
    assert reasons["idle"] == "no effect: nothing to do"


def test_arms_that_start_differently_prove_nothing(world: World) -> None:
    world.factor["good"] = 0.5
    world.other_start = True
    outcome = search(world, make_technique("good"))
    assert not outcome.kept and "same parameters" in outcome.verdict


def test_no_loss_seen_means_nothing_is_kept(world: World) -> None:
    world.factor["good"] = 0.5
    outcome = search(world, make_technique("good"), measurement=seen(loss_seen=False))
    assert not outcome.kept and "no scalar loss" in outcome.verdict


def test_conflicts_come_from_the_cards(world: World) -> None:
    world.factor.update(first=0.5, second=0.5)
    outcome = search(world, make_technique("first", gain=2.0), make_technique("second", conflicts=("first",)))
    assert names(outcome) == {"first"}
    assert "conflicts with first" in next(t.reason for t in outcome.trials if t.name == "second")


def test_ctrl_c_ends_with_a_verdict_and_no_process_left(world: World) -> None:
    world.factor["good"] = 0.5
    world.interrupt_after = 5
    outcome = search(world, make_technique("good"))
    assert outcome.interrupted and not outcome.kept and "Interrupted" in outcome.verdict
    assert world.killed == len(world.started)


def test_trials_that_cannot_pay_are_not_made(world: World) -> None:
    world.factor["good"] = 0.5
    outcome = search(world, make_technique("good"), steps_planned=20)
    assert outcome_of(outcome, "good") == "not tried"
    assert not world.started
    assert "--steps-planned" in outcome.trials[-1].reason


def test_the_budget_is_kept(world: World) -> None:
    world.step = 1.5
    many = [make_technique(f"t{i}", live=bool(i % 2)) for i in range(12)]
    search(world, *many, measurement=seen(1.5), budget=120.0)
    assert world.clock <= 120.0 * 1.25


def test_the_cost_of_starting_epochs_is_charged(world: World) -> None:
    # Faster steps, but workers that take longer to start than an epoch saves.
    world.factor["workers"] = 0.7
    world.epoch_cost["workers"] = 1.0
    world.steps_per_epoch = 10
    from upshift.records import LoaderFacts

    loader = LoaderFacts(
        name="DataLoader", dataset="D", training=True, workers=0, batch_size=1, samples=10, iterable=False
    )
    outcome = search(world, make_technique("workers", live=False), measurement=seen(loaders=(loader,)))
    assert not outcome.kept


def test_a_script_that_ends_too_soon_is_not_timed(world: World) -> None:
    world.factor["good"] = 0.5
    world.length = 8
    outcome = search(world, make_technique("good"))
    assert not outcome.kept
    assert outcome_of(outcome, "good") == "not tried"


def test_only_confirmed_techniques_carry_a_confirmed_speed_up(world: World) -> None:
    world.factor["good"] = 0.6
    outcome = search(world, make_technique("good"))
    assert any(trial.stage == "confirm" for trial in outcome.trials)
    assert outcome.kept[0].attribution is not None


def test_two_copies_that_do_not_fit_are_not_started(world: World) -> None:
    world.factor["good"] = 0.5
    world.memory = (10 * 2**30, 2**30)
    outcome = search(world, make_technique("good"))
    assert not outcome.kept
    assert any("do not fit in memory" in trial.reason for trial in outcome.trials)
    assert world.killed == len(world.started)


def test_a_data_technique_is_not_credited_with_more_than_the_waiting(world: World) -> None:
    # The candidate's process is faster for a reason of its own; waiting for data is 1 % of the step.
    world.factor["data-only"] = 0.8
    technique = make_technique("data-only", live=False, numerics=Numerics.BITWISE)
    card = msgspec.structs.replace(type(technique).card, targets=("data",))
    type(technique).card = card
    outcome = search(world, technique)
    assert not outcome.kept
    assert "held to" in next(trial.pairing.method for trial in outcome.trials if trial.pairing is not None)


def limited(world: World, **options: Any) -> tuple[str, Autopilot]:
    pilot = Autopilot(
        FakeRunner(world), ChildSpec(mode="arm", target="train.py"), seen(world.step),
        {"good": make_technique("good", gain=1.25)}, Options(**options), say=lambda text: None,
    )  # fmt: skip
    return pilot.limit(10.0), pilot


def test_a_short_training_limits_the_default_budget(world: World) -> None:
    told, pilot = limited(world, steps_planned=int(1000 / world.step))
    assert pilot.options.budget == pytest.approx(90.0)  # half of 200 s, of which the diagnosis took 10
    assert "may gain 3 min 20 s" in told and "--budget" in told
    told, pilot = limited(world, steps_planned=10**9)
    assert (told, pilot.options.budget) == ("", 170.0)
    told, pilot = limited(world)
    assert (told, pilot.options.budget) == ("", 170.0)


def test_a_training_too_short_for_any_search_tries_nothing(world: World) -> None:
    told, pilot = limited(world, steps_planned=int(60 / world.step))
    assert "too little to pay for a search" in told
    outcome = pilot.run()
    assert not outcome.kept and outcome_of(outcome, "good") == "not tried"
    assert "too little to pay" in outcome.verdict


def noisy(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, factor: float) -> Outcome:
    """A search in which single trials are too short for the noise."""
    world = World(folder / str(seed), noise=0.4, factor={"good": factor}, random=random.Random(seed))
    world.folder.mkdir()
    for module in ("upshift.search.duel", "upshift.search.autopilot", "upshift.search.confirm"):
        monkeypatch.setattr(f"{module}.time.monotonic", lambda: world.clock)
    return search(world, make_technique("good", live=False), budget=75.0)


def test_what_no_trial_could_resolve_gets_the_time_that_is_left(tmp_path, monkeypatch) -> None:
    found = [noisy(tmp_path, monkeypatch, seed, 0.8) for seed in range(12)]
    late = [item for item in found if item.kept and item.kept[0].speedup is None]
    assert late and all("not resolved when screened" in item.kept[0].note for item in late)
    assert sum(bool(item.kept) for item in found) > len(late)
    # What does nothing is not kept for having looked good once.
    assert not any(noisy(tmp_path, monkeypatch, 100 + seed, 1.0).kept for seed in range(25))


@pytest.mark.parametrize("live", [True, False])
def test_what_does_not_fit_is_not_kept_and_the_figures_are_said(world: World, live: bool) -> None:
    world.factor |= {"hungry": 0.5, "lean": 0.7}
    world.holds |= {"hungry": 9 * 2**30, "lean": 2**30}
    both = (make_technique("hungry", live=live, gain=2.0), make_technique("lean"))
    assert names(search(world, *both)) == {"hungry", "lean"}
    outcome = search(world, *both, fit=8 * 2**30)
    assert names(outcome) == {"lean"}
    failed = [trial.reason for trial in outcome.trials if trial.outcome == "failed"]
    assert failed == ["needs 9 GiB (measured), --fit allows 8 GiB"]
