"""Under a limit of memory that the script exceeds: the fastest plan that fits, in a world whose truth is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_runner import FakeChild, FakeRunner, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_techniques import make_technique

from upshift.measure.anatomy import anatomy
from upshift.measure.steps import StepRecord
from upshift.records import Measurement, ScriptFacts
from upshift.search.autopilot import Autopilot, Options
from upshift.search.candidates import Candidate
from upshift.search.concluding import Outcome
from upshift.search.duel import Duel
from upshift.search.fitting import Fitting, out_of_memory
from upshift.sites import Numerics
from upshift.sites.runner import ChildSpec

GIB = 2**30
OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


class Room(World):
    """Arms hold what their plans need; those that need more than there is die as torch does."""

    base: int = 12 * GIB
    there_is: int = 1000 * GIB
    saves: ClassVar[dict[str, int]] = {}

    def held(self, names: tuple[str, ...]) -> int:
        return self.base - sum(self.saves.get(name, 0) for name in names)


class Child(FakeChild):
    """Tells what it holds."""

    world: Room

    def __init__(self, world: Room, spec: ChildSpec, name: str) -> None:
        super().__init__(world, spec, name)
        if world.held(tuple(self.plan)) > world.there_is:
            self.queue.pop()  # it never came to its first step
            self.queue.append({"kind": "ended", "how": OOM, "code": 1, "steps": 0})

    def _steps(self, n: int) -> dict[str, Any]:
        return {**super()._steps(n), "resident": self.world.held(tuple(self.plan))}


class Runner(FakeRunner):
    """Starts them."""

    def start(self, spec: ChildSpec, *, name: str = "") -> FakeChild:
        self.world.started.append(spec)
        return Child(self.world, spec, name)  # type: ignore[arg-type]


def technique(name: str, *, saves: bool = True, live: bool = False, numerics: Numerics = Numerics.BITWISE,
              gain: float | None = None, conflicts: tuple[str, ...] = ()) -> Any:  # fmt: skip
    return make_technique(name, live=live, numerics=numerics, gain=gain, saves=saves, conflicts=conflicts)


@pytest.fixture
def make_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Room]:
    current: list[Room] = []
    for module in ("duel", "autopilot", "confirm", "fitting"):
        monkeypatch.setattr(f"upshift.search.{module}.time.monotonic", lambda: current[-1].clock)

    def made() -> Room:
        world = Room(Path(tmp_path_factory.mktemp("world")))
        world.memory = (1, 10**15)
        current.append(world)
        return world

    return made


@pytest.fixture
def world(make_world: Callable[[], Room]) -> Room:
    return make_world()


def search(world: Room, *techniques: Any, fit: int | None = 8 * GIB, budget: float = 600.0, **options: Any) -> Outcome:
    step = world.step
    records = [
        StepRecord(i, i * step, step, 0.0, 0.0, step / 3, 0.0, step / 3, step / 3, 0.0, 0.0, 0, 0.0, 1, 0, 1, (1.0,))
        for i in range(30)
    ]
    seen = Measurement(
        script="train.py", arguments=(), created="", anatomy=anatomy(records, startup=1.0),
        facts=ScriptFacts(loss_seen=True, losses=(1.0,)),
    )  # fmt: skip
    pilot = Autopilot(
        Runner(world), ChildSpec(mode="arm", target="train.py"), seen, {item.card.name: item for item in techniques},
        Options(budget=budget, fit=fit, **options), say=lambda text: None,
    )  # fmt: skip
    return pilot.run()


def names(outcome: Outcome) -> set[str]:
    return {item.name for item in outcome.kept}


def test_of_plans_that_fit_the_fastest_is_kept_though_it_is_slower_than_the_script(world: Room) -> None:
    world.saves = {"slow": 8 * GIB, "quick": 5 * GIB, "small": GIB}  # type: ignore[misc]
    world.factor |= {"slow": 2.0, "quick": 1.3, "small": 1.01}
    outcome = search(world, *map(technique, ("slow", "quick", "small")))
    assert names(outcome) == {"quick"}
    fitted, confirmation = outcome.fitted, outcome.confirmation
    assert fitted is not None and (fitted.limit, fitted.held, fitted.script) == (8 * GIB, 7 * GIB, 12 * GIB)
    assert fitted.fits and not fitted.against
    assert confirmation is not None and confirmation.proof.rung == "bitwise" and confirmation.pairing is not None
    assert confirmation.pairing.low < 1 / 1.3 < confirmation.pairing.high
    assert outcome.verdict.startswith("quick: fits in 8 GiB (measured peak 7 GiB), 1.3")
    assert "slower than the untouched script, which needs 12 GiB" in outcome.verdict
    assert next(item.note for item in outcome.kept) == "without it the plan does not fit"


def test_what_no_technique_does_alone_two_do_together_by_the_cheapest_way(world: Room) -> None:
    world.saves = {"a": 3 * GIB, "b": 3 * GIB, "c": 2 * GIB}  # type: ignore[misc]
    world.factor |= {"a": 1.5, "b": 1.1, "c": 1.05}
    assert names(search(world, *map(technique, "abc"))) == {"b", "c"}


def test_conflicting_techniques_are_not_combined(world: Room) -> None:
    world.saves = {"a": 3 * GIB, "b": 3 * GIB, "c": 2 * GIB}  # type: ignore[misc]
    world.factor |= {"a": 1.5, "b": 1.1, "c": 1.05}
    found = search(world, technique("a"), technique("b", conflicts=("c",)), technique("c"))
    assert names(found) == {"a", "c"}  # 12 - 5 GiB, and a + b would be slower
    assert not any(set(spec.plan) >= {"b", "c"} for spec in world.started)


@pytest.mark.parametrize("live", [True, False])
def test_what_makes_the_plan_that_fits_faster_joins_it_if_it_still_fits(world: Room, live: bool) -> None:
    world.saves = {"lean": 5 * GIB, "hungry": -2 * GIB}  # type: ignore[misc]
    world.factor |= {"lean": 1.5, "fast": 0.7, "hungry": 0.5}
    rest = [technique(name, saves=False, live=live, gain=2.0) for name in ("hungry", "fast")]
    outcome = search(world, technique("lean"), *rest, budget=3000.0)
    assert names(outcome) == {"lean", "fast"}
    assert outcome.fitted is not None and outcome.fitted.held == 7 * GIB
    assert "needs 9 GiB (measured)" in next(item.reason for item in outcome.rejected if item.name == "hungry")


def test_nothing_that_fits_is_said_with_the_least_there_is(world: Room) -> None:
    world.saves = {"a": 1 * GIB, "b": 2 * GIB}  # type: ignore[misc]
    outcome = search(world, *map(technique, "ab"))
    assert not outcome.kept and outcome.fitted is not None and not outcome.fitted.fits
    assert outcome.verdict == (
        "Nothing fits in 8 GiB: the least was 9 GiB with a + b (measured peak); the untouched script needs 12 GiB."
    )


def test_a_budget_that_runs_out_before_anything_fits_is_kept_and_said(world: Room) -> None:
    """The last time goes into what promises most together; every further plan is left for a larger budget."""
    world.saves = dict.fromkeys("abcdefgh", GIB)  # type: ignore[misc]
    every = list(map(technique, "abcdefgh"))
    whole = search(world, *every, budget=3000.0)
    took, before = whole.seconds, len(world.started)
    hurried = search(world, *every, budget=took / 2)
    assert hurried.seconds <= took / 2 and hurried.fitted is not None and not hurried.fitted.fits
    assert len(world.started[-1].plan) > 1 and len(world.started) > before
    untried = [item for item in hurried.trials if item.outcome == "not tried"]
    assert hurried.fitted.untried == len(untried) > 0
    assert f"The budget had no time for {len(untried)} plans: a larger --budget tries more." in hurried.verdict


def test_a_script_that_fits_is_sped_up_as_ever(world: Room) -> None:
    world.saves = {"lean": 5 * GIB}  # type: ignore[misc]
    world.factor |= {"lean": 1.5, "fast": 0.7}
    both = (technique("lean"), technique("fast", saves=False, gain=2.0))
    outcome = search(world, *both, fit=16 * GIB)
    assert names(outcome) == {"fast"} and outcome.fitted is None


def test_a_plan_that_fits_and_harms_is_not_kept(world: Room) -> None:
    world.saves = {"liar": 5 * GIB}  # type: ignore[misc]
    world.rounding["liar"] = 1e-6  # and says that it changes no bit
    outcome = search(world, technique("liar"))
    assert not outcome.kept and outcome.fitted is not None and outcome.fitted.fits
    assert "fits in 8 GiB" in outcome.verdict and "not shown to be as good: the updates of step 1" in outcome.verdict


def test_the_next_one_that_fits_is_taken_where_the_first_harms(world: Room) -> None:
    world.saves = {"liar": 5 * GIB, "honest": 6 * GIB}  # type: ignore[misc]
    world.rounding["liar"] = 1e-6
    world.factor |= {"liar": 1.1, "honest": 1.6}
    outcome = search(world, technique("liar"), technique("honest"))
    assert names(outcome) == {"honest"} and "measured peak 6 GiB" in outcome.verdict


# -- a device on which the script itself dies --------------------------------------------------------------------------


def test_where_the_script_dies_another_plan_stands_for_it_and_the_speed_up_is_unknown(world: Room) -> None:
    world.there_is = 8 * GIB
    world.saves = {"a": 5 * GIB, "b": 6 * GIB}  # type: ignore[misc]
    world.factor |= {"a": 1.2, "b": 1.6}
    outcome = search(world, technique("a"), technique("b"))
    assert names(outcome) == {"a"}
    fitted, confirmation = outcome.fitted, outcome.confirmation
    assert fitted is not None and fitted.script is None and fitted.held == 7 * GIB and fitted.against == "b"
    assert confirmation is not None and confirmation.proof.rung == "bitwise"
    assert "compared with b, since the untouched script runs out of memory here" in confirmation.proof.weaker
    assert "how much slower than the untouched script, which runs out of memory here, is unknown" in outcome.verdict


def test_a_plan_without_anything_to_compare_it_with_says_so(world: Room) -> None:
    world.there_is = 8 * GIB
    world.saves = {"a": 5 * GIB}  # type: ignore[misc]
    exact = search(world, technique("a"))
    assert names(exact) == {"a"} and exact.confirmation is not None
    assert exact.confirmation.proof.rung == "none" and not exact.confirmation.proof.passed
    assert "no other plan fits that it could be compared with" in exact.verdict and "--require none" in exact.verdict
    rounds = search(world, technique("a", numerics=Numerics.ROUNDING))
    assert not rounds.kept and "is not kept" in rounds.verdict


def test_what_dies_alone_may_live_together(world: Room) -> None:
    world.there_is = 8 * GIB
    world.saves = {"a": 3 * GIB, "b": 3 * GIB}  # type: ignore[misc]
    outcome = search(world, technique("a"), technique("b"))
    assert names(outcome) == {"a", "b"} and outcome.fitted is not None and outcome.fitted.held == 6 * GIB


def test_where_everything_dies_that_is_said(world: Room) -> None:
    world.there_is = GIB
    world.saves = {"a": 3 * GIB}  # type: ignore[misc]
    outcome = search(world, technique("a"))
    assert not outcome.kept and outcome.verdict == (
        "Nothing fits in 8 GiB: the untouched script runs out of memory here, and so does every plan tried."
    )


def test_a_script_that_dies_of_something_else_is_not_called_too_large(world: Room) -> None:
    world.saves = {"a": 8 * GIB}  # type: ignore[misc]
    world.length = 0  # it ends before a step can be made
    outcome = search(world, technique("a"))
    assert not outcome.kept and "Nothing fits" not in outcome.verdict


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        (OOM, True),
        ("the script ended: MemoryError", True),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory", True),
        ("killed by signal 9", True),
        ("killed (out of memory?)", True),
        ("train.py died without a word (exit code -9).", True),
        ("OSError: [Errno 12] Cannot allocate memory", True),
        ("ValueError: batch must be positive", False),
        ("killed by signal 11", False),
        ("", False),
    ],
)
def test_words_that_say_that_memory_ran_out(text: str, memory: bool) -> None:
    assert out_of_memory(text) is memory


# -- against every combination there is --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1.05, 1.2, 1.5, 2.0])), min_size=1, max_size=3),
    st.integers(5, 11),
)
def test_what_is_found_is_the_best_of_all_combinations(
    make_world: Callable[[], Room], made: list[tuple[int, float]], limit: int
) -> None:
    world = make_world()
    world.noise, world.drift = 0.001, 0.0
    every = {f"t{i}": item for i, item in enumerate(made)}
    world.saves = {name: saved * GIB for name, (saved, _) in every.items()}  # type: ignore[misc]
    world.factor |= {name: cost for name, (_, cost) in every.items()}
    techniques = {name: technique(name) for name in every}
    trials: list[Any] = []
    fit = Fitting(
        lambda: Duel(Runner(world), ChildSpec(mode="arm", target="train.py")), limit * GIB, techniques, world.step,
        say=lambda text: None, add=trials.append, time_for=lambda seconds, confirms: True,
    ).search([Candidate(name, {}, False, 1.0, "") for name in every])  # fmt: skip
    plans = [plan for n in range(1, len(every) + 1) for plan in itertools.combinations(every, n)]
    fits = [plan for plan in plans if 12 - sum(every[name][0] for name in plan) <= limit]
    assert fit.stock.held == 12 * GIB and fit.least is not None
    assert bool(fit.fits) == bool(fits)
    assert all((probe.held or 0) <= limit * GIB for probe in fit.fits)

    def cost(plan: Any) -> float:
        return math.prod(every[name][1] for name in plan)

    if fits:
        # Costs of combinations are predicted by adding them up: what is found may be a little worse than the best.
        assert cost(fit.fits[0].plan) <= min(map(cost, fits)) * 1.25
    else:
        assert fit.least.held == min(12 - sum(every[name][0] for name in plan) for plan in [(), *plans]) * GIB
