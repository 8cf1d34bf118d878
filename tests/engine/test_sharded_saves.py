"""Two ranks train in shards, and each saves its own beside the training: what is resumed is what was there, bitwise."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch
import torch.nn.functional as F
from ranked import Started, gathered

from upshift import Job
from upshift.api.checkpoints import export
from upshift.checkpoint.compare import differences
from upshift.checkpoint.disk import Disk
from upshift.checkpoint.foreign import load_weights
from upshift.checkpoint.store import Store
from upshift.engine.averages import Ema
from upshift.engine.group import LOST, Group
from upshift.engine.plainstate import model_state, optimizer_state
from upshift.engine.run import train_job
from upshift.engine.settings import Execution

STEPS, STOP = 9, 4

_generator = torch.Generator().manual_seed(2)
X = torch.randn(120, 7, generator=_generator)
Y = X.sum(1, keepdim=True).sin()


class Block(torch.nn.Module):
    """Sizes that two do not divide, a bias of one element, a buffer that changes, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 11), torch.nn.Linear(11, 7)
        self.norm = torch.nn.BatchNorm1d(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(self.down(F.relu(self.up(self.norm(x)))), 0.2, self.training)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.head = torch.nn.Linear(7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.blocks(x))
        return found


#: The optimizers that were built in this process, for a look at their state.
BUILT: list[torch.optim.Optimizer] = []


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    BUILT.append(torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1))
    return BUILT[-1]


job = Job(
    model=Net, train_data=(X, Y), loss=F.mse_loss, optimizer=optimizer, average=Ema(0.9), clip=1.0, global_batch=24,
    steps=STEPS, seed=3,
)  # fmt: skip


def trained(out: Path | None, how: Job = job, parallel: str = "fsdp2", **more: Any) -> Any:
    return train_job(how, Execution(out=out, parallel=parallel, signals=False, **more))


class Shared:
    """Every training of this process in one group."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __enter__(self) -> Any:
        return self.group

    def __exit__(self, *error: object) -> None:
        pass


@contextlib.contextmanager
def one_group() -> Iterator[Any]:
    """The group of this process, for all trainings and looks at their state inside the block."""
    torch.set_num_threads(1)
    with Group.here(device="cpu") as group:
        Group.here = lambda **settings: Shared(group)  # type: ignore[method-assign, assignment]
        yield group


def digest(state: Any) -> str:
    """Of a state without shards: names, types and bits."""
    found = hashlib.sha256()
    if isinstance(state, dict):
        for key, value in state.items():
            found.update(f"{key}:{digest(value)};".encode())
    elif isinstance(state, (list, tuple)):
        found.update(",".join(digest(value) for value in state).encode())
    elif isinstance(state, torch.Tensor):
        found.update(f"{state.dtype}{tuple(state.shape)}".encode())
        found.update(state.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        found.update(repr(state).encode())
    return found.hexdigest()


def now(result: Any) -> list[str]:
    """Weights and optimizer as they are, gathered by torch itself."""
    state = gathered([model_state(result.model), optimizer_state(result.model, BUILT[-1])])
    return [digest(state[0]), digest(state[1])]


def stored(out: Path) -> list[str]:
    """The same of the newest checkpoint, put together from the files."""
    store = Store(out)
    tree = store.load(store.newest(), rank=0)[0]
    return [digest(tree["model"]), digest(tree["optimizer"])]


def steps_of(out: Path) -> list[int]:
    return [item.step for item in Store(out).checkpoints()]


# -- what two ranks do, in one go -------------------------------------------------------------------------------------


def _all(folder: str) -> Any:
    with one_group() as group:
        root = Path(folder)
        return {act.__name__: act(group, root) for act in (_resumed, _damaged, _from_one, _full, _beside, _in_memory)}


def _resumed(group: Any, root: Path) -> Any:
    whole = now(trained(root / "whole"))
    stopped = trained(root / "stopped", stop_at=STOP)
    group.barrier()
    if group.main:
        shutil.copytree(root / "stopped", root / "copy")
        shutil.copytree(root / "stopped", root / "damaged")
    group.barrier()
    return {"whole": whole, "stopped": now(stopped), "code": stopped.code, "resumed": now(trained(root / "stopped"))}


def _damaged(group: Any, root: Path) -> Any:
    """One bit of the file of rank 1 is wrong."""
    out = root / "damaged"
    if group.main:
        newest = out / "checkpoints" / f"step-{STOP}-a1" / "rank-1-of-2.safetensors"
        data = bytearray(newest.read_bytes())
        data[-40] ^= 4
        newest.write_bytes(data)
    group.barrier()
    said: list[str] = []
    return {"now": now(trained(out, say=said.append)), "said": said}


def _from_one(group: Any, root: Path) -> Any:
    """Goes on from what one process wrote; no step is left to do."""
    return now(trained(root / "one", job.set(steps=STOP)))


def _full(group: Any, root: Path) -> Any:
    """The disk of rank 1 is full for a while."""
    create, full, said = Disk.create, [False], list[str]()

    def on_batch(step: int, epoch: int, rows: Any) -> None:
        full[0] = group.rank == 1 and 3 <= step <= 6

    def no_space(disk: Disk, path: Path) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(disk, path)

    Disk.create = no_space  # type: ignore[method-assign]
    try:
        result = trained(root / "full", save_steps=2, on_batch=on_batch, say=said.append)
    finally:
        Disk.create = create  # type: ignore[method-assign]
    group.barrier()
    return {"now": now(result), "said": said, "steps": steps_of(root / "full")}


def _beside(group: Any, root: Path) -> Any:
    """Rank 1's disk answers only after two more updates were made."""
    sync, later, waited = Disk.sync, threading.Event(), list[bool]()

    def on_batch(step: int, epoch: int, rows: Any) -> None:
        if step == 5:
            later.set()

    def slow(disk: Disk, fd: int) -> None:
        if group.rank == 1 and threading.current_thread().name == "upshift-checkpoint" and "step-3" in _path(fd):
            waited.append(later.wait(30))
        sync(disk, fd)

    Disk.sync = slow  # type: ignore[method-assign]
    try:
        result = trained(root / "beside", save_steps=3, on_batch=on_batch)
    finally:
        Disk.sync = sync  # type: ignore[method-assign]
    group.barrier()
    return {"now": now(result), "waited": waited, "steps": steps_of(root / "beside")}


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def _in_memory(group: Any, root: Path) -> Any:
    """Without a folder: back to the state that was kept, past a batch whose loss is not finite."""
    said: list[str] = []
    left = [1]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        found = F.mse_loss(output, target)
        if left[0] and len(said) == 0 and output.requires_grad and group.rank == 1:
            left[0] = 0
            return found * float("nan")
        return found

    trained(None, job.set(loss=loss), say=said.append)
    return said


