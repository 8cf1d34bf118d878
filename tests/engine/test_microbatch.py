"""The search for a micro-batch against simulated memory; probes against real limits."""

from __future__ import annotations

import math
import random
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.engine.heaviest import elements, heaviest
from upshift.engine.memory import is_out_of_memory
from upshift.engine.microbatch import HEADROOM, Outcome, search, useful_sizes
from upshift.engine.probe import Report, Request, batch_norm
from upshift.engine.probing import Prober, in_fresh_process
from upshift.errors import ScriptFailedError, TrainingError, UsageError


@given(st.integers(1, 5000))
def test_useful_sizes_are_all_those_that_an_even_division_gives(share):
    assert useful_sizes(share) == sorted({-(-share // passes) for passes in range(1, share + 1)})


@settings(max_examples=300, deadline=None)
@given(
    share=st.integers(1, 3000), base=st.integers(0, 900), each=st.floats(0.1, 50), noise=st.sampled_from([0.0, 0.04]),
    seed=st.integers(0, 10**6), best=st.floats(0.01, 1.0), told=st.booleans(),
)  # fmt: skip
def test_size_found_never_fails_and_without_noise_is_the_largest(share, base, each, noise, seed, best, told):
    """`told`: the probe reports its peak; otherwise it only says whether it ran under the headroom."""
    draw, limit, tries = random.Random(seed), 1000.0, []

    def probe(size):
        tries.append(size)
        peak = (base + each * size) * (1 + draw.uniform(-noise, noise))
        seconds = abs(math.log(size / (best * share))) + 1.0
        return Outcome(peak <= (limit if told else limit * HEADROOM), math.ceil(peak) if told else None, seconds)

    if (base + each) * (1 - noise) > limit * HEADROOM:
        with pytest.raises(TrainingError, match="does not fit"):
            search(probe, share, limit=int(limit))
        return
    try:
        found = search(probe, share, limit=int(limit))
    except TrainingError:
        assert noise and (base + each) * (1 + noise) > limit * HEADROOM
        return
    for size in (found.size, found.largest):
        assert (base + each * size) * (1 + noise) <= limit
    if not noise:
        assert found.largest == max(size for size in useful_sizes(share) if base + each * size <= limit * HEADROOM)
        assert len(tries) <= 3 * math.log2(share + 1) + 6
    assert found.tried[found.size].seconds <= found.tried[found.largest].seconds * 1.03


def test_faster_size_is_chosen_and_both_are_told():
    seconds = {512: 2.0, 256: 1.0, 128: 1.5}
    said = []
    found = search(lambda size: Outcome(True, size * 2**20, seconds.get(size, 9.0)), 512, say=said.append)
    assert (found.size, found.largest) == (256, 512) and found.rate(256) == 512
    assert str(found) == (
        "micro-batch 256: 512 samples/s, 256 MiB (measured); "
        "the largest that fits is 512: 256 samples/s, 512 MiB (measured)"
    )
    assert len(said) == 4 and said[0].startswith("micro-batch 512 fits")  # the choice was tried twice


def test_size_that_fails_when_tried_again_is_not_handed_out():
    tries = []

    def probe(size):
        tries.append(size)
        return Outcome(size < 64 or (size == 64 and tries.count(64) == 1), None, 1.0 / size)

    found = search(probe, 128)
    assert found.size == found.largest and found.size < 64 and not found.tried[64].fits


def test_nothing_fits():
    with pytest.raises(TrainingError, match="micro-batch of 1 does not fit into 1 KiB: too much") as caught:
        search(lambda size: Outcome(False, why="too much"), 8, limit=1024)
    assert "activation_checkpointing" in caught.value.remedy


def test_batch_normalisation_is_said_or_declined():
    def probe(size):
        return Outcome(size <= 4, None, 1.0, "" if size <= 4 else "too much", "body.1: BatchNorm1d")

    assert "statistics are those of 4 samples, not of 8" in search(probe, 8).warning
    with pytest.raises(UsageError, match="another training"):
        search(probe, 8, exact=True)
    whole = search(lambda size: Outcome(True, None, float(size), "", "n: BatchNorm1d"), 8, exact=True)
    assert whole.size == 8 and not whole.warning


def test_batch_norm_is_found_and_frozen_one_is_not():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert batch_norm(net) == "1: BatchNorm1d"
    assert batch_norm(torch.nn.Sequential(torch.nn.LayerNorm(2))) == ""


def test_out_of_memory_is_told_apart():
    for error in (
        torch.OutOfMemoryError("x"), MemoryError(), OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ):  # fmt: skip
        assert is_out_of_memory(error)
    for error in (RuntimeError("out of range"), OSError(2, "no such file"), ValueError("std::bad_alloc")):
        assert not is_out_of_memory(error)


# -- the heaviest sample ----------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return torch.zeros(self.lengths[index]), index


@given(st.lists(st.integers(1, 40), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_longest_sample_is_found(lengths):
    found = heaviest(Texts(lengths), None)
    assert found.elements == max(lengths) + 1 and found.seen == found.length == len(lengths)
    x, y = found.batch(3)
    assert x.shape == (3, max(lengths)) and y.tolist() == [lengths.index(max(lengths), found.index)] * 3


def test_time_limited_scan_is_spread_and_says_so():
    class Slow(Texts):
        def __getitem__(self, index):
            time.sleep(0.002)
            return super().__getitem__(index)

    found = heaviest(Slow([5] * 9_000 + [9] * 1_000), None, seconds=0.3)
    assert found.seen < 200 and found.elements == 10  # a long stretch at the end is met
    assert heaviest(Slow([1, 2]), None, index=1).seen == 1


def test_tensors_and_streams():
    x = torch.zeros(7, 3)
    assert heaviest((x, x), None).batch(9)[0].shape == (9, 3)
    assert heaviest({"a": x}, None).batch(2)["a"].shape == (2, 3)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (torch.zeros(n) for n in (1, 5, 2))

    found = heaviest(Stream(), None)
    assert (found.elements, found.seen, found.length) == (5, 3, None) and found.batch(2).shape == (2, 5)
    assert elements({"ids": [1, 2, 3], "text": "abcd"}) == 7


# -- the probe ---------------------------------------------------------------------------------------------------------

JOB = """
import torch, torch.nn.functional as F
from functools import partial
from upshift import Job

torch.set_num_threads(1)
x, y = torch.randn(2048, 64), torch.randint(0, 4, (2048,))

def made(width=512):
    def model():
        layers = [torch.nn.Linear(64, width), *(torch.nn.ReLU() for _ in range(12)), torch.nn.Linear(width, 4)]
        return torch.nn.Sequential(*layers)
    return Job(model=model, train_data=(x, y), eval_data=(x[:8], y[:8]), loss=F.cross_entropy,
               optimizer=partial(torch.optim.AdamW, lr=1e-3), global_batch=2048, steps=3)
"""


@pytest.fixture
def reference(tmp_path):
    file = tmp_path / "memory_jobs.py"
    file.write_text(JOB)
    return f"{file}:made"


def asked(reference, tmp_path, **changes):
    return Request(
        **{"reference": reference, "size": 1024, "share": 2048, "report": str(tmp_path / "r.json"), **changes}
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
def test_probe_in_a_fresh_process_reports_what_it_held_and_what_the_limit_stopped(reference, tmp_path):
    wide = {"width": "2048"}
    found = in_fresh_process(asked(reference, tmp_path, limit=3 * 2**30, settings=wide))
    assert found.fits and not found.error and found.seconds > 0 and found.train_index == 0 == found.eval_index
    # Twelve results of 1024 x 2048 float32 are 100 MB, and all are held at once.
    assert 100e6 < found.peak_bytes < 3 * 2**30
    tight = in_fresh_process(asked(reference, tmp_path, limit=found.peak_bytes - 40 * 2**20, settings=wide))
    assert not tight.fits and not tight.error and "memory" in tight.why


def test_error_that_is_not_memory_ends_the_search(tmp_path):
    prober = Prober(asked("jobs.py:x", tmp_path), lambda request: Report(error="ValueError: no such model"))
    with pytest.raises(ScriptFailedError, match=r"jobs\.py:x fails with a micro-batch of 4: ValueError: no such model"):
        prober(4)
    prober.close()


def test_largest_sample_is_looked_for_once(tmp_path):
    requests, said = [], []

    def run(request):
        requests.append(request)
        return Report(fits=True, limit=100, train_index=7, eval_index=3, scanned="9 of 9", seconds=1.0)

    prober = Prober(asked("jobs.py:x", tmp_path), run, said.append)
    prober(8)
    prober(4)
    prober.close()
    assert [item.train_index for item in requests] == [None, 7] and requests[1].limit == 100 == prober.limit
    assert said == ["largest sample: looked at 9 of 9 samples"]
