"""Drop the activations inside the blocks that repeat in a model, and compute them again for the backward pass.

Idea. Of a block only the input is kept; its backward pass first runs the block's forward again. Memory for activations
falls from that of all blocks to their inputs and one block's insides, for one more forward of the blocks (Chen et al.
2016). `selective` keeps what was expensive: each kind of operation in a block is timed in its first call, and those
with the least seconds per byte of output are dropped, up to `fraction` of the bytes; the others keep their results.

Numbers: bitwise. The second run sees the same inputs, autocast state, random numbers (torch, Python, NumPy) and the
buffers as they were (those that the block changes, as batch normalisation does, are lent to it as copies, so that they
are not updated twice). Operations that draw random numbers are never kept by `selective`: a draw that is left out would
shift all later ones.

Limits. A block that leaves something else behind, such as a counter or an auxiliary loss in an attribute, does so
twice; so does one that begins to change a buffer after its first call. Hooks inside a block would run twice, so with
hooks it runs plainly. `selective` falls back to whole blocks where an operation changes in place what the block did not
make itself. Outputs of the block itself are inputs of the next and stay in memory.

Sources: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174); Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198), selective recomputation by cost;
docs.pytorch.org/docs/stable/checkpoint.html.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.measure.constancy import Streams
from upshift.measure.repeated import repeated_blocks
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec

if TYPE_CHECKING:
    import torch

BLOCKS, SELECTIVE = "blocks", "selective"

#: Kinds of operations, by name, whose results are dropped; everything else is kept.
Dropped = frozenset[str]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def dropped(costs: dict[str, tuple[float, int]], fraction: float) -> Dropped:
    """Which operations to run again: the least seconds per byte first, until `fraction` of all bytes is reached.

    Args:
        costs: operation -> seconds and bytes of its results in one forward pass of a block.
        fraction: 0..1; 1 drops everything.
    """
    wanted = fraction * sum(size for _, size in costs.values())
    found: set[str] = set()
    freed = 0
    for name in sorted(costs, key=lambda item: (costs[item][0] / max(costs[item][1], 1), item)):
        if costs[name][1] and freed + costs[name][1] <= wanted * (1 + 1e-9):
            found.add(name)
            freed += costs[name][1]
    return frozenset(found)


class _Block:
    """One block: how it is called, and what its second run is given."""

    def __init__(self, group: _Group) -> None:
        self.group = group
        self.changing: set[tuple[int, str]] | None = None

    def __call__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils.checkpoint import checkpoint

        owner = self.group.owner
        plain: Any = module._call_impl
        if not owner.on or not module.training or not torch.is_grad_enabled() or owner.hooked(module):
            return plain(*args, **kwargs)
        before, seen = self._buffers(module)
        again = _Again(module, before, Streams())
        output = checkpoint(
            plain, *args, use_reentrant=False, preserve_rng_state=True,
            context_fn=functools.partial(self.group.contexts, module, again), **kwargs,
        )  # fmt: skip
        owner.calls += 1
        if self.changing is None:
            now: dict[tuple[int, str], Any] = _buffers_of(module)
            # Also by value: batch normalisation writes its statistics without telling autograd.
            self.changing = {
                key
                for key, (then, version) in seen.items()
                if then._version != version or not torch.equal(then, before[key]) or now.get(key) is not then
            }
            for key in [key for key in before if key not in self.changing]:
                del before[key]
        return output

    def _buffers(self, module: torch.nn.Module) -> tuple[dict[tuple[int, str], torch.Tensor], dict[Any, Any]]:
        """Copies of the buffers that a run changes (of all in the first), and what is needed to see which do."""
        if self.changing is not None and not self.changing:
            return {}, {}
        buffers = _buffers_of(module)
        wanted = [key for key in buffers if self.changing is None or key in self.changing]
        seen = {key: (buffers[key], buffers[key]._version) for key in wanted}
        return {key: buffers[key].detach().clone() for key in wanted}, seen


class _Again:
    """What the second run takes place in: streams beside torch's rewound, changing buffers lent as they were.

    May be entered several times: a graph that is kept is run through again.
    """

    def __init__(self, module: torch.nn.Module, before: dict[tuple[int, str], torch.Tensor], streams: Streams) -> None:
        self.module, self.before, self.streams = module, before, streams
        self.kept: dict[tuple[int, str], Any] = {}

    def __enter__(self) -> None:
        self.now, inner = Streams(), list(self.module.modules())
        self.kept = {(at, name): inner[at]._buffers.get(name) for at, name in self.before}
        self.streams.restore()
        for (at, name), buffer in self.before.items():
            inner[at]._buffers[name] = buffer.clone()

    def __exit__(self, *_: object) -> None:
        inner = list(self.module.modules())
        for (at, name), buffer in self.kept.items():
            inner[at]._buffers[name] = buffer
        self.now.restore()


class _Both:
    """Two contexts as one, as often as they can be entered."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *how: Any) -> None:
        try:
            self.inner.__exit__(*how)
        finally:
            self.outer.__exit__(*how)