def _train_one(out: Path, steps: int) -> list[str]:
    return now(trained(out, job.set(steps=steps)))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks came to, their run folders, and what one process had written before."""
    root = tmp_path_factory.mktemp("runs")
    one = _train_one(root / "one", STOP)
    told = tmp_path_factory.mktemp("told")
    first, second = ranked.run(2, _all, str(root), folder=told)
    return {"root": root, "one": one, "first": first, "second": second}


def test_it_goes_on_bitwise_and_each_rank_writes_its_own(found: Any) -> None:
    first, root = found["first"]["_resumed"], found["root"]
    assert first == found["second"]["_resumed"] and first["code"] == 143
    assert first["resumed"] == first["whole"] != first["stopped"]
    assert stored(root / "stopped") == first["whole"] and stored(root / "copy") == first["stopped"]
    states = []
    for out in (root / "whole", root / "stopped"):
        store = Store(out)
        newest = store.newest()
        trees = [store.load(newest, rank=rank)[0] for rank in range(2)]
        assert set(trees[1]) == {"random"} and trees[0]["average"]["averaged"] == STEPS
        trees[0]["progress"].pop("seconds")
        states.append(trees)
        sizes = [newest.path.joinpath(f"rank-{rank}-of-2.safetensors").stat().st_size for rank in range(2)]
        assert min(sizes) > 0.6 * max(sizes), "nobody writes the whole model"
    assert differences(states[0], states[1]) == []


def test_one_process_goes_on_from_two_and_two_from_one(found: Any, tmp_path: Path) -> None:
    first, root = found["first"], found["root"]
    assert first["_from_one"] == found["one"] == stored(root / "one")
    shutil.copytree(root / "copy", tmp_path / "run")
    assert _train_one(tmp_path / "run", STOP) == first["_resumed"]["stopped"]
    said: list[str] = []
    assert trained(tmp_path / "run", say=said.append).steps == STEPS
    assert any("2 processes then, 1 now" in text for text in said)


def test_weights_are_exported_whole_and_start_another_training(found: Any, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    export(found["root"] / "copy", file, averaged=False)
    weights = load_weights(file)
    assert list(weights) and set(weights) == set(Net().state_dict())
    assert digest({name: weights[name] for name in Net().state_dict()}) == found["first"]["_resumed"]["stopped"][0]
    Net().load_state_dict(weights)
    export(found["root"] / "copy", file)
    averaged = load_weights(file)
    assert not torch.equal(averaged["head.weight"], weights["head.weight"])
    assert trained(None, job.set(start=str(file), steps=1)).steps == 1


def test_a_damaged_file_of_one_rank_is_found_by_both(found: Any) -> None:
    first, second = found["first"]["_damaged"], found["second"]["_damaged"]
    assert first["now"] == second["now"] == found["first"]["_resumed"]["whole"]
    assert any("rank-1-of-2.safetensors is damaged" in text for text in first["said"])
    assert (found["root"] / "damaged/checkpoints/quarantine" / f"step-{STOP}-a1").is_dir()


def test_one_rank_cannot_write_and_both_go_on(found: Any) -> None:
    first, second = found["first"]["_full"], found["second"]["_full"]
    assert first["now"] == second["now"] == found["first"]["_resumed"]["whole"]
    told = [text for text in first["said"] if "not saved, training goes on" in text]
    assert len(told) == 2 and all("No space left" in text for text in told), first["said"]
    assert first["steps"] == [8, 9]
    assert all(item.verified for item in Store(found["root"] / "full").checkpoints(verify=True))


def test_training_goes_on_while_a_rank_still_writes(found: Any) -> None:
    first, second = found["first"]["_beside"], found["second"]["_beside"]
    assert second["waited"] == [True], "rank 1 waited for an update that only a training that goes on makes"
    assert first["waited"] == [] and first["now"] == found["first"]["_resumed"]["whole"]
    assert first["steps"] == [6, 9]


def test_without_a_folder_each_rank_goes_back_to_the_shards_it_kept(found: Any) -> None:
    for rank in ("first", "second"):
        said = found[rank]["_in_memory"]
        assert rank == "second" or any("back to the last good state" in text for text in said), said


# -- a rank is killed while it writes ----------------------------------------------------------------------------------


def _killed(folder: str, step: int) -> Any:
    """Rank 1 is killed in the middle of writing the state of `step`."""
    write = Disk.write

    def deadly(disk: Disk, fd: int, data: memoryview) -> int:
        if os.environ["RANK"] == "1" and f"step-{step}-" in _path(fd):
            write(disk, fd, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(disk, fd, data)

    Disk.write = deadly  # type: ignore[method-assign]
    torch.set_num_threads(1)
    return trained(Path(folder), save_steps=2).steps


@pytest.mark.extra
@pytest.mark.parametrize("step", [4, STEPS])
def test_a_rank_killed_while_it_writes_leaves_nothing_unreadable(tmp_path: Path, step: int) -> None:
    """The other one is out soon, also at the end of the training; started again, both go on bitwise."""
    out = tmp_path / "run"
    whole = ranked.run(2, _whole, str(tmp_path / "whole"), folder=tmp_path)[0]
    folder = tmp_path / "killed"
    folder.mkdir()
    ranks = Started(2, _killed, str(out), step, folder=folder)
    ended = ranks.wait(60)
    assert ended[1].code == -signal.SIGKILL and ended[0].code == LOST, ended
    listed = Store(out).checkpoints(verify=True)
    assert listed and all(item.verified for item in listed) and max(item.step for item in listed) < step
    again = ranked.run(2, _whole, str(out), folder=tmp_path)
    assert again[0] == again[1] == whole and steps_of(out)[-1] == STEPS


def _whole(folder: str) -> Any:
    with one_group():
        return now(trained(Path(folder), save_steps=2))


# -- four ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.extra
def test_four_ranks_go_on_from_two_and_two_from_four(found: Any, tmp_path: Path) -> None:
    shutil.copytree(found["root"] / "copy", tmp_path / "run")
    four = ranked.run(4, _at, str(tmp_path / "run"), STOP, folder=tmp_path)
    assert all(rank == found["first"]["_resumed"]["stopped"] for rank in four)
    more = ranked.run(4, _at, str(tmp_path / "run"), STOP + 2, folder=tmp_path)
    assert stored(tmp_path / "run") == more[0]
    assert ranked.run(2, _at, str(tmp_path / "run"), STOP + 2, folder=tmp_path) == [more[0]] * 2


def _at(folder: str, steps: int) -> Any:
    with one_group():
        return now(trained(Path(folder), job.set(steps=steps)))
