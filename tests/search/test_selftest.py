"""The self-test: its trials mean what they say, its bounds hold, and it says what is wrong."""

from __future__ import annotations

import importlib
import math
import runpy
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fake_runner import FakeRunner, World

from upshift.hook.process import HookRunner
from upshift.records import Pairing
from upshift.search.duel import Duel
from upshift.search.selftest import (
    Identical,
    Planting,
    Selftest,
    SelftestReport,
    Truth,
    Twins,
    planted,
    rate_high,
    rate_low,
    tiny,
    truth,
)
from upshift.search.selftest.planted import TINY
from upshift.sites import Numerics


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Arms without processes; the self-test reads their clock."""
    made = World(tmp_path, step=0.05, drift=0.05, noise=0.005)
    for module in ("duel", "confirm", "selftest.session"):
        monkeypatch.setattr(f"upshift.search.{module}.time.monotonic", lambda: made.clock)
    return made


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 10), (3, 59), (19, 20), (0, 2000), (3, 1500)])
def test_the_bound_of_a_rate_leaves_five_percent(k, n):
    """By definition: at the bound, so few would be seen in 5 % of the cases."""
    high = rate_high(k, n)
    p = Fraction(high)
    seen = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
    assert float(seen) == pytest.approx(0.05, abs=1e-6)
    assert rate_low(k, n) <= k / n < high


def test_bounds_of_nothing_and_of_everything():
    assert rate_high(0, 0) == rate_high(5, 5) == 1.0
    assert rate_low(0, 0) == rate_low(0, 5) == 0.0
    assert rate_low(5, 5) == pytest.approx(0.05 ** (1 / 5))
    with pytest.raises(ValueError):
        rate_high(3, 2)


# -- how something is planted ------------------------------------------------------------------------------------------


def test_what_is_planted_becomes_arguments_and_the_rest_stays_a_plan(world):
    spec = msgspec.structs.replace(tiny("--waste", "sleep:0.03"), plan={**planted(waste="none", from_step=3), "x": {}})
    Planting(FakeRunner(world)).start(spec)
    (started,) = world.started
    assert started.plan == {"x": {}}
    assert started.arguments == ("--waste", "sleep:0.03", "--waste", "none", "--from-step", "3")


def losses(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[float]:
    """What the built-in script's loss does."""
    found: list[float] = []
    real = torch.nn.functional.cross_entropy

    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(*args, **kwargs)
        found.append(loss.item())
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", seen)
        patch.setattr(sys, "argv", ["tiny.py", "--batch-size", "8", *arguments])
        runpy.run_path(str(TINY), run_name="__main__")
    return found


@pytest.mark.parametrize(
    ("fault", "size", "more"),
    [
        ("loss_scale", "0.05", ()),
        ("dropped_gradient", "1", ()),
        ("frozen_norm", "1", ("--model", "conv")),
        ("cached_transform", "1", ()),
        ("shuffled_labels", "0.5", ()),
        ("state_reset", "2", ()),
        ("dropout_off", "1", ("--dropout", "0.3")),
        ("wrong_eps", "1e-4", ("--optimizer", "adamw")),
        ("fused_strides", "1", ("--model", "conv")),
    ],
)
def test_each_fault_changes_the_training_and_only_from_its_step_on(monkeypatch, fault, size, more):
    model = () if "--model" in more else ("--model", "mlp")
    common = (*model, *more, "--steps", "8")
    stock = losses(monkeypatch, *common)
    assert stock == losses(monkeypatch, *common, "--waste", "arithmetic:0.03"), "wasted time must not change anything"
    late = "0" if fault in ("wrong_eps", "fused_strides") else "4"
    faulty = losses(monkeypatch, *common, "--fault", fault, "--size", size, "--from-step", late)
    assert stock != faulty
    assert stock[: int(late)] == faulty[: int(late)]


# -- trials ------------------------------------------------------------------------------------------------------------


def test_identical_arms_are_not_told_apart_and_can_be_renewed(world):
    twins = Twins(lambda: Duel(FakeRunner(world), tiny(), seed=1))
    found = [twins.decide(20.0, early=early)[0] for early in (True, False)]
    twins.renew()
    found.append(twins.decide(20.0)[0])
    assert found == ["no change"] * 3 and len(world.started) == 3
    twins.close()
    assert world.killed == 3


def test_truth_of_a_gain_of_harm_and_of_a_trial_that_fails(world):
    world.factor, world.scale, world.fails = {"quick": 0.95}, {"wrong": 1.2}, {"broken"}
    runner = FakeRunner(world)
    gain = truth("gain", runner, tiny(), {"quick": {}}, 60.0, numerics=Numerics.ROUNDING)
    assert gain.kept and gain.shown and gain.pairing is not None and gain.pairing.low > 1.01
    harm = truth("harm", runner, tiny(), {"wrong": {}}, 60.0, numerics=Numerics.ROUNDING)
    assert not harm.shown and "updates of step 1" in harm.reason
    broken = truth("broken", runner, tiny(), {"broken": {}}, 60.0, numerics=Numerics.ROUNDING)
    assert "boom" in broken.failure and not broken.shown


