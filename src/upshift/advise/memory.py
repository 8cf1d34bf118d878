"""Memory of a training, predicted: exact for what stays, observed and scaled for what a step makes.

    peak = parameters + buffers + optimizer state + max over the moments of a step of (fixed + scaled * samples ratio)

Parameters, buffers and optimizer state are counted. The moments are those of one real step (`records.stepwork`): what
grows with the samples of a pass is scaled, gradients and temporaries of the optimizer are not, and the highest moment
may be another one at another number of samples. Under bfloat16 autocast the moments are those that the rules of
autocast give (Micikevicius et al. 2018 for the idea: master weights in float32, half of the activations' bytes).

On an accelerator come its context (libraries, kernels: `CONTEXT`) and what its allocator reserves beyond what is used
(`FRAGMENTATION`); neither is a tensor, both are assumptions with a range. On a CPU the figure is what is needed above
the process with torch loaded. What the process was measured to hold beside its tensors (gaps in the allocator's heap,
scratch of the kernels, code, data) is taken to grow as the step's own memory does.

Limits. Samples of several lengths: the step seen had some lengths, a longer one takes more. Scratch memory inside
operations is not seen. What scales other than linearly (a contrastive loss over all pairs) is underestimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from upshift.records.measurement import ScriptFacts
from upshift.records.quantity import Quantity, estimated, unknown
from upshift.records.stepwork import Moment, StepWork

#: Bytes of a context on an accelerator: value and range. Assumed; what libraries are loaded decides.
CONTEXT = (0.5e9, 0.25e9, 0.9e9)

#: What an allocator reserves beyond what tensors use, as a share of the step's memory: value and range. Assumed.
FRAGMENTATION = (0.05, 0.0, 0.2)

#: By how much a figure scaled from one step may be off, as a share (see benchmarks/ledger/memory.py).
ERROR = 0.10

#: Part of a device's memory that a training may be planned to fill.
HEADROOM = 0.95

#: Values of optimizer state per parameter. Names in lower case, as classes of torch and of usual packages are called.
STATE = {
    "sgd": 0.0, "adam": 2.0, "adamw": 2.0, "nadam": 2.0, "radam": 2.0, "adamax": 2.0, "sparseadam": 2.0,
    "adagrad": 1.0, "adadelta": 2.0, "rmsprop": 1.0, "rprop": 2.0, "asgd": 1.0, "lion": 1.0, "muon": 1.0,
}  # fmt: skip

_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "complex64": 8, "complex128": 16}

#: `--precision`: how it is called, and what it is.
AS_IS = "as it is"
LOWER = ("bf16", "fp16")
PRECISIONS = (AS_IS, "fp32", "tf32", *LOWER)


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak; `parts` sum to it. `why` says why nothing is known, where that is so."""

    total: Quantity
    parts: dict[str, Quantity]
    why: str = ""


def state_bytes(optimizer: str, parameters: float, *, momentum: bool = False, bits: int = 32) -> float | None:
    """Bytes of optimizer state for so many parameters; None for an optimizer nobody described here.

    Args:
        optimizer: its class name, such as `AdamW`; `8bit` in a name makes it one byte a value.
        momentum: whether SGD keeps a momentum (one value a parameter).
        bits: of one value; 8 adds a float32 scale for each block of 256 (Dettmers et al. 2022).
    """
    name = optimizer.lower()
    if "8bit" in name:
        name, bits = name.replace("8bit", "").strip("_"), 8
    values = STATE.get(name)
    if values is None:
        return None
    if name == "sgd" and momentum:
        values = 1.0
    each = bits / 8 + (4 / 256 if bits == 8 else 0.0)
    return values * parameters * each


def from_facts(facts: ScriptFacts, activation_bytes: float, batch: int, *, momentum: bool = False) -> StepWork | None:
    """What a step holds by arithmetic alone, where none was seen: all gradients and all activations at once.

    Args:
        facts: its models and optimizers; every parameter in the widest of a model's dtypes.
        activation_bytes: kept for the backward pass, per sample.
        batch: samples of a pass, at least 1.

    Returns:
        None where a dtype, or the state of an optimizer, is not known here.
    """
    if not facts.models or batch < 1 or not activation_bytes >= 0:
        return None
    parameters = gradients = state = 0.0
    for model in facts.models:
        sizes = [_SIZES.get(name) for name in model.dtypes] or [4]
        if any(size is None for size in sizes):
            return None
        parameters += model.parameters * max(size for size in sizes if size)
    for optimizer in facts.optimizers:
        sizes = [_SIZES.get(name) for name in optimizer.dtypes] or [4]
        if any(size is None for size in sizes):
            return None
        widest = max(size for size in sizes if size)
        gradients += optimizer.parameters * widest
        found = state_bytes(optimizer.name, optimizer.parameters, momentum=momentum, bits=8 * widest)
        if found is None:
            return None
        state += found
    return StepWork(
        device="cpu", batch=batch, parameters=parameters, gradients=gradients, buffers=0.0, optimizer_state=state,
        trained=sum(item.parameters for item in facts.optimizers),
        moments=(Moment(gradients, activation_bytes * batch),), saved=activation_bytes * batch,
        note="from the sizes of models and optimizers; no step was seen",
    )  # fmt: skip


def moments_of(work: StepWork, precision: str, autocast: bool) -> tuple[Moment, ...]:
    """The moments of a step in this precision; none where they are not known."""
    if precision in LOWER and not autocast:
        return work.moments_low
    if precision in ("fp32", "tf32") and autocast:
        return ()  # the step was seen in the lower precision only
    return work.moments


