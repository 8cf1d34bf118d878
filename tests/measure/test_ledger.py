"""The books of a run against exact arithmetic; what is not known stays unknown."""

from __future__ import annotations

import math
import os
import time
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.hardware.carbon import Intensity
from upshift.hardware.rates import Price, Rates
from upshift.hardware.watts import Watts, stated
from upshift.measure.ledger import Spot, ledger
from upshift.measure.lost import done_again, expected
from upshift.measure.power import Estimate
from upshift.records.ledger import Ledger
from upshift.records.quantity import unknown
from upshift.records.resources import GpuSample, Head, Resources, Sample
from upshift.records.run import Event, Run, Window
from upshift.records.runfold import fold
from upshift.records.runlog import RunLog
from upshift.records.trial import TuneReport

WATTS = Watts(1.0, 4.0, "made up")
NOTHING = Rates(watts=WATTS)
FRANCE = Intensity(56.0, "France", "a table", 2023)
RATES = Rates(Price(3.0, "EUR", source="as given"), FRANCE, 1.25, "as given", WATTS)
ENTRIES = [field for field in Ledger.__struct_fields__ if field not in ("run", "currency", "schema")]


def run(seconds: float | None = 3600.0, **more) -> Run:
    return Run(**{"id": "r", "script": "train.py", "arguments": (), "started": "", "status": "finished",
                  "seconds": seconds, **more})  # fmt: skip


def sampled(*samples: Sample, **head) -> Resources:
    return Resources(Head(**{"cores": 2.0, "energy": "counted", "energy_basis": "measured", **head}), samples)


def window(first: int, n: int, at: float, seconds: float, checkpoint: float = 0.0) -> Window:
    return Window(first, n, at=at, seconds=seconds, checkpoint=checkpoint)


# -- exact figures -------------------------------------------------------------------------------------------------


def test_a_measured_run_with_all_rates():
    found = ledger(run(), sampled(Sample(1800.0, joules=40_000.0), Sample(3600.0, joules=90_000.0, cpu_seconds=5400.0,
                                                                       memory=3e9)), RATES, epochs=4)  # fmt: skip
    joules = Fraction(90_000) * Fraction(5, 4)
    assert found.energy.value.value == float(joules)
    assert found.carbon.value.value == pytest.approx(float(joules / 3_600_000 * 56), rel=1e-12)
    assert (found.cost.value.value, found.cost.value.unit, found.currency) == (3.0, "EUR", "EUR")
    assert found.cost_per_epoch.value.value == 0.75
    assert (found.cpu_hours.value.value, found.cpu_utilisation.value.value) == (1.5, 0.75)
    assert (found.device_hours.value.value, found.memory.value.value, found.memory.value.n) == (1.0, 3e9, 1)
    assert found.seconds.value.basis == found.cost.value.basis == "measured"
    # The PUE is a statement, the intensity an average: what they make is not measured.
    assert found.energy.value.basis == found.carbon.value.basis == "estimated"
    assert "PUE 1.25" in found.energy.how and "a table" in found.carbon.how and "2023" in found.carbon.how


def test_counted_joules_without_a_pue_are_measured_and_say_what_is_missing():
    found = ledger(run(), sampled(Sample(3600.0, joules=90_000.0)), NOTHING).energy
    assert (found.value.value, found.value.basis, found.value.low) == (90_000.0, "measured", None)
    assert found.how.startswith("counted") and "PUE" in found.how


def test_an_estimate_has_the_range_of_the_watts():
    joules = 2 * 1.0 * 3600 + 3.0 * 5400
    found = ledger(run(), sampled(Sample(3600.0, joules=joules, cpu_seconds=5400.0), energy_basis="estimated"), RATES)
    assert found.energy.value.low == 2 * 1.0 * 3600 * 1.25 and found.energy.value.high == 2 * 4.0 * 3600 * 1.25
    grams = [found.carbon.value.low, found.carbon.value.value, found.carbon.value.high]
    assert grams == pytest.approx([value * 1.25 / 3.6e6 * 56 for value in (7200, joules, 28800)], rel=1e-12)


def test_a_counted_gpu_beside_an_estimated_processor_keeps_its_joules():
    gpu = GpuSample(joules=500_000.0)
    both = 500_000.0 + 2 * 3600 + 3.0 * 1000
    found = ledger(run(), sampled(Sample(3600.0, joules=both, gpus=(gpu,)), energy_basis="estimated"), NOTHING).energy
    assert (found.value.low, found.value.high) == (507_200.0, 528_800.0)


def test_an_estimate_made_with_other_watts_has_no_range():
    found = ledger(run(), sampled(Sample(3600.0, joules=1.0), energy_basis="estimated"), NOTHING).energy
    assert found.value.value == 1.0 and found.value.low is None and found.value.high is None


