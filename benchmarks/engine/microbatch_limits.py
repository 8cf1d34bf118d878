"""Does a micro-batch that was found ever fail? Searches under random memory limits, then training at the limit itself.

    python benchmarks/engine/microbatch_limits.py [--n 50] [--seed 0]

Each case draws a model, a sample size and a limit between what one sample and what the whole batch takes, and searches.
Then the job is really trained (the engine's own loop, `STEPS` updates with an evaluation) with the size found and with
the largest size, in a fresh process whose RLIMIT_DATA is the whole limit, without the headroom of the search. Any
failure is counted and makes the exit code 1. Linux; torch is loaded once and every process is a fork, which is what
makes a probe cheap enough for n >= 50; `upshift` itself starts an interpreter for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no thread may hold a lock

import msgspec
import torch
import torch._dynamo  # torch loads it at the first optimizer; not in every child
import torch.nn.functional as F

from upshift import Job
from upshift.engine import probe
from upshift.engine.microbatch import search
from upshift.engine.probing import Prober
from upshift.errors import TrainingError

STEPS = 4
BATCH = 256


class Net(torch.nn.Module):
    """A stack of equal layers on (tokens, width), then a head over the mean."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, tokens, width) to (n, 4)."""
        for layer in self.layers:
            x = x + F.dropout(F.gelu(layer(x)), 0.1, self.training)
        found: torch.Tensor = self.head(x.mean(1))
        return found


class Texts(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of different lengths."""

    def __init__(self, tokens: int, width: int) -> None:
        draw = random.Random(tokens)
        self.lengths = [draw.randint(1, tokens) for _ in range(2 * BATCH)]
        self.width = width

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(self.lengths[index], self.width), torch.tensor(index % 4)


def padded(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """As long as the longest."""
    return torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True), torch.stack(
        [y for _, y in samples]
    )


def made(width: int = 64, depth: int = 4, tokens: int = 64, padding: bool = False) -> Job:
    """A job that needs about depth * tokens * width * 16 bytes a sample."""
    if padding:
        data: Any = Texts(tokens, width)
    else:
        data = torch.zeros(2 * BATCH, tokens, width), torch.arange(2 * BATCH) % 4
    return Job(
        model=partial(Net, width, depth), train_data=data, eval_data=data, loss=F.cross_entropy,
        optimizer=partial(torch.optim.AdamW, lr=1e-4), collate=padded if padding else None, global_batch=BATCH,
        eval_batch=8, steps=STEPS, draws=False,
    )  # fmt: skip


def forked(act: Any, folder: Path) -> Any:
    """What `act` returns, from a process of its own; None where it died."""
    file = folder / "answer"
    file.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            file.write_bytes(msgspec.json.encode(act()))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return msgspec.json.decode(file.read_bytes()) if status == 0 else None


def trained(settings: dict[str, str], size: int, limit: int) -> str:
    """The engine's training under the whole limit; what went wrong, or empty."""
    from upshift.engine.reference import load_job
    from upshift.engine.run import train_job
    from upshift.engine.settings import Execution

    said: list[str] = []
    job = load_job(f"{__file__}:made", dict(settings))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        train_job(job, Execution(device="cpu", micro_batch=size, signals=False, say=said.append))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return next((text for text in said if "out of memory" in text), "")


def main() -> int:
    """Run the cases and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(given.seed)
    failed = declined = probes = tested = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(request: probe.Request) -> probe.Report:
            nonlocal probes
            probes += 1
            found = forked(lambda: probe.run(request), folder)
            return msgspec.convert(found, probe.Report) if found is not None else probe.Report(why="its process died")

        base = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        for number in range(given.n):
            if number and not number % 10:
                print(f"{number} searches, {probes} probes, {tested} sizes trained, {failed} failed", flush=True)
            settings = {
                "width": str(draw.choice((32, 64, 96))), "depth": str(draw.randint(2, 6)),
                "tokens": str(draw.randint(32, 160)), "padding": str(draw.random() < 0.5),
            }  # fmt: skip
            each = int(settings["width"]) * int(settings["depth"]) * int(settings["tokens"]) * 16
            limit = base + (152 << 20) + int(each * BATCH * draw.uniform(0.02, 1.5))
            request = probe.Request(
                reference=f"{__file__}:made", size=1, share=BATCH, report="", limit=limit, device="cpu",
                settings=settings, scan_seconds=1.0,
            )  # fmt: skip
            prober = Prober(request, run)
            try:
                found = search(prober, BATCH, limit=limit)
            except TrainingError:
                declined += 1
                continue
            finally:
                prober.close()
            for size in sorted({found.size, found.largest}):
                tested += 1
                problem = forked(partial(trained, settings, size, limit), folder)
                if problem != "":
                    failed += 1
                    print(f"case {number}: {json.dumps(settings)}, limit {limit >> 20} MiB, micro-batch {size}: "
                          f"{problem or 'died'}", flush=True)  # fmt: skip
    print(f"{given.n} searches, {probes} probes, {declined} declined (not even one sample fits)")
    print(f"{tested} sizes trained at the limit, {failed} failed; {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
