"""Shards of several ranks: any part of the whole tensor comes out of the files, and nothing that does not fit."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import Threads
from safetensors import safe_open

from upshift.checkpoint import Saver, Store
from upshift.checkpoint import tensors as files
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.opened import Stored, held
from upshift.checkpoint.shards import Shard, Spread
from upshift.checkpoint.tensors import Contents
from upshift.errors import CheckpointError
from upshift.testing.crashes import same
from upshift.testing.disks import failing


class Memory:
    """A file in memory, which counts what is read of it."""

    def __init__(self, tensors, places):
        self.fd = os.memfd_create("shards")
        files.write(self, tensors, places)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.contents = Contents(_Counting(self), self.fd, files.rare_dtypes(tensors))
        self.read = 0

    def write(self, data):
        os.write(self.fd, data)

    def __del__(self):
        os.close(self.fd)


class _Counting(Disk):
    def __init__(self, memory):
        self._memory = memory

    def read(self, fd, into):
        n = super().read(fd, into)
        self._memory.read = getattr(self._memory, "read", 0) + n
        return n


DTYPES = [torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.int64]


@st.composite
def cut(draw):
    """A tensor, its blocks by cuts along each axis in any order, and a block that is wanted."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    count = 1
    for n in shape:
        count *= n
    whole = torch.arange(1, count + 1).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    blocks = [((), ())]
    for ends in cuts:
        pairs = list(itertools.pairwise(ends))
        blocks = [((*o, a), (*e, b)) for o, e in blocks for a, b in pairs]
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    length = tuple(draw(st.integers(0, n - o)) for o, n in zip(offset, shape, strict=True))
    return whole, draw(st.permutations(blocks)), offset, length


def part_of(tensor, offset, end):
    return tensor[tuple(slice(a, b) for a, b in zip(offset, end, strict=True))]


@settings(max_examples=150, deadline=None)
@given(cut())
def test_any_block_comes_out_of_any_cut(given):
    whole, blocks, offset, length = given
    memories = [Memory({"w": part_of(whole, o, e).clone()}, {"w": (whole.shape, o)}) for o, e in blocks]
    pieces = [(memory.contents, memory.contents.shards["w"][1]) for memory in memories]
    stored = Stored("w", tuple(whole.shape), lambda: iter(pieces))
    found = stored.part(offset, length)
    expected = part_of(whole, offset, [o + n for o, n in zip(offset, length, strict=True)])
    assert found.dtype == whole.dtype and found.shape == expected.shape and torch.equal(found, expected)
    assert torch.equal(stored.whole(), whole)


def test_rows_are_read_without_the_rest_of_the_file():
    whole = torch.arange(6000.0).reshape(600, 10)
    memory = Memory({"w": whole}, {})
    memory.read = 0
    box = memory.contents.kind("w")[1]
    assert box == (600, 10)
    from upshift.checkpoint.shards import whole as all_of

    stored = Stored("w", box, lambda: iter([(memory.contents, all_of(box))]))
    assert torch.equal(stored.part((150, 0), (150, 10)), whole[150:300])
    assert memory.read == 150 * 10 * 4


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([(0, 3)], "do not hold all"),
        ([(0, 3), (4, 6)], "do not hold all"),
        ([(0, 4), (2, 6)], "do not fit together"),
        ([], "do not hold all"),
    ],
)
def test_shards_that_do_not_make_a_whole_are_refused(blocks, said):
    memories = [Memory({"w": torch.ones(b - a)}, {"w": ((6,), (a,))}) for a, b in blocks]
    pieces = [(memory.contents, memory.contents.shards["w"][1]) for memory in memories]
    with pytest.raises(CheckpointError, match=said):
        Stored("w", (6,), lambda: iter(pieces)).whole()