def _buffers_of(module: torch.nn.Module) -> dict[tuple[int, str], Any]:
    """Buffers by the number of their module and their name."""
    return {
        (at, name): buffer
        for at, inner in enumerate(module.modules())
        for name, buffer in inner._buffers.items()
        if buffer is not None
    }


class _Group:
    """Equal blocks: which operations they drop (`choice`, None until measured), or all of them (`whole`)."""

    def __init__(self, owner: Checkpointed, fraction: float | None) -> None:
        self.owner, self.fraction = owner, fraction
        self.choice: Dropped | None = None
        self.whole = fraction is None

    def contexts(self, module: torch.nn.Module, again: _Again) -> tuple[Any, Any]:
        """What the first and the second run take place in."""
        if self.whole:
            return contextlib.nullcontext(), again
        if self.choice is None:
            return _measuring(self), again
        from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

        choice = self.choice

        def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
            keep = str(operation) not in choice
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        first, second = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
        return first, _Both(again, second)

    def decide(self, costs: dict[str, tuple[float, int]], forced: set[str], changes: bool) -> None:
        """After the first call: drop the cheapest, those that must be, and views, which are no memory of their own."""
        if changes or self.fraction is None:
            self.whole = True
            return
        views = {name for name, (_, size) in costs.items() if not size}
        self.choice = dropped(costs, self.fraction) | forced | views


