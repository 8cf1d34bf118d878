"""What one training step did: memory held moment by moment, and the work of its operations. Base of all estimates."""

from __future__ import annotations

from upshift.records.quantity import Record


class Moment(Record, frozen=True):
    """Bytes alive at one moment of a step, above parameters, buffers and optimizer state.

    `fixed` (gradients, temporaries of the optimizer) does not change with the samples of a pass; `scaled` grows in
    proportion to them. `phase`: `forward`, `backward` or `optimizer`.
    """

    fixed: float
    scaled: float
    phase: str = "backward"


class OpWork(Record, frozen=True):
    """Operations of one kind and about one size in a step.

    FLOPs and bytes are sums over the `calls`; `scaled_*` grow with the samples of a pass, `fixed_*` do not. Bytes count
    inputs and outputs of every call, as if no cache were hit. `low`: share of the bytes (0..1) that would lie in
    bfloat16 under autocast. `seconds`: measured in this step, None where it was not (devices, dry runs).
    """

    phase: str
    name: str
    dtype: str
    calls: int
    scaled_flops: float = 0.0
    fixed_flops: float = 0.0
    scaled_bytes: float = 0.0
    fixed_bytes: float = 0.0
    low: float = 0.0
    product: bool = False
    """Whether it multiplies matrices or convolves: what autocast runs in the lower precision."""
    seconds: float | None = None


class StepWork(Record, frozen=True):
    """One step, seen operation by operation. Bytes.

    `batch`: samples of a pass (leading dimension of the model's input). `moments`: of each phase those that are the
    highest for some number of samples; `moments_low`: the same, had the forward pass run under bfloat16 autocast.
    """

    device: str
    batch: int | None
    parameters: float
    gradients: float
    buffers: float
    optimizer_state: float
    trained: int = 0
    """Elements of trained parameters."""
    moments: tuple[Moment, ...] = ()
    moments_low: tuple[Moment, ...] = ()
    saved: float | None = None
    """Bytes that lived from the forward pass into the backward pass and scale: what is kept for gradients."""
    ops: tuple[OpWork, ...] = ()
    passes: int = 1
    """Backward passes in the step."""
    allocator_peak: float | None = None
    """What the accelerator's allocator held at most; None on a CPU."""
    process_peak: float | None = None
    """Most resident bytes of the process above what it had when torch was loaded, before any instrument was on."""
    note: str = ""
