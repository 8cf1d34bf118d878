"""A plan chosen by its energy: the basis is part of every claim, and nothing estimated passes for measured."""

from __future__ import annotations

import io
import re

import pytest
import sample_records as samples
from msgspec.structs import replace
from rich.console import Console

from upshift.records import Plan, Trial, TuneReport, codec
from upshift.records.quantity import Basis
from upshift.records.trial import Proof
from upshift.records.verification import Energy, Interval, Verification, WholeRun
from upshift.report import digest, html, sentences, terminal

HOW = {
    "estimated": "on this machine energy is estimated from CPU time and wall time: it ranks plans as these do",
    "measured": "energy is read from RAPL",
}


def energy(basis: Basis = "estimated", mean: float | None = 1.31, low: float | None = 1.12) -> Energy:
    high = None if mean is None else mean * 1.1
    return Energy(mean, low, high, 0 if mean is None else 3, basis=basis, how=HOW[basis], stock=1200.0, plan=916.0)


def report(found: Energy, *, kept: bool = True, reached: tuple[int, int] = (3, 3)) -> TuneReport:
    runs = tuple(
        WholeRun(arm=arm, seed=seed, seconds=9.0, code=0, values=((5.0, 0.97),), joules=1000.0)
        for seed in range(3)
        for arm in ("stock", "plan")
    )
    verification = Verification(
        script="train.py", arguments=(), created="", metric="accuracy", mode="max", techniques={"larger_batch": {}},
        fingerprint="", seeds=3, margin=0.01, margin_note="as asked", answer="as good", reason="at 95 % as good",
        runs=runs, speedup=Interval(0.98, 0.9, 1.1, 3), target=0.97, reached=reached, energy=found,
        target_speedup=Interval(0.98, 0.9, 1.1, 3) if reached == (3, 3) else None,
    )  # fmt: skip
    trial = Trial(name="larger_batch(factor=2)", candidate={"larger_batch": {"factor": 2}}, reference={},
                  outcome="less energy", reason="for 916 J, before it 1.2 kJ", stage="screen")  # fmt: skip
    return replace(
        samples.baseline_report(), objective="energy", energy=found, verification=verification, trials=(trial,),
        kept=("larger_batch",) if kept else (), verdict="", final=None, findings=(),
        proof=Proof(rung="metric", passed=True, reason="as good", no_band="another training") if kept else None,
    )  # fmt: skip


def plan(found: Energy) -> Plan:
    return replace(samples.plan(), objective="energy", energy=found, to_target=Interval(0.98, 0.9, 1.1, 3), verdict="")


def screen(drawn: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=False).print(drawn)
    return " ".join(out.getvalue().split())


def page(drawn: TuneReport) -> str:
    """The words of the page, without what explains step times in general."""
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", html.render_tune(drawn), flags=re.DOTALL)
    return " ".join(text.split())


@pytest.mark.parametrize("basis", ["estimated", "measured"])
def test_the_claim_is_less_energy_with_its_basis(basis):
    made = report(energy(basis))
    assert digest.claim(made) == "win"
    assert sentences.headline(made) == f"Target for 1.31x less energy ({basis}): at least 1.12x at 95 %, 3 seeds"
    for drawn in (screen(terminal.render_tune(made)), page(made)):
        assert f"less energy ({basis})" in drawn and HOW[basis] in drawn
        assert "1.2 kJ" in drawn and "916 J" in drawn


def test_nothing_estimated_is_called_measured_or_faster():
    drawn = screen(terminal.render_tune(report(energy())))
    assert "faster" not in drawn and "measured" not in drawn and "sooner" not in drawn
    claim = page(report(energy())).partition("What was tried")[0]
    assert "1.31" in claim and "faster" not in claim and "measured" not in claim
    assert "faster" not in screen(terminal.render_plan(plan(energy()))).partition("Kept")[0]


def test_a_plan_tells_energy_first_and_what_it_rests_on():
    drawn = screen(terminal.render_plan(plan(energy())))
    assert "1.31x less energy (estimated) to the target (1.12x to 1.44x at 95 %), 1.2 kJ -> 916 J, 3 pairs" in drawn
    assert "ranks plans as these do" in drawn


@pytest.mark.parametrize("low", [1.0, 0.9, None])
def test_without_a_bound_above_one_nothing_is_claimed(low):
    made = report(energy(low=low))
    assert digest.claim(made) == "unproven"
    assert sentences.headline(made) == "That the plan needs less energy (estimated) to the target is not shown."
    assert "Not shown" in page(made)


def test_a_target_that_only_the_plan_reaches_is_a_claim_without_a_ratio():
    made = report(energy(mean=None, low=None), reached=(0, 3))
    assert digest.claim(made) == "win" and "reached in 3 runs" in sentences.headline(made)
    assert digest.claim(report(energy(mean=None, low=None), reached=(2, 3))) == "unproven"


def test_the_baseline_is_kept_in_words_of_energy():
    made = report(energy(mean=0.8, low=0.7), kept=False)
    assert "need less energy (estimated) to the target" in sentences.headline(made)
    drawn = screen(terminal.render_tune(made))
    assert "0.80x as a ratio of energies (estimated)" in drawn and "faster" not in drawn
    assert "Keep your baseline" in page(made)


def test_an_outcome_without_a_record_of_what_was_read_is_not_measured():
    made = replace(report(energy()), energy=None)
    assert sentences.outcome_text(made, made.trials[0]) == "less energy (unknown)"


def test_a_report_survives_its_file(tmp_path):
    made = report(energy())
    codec.write(tmp_path / "r.json", made)
    assert codec.read(tmp_path / "r.json", TuneReport) == made
