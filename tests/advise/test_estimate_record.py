"""An estimate from a measurement, without running anything: the record, its page in the terminal, what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from rich.console import Console
from watched_trainings import GIB, HERE, gpu, offer, q, seen, work

from upshift.api.estimating import EstimateOptions, compare, estimate, predict, steps_of
from upshift.api.target import Target
from upshift.errors import UsageError
from upshift.hardware.rates import Rates
from upshift.records import codec
from upshift.records.estimate import Estimate
from upshift.report.estimated import render_estimate


def found(options: EstimateOptions | None = None, measurement: Any = None, rent: Any = None) -> Estimate:
    rent = rent if rent is not None else {"Card": [offer(spot=0.5)]}
    return predict(
        measurement or seen(), options or EstimateOptions(), [gpu("Small", memory=2.5 * GIB), gpu()], rent, Rates()
    )


def text(record: Estimate, width: int = 160) -> str:
    console = Console(width=width, no_color=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_estimate(record))
    return console.export_text()


def test_the_page() -> None:
    shown = text(found(EstimateOptions(budget=50.0, deadline=12 * 3600.0)))
    for part in ("train.py", "Card", "Small", "This machine, measured", "100 ms", "Within 50 USD and 12.0 h", "~"):
        assert part in shown
    assert "Small would hold it with" in shown
    # What fits stands before what does not.
    assert shown.index("Card ") < shown.index("Small ")


def test_an_impossible_budget_is_said() -> None:
    record = found(EstimateOptions(budget=1e-9))
    assert "nothing in the catalogue does this; the nearest is shown" in record.advice
    assert "the nearest" in text(record)


def test_a_budget_without_steps_asks_for_them() -> None:
    measurement = seen(facts=msgspec.structs.replace(seen().facts, steps_total=None))
    record = found(EstimateOptions(budget=1.0), measurement)
    assert any("--steps" in line for line in record.advice)
    assert record.devices[0].total.value is None
    assert "unknown" in text(record)


def test_nothing_known_is_no_zero() -> None:
    blank = seen(work=None, step=None, facts=msgspec.structs.replace(seen().facts, steps_total=None, loaders=()))
    record = found(measurement=blank, rent={})
    shown = text(record)
    assert "unknown" in shown
    for item in record.devices:
        for quantity in (item.memory, item.step, item.total, item.energy, item.largest_batch):
            assert quantity.value is None and quantity.basis == "unknown"


def test_every_figure_says_how_it_is_known() -> None:
    for item in found().devices:
        for quantity in (item.memory, item.step, item.total, item.energy, *item.parts.values()):
            assert quantity.basis == ("estimated" if quantity.value is not None else "unknown")


def test_there_and_back() -> None:
    record = found(EstimateOptions(budget=5.0))
    assert codec.loads(codec.dumps(record), Estimate) == record


@pytest.mark.parametrize("width", [60, 80, 120])
def test_narrow_terminals(width: int) -> None:
    assert max(map(len, text(found(), width).splitlines())) <= width


def test_names_from_outside_cannot_drive_the_terminal() -> None:
    record = msgspec.structs.replace(found(), script="\x1b[31mtrain.py", notes=("[bold]\x1b]0;x\x07",))
    assert "\x1b" not in text(record)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (EstimateOptions(steps=7), 7.0),
        (EstimateOptions(epochs=3), 300.0),
        (EstimateOptions(epochs=3, batch=64), 150.0),
        (EstimateOptions(), 1000.0),
        (EstimateOptions(batch=320), 100.0),
    ],
)
def test_steps(options: EstimateOptions, steps: float) -> None:
    assert steps_of(seen(), options)[0].value == steps


def test_steps_nobody_knows() -> None:
    blank = seen(facts=msgspec.structs.replace(seen().facts, loaders=(), steps_total=None))
    assert steps_of(blank, EstimateOptions())[0].value is None
    quantity, why = steps_of(blank, EstimateOptions(epochs=2))
    assert quantity.value is None and "--steps" in why


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (EstimateOptions(steps=3, epochs=2), "two ways"),
        (EstimateOptions(precision="fp7"), "precision"),
        (EstimateOptions(budget=-1.0), "--budget"),
        (EstimateOptions(budget=float("nan")), "--budget"),
        (EstimateOptions(deadline=float("inf")), "--deadline"),
        (EstimateOptions(batch=0), "--batch"),
        (EstimateOptions(devices=("Voodoo 3000",)), "Voodoo"),
        (EstimateOptions(price="free"), "--price"),
        (EstimateOptions(region="Atlantis"), "Atlantis"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options: EstimateOptions, word: str) -> None:
    # The script is not there: had it been looked for, the error would be about it.
    with pytest.raises(UsageError) as error:
        estimate(Target("no-such-script.py"), options)
    assert word.lower() in error.value.message.lower() and error.value.remedy


def test_estimated_and_measured() -> None:
    predicted = found().here
    again = seen(step=0.12, work=work(process_peak=2 * 2.0**30))
    errors = compare(predicted, again, known_as="train.py")
    assert [item.what for item in errors] == ["step", "memory"]
    assert errors[0].relative == pytest.approx(0.1 / 0.12 - 1)
    assert errors[1].relative == pytest.approx((predicted.memory.or_else(0) - 2 * 2.0**30) / (2 * 2.0**30))
    assert compare(predicted, again, known_as="train.py", same_batch=False) == ()
    # A small process is mostly libraries.
    assert len(compare(predicted, seen(work=work(process_peak=1e8)), known_as="train.py")) == 1
    shown = text(msgspec.structs.replace(found(), compared=errors))
    assert "Estimated and then measured" in shown


def test_notes_say_what_is_missing_for_a_device() -> None:
    record = predict(seen(), EstimateOptions(precision="bf16"), [gpu(flops={"float32": 1e14})], {}, Rates())
    assert "peak of Card in bfloat16 is not known" in text(record)


def test_here_is_this_machine() -> None:
    record = found()
    assert record.here.device.measured and record.here.device.kind == HERE.kind
    assert record.here.step.value == q(0.1).value


def test_no_torch_for_the_page() -> None:
    code = (
        "import sys, upshift.report.estimated, upshift.advise.assessing, upshift.advise.remedies;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
