"""Faster by the look of it: clocks that lie, gains that fade, and arms that are slowed down."""

from __future__ import annotations

import math
import random
from typing import Any

import arms  # noqa: F401  (finds the simulated world)
import fake_runner
import pytest
from fake_runner import FakeChild, World
from test_autopilot import make_technique, names, outcome_of, search, world  # noqa: F401

from upshift.measure.paired import Sequential, estimate, pairing, quad_log_ratios
from upshift.measure.steps import StepRecord, training_seconds
from upshift.records import Pairing
from upshift.search.duel import Arm, Turns, seen_outside
from upshift.search.screening import with_epochs
from upshift.sites import Numerics


def cheats(monkeypatch: pytest.MonkeyPatch, child: type[FakeChild]) -> None:
    """All processes of the search are of this kind; they cheat where the plan has `cheat`."""
    monkeypatch.setattr(fake_runner, "FakeChild", child)


class Screened(FakeChild):
    """Wherever `cheat` can be switched off, its absence costs time: what alternates in one process looks faster."""

    def _compare(self, message: dict[str, Any]) -> dict[str, Any]:
        usual = self.world.factor.get("cheat", 1.0)
        self.world.factor["cheat"] = 0.6
        found = super()._compare(message)
        self.world.factor["cheat"] = usual
        return found


class Clock(Screened):
    """Tells half the seconds its steps take."""

    def _steps(self, n: int) -> dict[str, Any]:
        told = super()._steps(n)
        if "cheat" in self.plan:
            told["seconds"] = [value / 2 for value in told["seconds"]]
        return told


class Deferred(Screened):
    """Does half its work where nobody looks: in what counts as evaluation, or behind the end of a step."""

    def _steps(self, n: int) -> dict[str, Any]:
        told = super()._steps(n)
        if "cheat" in self.plan:
            told["seconds"] = [value * 0.6 for value in told["seconds"]]
            self.world.clock += 0.01 * n
        return told


class Fading(Screened):
    """Fast in its first 60 steps."""

    def _steps(self, n: int) -> dict[str, Any]:
        self.world.factor["cheat"] = 0.5 if self.steps < 60 else 1.0
        return super()._steps(n)


class Leaking(FakeChild):
    """`cheat` is fast by a flag that stays when it is switched off: the reference is as fast."""

    def _compare(self, message: dict[str, Any]) -> dict[str, Any]:
        if "cheat" not in self.plan:
            return super()._compare(message)
        both = {**message, "a": [*message["a"], "cheat"], "b": [*message["b"], "cheat"]}
        return super()._compare({**both, "a": sorted(set(both["a"])), "b": sorted(set(both["b"]))})


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("child", [Screened, Clock, Deferred, Fading])
def test_a_gain_that_is_none_is_not_confirmed(
    world: World, monkeypatch: pytest.MonkeyPatch, child: type[FakeChild], live: bool  # noqa: F811
) -> None:  # fmt: skip
    cheats(monkeypatch, child)
    outcome = search(world, make_technique("cheat", live=live, numerics=Numerics.BITWISE))
    assert not outcome.kept and "Keep your baseline" in outcome.verdict, outcome.verdict
    if live:
        assert outcome_of(outcome, "cheat") == "faster" and "not confirmed" in outcome.verdict


