"""A run that was stopped anywhere ends in the same bits, whatever it was executed with.

Precision, micro-batches, loader processes, ranks; with averaged weights and a schedule or without.

Compared is all that a checkpoint holds (weights, optimizer, schedule, average, scaler, random states, results) and the
samples of every step, against a run that was not stopped.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch
from conftest import often
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upshift.checkpoint.compare import differences
from upshift.checkpoint.store import Store
from upshift.engine.averages import Swa
from upshift.engine.optimizers import optimizer
from upshift.engine.parameters import ParameterGroups
from upshift.engine.run import train_job
from upshift.engine.schedules import from_torch
from upshift.engine.settings import Execution
from upshift.engine.stopping import EarlyStop
from upshift.errors import MissingExtraError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_jobs import Streamed, X, Y, augmented, full

#: Two epochs of seven updates, with everything that has a state, and with nothing that need not be there.
STEPS = 14
EVERYTHING = full.set(epochs=2)
NOTHING = EVERYTHING.set(schedule=None, average=None, clip=None, metrics={}, eval_data=None,
                         optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))  # fmt: skip

#: What losses are multiplied by at first, with fp16.
START = 2.0**20

PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"bf16": {"ops": "all"}},
    # A scale that is found to be too large at first, and grows again while it is trained.
    "fp16": {"fp16": {"scale": START, "interval": 2}},
}

#: Others with a state, or with code of their own.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "ema": {"ema": {"decay": 0.9}},
    "compiled": {"compile": {"dynamic": "no"}},
    "compiled for any shape": {"compile": {"dynamic": "yes"}},
}


OPTIMIZERS = ("adadelta", "adafactor", "adagrad", "adam", "asgd", "lamb", "lion", "muon", "nadam", "radam", "rmsprop",
              "rprop", "schedule_free_adamw", "schedule_free_sgd", "adamw_8bit", "adamw_4bit")  # fmt: skip

#: What a job may declare instead.
DECLARED: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": optimizer(name, lr=1e-3)} for name in OPTIMIZERS},
    "swa": {"average": Swa()},
    "early stop": {"stop_early": EarlyStop("loss", patience=1), "eval_every": 2},
    "groups": {"parameters": ParameterGroups()},
    "one cycle": {"schedule": from_torch(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20))},
    "plateau": {"schedule": from_torch(lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0)),
                "eval_every": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How one training is executed."""

    precision: str
    micro: int | None = None
    draws: bool = False
    workers: int = 0
    bare: bool = False
    parallel: str = "ddp"
    stream: bool = False
    declared: str = ""

    def __str__(self) -> str:
        parts = [self.precision, f"micro {self.micro}" if self.micro else "", "augmented" if self.draws else "",
                 f"{self.workers} workers" if self.workers else "", "bare" if self.bare else "",
                 self.parallel if self.parallel != "ddp" else "", "stream" if self.stream else "",
                 self.declared]  # fmt: skip
        return ", ".join(item for item in parts if item)

    @property
    def job(self) -> Any:
        """What is trained."""
        base = NOTHING if self.bare else EVERYTHING
        if self.declared:
            return base.set(**DECLARED[self.declared])
        if self.stream:
            return base.set(train_data=Streamed(), epochs=None, steps=STEPS)  # its length is not known
        return base.set(train_data=augmented.train_data) if self.draws else base

    def execution(self, out: Path, **more: Any) -> Execution:
        """How, into the folder `out`."""
        return Execution(
            out=out, plan=(PLANS | OTHERS)[self.precision], micro_batch=self.micro, device="cpu", signals=False,
            loader={"num_workers": self.workers} if self.workers else {}, parallel=self.parallel, **more,
        )  # fmt: skip


class Stop(Exception):
    """Pulls the plug."""


def trained(case: Case, out: Path, log: dict[int, Any], stop: int | None = None, every: int = 3,
            softly: bool = False) -> bool:  # fmt: skip
    """Train, or go on; whether it came to its end. At update `stop` the plug is pulled, or it is asked to stop."""

    def on_batch(step: int, epoch: int, rows: Any) -> None:
        if step == stop and not softly:
            raise Stop
        log[step] = [epoch, [int(row) for row in rows]]

    try:
        asked = stop if softly else None
        return train_job(case.job, case.execution(out, on_batch=on_batch, save_steps=every, stop_at=asked)).finished
    except Stop:
        return False


def final(out: Path, rank: int = 0, world: int = 1) -> Any:
    """All that the last checkpoint holds, without what tells how long it took."""
    store = Store(out, rank=rank, world=world, gather=lambda item: [item] * world, broadcast=lambda item: item)
    newest = store.newest()
    assert newest is not None and newest.step == STEPS
    state = store.load(newest, rank=rank)[0]
    progress = state.get("progress", {})
    progress.pop("seconds", None)
    if progress.get("cursor") == 320:
        # Saved with the last update of an epoch, or after it: the same place.
        progress["epoch"], progress["cursor"] = progress["epoch"] + 1, 0
    state.get("results", {}).pop("reached", None)
    return state


# -- one process -------------------------------------------------------------------------------------------------------

CASES = [
    Case(precision, micro, draws, workers, bare)
    for precision, micro, (draws, workers), bare in product(
        PLANS, (None, 13), ((False, 0), (True, 0), (True, 2)), (False, True)
    )
] + [
    *(Case(precision, micro, stream=True) for precision, micro in product(PLANS, (None, 12))),
    *(Case(other, micro) for other, micro in product(OTHERS, (None, 13))),
    *(Case("fp32", declared=name) for name in DECLARED),
]

