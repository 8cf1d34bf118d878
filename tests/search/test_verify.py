"""Whole runs judged on a metric: order, resumption, and what may not be called as good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upshift.errors import ScriptFailedError, UsageError
from upshift.measure.metrics import Metric
from upshift.records.runlog import RunLog
from upshift.records.verification import Verification, WholeRun
from upshift.search.verify import Options, Verifier, conclude
from upshift.sites.runner import ChildSpec


class FakeChild:
    """A run that prints one line per value and ends at once."""

    def __init__(self, folder: Path, lines: list[str], code: int, guard: str) -> None:
        folder.mkdir(parents=True)
        self.record = folder
        self._output = folder / "output.txt"
        self._output.write_text("".join(f"{line}\n" for line in lines))
        self._code = code
        log = RunLog(folder)
        log.append("start", script="train.py", arguments=[], started="", clock=0.0, pid=1, plan="", techniques={},
                   environment={})  # fmt: skip
        if guard:
            log.append("guard", at=1.0, text=guard)
        log.append("end", code=code, how="", seconds=1.0, steps=3)
        log.close()

    def receive(self, timeout: float) -> dict[str, Any]:
        return {"kind": "gone", "code": self._code}

    def written(self) -> list[Path]:
        return [self._output]

    def output(self) -> str:
        return self._output.read_text()

    def kill(self) -> None: ...


class FakeRunner:
    def __init__(self, folder: Path, lines: Callable[[ChildSpec], list[str]], code: int = 0, guard: str = "") -> None:
        self.folder = folder
        self.lines = lines
        self.code = code
        self.guard = guard
        self.specs: list[ChildSpec] = []

    def start(self, spec: ChildSpec, *, name: str = "") -> FakeChild:
        self.specs.append(spec)
        guard = self.guard if spec.plan else ""
        return FakeChild(self.folder / str(len(self.specs)), self.lines(spec), self.code, guard)


PLAN = {"fused": {"kind": "fused"}}


def accuracy(stock: float, plan: float, spread: float = 0.01) -> Callable[[ChildSpec], list[str]]:
    """Lines of a run: the metric rises to a value that depends on the arm and a little on the seed."""

    def lines(spec: ChildSpec) -> list[str]:
        end = (plan if spec.plan else stock) + spread * ((spec.seed or 0) % 3 - 1)
        return [f"test accuracy {value:.6f}" for value in (0.1, end / 2, end)]

    return lines


def verify(runner: FakeRunner, options: Options, earlier: tuple[WholeRun, ...] = ()) -> tuple[Verification, list[int]]:
    saved: list[int] = []
    base = ChildSpec(mode="run", target="train.py")
    runs = Verifier(runner, base, PLAN, options, lambda text: None, lambda runs: saved.append(len(runs)), earlier).run()
    blank = Verification(
        script="train.py", arguments=(), created="", metric=options.metric.name, mode=options.metric.mode,
        techniques=PLAN, fingerprint="", seeds=options.seeds, margin=0.0, margin_note="", answer="not shown", reason="",
    )  # fmt: skip
    return conclude(runs, options, blank), saved


ACCURACY = Metric.parse("accuracy:max", target=0.8)


def test_arms_alternate_over_seeds_and_every_run_is_saved(tmp_path):
    runner = FakeRunner(tmp_path, accuracy(0.9, 0.9))
    found, saved = verify(runner, Options(ACCURACY))
    assert [(bool(spec.plan), spec.seed) for spec in runner.specs] == [
        (False, 0), (True, 0), (True, 1), (False, 1), (False, 2), (True, 2),
    ]  # fmt: skip
    assert saved == [1, 2, 3, 4, 5, 6]
    assert [spec.options["seed_shift"] for spec in runner.specs] == [0, 0, 1, 1, 2, 2]
    assert found.answer == "as good" and found.reached == (3, 3) and found.difference.n == 3
    assert found.seed_spread == pytest.approx(0.01)


def test_resumed_runs_are_not_made_again(tmp_path):
    first, _ = verify(FakeRunner(tmp_path / "a", accuracy(0.9, 0.9)), Options(ACCURACY))
    runner = FakeRunner(tmp_path / "b", accuracy(0.9, 0.9))
    found, _ = verify(runner, Options(ACCURACY), first.runs[:4])
    assert len(runner.specs) == 2 and found.difference == first.difference


def test_a_loss_beyond_the_margin_is_worse(tmp_path):
    found, _ = verify(FakeRunner(tmp_path, accuracy(0.9, 0.85)), Options(ACCURACY))
    assert found.answer == "worse" and found.difference.mean == pytest.approx(-0.05)
    assert found.margin == pytest.approx(0.009) and "1%" in found.margin_note.replace(" ", "")


def test_lower_is_better_where_asked(tmp_path):
    loss = Metric.parse("accuracy:min")
    found, _ = verify(FakeRunner(tmp_path, accuracy(0.9, 0.85)), Options(loss))
    assert found.answer == "as good" and found.difference.mean == pytest.approx(0.05)


def test_a_wide_scatter_is_not_shown(tmp_path):
    def lines(spec: ChildSpec) -> list[str]:
        value = 0.9 + 0.1 * ((spec.seed or 0) % 3 - 1) * (-1 if spec.plan else 1)
        return [f"accuracy {value}"]

    found, _ = verify(FakeRunner(tmp_path, lines), Options(Metric.parse("accuracy")))
    assert found.answer == "not shown" and "seeds" in found.reason


def test_a_plan_that_misses_the_target_is_worse(tmp_path):
    def lines(spec: ChildSpec) -> list[str]:
        end = 0.805 + 0.001 * (spec.seed or 0) - (0.008 if spec.plan else 0.0)
        return [f"accuracy {end}"]

    found, _ = verify(FakeRunner(tmp_path, lines), Options(ACCURACY, margin=0.1))
    assert found.answer == "worse" and found.reached == (3, 0) and found.target_speedup is None


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (lambda spec: ["accuracy 0.5", "accuracy 0.5"], "never changes"),
        (lambda spec: ["accuracy 0.5", "accuracy 0.9"], "the seed changes nothing"),
    ],
)
def test_a_metric_that_cannot_differ_shows_nothing(tmp_path, lines, reason):
    found, _ = verify(FakeRunner(tmp_path, lines), Options(ACCURACY))
    assert found.answer == "not shown" and reason in found.reason


def test_a_plan_the_guard_took_off_was_not_verified(tmp_path):
    found, _ = verify(FakeRunner(tmp_path, accuracy(0.9, 0.9), guard="step 7: the loss is nan"), Options(ACCURACY))
    assert found.answer == "not shown" and "guard" in found.reason


@pytest.mark.parametrize("end", ["nan", "inf"])
def test_no_finite_number_at_the_end_is_worse(tmp_path, end):
    def lines(spec: ChildSpec) -> list[str]:
        return (
            [f"accuracy 0.{5 + (spec.seed or 0)}", "accuracy nan"]
            if spec.plan
            else [f"accuracy 0.{5 + (spec.seed or 0)}"]
        )

    found, _ = verify(FakeRunner(tmp_path, lines), Options(Metric.parse("accuracy")))
    assert found.answer == "worse"


def test_a_failed_run_ends_it_with_the_output(tmp_path):
    with pytest.raises(ScriptFailedError, match=r"exit code 3(.|\n)*test accuracy"):
        verify(FakeRunner(tmp_path, accuracy(0.9, 0.9), code=3), Options(ACCURACY))


def test_a_metric_not_printed_is_named_after_the_first_run(tmp_path):
    runner = FakeRunner(tmp_path, accuracy(0.9, 0.9))
    with pytest.raises(UsageError, match="f1"):
        verify(runner, Options(Metric.parse("f1")))
    assert len(runner.specs) == 1
