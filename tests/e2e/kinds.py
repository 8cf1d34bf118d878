"""What the tests know of each kind of script in `scripts/kinds/`, worked out by hand from its source."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upshift.hardware.device import device_name
from upshift.records import Plan, Proof, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept

FOLDER = Path(__file__).parent / "scripts" / "kinds"
BIN = Path(sys.executable).parent

Techniques = dict[str, dict[str, Any]]

ALLOCATOR: Techniques = {"allocator": {"kind": "glibc"}}
CACHE: Techniques = {**ALLOCATOR, "cache": {}}
LOADER: Techniques = {**ALLOCATOR, "loader": {"workers": 1}}


@dataclass(frozen=True)
class Kind:
    """One kind of script.

    Attributes:
        steps: global steps the script makes.
        batches: backward passes of one global step; None where the script itself varies it (closures).
        plan: techniques that must leave every bit as it is.
        says: what is said of each of them.
        optimizers: how many make one global step.
        files: checkpoints it leaves, below its folder.
        metric: what `diagnose` suggests to `upshift verify`, where it prints an evaluation.
        package: what must be installed for it.
        always: what is run with every test run, since it is different enough: `run`, `diagnose`.
    """

    script: str
    steps: int
    plan: Techniques
    says: tuple[str, ...]
    batches: float | None = 1.0
    optimizers: int = 1
    arguments: tuple[str, ...] = ()
    files: tuple[str, ...] = ("checkpoint.pt",)
    metric: str = ""
    package: str = "torch"
    always: tuple[str, ...] = ()


# What acts on the environment of the process has acted before anything can be said.
CACHED = ("allocator + cache", "applied cache")
WORKERS = ("allocator + loader", "applied loader")
ALONE = ("toml: allocator",)

#: One process; each makes all its steps within the time `diagnose` watches.
KINDS = {
    "accumulation": Kind("accumulation.py", 28, LOADER, WORKERS, batches=4.0, always=("diagnose",)),
    "grad_scaler": Kind("grad_scaler.py", 24, CACHE, CACHED),
    "gan": Kind("gan.py", 24, CACHE, CACHED, batches=3.0, optimizers=2),
    "lbfgs": Kind("lbfgs.py", 24, ALLOCATOR, ALONE, batches=None),
    "float64": Kind("float64.py", 24, ALLOCATOR, ALONE),
    "custom_function": Kind("custom_function.py", 24, LOADER, WORKERS),
    "gradient_penalty": Kind("gradient_penalty.py", 24, ALLOCATOR, ALONE, batches=6.0, optimizers=2),
    "several_models": Kind("several_models.py", 24, LOADER, WORKERS, optimizers=2),
    "frozen": Kind("frozen.py", 24, CACHE, CACHED),
    "iterable": Kind("iterable.py", 24, {**ALLOCATOR, "loader": {"workers": 1}}, (*ALONE, "no effect loader")),
    "transforms": Kind("transforms.py", 24, CACHE, (*ALONE, "no effect cache")),
    "sampler_collate": Kind("sampler_collate.py", 27, CACHE, (*ALONE, "no effect cache")),
    "tied_weights": Kind("tied_weights.py", 24, ALLOCATOR, ALONE),
    "module_hooks": Kind("module_hooks.py", 24, ALLOCATOR, ALONE),
    "pickled": Kind("pickled.py", 24, LOADER, WORKERS, files=("checkpoint.pt", "model.pt")),
    "resumable": Kind("resumable.py", 48, CACHE, CACHED),
    "timm_style": Kind("timm_style.py", 24, LOADER, WORKERS, arguments=("-c", str(FOLDER / "timm_style.yaml")),
                       files=("output/*/last.pth.tar",), metric="test Acc@1:max", always=("run",)),
    "torchrun_alone": Kind("torchrun.py", 24, LOADER, WORKERS, batches=2.0),
    "lightning": Kind("lightning_module.py", 24, LOADER, WORKERS, batches=2.0, package="lightning"),
    "hf_trainer": Kind("hf_trainer.py", 20, LOADER, WORKERS, batches=2.0, package="transformers"),
    "accelerate": Kind("accelerated.py", 24, LOADER, WORKERS, batches=2.0, package="accelerate"),
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A script, or a command, of several processes.

    Attributes:
        command: the launcher a person types before the script, if any.
        steps: global steps of each process that trains.
        refused: what `diagnose` says of it.
        launched: whether `upshift run` is given a command.
    """

    command: tuple[str, ...]
    script: str
    steps: tuple[int, ...]
    plan: Techniques
    says: tuple[str, ...]
    refused: str
    files: tuple[str, ...] = ("checkpoint.pt",)
    package: str = "torch"
    launched: bool = True


TOO_LATE = "no effect allocator: it acts on the environment"
LAUNCHED = (TOO_LATE, "applied loader")
FOLLOWS = "only upshift run follows those"
NOT_DIAGNOSED = "run and recorded, but not diagnosed"

#: Several processes.
GROUPS = {
    "mp_spawn": Group((), "mp_spawn.py", (24, 24), CACHE, CACHED, NOT_DIAGNOSED, launched=False),
    "hogwild": Group((), "hogwild.py", (24, 24), ALLOCATOR, ALONE, NOT_DIAGNOSED, launched=False),
    "torchrun": Group((str(BIN / "torchrun"), "--nproc-per-node", "2", "--standalone"), "torchrun.py", (12, 12), LOADER,
                      LAUNCHED, FOLLOWS),
    # Without MPI, accelerate starts one process on the CPU.
    "accelerate_launch": Group((str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "--num_machines",
                                "1", "--mixed_precision", "no", "--dynamo_backend", "no"), "accelerated.py", (24,),
                               LOADER, LAUNCHED, FOLLOWS, package="accelerate"),
    "shell": Group(("sh",), "job.sh", (24, 24), LOADER, LAUNCHED, FOLLOWS, files=("out/*/*/last.pth.tar",)),
}  # fmt: skip


def write_plan(file: Path, script: Path, arguments: tuple[str, ...], techniques: Techniques) -> Path:
    """A plan as a person might write it, for this machine and this script."""
    device = device_name("cpu")
    planfile.write(
        file,
        Plan(
            script=script.name, arguments=arguments, created="2026-01-01 00:00:00", device=device, verdict="",
            fingerprint=fingerprint(str(script), arguments, device, techniques, files=(script.name,)), speedup=1.2,
            proof=Proof(rung="trajectory", passed=True, reason=""),
            kept=tuple(Kept(name=name, settings=settings) for name, settings in techniques.items()),
        ),
    )  # fmt: skip
    return file


def contents(folder: Path, patterns: tuple[str, ...]) -> dict[str, Any]:
    """The checkpoints below a folder, as plain torch reads them; none of them knows of upshift."""
    found = {}
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        assert files, f"no {pattern} in {folder}"
        for file in files:
            assert b"upshift" not in file.read_bytes()
            found[str(file.relative_to(folder))] = torch.load(file, weights_only=False)
    return found


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Equal to the last bit: types, keys and their order, dtypes, strides, values."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride()), place
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}.{number}")
    elif hasattr(one, "state_dict"):
        assert_same(one.state_dict(), other.state_dict(), place)
    else:
        assert one == other, place
