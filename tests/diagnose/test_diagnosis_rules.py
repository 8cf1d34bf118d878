"""Each rule: speaks where it should, is silent where it should be, and predicts what Amdahl's law allows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from built_measurements import (
    PLAIN,
    anatomy,
    facts,
    floor,
    line,
    loader,
    measurement,
    model,
    optimizer,
    q,
)

from upshift.diagnose import registry
from upshift.records import Finding, Measurement, Quantity, unknown


def finding(name: str, m: Measurement) -> Finding | None:
    return registry.rule(name)(m)


def speaks(name: str, m: Measurement) -> Finding:
    found = finding(name, m)
    assert found is not None and found.rule == name and found.evidence
    gain = found.gain
    if gain.value is not None:
        assert gain.basis == "estimated" and gain.low is not None and gain.high is not None
        assert 1.0 <= gain.low <= gain.value <= gain.high
    return found


STARVED = {**PLAIN, "data": 0.6, "forward": 0.12, "backward": 0.25}


def test_data_starved_on_cpu_shares_the_cores() -> None:
    m = measurement(anatomy=anatomy(STARVED), lines=(line("image = flip(open(path))", 0.5, "data", "__getitem__"),))
    found = speaks("data_starved", m)
    assert found.gain.value == pytest.approx(1 / (0.4 + 0.6 / 4))
    assert found.gain.high == pytest.approx(1 / (1 - 0.63), rel=1e-6)
    assert found.techniques == ("loader", "cache") and found.severity == "major"
    assert "train.py:10" in found.evidence and "60 %" in found.evidence and "Pictures" in found.evidence
    one_core = speaks("data_starved", measurement(anatomy=anatomy(STARVED), facts=facts(cores=1, threads=1)))
    assert one_core.gain.value == pytest.approx(1 / (0.4 + 0.6 / 2)) and "no core is left" in one_core.rests_on


def test_data_starved_by_a_dataset_that_looks_fixed_hopes_for_a_cache() -> None:
    reads = (line("return torch.load(self.files[index])", 0.5, "data", "__getitem__"),)
    found = speaks("data_starved", measurement(anatomy=anatomy(STARVED), lines=reads))
    assert found.gain.value == pytest.approx(1 / (0.4 + 0.06)) and "cache" in found.rests_on
    own_collate = measurement(anatomy=anatomy(STARVED), lines=reads, facts=facts(loaders=(loader(custom_fetch=True),)))
    assert speaks("data_starved", own_collate).gain.value == pytest.approx(1 / (0.4 + 0.6 / 4))


def test_data_starved_with_a_worker_a_core_hopes_for_cheaper_samples() -> None:
    busy = facts(loaders=(loader(workers=4),))
    found = speaks("data_starved", measurement(anatomy=anatomy(STARVED), facts=busy))
    assert found.gain.value == pytest.approx(1 / (0.4 + 0.6 / 2)) and found.gain.low == 1.0


def test_data_starved_on_a_device_hides_the_wait() -> None:
    m = measurement(anatomy=anatomy(STARVED), facts=facts(device="cuda:0"))
    assert speaks("data_starved", m).gain.value == pytest.approx(1 / 0.4)


@pytest.mark.parametrize(
    "m",
    [
        measurement(),
        measurement(anatomy=anatomy({**STARVED, "data": None})),
        measurement(anatomy=anatomy(STARVED), facts=facts(loaders=(loader(training=False),))),
        measurement(anatomy=anatomy(STARVED), facts=facts(loaders=())),
    ],
)
def test_data_starved_is_silent(m: Measurement) -> None:
    assert finding("data_starved", m) is None


BATCH = line("x = torch.stack([torch.from_numpy(data[i:i+n]) for i in ix])", 0.2, function="get_batch")
NO_LOADER = {**PLAIN, "data": None, "other": 0.2, "forward": 0.3, "backward": 0.45}


def test_host_batching() -> None:
    m = measurement(anatomy=anatomy(NO_LOADER), facts=facts(loaders=()), lines=(BATCH,))
    found = speaks("host_batching", m)
    assert found.edit == "/home/u/train.py:10" and found.techniques == ()
    assert found.gain.value == pytest.approx(1 / (0.8 + 0.02))  # a loop over samples
    at_once = line("x = torch.from_numpy(table[rows])", 0.2)
    found = speaks("host_batching", measurement(anatomy=anatomy(NO_LOADER), facts=facts(loaders=()), lines=(at_once,)))
    assert found.gain.value == pytest.approx(1 / (0.8 + 0.1))


@pytest.mark.parametrize(
    ("lines", "loaders"),
    [
        ((BATCH,), (loader(),)),
        ((), ()),
        ((line("x = torch.stack(parts)", 0.01),), ()),
        ((line("loss = model(next_batch())", 0.5),), ()),
        ((line("h = torch.stack(heads)", 0.5, function="forward"),), ()),
        ((line("loss.backward()", 0.5, function="train_batch"),), ()),
    ],
)
def test_host_batching_is_silent(lines, loaders) -> None:
    m = measurement(anatomy=anatomy(NO_LOADER), facts=facts(loaders=loaders), lines=lines)
    assert finding("host_batching", m) is None


def test_host_batching_needs_time_outside_the_model() -> None:
    m = measurement(facts=facts(loaders=()), lines=(BATCH,))
    assert finding("host_batching", m) is None


def test_slow_dataset_line_names_the_line_to_edit() -> None:
    loop = line("for x, y in loader:", 0.3, "data", number=3)
    slow = line("image = augment(Image.open(path))", 0.2, "data", "__getitem__", 42)
    fetched = anatomy({**PLAIN, "data": 0.5, "backward": 0.15})
    found = speaks("slow_dataset_line", measurement(anatomy=fetched, lines=(loop, slow)))
    assert found.edit == "/home/u/train.py:42" and "__getitem__" in found.evidence
    assert found.share.value == pytest.approx(0.2)
    # The clock of the phase is right where the sampler is not.
    missed = speaks("slow_dataset_line", measurement(anatomy=anatomy({**PLAIN, "data": 0.4}), lines=(slow,)))
    assert missed.share.value == pytest.approx(0.4)
    assert finding("slow_dataset_line", measurement(lines=(loop,))) is None
    assert finding("slow_dataset_line", measurement(lines=(line("a = b", 0.04, "data"),))) is None
    assert finding("slow_dataset_line", measurement(lines=(line("a = b", 0.4, "host"),))) is None


FAST = {"best_dtype": "bfloat16", "best_peak_flops": q(4e11, "FLOP/s")}


def test_bf16_is_bounded_by_arithmetic_and_by_forward_and_backward() -> None:
    found = speaks("fp32_where_bf16_is_faster", measurement(floor=floor(**FAST)))
    assert found.gain.low == pytest.approx(1 / (0.5 + 0.5 / 4))
    assert found.gain.high == pytest.approx(1 / (0.06 + 0.94 / 4))
    assert found.techniques == ("bf16",)


@pytest.mark.parametrize(
    "m",
    [
        measurement(),
        measurement(floor=None),
        measurement(floor=floor(**FAST), facts=facts(autocast=True)),
        measurement(floor=floor(**{**FAST, "best_peak_flops": q(1.2e11, "FLOP/s")})),
        measurement(floor=floor(**FAST, dtype="float64")),
        measurement(floor=floor(**{**FAST, "best_peak_flops": unknown("FLOP/s")})),
        measurement(floor=floor(**FAST), anatomy=anatomy({"forward": None, "backward": 0.5})),
    ],
)
def test_bf16_is_silent(m: Measurement) -> None:
    assert finding("fp32_where_bf16_is_faster", m) is None


def test_unfused_optimizer() -> None:
    shares = {**PLAIN, "optimizer": 0.3, "backward": 0.36}
    m = measurement(anatomy=anatomy(shares), facts=facts(optimizers=(optimizer(),)))
    found = speaks("unfused_optimizer", m)
    assert found.gain.value == pytest.approx(1 / (0.7 + 0.03)) and "one tensor at a time" in found.evidence
    # 14 MB of parameters: moving them and their moments takes 15 ms of the optimizer's 30.
    large = facts(optimizers=(optimizer(parameters=3_570_000),))
    found = speaks("unfused_optimizer", measurement(anatomy=anatomy(shares), facts=large))
    assert found.gain.value == pytest.approx(1 / (0.7 + 0.15), rel=0.01)
    unprobed = speaks("unfused_optimizer", measurement(anatomy=anatomy(shares), facts=large, floor=None))
    assert unprobed.gain.value == pytest.approx(1 / (0.7 + 0.15))
    grouped = facts(optimizers=(optimizer(foreach=True),))
    assert speaks("unfused_optimizer", measurement(anatomy=anatomy(shares), facts=grouped)).gain.value < (
        found.gain.value or 0
    )
    for other in (optimizer(fused=True), optimizer(name="LBFGS"), optimizer(closure=True), optimizer(sparse=True)):
        silent = measurement(anatomy=anatomy(shares), facts=facts(optimizers=(other,)))
        assert finding("unfused_optimizer", silent) is None
    assert finding("unfused_optimizer", measurement(facts=facts(optimizers=(optimizer(),)))) is None
    hidden = anatomy({**shares, "optimizer": None})
    assert finding("unfused_optimizer", measurement(anatomy=hidden, facts=facts(optimizers=(optimizer(),)))) is None


def test_conv_layout() -> None:
    convolutions = {"Conv2d": 5, "Linear": 1}
    assert "5 2-D" in speaks("conv_layout", measurement(facts=facts(models=(model(layers=convolutions),)))).evidence
    for other in (model(), model(layers=convolutions, channels_last=True), model(layers=convolutions, trained=False)):
        assert finding("conv_layout", measurement(facts=facts(models=(other,)))) is None
    small = anatomy({**PLAIN, "forward": 0.05, "backward": 0.1, "data": 0.8})
    assert finding("conv_layout", measurement(anatomy=small, facts=facts(models=(model(layers=convolutions),)))) is None


def test_attention_kernel() -> None:
    assert speaks("attention_kernel", measurement(facts=facts(attention=True))).techniques == ("attention",)
    assert finding("attention_kernel", measurement()) is None
    blind = anatomy({"optimizer": 0.2})
    assert finding("attention_kernel", measurement(anatomy=blind, facts=facts(attention=True))) is None


FAR = floor(flops=q(1e9, "FLOP", 0), mfu=q(0.1, "fraction"), arithmetic_floor=q(0.01))


def test_compile_candidate() -> None:
    found = speaks("compile_candidate", measurement(floor=FAR, facts=facts(steps_total=3000)))
    assert "3,000 steps" in found.evidence and found.gain.low == 1.0
    deep = facts(models=(model(layers={"Linear": 300}),))
    small = speaks("compile_candidate", measurement(floor=FAR, facts=deep))
    assert "small operations" in small.title and (small.gain.value or 0) > (found.gain.value or 9)
    assert finding("compile_candidate", measurement()) is None  # within twice its floor
    assert finding("compile_candidate", measurement(floor=FAR, facts=facts(compiler=False))) is None
    assert finding("compile_candidate", measurement(floor=FAR, facts=facts(models=(model(compiled=True),)))) is None
    assert finding("compile_candidate", measurement(floor=floor(flops=unknown("FLOP")))) is None
    assert finding("compile_candidate", measurement(floor=None)) is None
    gpu = facts(device="cuda:0", compiler=False)
    assert speaks("compile_candidate", measurement(floor=FAR, facts=gpu))


def test_small_batch_overhead() -> None:
    tiny = floor(flops=q(1e7, "FLOP", 0), arithmetic_floor=q(1e-4), mfu=q(0.001, "fraction"))
    found = speaks("small_batch_overhead", measurement(floor=tiny))
    assert "changes training" in found.helps and found.edit == "train.py" and found.techniques == ()
    assert finding("small_batch_overhead", measurement()) is None
    slow = anatomy(step=q(3.0))
    assert finding("small_batch_overhead", measurement(floor=tiny, anatomy=slow)) is None
    assert finding("small_batch_overhead", measurement(floor=tiny, anatomy=anatomy(STARVED))) is None
    busy = floor(flops=q(1e7, "FLOP", 0), bandwidth_floor=q(0.05))
    assert finding("small_batch_overhead", measurement(floor=busy)) is None
    fed = [facts(models=(model(input_shapes=((size, 48),)),)) for size in (2, 512)]
    assert speaks("small_batch_overhead", measurement(floor=tiny, facts=fed[0])).gain.value == pytest.approx(
        2, rel=0.05
    )
    assert finding("small_batch_overhead", measurement(floor=tiny, facts=fed[1])) is None


def test_sync_per_step() -> None:
    shares = {**PLAIN, "sync": 0.2, "backward": 0.44}
    gpu = facts(device="cuda:0")
    syncs = (line("total += loss.item()", 0.15, "sync", number=88), line("print(x)", 0.05, "sync"))
    found = speaks("sync_per_step", measurement(anatomy=anatomy(shares), facts=gpu, syncs=syncs))
    assert found.edit == "/home/u/train.py:88" and "loss.item()" in found.evidence
    assert finding("sync_per_step", measurement(anatomy=anatomy(shares), syncs=syncs)) is None  # on CPU
    assert finding("sync_per_step", measurement(anatomy=anatomy(shares), facts=gpu)) is None
    unsplit = measurement(facts=gpu, syncs=syncs)
    assert speaks("sync_per_step", unsplit).share.value == 0.15


def test_logging_each_step() -> None:
    lines = (line("print(f'{i} {loss.item():.3f}')", 0.06, number=7), line("writer.add_scalar('loss', v)", 0.04))
    loud = anatomy({**PLAIN, "other": 0.1, "backward": 0.55})
    found = speaks("logging_each_step", measurement(anatomy=loud, lines=lines))
    assert found.share.value == pytest.approx(0.1) and found.edit.endswith(":7") and "1 more" in found.evidence
    for text, share in (("print(x)", 0.02), ("loss.backward(); print(1)", 0.5), ("out = model(x).numpy()", 0.5)):
        assert finding("logging_each_step", measurement(lines=(line(text, share),))) is None
    waiting = measurement(lines=(line("total += loss.item()", 0.5),), facts=facts(device="cuda:0"))
    assert finding("logging_each_step", waiting) is None  # it waits for the device: that is no cost of its own


@pytest.mark.parametrize(
    ("rule", "field"), [("evaluation_too_often", "evaluation"), ("checkpoint_too_often", "checkpointing")]
)
def test_time_beside_the_steps(rule: str, field: str) -> None:
    # 100 steady steps of 0.1 s and a second of warm-up: 11 s of training.
    found = speaks(rule, measurement(anatomy=anatomy(**{field: q(11.0)})))
    assert found.share.value == pytest.approx(0.5)
    assert found.gain.value == pytest.approx(1 / 0.75) and "whole run" in found.rests_on
    assert finding(rule, measurement(anatomy=anatomy(**{field: q(0.1)}))) is None
    assert finding(rule, measurement(anatomy=anatomy(**{field: unknown("s")}))) is None
    assert finding(rule, measurement(anatomy=anatomy(**{field: q(11.0)}, step=unknown("s")))) is None


def test_one_save_is_no_rhythm() -> None:
    once = Quantity(value=11.0, unit="s", n=1)
    assert finding("checkpoint_too_often", measurement(anatomy=anatomy(checkpointing=once))) is None


def test_allocator_churn() -> None:
    big = floor(bytes_moved=Quantity(value=1e6, unit="B", low=1e6, high=2e9, n=1))
    assert speaks("allocator_churn", measurement(floor=big)).techniques == ("allocator",)
    assert finding("allocator_churn", measurement()) is None
    for other in (facts(allocator="tcmalloc"), facts(allocator=""), facts(device="cuda:0")):
        assert finding("allocator_churn", measurement(floor=big, facts=other)) is None


def test_threads_mismatch() -> None:
    few = speaks("threads_mismatch", measurement(facts=facts(threads=1, cores=4), floor=FAR))
    busy = speaks("threads_mismatch", measurement(facts=facts(threads=1, cores=4)))
    assert (few.gain.value or 0) < (busy.gain.value or 0)  # products scale best
    assert few.gain.high == pytest.approx(1 / (1 - 0.987 + 0.987 / 4), rel=1e-3)
    assert "fit" in speaks("threads_mismatch", measurement(facts=facts(threads=16, cores=4))).helps
    blind = measurement(anatomy=anatomy({}), facts=facts(threads=16, cores=4))
    assert speaks("threads_mismatch", blind).gain.value is None
    for other in (facts(), facts(threads=0), facts(cores=0), facts(threads=1, device="cuda:0")):
        assert finding("threads_mismatch", measurement(facts=other)) is None


def test_startup_dominates() -> None:
    short = facts(steps_total=60)  # 3 s before 5 s of steps
    assert speaks("startup_dominates", measurement(facts=short)).share.value == pytest.approx(3 / 8)
    for other in (facts(steps_total=10_000), facts(steps_total=None)):
        assert finding("startup_dominates", measurement(facts=other)) is None
    assert finding("startup_dominates", measurement(anatomy=anatomy(startup=unknown("s")), facts=short)) is None


def test_near_floor_is_a_note_not_a_promise() -> None:
    near = measurement(floor=floor(arithmetic_floor=q(0.08)))
    found = speaks("near_floor", near)
    assert found.severity == "note" and found.gain.value == 1.0 and "Nothing much" in found.title
    assert speaks("near_floor", measurement(floor=floor(bandwidth_floor=q(0.09))))
    too_low = floor(arithmetic_floor=q(0.08), best_peak_flops=Quantity(value=1e10, unit="FLOP/s", basis="estimated"))
    above = floor(arithmetic_floor=q(0.2))  # no step beats its floor: the peak is wrong
    for other in (floor(), too_low, above, floor(arithmetic_floor=unknown("s"), bandwidth_floor=unknown("s")), None):
        assert finding("near_floor", measurement(floor=other)) is None
