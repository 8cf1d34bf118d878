"""Predicted steps against times reckoned by hand; intervals, orders of magnitude, and what is not known."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched_trainings import HERE, gpu, op, q, seen, work

from upshift.advise import steptime
from upshift.records import Floor
from upshift.records.estimate import DeviceFigures


def faster(factor: float, **changes: object) -> DeviceFigures:
    fields = {
        "name": "other", "flops": {key: value * factor for key, value in HERE.flops.items()},
        "bandwidth": (HERE.bandwidth or 0) * factor,
    }  # fmt: skip
    return msgspec.structs.replace(HERE, **{**fields, **changes})


def test_the_same_is_what_was_measured() -> None:
    found = steptime.scale(seen(), HERE, HERE)
    assert found.step.value == pytest.approx(0.1)
    assert not found.order_of_magnitude and found.how == "measured here"
    assert sum(found.parts.values()) == pytest.approx(0.1)


def test_more_samples_by_hand() -> None:
    # Calls cost 20 us each at most here, which stays. Twice the samples: data 20, other 10, relu twice, the optimizer
    # as before; the products are held by arithmetic (10 and 20 ms of roofline against 2 and 4 of bytes), so twice.
    ends = (0.02 + 0.01 + 2 * 0.07 + 0.01, 3 * 20e-6)
    assert steptime.scale(seen(), HERE, HERE, batch=64).step.value == pytest.approx(ends[0] - ends[1], rel=1e-6)


def test_another_device_by_hand() -> None:
    # Data and other stay (20 ms), calls stay (4 x 20 us), all else runs in half the time.
    found = steptime.scale(seen(), HERE, faster(2.0))
    assert found.step.value == pytest.approx(0.02 + 80e-6 + (0.08 - 80e-6) / 2)


def test_a_limit_that_changes_is_seen() -> None:
    # A hundred times the arithmetic, the same memory: products are held by their bytes (2 of 10 ms, 4 of 20), the
    # rest does not change.
    target = faster(1.0, flops={"float32": 1e14})
    found = steptime.scale(seen(), HERE, target)
    products = (0.02 - 20e-6) * 0.2 + (0.04 - 20e-6) * 0.2
    assert found.step.value == pytest.approx(0.02 + 80e-6 + products + 0.02 - 40e-6)
    assert found.step.low is not None and found.step.high is not None
    assert found.step.low < found.step.or_else(0) < found.step.high


def test_a_lower_precision_by_hand() -> None:
    found = steptime.scale(seen(), HERE, HERE, precision="bf16")
    products = 0.06 - 40e-6
    assert found.step.value == pytest.approx(0.1 - products + products / 2)


def test_a_precision_that_is_only_emulated_is_an_order_of_magnitude() -> None:
    slow = faster(1.0, flops={"float32": 1e12, "bfloat16": 1e10})
    found = steptime.scale(seen(), slow, slow, precision="bf16")
    assert found.order_of_magnitude and found.step.or_else(0) > 1.0
    assert not steptime.scale(seen(), HERE, HERE, precision="bf16").order_of_magnitude


def test_between_kinds_of_devices_it_is_an_order_of_magnitude() -> None:
    found = steptime.scale(seen(), HERE, gpu())
    assert found.order_of_magnitude and "order of magnitude" in found.how
    assert found.step.low is not None and found.step.high is not None
    assert found.step.high / found.step.low == pytest.approx(10.0)
    # Waiting for data does not become shorter by another card.
    assert found.step.or_else(0) > 0.01


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (steptime.scale(seen(step=None), HERE, HERE), "no step was timed"),
        (steptime.scale(seen(), HERE, gpu(bandwidth=None)), "bandwidth of Card"),
        (steptime.scale(seen(), HERE, gpu(flops={"float16": 1e14})), "peak of Card in float32"),
        (steptime.scale(seen(), HERE, gpu(flops={"float32": 1e13}), precision="bf16"), "peak of Card in bfloat16"),
        (steptime.scale(seen(work=work(batch=None)), HERE, HERE, batch=8), "number of samples"),
        (steptime.scale(seen(work=None), HERE, gpu()), "was not counted"),
        (steptime.of_other(seen(work=None), work(), HERE), "operation by operation"),
    ],
)
def test_what_is_not_known_is_said(found: steptime.StepPrediction, why: str) -> None:
    assert found.step.value is None and found.step.basis == "unknown"
    assert why in found.why


def test_a_count_of_the_whole_step_serves_where_no_operation_was_seen() -> None:
    floor = Floor(
        flops=q(30e9, "FLOP"), bytes_moved=q(1e9, "B"), dtype="float32", peak_flops=q(1e12, "FLOP/s"),
        best_dtype="float32", best_peak_flops=q(1e12, "FLOP/s"), bandwidth=q(1e11, "B/s"), mfu=q(0.3, "fraction"),
        arithmetic_floor=q(0.03), bandwidth_floor=q(0.01),
        by_phase={"forward": 10e9, "backward": 20e9, "optimizer": 1e6},
    )  # fmt: skip
    assert steptime.scale(seen(work=None, floor=floor), HERE, HERE).step.value == pytest.approx(0.1)
    found = steptime.scale(seen(work=None, floor=floor), HERE, faster(4.0))
    assert found.step.value == pytest.approx(0.02 + 0.08 / 4)


def test_a_device_that_is_bound_by_its_host_gains_nothing() -> None:
    gpus = seen(device_phases={"forward": q(0.003), "backward": q(0.004), "optimizer": q(0.001)})
    source, target = gpu("A"), gpu("B", flops={"float32": 1e15}, bandwidth=1e13)
    found = steptime.scale(gpus, source, target)
    assert found.step.value == pytest.approx(0.1)


def test_another_model_from_a_dry_run() -> None:
    # Its operations are those seen, with twice the FLOPs of the products and no times.
    ops = tuple(msgspec.structs.replace(row, seconds=None, scaled_flops=2 * row.scaled_flops) for row in work().ops)
    found = steptime.of_other(seen(), work(ops=ops), HERE)
    assert found.step.value == pytest.approx(0.1 + 0.06, rel=0.01)
    assert steptime.of_other(seen(), work(), HERE).step.value == pytest.approx(0.1, rel=0.01)


def test_a_dry_run_that_falls_apart_into_other_operations() -> None:
    # The forward pass is made of other operations there; its products have half the FLOPs.
    ops = tuple(row for row in work().ops if row.phase != "forward")
    apart = op("forward", None, name="addmm", scaled_flops=5e9, product=True)
    found = steptime.of_other(seen(), work(ops=(*ops, apart)), HERE)
    assert found.step.value == pytest.approx(0.1 - 0.015, rel=0.01)
    nothing = steptime.of_other(seen(), work(ops=ops), HERE)
    assert nothing.step.value is None and "other operations" in nothing.why


ratios = st.floats(0.05, 50)


@given(st.integers(1, 4096), st.integers(1, 4096), ratios, ratios)
def test_intervals_hold_the_value_and_samples_are_monotone(one: int, other: int, peak: float, band: float) -> None:
    target = faster(1.0, flops={key: value * peak for key, value in HERE.flops.items()},
                    bandwidth=(HERE.bandwidth or 0) * band)  # fmt: skip
    found = [steptime.scale(seen(), HERE, target, batch=n).step for n in sorted((one, other))]
    for step in found:
        assert step.low is not None and step.high is not None
        assert 0 < step.low <= step.or_else(0) <= step.high
    assert found[0].or_else(0) <= found[1].or_else(0) * (1 + 1e-12)


@given(ratios)
def test_a_better_device_is_never_slower(factor: float) -> None:
    steps = [steptime.scale(seen(), HERE, faster(f)).step.or_else(0) for f in (factor, 2 * factor)]
    assert steps[1] <= steps[0]


def test_operations_nobody_timed_on_a_device_share_its_phases() -> None:
    untimed = work(ops=tuple(op(row.phase, None, name=row.name, scaled_flops=row.scaled_flops,
                                scaled_bytes=row.scaled_bytes, fixed_bytes=row.fixed_bytes, product=row.product)
                             for row in work().ops))  # fmt: skip
    found = steptime.scale(seen(work=untimed), gpu("A"), gpu("A"))
    assert found.step.value == pytest.approx(0.1)