def test_a_clock_that_flatters_a_true_gain_is_held_to_the_clock_outside(
    world: World, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    world.factor["cheat"] = 0.5
    cheats(monkeypatch, Clock)
    outcome = search(world, make_technique("cheat", numerics=Numerics.BITWISE))
    found = outcome.confirmation.pairing  # type: ignore[union-attr]
    assert found is not None and found.ratio < 2.1 and "clock outside" in found.method


def test_a_flag_that_stays_behind_shows_no_gain(world: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    world.factor["cheat"] = 0.5
    cheats(monkeypatch, Leaking)
    outcome = search(world, make_technique("cheat", numerics=Numerics.BITWISE))
    assert not outcome.kept and outcome_of(outcome, "cheat") == "no change"


def test_many_that_do_nothing_are_not_kept_for_the_luck_of_one(world: World) -> None:  # noqa: F811
    world.noise = 0.2
    outcome = search(world, *(make_technique(f"idle{i}", live=bool(i % 2)) for i in range(20)), budget=600.0)
    assert not names(outcome)


def test_a_stall_that_a_robust_mean_would_trim_away_is_charged() -> None:
    """Five per cent faster, and a pause of twenty steps in every tenth quad."""
    rng = random.Random(3)
    quads = [rng.gauss(0.05, 0.01) if i % 10 else -math.log(6.0) for i in range(120)]
    assert pairing(quads).low < 1.0


def test_leaving_out_evaluation_and_checkpoints_is_no_faster_step() -> None:
    def step(evaluation: float, checkpoint: float) -> StepRecord:
        total = 0.1 + evaluation + checkpoint
        return StepRecord(5, 1.0, total, 0.0, 0.0, 0.03, 0.0, 0.05, 0.02, 0.0, evaluation, int(evaluation > 0),
                          checkpoint, 1, 0, 1, (1.0,))  # fmt: skip

    whole = training_seconds(step(0.5, 0.3))
    assert whole == pytest.approx(training_seconds(step(0.0, 0.0))) == pytest.approx(0.1)


@pytest.mark.parametrize("follows", [0.8, 1.25])
def test_what_depends_on_the_order_of_the_arms_cancels(follows: float) -> None:
    """A block is faster, or slower, where it follows one of the other arm; and one after another is faster still."""
    rng = random.Random(4)
    test, last, blocks = Sequential(60.0), "", []
    for _ in range(150):
        for arm in "ABBA" if rng.random() < 0.5 else "BAAB":
            blocks.append((arm, 0.1 * (follows if arm != last else 1.0) * math.exp(rng.gauss(0, 0.02))))
            last = arm
    for number, value in enumerate(quad_log_ratios(blocks)):
        test.add(value, number * 0.4)
    assert test.finish() == "no change"


def test_the_first_of_two_is_no_slower() -> None:
    """Whoever runs first in a quad is slow: with the order drawn at random that is noise, not gain."""
    rng = random.Random(5)
    blocks = []
    for _ in range(150):
        for place, arm in enumerate("ABBA" if rng.random() < 0.5 else "BAAB"):
            blocks.append((arm, 0.1 * (1.3 if place == 0 else 1.0) * math.exp(rng.gauss(0, 0.01))))
    assert pairing(quad_log_ratios(blocks)).low < 1.01


@pytest.mark.parametrize("until", [0.3, 0.5, 0.7])
def test_a_gain_that_fades_counts_as_what_is_left_of_it(until: float) -> None:
    rng = random.Random(6)
    quads = [rng.gauss(0.4 if i < until * 160 else 0.0, 0.02) for i in range(160)]
    found = pairing(quads)
    assert found.low < 1.01 and "fades" in found.method


def test_a_steady_gain_is_not_said_to_fade() -> None:
    rng = random.Random(7)
    fades = sum("fades" in estimate([rng.gauss(0.05, 0.03) for _ in range(60)]).method for _ in range(300))
    assert fades <= 3


def test_the_clock_outside() -> None:
    rng = random.Random(8)
    claim = pairing([rng.gauss(0.22, 0.01) for _ in range(40)])

    def held(outside: float, evaluation: float = 0.0, quads: int = 40) -> float:
        turns = [
            Turns(0.1 + rng.gauss(0, 0.002), 0.02 + rng.gauss(0, 0.001),
                  outside + rng.gauss(0, 0.002) + evaluation * rng.gauss(0, 1) * (rng.random() < 0.3))
            for _ in range(quads)
        ]  # fmt: skip
        return seen_outside(claim, turns).ratio

    assert held(0.02) == held(0.02, evaluation=0.5) == claim.ratio
    assert held(0.01) == pytest.approx(0.1 / 0.09, rel=0.02)
    assert held(0.0) == pytest.approx(1.0, rel=0.02)
    assert held(-0.1, quads=4) < 0.6


def test_what_starting_an_epoch_costs_is_charged_to_its_steps() -> None:
    a, b = Arm(0, None, {}), Arm(1, None, {})  # type: ignore[arg-type]
    for step in range(30):
        a.data[step], b.data[step] = 0.001, 0.5 if step % 10 == 0 else 0.001
    a.epoch_starts = [(step, 0.001) for step in (0, 10, 20)]
    b.epoch_starts = [(step, 0.5) for step in (0, 10, 20)]
    claim = Pairing(ratio=1.2, low=1.15, high=1.25, quads=30, reference_step=0.1, candidate_step=0.083)
    assert with_epochs(claim, a, b, steps_per_epoch=10.0).low < 1.0
