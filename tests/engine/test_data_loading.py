"""Map-style datasets: the same tensors whoever reads them, each sample once, bad samples left out."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from upshift.engine.data import open_data
from upshift.errors import DataChangedError, DataError, UsageError
from upshift.hardware import machine
from upshift.sites import LoaderArgs, LoaderReady, NoEffect
from upshift.techniques.cache import Cache
from upshift.techniques.loader import Loader, LoaderApplied, Persistence

N = 37


class Noisy(Dataset):
    """Samples with random augmentation from all three streams."""

    def __init__(self, n=N):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        noise = torch.rand(2) + random.random() + float(np.random.rand())
        return torch.cat([torch.tensor([float(index)]), noise]), index


class Plain(Dataset):
    """Samples without random draws; some of them cannot be read."""

    def __init__(self, n=N, bad=()):
        self.n, self.bad = n, set(bad)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"file {index} is cut short")
        return torch.tensor([float(index)]), index


class Recording(Plain):
    """Remembers what it was asked for."""

    def __init__(self, n=N, bad=()):
        super().__init__(n, bad)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


class Many(Plain):
    """Reads many samples in one call."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self[index] for index in indices]


def opened(data, **more):
    return open_data(data, **{"seed": 4, "global_batch": 8, "micro_batch": 3, **more})


def taken(passing):
    """Everything of a pass that a training sees."""
    return [
        (batch.samples, batch.lost, [(part.indices, part.weight, part.n, default(part.batch)) for part in batch.parts])
        for batch in passing
    ]


def default(batch):
    return tuple(item.tolist() for item in (batch.values() if isinstance(batch, dict) else batch))


def seen(batches):
    return [index for _, _, parts in batches for indices, *_ in parts for index in indices]


@pytest.fixture(scope="module")
def reference():
    """Three epochs of the augmented dataset, read in this process."""
    data = opened(Noisy())
    return [taken(data.epoch(epoch)) for epoch in range(3)]


def test_the_reference_is_what_it_should_be(reference):
    for epoch in reference:
        assert sorted(seen(epoch)) == list(range(N))
        assert sum(samples for samples, *_ in epoch) == N
        for samples, lost, parts in epoch:
            assert lost == 0 and sum(weight for _, weight, _, _ in parts) == pytest.approx(1.0)
            assert sum(n for _, _, n, _ in parts) == samples
            for indices, _, _, (values, labels) in parts:
                assert labels == indices and [row[0] for row in values] == indices
    noise = {
        (number, index): tuple(row[1:])
        for number, epoch in enumerate(reference)
        for _, _, parts in epoch
        for indices, _, _, (rows, _) in parts
        for index, row in zip(indices, rows, strict=True)
    }
    assert len(noise) == len(set(noise.values())) == 3 * N


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_tensors_for_any_number_of_workers(reference, workers):
    """Augmentation too, over epochs with persistent workers, and in a pass that begins in the middle."""
    data = opened(Noisy(), loader={"num_workers": workers})
    assert data.loader.persistent_workers
    first = taken(data.epoch(0))
    pids = [item.pid for item in data.loader._iterator._workers]
    assert [first, taken(data.epoch(1))] == reference[:2]
    passing = data.epoch(2)
    next(passing)
    assert taken(data.epoch(2, 16)) == reference[2][2:]
    assert [item.pid for item in data.loader._iterator._workers] == pids
    data.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_same_samples_for_any_micro_batch_and_rank(reference):
    values = {}
    for epoch in reference[:1]:
        for _, _, parts in epoch:
            for indices, _, _, (rows, _) in parts:
                values.update(zip(indices, rows, strict=True))
    for rank in range(3):
        for _, _, parts in taken(opened(Noisy(), micro_batch=2, world=3, rank=rank).epoch(0)):
            for indices, _, n, (rows, _) in parts:
                assert [values[index] for index in indices] == rows[:n]


