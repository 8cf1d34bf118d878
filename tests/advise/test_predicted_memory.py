"""Predicted memory: exact by hand for known models, monotone, and unknown where something is not known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched_trainings import MIB, work

from upshift.advise import memory
from upshift.records import ModelFacts, OptimizerFacts, ScriptFacts
from upshift.records.stepwork import Moment, StepWork

BYTES = st.floats(0, 1e12)


def facts(parameters: int, optimizer: str, dtype: str = "float32") -> ScriptFacts:
    model = ModelFacts(name="Linear", parameters=parameters, dtypes=(dtype,), device="cpu")
    stepped = OptimizerFacts(name=optimizer, parameters=parameters, tensors=2, device="cpu", dtypes=(dtype,))
    return ScriptFacts(models=(model,), optimizers=(stepped,))


def test_a_linear_layer_with_adam_by_hand() -> None:
    # Linear(1000, 10): 10,010 parameters; weight, gradient and two moments of 4 bytes each, 4,000 bytes a sample kept.
    found = memory.predict(memory.from_facts(facts(10_010, "Adam"), 4000, 8))
    assert found.total.value == 10_010 * 16 + 8 * 4000
    parts = {name: part.value for name, part in found.parts.items()}
    assert parts == {
        "parameters": 40_040, "gradients": 40_040, "optimizer state": 80_080, "buffers": 0, "activations": 32_000,
        "temporaries": 0,
    }  # fmt: skip
    assert found.total.basis == "estimated"


@pytest.mark.parametrize(
    ("name", "dtype", "each"), [("SGD", "float32", 8), ("AdamW", "bfloat16", 8), ("Adam", "float64", 32)]
)
def test_bytes_a_parameter(name: str, dtype: str, each: int) -> None:
    assert memory.predict(memory.from_facts(facts(1000, name, dtype), 0, 1)).total.value == 1000 * each


@pytest.mark.parametrize(
    "name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "SGD"]
)
def test_the_table_of_states_is_what_torch_keeps(name: str) -> None:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1)
    parameter.grad = torch.ones(1000)
    optimizer.step()
    kept = [
        value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    assert memory.state_bytes(name, 1000) == sum(value.numel() * value.element_size() for value in kept)


def test_momentum_and_eight_bits() -> None:
    assert memory.state_bytes("SGD", 1000, momentum=True) == 4000
    assert memory.state_bytes("AdamW8bit", 256) == 2 * (256 + 4)
    assert memory.state_bytes("Nobody", 1000) is None


def test_what_is_unknown_stays_unknown() -> None:
    assert memory.from_facts(facts(10, "Shampoo"), 0, 1) is None
    assert memory.from_facts(facts(10, "Adam", "float8_e4m3fn"), 0, 1) is None
    assert memory.from_facts(ScriptFacts(), 0, 1) is None
    for found in (
        memory.predict(None),
        memory.predict(work(batch=None), batch=4),
        memory.predict(work(), optimizer="Shampoo"),
        memory.predict(work(moments=(), moments_low=())),
        memory.predict(work(), precision="fp32", autocast=True),
    ):
        assert found.total.value is None and found.total.basis == "unknown" and found.why and not found.parts
    assert memory.largest_batch(None, 1e9).value is None
    assert memory.largest_batch(work(), None).value is None
    assert memory.largest_batch(work(moments=(Moment(1.0, 0.0),)), 1e12).value is None  # nothing grows


def test_the_highest_moment_changes_with_the_samples() -> None:
    # State 1200 MiB. One sample: the optimizer's 600; 32: the forward pass's 640; 256: 8 x 640.
    assert memory.predict(work(), batch=1).total.value == 1800 * MIB
    assert memory.predict(work()).total.value == (1200 + 400 + 320) * MIB
    assert memory.predict(work(), batch=256).total.value == (1200 + 8 * 640) * MIB


def test_lower_precision_and_another_optimizer() -> None:
    assert memory.predict(work(), batch=256, precision="bf16").total.value == (1200 + 200 + 8 * 320) * MIB
    # Seen under autocast already: nothing is halved twice.
    assert memory.predict(work(), batch=256, precision="bf16", autocast=True).total.value == (1200 + 8 * 640) * MIB
    assert memory.predict(work(), batch=1, optimizer="SGD").total.value == 1000 * MIB


def test_an_accelerator_has_a_context_and_an_allocator() -> None:
    plain, device = memory.predict(work()), memory.predict(work(), accelerator=True)
    assert device.total.or_else(0) == pytest.approx(plain.total.or_else(0) * 1.05 + 0.5e9)
    assert {"context", "allocator"} <= device.parts.keys()


moments = st.lists(st.builds(Moment, BYTES, BYTES), min_size=1, max_size=6).map(tuple)
works = st.builds(
    StepWork, device=st.just("cpu"), batch=st.integers(1, 4096), parameters=BYTES, gradients=BYTES, buffers=BYTES,
    optimizer_state=BYTES, moments=moments, moments_low=moments,
)  # fmt: skip


@given(works, st.integers(1, 10**6), st.integers(1, 10**6), st.booleans())
def test_more_samples_never_take_less(found: StepWork, one: int, other: int, accelerator: bool) -> None:
    fewer, more = sorted((one, other))
    small, large = (memory.predict(found, batch=n, accelerator=accelerator).total for n in (fewer, more))
    assert 0 <= small.or_else(-1) <= large.or_else(-1) * (1 + 1e-9)
    assert small.low is not None and small.high is not None
    assert 0 <= small.low <= small.or_else(-1) * (1 + 1e-9) and small.or_else(0) <= small.high * (1 + 1e-9)


@given(works, st.integers(1, 10**6), st.sampled_from(["as it is", "bf16"]))
def test_parts_sum_to_the_total(found: StepWork, batch: int, precision: str) -> None:
    predicted = memory.predict(found, batch=batch, precision=precision, accelerator=True)
    assert sum(part.or_else(-1) for part in predicted.parts.values()) == pytest.approx(predicted.total.or_else(-1))
    assert all(part.or_else(-1) >= 0 for part in predicted.parts.values())


@given(works, st.floats(1e6, 1e13), st.booleans())
def test_the_largest_batch_fits_and_the_next_does_not(found: StepWork, limit: float, accelerator: bool) -> None:
    most = memory.largest_batch(found, limit, accelerator=accelerator)
    if not any(item.scaled >= 1 for item in found.moments):  # less than a byte is nothing
        assert most.value is None
        return
    room = memory.HEADROOM * limit
    assert most.value is not None and most.low is not None and most.high is not None
    assert most.low <= most.value <= most.high
    if 1 <= most.value < 1e9:
        held = memory.predict(found, batch=int(most.value), accelerator=accelerator).total.or_else(0)
        assert held <= room * (1 + 1e-6)
    if most.value < 1e9:
        more = memory.predict(found, batch=int(most.value) + 1, accelerator=accelerator).total.or_else(0)
        assert more >= room * (1 - 1e-6)