@pytest.mark.parametrize(
    "places",
    ["{", "[]", '{"w": 3}', '{"w": [[6], [-1]]}', '{"w": [[6], [4]]}', '{"w": [[6, 1], [0, 0]]}', '{"x": [[6], [0]]}',
     '{"w": [[6], [9223372036854775808]]}', '{"w": [[1e400], [0]]}', "[" * 100_000],
)  # fmt: skip
def test_places_of_strangers_are_bounded(places, monkeypatch):
    from upshift.checkpoint import shards

    monkeypatch.setattr(shards, "to_text", lambda _: places)
    with pytest.raises(CheckpointError):
        Memory({"w": torch.ones(3)}, {"w": ((6,), (0,))})


# -- several ranks ----------------------------------------------------------------------------------------------------

WIDE, TALL = torch.arange(35.0).reshape(7, 5), torch.arange(4.0)


def chunk(tensor, rank, world):
    """Along the first axis, as torch.chunk."""
    block = -(-len(tensor) // world)
    first = min(rank * block, len(tensor))
    return Shard(tensor[first : first + block].clone(), tuple(tensor.shape), (first, *(0,) * (tensor.dim() - 1)))


def held_by(rank, world, plus=0.0):
    """State and shards of a rank; only rank 0 has the state that is the same on all."""
    shards = {"model.wide": chunk(WIDE + plus, rank, world), "model.tall": chunk(TALL + plus, rank, world)}
    state = {"random": torch.full((3,), rank)}
    if rank == 0:
        model = {"wide": Spread("model.wide", (7, 5)), "tall": Spread("model.tall", (4,)), "plain": torch.ones(2)}
        # A name that is that of a shard.
        state |= {"model": model, "step": 3, "model.wide": torch.zeros(1)}
    return state, shards


def expected(plus=0.0):
    model = {"wide": WIDE + plus, "tall": TALL + plus, "plain": torch.ones(2)}
    return {"random": torch.full((3,), 0), "model": model, "step": 3, "model.wide": torch.zeros(1)}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_write_their_shards_and_read_the_whole(tmp_path, world):
    def act(rank, store):
        store.acquire()
        state, shards = held_by(rank, world)
        saved = store.save(3, state, shards=shards)
        with store.opened(store.newest()) as found:
            own = found.lazily(0)["model"]["wide"].part(shards["model.wide"].offset, shards["model.wide"].tensor.shape)
        return saved, own, store.load(store.newest())[0]

    results = Threads(tmp_path, world).run(act)
    saved = results[0][0]
    for rank, (_, own, loaded) in enumerate(results):
        assert torch.equal(own, chunk(WIDE, rank, world).tensor)
        assert same(loaded, expected() if rank == 0 else {"random": torch.full((3,), rank)})
    alone = Store(tmp_path)
    assert same(alone.load(alone.newest(), rank=0)[0], expected())
    assert (
        saved.bytes
        == sum(path.stat().st_size for path in saved.path.iterdir()) - (saved.path / "manifest.json").stat().st_size
    )
    with safe_open(saved.path / f"rank-0-of-{world}.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.wide"), chunk(WIDE, 0, world).tensor)
        assert json.loads(file.metadata()["shards"])["model.tall"] == [[4], [0]]


def test_other_numbers_of_ranks_take_their_parts(tmp_path):
    def save(rank, store):
        store.acquire()
        state, shards = held_by(rank, 3)
        store.save(3, state, shards=shards)

    Threads(tmp_path, 3).run(save)
    for world in (1, 2, 4, 9):
        for rank in range(world):
            store = Store(tmp_path, rank, world, lambda obj: [obj], lambda obj: obj)
            with store.opened(Store(tmp_path).newest()) as found:
                tree = found.lazily(0)
                for name, whole in (("wide", WIDE), ("tall", TALL)):
                    mine = chunk(whole, rank, world)
                    assert torch.equal(tree["model"][name].part(mine.offset, mine.tensor.shape), mine.tensor)
                assert same(held(tree), expected())