def test_resuming_at_every_cursor_gives_the_same_bits(reference):
    data = opened(Noisy())
    for number, cursor in enumerate(range(0, N, 8)):
        assert taken(data.epoch(1, cursor)) == reference[1][number:]
        assert taken(opened(Noisy()).epoch(1, cursor)) == reference[1][number:]
    assert taken(data.epoch(1, N)) == []


def streams():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
    )


@pytest.mark.parametrize("collate", [None, lambda samples: (default_collate(samples), torch.rand(1))])
def test_reading_does_not_disturb_the_streams_of_the_training(collate):
    before = streams()
    for batch in opened(Noisy(), collate=collate).epoch(0):
        torch.rand(3)
        assert batch.parts
    drawn = streams()
    assert drawn != before
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    for _ in range(5):
        torch.rand(3)
    assert torch.get_rng_state().tolist() == drawn[0] and drawn[1:] == before[1:]


def masking(samples):
    return {"x": torch.stack([item[0] for item in samples]) * (torch.rand(len(samples), 1) > 0.5), "r": torch.rand(2)}


def test_dict_batches_and_a_collate_function_that_draws():
    expected = taken(opened(Noisy(), collate=masking).epoch(3))
    data = opened(Noisy(), collate=masking, loader={"num_workers": 2})
    assert taken(data.epoch(3)) == expected
    assert len({str(parts[0][3]) for _, _, parts in expected}) == len(expected)
    data.close()


def test_datasets_that_read_many_samples_in_one_call():
    many = Many()
    got = taken(opened(many).epoch(0))
    assert many.calls == sum(len(parts) for _, _, parts in got) < N
    assert got == taken(opened(Plain()).epoch(0))
    # A subset hands the call on; its samples have seeds of their own where the dataset reads one by one.
    chosen = Subset(Noisy(), list(range(N)))
    assert taken(opened(chosen).epoch(0)) == taken(opened(Noisy()).epoch(0))


