"""A run that was stopped goes on bit for bit as if it had not been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import often
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upshift import run
from upshift.engine.run import train_job
from upshift.engine.settings import Execution
from upshift.errors import InUseError, ResumeError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import tiny_jobs  # noqa: E402
from tiny_jobs import augmented, full, plain  # noqa: E402


class Stop(Exception):
    """Pulls the plug."""


def trained(job, out, stop_at=None, log=None, **more):
    """Train; at update `stop_at` the plug is pulled."""
    seen = {} if log is None else log

    def on_batch(step, epoch, rows):
        if step == stop_at:
            raise Stop
        seen[step] = (epoch, tuple(rows))

    return train_job(job, Execution(out=out, on_batch=on_batch, **more)), seen


def same(a, b) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


JOBS = {
    "full": (full, {}),
    "micro-batches": (full, {"micro_batch": 13}),
    "augmented": (augmented, {}),
    "two workers": (augmented, {"loader": {"num_workers": 2}}),
    "bf16": (full, {"plan": {"bf16": {"ops": "all"}}}),
    "in steps": (full.set(steps=20, eval_every=6), {}),
}


@pytest.mark.parametrize("name", JOBS)
def test_it_goes_on_bitwise(name, tmp_path):
    job, how = JOBS[name]
    whole, log = trained(job, tmp_path / "whole", **how)
    stops = (0, 5, 7, 16) if name in ("full", "in steps") else (9,)
    for stop in stops:
        out = tmp_path / f"stopped-{stop}"
        seen: dict = {}
        with pytest.raises(Stop):
            trained(job, out, stop_at=stop, log=seen, save_steps=1, **how)
        again, seen = trained(job, out, log=seen, save_steps=3, **how)
        assert same(again.model, whole.model), stop
        assert seen == log
        assert again.metrics == whole.metrics and again.best == whole.best


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(0, 27), min_size=1, max_size=3), every=st.integers(1, 9))
def test_any_interruptions_at_any_interval(stops, every, tmp_path_factory):
    whole, log = trained(full, None)
    out = tmp_path_factory.mktemp("run")
    seen: dict = {}
    for stop in stops:
        try:
            trained(full, out, stop_at=stop, log=seen, save_steps=every)
        except Stop:
            continue
    again, seen = trained(full, out, log=seen)
    assert same(again.model, whole.model) and seen == log


def test_a_finished_run_stays_finished(tmp_path):
    first = run(full, out=tmp_path / "run")
    second = run(full, out=tmp_path / "run")
    assert second.steps == first.steps and same(first.model, second.model)
    assert second.metrics == first.metrics


def test_a_run_goes_on_longer_when_the_job_does(tmp_path):
    job = full.set(schedule=None)
    run(job.set(epochs=2), out=tmp_path / "run")
    assert same(run(job.set(epochs=4), out=tmp_path / "run").model, run(job).model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"global_batch": 32}, "global_batch was 48, is 32"),
        ({"model": partial(tiny_jobs.Net, width=8)}, "model was"),
        ({"train_data": (tiny_jobs.X[:300], tiny_jobs.Y[:300])}, "samples was 320, is 300"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "optimizer was 'AdamW', is 'SGD'"),
        ({"shuffle": False}, "shuffle was True"),
    ],
)
def test_another_training_is_told_by_what_differs(change, words, tmp_path):
    run(full.set(epochs=1, schedule=None), out=tmp_path / "run")
    before = sorted((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(ResumeError, match=re.escape(words)):
        run(full.set(epochs=2, schedule=None, **change), out=tmp_path / "run")
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before


def test_force_loads_only_the_weights(tmp_path):
    first = run(full.set(epochs=1, schedule=None), out=tmp_path / "run")
    said: list[str] = []
    again = run(full.set(epochs=1, schedule=None, seed=9), out=tmp_path / "run", resume="force", say=said.append)
    assert any("only the weights" in text for text in said)
    assert again.steps == first.steps
    assert not same(first.model, again.model)


@pytest.mark.parametrize("how", ["never", "force"])
def test_a_fresh_start_in_an_old_folder_is_what_is_resumed_the_next_time(how, tmp_path):
    out = tmp_path / "run"
    run(full.set(epochs=2, schedule=None), out=out)
    other = full.set(epochs=4, schedule=None, seed=9)
    with pytest.raises(Stop):
        trained(other, out, stop_at=3, save_steps=1, resume=how)
    said: list[str] = []
    assert run(other, out=out, say=said.append).steps == 28
    assert any("goes on from step 3" in text or "goes on from step 2" in text for text in said), said


def test_a_folder_in_use_is_refused_and_nothing_changes(tmp_path):
    from upshift.checkpoint.store import Store

    run(full.set(epochs=1), out=tmp_path / "run")
    with Store(tmp_path / "run"), pytest.raises(InUseError):
        run(full.set(epochs=1), out=tmp_path / "run")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path):
    out = tmp_path / "run"
    whole = run(full)
    with pytest.raises(Stop):
        trained(full, out, stop_at=20, save_steps=5)
    newest = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = newest / "rank-0-of-1.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    said: list[str] = []
    again = run(full, out=out, say=said.append)
    assert same(again.model, whole.model)
    assert any("quarantine" in text for text in said)


# -- signals and kills, through the command line ------------------------------------------------------------------


def start(out, *arguments, **env):
    command = [str(Path(sys.executable).with_name("upshift")), "run", "--out", str(out), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def begun(out, process, steps=1, timeout=60):
    """Wait until a checkpoint of at least so many steps is there."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = [int(path.name.split("-")[1]) for path in (out / "checkpoints").glob("step-*")]
        if found and max(found) >= steps:
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.05)
    raise AssertionError("no checkpoint came")


