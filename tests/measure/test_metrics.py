"""Metrics are found in what scripts really print and write."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.errors import UsageError
from upshift.measure.metrics import Metric, Reader, direction, pairs, suggestions


def read(metric: str, *lines: str, source: str = "output.txt", regex: str | None = None) -> list[float]:
    reader = Reader(Metric.parse(metric, regex=regex))
    for at, line in enumerate(lines):
        reader.feed(source, line + "\n", float(at))
    return [value for _, value in reader.series()]


@pytest.mark.parametrize(
    ("metric", "line", "value"),
    [
        ("accuracy:max", "Test set: Average loss: 0.0535, Accuracy: 9829/10000 (98%)", 0.9829),
        ("loss:min", "Test set: Average loss: 0.0535, Accuracy: 9829/10000 (98%)", 0.0535),
        ("accuracy", "epoch 1 test accuracy 0.2375 (32 s)", 0.2375),
        ("val loss", "step 250: train loss 1.9123, val loss 2.1000", 2.1),
        ("loss", "step 250: train loss 1.9123, val loss 2.1000", 2.1),
        ("train loss", "step 250: train loss 1.9123, val loss 2.1000", 1.9123),
        ("acc", "Epoch 1/10 - loss: 0.5 - val_acc: 0.8", 0.8),
        ("eval_accuracy", "{'eval_loss': 0.5, 'eval_accuracy': 0.9}", 0.9),
        ("acc@1:max", " * Acc@1 76.130 Acc@5 92.862", 76.13),
        ("ppl", "| end of epoch   1 | time: 53.72s | valid loss  5.41 | valid ppl   223.51", 223.51),
        ("top1:max", "Validation: top1=71.2%, top5=90.1%", 71.2),
        ("accuracy", "valAccuracy=1e-2", 0.01),
        ("accuracy", "Accuracy of the network on the 10000 test images: 55 %", 55.0),
        ("accuracy", "Test Accuracy of the model on the 10,000 test images: 97.31 %", 97.31),
        ("loss", "loss: nan", None),
    ],
)
def test_names_and_values_in_lines(metric, line, value):
    found = read(metric, line)
    assert found == [value] if value is not None else found != found or found[0] != found[0]


def test_places_are_no_measures():
    assert pairs("epoch 3/10") == [] and pairs("Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.3")[-1] == ("train Loss", 2.3)


def test_a_result_comes_before_what_was_printed_on_the_way():
    """As the reference training of ImageNet prints it: batches of training, of the evaluation, then its result."""
    lines = (
        "Epoch: [0][ 10/196]\tTime  0.1 ( 0.2)\tLoss 6.9 (7.0)\tAcc@1   1.00 (  0.50)",
        "Epoch: [0]  [ 20/196]  eta: 0:01:02  lr: 0.1  loss: 6.8 (6.9)  Acc@1: 2.00 (0.60)",
        "Test: [  0/10]\tTime  0.1 ( 0.2)\tLoss 5.0e-01 (6.0e-01)\tAcc@1  40.00 ( 41.00)",
        "Test:  [ 9/10]  eta: 0:00:00  Acc@1: 42.00 (41.50)",
        " * Acc@1 41.530 Acc@5 60.10",
    )
    assert read("acc@1:max", *lines) == [41.53]
    assert read("acc@1:max", *lines[:4]) == [40.0, 42.0]


@pytest.mark.parametrize("head", ["Epoch [3/10]", "Epoch: 3/10", "[3/10]", "Epoch 3/10 |", "epochs: [3/10]"])
def test_the_place_of_an_epoch_is_a_result(head):
    assert pairs(f"{head} acc: 0.9")[-1][0] == "acc"


def test_several_series_of_one_rank_are_refused_and_named():
    with pytest.raises(UsageError, match="'test a loss', 'test b loss'"):
        read("loss:min", "test_a_loss 1.0", "test_b_loss 2.0")


def test_a_metric_that_is_not_there_names_what_is():
    with pytest.raises(UsageError) as caught:
        read("f1:max", "test accuracy 0.5", "test accuracy 0.6", "loss 0.1")
    assert "test accuracy" in caught.value.remedy


def test_regular_expression_takes_its_first_group():
    line = "Accuracy of the network on the 10000 test images: 55 %"
    assert read("accuracy:max", line, regex=r"images: (\d+)") == [55.0]


@pytest.mark.parametrize("text", ["speed", "accuracy:up", ":max"])
def test_a_direction_is_needed(text):
    with pytest.raises(UsageError):
        Metric.parse(text)


@pytest.mark.parametrize("regex", ["(", "no group"])
def test_wrong_expressions_are_refused(regex):
    with pytest.raises(UsageError):
        Metric.parse("accuracy", regex=regex)


def test_csv_by_its_header():
    lines = ("epoch,val_f1,note", "", "0,0.5,a", "", "1,0.75,b", "")  # a writer may end its lines with \r\n
    assert read("val_f1:max", *lines, source="log.csv") == [0.5, 0.75]


def test_a_diverged_value_is_not_left_out():
    assert read("val loss", "epoch,val loss", "0,0.5", "1,inf", source="log.csv") == [0.5, float("inf")]


def test_json_lines_by_dotted_name():
    lines = [json.dumps({"step": i, "eval": {"accuracy": i / 10}, "ok": True}) for i in range(3)]
    assert read("accuracy", *lines) == [0.0, 0.1, 0.2]


@given(chunks=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_lines_may_arrive_in_pieces(chunks):
    text = "epoch 0 test accuracy 0.25\nepoch 1 test accuracy 0.5\nepoch 2 test accuracy 0.75"
    reader = Reader(Metric.parse("accuracy"))
    place = 0
    for at, size in enumerate(chunks):
        reader.feed("out", text[place : place + size], float(at))
        place += size
    reader.feed("out", text[place:], 99.0)
    reader.end(100.0)
    assert [value for _, value in reader.series()] == [0.25, 0.5, 0.75]


@given(st.text(max_size=300))
def test_no_line_upsets_the_reader(line):
    reader = Reader(Metric.parse("accuracy"))
    for source in ("out", "x.csv", "x.jsonl"):
        reader.feed(source, line + "\n", 0.0)


def test_directions_and_suggestions():
    assert direction("val loss") == "min" and direction("top1") == "max" and direction("seconds") is None
    assert suggestions(["train loss", "val loss", "test accuracy", "epoch"]) == ["val loss:min", "test accuracy:max"]
