"""What would make a training fit where it does not: techniques by their names in the registry, and what they save.

The peak of a step is predicted anew for each: techniques act on the optimizer's state between steps, or on what the
forward pass keeps for the backward pass. How much of the latter remains is an assumption with a range; the model
decides, and a measured trial (`upshift tune`) tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from upshift.advise import memory
from upshift.records.estimate import Remedy
from upshift.records.measurement import ScriptFacts
from upshift.records.quantity import Quantity, estimated
from upshift.records.stepwork import Moment, StepWork

#: Part of what the forward pass keeps in a block that is left when only the block's input is: value and range.
#: A transformer block keeps about 17 tensors of the size of its input, beside attention (Korthikanti et al. 2022).
BLOCK_INPUT = (0.15, 0.05, 0.35)

#: What is left on the device when kept tensors go to the host: those in use, and those below a mebibyte.
OFFLOADED = (0.1, 0.02, 0.3)

#: Share of its bytes that an 8-bit moment takes: one of four, and a scale for each block.
EIGHT_BITS = 0.25 + 1 / 256

#: Optimizers whose moments `low_bit_optimizer` knows.
_MOMENTS = ("adam", "sgd", "nadam", "radam")


@dataclass(frozen=True)
class _Change:
    """`kept`: what remains of saved activations. `state`: what remains of optimizer state between steps."""

    name: str
    kept: tuple[float, float, float] = (1.0, 1.0, 1.0)
    state: float = 1.0
    lower: bool = False


def changes(facts: ScriptFacts, precision: str, bf16: bool, accelerator: bool) -> Iterator[_Change]:
    """The techniques that could apply to such a training, gentlest first.

    Args:
        bf16: whether the device computes in it. accelerator: whether there is a host beside it, to put things on.
    """
    if bf16 and precision in (memory.AS_IS, "fp32", "tf32") and not facts.autocast and not _low(facts):
        yield _Change("bf16", lower=True)
    stateful = [item for item in facts.optimizers if memory.STATE.get(item.name.lower(), 1.0) or item.name == "SGD"]
    if stateful and all(item.name.lower().startswith(_MOMENTS) for item in stateful):
        yield _Change("low_bit_optimizer", state=EIGHT_BITS)
    blocks = max((max(item.repeated.values(), default=0) for item in facts.models), default=0)
    if blocks >= 2:
        share = max((item.repeated_share or 0.0) for item in facts.models if item.repeated)
        kept = tuple((1 - share) + share * min(part + 1 / blocks, 1.0) for part in BLOCK_INPUT)
        yield _Change("activation_checkpointing", kept=(kept[0], kept[1], kept[2]))
    if accelerator:
        if stateful:
            yield _Change("optimizer_offload", state=0.0)
        yield _Change("activation_offload", kept=OFFLOADED)


def _low(facts: ScriptFacts) -> bool:
    return any(set(item.dtypes) & {"bfloat16", "float16"} for item in facts.models)


def remedies(
    work: StepWork,
    facts: ScriptFacts,
    limit: float,
    *,
    batch: int | None,
    precision: str,
    bf16: bool,
    accelerator: bool = True,
    most: int = 3,
) -> tuple[Remedy, ...]:
    """Ways to fit a step into `limit` bytes: a smaller pass, then single techniques, else pairs, else three together.

    Args:
        batch: samples of a pass; None: as seen.
        bf16, accelerator: of the device, see `changes`.
        most: how many to name.
    """
    found = []
    fewer = memory.largest_batch(work, limit, precision=precision, autocast=facts.autocast, accelerator=accelerator)
    wanted = batch if batch is not None else work.batch
    if fewer.value and wanted and fewer.value < wanted:
        smaller = int(fewer.value)
        peak = memory.predict(
            work, batch=smaller, precision=precision, autocast=facts.autocast, accelerator=accelerator
        )
        how = f"passes of {smaller} samples, their gradients summed: the same step, a little slower"
        found.append(Remedy(techniques=(), memory=peak.total, how=how, batch=smaller))
    known = list(changes(facts, precision, bf16, accelerator))
    for size in (1, 2, 3):
        hits = []
        for chosen in itertools.combinations(known, size):
            held = _changed(work, chosen, facts.autocast, batch, precision, accelerator)
            if held is not None and held.value is not None and held.value <= memory.HEADROOM * limit:
                names = tuple(item.name for item in chosen)
                hits.append(Remedy(techniques=names, memory=held, how="predicted; upshift tune tries it"))
        found += hits
        if hits:
            break
    return tuple(found[:most])


def _changed(work: StepWork, chosen: Sequence[_Change], autocast: bool, batch: int | None,
             precision: str, accelerator: bool) -> Quantity | None:  # fmt: skip
    """The peak with these techniques on, or None where it cannot be said."""
    scale = memory.ratio(work, batch)
    if scale is None:
        return None
    lower = any(item.lower for item in chosen)
    moments = memory.moments_of(work, "bf16" if lower else precision, autocast)
    if not moments:
        return None
    state = work.optimizer_state
    for item in chosen:
        state *= item.state

    def peak(place: int) -> float:
        kept = 1.0
        for item in chosen:
            kept *= item.kept[place]
        return max(_at(work, moment, scale, kept, state) for moment in moments)

    value, low, high = peak(0), peak(1), peak(2)
    share, least, most = memory.FRAGMENTATION if accelerator else (0.0, 0.0, 0.0)
    context = memory.CONTEXT if accelerator else (0.0, 0.0, 0.0)
    return estimated(
        value * (1 + share) + context[0], "B",
        low * (1 - memory.ERROR) * (1 + least) + context[1], high * (1 + memory.ERROR) * (1 + most) + context[2],
    )  # fmt: skip


def _at(work: StepWork, moment: Moment, scale: float, kept: float, state: float) -> float:
    """Bytes at one moment. While the optimizer steps all of its state is there, as it always was."""
    there = work.optimizer_state if moment.phase == "optimizer" else state
    saved = min(work.saved or 0.0, moment.scaled) if moment.phase != "optimizer" else 0.0
    scaled = moment.scaled - saved * (1 - kept)
    return work.parameters + work.buffers + there + moment.fixed + scaled * scale
