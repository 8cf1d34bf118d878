"""Epochs and metrics in the record of a run, and what compare and the books make of them."""

from __future__ import annotations

import pytest

from upshift.api.comparing import CompareOptions, compare
from upshift.api.watching import ledger_of
from upshift.errors import UsageError
from upshift.hardware.rates import Price, Rates, rates
from upshift.measure import series
from upshift.measure.ledger import ledger
from upshift.records import runfold
from upshift.records.run import Event, Run
from upshift.records.runfold import fold
from upshift.records.runlog import RunLog
from upshift.report import sentences


def recorded(folder, *events, seconds=3600.0):
    log = RunLog(folder)
    log.append("start", script="train.py", arguments=[], started="2026-01-01 00:00:00", pid=2**22 + 5)
    log.append("steps", first=0, n=100, at=50.0, seconds=50.0, loss=0.5, last_loss=0.25)
    for kind, more in events:
        log.append(kind, **more)
    log.append("end", code=0, seconds=seconds)
    log.close()
    return folder


def metric(at, step, text="printed", **values):
    return "metrics", {"at": at, "text": text, "step": step, "values": values}


def test_the_newest_count_of_epochs_is_the_runs(tmp_path):
    made = [("epochs", {"at": at, "text": basis, "values": {"epochs": value}})
            for at, basis, value in ((1.0, "estimated", 0.5), (2.0, "measured", 4.0))]  # fmt: skip
    run = fold(recorded(tmp_path, *made))
    assert (run.epochs.value, run.epochs.basis, run.events) == (4.0, "measured", ())
    assert run.torn_lines == 0
    books = ledger(run, None, Rates(price=Price(2.0)))
    assert books.cost_per_epoch.value.value == 0.5 and "4 epochs" in books.cost_per_epoch.how
    half = fold(recorded(tmp_path / "half", made[0]))
    found = ledger(half, None, Rates(price=Price(2.0))).cost_per_epoch
    assert (found.value.value, found.value.basis) == (4.0, "estimated")
    assert dict(sentences.run_rows(half))["epochs"] == "0.5 (estimated)"


@pytest.mark.parametrize("value", [None, 0.0, -1.0, 1e300])
def test_no_count_of_epochs_is_no_figure(tmp_path, value):
    run = fold(recorded(tmp_path, ("epochs", {"at": 1.0, "text": "measured", "values": {"epochs": value}})))
    assert run.epochs is None
    assert ledger(run, None, Rates(price=Price(2.0))).cost_per_epoch.value.value is None


def test_more_metrics_than_are_kept_lose_the_middle_and_never_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(runfold, "MOST_EVENTS", 50)
    events = [("guard", {"at": 0.5, "text": "one"})]
    for at in range(1000):
        events += [metric(float(at), at, acc=float(at)), metric(float(at), at, loss=float(-at))]
    run = fold(recorded(tmp_path, *events))
    assert len(run.events) <= 50 and run.guard_fired and run.events[0].kind == "guard"
    for name, sign in (("acc", 1), ("loss", -1)):
        points = series.events(run)[name]
        assert points[-1].value == sign * 999 and len(points) >= 8
        assert [p.value for p in points] == [sign * p.step for p in points]


def run_of(*events):
    return Run(id="r", script="s", arguments=(), started="", status="finished", seconds=10.0, events=events)


def test_of_a_logged_and_a_printed_metric_of_one_name_the_logged_one_counts():
    logged = Event(1.0, "metrics", "", 5, {"val/acc": 0.5})
    printed = Event(2.0, "metrics", "printed", 6, {"val acc": 50.0, "val f1": 0.25})
    assert set(series.events(run_of(logged, printed))) == {"val/acc", "val f1"}
    assert set(series.events(run_of(printed))) == {"val acc", "val f1"}


def test_other_events_in_between_do_not_move_the_clock():
    events = [Event(5.0, "metrics", "printed", 1, {"acc": 0.1}), Event(9.0, "guard", "late"),
              Event(8.0, "metrics", "printed", 2, {"acc": 0.2})]  # fmt: skip
    assert [point.at for point in series.events(run_of(*events))["acc"]] == [5.0, 8.0]


def test_two_runs_that_print_are_compared_by_what_they_print(tmp_path):
    for name, best in (("a", 0.8), ("b", 0.9)):
        recorded(
            tmp_path / name,
            *(metric(10.0 * at, 10 * at, **{"test accuracy": best * at / 4, "best test accuracy": best, "loss": 0.1})
              for at in range(1, 5)),
            ("epochs", {"at": 41.0, "text": "measured", "values": {"epochs": 4.0}}),
            ("model", {"at": 41.0, "text": "2 us a sample, 3 evaluations", "values": {"inference_seconds": 2e-6}}),
        )  # fmt: skip
    paths = [tmp_path / "a", tmp_path / "b"]
    found = compare(paths, CompareOptions(target=0.6, price="2"))
    assert found.metric == "test accuracy"
    a, b = ({name: entry.value.value for name, entry in item.figures.items()} for item in found.approaches)
    assert (a["metric"], b["metric"], a["best"]) == (0.8, 0.9, 0.8)
    assert (a["to_target"], b["to_target"], a["steps_to_target"]) == (30.0, 30.0, 30.0)
    assert a["cost_per_epoch"] == 0.5 and a["inference"] == 2e-6
    assert "3 evaluations" in found.approaches[0].figures["inference"].how
    named = compare(paths, CompareOptions(metric="accuracy"))
    assert named.approaches[1].figures["metric"].value.value == 0.9
    with pytest.raises(UsageError, match="no run has a metric 'f1'"):
        compare(paths, CompareOptions(metric="f1"))


def test_a_loss_of_single_steps_does_not_stand_for_the_training(tmp_path):
    for name in ("a", "b"):
        recorded(tmp_path / name, metric(1.0, 10, **{"train loss": 0.1, "loss g": 0.2}))
    assert compare([tmp_path / "a", tmp_path / "b"]).metric == series.LOSS


def test_on_a_spot_machine_lost_work_is_expected(tmp_path):
    run = fold(recorded(tmp_path))
    assert ledger_of(run, None, rates(price="0.9/h spot", environ={})).lost.value.basis == "estimated"
    assert ledger_of(run, None, rates(price="0.9/h", environ={})).lost.value.value == 0.0
