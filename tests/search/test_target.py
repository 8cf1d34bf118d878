"""Techniques that change the training: one seed picks, other seeds decide, nothing is kept that only one seed saw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from upshift.errors import UsageError
from upshift.measure.anatomy import anatomy
from upshift.measure.metrics import Metric
from upshift.records import Measurement
from upshift.records.measurement import ScriptFacts
from upshift.records.runlog import RunLog
from upshift.records.verification import Verification
from upshift.search.candidates import CHANGES_TRAINING, candidates
from upshift.search.target import Sought, TargetSearch, Wanted
from upshift.search.verify import Options
from upshift.sites import Card, Numerics, Verdict
from upshift.sites.runner import ChildSpec

#: Seconds of a run, and steps it makes.
LENGTH, STEPS = 40.0, 400


class World:
    """Trainings whose accuracy rises to `end[names]` with a time constant of `pace[names]` seconds; a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = 0.0
        self.pace: dict[str, float] = {"": 10.0}
        self.end: dict[str, float] = {"": 0.99}
        self.luck: dict[tuple[str, int], float] = {}
        self.crash: set[str] = set()
        self.started: list[tuple[str, int]] = []
        self.spent: list[float] = []

    def start(self, spec: ChildSpec, *, name: str = "") -> Any:
        return Child(self, spec)


class Child:
    def __init__(self, world: World, spec: ChildSpec) -> None:
        self.world, self.began, self.seed = world, world.clock, spec.seed or 0
        self.name = "+".join(spec.plan)
        world.started.append((self.name, self.seed))
        self.pid = len(world.started)
        self.record = world.folder / str(len(world.started))
        self.record.mkdir()
        self._lines = 0
        log = RunLog(self.record)
        log.append("start", script="train.py", arguments=[], started="", clock=0.0, pid=1, plan="", techniques={},
                   environment={})  # fmt: skip
        log.append("steps", first=0, n=STEPS, seconds=LENGTH, at=LENGTH)
        log.append("end", code=0, how="", seconds=LENGTH, steps=STEPS)
        log.close()

    def receive(self, timeout: float) -> dict[str, Any] | None:
        world = self.world
        world.clock += timeout
        at = world.clock - self.began
        pace = world.pace.get(self.name, world.pace[""]) / world.luck.get((self.name, self.seed), 1.0)
        end = world.end.get(self.name, world.end[""]) + 0.001 * math.sin(self.seed)
        while self._lines < min(at, LENGTH):
            self._lines += 1
            with open(self.record / "out.txt", "a") as file:
                file.write(f"accuracy {end * (1 - math.exp(-self._lines / pace)):.6f}\n")
        if self.name in world.crash:
            return {"kind": "gone", "code": 1}
        return {"kind": "gone", "code": 0} if at >= LENGTH else None

    def written(self) -> list[Path]:
        return [self.record / "out.txt"]

    def output(self) -> str:
        return "RuntimeError: boom"

    def kill(self) -> None:
        self.world.spent.append(self.world.clock - self.began)


def technique(name: str, *, applies: bool = True, conflicts: tuple[str, ...] = ()) -> Any:
    made = Card(name=name, summary="", source="", sites=("step",), numerics=Numerics.CHANGES_TRAINING,
                switchable="process", targets=("optimizer",), conflicts=conflicts)  # fmt: skip

    class Made:
        card = made

        def numerics(self, settings: Any, facts: Any) -> Numerics:
            return made.numerics

        def check(self, seen: Measurement) -> Verdict:
            return Verdict(applies, "because", candidates=({"steps": seen.facts.steps_total or 0},))

        def at(self, moment: Any, settings: Any) -> None: ...

    return Made()


