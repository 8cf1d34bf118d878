"""Real ranks for tests: processes of this machine, connected by gloo, and the loop and model that they train."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ranks are forked from a process that has imported torch, and what wrapping a model imports, and done nothing else.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "upshift.engine.ranks", "upshift.engine.plainstate"]
)

# Nothing else uses this signal: the watch of the ranks takes SIGUSR2 for itself.
ASKED = signal.SIGRTMIN


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code, what its function returned, and what it wrote."""

    code: int
    value: Any
    text: str


class Started:
    """Ranks that run `target(*arguments)`, each with the variables that a launcher sets."""

    def __init__(self, world: int, target: Callable[..., Any], *arguments: Any, folder: Path, **env: str) -> None:
        self.folder = folder
        variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
        self.ranks = [
            CONTEXT.Process(
                target=_rank,
                args=({**variables, "RANK": str(r), "LOCAL_RANK": str(r)}, str(folder / f"{r}"), target, arguments),
            )
            for r in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self, timeout: float = 90.0) -> list[Ended]:
        """How all ranks ended; the test fails where one does not within `timeout` seconds."""
        for rank in self.ranks:
            rank.join(timeout)
        running = [i for i, rank in enumerate(self.ranks) if rank.is_alive()]
        for i in running:
            self._stacks(i)
        self.kill()
        found = [self._ended(i) for i in range(len(self.ranks))]
        assert not running, f"ranks {running} did not end: {[ended.text for ended in found]}"
        return found

    def _stacks(self, rank: int) -> None:
        """Let a rank that did not end write where it stands."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, ASKED)
        time.sleep(1.0)

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()

    def _ended(self, rank: int) -> Ended:
        value = self.folder / f"{rank}.json"
        text = self.folder / f"{rank}.txt"
        code = self.ranks[rank].exitcode
        assert code is not None
        return Ended(code, json.loads(value.read_text()) if value.exists() else None,
                     text.read_text() if text.exists() else "")  # fmt: skip


def run(world: int, target: Callable[..., Any], *arguments: Any, folder: Path, **env: str) -> list[Any]:
    """What `target` returned on every rank; all must end well."""
    ended = Started(world, target, *arguments, folder=folder, **env).wait()
    assert [item.code for item in ended] == [0] * world, "\n".join(item.text for item in ended)
    return [item.value for item in ended]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _rank(env: dict[str, str], out: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(env)
    text = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(text, 1)
    os.dup2(text, 2)
    faulthandler.register(ASKED)
    try:
        value = target(*arguments)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 1))
    Path(f"{out}.json").write_text(json.dumps(value))
    os._exit(0)


# -- what is trained ---------------------------------------------------------------------------------------------------

SAMPLES, BATCH, WIDTH = 96, 24, 6


def build() -> Any:
    """A small network with repeated blocks, shared by all ranks; float64 for tight tolerances."""
    import torch

    torch.manual_seed(7)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(WIDTH)
            self.up = torch.nn.Linear(WIDTH, 8)
            self.down = torch.nn.Linear(8, WIDTH)

        def forward(self, x: Any) -> Any:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])
            self.head = torch.nn.Linear(WIDTH, 1)
            self.never = torch.nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Net().double()


def samples() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True).sin()


def adamw(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def train(
    group: Any, model: Any, module: Any, optimizer: Any, steps: int, *, micro: int = BATCH, first: int = 0,
    trouble: Callable[[int, int], None] = lambda step, part: None,
) -> list[float]:  # fmt: skip
    """The loop of the design over the API of a group; the mean loss of each global batch.

    Args:
        micro: samples of a micro-batch of this rank; halved by all when one runs out of memory.
        trouble: called before each backward pass with the step and number of the micro-batch; may raise.
    """
    import torch

    x, y = samples()
    losses = []
    step = first
    while step < first + steps:
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % SAMPLES
        # As many micro-batches on every rank.
        parts = rows.chunk(group.world)[group.rank].split(micro)
        total, full = 0.0, 0.0
        for number, part in enumerate(parts):
            try:
                with group.no_sync(last=number == len(parts) - 1):
                    loss = torch.nn.functional.mse_loss(module(x[part]), y[part])
                    trouble(step, number)
                    (loss * (len(part) * group.world / BATCH)).backward()
                total += loss.item() * len(part)
            except torch.OutOfMemoryError:
                full = 1.0
                break
        total, full = group.agree([total, full])
        if full:
            optimizer.zero_grad(set_to_none=True)
            micro = (micro + 1) // 2
            continue
        group.reduce_gradients(model.parameters())
        group.clip_gradients(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        group.at(step, "training")
        losses.append(total / BATCH)
        step += 1
    return losses


def gathered(state: Any) -> Any:
    """A tree with each sharded tensor whole, by torch's own gathering; all ranks call it."""
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value) for value in state)
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def numbers(state: Any) -> Any:
    """A tree with tensors as one of lists."""
    if isinstance(state, dict):
        return {str(key): numbers(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [numbers(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state