def test_bad_samples_of_one_call_are_found():
    bad = taken(opened(Many(bad=(5,))).epoch(0))
    assert bad == taken(opened(Plain(bad=(5,))).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_named_and_left_out(workers):
    told = []
    data = opened(Plain(bad=(5, 20)), loader={"num_workers": workers}, say=told.append)
    whole = taken(opened(Plain()).epoch(0))
    got = taken(data.epoch(0))
    assert sorted(data.quarantined) == [5, 20]
    assert any("sample 5 cannot be read" in text and "ValueError: file 5 is cut short" in text for text in told)
    assert sorted(seen(got)) == [index for index in range(N) if index not in (5, 20)]
    for (samples, lost, parts), (planned, _, _) in zip(got, whole, strict=True):
        assert samples == planned and sum(n for _, _, n, _ in parts) == samples - lost
        # The mean over the samples that are left.
        mean = sum(weight * sum(values for (values,) in rows) / len(rows) for _, weight, _, (rows, _) in parts)
        left = [index for indices, *_ in parts for index in indices]
        assert mean == pytest.approx(sum(left) / len(left))
    again = taken(data.epoch(1))
    assert len(told) == 2 and not {5, 20} & set(seen(again))
    data.close()
    resumed = Recording(bad=(5, 20))
    later = opened(resumed)
    later.load_state_dict(data.state_dict())
    assert taken(later.epoch(0)) == got and taken(later.epoch(1)) == again
    assert not {5, 20} & set(resumed.asked)


def test_a_rank_tells_what_it_lost():
    ranks = [list(opened(Plain(bad=(5,)), world=2, rank=rank, micro_batch=None).epoch(0)) for rank in range(2)]
    for one, two in zip(*ranks, strict=True):
        lost = one.lost + two.lost
        parts = [*one.parts, *two.parts]
        left = [index for part in parts for index in part.indices]
        assert len(left) == one.samples - lost
        averaged = sum(part.weight * part.batch[0].mean().item() for part in parts) / 2
        assert averaged * one.samples / (one.samples - lost) == pytest.approx(sum(left) / len(left))
    assert sum(batch.lost for own in ranks for batch in own) == 1


def test_a_batch_without_one_good_sample_does_not_count():
    bad = tuple(taken(opened(Plain()).epoch(0))[1][2][place][0] for place in range(3))
    bad = [index for indices in bad for index in indices]
    data = opened(Plain(bad=bad))
    got = taken(data.epoch(0))
    assert (got[1][0], got[1][1]) == (8, 8)
    ((indices, weight, n, (rows, _)),) = got[1][2]
    assert (indices, weight, n) == ([], 0.0, 0) and len(rows) == 1
    later = opened(Plain(bad=bad))
    later.load_state_dict(data.state_dict())
    assert taken(later.epoch(0)) == got


def test_too_many_bad_samples_end_the_run():
    data = opened(Plain(bad=range(0, N, 3)), budget=4)
    with pytest.raises(DataError, match=r"[56] samples cannot be read, more than the 4 allowed: [\d, ]+; the last one"):
        list(data.epoch(0))
    assert opened(Plain()).budget == 10
    with pytest.raises(DataError, match="none of"):
        list(opened(Plain(bad=range(N)), budget=100).epoch(0))


def test_a_file_that_comes_back_is_read():
    class Flaky(Plain):
        back = False

        def __getitem__(self, index):
            if index == 7 and not self.back:
                self.back = True
                raise OSError("the share is gone")
            return super().__getitem__(index)

    data = opened(Flaky())
    assert sorted(seen(taken(data.epoch(0)))) == list(range(N)) and not data.quarantined


def test_samples_that_do_not_fit_together_are_named():
    class Ragged(Plain):
        def __getitem__(self, index):
            return torch.zeros(index + 1)

    data = opened(Ragged(), loader={"num_workers": 1})
    with pytest.raises(DataError, match=r"the samples [\d, ]+ could not be put together"):
        list(data.epoch(0))
    data.close()


def test_running_out_of_memory_is_no_bad_sample():
    class Huge(Plain):
        def __getitem__(self, index):
            raise MemoryError

    with pytest.raises(MemoryError):
        list(opened(Huge()).epoch(0))


def test_a_dataset_is_told_the_epoch():
    class Told(Plain):
        at = -1

        def set_epoch(self, epoch):
            self.at = epoch

        def __getitem__(self, index):
            return torch.tensor([float(self.at)]), index

    for workers in (0, 2):
        data = opened(Told(), loader={"num_workers": workers})
        for epoch in (0, 1, 5):
            assert {row[0] for _, _, parts in taken(data.epoch(epoch)) for *_, (rows, _) in parts for row in rows} == {
                float(epoch)
            }
        data.close()


# -- workers that die -------------------------------------------------------------------------------------------------


def workers_of(data):
    return [item.pid for item in data.loader._iterator._workers]


def test_a_killed_worker_is_replaced_and_each_sample_comes_once(reference):
    """Row 10 of the fault matrix; bitwise the same batches, augmentation too."""
    told = []
    data = opened(Noisy(), loader={"num_workers": 2}, say=told.append)
    got = []
    for number, batch in enumerate(data.epoch(0)):
        got += taken([batch])
        if number == 1:
            os.kill(workers_of(data)[0], signal.SIGKILL)
            # Nothing is raised in the middle of the training step.
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                pass
    assert got == reference[0]
    assert len(told) == 1 and "killed by SIGKILL" in told[0] and "started again at sample" in told[0]
    for pid in workers_of(data):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    with pytest.raises(DataError, match=r"again after \d+ batches, at sample \d+ of epoch 1"):
        for number, _ in enumerate(data.epoch(1)):
            if number == 2:
                for pid in workers_of(data):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.3)
    data.close()


def test_workers_outlive_requests_to_stop(reference):
    data = opened(Noisy(), loader={"num_workers": 2})
    passing = data.epoch(0)
    got = taken([next(passing)])
    pids = workers_of(data)
    for pid in pids:
        # From another process, as a scheduler or a terminal would; from the parent they obey.
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
        subprocess.run(["kill", "-INT", str(pid)], check=True)
    time.sleep(0.2)
    assert got + taken(passing) == reference[0]
    assert workers_of(data) == pids
    for item in data.loader._iterator._workers:
        item.terminate()
        item.join(5)
        assert item.exitcode == 0
    data.close()