#: Those of every run of the tests: each pair of what was chosen is in one of them, but for loader processes.
FIRST = [
    Case("fp32", 13, True),
    Case("bf16", None, True, bare=True),
    Case("bf16", 13),
    Case("fp16", 13, True, bare=True),
    Case("fp16"),
    Case("fp32", bare=True),
    Case("fp32", 12, stream=True),
    Case("ema"),
]


@pytest.mark.parametrize("case", often(CASES, *FIRST), ids=str)
def test_stopped_twice_and_bitwise_the_same(case, tmp_path):
    draw = random.Random(str(case))
    whole: dict[int, Any] = {}
    try:
        assert trained(case, tmp_path / "whole", whole)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    log: dict[int, Any] = {}
    for stop in sorted(draw.sample(range(STEPS), 5 if case.stream else 2)):
        assert not trained(case, tmp_path / "run", log, stop, every=draw.randint(1, 5))
    assert trained(case, tmp_path / "run", log)
    assert differences(final(tmp_path / "whole"), final(tmp_path / "run")) == []
    assert log == whole


@pytest.mark.extra
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(
        [case for case in CASES if not case.workers and case.precision in PLANS and not case.declared]
    ),
    stops=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=4),
    every=st.integers(1, STEPS),
)
def test_any_execution_stopped_anywhere(case, stops, every, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    whole: dict[int, Any] = {}
    log: dict[int, Any] = {}
    trained(case, folder / "whole", whole)
    for stop in stops:
        trained(case, folder / "run", log, stop, every)
    assert trained(case, folder / "run", log)
    assert differences(final(folder / "whole"), final(folder / "run")) == []
    assert log == whole


class Placed(torch.utils.data.IterableDataset[Any]):
    """A stream that knows its place, and tells what was read of it."""

    def __init__(self, read: list[int]) -> None:
        self.place, self.read = 0, read

    def __iter__(self) -> Any:
        for place in range(self.place, 320):
            self.place = place + 1
            self.read.append(place)
            yield X[place], Y[place]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_a_stream_that_knows_its_place_is_not_read_twice(tmp_path):
    pytest.importorskip("torchdata.stateful_dataloader")
    read: list[int] = []
    for stop in (4, STEPS):
        job = NOTHING.set(train_data=Placed(read), epochs=None, steps=STEPS)
        train_job(job, Execution(out=tmp_path, device="cpu", signals=False, stop_at=stop))
    assert read == [*range(320), *range(320)]


def test_the_scale_of_fp16_moves_in_these_trainings(tmp_path):
    """Else nothing would be shown of its state."""
    scales = [START]
    for steps in range(1, 6):
        out = tmp_path / str(steps)
        train_job(NOTHING.set(epochs=None, steps=steps), Case("fp16").execution(out))
        store = Store(out)
        [state] = store.load(store.newest())[0]["techniques"]["fp16"]
        scales.append(float(state["scale"]))
    assert {b / a for a, b in pairwise(scales)} == {0.5, 1.0, 2.0}


# -- two ranks ---------------------------------------------------------------------------------------------------------

RANKED = [
    Case(precision, micro, draws, workers)
    for precision, micro, (draws, workers) in product(PLANS, (None, 9), ((False, 0), (True, 0), (True, 2)))
] + [
    *(Case(precision, micro, bare=bare, parallel="fsdp2")
      for precision, micro, bare in product(PLANS, (None, 9), (False, True))),
    *(Case(precision, 12, stream=True) for precision in PLANS),
]  # fmt: skip


def ranks(case: Case, folder: str, ports: list[int], phases: list[str]) -> Any:
    """Train in these ranks, phase by phase; the samples of every step of this rank."""
    found = []
    for phase, port in zip(phases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        draw, log = random.Random(str(case)), {}
        stop, every = draw.randrange(3, STEPS), draw.randint(2, 4)
        out = Path(folder) / ("whole" if phase == "whole" else "run")
        ended = trained(case, out, log, stop if phase in ("asked", "pulled") else None, every, phase == "asked")
        assert ended == (phase in ("whole", "goes on"))
        found.append(sorted(log.items()))
    return found


def in_ranks(case: Case, how: str, folder: Path, world: int = 2) -> None:
    """Whole, stopped (`asked`, or `pulled`), and going on in fresh processes."""
    logs: list[dict[int, Any]] = [{} for _ in range(world)]
    wholes: list[dict[int, Any]] = []
    for phases in (["whole", how], ["goes on"]):
        place = folder / f"before {phases[-1]}"
        place.mkdir()
        ports = [ranked.free_port() for _ in phases]
        for rank, found in enumerate(ranked.run(world, ranks, case, str(folder), ports, phases, folder=place)):
            if phases[0] == "whole":
                wholes.append(dict(found[0]))
            logs[rank] |= dict(found[-1])
    for rank in range(world):
        whole, run = (final(folder / name, rank, world) for name in ("whole", "run"))
        assert differences(whole, run) == [], f"rank {rank}"
        assert logs[rank] == wholes[rank]


def test_two_ranks_stopped_and_bitwise_the_same(tmp_path):
    in_ranks(Case("fp16", 9, True), "asked", tmp_path)


@pytest.mark.extra
@pytest.mark.parametrize("case", RANKED, ids=str)
def test_two_ranks_whose_plug_was_pulled_are_bitwise_the_same(case, tmp_path):
    in_ranks(case, "pulled", tmp_path)


@pytest.mark.extra
@pytest.mark.parametrize(
    "case", [Case("fp32", 9), Case("bf16", parallel="fsdp2"), Case("fp32", 12, stream=True)], ids=str
)
def test_four_ranks_whose_plug_was_pulled_are_bitwise_the_same(case, tmp_path):
    in_ranks(case, "pulled", tmp_path, world=4)
