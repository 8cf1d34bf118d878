"""A request to stop while an update takes longer than the grace: what belongs to the update before it is saved."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import tiny_jobs  # noqa: E402

from upshift.checkpoint.compare import differences  # noqa: E402
from upshift.checkpoint.store import Store  # noqa: E402
from upshift.engine import preempt  # noqa: E402
from upshift.engine.preempt import StopRequest  # noqa: E402
from upshift.engine.run import train_job  # noqa: E402
from upshift.engine.settings import Execution  # noqa: E402
from upshift.testing.kills import samples_by_step, train_in_child  # noqa: E402


def hanging(folder, at, *, evaluating=False, before=None, **changes):
    """The full job; while `folder/gate` is there, the forward pass of update `at` does not come back from C.

    Buffers and random streams have moved by then. SIGTERM is held back in the main thread, as by a long call.
    """
    gate, inside = folder / "gate", folder / "inside"

    def forward(model, batch):
        found = model(batch[0])
        here = not model.training if evaluating else model.training and tiny_jobs._same(batch[1], at)
        if here and gate.exists():
            if before is not None:
                before(model)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            inside.touch()
            time.sleep(60)
        return found

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    return tiny_jobs.full.set(forward=forward, loss=loss, metrics={}, **changes)


def until(found, seconds=60.0):
    """Wait for something that is bound to come."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stopped(job, folder, *, grace=5.0, **settings):
    """Train in a child until it hangs, ask it to stop; its exit code."""
    (folder / "gate").touch()
    pid = train_in_child(job, folder / "run", folder / "log", {"process_ends": True, "grace": grace, **settings})
    until((folder / "inside").exists)
    os.kill(pid, signal.SIGTERM)
    code = ended(pid)
    (folder / "gate").unlink()
    return code


def state(out):
    store = Store(out)
    newest = store.newest()
    assert newest is not None
    found = store.load(newest)[0]
    found["progress"].pop("seconds")
    found["results"].pop("reached")
    return found


def newest(out):
    return Store(out).newest().step


