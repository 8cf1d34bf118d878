"""How a job is executed: nothing here changes what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from upshift.records.plan import Setting

#: Seconds between two interruptions that saving is set up for, where nothing is said.
A_DAY = 86_400.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person may set, whichever way the job is started. Travels as JSON.

    Args:
        resume: `auto` (where there is a checkpoint), `never`, or `force` (only the weights, whatever else differs).
        device: `cpu`, `cuda`; empty: an accelerator where there is one.
        micro_batch: samples of one forward and backward pass; None: the share of this rank in a global batch.
        loader: arguments of torch's DataLoader that change nothing about the data (`num_workers`, ...).
        save_seconds, save_steps: between two checkpoints; both None: from what saving costs and how often the
            machine is taken away (`interruption_seconds`).
        grace: seconds between a request to stop and the end.
        notice: a shell command that exits with 0 when the machine is about to be taken away.
        parallel: `ddp` or `fsdp2`, where several processes train together.
        stop_at: stop after this update as if somebody had asked for it.
    """

    resume: str = "auto"
    device: str = ""
    micro_batch: int | None = None
    loader: dict[str, int] = {}
    save_seconds: float | None = None
    save_steps: int | None = None
    interruption_seconds: float = A_DAY
    grace: float = 30.0
    notice: str = ""
    parallel: str = "ddp"
    stop_at: int | None = None


Kind = TypeVar("Kind", bound=Settings)


def extended(kind: type[Kind], settings: Settings, /, **more: Any) -> Kind:
    """`settings` as the larger `kind`, with what that holds besides."""
    return kind(**{name: getattr(settings, name) for name in Settings.__struct_fields__}, **more)


def _silent(text: str) -> None:
    pass


class Execution(Settings, frozen=True, kw_only=True):
    """How a job is executed in this process.

    Args:
        out: the run folder: record, checkpoints, result. None: nothing is written.
        plan: techniques and their settings.
        spikes: whether a loss that explodes is treated like one that is not finite.
        process_ends: nothing comes after the training in this process.
        owned: told the run folder once it is this run's own, before anything is done with it.
        planned: told before the first update how many the whole job makes; None where its data does not say.
        on_batch: told of every update before it is made: step, epoch, indices of this rank's samples.
        say: told what a person should read.
        metrics: told step, epoch and metrics after every evaluation.
        progress: told numbers, a few times a second.
    """

    out: Path | None = None
    plan: dict[str, dict[str, Setting]] = {}
    plan_file: str = ""
    reference: str = ""
    spikes: bool = True
    signals: bool = True
    process_ends: bool = False
    environment: dict[str, str] = {}
    owned: Callable[[Path], None] | None = None
    planned: Callable[[int | None], None] | None = None
    on_batch: Callable[[int, int, Any], None] | None = None
    say: Callable[[str], None] = _silent
    metrics: Callable[[int, int, dict[str, float]], None] | None = None
    progress: Callable[[dict[str, float]], None] | None = None