def test_a_real_fault_is_rejected(tmp_path):
    """Through real processes: the built-in script, its arguments, the hook and the acceptance rule."""
    small = tiny("--model", "mlp", "--batch-size", "8")
    fault = planted(fault="loss_scale", size=0.05)
    harm = truth("harm", HookRunner(scratch=tmp_path), small, fault, 0.3, numerics=Numerics.ROUNDING)
    assert not harm.failure and not harm.shown and "norm ratio 1.05" in harm.reason


# -- the whole ---------------------------------------------------------------------------------------------------------


def pairing(low: float, high: float, smallest: float = 0.02) -> Pairing:
    return Pairing(ratio=(low + high) / 2, low=low, high=high, quads=10, smallest=smallest)


def planted_truth(**changes: Any) -> Truth:
    return Truth(**{"name": "it", "kept": False, "shown": False, "decision": "no change", "reason": "because",
                    "seconds": 10.0, **changes})  # fmt: skip


def report(**changes: Any) -> SelftestReport:
    return SelftestReport(**{"created": "", "machine": {}, "seconds": 60.0, "identical": Identical(), **changes})


def test_nothing_is_wrong_where_all_is_as_it_should_be():
    good = report(
        identical=Identical(decisions=40, faster=1),
        gains=(planted_truth(kept=True, shown=True, pairing=pairing(1.02, 1.04)),),
        faults=(planted_truth(),),
    )
    assert good.wrong() == ()
    assert report().wrong() == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"identical": Identical(decisions=40, faster=4)}, "4 of 40"),
        ({"faults": (planted_truth(shown=True),)}, "accepted"),
        ({"gains": (planted_truth(pairing=pairing(0.9, 1.1)),)}, "harmless"),
        ({"gains": (planted_truth(shown=True, pairing=pairing(0.9, 0.99)),)}, "slower"),
        ({"problems": ("no room",)}, "no room"),
    ],
)
def test_what_is_wrong_is_said(changes, said):
    (sentence,) = report(**changes).wrong()
    assert said in sentence


def test_the_smallest_gain_has_the_margin_on_top():
    gains = tuple(planted_truth(shown=True, pairing=pairing(1, 1, smallest)) for smallest in (0.01, 0.02, 0.5))
    assert report(gains=gains).detectable() == (pytest.approx(1.01 * 1.02 - 1), 10.0)
    assert report(gains=(planted_truth(),)).detectable() is None


def test_rounds_fill_the_time(world):
    said: list[str] = []
    found = Selftest(FakeRunner(world), 130.0, said.append).run()
    assert found.identical.decisions > 10 and found.identical.faster == 0 and found.identical.pairs >= 2
    assert len(found.gains) == 2 and len(found.faults) == 3
    assert not found.interrupted and not found.left_out and 120 < found.seconds < 160
    assert any("identical" in text for text in said) and any("planted" in text for text in said)
    assert world.killed == len(world.started)


def test_an_interrupt_tells_what_is_known(world):
    world.interrupt_after = 400
    found = Selftest(FakeRunner(world), 130.0, lambda text: None).run()
    assert found.interrupted and found.identical.decisions > 0 and not found.gains
    assert len(found.left_out) == 5
    assert world.killed == len(world.started)


def test_a_script_that_cannot_run_is_a_problem(world):
    world.length = 3
    found = Selftest(FakeRunner(world), 130.0, lambda text: None).run()
    assert "ended" in found.wrong()[0] and found.identical.decisions == 0


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/bench_proof.py`, which is no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("bench_proof")


@pytest.fixture
def bench(module: Any, world: World) -> Any:
    """Each trial once, on arms without processes."""
    made = module.Bench(quick=True, minutes=2.0, seed=1)
    made.runner = FakeRunner(world)
    return made


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "][1:]


def test_the_benchmark_counts_decisions_about_identical_arms(module, bench):
    found = rows(bench.identical())
    assert {row[0] for row in found[:-1]} <= set(module.SCRIPTS) and len(module.SCRIPTS) >= 6
    assert found[-1][0] == "**all**" and int(found[-1][1]) == sum(int(row[1]) for row in found[:-1]) >= 10
    assert found[-1][3] == "0"


def test_the_benchmark_counts_what_was_rejected(module, bench):
    """Nothing is planted in arms without a script, so nothing is rejected, and no gain is found."""
    faults, gains = rows(bench.faults()), rows(bench.gains())
    assert {row[0] for row in faults} == {harm.kind for harm in module.HARMS}
    assert {row[4] for row in faults} == {"0 of 1"} and {row[2] for row in gains} == {"0 of 1"}


def test_the_benchmark_shows_harmless_techniques(bench, world):
    world.factor = {"fused": 0.9}
    found = {(row[0], row[1]): row for row in rows(bench.wins())}
    assert found["tabular_mlp", "fused"][3:5] == ["1 of 1", "1 of 1"]
    assert found["digits", "channels_last"][3:5] == ["1 of 1", "0 of 1"]


def test_the_load_of_the_benchmark_ends_with_it(module):
    load = module.Load(1)
    with load:
        assert load._process.poll() is None
    assert load._process.poll() is not None
