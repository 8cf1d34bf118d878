"""Rules for mistakes in the script itself: loops, precision, graphs, micro-batches, waiting, workers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from built_measurements import PLAIN, anatomy, facts, floor, line, loader, measurement, model, optimizer, q

from upshift.diagnose import registry
from upshift.diagnose.lines import item_by_item, purpose
from upshift.records import Finding, Measurement, unknown

IDLE = floor(flops=q(1e7, "FLOP", 0), arithmetic_floor=q(1e-4), mfu=q(0.001, "fraction"))
BLIND = anatomy({})


def finding(name: str, m: Measurement) -> Finding | None:
    return registry.rule(name)(m)


def speaks(name: str, m: Measurement) -> Finding:
    found = finding(name, m)
    assert found is not None and found.rule == name and found.evidence
    assert found.gain.value is not None and found.gain.low is not None and found.gain.high is not None
    assert found.gain.basis == "estimated" and 1.0 <= found.gain.low <= found.gain.value <= found.gain.high
    return found


@pytest.mark.parametrize(
    ("text", "function", "expected"),
    [
        ("loss.backward()", "main", "compute"),
        ("d_loss = criterion(fake)", "main", "compute"),
        ("log.info('%d %f', step, value.item())", "main", "log"),
        ("os.fsync(file.fileno())", "main", "log"),
        ("table.write(f'{step}')", "main", "log"),
        ("x = torch.stack(parts)", "main", "batch"),
        ("return torch.tensor(ids)", "encode", "batch"),
        ("with self.lock:", "main", "wait"),
        ("time.sleep(0.1)", "main", "wait"),
        ("y = torch.log(x)", "main", ""),
        ("state = state + x", "update", ""),
    ],
)
def test_purpose_of_a_line(text: str, function: str, expected: str) -> None:
    assert purpose(line(text, 0.1, function=function)) == expected


def test_reading_a_value_is_no_cost_of_its_own_on_a_device() -> None:
    assert purpose(line("total += x.item()", 0.1)) == "log"
    assert purpose(line("total += x.item()", 0.1), waits_on_read=True) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distance = points[i] - points[j]", True),
        ("state = cell(x[:, t], state)", True),
        ("out.append(self.step(state))", True),
        ("return torch.tensor([codes[w] for w in words])", True),
        ("for x, y in loader:", False),
        ("x = data[rows]", False),
        ("x = pairs[:, 0]", False),
        ("return self.head(torch.relu(x))", False),
    ],
)
def test_lines_that_handle_one_element_at_a_time(text: str, expected: bool) -> None:
    assert item_by_item(line(text, 0.1)) is expected


LOOP = line("state = cell(x[:, t], state)", 0.3, function="forward", number=20)


def test_python_loop_takes_its_part_of_the_backward_pass_along() -> None:
    found = speaks("python_loop", measurement(lines=(LOOP,), floor=IDLE))
    assert found.edit.endswith(":20") and found.share.value == pytest.approx(0.3 / 0.32 * 0.96)
    assert finding("python_loop", measurement(lines=(LOOP,))) is None  # arithmetic fills the step
    assert finding("python_loop", measurement(lines=(LOOP,), floor=None)) is None
    assert finding("python_loop", measurement(lines=(LOOP,), floor=IDLE, anatomy=BLIND)) is None
    for other in (line("h = self.body(x)", 0.3, function="forward"), line("rows.append(next_batch())", 0.3)):
        assert finding("python_loop", measurement(lines=(other,), floor=IDLE)) is None


WAITS = {**PLAIN, "other": 0.3, "backward": 0.35}


def test_lines_of_a_function_that_the_loop_calls_count_as_one() -> None:
    spread = tuple(line(f"total += tensors[{n}].norm()", 0.04, function="clip", number=n) for n in range(20, 24))
    loop = (line("loss.backward()", 0.4), line("clip(model)", 0.001, number=8))
    found = speaks("slow_loop_line", measurement(anatomy=anatomy(WAITS), lines=(*loop, *spread)))
    assert "4 lines of `clip`" in found.evidence and found.share.value == pytest.approx(0.3, abs=0.01)
    alone = tuple(line(f"work({n})", 0.002, number=n) for n in range(20, 24))
    assert (
        finding(
            "slow_loop_line",
            measurement(anatomy=anatomy({**WAITS, "other": 0.1, "backward": 0.55}), lines=(*loop, *alone)),
        )
        is None
    )  # lines of the training loop itself stay apart


def test_slow_loop_line() -> None:
    lines = (line("loss.backward()", 0.4), line("stats.update(x)", 0.3, number=8))
    found = speaks("slow_loop_line", measurement(anatomy=anatomy(WAITS), lines=lines))
    assert found.edit.endswith(":8") and found.gain.value == pytest.approx(1 / 0.85)
    lock = speaks("slow_loop_line", measurement(anatomy=anatomy(WAITS), lines=(line("with lock:", 0.3),)))
    assert "waits" in lock.title and lock.gain.value == pytest.approx(1 / 0.73)
    both = (line("stats.update(x)", 0.04), line("print(x)", 0.26))
    assert finding("slow_loop_line", measurement(anatomy=anatomy(WAITS), lines=both)) is None
    for text in ("x = torch.stack(a)", "print(x)", "for x, y in loader:"):
        only = measurement(anatomy=anatomy(WAITS), lines=(line(text, 0.3),), facts=facts(loaders=()))
        assert finding("slow_loop_line", only) is None
    assert finding("slow_loop_line", measurement(lines=lines)) is None  # nothing happens outside the phases


def test_tiny_micro_batches() -> None:
    many = anatomy(micro_batches=q(16.0, "batches"))
    found = speaks("tiny_micro_batches", measurement(anatomy=many, floor=IDLE))
    assert "16 micro-batches" in found.evidence and 2.5 < (found.gain.value or 0) < 4
    large = facts(models=(model(input_shapes=((256, 96),)),))
    assert finding("tiny_micro_batches", measurement(anatomy=many, floor=IDLE, facts=large)) is None
    normed = facts(models=(model(layers={"BatchNorm1d": 1}),))
    assert finding("tiny_micro_batches", measurement(anatomy=many, floor=IDLE, facts=normed)) is None
    assert finding("tiny_micro_batches", measurement(anatomy=many)) is None  # they are worth it
    assert finding("tiny_micro_batches", measurement(floor=IDLE)) is None
    assert finding("tiny_micro_batches", measurement(anatomy=many, floor=None)) is None


def test_workers_restarted() -> None:
    shares = {**PLAIN, "data": 0.5, "backward": 0.15}
    short = loader(workers=2, samples=320)
    found = speaks("workers_restarted", measurement(anatomy=anatomy(shares), facts=facts(loaders=(short,))))
    assert "10 batches" in found.evidence and "persistent_workers" in found.helps
    others = (
        loader(workers=0, samples=320),
        loader(workers=2, samples=320, persistent=True),
        loader(workers=2, samples=None),
        loader(workers=2, samples=320_000),  # the start of workers is nothing against such an epoch
        loader(workers=2, samples=320, training=False),
    )
    for other in others:
        assert finding("workers_restarted", measurement(anatomy=anatomy(shares), facts=facts(loaders=(other,)))) is None
    assert finding("workers_restarted", measurement(facts=facts(loaders=(short,)))) is None


def test_dense_embedding_gradient() -> None:
    shares = {**PLAIN, "forward": 0.05, "backward": 0.5, "optimizer": 0.4}
    table = facts(models=(model(layers={"Embedding": 1}),), optimizers=(optimizer(parameters=10_000_000),))
    few = floor(flops=q(2e7, "FLOP", 0))
    found = speaks("dense_embedding_gradient", measurement(anatomy=anatomy(shares), facts=table, floor=few))
    assert found.gain.value == pytest.approx(1 / (1 - 0.4 - 0.4))
    sparse = facts(models=table.models, optimizers=(optimizer(parameters=10_000_000, sparse=True),))
    small = facts(models=table.models, optimizers=(optimizer(parameters=1000),))
    plain = facts(optimizers=table.optimizers)
    for other in (sparse, small, plain):
        assert finding("dense_embedding_gradient", measurement(anatomy=anatomy(shares), facts=other, floor=few)) is None
    used = floor(flops=q(1e9, "FLOP", 0))  # products go through the parameters
    assert finding("dense_embedding_gradient", measurement(anatomy=anatomy(shares), facts=table, floor=used)) is None
    assert finding("dense_embedding_gradient", measurement(anatomy=BLIND, facts=table, floor=few)) is None


def test_needless_graph() -> None:
    m = measurement(facts=facts(create_graph=True))
    assert "create_graph" in speaks("needless_graph", m).helps
    used = line("g = torch.autograd.grad(y.sum(), x, create_graph=True)", 0.1)
    assert finding("needless_graph", measurement(facts=facts(create_graph=True), lines=(used,))) is None
    twice = anatomy(micro_batches=q(2.0, "batches"))
    assert finding("needless_graph", measurement(facts=facts(create_graph=True), anatomy=twice)) is None
    blind = anatomy(micro_batches=unknown("batches"))
    assert finding("needless_graph", measurement(facts=facts(create_graph=True), anatomy=blind)) is None
    assert finding("needless_graph", measurement()) is None


def test_double_forward() -> None:
    once, twice = (floor(by_phase={"forward": count, "backward": 4e9}) for count in (2e9, 4e9))
    found = speaks("double_forward", measurement(floor=twice))
    assert found.gain.value == pytest.approx(1 / (1 - 0.15))
    first_layer_only = floor(by_phase={"forward": 3.4e9, "backward": 4e9})
    for other in (once, first_layer_only, floor(), None):
        assert finding("double_forward", measurement(floor=other)) is None
    for other in (model(trained=False), model(compiled=True)):
        assert finding("double_forward", measurement(floor=twice, facts=facts(models=(model(), other)))) is None
    assert finding("double_forward", measurement(floor=twice, anatomy=anatomy(evaluation=q(1.0)))) is None
    assert finding("double_forward", measurement(floor=twice, anatomy=BLIND)) is None


def test_double_precision() -> None:
    wide = facts(models=(model(dtypes=("float64",)),))
    assert "float32" in speaks("double_precision", measurement(facts=wide)).helps
    assert speaks("double_precision", measurement(floor=floor(dtype="float64")))
    assert finding("double_precision", measurement()) is None
    assert finding("double_precision", measurement(facts=wide, anatomy=BLIND)) is None
    mixed = facts(models=(model(dtypes=("float32", "float64")),))
    assert finding("double_precision", measurement(facts=mixed)) is None


def test_recompiles() -> None:
    again = anatomy({**PLAIN, "forward": 0.8, "backward": 0.1})
    compiled = facts(models=(model(compiled=True),))
    found = speaks("recompiles", measurement(anatomy=again, facts=compiled))
    assert found.gain.value == pytest.approx(1 / (1 - 0.75)) and "dynamic" in found.helps
    assert finding("recompiles", measurement(anatomy=again)) is None
    assert finding("recompiles", measurement(facts=compiled)) is None
    assert finding("recompiles", measurement(facts=compiled, anatomy=BLIND)) is None