def test_samples_that_end_early_are_scaled_and_no_longer_measured():
    found = ledger(run(), sampled(Sample(900.0, joules=10.0), Sample(1800.0, joules=None)), NOTHING).energy
    assert (found.value.value, found.value.low, found.value.basis) == (40.0, 10.0, "estimated")
    assert "counted in" in found.how


def test_without_samples_a_cpu_run_gets_the_range_of_its_cores():
    environment = {"device": "cpu Some CPU, 2 cores", "cores": "2 usable of 8"}
    found = ledger(run(environment=environment), None, NOTHING).energy
    assert (found.value.low, found.value.value, found.value.high) == (7200.0, 18_000.0, 28_800.0)
    assert found.value.basis == "estimated" and "wall time alone" in found.how


def test_cpu_time_without_joules_narrows_nothing_but_sets_the_value():
    found = ledger(run(), sampled(Sample(3600.0, cpu_seconds=1000.0), energy_basis="unknown"), NOTHING).energy
    assert (found.value.low, found.value.value, found.value.high) == (7200.0, 10_200.0, 28_800.0)


@pytest.mark.parametrize(
    "resources",
    [None, sampled(), sampled(Sample(3600.0, gpus=(GpuSample("H100"),)), energy_basis="unknown"),
     sampled(Sample(3600.0, gpus=(GpuSample("H100"),), joules=0.0))],
)  # fmt: skip
def test_the_energy_of_a_gpu_does_not_follow_from_time(resources):
    found = ledger(run(environment={"device": "cuda NVIDIA H100", "cores": "2 usable of 2"}), resources, RATES)
    assert found.energy.value == unknown("J") and found.carbon.value == unknown("g")
    assert "GPU" in found.energy.how


def test_a_price_for_each_device():
    gpus = (GpuSample(utilisation=0.5, memory=1e9), GpuSample(utilisation=1.0, memory=2e9))
    rates = Rates(Price(2.0, per="device"))
    found = ledger(run(), sampled(Sample(900.0, gpus=gpus), Sample(3600.0, gpus=gpus[:1])), rates)
    assert (found.cost.value.value, found.device_hours.value.value) == (4.0, 2.0)
    # 900 s of 0.5 and 1.0, then 2700 s of 0.5.
    assert found.gpu_utilisation.value.value == pytest.approx((450 + 900 + 1350) / (900 + 900 + 2700))
    assert found.gpu_memory.value.value == 2e9
    assert ledger(run(), None, rates).cost.value == unknown("USD")
    assert ledger(run(), None, Rates(Price(2.0))).cost.value.value == 2.0


def test_a_price_from_a_catalogue_is_an_estimate():
    assert ledger(run(), None, Rates(Price(1.0, given=False))).cost.value.basis == "estimated"


# -- several starts ------------------------------------------------------------------------------------------------


def test_starts_in_one_folder_are_added_up(tmp_path):
    log = RunLog(tmp_path)
    head = {"script": "jobs.py:a", "arguments": [], "started": "", "pid": 2**22 + 5}
    log.append("start", **head)
    log.append("steps", first=0, n=10, at=30.0, seconds=20.0)
    log.append("start", **head)  # killed before: the last window is the last sign of it
    log.append("resume", at=4.0, text="")
    log.append("steps", first=8, n=10, at=25.0, seconds=20.0)
    log.append("target", at=25.0, text="")
    log.append("end", code=75, seconds=26.0)
    log.append("start", **head)
    log.append("resume", at=5.0, text="")
    log.append("steps", first=18, n=10, at=27.0, seconds=20.0)
    log.append("end", code=0, seconds=44.0)
    found = fold(tmp_path)
    assert (found.earlier, found.seconds, found.status) == ((30.0, 26.0), 44.0, "finished")
    taken = ((30.0, 100.0), (10.0, 10.0), (26.0, 60.0), (9.0, 1.0), (44.0, 7.0))
    books = ledger(
        found, sampled(*(Sample(at, joules=joules) for at, joules in taken)), Rates(Price(36.0), watts=WATTS)
    )
    assert books.seconds.value.value == 100.0 and books.seconds.value.n == 3
    assert books.cost.value.value == pytest.approx(1.0)
    assert books.cost_to_target.value.value == pytest.approx((30.0 + 25.0) / 100.0)
    assert books.energy.value.value == 167.0
    # Two of ten steps of 20 s again, 5 s and 7 s until the first update of the later starts.
    assert books.lost.value.value == pytest.approx(4.0 + 5.0 + 7.0) and books.lost.value.basis == "measured"


