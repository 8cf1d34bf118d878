"""FLOPs and bytes of one step against counts made by hand from the shapes."""

from __future__ import annotations

import gc
import threading

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from upshift.hardware.probe import Peak, Peaks
from upshift.measure import formulas
from upshift.measure.flops import StepCount, StepCounter, floor, nothing_counted, quotient
from upshift.records.quantity import Quantity, unknown


@pytest.fixture(autouse=True)
def clean_stack():
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    yield
    assert _get_current_dispatch_mode_stack() == []


def count(step, times: int = 1) -> StepCount:
    """Count the second call of `step`, as a hook would: the first has made gradients and optimizer state."""
    step()
    counter = StepCounter()
    assert counter.start() and counter.running
    for _ in range(times):
        step()
    result = counter.stop()
    assert not counter.running
    return result


def test_mlp_step_by_hand() -> None:
    batch, a, b, c = 5, 8, 16, 4
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(batch, a)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    result = count(step)
    first, second = 2 * batch * a * b, 2 * batch * b * c
    # Backward: both gradients of the second layer, but of the first only the weight's: its input is the data.
    assert result.by_phase["forward"] == first + second
    assert result.by_phase["backward"] == first + 2 * second
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters < result.by_phase["optimizer"] < 30 * parameters
    assert result.flops.value == sum(result.by_phase.values())
    assert result.flops.basis == "measured" and result.missing_ops == () and result.note == ""
    assert result.dtype == "float32" and set(result.by_dtype) == {"float32"}
    # Parameters, gradients, two moments: read and written. A step counter per tensor. The input: read.
    counters = 4 * len(list(model.parameters()))
    assert result.least_bytes.value == 2 * 4 * (4 * parameters) + 2 * counters + x.numel() * 4
    assert result.bytes_moved.value is not None and result.bytes_moved.value > result.least_bytes.value


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_every_implementation_of_adam_counts_as_the_optimizer(options: dict[str, bool]) -> None:
    model = nn.Linear(32, 32, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), **options)
    x = torch.randn(4, 32)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()

    result = count(step)
    assert result.by_phase["forward"] == 2 * 4 * 32 * 32
    assert 8 * 1024 <= result.by_phase["optimizer"] <= 20 * 1024
    # The moments are 3/4 of it, whatever kernel moves them.
    assert result.least_bytes.value == pytest.approx(2 * 4 * 4 * 1024 + 4 * 4 * 32, abs=64)


def test_convolution_by_hand() -> None:
    batch, inputs, outputs, size = 2, 3, 5, 9
    first, second = nn.Conv2d(inputs, outputs, 3, bias=False), nn.Conv2d(outputs, 4, 1, bias=False)
    x = torch.randn(batch, inputs, size, size)
    result = count(lambda: second(first(x)).sum().backward())
    one = 2 * batch * (size - 2) ** 2 * outputs * inputs * 9
    two = 2 * batch * (size - 2) ** 2 * 4 * outputs
    assert result.by_phase == {"forward": one + two, "backward": one + 2 * two, "optimizer": 0.0}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cpu_by_hand(causal: bool) -> None:
    batch, heads, length, width = 2, 3, 8, 4
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    result = count(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward())
    pairs = length * (length + 1) // 2 if causal else length * length
    product = 2 * batch * heads * pairs * width
    assert result.by_phase["forward"] == 2 * product
    assert result.by_phase["backward"] == 5 * product
    assert result.missing_ops == ()


def test_cross_attention_agrees_with_the_same_written_as_products() -> None:
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4)
    fused = count(lambda: F.scaled_dot_product_attention(q, k, v))
    plain = count(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v)
    assert fused.flops.value == plain.flops.value == 2 * 2 * 2 * 5 * 7 * 4


@given(st.integers(1, 9), st.integers(1, 9))
def test_causal_fraction_is_that_of_the_mask(rows: int, columns: int) -> None:
    mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    assert formulas.causal_fraction(rows, columns) == pytest.approx(mask.double().mean().item())


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers_by_hand(kind: type[nn.RNNBase], gates: int, layers: int) -> None:
    time, batch, inputs, hidden = 7, 2, 6, 5
    model = kind(inputs, hidden, layers)
    x = torch.randn(time, batch, inputs)
    result = count(lambda: model(x)[0])
    forward = 2 * time * batch * gates * hidden * (inputs + hidden + (layers - 1) * 2 * hidden)
    assert result.flops.value == forward
    trained = count(lambda: model(x)[0].sum().backward())
    # Twice the forward. Where PyTorch composes the layer from products, without the gradients nobody needs: of the
    # data, and of the first hidden state of each layer.
    unneeded = 2 * time * batch * gates * hidden * inputs + layers * 2 * batch * gates * hidden * hidden
    assert trained.by_phase["backward"] == 2 * forward - (0 if kind is nn.LSTM else unneeded)
    assert trained.missing_ops == ()


def test_inference_mode_sees_products_too() -> None:
    model = nn.Linear(4, 8)

    def step() -> None:
        with torch.inference_mode():
            model(torch.ones(3, 4))

    assert count(step).flops.value == 2 * 3 * 4 * 8


