"""Energy to a target: the frugal plan is kept, however slow; nothing estimated is called measured or faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_target import LENGTH, World, measurement, technique

from upshift.api.objective import Objective, joined
from upshift.api.target import Target
from upshift.errors import EnvironmentError_
from upshift.measure.metrics import Metric
from upshift.records import TuneReport
from upshift.records.plan import Fingerprint, Kept, Plan
from upshift.records.trial import Proof
from upshift.records.verification import Verification
from upshift.search.target import Sought, TargetSearch, Wanted
from upshift.search.verify import Options
from upshift.sites.runner import ChildSpec


class Power:
    """A meter for the trainings of a `World`: watts by the names of what is on."""

    def __init__(self, world: World, basis: str) -> None:
        self.world, self.basis, self.how = world, basis, "read from a made-up world"
        self.watts: dict[str, float | None] = {"": 100.0}

    def begin(self, pid: int) -> Callable[[], float | None]:
        began, (name, _) = self.world.clock, self.world.started[pid - 1]
        watts = self.watts.get(name, self.watts[""])
        return lambda: None if watts is None else watts * (self.world.clock - began)


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Power:
    world = World(tmp_path)
    monkeypatch.setattr("upshift.search.verify.time.monotonic", lambda: world.clock)
    return Power(world, "estimated")


def seek(power: Power, *techniques: Any, start: Any = None, seeds: int = 3, target: float = 0.9) -> Sought:
    meter: Any = power
    options = Options(Metric.parse("accuracy:max", target=target), seeds, meter=meter)

    def blank(plan: Any) -> Verification:
        return Verification(
            script="train.py", arguments=(), created="", metric="accuracy", mode="max", techniques=plan,
            fingerprint="", seeds=seeds, margin=0.0, margin_note="", answer="not shown", reason="", target=target,
        )  # fmt: skip

    wanted = Wanted(options, known={item.card.name: item for item in techniques})
    base = ChildSpec(mode="run", target="train.py")
    told: list[str] = []
    search = TargetSearch(power.world, base, measurement(), wanted, blank, told.append, lambda trial: None)
    found = search.run(start or {})
    # What is said on the way and in the end is about energy, and never claims more than there is.
    for text in (*told, found.verdict, *(trial.reason for trial in found.trials)):
        assert "faster" not in text and "sooner" not in text, text
        assert power.basis == "measured" or "measured" not in text, text
    return found


def test_one_that_needs_less_is_kept_although_it_is_slower(power):
    power.world.pace["frugal"] = 10.5
    power.watts["frugal"] = 50.0
    found = seek(power, technique("frugal"))
    assert set(found.plan) == {"frugal"} and found.verification is not None
    energy, slower = found.verification.energy, found.verification.target_speedup
    assert energy is not None and energy.basis == "estimated" and energy.n == 3
    assert 1.0 < energy.low <= energy.mean == pytest.approx(2 * 10 / 10.5, rel=0.05)
    assert energy.stock > energy.plan > 0 and energy.how == power.how
    assert slower is not None and slower.mean is not None and slower.mean < 1.0
    assert "less energy (estimated) to the target" in found.verdict
    assert [trial.outcome for trial in found.trials] == ["less energy"]
    assert {seed for _, seed in power.world.started[2:]} == {1, 2, 3}, "the seed that picked decides nothing"


def test_one_that_is_faster_and_needs_more_is_not_kept_and_ended_early(power):
    power.world.pace["hungry"] = 8.0
    power.watts["hungry"] = 300.0
    found = seek(power, technique("hungry"))
    assert found.plan == {} and found.verification is None and len(power.world.started) == 2
    assert [trial.outcome for trial in found.trials] == ["more energy"]
    assert power.world.spent[1] < power.world.spent[0] / 2
    assert "needed less energy (estimated) to accuracy 0.9" in found.verdict


def test_a_measured_energy_says_so(power):
    power.basis, power.watts["frugal"] = "measured", 50.0
    found = seek(power, technique("frugal"))
    assert "less energy (measured) to the target" in found.verdict and "estimated" not in found.verdict


def test_luck_of_the_seed_that_picked_is_not_kept(power):
    power.world.luck["lucky", 0] = 3.0
    found = seek(power, technique("lucky"))
    assert found.plan == {} and "not less energy (estimated) to the target beyond the spread" in found.verdict


def test_one_that_ends_worse_is_not_kept_however_little_it_needs(power):
    power.watts["dull"], power.world.end["dull"] = 10.0, 0.95
    found = seek(power, technique("dull"))
    assert found.plan == {} and "not shown to be as good" in found.verdict


def test_a_plan_found_by_step_time_is_kept_only_where_it_needs_less(power):
    power.watts["threads"] = 50.0
    found = seek(power, start={"threads": {"count": 2}})
    assert found.plan == {"threads": {"count": 2}} and found.verification is not None
    assert "less energy (estimated)" in found.verdict and "another training" not in found.verdict
    assert {seed for _, seed in power.world.started[2:]} == {1, 2, 3}


def test_a_plan_found_by_step_time_that_needs_more_is_dropped_before_others_are_tried(power):
    power.watts |= {"threads": 200.0, "frugal": 50.0}
    found = seek(power, technique("frugal"), start={"threads": {"count": 8}})
    assert set(found.plan) == {"frugal"}
    assert (found.trials[0].name, found.trials[0].outcome) == ("threads", "more energy")


def test_a_plan_found_by_step_time_falls_with_what_was_not_shown_on_top_of_it(power):
    power.watts |= {"threads": 90.0, "threads+dull": 45.0}
    power.world.end["threads+dull"] = 0.95
    found = seek(power, technique("threads"), technique("dull"), start={"threads": {"count": 2}})
    assert found.plan == {} and "stays" not in found.verdict


def test_a_target_that_only_the_plan_reaches(power):
    power.world.end |= {"": 0.89, "better": 0.95}
    found = seek(power, technique("better"))
    assert set(found.plan) == {"better"} and found.verification is not None
    assert found.verification.energy is not None and found.verification.energy.mean is None


def test_joules_that_are_not_known_decide_nothing(power):
    power.watts[""] = None
    with pytest.raises(EnvironmentError_, match="could not be read") as refused:
        seek(power, technique("frugal"))
    assert "time-to-target" in refused.value.remedy
    assert power.world.spent[0] >= LENGTH


def test_joules_that_get_lost_while_others_decide_show_nothing(power):
    power.watts["frugal"] = 50.0
    lost = power.begin

    def begin(pid: int) -> Callable[[], float | None]:
        return (lambda: None) if power.world.started[pid - 1] == ("frugal", 2) else lost(pid)

    power.begin = begin  # type: ignore[method-assign]
    found = seek(power, technique("frugal"))
    assert found.plan == {} and "what the runs spent is not known" in found.verdict


# -- report and plan ---------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Target, TuneReport, Plan]:
    """What a search by step time left: a plan of `fused`."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("pass\n")
    proof = Proof(rung="trajectory", passed=True, reason="as stock", steps=100)
    plan = Plan(
        script="train.py", arguments=(), created="", device="cpu", verdict="fused: 1.50x faster steps", speedup=1.5,
        low=1.4, high=1.6, pairs=9, proof=proof, kept=(Kept("fused", {"kind": "fused"}),),
        fingerprint=Fingerprint("", "", "", "cpu", ""),
    )  # fmt: skip
    report = TuneReport(
        script="train.py", arguments=(), created="", measurement=measurement(), findings=(), trials=(),
        verdict=plan.verdict, plan_file="", kept=("fused",), seconds=1.0, budget=1.0, proof=proof,
    )  # fmt: skip
    return Target("train.py"), report, plan


