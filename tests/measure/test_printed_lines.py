"""Which numbers of a printed line are metrics, and the time of a sample in evaluation."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.measure.inference import MOST, InferenceTime
from upshift.measure.metrics import pairs
from upshift.measure.printed import MOST_NAME, is_step_loss, metrics_in

KERAS = "100/100 ━━━━━━━━━━ 3s 12ms/step - accuracy: 0.91 - loss: 0.3 - val_accuracy: 0.92 - val_loss: 0.28"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("Test set: Average loss: 0.0299, Accuracy: 9902/10000 (99%)",
         {"test average loss": 0.0299, "test accuracy": 0.9902}),
        ("Train Epoch: 1 [640/60000 (1%)]\tLoss: 1.7", {}),
        ("step 250: train loss 2.1, val loss 2.2", {"val loss": 2.2}),
        ("iter 10: loss 2.3, time 33.21ms, mfu 1.2%", {}),
        ("epoch 1 test loss 0.5 accuracy 0.9", {"test loss": 0.5, "test accuracy": 0.9}),
        (KERAS, {"accuracy": 0.91, "val accuracy": 0.92, "val loss": 0.28}),
        (" 50%|█████     | 14/28 [00:01<00:01, 10.2it/s, loss=0.53, acc=0.8]", {"acc": 0.8}),
        ("10%|█  | 1/10 [00:01<00:09, 1.2s/it, val_f1=0.3]", {"val f1": 0.3}),
        ("Training: 50%|#####", {}),
        ("Validation DataLoader 0: 100%|███| 5/5 [00:00<00:00, 90.1it/s]", {}),
        ("Epoch 3/10 | Train Loss: 1.2 | Train Acc: 0.5 | Val. Loss: 1.1 |  Val. Acc: 0.6",
         {"train acc": 0.5, "val loss": 1.1, "val acc": 0.6}),
        ("epoch 3: train loss 0.5 acc 0.8 | val loss 0.4 acc 0.9", {"train acc": 0.8, "val loss": 0.4, "val acc": 0.9}),
        ("2026-01-01 10:00:00,123 INFO train: epoch=3 val_acc=0.93", {"val acc": 0.93}),
        ("{'eval_loss': 0.5, 'eval_accuracy': 0.9, 'epoch': 1.0}", {"eval loss": 0.5, "eval accuracy": 0.9}),
        ('{"epoch": 1, "val": {"acc": 0.9}, "ok": true}', {"val acc": 0.9}),
        ("│         test_acc          │    0.9876     │", {"test acc": 0.9876}),
        ("|    ep_rew_mean     | 21.4     |", {"ep rew mean": 21.4}),
        ("Episode 10\tLast reward: 15.00\tAverage reward: 10.25", {"last reward": 15.0, "average reward": 10.25}),
        ("\x1b[32mval acc\x1b[0m: 0.9", {"val acc": 0.9}),
        ("Test: [ 10/196]\tTime  0.1 ( 0.2)\tLoss 5.0e-01 (6.0e-01)", {"running test loss": 0.5}),
        ("Epoch [1/5], Step [100/600], Loss: 0.1, Acc: 0.9", {"running acc": 0.9}),
        ("Accuracy of the network on the 10000 test images: 55 %", {"test accuracy": 55.0}),
        ("password 1234 api_key=77 val_acc 0.5", {"val acc": 0.5}),
        ("lr 0.01, 12.5 samples/s, memory 3.2 GB, epoch 4", {}),
    ],
)  # fmt: skip
def test_lines_as_scripts_print_them(line, found):
    assert metrics_in(line) == found


def test_after_an_evaluation_a_loss_counts():
    line = "step 250: train loss 2.1, val loss 2.2"
    assert metrics_in(line, evaluated=True) == {"train loss": 2.1, "val loss": 2.2}
    assert metrics_in("loss 0.5") == {} and metrics_in("loss 0.5", losses_known=False) == {"loss": 0.5}


def test_a_value_that_is_not_finite_is_told():
    assert math.isnan(metrics_in("epoch 2 val loss nan")["val loss"])


def test_names_that_stand_for_the_loss_of_a_step():
    assert all(map(is_step_loss, ("loss", "Train Loss", "loss_g", "running/loss")))
    assert not any(map(is_step_loss, ("val loss", "test_average_loss", "accuracy", "glossary")))


def test_a_name_twice_in_a_line_keeps_its_own_part():
    assert pairs("val_loss: 0.4 - loss: 0.5") == [("val_loss", 0.4), ("loss", 0.5)]


@given(st.text(max_size=600))
def test_no_line_upsets_it_and_nothing_but_short_names_and_numbers_comes_out(line):
    for name, value in metrics_in(line, evaluated=True).items():
        assert isinstance(value, float) and 0 < len(name) <= MOST_NAME
        assert name == name.lower() and all(word.isalnum() and word.isascii() for word in name.split())


@given(st.floats(-1e6, 1e6, allow_nan=False), st.sampled_from(["{}", "{}: {}", "epoch 3 {} = {}", "({} -> {})"][1:]))
def test_a_value_comes_back_as_it_was_printed(value, form):
    assert metrics_in(form.format("val_accuracy", f"{value:.6f}")) == {"val accuracy": float(f"{value:.6f}")}


# -- inference ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 10_000)), min_size=1, max_size=40))
def test_the_time_of_a_sample_is_the_median_without_the_first(evaluations):
    timed = InferenceTime()
    for seconds, samples in evaluations:
        timed.add(seconds, samples)
    each = [seconds / samples for seconds, samples in evaluations]
    kept = each[1:] if len(each) >= 3 else each
    found = timed.found
    assert found.value == pytest.approx(statistics.median(kept), rel=1e-12)
    assert (found.n, found.unit, found.basis) == (len(kept), "s", "measured")
    assert found.low is None or found.low <= found.value <= found.high
    assert timed.evaluations == len(evaluations) and "a sample" in timed.told


@pytest.mark.parametrize("samples", [0, -1, math.nan])
def test_without_samples_it_is_unknown(samples):
    timed = InferenceTime()
    timed.add(1.0, samples)
    assert timed.found is None and timed.told == "" and timed.evaluations == 1


def test_a_long_run_keeps_few_of_them_from_all_of_it():
    timed = InferenceTime()
    for at in range(100_000):
        timed.add(float(at), 1)
    assert timed.found.n <= MOST and timed.found.value == pytest.approx(50_000, rel=0.05)
