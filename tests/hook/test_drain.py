"""Work queued on a device belongs to the block of steps that queued it, whoever waits for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from upshift.hook import drain as drain_module
from upshift.hook import trial as trial_module
from upshift.hook.drain import drain
from upshift.hook.trial import TrialController
from upshift.measure.steps import StepRecord
from upshift.sites import Stage
from upshift.sites.runner import ChildSpec


def record(number, total=1.0):
    return StepRecord(number, number + 1.0, total, *[0.0] * 8, 0, 0.0, 1, 0, 1, ())


class Parent:
    """A channel whose other side asks for blocks of so many steps, then lets go."""

    def __init__(self, *messages):
        self.messages, self.heard = list(messages), []

    def receive(self):
        return self.messages.pop(0)

    def send(self, message):
        self.heard.append(message)


def controller(monkeypatch, *messages, queued=0.25):
    made = TrialController(ChildSpec(mode="arm", target="train.py"), Parent(*messages))
    made.attach(Stage([], lambda *said: None), SimpleNamespace(optimizers=[], refresh=lambda: None))
    monkeypatch.setattr(trial_module, "drain", lambda torch, watch: queued)
    return made


def test_the_last_step_of_a_block_waits_for_what_the_block_has_queued(monkeypatch):
    made = controller(monkeypatch, {"kind": "go", "steps": 3}, {"kind": "go", "steps": 1}, {"kind": "go", "steps": 1})
    for number in range(5):
        made.on_step(record(number))
    blocks = [item["seconds"] for item in made.channel.heard if item["kind"] == "steps"]
    assert blocks == [[1.0, 1.0, 1.25], [1.25]]


def test_alternating_blocks_wait_too(monkeypatch):
    compare = {"kind": "compare", "a": [], "b": [], "seconds": 60.0, "block": 2}
    made = controller(monkeypatch, compare, {"kind": "go", "steps": 1})
    made.on_step(record(0))
    alternation = made.compare
    for number in range(1, 40):
        made.on_step(record(number))
        if made.compare is None:
            break
    times = [*alternation.times[0], *alternation.times[1]]
    assert times and set(times) == {1.125}


def test_nothing_is_started_where_cuda_is_not_in_use():
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use")
    assert drain(torch, SimpleNamespace(optimizers=[])) == 0.0 and not torch.cuda.is_initialized()


def test_every_device_with_trained_parameters_is_waited_for(monkeypatch):
    waited = []
    cuda = SimpleNamespace(is_initialized=lambda: True, current_device=lambda: 0, synchronize=waited.append)
    fake = SimpleNamespace(cuda=cuda, device=torch.device)
    parameters = [
        SimpleNamespace(device=torch.device("cuda:1"), is_cuda=True),
        SimpleNamespace(device=torch.device("cpu"), is_cuda=False),
    ]
    optimizer = SimpleNamespace(param_groups=[{"params": parameters}])
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(drain_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert drain(fake, SimpleNamespace(optimizers=[lambda: optimizer, lambda: None])) == 2.5
    assert set(waited) == {torch.device("cuda:0"), torch.device("cuda:1")}


@pytest.mark.cuda
def test_on_cuda_queued_work_is_waited_for():
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        x = (x @ x).clamp(-1, 1)
    done = torch.cuda.Event()
    done.record()
    drain(torch, SimpleNamespace(optimizers=[]))
    assert done.query()
