"""Which kernel computes scaled dot-product attention.

Idea: PyTorch picks among several kernels by rules that know shapes, not times. On small heads and short sequences the
plain product can beat flash attention; on some GPUs cuDNN or the memory-efficient kernel is faster.
Limits: the kernel asked for is tried first and the plain product stays allowed, so a call it cannot serve still runs
(and then nothing is gained). Attention that the model writes out as matrix products is not affected, nor are calls
inside a `sdpa_kernel` region of the script's own. Kernels draw dropout masks differently.

Sources: Dao et al. 2022, "FlashAttention"; Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory";
docs.pytorch.org/docs/stable/generated/torch.nn.attention.sdpa_kernel.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, ModelSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec

if TYPE_CHECKING:
    import torch

KERNELS = ("math", "flash", "efficient", "cudnn")

#: Kernels a device type has besides the plain product.
_ON_CPU = ("flash",)


def _allowed() -> frozenset[str]:
    """Kernels that the process allows now."""
    from torch.backends import cuda as _cuda

    cuda: Any = _cuda  # for the CPU too, in spite of the name
    state = {
        "math": cuda.math_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
    }
    return frozenset(name for name, on in state.items() if on)


class _Kernel(BaseApplied):
    def __init__(self, module: torch.nn.Module, kernel: str) -> None:
        from torch.nn.attention import SDPBackend

        members = {
            "math": SDPBackend.MATH,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }
        self.note = f"{kernel} attention around calls of {type(module).__name__}"
        self._order = [members[kernel]] if kernel == "math" else [members[kernel], SDPBackend.MATH]
        # With the kernels' usual order of preference cuDNN comes after the plain product.
        self._reorder = kernel == "cudnn"
        self._allowed = _allowed()
        self._on = True
        # Whether the model calls the function at all is watched in one call.
        self._unwatched = True
        self._used: bool | None = None

    def around(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._on or _allowed() != self._allowed:  # a region of the script's own
            return call(*args, **kwargs)
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self._order, set_priority=self._reorder):
            if self._unwatched and module.training:
                self._unwatched = False
                if _is_compiled(module):  # which would be compiled once more than needed: guards see the watching
                    return call(*args, **kwargs)
                with _watch() as seen:
                    output = call(*args, **kwargs)
                self._used = bool(seen)
                return output
            return call(*args, **kwargs)

    def switch(self, on: bool) -> None:
        self._on = on

    def effect(self) -> NoEffect | None:
        if self._used is False:
            return NoEffect("the model does not call scaled_dot_product_attention")
        return None

    def close(self) -> None:
        self._on = False


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of a module, or of one in it, are compiled by now."""
    return any(item.__dict__.get("_compiled_call_impl") is not None for item in module.modules())


def _watch() -> Any:
    """A context in which calls of scaled_dot_product_attention append to the list it yields."""
    from contextlib import contextmanager

    import torch
    from torch.overrides import TorchFunctionMode

    seen: list[bool] = []
    functional, native = torch.nn.functional, torch._C._nn
    # What multi-head attention calls is hidden from the mode, since it dispatches as one function. Somebody may have
    # wrapped the function of the module, as is done to watch it: then it is torch's own that the mode sees.
    functions = (
        functional.scaled_dot_product_attention,
        native.scaled_dot_product_attention,
        functional.multi_head_attention_forward,
    )

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in functions:
                seen.append(True)
            return func(*args, **(kwargs or {}))

    @contextmanager
    def watching() -> Any:
        with Watch():
            yield seen

    return watching()


class Attention:
    """`torch.nn.attention.sdpa_kernel` around root calls."""

    card: ClassVar[Card] = Card(
        name="attention",
        summary="Chooses the kernel of scaled dot-product attention.",
        source="Dao et al. 2022 (arXiv:2205.14135); Rabe and Staats 2021 (arXiv:2112.05682); torch.nn.attention",
        sites=("model_created", "forward"),
        numerics=Numerics.ROUNDING,
        switchable="live",
        targets=("forward", "backward"),
        details="With attention dropout, each kernel draws its own mask: it then counts as another random stream.",
        settings={
            "kernel": SettingSpec(default="math", doc="the kernel tried first; math always works", choices=KERNELS)
        },
        after=("bf16",),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Another order of sums; with dropout also another mask."""
        dropout = any(name.startswith("Dropout") for model in facts.models for name in model.layers)
        transformer = any("MultiheadAttention" in name for model in facts.models for name in model.layers)
        return Numerics.RESEEDS if dropout or transformer else Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies where scaled_dot_product_attention was seen."""
        facts = seen.facts
        if not facts.attention:
            return Verdict(applies=False, reason="no call of scaled_dot_product_attention was seen")
        if facts.create_graph:
            return Verdict(
                applies=False,
                reason="the script differentiates through gradients (create_graph), which fused kernels do not support",
            )
        if facts.device.startswith("cpu"):
            # Flash attention is what PyTorch takes on the CPU unless something forbids it.
            return Verdict(
                applies=True,
                reason="the plain product can beat flash attention on short sequences",
                candidates=({"kernel": "math"},),
            )
        return Verdict(
            applies=True,
            reason="which attention kernel is fastest depends on shapes and device",
            candidates=({"kernel": "cudnn"}, {"kernel": "flash"}, {"kernel": "efficient"}, {"kernel": "math"}),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Wraps the calls of a root module."""
        if not isinstance(moment, ModelSeen):
            return None
        kernel = str(settings.get("kernel", "math"))
        parameter = next(moment.module.parameters(), None)
        if parameter is None:
            return NoEffect("the model has no parameters")
        if parameter.device.type == "cpu" and kernel != "math":
            if kernel not in _ON_CPU:
                return NoEffect(f"{kernel} attention does not exist on the CPU")
            if kernel in _allowed():
                return NoEffect(f"{kernel} attention is what PyTorch takes on the CPU already")
        if kernel == "math" and _allowed() == {"math"}:
            return NoEffect("only the plain product is allowed already")
        return _Kernel(moment.module, kernel)
