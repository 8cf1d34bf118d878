"""Techniques that lie about themselves, in the simulated search: what is not shown is not kept."""

from __future__ import annotations

from typing import Any

import arms  # noqa: F401  (finds the simulated world)
import fake_runner
import msgspec
import pytest
from fake_runner import FakeChild, World
from test_autopilot import make_technique, outcome_of, search, seen, world  # noqa: F401

from upshift.records import LoaderFacts
from upshift.search.candidates import CHANGES_TRAINING
from upshift.sites import Numerics


@pytest.fixture
def fast(world: World) -> World:  # noqa: F811
    """A world in which `cheat` makes steps twice as fast."""
    world.factor["cheat"] = 0.5
    return world


def plans(child: FakeChild) -> bool:
    return "cheat" in child.plan


class Late(FakeChild):
    """Raises at step 30."""

    def _steps(self, n: int) -> dict[str, Any]:
        if plans(self) and self.steps + n > 30:
            self.queue.append({"kind": "failed", "techniques": ["cheat"], "text": "RuntimeError: late"})
        return super()._steps(n)


class Hanging(FakeChild):
    """Never ends its step 30."""

    def receive(self, timeout: float) -> dict[str, Any] | None:
        return None if plans(self) and self.steps > 30 else super().receive(timeout)


class Refuted(FakeChild):
    """Finds out itself, after a while, that what it rests on does not hold."""

    def _steps(self, n: int) -> dict[str, Any]:
        told = super()._steps(n)
        if plans(self) and self.steps > 30:
            told["problems"] = {"cheat": "a sample has changed"}
        return told


class ShortEpochs(FakeChild):
    """Leaves out the last batch of each epoch."""

    def _steps(self, n: int) -> dict[str, Any]:
        first = self.steps
        told = super()._steps(n)
        epoch = 9 if plans(self) else 10
        told["epochs"] = [int(step % epoch == 0) for step in range(first, first + n)]
        return told


class FewerPasses(FakeChild):
    """Makes three of four backward passes, from step 15 on."""

    def _steps(self, n: int) -> dict[str, Any]:
        first = self.steps
        told = super()._steps(n)
        told["backwards"] = [3 if plans(self) and step >= 15 else 4 for step in range(first, first + n)]
        return told


class Hidden(FakeChild):
    """Shows no loss from step 15 on."""

    def _steps(self, n: int) -> dict[str, Any]:
        first = self.steps
        told = super()._steps(n)
        if plans(self):
            told["losses"] = [loss if first + i < 15 else [] for i, loss in enumerate(told["losses"])]
        return told


class Skipping(FakeChild):
    """Skips every eighth update, after those that are compared."""

    def _steps(self, n: int) -> dict[str, Any]:
        first = self.steps
        told = super()._steps(n)
        if plans(self):
            made = [step - max(step - 12, 0) // 8 for step in range(first, first + n)]
            told["losses"] = [
                [loss[0] + self.world.loss(less, ()) - self.world.loss(step, ())] if less != step else loss
                for step, less, loss in zip(range(first, first + n), made, told["losses"], strict=True)
            ]
        return told


KINDS = {
    Late: "late",
    Hanging: "hangs",
    Refuted: "a sample has changed",
    ShortEpochs: "an epoch starts at step 10 in one run only",
    FewerPasses: "3 losses at backward calls",
    Hidden: "no loss was seen",
    Skipping: "more steps",
}


@pytest.mark.parametrize("live", [True, False], ids=["live", "process"])
@pytest.mark.parametrize("child", KINDS, ids=lambda child: child.__name__)
def test_a_fast_technique_that_cheats_is_not_kept_and_the_reason_is_named(
    fast: World, monkeypatch: pytest.MonkeyPatch, child: type[FakeChild], live: bool
) -> None:
    monkeypatch.setattr(fake_runner, "FakeChild", child)
    outcome = search(fast, make_technique("cheat", live=live))
    assert not outcome.kept
    reasons = "; ".join(trial.reason for trial in outcome.trials)
    assert KINDS[child] in reasons + outcome.verdict, (reasons, outcome.verdict)
    assert fast.killed == len(fast.started)


@pytest.mark.parametrize("numerics", list(Numerics))
def test_an_update_that_is_larger_is_not_kept_whatever_the_card_says(fast: World, numerics: Numerics) -> None:
    fast.scale["cheat"] = 1.05
    assert not search(fast, make_technique("cheat", numerics=numerics)).kept


def test_another_training_is_never_kept_on_speed(fast: World) -> None:
    cheat = make_technique("cheat", numerics=Numerics.CHANGES_TRAINING)
    outcome = search(fast, cheat)
    assert not outcome.kept and outcome.rejected[0].reason == CHANGES_TRAINING
    # The card claims rounding, the settings tell otherwise.
    cheat.card = msgspec.structs.replace(cheat.card, numerics=Numerics.ROUNDING)
    cheat.numerics = lambda settings, facts: Numerics.CHANGES_TRAINING
    outcome = search(fast, cheat)
    assert not outcome.kept and "only a metric" in outcome.verdict


def test_rounding_that_claims_the_same_bits_is_not_kept(fast: World) -> None:
    fast.rounding["cheat"] = 1e-7
    outcome = search(fast, make_technique("cheat", live=False, numerics=Numerics.BITWISE))
    assert not outcome.kept and "not shown" in outcome.verdict


def test_a_technique_without_effect_does_not_ride_on_a_lucky_process(fast: World) -> None:
    fast.no_effect.add("cheat")
    outcome = search(fast, make_technique("cheat", live=False, numerics=Numerics.BITWISE))
    assert not outcome.kept and outcome_of(outcome, "cheat") == "no change"


def test_workers_that_cost_more_at_each_epoch_than_they_save_are_not_kept(fast: World) -> None:
    fast.factor["cheat"], fast.epoch_cost["cheat"], fast.steps_per_epoch = 0.8, 0.6, 10
    loader = LoaderFacts(
        name="DataLoader", dataset="D", training=True, workers=0, batch_size=1, samples=10, iterable=False
    )
    assert not search(fast, make_technique("cheat", live=False), measurement=seen(loaders=(loader,))).kept


def test_a_script_whose_second_start_is_another_one_proves_nothing(fast: World) -> None:
    """It notices that it is measured, and begins elsewhere."""
    fast.other_start = True
    outcome = search(fast, make_technique("cheat"))
    assert not outcome.kept and "same parameters" in outcome.verdict


def test_a_script_that_ends_before_it_is_timed_is_no_win(fast: World) -> None:
    fast.length = 16
    outcome = search(fast, make_technique("cheat", live=False))
    assert not outcome.kept and "too few to time it" in outcome.trials[-1].reason