@contextlib.contextmanager
def _measuring(group: _Group) -> Iterator[None]:
    """Time each operation of this call, and count the bytes of its results that are memory of their own."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    costs: dict[str, tuple[float, int]] = {}
    forced: set[str] = set()
    made: dict[
        int, tuple[str, Any]
    ] = {}  # memory -> the operation it comes from (held, so that no address comes twice)
    changes = False

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal changes
            began = time.perf_counter()
            result = func(*args, **(kwargs or {}))
            results = [item for item in tree_leaves(result) if _is_tensor(item)]
            if any(item.is_cuda for item in results):
                torch.cuda.synchronize()
            took = time.perf_counter() - began
            name, given = str(func), [_memory(item) for item in tree_leaves((args, kwargs)) if _is_tensor(item)]
            own = [item for item in results if _memory(item) not in given]
            seconds, size = costs.get(name, (0.0, 0))
            costs[name] = seconds + took, size + sum(item.numel() * item.element_size() for item in own)
            made.update({_memory(item): (name, item.untyped_storage()) for item in own})
            if torch.Tag.nondeterministic_seeded in func.tags:
                forced.add(name)
            if func._schema.is_mutable:
                # What is changed in place cannot be kept from before the change.
                forced.add(name)
                changed = [_memory(item) for item in _changed(func, args, kwargs or {}) if _is_tensor(item)]
                changes = changes or any(memory not in made for memory in changed)
                forced.update(made[memory][0] for memory in changed if memory in made)
            return result

    with Watch():  # type: ignore[no-untyped-call]
        yield
    made.clear()  # the class above lives until the garbage collector comes by
    group.decide(costs, forced, changes)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_tensor(item: Any) -> bool:
    import torch

    return isinstance(item, torch.Tensor) and item.layout is torch.strided


class Checkpointed(BaseApplied):
    """The blocks of a model, each run again in its backward pass."""

    def __init__(self, module: torch.nn.Module, groups: Sequence[Sequence[torch.nn.Module]],
                 fraction: float | None) -> None:  # fmt: skip
        self.on = True
        self.calls = 0
        self._hooks: dict[int, tuple[int, bool]] = {}
        self._plain = False
        # Weak, so that a model that the script lets go of is not kept alive by the record of what was done to it.
        self._placed: list[tuple[weakref.ref[torch.nn.Module], Any]] = []
        for blocks in groups:
            shared = _Group(self, fraction)
            for block in blocks:
                called = functools.partial(_Block(shared), block)
                block._compiled_call_impl = called
                self._placed.append((weakref.ref(block), weakref.ref(called)))
        how = "" if fraction is None else f", {fraction:.0%} of the bytes, the cheapest to compute"
        self.note = f"activations of {len(self._placed)} blocks of {type(module).__name__} are computed again{how}"

    def hooked(self, module: torch.nn.Module) -> bool:
        """Whether there are hooks in this block. Every hook registered anywhere takes the next number."""
        from torch.utils.hooks import RemovableHandle

        number, found = self._hooks.get(id(module), (-1, False))
        if found or number != RemovableHandle.next_id:
            found = any(inner.__dict__.get(name) for inner in module.modules() for name in _HOOKS)
            self._hooks[id(module)] = RemovableHandle.next_id, found
        self._plain = self._plain or found
        return found

    def switch(self, on: bool) -> None:
        self.on = on

    def effect(self) -> NoEffect | None:
        if self.calls:
            return None
        return NoEffect("hooks are registered in its blocks" if self._plain else "no block was called in training")

    def close(self) -> None:
        self.on = False
        for reference, placed in self._placed:
            module, called = reference(), placed()
            if module is not None and called is not None and module.__dict__.get("_compiled_call_impl") is called:
                del module._compiled_call_impl


def refusal(module: torch.nn.Module) -> str:
    """Why this model is left alone, or the empty string."""
    if not any(item.requires_grad for item in module.parameters()):
        return "it is not trained"
    for inner in module.modules():
        if inner.__dict__.get("_compiled_call_impl") is not None or type(inner).__name__ == "OptimizedModule":
            return "it is compiled; the compiler chooses itself what to compute again"
        if inner.__dict__.get("gradient_checkpointing") is True:
            return "it checkpoints activations itself"
    return ""


class ActivationCheckpointing:
    """Computes activations of repeated blocks again instead of keeping them."""

    card: ClassVar[Card] = Card(
        name="activation_checkpointing",
        summary="Computes activations inside repeated blocks again in the backward pass instead of keeping them.",
        source="Chen et al. 2016 (arXiv:1604.06174); Korthikanti et al. 2022 (arXiv:2205.05198)",
        sites=("model_created",),
        numerics=Numerics.BITWISE,
        switchable="live",
        targets=("forward", "backward"),
        details=(
            "Takes time (about one more forward of the blocks) and saves memory, so that a larger micro-batch or model "
            "fits. Not for models without repeated blocks, nor together with compile. A block that counts its calls or "
            "keeps a loss in an attribute does so twice."
        ),
        settings={
            "scope": SettingSpec(
                BLOCKS, "whole blocks, or only the operations that are cheap to run again", choices=(BLOCKS, SELECTIVE)
            ),
            "fraction": SettingSpec(0.7, "selective: share of a block's bytes that is dropped", low=0.0, high=1.0),
        },
        conflicts=("compile",),
        saves_memory=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """The same operations on the same values."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """Applies to trained models with repeated blocks."""
        facts = seen.facts
        models = [item for item in facts.models if item.trained and item.repeated]
        refusal = ""
        if not models:
            refusal = "no trained model with repeated blocks was seen"
        elif all(item.compiled for item in models):
            refusal = "the script compiles its model, and the compiler chooses what to compute again"
        elif facts.create_graph:
            refusal = "the script differentiates twice (create_graph)"
        elif facts.distributed:
            refusal = "not tested with distributed training"
        if refusal:
            return Verdict(applies=False, reason=refusal)
        share = seen.anatomy.share("forward") * max(item.repeated_share or 1.0 for item in models)
        blocks = ", ".join(f"{count} {name}" for item in models for name, count in item.repeated.items())
        return Verdict(
            applies=True,
            reason=f"the model repeats blocks ({blocks}); takes time, saves memory",
            gain=1.0 / (1.0 + share) if share else None,
            rests_on="one more forward of the blocks per step" if share else "",
            candidates=({"scope": SELECTIVE}, {"scope": BLOCKS}),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts on the blocks of a root module before its first call."""
        if not isinstance(moment, ModelSeen):
            return None
        name = type(moment.module).__name__
        if why := refusal(moment.module):
            return NoEffect(f"{name}: {why}")
        groups = repeated_blocks(moment.module)
        if not groups:
            return NoEffect(f"{name}: no block of it repeats (of one class, with parameters of the same shapes)")
        fraction = float(settings["fraction"]) if settings["scope"] == SELECTIVE else None
        return Checkpointed(moment.module, groups, fraction)