def ratio(work: StepWork, batch: int | None) -> float | None:
    """Samples of a pass against those of the step seen; None where that cannot be said."""
    if batch is None:
        return 1.0
    return batch / work.batch if work.batch else None


def highest(moments: Iterable[Moment], scale: float) -> Moment | None:
    """The moment that takes most at `scale` times the samples."""
    return max(moments, key=lambda item: item.fixed + scale * item.scaled, default=None)


def predict(
    work: StepWork | None,
    *,
    batch: int | None = None,
    precision: str = AS_IS,
    autocast: bool = False,
    optimizer: str | None = None,
    accelerator: bool = False,
) -> Prediction:
    """Peak bytes of a training on one device.

    Args:
        work: a step that was seen, or `from_facts`.
        batch: samples of a pass; None: as seen.
        precision: one of `PRECISIONS`.
        autocast: whether the step was seen under autocast.
        optimizer: another one than was seen, by its class name.
        accelerator: whether context and allocator of an accelerator count.
    """
    if work is None:
        return _nothing("no step was seen operation by operation")
    scale = ratio(work, batch)
    if scale is None:
        return _nothing("the number of samples of the step seen is not known")
    state = work.optimizer_state
    if optimizer is not None:
        found = state_bytes(optimizer, work.trained)
        if found is None:
            return _nothing(f"how much state {optimizer} keeps is not known here")
        state = found
    moments = moments_of(work, precision, autocast)
    top = highest(moments, scale)
    if top is None:
        why = "the step was seen under autocast" if autocast and work.moments else "no memory was seen in the step"
        return _nothing(f"{why}, so {precision} is not known")
    return _sum(work, top, scale, state, 0.0 if accelerator else beside(work, top, scale), accelerator)


def _sum(work: StepWork, top: Moment, scale: float, state: float, extra: float, accelerator: bool) -> Prediction:
    gradients = min(work.gradients, top.fixed)
    exact = {"parameters": work.parameters, "buffers": work.buffers, "optimizer state": state, "gradients": gradients}
    step = {"temporaries": top.fixed - gradients, "activations": top.scaled * scale}
    parts = {name: estimated(value, "B", value, value) for name, value in exact.items()}
    parts |= {name: estimated(value, "B", value * (1 - ERROR), value * (1 + ERROR)) for name, value in step.items()}
    if extra:
        parts["beside tensors"] = estimated(extra, "B", min(0.0, 2 * extra), max(0.0, 2 * extra))
    if accelerator:
        used = sum(exact.values()) + sum(step.values())
        parts["context"] = estimated(CONTEXT[0], "B", CONTEXT[1], CONTEXT[2])
        value, low, high = (share * used for share in FRAGMENTATION)
        parts["allocator"] = estimated(value, "B", low, high)
    return Prediction(total(parts.values()), parts)


def beside(work: StepWork, top: Moment, scale: float) -> float:
    """Bytes the process is expected to hold beside its tensors: gaps of the heap, scratch of kernels, code, data.

    What was measured at the peak seen, and for what the step itself holds more, as much more in proportion; at most as
    much again, since a small process is mostly code. Below zero where tensors were made and never touched; 0 where
    nothing was measured.
    """
    seen = highest(work.moments, 1.0)
    if seen is None or work.process_peak is None:
        return 0.0
    step = seen.fixed + seen.scaled
    found = work.process_peak - work.parameters - work.buffers - work.optimizer_state - step
    if step <= 0:
        return found
    return found + min(found / step, 1.0) * (top.fixed + top.scaled * scale - step)


def total(parts: Iterable[Quantity]) -> Quantity:
    """The sum of estimates in bytes; its interval adds the ends, as if all erred the same way."""
    found = list(parts)
    if any(item.value is None for item in found):
        return unknown("B")
    return estimated(
        math.fsum(item.or_else(0.0) for item in found),
        "B",
        math.fsum(item.low if item.low is not None else item.or_else(0.0) for item in found),
        math.fsum(item.high if item.high is not None else item.or_else(0.0) for item in found),
    )


def _nothing(why: str) -> Prediction:
    return Prediction(unknown("B"), {}, why)


def largest_batch(
    work: StepWork | None, limit: float | None, *, precision: str = AS_IS, autocast: bool = False,
    accelerator: bool = False,
) -> Quantity:  # fmt: skip
    """Most samples of a pass that fit into `limit` bytes (`HEADROOM` of them); 0 where not one does."""
    moments = () if work is None else moments_of(work, precision, autocast)
    if work is None or limit is None or not work.batch or not moments or not any(item.scaled >= 1 for item in moments):
        return unknown("samples")

    def most(extra: float, share: float, error: float) -> float:
        room = (HEADROOM * limit - extra) / (1 + share) - work.parameters - work.buffers - work.optimizer_state
        if any(item.fixed > room for item in moments):
            return 0.0
        grows = [item for item in moments if item.scaled >= 1]  # bytes
        least = min((room - item.fixed) / (item.scaled * (1 + error)) for item in grows)
        return float(math.floor(least * (work.batch or 1)))

    ends = zip(CONTEXT, FRAGMENTATION, strict=True) if accelerator else ((0.0, 0.0),) * 3
    (value, share), best, worst = ends
    return estimated(most(value, share, 0.0), "samples", most(*worst, ERROR), most(*best, -ERROR))
