"""What `diagnose` saw of a script: the anatomy of a step, where the time goes, the floor, and facts."""

from __future__ import annotations

from typing import Literal

from upshift.records.quantity import Quantity, Record
from upshift.records.recipe import RecipeFacts
from upshift.records.stepwork import StepWork

#: Phases of a training step, in the order they are shown. They sum to the step; `other` is the remainder.
PHASES = ("data", "h2d", "forward", "loss", "backward", "optimizer", "sync", "other")

PHASE_TITLES = {
    "data": "waiting for data",
    "h2d": "host to device",
    "forward": "forward",
    "loss": "between forward and backward",
    "backward": "backward",
    "optimizer": "optimizer",
    "sync": "device syncs",
    "other": "other host time",
}


class Phase(Record, frozen=True):
    """One phase of a global step: seconds per step, and its share of the step (fraction)."""

    name: str
    seconds: Quantity
    share: Quantity
    note: str = ""


class Anatomy(Record, frozen=True):
    """A global training step in its parts. Warm-up, evaluation, checkpoints and start-up stand apart.

    `step` is the mean over steady-state steps; `phases` sum to it.
    `evaluation` and `checkpointing` are seconds in total over the time watched.
    """

    step: Quantity
    phases: tuple[Phase, ...]
    steps_seen: int
    warmup_steps: int
    warmup: Quantity
    startup: Quantity
    evaluation: Quantity
    checkpointing: Quantity
    micro_batches: Quantity
    samples: Quantity
    optimizers_per_step: int = 1

    def share(self, phase: str) -> float:
        """Share of `phase` in the step (0..1); 0 where it is unknown, for ordering only."""
        for item in self.phases:
            if item.name == phase:
                return item.share.or_else(0.0)
        return 0.0


class LineCost(Record, frozen=True):
    """Time attributed to one line of the user's own script.

    `kind`: `host` (any host time), `data` (inside the dataset), `sync` (waiting for the device).
    `share` is the fraction of the steady-state time watched, `seconds` that share of a step.
    """

    file: str
    line: int
    function: str
    text: str
    kind: Literal["host", "data", "sync"]
    share: Quantity
    seconds: Quantity


class Floor(Record, frozen=True):
    """FLOPs and bytes of one global step against the machine's measured peaks (Williams et al. 2009, roofline)."""

    flops: Quantity
    bytes_moved: Quantity
    dtype: str
    peak_flops: Quantity
    best_dtype: str
    best_peak_flops: Quantity
    bandwidth: Quantity
    mfu: Quantity
    arithmetic_floor: Quantity
    bandwidth_floor: Quantity
    note: str = ""
    by_phase: dict[str, float] = {}
    """FLOPs of `forward`, `backward` and `optimizer`, where they were counted."""


class ModelFacts(Record, frozen=True):
    """A root module the script calls: what techniques need to know to say whether they apply."""

    name: str
    parameters: int
    dtypes: tuple[str, ...]
    device: str
    layers: dict[str, int] = {}
    """Count of leaf layers by class name (`Conv2d`, `LSTM`, `Dropout` ...)."""
    trained: bool = True
    compiled: bool = False
    channels_last: bool = False
    custom_autograd: bool = False
    repeated: dict[str, int] = {}
    """Count of equal blocks by class name (see `measure.repeated`); empty where none were seen."""
    repeated_share: float | None = None
    """Share of the leaf layers that lie in those blocks (0..1)."""
    input_shapes: tuple[tuple[int, ...], ...] = ()


class OptimizerFacts(Record, frozen=True):
    """An optimizer the script steps."""

    name: str
    parameters: int
    tensors: int
    device: str
    dtypes: tuple[str, ...]
    fused: bool | None = None
    foreach: bool | None = None
    closure: bool = False
    sparse: bool = False


class LoaderFacts(Record, frozen=True):
    """A `DataLoader` the script iterates while training (`training`) or evaluating."""

    name: str
    dataset: str
    training: bool
    workers: int
    batch_size: int | None
    samples: int | None
    iterable: bool
    persistent: bool = False
    pinned: bool = False
    prefetch: int | None = None
    custom_fetch: bool = False
    """A custom collate function, batch sampler or worker initialiser."""
    wait: Quantity | None = None


class ScriptFacts(Record, frozen=True):
    """What is true of the script and its process, as far as seen."""

    models: tuple[ModelFacts, ...] = ()
    optimizers: tuple[OptimizerFacts, ...] = ()
    loaders: tuple[LoaderFacts, ...] = ()
    device: str = "cpu"
    autocast: bool = False
    grad_scaler: bool = False
    create_graph: bool = False
    attention: bool = False
    loss_seen: bool = False
    losses: tuple[float, ...] = ()
    threads: int = 0
    cores: int = 0
    bf16_native: bool | None = None
    flush_denormal: bool | None = None
    main_guard: bool = False
    seeded: bool = False
    compiler: bool = False
    allocator: str = ""
    page_faults: float | None = None
    """Minor page faults of a steady step (getrusage): memory handed out anew by the system."""
    fault_seconds: float | None = None
    """What one minor page fault costs in this process, measured."""
    distributed: bool = False
    frameworks: tuple[str, ...] = ()
    steps_total: int | None = None
    """Steps the whole script would make, where it could be inferred from its loader and arguments."""
    recipe: RecipeFacts | None = None
    """None where the script was not watched for it."""


class Measurement(Record, frozen=True):
    """Everything `diagnose` saw. Diagnosis, search and reports read this and nothing else."""

    script: str
    arguments: tuple[str, ...]
    created: str
    anatomy: Anatomy
    facts: ScriptFacts
    floor: Floor | None = None
    lines: tuple[LineCost, ...] = ()
    syncs: tuple[LineCost, ...] = ()
    syncs_note: str = "not applicable on CPU"
    device_phases: dict[str, Quantity] = {}
    """Phase -> time of its kernels on the device, by events; empty where there are none."""
    overhead: Quantity | None = None
    """Share of the step that watching cost (fraction)."""
    machine: dict[str, str] = {}
    isolation: str = ""
    notes: tuple[str, ...] = ()
    work: StepWork | None = None
    """None where no step was seen operation by operation."""
    schema: int = 1
