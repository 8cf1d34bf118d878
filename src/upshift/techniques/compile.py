"""Compile a root module, or the blocks that repeat in it, in place with `torch.compile`.

Idea. TorchDynamo captures the forward pass, AOTAutograd its backward, TorchInductor writes fused kernels for both
(Ansel et al. 2024, "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
Compilation"). The module stays the object it was: only the callable that `Module.__call__` looks up is set, so class,
state dict keys, pickling and deep copies are the script's own. What is compiled is a function around the module's call:
`Module.compile` itself does nothing, silently, for a root whose forward lies inside `torch.nn` (`nn.Sequential`).

Regions. A model that repeats one block (the layers of a transformer) can be compiled block by block: the code made for
the first serves all equal ones, so compiling takes about as long as for one block, while what happens between blocks,
before and after them stays uncompiled (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).

Numbers. Another order of operations: `rounding`. With `eager_random` the compiled code draws the random numbers the
uncompiled code would draw, so that dropout masks stay the same; without it dropout has other masks: `reseeds`.

Limits. Compilation takes seconds to minutes, again for each new shape until a dynamic one is compiled, and for the
evaluation mode. Hooks registered after compilation would be ignored: the module then runs uncompiled from there on. A
failure to compile the backward pass appears inside `backward`, where nothing can be retried. CUDA graphs
(`reduce-overhead`) are recorded per input shape, overwrite what they gave out when they run again (so outputs are
copied), and fail where gradients are accumulated over micro-batches (pytorch#169545). Blocks that read a number of
their own (a layer index, a stochastic depth) are compiled once for each.
"""

from __future__ import annotations

import functools
import importlib.util
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from upshift import units
from upshift.hardware import machine
from upshift.measure.constancy import Streams
from upshift.measure.repeated import repeated_blocks
from upshift.measure.shapes import Shapes
from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites.moments import ModelSeen, Moment
from upshift.sites.protocol import BaseApplied, Card, NoEffect, Numerics, SettingSpec, Verdict

if TYPE_CHECKING:
    import torch

#: Wrappers that hand their module's `__dict__` on, or hook into its backward pass.
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", *_BACKWARD_HOOKS)

#: The mode that records CUDA graphs, and the input shapes it may meet: each is a graph with memory of its own.
GRAPHS, GRAPH_SHAPES = "reduce-overhead", 4

#: What is compiled: the whole model, or its repeated blocks.
WHOLE, BLOCKS = "whole", "blocks"

#: Share of a model's layers from which its repeated blocks are worth compiling without the rest.
MOSTLY_BLOCKS = 0.5

NO_COMPILER = "the C++ compiler that torch starts was not found (install g++, or set CXX to one program)"


def capturable(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function around `call` that TorchDynamo captures, with a code object of its own.

    Dynamo skips frames of torch's own files, and counts recompilations per code object.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Guards refer to the closure by name, so the copy keeps it.
    return types.FunctionType(
        called.__code__.replace(), called.__globals__, called.__name__, called.__defaults__, called.__closure__
    )


def _counted() -> tuple[int, int, float]:
    """Frames compiled, graph breaks, and seconds of compilation in this process so far."""
    from torch._dynamo import utils

    seconds = utils.calculate_time_spent().get("total_wall_time", 0.0)
    return int(utils.counters["frames"]["ok"]), sum(utils.counters["graph_break"].values()), float(seconds)


def hooks_of(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, tuple[int, ...]]]:
    """Hook tables in and below modules that are not empty, each with the keys it holds."""
    found = []
    for module in modules:
        for inner in module.modules():
            for name in _HOOKS:
                table = inner.__dict__.get(name)
                if table:
                    found.append((table, tuple(table)))
    return found