@pytest.fixture
def patience(monkeypatch):
    """Children wait a moment only for an update to end by itself."""
    monkeypatch.setattr(preempt, "PATIENCE", 0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted training: its last state and its samples."""
    folder = tmp_path_factory.mktemp("whole")
    # What torch imports at the first update is then there in every child.
    train_job(tiny_jobs.full.set(epochs=1, schedule=None), Execution(out=folder / "first"))
    assert ended(train_in_child(hanging(folder, 0), folder / "run", folder / "log", {})) == 0
    return state(folder / "run"), samples_by_step(folder / "log")


def goes_on_as(whole, job, folder):
    """Whether the resumed training ends where the uninterrupted one does, bit for bit."""
    assert ended(train_in_child(job, folder / "run", folder / "log", {})) == 0
    assert differences(whole[0], state(folder / "run")) == []
    assert samples_by_step(folder / "log") == whole[1]


@pytest.mark.parametrize(
    ("at", "step", "evaluating"),
    [
        pytest.param(0, 0, False, id="the first update, its state is on disk already"),
        pytest.param(1, 1, False, id="the second update of the process"),
        pytest.param(6, 6, False, id="a batch of a new size"),
        pytest.param(7, 7, True, id="an evaluation, with the average in place of the weights"),
    ],
)
def test_what_belongs_to_the_update_before_is_saved_and_goes_on_bitwise(at, step, evaluating, whole, patience,
                                                                        tmp_path):  # fmt: skip
    job = hanging(tmp_path, at, evaluating=evaluating)
    assert stopped(job, tmp_path) == 143
    assert newest(tmp_path / "run") == step
    goes_on_as(whole, job, tmp_path)


class Exchanging(torch.optim.SGD):
    """Evaluates at other weights than it trains at, and does not come back to the same bits by itself."""

    def eval(self):
        self._move(0.3)

    def train(self):
        self._move(-0.3)

    def _move(self, by):
        with torch.no_grad():
            for group in self.param_groups:
                for item in group["params"]:
                    item.mul_(1.0 + by) if by > 0 else item.div_(1.0 - by)


def test_weights_that_the_optimizer_exchanges_are_on_disk_before_they_are_evaluated(whole, patience, tmp_path):
    changes = {"optimizer": partial(Exchanging, lr=0.05, momentum=0.9), "average": None}
    job = hanging(tmp_path, 0, evaluating=True, **changes)
    other = tmp_path / "whole"
    other.mkdir()
    assert ended(train_in_child(job, other / "run", other / "log", {})) == 0
    assert stopped(job, tmp_path) == 143
    assert newest(tmp_path / "run") == 7
    goes_on_as((state(other / "run"), samples_by_step(other / "log")), job, tmp_path)


def test_where_the_state_cannot_be_known_the_last_checkpoint_stands(whole, tmp_path):
    """A fast loop takes no notes: buffers and random streams of its boundary are gone."""
    job = hanging(tmp_path, 18)
    assert stopped(job, tmp_path, grace=1.5, save_steps=4) == 143
    assert newest(tmp_path / "run") == 16
    goes_on_as(whole, job, tmp_path)


def test_a_forward_pass_that_changes_parameters_is_not_taken_for_a_boundary(whole, patience, tmp_path):
    def before(model):
        with torch.no_grad():
            model.head.weight.add_(1.0)

    job = hanging(tmp_path, 1, before=before)
    assert stopped(job, tmp_path, grace=1.5) == 143
    assert newest(tmp_path / "run") == 0


@pytest.mark.extra
def test_slow_updates_are_always_noted(whole, tmp_path):
    job = hanging(tmp_path, 12)
    forward = job.forward

    def slowly(model, batch):
        time.sleep(0.3 if (tmp_path / "gate").exists() else 0.0)
        return forward(model, batch)

    job = job.set(forward=slowly)
    assert stopped(job, tmp_path) == 143
    assert newest(tmp_path / "run") == 12
    goes_on_as(whole, job, tmp_path)


def test_a_compiler_does_not_outlive_the_training(whole, patience, tmp_path):
    compiler = tmp_path / "cc1plus"
    compiler.symlink_to("/bin/sleep")
    pids = tmp_path / "pids"

    def before(model):
        import subprocess

        found = [subprocess.Popen([str(compiler), "60"]), subprocess.Popen(["/bin/sleep", "60"])]
        pids.write_text(" ".join(str(item.pid) for item in found))

    assert stopped(hanging(tmp_path, 1, before=before), tmp_path) == 143
    ours, other = (int(word) for word in pids.read_text().split())
    try:
        until(lambda: not psutil.pid_exists(ours) or psutil.Process(ours).status() == psutil.STATUS_ZOMBIE, 5.0)
        assert psutil.pid_exists(other), "what the person started is left alone"
    finally:
        os.kill(other, signal.SIGKILL)


def test_an_error_after_the_request_is_taken_for_a_part_of_it(whole, tmp_path):
    """A signal to all processes of a group ends a compiler, too, and torch raises."""
    asked = [False]

    def before(model):
        asked[0] = True
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the compiler was killed by signal 15")

    job = hanging(tmp_path, 1, before=before)
    (tmp_path / "gate").touch()
    said: list[str] = []
    found = train_job(job, Execution(out=tmp_path / "run", say=said.append))
    (tmp_path / "gate").unlink()
    assert asked[0] and found.code == 143 and "stopped after step 1" in found.how
    assert any("killed by signal 15" in text for text in said)
    assert newest(tmp_path / "run") == 1
    goes_on_as(whole[:1] + (samples_by_step_from(whole[1], 1),), job, tmp_path)


def samples_by_step_from(samples, first):
    return {step: rows for step, rows in samples.items() if step >= first}


def test_an_error_that_nobody_asked_for_is_an_error(tmp_path):
    def before(model):
        raise RuntimeError("planted")

    job = hanging(tmp_path, 1, before=before)
    (tmp_path / "gate").touch()
    with pytest.raises(RuntimeError, match="planted"):
        train_job(job, Execution(out=tmp_path / "run"))


def test_a_technique_does_not_come_off_for_a_compiler_that_was_stopped(monkeypatch):
    from upshift.engine.group import Group
    from upshift.engine.parts import Parts

    parts = Parts(tiny_jobs.plain, Execution(), Group(torch.device("cpu")), lambda *said: None)
    parts.asked = lambda: True
    with pytest.raises(ValueError, match="planted"):
        parts._come_off(("compile",), ValueError("planted"))


# -- the request itself -------------------------------------------------------------------------------------------


def test_it_is_heard_while_the_main_thread_is_in_c():
    """The handler of Python cannot run there; the thread hears of the signal all the same."""
    with StopRequest(60.0, print) as stop:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            os.kill(os.getpid(), signal.SIGTERM)  # goes to another thread of this process
            until(lambda: stop.asked, 5.0)
            assert stop.why == "SIGTERM" and stop.code == 143 and 0.0 < stop.left <= 60.0
        finally:
            stop.safe.set()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_what_a_forked_child_is_sent_is_no_request_to_its_parent():
    with StopRequest(60.0, print) as stop:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            os._exit(int(not stop.asked))
        assert ended(child) == 0, "the child heard it"
        time.sleep(0.1)
        assert not stop.asked


def test_handlers_and_the_descriptor_of_others_are_put_back():
    read, write = os.pipe()
    os.set_blocking(write, False)
    handlers = [signal.getsignal(number) for number in preempt.ASKING]
    before = signal.set_wakeup_fd(write)
    try:
        with StopRequest(60.0, print) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: stop.asked, 5.0)
            assert os.read(read, 1) == bytes([signal.SIGUSR1]), "they hear of it as before"
            stop.safe.set()
        assert signal.set_wakeup_fd(before) == write
    finally:
        os.close(read)
        os.close(write)
    assert [signal.getsignal(number) for number in preempt.ASKING] == handlers


def test_the_first_ctrl_c_is_in_no_hurry_and_a_preemption_after_it_is():
    with StopRequest(60.0, print) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: stop.asked, 5.0)
        assert stop.code == 130 and stop.left == 60.0
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.left < 60.0, 5.0)
        assert stop.code == 130
        stop.safe.set()
