"""Metrics over an evaluation, against the whole data at once in float64, however it is cut and shared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.engine.metrics import Mean, Metrics, accuracy, negative_log_likelihood
from upshift.errors import MissingExtraError, UsageError


class Rank:
    """One of the ranks: adds what the others would have sent."""

    def __init__(self, others=()):
        self.others, self.sent = others, None

    def sum(self, values):
        self.sent = values
        return [math.fsum(column) for column in zip(values, *(other.sent for other in self.others), strict=True)]


def cuts(n, sizes):
    """Slices of 0..n of the sizes, again and again."""
    start, at = 0, 0
    while start < n:
        size = sizes[at % len(sizes)]
        yield slice(start, min(n, start + size))
        start, at = start + size, at + 1


DECLARED = {
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "pair": lambda output, target: (output.argmax(1).eq(target).sum(), len(target)),
    "each": lambda output, target: output.softmax(1)[torch.arange(len(target)), target],
    "mean": lambda output, target: torch.nn.functional.cross_entropy(output, target),
    "number": lambda output, target: target.float().mean().item(),
}


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4),
    world=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_cut_over_any_number_of_ranks_is_the_whole_at_once(n, sizes, world, seed):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (n,), generator=generator)
    log_p = output.log_softmax(1)[torch.arange(n), target]
    expected = {
        "accuracy": output.argmax(1).eq(target).double().mean(),
        "perplexity": (-log_p).mean().exp(),
        "pair": output.argmax(1).eq(target).double().mean(),
        "each": log_p.exp().mean(),
        "mean": -log_p.mean(),
        "number": target.double().mean(),
    }
    ranks = [Rank() for _ in range(world)]
    metrics = [Metrics(DECLARED, rank) for rank in ranks]
    for at, part in enumerate(cuts(n, sizes)):
        metrics[at % world].update(output[part], target[part], part.stop - part.start)
    for each in metrics:
        each.update(output[:1], target[:1], 0)  # a rank without a share repeats a sample, which does not count
    for each in metrics[1:]:
        each.compute()
    ranks[0].others = ranks[1:]
    found = metrics[0].compute()
    assert list(found) == list(DECLARED)
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-7 if name == "number" else 1e-12), name
        assert type(found[name]) is float


def test_sums_do_not_lose_small_shares():
    metrics = Metrics({"mean": lambda output, target: output})
    values = torch.full((4096,), 1.0 + 2**-20)
    for _ in range(64):
        metrics.update(values, None, 4096)
    # in float32 sums this large the last bits would be gone
    assert metrics.compute()["mean"] == 1.0 + 2**-20


def test_reset_forgets():
    metrics = Metrics({"accuracy": "accuracy"})
    metrics.update(torch.eye(3), torch.tensor([0, 1, 1]), 3)
    assert metrics.compute()["accuracy"] == pytest.approx(2 / 3)
    metrics.reset()
    assert math.isnan(metrics.compute()["accuracy"]), "nothing was seen, which is not zero"
    metrics.update(torch.eye(3), torch.tensor([0, 1, 2]), 3)
    assert metrics.compute()["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "right", "count"),
    [
        (torch.eye(3), torch.tensor([0, 1, 1]), 2, 3),
        (torch.eye(3), torch.eye(3)[[0, 2, 2]], 2, 3),
        (torch.eye(4)[:, :3].view(1, 4, 3), torch.tensor([[0, 1, 0]]), 2, 3),  # (n, C, d)
        (torch.eye(4)[:3].view(1, 3, 4), torch.tensor([[0, 3, -100]]), 1, 2),  # (n, T, C), one left out
        (torch.tensor([0.3, -0.2, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 1, 3),
        (torch.tensor([[0.3], [-0.2]]), torch.tensor([True, False]), 2, 2),
    ],
)
def test_accuracy_of_every_shape(logits, labels, right, count):
    found = accuracy(logits, labels)
    assert [int(item) for item in found] == [right, count]


def test_as_many_classes_as_positions_is_refused_and_not_guessed():
    with pytest.raises(UsageError, match="which axis"):
        accuracy(torch.zeros(1, 3, 3), torch.tensor([[0, 1, 0]]))


def test_outputs_and_targets_of_other_kinds():
    logits, labels = torch.eye(3), torch.tensor([0, 1, 1])
    for output in (logits, {"logits": logits}, (logits, None), type("Output", (), {"logits": logits})()):
        for target in (labels, {"x": None, "labels": labels}):
            assert int(accuracy(output, target)[0]) == 2
    with pytest.raises(UsageError, match="no logits"):
        accuracy({"scores": logits}, labels)
    with pytest.raises(UsageError, match="no labels"):
        accuracy(logits, {"x": labels})
    with pytest.raises(UsageError, match="do not fit"):
        accuracy(logits, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(UsageError, match="do not fit"):
        accuracy(torch.zeros(3), torch.zeros(2))


def test_perplexity_counts_tokens_not_batches():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 6))
    labels[0, 1:] = -100  # one token in the first row, six in the second
    metrics = Metrics({"perplexity": "perplexity"})
    for row in range(2):
        metrics.update(logits[row : row + 1], labels[row : row + 1], 1)
    kept = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[kept], labels[kept]).exp()
    assert metrics.compute()["perplexity"] == pytest.approx(float(expected), rel=1e-12)
    total, count = negative_log_likelihood(logits.bfloat16(), labels)
    assert total.dtype == torch.float64 and int(count) == 7


def test_the_last_step_of_a_mean():
    rmse = Mean(lambda output, target: (output - target) ** 2, then=math.sqrt)
    metrics = Metrics({"rmse": rmse, "huge": Mean(lambda output, target: output * 0 + 1e4, then=math.exp)})
    for values in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])):
        metrics.update(values, torch.zeros_like(values), len(values))
    found = metrics.compute()
    assert found["rmse"] == pytest.approx(math.sqrt(30 / 4))
    assert found["huge"] == math.inf


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("f1", "not a built-in"),
        (3, "not a metric"),
        (lambda a, b, c: 0, "neither"),
        (lambda: 3, "builds a int|torchmetrics"),
    ],
)
def test_what_is_no_metric_is_refused(item, words):
    with pytest.raises((UsageError, MissingExtraError), match=words) as error:
        Metrics({"it": item})
    assert error.value.remedy


@pytest.mark.parametrize("value", [torch.zeros(2), "0.5", (1, 2, 3), torch.zeros(0)])
def test_a_result_that_cannot_be_averaged_is_refused(value):
    with pytest.raises(UsageError, match="one mean"):
        Metrics({"it": lambda output, target: value}).update(torch.zeros(3), torch.zeros(3), 3)


class Counted(torch.nn.Module):
    """The protocol of torchmetrics, for tests without it."""

    def __init__(self, answer=None):
        super().__init__()
        self.values, self.answer = [], answer

    def clone(self):
        return Counted(self.answer)

    def update(self, output, target):
        self.values.append(output)

    def reset(self):
        self.values.clear()

    def compute(self):
        return self.answer(self.values) if self.answer else torch.cat(self.values).mean()


def test_objects_and_builders_with_the_protocol():
    mine = Counted()
    named = partial(Counted, answer=lambda values: {"top1": torch.tensor(0.5), "n": len(values)})
    metrics = Metrics({"object": mine, "class": Counted, "function": lambda: Counted(), "named": named})
    for values in ([1.0, 2.0], [6.0]):
        metrics.update(torch.tensor(values), torch.tensor(values), len(values))
    assert metrics.compute() == {"object": 3.0, "class": 3.0, "function": 3.0, "named/top1": 0.5, "named/n": 2.0}
    assert not mine.values, "the job's own object is not touched"
    metrics.reset()
    metrics.update(torch.tensor([8.0]), torch.tensor([8.0]), 1)
    assert metrics.compute()["object"] == 8.0
    several = Metrics({"it": Counted(lambda values: torch.zeros(3))})
    several.update(torch.zeros(1), torch.zeros(1), 1)
    with pytest.raises(UsageError, match="gives 3 values"):
        several.compute()


@pytest.mark.extra
def test_torchmetrics_objects():
    torchmetrics = pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    output, target = torch.randn(50, 4), torch.randint(0, 4, (50,))
    of_class = torchmetrics.classification
    declared = {
        "f1": partial(of_class.MulticlassF1Score, num_classes=4, average="macro"),
        "auroc": of_class.MulticlassAUROC(num_classes=4),
        "both": lambda: torchmetrics.MetricCollection(
            {"top1": of_class.MulticlassAccuracy(4, average="micro"), "top2": of_class.MulticlassAccuracy(4, top_k=2)}
        ),
    }
    metrics = Metrics({**declared, "accuracy": "accuracy"})
    for part in cuts(50, [7, 16]):
        metrics.update(output[part], target[part], part.stop - part.start)
    found = metrics.compute()
    functional = torchmetrics.functional.classification
    assert found["f1"] == pytest.approx(float(functional.multiclass_f1_score(output, target, 4, average="macro")))
    assert found["auroc"] == pytest.approx(float(functional.multiclass_auroc(output, target, 4)))
    assert found["both/top1"] == pytest.approx(found["accuracy"])
    assert set(found) == {"f1", "auroc", "both/top1", "both/top2", "accuracy"}
    assert declared["auroc"].update_count == 0


RANK = """
import json, sys
import torch, torch.distributed as dist
from torchmetrics.classification import MulticlassF1Score
from upshift.engine.metrics import Metrics

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

class Ranks:
    def sum(self, values):
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

torch.manual_seed(0)
output, target = torch.randn(31, 4), torch.randint(0, 4, (31,))
metrics = Metrics({"f1": MulticlassF1Score(4), "accuracy": "accuracy"}, Ranks())
mine = slice(0, 20) if rank == 0 else slice(20, 31)
metrics.update(output[mine], target[mine], mine.stop - mine.start)
print(json.dumps(metrics.compute()))
dist.destroy_process_group()
"""


@pytest.mark.extra
def test_two_processes_have_the_value_of_one(tmp_path):
    torchmetrics = pytest.importorskip("torchmetrics")
    command = [sys.executable, "-c", RANK]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in running]
    torch.manual_seed(0)
    output, target = torch.randn(31, 4), torch.randint(0, 4, (31,))
    f1 = torchmetrics.functional.classification.multiclass_f1_score(output, target, 4)
    assert told[0] == told[1]
    assert told[0]["accuracy"] == int(output.argmax(1).eq(target).sum()) / 31
    assert told[0]["f1"] == pytest.approx(float(f1), rel=1e-6)