@pytest.mark.parametrize("workers", often(["0", "2"], "2"))
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.extra)])
def test_a_signal_ends_in_a_durable_checkpoint(number, workers, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--save-every", "5", "--grace", "5s", "--workers", workers, "tiny_jobs.py:slow",
                    TINY_WORKERS="1")  # fmt: skip
    begun(out, process, 5)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=30)
    # Said before the grace was over: the guard of the grace would have ended it without a word.
    assert process.returncode == (143 if number == signal.SIGTERM else 130), said
    assert "Exception" not in said
    stopped = int(re.search(r"stopped after step ([\d,]+)", said)[1].replace(",", ""))
    newest = max(int(path.name.split("-")[1]) for path in (out / "checkpoints").glob("step-*"))
    assert newest == stopped


def test_more_signals_while_it_saves_do_no_harm(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--save-every", "3", "tiny_jobs.py:slow")
    begun(out, process, 3)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    process.communicate(timeout=60)
    assert process.returncode in (143, 130)  # two signals at once come in the order of their numbers
    from upshift.checkpoint.store import Store

    assert all(item.verified for item in Store(out).checkpoints(verify=True))


@pytest.mark.extra
def test_sigterm_in_an_evaluation_does_not_wait_for_its_end(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--grace", "5s", "--set", "seconds=0.5", "tiny_jobs.py:slow")
    begun(out, process, 0)
    time.sleep(4.5)  # seven updates, then the evaluation
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143


# -- several processes --------------------------------------------------------------------------------------------


def launched(out, processes, *arguments):
    """A run of several ranks to its end; what it said."""
    done = start(out, "--nproc", str(processes), *arguments) if processes > 1 else start(out, *arguments)
    text, said = done.communicate(timeout=240)
    assert done.returncode == 0, said
    return text + said


def state(out):
    from upshift.checkpoint.store import Store

    store = Store(out)
    return store.load(store.newest(), rank=0)[0]


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.extra), "fsdp2"])
def test_two_processes_train_what_one_does(parallel, tmp_path):
    launched(tmp_path / "two", 2, "--parallel", parallel, "--micro-batch", "9", "tiny_jobs.py:plain")
    alone = run(plain)
    weights = state(tmp_path / "two")["model"]
    assert max(float((weights[name] - value).abs().max()) for name, value in alone.model.state_dict().items()) < 1e-5


@pytest.mark.extra
def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path):
    """World size 2, then 1, then 2: the order of samples is that of one process, and so is the training."""
    out = tmp_path / "run"
    job = ("--set", "epochs=6", "tiny_jobs.py:plain")
    launched(out, 2, "--set", "epochs=2", "tiny_jobs.py:plain")
    assert run(plain.set(epochs=4), out=out).steps == 28
    said = launched(out, 2, *job)
    assert "1 processes then, 2 now" in said
    alone = run(plain.set(epochs=6))
    weights = state(out)["model"]
    assert max(float((weights[name] - value).abs().max()) for name, value in alone.model.state_dict().items()) < 1e-4


@pytest.mark.extra
def test_a_killed_rank_is_started_again_and_goes_on_bitwise(tmp_path):
    launched(tmp_path / "whole", 2, "--save-every", "2", "--set", "epochs=12", "tiny_jobs.py:slow")
    process = start(tmp_path / "run", "--nproc", "2", "--save-every", "2", "--set", "epochs=12", "tiny_jobs.py:slow")
    begun(tmp_path / "run", process, 6)
    import psutil

    ranks = [
        item for item in psutil.Process(process.pid).children(recursive=True) if "upshift.cli.job" in item.cmdline()
    ]
    ranks[-1].kill()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    from upshift.checkpoint.compare import differences

    a, b = state(tmp_path / "whole"), state(tmp_path / "run")
    for item in (a, b):
        item["progress"].pop("seconds")
    assert differences(a, b) == []


# -- killed at random ---------------------------------------------------------------------------------------------


def test_twenty_kills_change_nothing(tmp_path):
    from upshift.testing.kills import Counts, killed_until_done

    totals = Counts()
    job = full.set(epochs=12, schedule=None)
    for seed in (1, 2):
        totals.add(killed_until_done(job, tmp_path, kills=10, seed=seed, settings={"save_steps": 2}, longest=0.3))
    assert totals.kills >= 10
    assert (totals.unreadable, totals.lost, totals.different, totals.failed) == (0, 0, 0, 0), totals.notes