def of_energy(searched: tuple[Target, TuneReport, Plan], sought: Sought, power: Power) -> tuple[TuneReport, Plan]:
    meter: Any = power
    return joined(*searched, sought, Objective("energy", "accuracy:max", target=0.9), meter)


def test_a_plan_that_was_not_shown_to_need_less_leaves_the_untouched_script(power, searched):
    power.watts["fused"] = 200.0
    report, plan = of_energy(searched, seek(power, start={"fused": {"kind": "fused"}}), power)
    assert report.kept == () and plan.kept == () and plan.proof is None and plan.speedup is None
    assert report.objective == plan.objective == "energy" and report.energy is not None
    assert [item.name for item in plan.rejected] == ["fused"] and "(estimated)" in plan.rejected[0].reason
    assert "faster" not in report.verdict and "faster" not in plan.verdict


def test_a_plan_by_step_time_that_needs_less_keeps_its_proof_and_reaches_the_metric(power, searched):
    power.watts["fused"] = 50.0
    report, plan = of_energy(searched, seek(power, start={"fused": {"kind": "fused"}}), power)
    assert report.kept == ("fused",) and plan.speedup == 1.5 and plan.rejected == ()
    assert plan.proof is not None and plan.proof.rung == "metric" and plan.proof.steps == 100
    assert plan.energy == report.energy and plan.energy is not None and plan.energy.basis == "estimated"
    assert "faster" not in report.verdict


def test_another_training_on_top_takes_the_place_of_a_plan_that_needs_more(power, searched):
    power.watts |= {"fused": 200.0, "frugal": 50.0}
    sought = seek(power, technique("frugal"), start={"fused": {"kind": "fused"}})
    report, plan = of_energy(searched, sought, power)
    assert report.kept == ("frugal",) and [item.name for item in plan.rejected] == ["fused"]
    assert plan.speedup is None and plan.proof is not None and plan.proof.no_band


def test_an_interrupted_search_leaves_the_plan_of_the_step_times_as_what_it_is(power, searched):
    sought = Sought({"fused": {"kind": "fused"}}, verdict="Interrupted.", interrupted=True)
    report, plan = of_energy(searched, sought, power)
    assert plan.kept == searched[2].kept and plan.objective == report.objective == "step" and report.energy is None
