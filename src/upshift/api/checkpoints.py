"""checkpoints(): what a run folder holds to resume from; export(): the weights of one, with the model's own keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from upshift.api.target import Say
from upshift.checkpoint.store import FOLDER, Store
from upshift.errors import CheckpointError, RecordError

SCHEMA = 1


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint. `bytes` is the size of its files, `problem` why it is not whole; `facts` are the run's."""

    name: str
    step: int
    attempt: int
    world: int
    bytes: int
    whole: bool
    problem: str = ""
    best: bool = False
    before_spike: bool = False
    created: str = ""
    versions: dict[str, str] = {}
    facts: dict[str, Any] = {}


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoints of a run, oldest first; `resumed` names the one a resumed run begins from, "" where none is."""

    run: str
    checkpoints: tuple[Stored, ...]
    resumed: str
    quarantined: tuple[str, ...] = ()
    schema: int = SCHEMA


def checkpoints(run_folder: Path, say: Say = lambda text: None) -> Inventory:
    """What is in a run folder; every file is read and checked. Changes nothing, also while a run writes there.

    Raises:
        RecordError: there are no checkpoints.
    """
    store = _store(run_folder)
    say(f"reading {store.folder}")
    found = store.checkpoints(verify=True)
    listed = tuple(
        Stored(
            name=item.path.name,
            step=item.step,
            attempt=item.attempt,
            world=item.world,
            bytes=item.bytes,
            whole=bool(item.verified),
            problem=item.problem,
            best=item.best,
            before_spike=item.before_spike,
            created=item.created,
            versions=item.versions,
            facts=item.facts,
        )
        for item in found
    )
    aside = store.folder / "quarantine"
    return Inventory(
        run=str(store.folder.parent),
        checkpoints=listed,
        resumed=next((item.name for item in reversed(listed) if item.whole), ""),
        quarantined=tuple(sorted(path.name for path in aside.iterdir())) if aside.is_dir() else (),
    )


def export(run_folder: Path, file: Path, *, key: str = "model", averaged: bool = True) -> str:
    """Write the weights under `key` of the newest whole checkpoint to a .safetensors or .pt file; its name.

    Args:
        averaged: of a job that averages its weights the averaged ones, which are what it evaluates.

    Raises:
        RecordError: there are no checkpoints.
        CheckpointError: none is whole, or its state has no weights under `key`.
    """
    from upshift.checkpoint.foreign import save_weights

    store = _store(run_folder)
    newest = store.newest()
    if newest is None:
        raise CheckpointError(f"no checkpoint of {run_folder} is whole.", remedy="See upshift checkpoints for why.")
    tree, _ = store.load(newest, rank=0)
    weights = _weights(tree, key, newest.path.name)
    average = tree.get("average") or {}
    if averaged and key == "model" and average.get("averaged"):
        weights |= {name: mean.to(weights[name].dtype) for name, mean in average["means"].items() if name in weights}
    save_weights(file, weights)
    return newest.path.name


def _weights(tree: Any, key: str, name: str) -> dict[str, Any]:
    import torch

    found = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{name} holds no weights under {key!r}.", remedy="It was not written by upshift run.")
    # A module may keep other things in its state dict (extra state); weights are tensors.
    weights = {str(item): tensor for item, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    if not weights:
        raise CheckpointError(f"{name} holds no tensors under {key!r}.", remedy="It was not written by upshift run.")
    return weights


def _store(run_folder: Path) -> Store:
    folder = run_folder.parent if run_folder.name == FOLDER and not (run_folder / FOLDER).is_dir() else run_folder
    if not (folder / FOLDER).is_dir():
        raise RecordError(f"{run_folder} holds no checkpoints.", remedy="Name the folder given to upshift run --out.")
    return Store(folder)