ORPHANS = """
import os, signal, sys, time, torch
from upshift.engine.data import open_data
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index): time.sleep(0.01); return torch.zeros(4096), index
data = open_data(Slow(), seed=0, global_batch=8, loader={"num_workers": 2})
passing = data.epoch(0)
next(passing)
print(*[item.pid for item in data.loader._iterator._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_training_is_killed(tmp_path):
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    until = time.monotonic() + 3.5  # PyTorch alone takes up to five seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < until, "workers are left behind"
        time.sleep(0.05)
    assert len(pids) == 2


# -- techniques -------------------------------------------------------------------------------------------------------


def defaults(technique, **changes):
    return {**{key: spec.default for key, spec in technique.card.settings.items()}, **changes}


def with_technique(dataset, technique, scratch="", **settings):
    """Data with a technique at both sites of a loader; what it answered."""
    chosen, answers = defaults(technique, **settings), []

    def on_args(args):
        answers.append(technique.at(LoaderArgs(args=args, main_guard=True), chosen))

    def on_loader(loader):
        answers.append(technique.at(LoaderReady(loader=loader, scratch=str(scratch)), chosen))

    return opened(dataset, on_args=on_args, on_loader=on_loader), answers


def test_the_loader_technique_gives_workers_and_the_same_tensors(reference, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    data, answers = with_technique(Noisy(), Loader(), workers=2)
    assert isinstance(answers[0], LoaderApplied) and data.loader.num_workers == 2
    # The engine keeps the workers itself.
    assert not isinstance(answers[1], Persistence) and data.loader.persistent_workers
    assert [taken(data.epoch(epoch)) for epoch in (0, 1)] == reference[:2]
    data.close()


def test_the_cache_serves_a_dataset_that_draws_nothing(tmp_path):
    expected = [taken(opened(Plain()).epoch(epoch)) for epoch in range(3)]
    data, answers = with_technique(Plain(), Cache(), tmp_path)
    applied = answers[1]
    assert not isinstance(applied, NoEffect), applied
    assert [taken(data.epoch(epoch)) for epoch in range(3)] == expected
    assert applied.effect() is None and applied.store.served > N and not applied.problem
    applied.close()


def test_the_cache_keeps_away_from_a_dataset_that_draws(tmp_path, reference):
    """The streams are put back after every read, and still the draws are seen."""
    data, answers = with_technique(Noisy(), Cache(), tmp_path)
    assert isinstance(answers[1], NoEffect) and "draws from" in answers[1].reason
    assert [taken(data.epoch(epoch)) for epoch in range(2)] == reference[:2]


def test_the_cache_goes_on_beside_bad_samples(tmp_path):
    expected = opened(Plain(bad=(5,)))
    data, _ = with_technique(Plain(bad=(5,)), Cache(), tmp_path)
    for epoch in range(3):
        assert taken(data.epoch(epoch)) == taken(expected.epoch(epoch))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["batch_size", "shuffle", "sampler", "drop_last", "in_order", "collate_fn"])
def test_arguments_that_would_change_the_training_are_refused(argument):
    with pytest.raises(UsageError, match=f"'{argument}' is no argument of the loader"):
        opened(Plain(), loader={argument: 1})


def test_a_loader_is_no_dataset():
    with pytest.raises(UsageError, match=r"loader\.dataset"):
        opened(DataLoader(Plain()))


def test_a_resume_with_fewer_samples_is_refused():
    state = opened(Plain()).state_dict()
    with pytest.raises(DataChangedError, match="length was 37 and is 36"):
        opened(Plain(36)).load_state_dict(state)


def test_batches_already_cut_are_divided_when_memory_runs_out():
    data = opened(Plain(), micro_batch=8, loader={"num_workers": 1})
    sizes = []
    for batch in data.epoch(0):
        sizes.append([part.n for part in batch.parts])
        assert sum(part.weight for part in batch.parts) == pytest.approx(1.0)
        data.micro_batch = 2
    assert sizes == [[8], [2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [1, 2, 2]]
    data.close()