def measurement() -> Measurement:
    return Measurement(
        script="train.py", arguments=(), created="", anatomy=anatomy([], startup=1.0), facts=ScriptFacts()
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr("upshift.search.verify.time.monotonic", lambda: made.clock)
    return made


def seek(world: World, *techniques: Any, start: Any = None, seeds: int = 3, budget: float | None = None,
         target: float = 0.9) -> Sought:  # fmt: skip
    options = Options(Metric.parse("accuracy:max", target=target), seeds)

    def blank(plan: Any) -> Verification:
        return Verification(
            script="train.py", arguments=(), created="", metric="accuracy", mode="max", techniques=plan,
            fingerprint="", seeds=seeds, margin=0.0, margin_note="", answer="not shown", reason="", target=target,
        )  # fmt: skip

    known = {item.card.name: item for item in techniques}
    wanted = Wanted(options, budget=budget, known=known)
    base = ChildSpec(mode="run", target="train.py")
    return TargetSearch(world, base, measurement(), wanted, blank, lambda text: None, lambda trial: None).run(
        start or {}
    )


def test_one_that_is_sooner_and_as_good_is_kept_after_other_seeds_said_so(world):
    world.pace["quick"] = 5.0
    found = seek(world, technique("quick"))
    assert found.plan == {"quick": {"steps": STEPS}}, "the whole run told how many steps there are"
    assert found.verification is not None and found.verification.answer == "as good"
    sooner = found.verification.target_speedup
    assert sooner is not None and sooner.low is not None and 1.0 < sooner.low <= sooner.mean
    # The seed that picked decides nothing.
    assert world.started[:2] == [("", 0), ("quick", 0)] and {seed for _, seed in world.started[2:]} == {1, 2, 3}
    assert "another training" in found.verdict


def test_a_run_is_ended_when_it_has_missed_or_reached_the_target(world):
    world.pace |= {"quick": 5.0, "quick+slow": 50.0}
    seek(world, technique("quick"), technique("slow"))
    assert world.spent[0] >= LENGTH > 20 > world.spent[1] > 10
    assert world.started[2] == ("quick+slow", 0) and world.spent[2] < 20


def test_luck_of_the_seed_that_picked_is_not_kept(world):
    world.luck["lucky", 0] = 3.0
    found = seek(world, technique("lucky"))
    assert found.plan == {} and found.verification is not None and found.verification.answer == "not shown"
    assert "not sooner at the target beyond the spread" in found.verdict


def test_one_that_ends_worse_is_not_kept_however_soon_it_is_there(world):
    world.pace["fused+hasty"], world.end["fused+hasty"] = 3.0, 0.95
    found = seek(world, technique("fused"), technique("hasty"), start={"fused": {}})
    assert found.plan == {"fused": {}} and "not shown to be as good" in found.verdict and "fused stays" in found.verdict


def test_a_target_that_only_the_plan_reaches(world):
    world.end[""] = 0.89
    world.end["better"] = 0.95
    found = seek(world, technique("better"))
    assert set(found.plan) == {"better"} and found.verification.reached == (0, 3)  # type: ignore[union-attr]
    assert "in 3 runs, the untouched script in 0" in found.verdict


def test_one_run_more_that_reaches_the_target_is_luck(world):
    world.end[""], world.end["better"] = 0.9168, 0.95
    # The sine of the seed decides whether the untouched script ends above or below the target.
    found = seek(world, technique("better"), target=0.9, seeds=4)
    assert found.verification is not None and 0 < found.verification.reached[0] < found.verification.reached[1] == 4
    assert found.plan == {} and "reached in" in found.verdict and "4 planned runs of 4" in found.verdict


def test_two_seeds_cannot_show_a_target_that_only_the_plan_reaches(world):
    world.end[""], world.end["better"] = 0.89, 0.95
    found = seek(world, technique("better"), seeds=2)
    assert found.plan == {} and found.verification.reached == (0, 2)  # type: ignore[union-attr]


def test_what_crashes_conflicts_or_does_nothing_says_so(world):
    world.pace["quick"] = 5.0
    world.crash.add("quick+broken")
    found = seek(world, technique("quick"), technique("broken"), technique("other", conflicts=("quick",)),
                 technique("idle"), technique("alien", applies=False))  # fmt: skip
    told = {trial.name.partition("(")[0]: (trial.outcome, trial.reason) for trial in found.trials}
    assert told["broken"][0] == "failed" and "boom" in told["broken"][1]
    assert told["other"] == ("not tried", "conflicts with quick, which is sooner")
    assert told["idle"][0] in ("no change", "slower")
    assert told["alien"] == ("not applicable", "because")
    assert set(found.plan) == {"quick"}


def test_a_budget_that_cannot_hold_the_runs_that_decide_is_refused_with_the_figures(world):
    with pytest.raises(UsageError, match="3 seeds of both arms do not fit"):
        seek(world, technique("quick"), budget=100.0)


def test_nothing_that_applies_costs_one_run(world):
    found = seek(world, technique("alien", applies=False))
    assert len(world.started) == 1 and found.plan == {} and found.verification is None


def test_a_search_by_step_time_refuses_them():
    found, refused = candidates([technique("quick")], measurement())
    assert not found and refused[0].reason == CHANGES_TRAINING
