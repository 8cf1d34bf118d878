"""A resumed run tells a spike where an uninterrupted one does; what training went back to is kept."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import tiny_jobs

from upshift import run
from upshift.api.checkpoints import checkpoints
from upshift.checkpoint.compare import differences
from upshift.checkpoint.store import Store
from upshift.engine.recover import REMEMBERED, Spikes
from upshift.engine.run import train_job
from upshift.engine.settings import Execution

losses = st.floats(1e-6, 1e6)


@given(st.lists(losses, max_size=3 * REMEMBERED), st.lists(losses | st.just(math.inf), max_size=40))
def test_a_watch_that_was_saved_goes_on_as_the_one_that_was_not(before, after):
    import msgspec

    whole, resumed = Spikes(), Spikes()
    for at, loss in enumerate(before):
        whole.add(loss, 0, at)
    state = whole.state_dict()
    state["ceiling"] = None if math.isinf(state["ceiling"]) else state["ceiling"]  # JSON has no infinity
    kept = msgspec.json.decode(msgspec.json.encode(state))
    resumed.load_state_dict({**kept, "ceiling": math.inf if kept["ceiling"] is None else kept["ceiling"]})
    for at, loss in enumerate(after):
        assert list(whole.add(loss, 1, at)) == list(resumed.add(loss, 1, at))
        assert whole.suspicious == resumed.suspicious
    assert whole.state_dict() == resumed.state_dict()


def test_a_state_of_an_earlier_version_begins_anew():
    spikes = Spikes()
    for at in range(100):
        spikes.add(1.0, 0, at)
    spikes.load_state_dict({})
    assert spikes.state_dict() == Spikes().state_dict()


def spiking(at=(57, 58, 59)):
    """The losses of these updates explode."""

    def loss(output, target):
        found = F.cross_entropy(output, target)
        return found * 1e6 if output.requires_grad and any(tiny_jobs._same(target, step) for step in at) else found

    return tiny_jobs.full.set(loss=loss, epochs=12, eval_data=None, metrics={})


def last(out):
    store = Store(out)
    found = store.load(store.newest())[0]
    found["progress"].pop("seconds")
    return found


def without_watch(tree):
    """A run that was stopped goes back to where it was stopped: fewer losses are seen twice."""
    return {key: value for key, value in tree.items() if key != "spikes"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last state of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train_job(spiking(), Execution(out=out, save_steps=8))
    return last(out)


@pytest.mark.parametrize("stop_at", [56, 57, 58, 59])
def test_a_run_stopped_before_or_in_a_spike_goes_on_as_the_uninterrupted_one(stop_at, whole, tmp_path):
    """Stopped after update 58 or 59, what was saved last belongs to the spike: it is not gone back to."""
    job, said = spiking(), []
    stopped = train_job(job, Execution(out=tmp_path / "run", save_steps=8, stop_at=stop_at))
    assert stopped.code == 143 and stopped.steps == stop_at
    train_job(job, Execution(out=tmp_path / "run", save_steps=8, say=said.append))
    assert any("within 3 steps; back to the last good state" in text for text in said), said
    assert differences(without_watch(whole), without_watch(last(tmp_path / "run"))) == []


def test_a_checkpoint_without_the_watch_still_loads(tmp_path, monkeypatch):
    from upshift.engine.saving import Saving

    job = tiny_jobs.full
    gather = Saving._gather
    monkeypatch.setattr(Saving, "_gather", lambda self, t: {
        key: value for key, value in gather(self, t).items() if key != "spikes"
    })  # fmt: skip
    train_job(job, Execution(out=tmp_path / "run", stop_at=9))
    assert "spikes" not in last(tmp_path / "run")
    monkeypatch.undo()
    assert train_job(job, Execution(out=tmp_path / "run")).steps == 28
    assert len(last(tmp_path / "run")["spikes"]["losses"]) == 28 - 9


@pytest.mark.parametrize("kind", ["a loss that is not finite", "a spike"])
def test_what_training_went_back_to_is_kept(kind, tmp_path):
    out = tmp_path / "run"
    job, before = (spiking(), 56) if kind == "a spike" else (tiny_jobs.poisoned(at=20).set(epochs=6), 16)
    assert run(job, out=out, save_steps=8).steps < 12 * 7
    marked = [item for item in checkpoints(out).checkpoints if item.before_spike]
    assert [item.step for item in marked] == [before] and marked[0].whole
    newest = sorted(item.step for item in checkpoints(out).checkpoints)[-2:]
    assert newest[0] > before, "it is there besides the newest two"


def test_without_trouble_nothing_is_marked(tmp_path):
    run(tiny_jobs.full, out=tmp_path / "run", save_steps=2)
    assert not any(item.before_spike for item in checkpoints(tmp_path / "run").checkpoints)