class CompileApplied(BaseApplied):
    """A module whose calls, or those of its repeated blocks, are compiled.

    `recompiles` and `breaks` count graphs beyond the first (of each group of blocks) and graph breaks,
    `one_off_seconds` the time compilation took; all three are those of the process since this module was compiled.
    """

    inexact = ""

    def __init__(
        self,
        module: torch.nn.Module,
        mode: str,
        dynamic: bool | None,
        eager_random: bool,
        groups: Sequence[Sequence[torch.nn.Module]] = (),
    ) -> None:
        """Compile `module`, or each group of equal blocks in it with one code for all."""
        import torch
        from torch._inductor import list_mode_options

        self._start = _counted()
        self._calls = 0
        self._lost = ""
        self._shapes = Shapes(GRAPH_SHAPES) if mode == GRAPHS else None
        options: dict[str, Any] = dict(list_mode_options(mode, dynamic))
        if eager_random:
            options["fallback_random"] = True
        build: Any = functools.partial(torch.compile, dynamic=dynamic, options=options)
        # Weak, so that a model the script lets go of is not kept alive by the record of what was done to it.
        self._placed: list[tuple[weakref.ref[torch.nn.Module], weakref.ref[Callable[..., Any]]]] = []
        self._regions = len(groups) or 1
        if not groups:
            self._place(module, build(capturable(module._call_impl)))
        for group in groups:
            # The block is an argument: Dynamo then takes parameters as inputs of the graph, and one graph fits all.
            shared = build(capturable(type(group[0])._call_impl))
            for block in group:
                self._place(block, functools.partial(shared, block))
        self._hooks = hooks_of(self._modules())
        self._handles = torch.utils.hooks.RemovableHandle.next_id
        if dynamic is None:
            # What code there is depends on which shapes came first.
            self.inexact = (
                "it compiles for shapes as they turn out (dynamic=auto), in another order after a stop: the run goes "
                "on up to rounding; with dynamic=no or yes bit for bit"
            )
        self.note = f"{type(module).__name__} compiled in place ({mode}"
        self.note += ", dropout as without compilation)" if eager_random else ")"
        if groups:
            self.note = f"{_named(groups)} of {self.note}"
        if self._hooks:
            self.note += f"; {sum(len(keys) for _, keys in self._hooks)} hooks become part of it"

    def _place(self, module: torch.nn.Module, compiled: Callable[..., Any]) -> None:
        module._compiled_call_impl = compiled
        self._placed.append((weakref.ref(module), weakref.ref(compiled)))

    def _modules(self) -> list[torch.nn.Module]:
        """What was compiled and is still there."""
        return [module for reference, _ in self._placed if (module := reference()) is not None]

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call itself. An exception in the very first one leaves the random streams where they were."""
        if self._lost:
            return call(*args, **kwargs)
        if self._calls and self._hooks_changed():
            self._lost = "hooks changed after it was compiled, which compiled code would not notice"
            self.close()
            return call(*args, **kwargs)
        if self._shapes is not None and self._shapes.too_many(args, kwargs):
            self._lost = f"inputs come in more than {GRAPH_SHAPES} shapes, each of which would be a CUDA graph"
            self.close()
            return call(*args, **kwargs)
        self._calls += 1
        if self._calls > 1:
            return self._own(call(*args, **kwargs))
        streams = Streams()
        try:
            return self._own(call(*args, **kwargs))
        except Exception:
            streams.restore()
            raise

    def _own(self, output: Any) -> Any:
        """The output; that of a CUDA graph in memory of its own, since scripts keep losses and predictions."""
        if self._shapes is None:
            return output
        import torch
        from torch.utils._pytree import tree_map_only

        return tree_map_only(torch.Tensor, torch.clone, output)

    def _hooks_changed(self) -> bool:
        from torch.utils.hooks import RemovableHandle

        for table, keys in self._hooks:
            if tuple(table) != keys:
                return True
        # Every hook registered anywhere takes the next number: only then is the module tree worth a look.
        if RemovableHandle.next_id == self._handles:
            return False
        self._handles = RemovableHandle.next_id
        now = hooks_of(self._modules())
        return len(now) != len(self._hooks) or any(
            mine is not theirs or keys != others
            for (mine, keys), (theirs, others) in zip(now, self._hooks, strict=True)
        )

    @property
    def graphs(self) -> int:
        """Frames compiled since."""
        return _counted()[0] - self._start[0]

    @property
    def recompiles(self) -> int:
        """Graphs beyond the first of each group: other shapes, modes, blocks that differ, or graph breaks."""
        return max(0, self.graphs - self._regions)

    @property
    def breaks(self) -> int:
        """Graph breaks since."""
        return _counted()[1] - self._start[1]

    @property
    def one_off_seconds(self) -> float:
        """Seconds of compilation, forward and backward; less than in a new place where caches on disk were warm."""
        return _counted()[2] - self._start[2]

    def effect(self) -> NoEffect | None:
        """No effect where nothing was compiled, or the compiled code had to be given up."""
        import torch._dynamo.config as config

        if self._lost:
            return NoEffect(self._lost)
        if not self._calls:
            return NoEffect("the module was not called")
        if not self.graphs:
            return NoEffect("TorchDynamo compiled nothing of it")
        if self.recompiles >= config.recompile_limit:
            return NoEffect(
                f"compiled {self.graphs} times in {units.seconds(self.one_off_seconds)} and still meeting new shapes"
            )
        return None

    def close(self) -> None:
        """The module runs uncompiled again, to the bit as before."""
        for reference, placed in self._placed:
            module, compiled = reference(), placed()
            if module is not None and compiled is not None and module.__dict__.get("_compiled_call_impl") is compiled:
                del module._compiled_call_impl


def _named(groups: Sequence[Sequence[torch.nn.Module]]) -> str:
    """`12 Block, 4 Head`."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[type(group[0]).__name__] += len(group)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def refusal(module: torch.nn.Module, mode: str) -> str:
    """Why this module must not be compiled, or the empty string."""
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    for inner in module.modules():
        if type(inner).__name__ == "OptimizedModule" or inner.__dict__.get("_compiled_call_impl") is not None:
            return "the script compiles it itself"
        if type(inner).__name__ in WRAPPERS:
            return f"it is wrapped in {type(inner).__name__}, which this technique was not tested with"
        if any(inner.__dict__.get(name) for name in _BACKWARD_HOOKS):
            return f"{type(inner).__name__} has a backward hook"
    parameters = list(module.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        return "it is not trained"
    kinds = {parameter.device.type for parameter in parameters}
    if kinds - {"cpu", "cuda"}:
        return f"it is on {', '.join(sorted(kinds))}"
    if "cpu" in kinds and not machine.has_compiler():
        return NO_COMPILER
    if "cuda" in kinds and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if mode == GRAPHS and kinds != {"cuda"}:
        return "reduce-overhead records CUDA graphs, and the module is not on CUDA"
    return ""


def regional_refusal(groups: Sequence[Sequence[torch.nn.Module]], mode: str) -> str:
    """Why blocks must not be compiled apart from the rest, or the empty string."""
    if not groups:
        return "no block of its repeats (of one class, with parameters of the same shapes, in one container)"
    if mode == GRAPHS:
        return "reduce-overhead would record a CUDA graph for each block; it takes the whole model (region = whole)"
    if hooks_of(block for group in groups for block in group):
        # Compiled code does not look at hooks again, so those of one block would act in, or be missing from, all.
        return "hooks are registered in its blocks, which share one code"
    return ""


class Compile:
    """Fuse operations by compiling root modules, or the blocks that repeat in them, in place."""

    card: ClassVar[Card] = Card(
        name="compile",
        summary="compile the model in place with torch.compile",
        source=(
            "Ansel et al. 2024, PyTorch 2, ASPLOS; https://docs.pytorch.org/docs/stable/torch.compiler.html; "
            "blocks: https://docs.pytorch.org/tutorials/recipes/regional_compilation.html"
        ),
        sites=("model_created", "forward"),
        numerics=Numerics.ROUNDING,
        switchable="process",
        targets=("forward", "backward"),
        details=(
            "The module keeps its class, its state dict keys and its pickled form. Compilation is paid once per shape "
            "and mode and shown apart, with the number of steps after which it has paid back. Where a model repeats "
            "equal blocks, compiling these alone (region = blocks) costs about as much as compiling one. Not for "
            "scripts that differentiate twice (create_graph), nor for modules with backward hooks."
        ),
        settings={
            "mode": SettingSpec(
                "default",
                "what inductor optimises for; reduce-overhead (CUDA graphs) on CUDA only",
                choices=("default", "max-autotune-no-cudagraphs", GRAPHS),
            ),
            "dynamic": SettingSpec(
                "auto", "code for any shape at once, for each shape, or as it turns out", choices=("auto", "yes", "no")
            ),
            "eager_random": SettingSpec(
                True, "draw random numbers as uncompiled code does, so that dropout is the same"
            ),
            "region": SettingSpec(
                WHOLE,
                "what is compiled: the whole model, or its repeated blocks alone, with one code for equal ones",
                choices=(WHOLE, BLOCKS),
            ),
        },
        after=("channels_last", "bf16", "attention"),
        one_off=True,
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Another order of operations; with `eager_random` off, other random numbers as well."""
        return Numerics.ROUNDING if settings.get("eager_random", True) else Numerics.RESEEDS

    def check(self, seen: Measurement) -> Verdict:
        """Applies to a trained, uncompiled model where there is a compiler and no double backward."""
        facts = seen.facts
        models = [item for item in facts.models if item.trained]
        if not models:
            return Verdict(False, "no trained module was seen")
        if all(item.compiled for item in models):
            return Verdict(False, "the script compiles its model itself")
        if facts.create_graph:
            return Verdict(
                False, "the script differentiates twice (create_graph), which compiled code does not support"
            )
        if facts.distributed:
            return Verdict(False, "not tested with distributed training")
        if not facts.compiler:
            return Verdict(False, NO_COMPILER)
        if lightning := [name for name in facts.frameworks if "lightning" in name]:
            return Verdict(False, f"{lightning[0]} drives the training; use its own switch")
        share = seen.anatomy.share("forward") + seen.anatomy.share("backward")
        candidates: list[dict[str, Setting]] = [{"mode": "default"}]
        if any((item.repeated_share or 0.0) >= MOSTLY_BLOCKS for item in models):
            candidates.insert(0, {"mode": "default", "region": BLOCKS})
        if facts.device.startswith("cuda"):
            if len(models) == 1 and seen.anatomy.micro_batches.value == 1:
                candidates.append({"mode": GRAPHS})
            candidates.append({"mode": "max-autotune-no-cudagraphs"})
        return Verdict(
            True,
            f"forward and backward are {units.percent(share)} of the step" if share else "the model is not compiled",
            gain=1.0 / (1.0 - 0.2 * min(share, 1.0)) if share else None,
            rests_on="fusing is taken to save a fifth of forward and backward; models differ widely",
            candidates=tuple(candidates),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> CompileApplied | NoEffect | None:
        """Compile a root module, or its repeated blocks, before its first call."""
        if not isinstance(moment, ModelSeen):
            return None
        mode = str(settings["mode"])
        if why := refusal(moment.module, mode):
            return NoEffect(f"{type(moment.module).__name__}: {why}")
        groups = repeated_blocks(moment.module) if settings["region"] == BLOCKS else ()
        if settings["region"] == BLOCKS and (why := regional_refusal(groups, mode)):
            return NoEffect(f"{type(moment.module).__name__}: {why}")
        dynamic = {"auto": None, "yes": True, "no": False}[str(settings["dynamic"])]
        return CompileApplied(moment.module, mode, dynamic, bool(settings["eager_random"]), groups)
