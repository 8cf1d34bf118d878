"""What does not fit together in a job is said at its first batch, with shapes and the line."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from upshift import Job, Weighted
from upshift.cli import job as entry
from upshift.engine.firstbatch import shapes
from upshift.engine.run import train_job
from upshift.engine.settings import Execution
from upshift.errors import UsageError
from upshift.hook.horizon import Horizon

X, Y = torch.randn(12, 4), torch.arange(12) % 3
GIVEN = r"It gets the output float32\[4, 3\] and the target int64\[4\]"


def job(**changes):
    made = Job(model=lambda: torch.nn.Linear(4, 3), train_data=(X, Y), loss=F.cross_entropy,
               optimizer=partial(torch.optim.SGD, lr=0.1), global_batch=4, epochs=1)  # fmt: skip
    return made.set(**changes)


def said(**changes):
    with pytest.raises(UsageError) as caught:
        train_job(job(**changes), Execution(signals=False))
    return caught.value


def reads_a_key(output, target):
    return {"output": output}["logits"].sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"returned float32\[4\]: one number is needed"),
        (lambda o, t: F.cross_entropy(o, t).item(), "returned a float, not a tensor"),
        (lambda o, t: {"loss": F.cross_entropy(o, t)}, "returned a dict, not a tensor"),
        (lambda o, t: None, "returned a NoneType, not a tensor"),
        (lambda o, t: F.cross_entropy(o.detach(), t), "no gradient"),
        (lambda o, t: Weighted(F.cross_entropy(o, t, reduction="none"), 4), r"returned float32\[4\]"),
        (F.mse_loss, "cannot be computed: RuntimeError: The size of tensor"),
        (reads_a_key, r"cannot be computed: KeyError: .*\(test_first_batch.py, line \d+\)"),
        (lambda o, t: F.cross_entropy(o, t.float()), "cannot be computed: RuntimeError"),
    ],
)
def test_a_loss_that_does_not_fit(loss, message):
    error = said(loss=loss)
    with pytest.raises(UsageError, match=message):
        raise error
    with pytest.raises(AssertionError, match=GIVEN):
        raise AssertionError(error.remedy)


def test_a_model_that_does_not_take_the_batch():
    error = said(model=lambda: torch.nn.Linear(5, 3))
    assert "the model does not take the first batch: RuntimeError: mat1 and mat2" in error.message
    assert error.remedy == "A batch is (float32[4, 4], int64[4])."
    assert isinstance(error.__cause__, RuntimeError)


def test_the_line_of_the_model_is_named():
    class Wrong(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(-1, 5))

    message = said(model=lambda: torch.nn.Sequential(Wrong(5, 3))).message
    assert re.search(r"\(test_first_batch.py, line \d+\)$", message)


def test_the_way_to_the_line_is_named():
    def inner(output):
        return output["logits"]

    def outer(output, target):
        return inner(output)

    assert re.search(r"\(test_first_batch.py, line \d+; test_first_batch.py, line \d+\)$", said(loss=outer).message)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("weights.txt"), RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
     torch.OutOfMemoryError("CUDA out of memory")],
)  # fmt: skip
def test_other_errors_are_their_own(error):
    def broken(output, target):
        raise error

    with pytest.raises(type(error)) as caught:
        train_job(job(loss=broken, global_batch=1), Execution(signals=False))
    assert caught.value is error


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda o, t: F.cross_entropy(o, t).reshape(1)])
def test_what_fits_is_trained(loss):
    assert train_job(job(loss=loss), Execution(signals=False)).steps == 3


def test_a_later_error_keeps_its_own_words():
    calls = []

    def late(output, target):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("mine")
        return F.cross_entropy(output, target)

    with pytest.raises(ValueError, match="mine"):
        train_job(job(loss=late), Execution(signals=False))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"x": torch.zeros(2, 3), "n": 1}, "{x: float32[2, 3], n: int}"),
        ([torch.zeros(2), (torch.zeros(1, dtype=torch.int64), [torch.zeros(1)])], "(float32[2], (int64[1], list))"),
        (list(range(9)), "(int, int, int, int, int, int, …)"),
        ("text", "str"),
    ],
)
def test_shapes_in_words(value, words):
    assert shapes(value) == words


@pytest.mark.parametrize(("changes", "steps"), [({}, 3), ({"epochs": 4}, 12), ({"epochs": None, "steps": 5}, 5)])
def test_the_length_of_the_whole_job_is_told(changes, steps):
    told = []
    train_job(job(**changes), Execution(signals=False, planned=told.append))
    assert told == [steps]


def test_what_watches_the_module_that_trains_a_job_reads_the_length_as_in_any_script(tmp_path, monkeypatch):
    (tmp_path / "told_jobs.py").write_text(
        "import torch, functools\nfrom upshift import Job\n"
        "job = Job(model=lambda: torch.nn.Linear(4, 3), train_data=(torch.randn(12, 4), torch.arange(12) % 3),\n"
        "          epochs=5, loss=torch.nn.functional.cross_entropy, global_batch=4,\n"
        "          optimizer=functools.partial(torch.optim.SGD, lr=0.1))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "told_jobs", None)  # put back to nothing afterwards
    del sys.modules["told_jobs"]
    monkeypatch.setattr(sys, "argv", ["job", f"{tmp_path / 'told_jobs.py'}:job"])
    monkeypatch.setattr(entry, "total_steps", None)
    assert entry.main() == 0
    monkeypatch.setitem(sys.modules, "__main__", entry)
    assert Horizon().steps(None, 1.0) == 15