def test_accumulation_counts_every_micro_batch() -> None:
    model = nn.Linear(4, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 4)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(3):
            model(x).sum().backward()
        optimizer.step()

    result = count(step)
    assert result.by_phase["forward"] == 3 * 2 * 3 * 4 * 8
    assert result.by_phase["backward"] == 3 * 2 * 3 * 4 * 8
    assert result.by_phase["optimizer"] > 0


def test_mixed_dtypes_are_told_apart() -> None:
    a, b = torch.randn(4, 4), torch.randn(8, 8, dtype=torch.bfloat16)
    result = count(lambda: (a @ a, b @ b))
    assert result.by_dtype == {"float32": 2 * 64, "bfloat16": 2 * 512}
    assert result.dtype == "bfloat16"


def test_a_custom_operation_makes_the_count_a_lower_bound() -> None:
    @torch.library.custom_op("upshift_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.randn(4, 4)
    result = count(lambda: twice(x) @ x)
    assert result.missing_ops == ("upshift_test::twice",)
    assert result.flops.basis == "estimated" and result.flops.value == result.flops.low and result.flops.high is None
    assert "lower bound" in result.note and "upshift_test::twice" in result.note


def test_linear_algebra_without_formula_is_named() -> None:
    x = torch.eye(4)
    assert any("linalg" in name for name in count(lambda: torch.linalg.solve(x, x)).missing_ops)


def test_views_move_nothing_and_expanded_tensors_are_in_memory_once() -> None:
    x = torch.randn(100)
    assert count(lambda: x.view(10, 10).t().expand(5, 10, 10)).bytes_moved.value == 0
    wide = x[:10].expand(1000, 10)
    result = count(lambda: wide.clone())
    assert result.bytes_moved.value == 40 + 40_000
    assert result.least_bytes.value == 40


def test_reading_rows_of_a_table_is_not_reading_the_table() -> None:
    table, rows = torch.randn(100_000, 8), torch.arange(4)
    result = count(lambda: F.embedding(rows, table))
    assert result.bytes_moved.value == 2 * (4 * 8 * 4) + 4 * 8
    assert result.least_bytes.value == 4 * 8 * 4 + 4 * 8


def test_the_result_is_the_same_with_and_without_counting() -> None:
    def train(counted: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        counter = StepCounter()
        for i in range(4):
            if counted and i == 1:
                counter.start()
            optimizer.zero_grad()
            model(torch.randn(5, 3, 6, 6)).square().mean().backward()
            optimizer.step()
            if counted and i == 1:
                assert counter.stop().flops.known
        return [p.detach().clone() for p in model.parameters()]

    for left, right in zip(train(True), train(False), strict=True):
        assert torch.equal(left, right)


def test_started_and_stopped_in_step_hooks_of_different_frames() -> None:
    model = nn.Linear(4, 8, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    counter, results, seen = StepCounter(), [], 0

    def hook(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            counter.start()
        elif seen == 3:
            results.append(counter.stop())

    optimizer.register_step_post_hook(hook)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    (result,) = results
    assert result.by_phase["forward"] == result.by_phase["backward"] == 2 * 3 * 4 * 8
    assert result.by_phase["optimizer"] > 0


def test_stop_without_start_and_from_another_thread_are_unknown() -> None:
    counter = StepCounter()
    assert counter.stop() == nothing_counted("no step was counted")
    assert counter.start() and not counter.start()
    found: list[StepCount] = []
    thread = threading.Thread(target=lambda: found.append(counter.stop()))
    thread.start()
    thread.join()
    assert not found[0].flops.known and "another thread" in found[0].note
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.stop().flops.value == 16


def test_a_mode_of_the_script_is_left_in_place() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.ones(2, 2)
    theirs = FlopCounterMode(display=False)
    counter = StepCounter()
    with theirs:
        assert not counter.start()
    assert counter.start()
    with theirs:
        x @ x
        result = counter.stop()
        assert len(_get_current_dispatch_mode_stack()) == 1
        x @ x
    assert result.flops.value == 16
    assert theirs.get_total_flops() == 32


def test_an_error_of_the_script_passes_through() -> None:
    counter = StepCounter()
    counter.start()
    with pytest.raises(RuntimeError):
        torch.ones(2, 3) @ torch.ones(2, 3)
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.stop().flops.value == 16


def test_nothing_of_the_script_is_kept_alive() -> None:
    import weakref

    counter = StepCounter()
    counter.start()
    x = torch.ones(8, 8)
    reference = weakref.ref(x)
    x @ x
    counter.stop()
    del x
    gc.collect()
    assert reference() is None


# -- the floor -------------------------------------------------------------------------------------------------------


def q(value: float, unit: str = "FLOP/s", low: float | None = None, high: float | None = None) -> Peak:
    return Peak(value=value, unit=unit, low=low, high=high, n=9)


def peaks(**flops: Peak) -> Peaks:
    return Peaks(
        device="cpu",
        device_name="X",
        created="now",
        torch="2",
        threads=1,
        cores=1,
        flops=flops,
        bandwidth=q(1e9, "B/s", 0.5e9, 2e9),
    )


def counted(flops: float = 1e9, dtype: str = "float32") -> StepCount:
    return StepCount(
        flops=Quantity(value=flops, unit="FLOP", n=1),
        bytes_moved=Quantity(value=5e6, unit="B", n=1),
        least_bytes=Quantity(value=1e6, unit="B", n=1),
        by_phase={},
        missing_ops=(),
        dtype=dtype,
    )


STEP = Quantity(value=0.1, unit="s", low=0.08, high=0.125, n=30)


def test_floor_and_mfu_with_intervals() -> None:
    found = floor(counted(), STEP, peaks(float32=q(1e11, low=0.8e11, high=1.25e11), bfloat16=q(4e11)))
    assert found.mfu.value == pytest.approx(1e9 / (0.1 * 1e11))
    assert found.mfu.low == pytest.approx(1e9 / (0.125 * 1.25e11))
    assert found.mfu.high == pytest.approx(1e9 / (0.08 * 0.8e11))
    assert found.mfu.basis == "measured"
    assert (found.best_dtype, found.best_peak_flops.value) == ("bfloat16", 4e11)
    assert found.arithmetic_floor.value == pytest.approx(1e9 / 4e11)
    assert found.bandwidth_floor.value == pytest.approx(1e6 / 1e9)
    assert found.bandwidth_floor.low == pytest.approx(1e6 / 2e9)
    assert (found.bytes_moved.value, found.bytes_moved.high) == (1e6, 5e6)
    assert "float32: 10 ms" in found.note


@pytest.mark.parametrize(
    ("dtype", "best"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64"), ("float16", "float32")],
)
def test_the_best_dtype_is_measured_not_assumed(dtype: str, best: str) -> None:
    slow = peaks(float32=q(1e11), bfloat16=q(1e9), float16=q(1e10), float64=q(5e10))
    assert floor(counted(dtype=dtype), STEP, slow).best_dtype == best


def test_float16_is_never_proposed() -> None:
    assert floor(counted(), STEP, peaks(float32=q(1e11), float16=q(9e11))).best_dtype == "float32"


def test_unknown_stays_unknown() -> None:
    nothing = floor(nothing_counted("no step was counted"), STEP, peaks(float32=q(1e11)))
    for item in (nothing.flops, nothing.mfu, nothing.arithmetic_floor, nothing.bandwidth_floor, nothing.bytes_moved):
        assert item.value is None and item.basis == "unknown"
    assert "no step was counted" in nothing.note
    no_peak = floor(counted(dtype="int8"), STEP, peaks())
    assert no_peak.mfu.value is None and no_peak.arithmetic_floor.value is None
    assert no_peak.bandwidth_floor.value is not None and "int8" in no_peak.note
    no_step = floor(counted(), unknown("s"), peaks(float32=q(1e11)))
    assert no_step.mfu.value is None and no_step.arithmetic_floor.value is not None


def test_a_lower_bound_is_not_called_measured() -> None:
    lower = msgspec.structs.replace(
        counted(), flops=Quantity(value=1e9, unit="FLOP", low=1e9, basis="estimated"), note="lower bound: no formula"
    )
    found = floor(lower, STEP, peaks(float32=q(1e11, low=1e11, high=1e11)))
    assert found.mfu.basis == "estimated" and found.mfu.high is None and found.mfu.low is not None
    assert found.note.startswith("lower bound")


def test_a_peak_probed_on_a_busy_machine_is_an_estimate_without_upper_end() -> None:
    busy = msgspec.structs.replace(peaks(float32=q(1e11, low=0.8e11, high=1.25e11)), busy=True)
    found = floor(counted(), STEP, busy)
    assert found.peak_flops.basis == found.mfu.basis == found.bandwidth.basis == "estimated"
    assert found.peak_flops.high is None and found.mfu.low is None and found.mfu.high is not None


def test_above_the_peak_is_said() -> None:
    assert "above 100 %" in floor(counted(1e12), STEP, peaks(float32=q(1e11))).note


positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, positive, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_a_quotients_interval_holds_every_quotient(
    a: float, da: float, b: float, db: float, x: float, y: float
) -> None:
    top = Quantity(value=a + da / 2, unit="1", low=a, high=a + da)
    bottom = Quantity(value=b + db / 2, unit="1", low=b, high=b + db)
    found = quotient(top, bottom, "1")
    assert found.low is not None and found.high is not None
    inside = (a + x * da) / (b + y * db)
    assert found.low * (1 - 1e-12) <= inside <= found.high * (1 + 1e-12)


@pytest.mark.cuda
def test_cuda_step_counts_as_on_cpu() -> None:
    counts = []
    for device in ("cpu", "cuda"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
        x = torch.randn(5, 8, device=device)
        counts.append(count(lambda m=model, i=x: m(i).sum().backward()))
    assert counts[0].by_phase == counts[1].by_phase