def test_a_run_that_goes_on_counts_until_its_last_sample():
    found = ledger(run(100.0, status="running"), sampled(Sample(120.0, joules=12.0)), RATES)
    assert found.seconds.value.value == 120.0 and "so far" in found.seconds.how
    assert found.cost.value.value == pytest.approx(0.1)


# -- work lost -----------------------------------------------------------------------------------------------------


def test_one_start_without_a_step_back_lost_nothing():
    found = ledger(run(windows=(window(0, 5, 10.0, 9.0), window(5, 5, 20.0, 10.0))), None, NOTHING).lost
    assert (found.value.value, found.value.basis) == (0.0, "measured")


def test_nothing_seen_is_not_nothing_lost():
    assert ledger(run(), None, NOTHING).lost.value == unknown("s")


def test_expected_loss_of_a_machine_that_may_be_taken_away():
    log = (window(0, 50, 1800.0, 1770.0, checkpoint=10.0), window(50, 50, 3600.0, 1790.0, checkpoint=10.0))
    found = ledger(run(windows=log), None, NOTHING, spot=Spot(7200.0)).lost
    # A save every 1800 s, 20 s until the first update, half an interruption.
    assert found.value.value == pytest.approx(0.5 * (900.0 + 20.0)) and found.value.basis == "estimated"
    stated = ledger(run(windows=log), None, NOTHING, spot=Spot(3600.0, save_every=60.0, restart=30.0)).lost
    assert stated.value.value == 60.0
    for between in (0.0, -1.0, math.nan):
        assert ledger(run(windows=log), None, NOTHING, spot=Spot(between)).lost.value == unknown("s")


def test_expected_refuses_what_is_no_time():
    for times in ((-1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0, 1.0), (1.0, 1.0, math.inf, 1.0)):
        with pytest.raises(ValueError):
            expected(*times)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=30))
def test_steps_done_again_against_a_ledger_of_single_steps(moves):
    """Each step costs 1 s; an oracle that keeps every step in a list."""
    windows, done, lost, end = [], [], 0, 0
    for back, n in moves:
        first = max(end - back, 0) if windows else 0
        lost += len(done) - first if windows else 0
        done = done[:first] + list(range(first, first + n))
        windows.append(window(first, n, at=0.0, seconds=float(n)))
        end = first + n
    assert done_again(windows) == pytest.approx(lost)


# -- properties ----------------------------------------------------------------------------------------------------

amounts = st.floats(0.0, 1e6, allow_nan=False)


@given(seconds=amounts, joules=amounts, price=amounts, more=amounts, pue=st.floats(1.0, 10.0), grams=st.floats(0, 3000))
@settings(max_examples=60)
def test_linear_in_what_is_stated(seconds, joules, price, more, pue, grams):
    resources = sampled(Sample(max(seconds, 1e-3), joules=joules + 1.0))
    rates = Rates(Price(price), Intensity(grams, "", "s"), watts=WATTS)
    base = ledger(run(seconds), resources, rates)
    dearer = ledger(run(seconds), resources, Rates(Price(price + more), Intensity(grams, "", "s"), pue, watts=WATTS))
    assert base.cost.value.value <= dearer.cost.value.value
    assert base.cost.value.value == pytest.approx(float(Fraction(price) * Fraction(seconds) / 3600), rel=1e-9)
    assert dearer.energy.value.value == pytest.approx(base.energy.value.value * pue)
    assert dearer.carbon.value.value == pytest.approx(base.carbon.value.value * pue)
    assert base.carbon.value.value == pytest.approx(base.energy.value.value * grams / 3.6e6)


maybe = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
gpu_samples = st.builds(GpuSample, utilisation=maybe, memory=maybe, joules=maybe)
samples = st.builds(
    Sample, at=st.floats(allow_nan=True), cpu_seconds=maybe, memory=maybe, joules=maybe,
    gpus=st.lists(gpu_samples, max_size=2).map(tuple),
)  # fmt: skip
windows = st.builds(
    Window, first=st.integers(-99, 2**53), n=st.integers(-99, 2**53), at=st.floats(), seconds=st.floats()
)
runs = st.builds(
    run, seconds=maybe, windows=st.lists(windows, max_size=4).map(tuple),
    earlier=st.lists(st.floats(), max_size=2).map(tuple),
    events=st.lists(st.builds(Event, at=st.floats(), kind=st.just("target"), text=st.just("")), max_size=2).map(tuple),
    status=st.sampled_from(["running", "finished", "failed", "unknown"]),
)  # fmt: skip