def test_the_same_ranks_need_no_file_of_the_others(tmp_path):
    def save(rank, store):
        store.acquire()
        state, shards = held_by(rank, 3)
        return store.save(3, state, shards=shards).path

    path = Threads(tmp_path, 3).run(save)[0]
    newest = Store(tmp_path).newest()
    (path / "rank-1-of-3.safetensors").unlink()
    store = Store(tmp_path, 2, 3, lambda obj: [obj], lambda obj: obj)
    mine = chunk(WIDE, 2, 3)
    with store.opened(newest) as found:
        model = found.lazily(0)["model"]
        stored = model["wide"]
        assert torch.equal(stored.part(mine.offset, mine.tensor.shape), mine.tensor)
        with pytest.raises(FileNotFoundError):
            stored.whole()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Store(tmp_path).load(newest)
    with pytest.raises(ValueError, match="closed"):
        found.lazily(0)
    with pytest.raises(OSError):
        model["plain"].whole()


def test_damage_to_the_file_of_any_rank_is_found_by_all(tmp_path):
    """Truncation and flipped bits: all ranks go on with the checkpoint before."""

    def save(rank, store):
        store.acquire()
        for step in (1, 2):
            state, shards = held_by(rank, 2, plus=float(step))
            store.save(step, state, shards=shards)

    Threads(tmp_path / "good").run(save)
    rng = random.Random(5)
    names = sorted(path.name for path in (tmp_path / "good/checkpoints/step-2-a1").iterdir())
    assert len(names) == 4
    for number, name in enumerate([*names * 3, "rank-1-of-2.safetensors"]):
        folder = tmp_path / f"bad-{number}"
        shutil.copytree(tmp_path / "good", folder)
        file = folder / "checkpoints/step-2-a1" / name
        data = bytearray(file.read_bytes())
        if number % 2:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)

        def look(rank, store):
            store.acquire()
            newest = store.newest()
            with store.opened(newest) as found:
                return newest.step, held(found.lazily(0))

        for step, tree in Threads(folder).run(look):
            assert step == 1 and same(tree, expected(plus=1.0)), name
        assert (folder / "checkpoints/quarantine/step-2-a1").is_dir()


def test_a_rank_that_cannot_write_fails_the_save_for_all_and_the_next_goes_well(tmp_path):
    """Only the second save of rank 1 fails; every rank goes on and says so."""
    disk = failing(("create",), errno.ENOSPC, after=1)

    def act(rank, store):
        said = []
        store.say = said.append
        store.acquire()
        saver = Saver(store)
        steps = []
        for step in (1, 2, 3):
            if step == 3 and rank == 1:
                disk._before = lambda n, name, subject: None
            state, shards = held_by(rank, 2, plus=float(step))
            saver.save(step, state, shards=shards)
            shards["model.wide"].tensor.zero_()  # training goes on
            saver.wait()
            steps.append((saver.last.step, saver.error is None))
        return steps, said

    for steps, said in Threads(tmp_path, disks=(None, disk)).run(act):
        assert steps == [(1, True), (1, False), (3, True)]
        assert len(said) == 1 and "step 2 was not written" in said[0] and "No space left" in said[0]
    store = Store(tmp_path)
    assert [item.step for item in store.checkpoints(verify=True) if item.verified] == [1, 3]
    assert same(store.load(store.newest(), rank=0)[0], expected(plus=3.0))
    assert not list(store.folder.glob(".tmp-*"))


def test_a_state_that_one_rank_cannot_save_fails_alike(tmp_path):
    def act(rank, store):
        store.acquire()
        saver = Saver(store)
        state, shards = held_by(rank, 2)
        saver.save(1, CheckpointError("sharded unevenly") if rank else state, shards=shards, wait=True)
        return saver.error

    first, second = Threads(tmp_path).run(act)
    assert "rank 1: sharded unevenly" in first.message and "sharded unevenly" in second.message