@given(runs, st.lists(samples, max_size=4), maybe, st.sampled_from(["measured", "estimated", "unknown"]), maybe)
@settings(max_examples=200, deadline=None)
def test_damaged_records_give_figures_or_unknown_and_never_nonsense(found, taken, cores, basis, epochs):
    resources = sampled(*taken, cores=cores, energy_basis=basis)
    books = ledger(found, resources, RATES, epochs=epochs, spot=Spot(100.0))
    for field in ENTRIES:
        entry = getattr(books, field)
        if entry is None:
            continue
        value = entry.value
        assert entry.how
        if value.value is None:
            assert value.basis == "unknown" and value.low is None and value.high is None
        else:
            assert math.isfinite(value.value) and value.value >= 0.0 and value.basis != "unknown"
            for end in (value.low, value.high):
                assert end is None or math.isfinite(end)
    # A record: it can be written and read back.
    assert msgspec.json.decode(msgspec.json.encode(books), type=Ledger) == books


def test_unknown_is_never_zero():
    books = ledger(run(None), None, NOTHING)
    for field in ENTRIES:
        entry = getattr(books, field)
        assert entry is None or (entry.value.value is None and entry.value.basis == "unknown" and entry.how), field


def test_tuning_stands_apart():
    search = TuneReport(script="train.py", arguments=(), created="", measurement=None, findings=(), trials=(),
                        verdict="", plan_file="", kept=(), seconds=1200.0, budget=1.0)  # fmt: skip
    found = ledger(run(), None, RATES, search)
    assert (found.tuning.value.value, found.cost.value.value) == (1.0, 3.0)
    assert ledger(run(), None, RATES).tuning is None
    assert ledger(run(plan="train.upshift.toml"), None, RATES).tuning.value == unknown("EUR")


def test_time_zone_and_locale_do_not_matter(monkeypatch):
    resources = sampled(Sample(3600.0, joules=90_000.0, cpu_seconds=5400.0))
    before = ledger(run(started="2026-03-29 01:59:59"), resources, RATES)
    for zone, language in (("Asia/Kolkata", "de_DE.UTF-8"), ("America/New_York", "tr_TR.UTF-8")):
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("LC_ALL", language)
        time.tzset()
        assert ledger(run(started="2026-03-29 01:59:59"), resources, RATES) == before
    monkeypatch.undo()
    time.tzset()
    assert os.environ.get("TZ") != "America/New_York"


def test_more_cpu_time_than_the_cores_have_is_no_utilisation():
    assert ledger(run(), sampled(Sample(100.0, cpu_seconds=500.0)), NOTHING).cpu_utilisation.value == unknown("1")
    assert ledger(run(), sampled(Sample(100.0, cpu_seconds=201.0)), NOTHING).cpu_utilisation.value.value == 1.0


#: Logical cores, then (load in %, watts of the package by RAPL): mlco2/codecarbon, cpu_load_profiling, 2025-01-14.
READINGS = {
    "AMD EPYC 8024P": (16, [(10.0, 18.615), (20.0, 29.501), (30.0, 38.666), (40.3, 41.753), (50.0, 43.219),
                            (64.6, 47.602), (70.2, 48.714), (80.0, 49.294), (89.4, 50.718), (100.0, 46.080)]),
    "AMD Ryzen Threadripper 1950X": (32, [(13.9, 43.302), (23.2, 62.548), (36.4, 79.171), (44.8, 106.328),
                                          (53.1, 128.127), (66.0, 144.149), (72.1, 172.435), (83.1, 170.324),
                                          (91.7, 169.175), (99.7, 166.891)]),
    "Intel Xeon E3-1240 V2": (8, [(12.5, 5.509), (21.8, 6.874), (32.5, 8.151), (41.2, 9.590), (51.3, 14.386),
                                  (60.8, 24.132), (71.3, 29.981), (80.2, 44.587), (88.9, 47.200), (100.0, 48.402)]),
    "Intel Xeon E5-2620 v3": (24, [(10.0, 16.393), (20.0, 30.981), (30.0, 38.411), (40.5, 45.282), (50.2, 62.157),
                                   (60.0, 61.949), (69.9, 76.923), (80.8, 111.885), (89.7, 115.808), (99.6, 117.017)]),
}  # fmt: skip


@pytest.mark.parametrize("processor", READINGS)
def test_the_error_of_the_estimate_is_what_the_page_says(processor):
    cores, readings = READINGS[processor]
    estimate = Estimate(stated(), cores)
    errors = [estimate.joules(1.0, cores * load / 100.0) / watts - 1.0 for load, watts in readings]
    told = f"| {processor} | {cores} | {min(errors) * 100:+.0f} % to {max(errors) * 100:+.0f} % |"
    assert told in (Path(__file__).parents[2] / "docs" / "cost.md").read_text()
    assert all(-0.5 <= error <= 1.0 for error in errors)  # "right within a factor of two under load"
