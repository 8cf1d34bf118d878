"""Facts about models, optimizers, loaders and the process, read once each. Nothing is called, moved or changed."""

from __future__ import annotations

import ast
import contextlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.hardware import machine
from upshift.measure.repeated import repeated_blocks, repeated_share
from upshift.records.measurement import LoaderFacts, ModelFacts, OptimizerFacts

if TYPE_CHECKING:
    import torch

#: Libraries that drive the training themselves.
FRAMEWORKS = ("lightning", "pytorch_lightning", "transformers", "accelerate", "deepspeed", "fastai", "ultralytics")

_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")

#: Source files larger than this are not parsed.
_LARGEST_SOURCE = 4 * 2**20


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Tensors in arguments, a few levels deep; nothing else is looked into."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4 and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, depth + 1)


def model_facts(
    module: torch.nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> ModelFacts:
    """Facts about a root module, and the shapes of the tensors of the call it was seen in.

    `channels_last` is True where a convolution's 4-D or 5-D weights lie in that format only (a 1 x 1 kernel fits both).
    `custom_autograd` is True where a package one of its layers comes from defines an `autograd.Function`: nobody says
    whether it is called.
    """
    parameters = list(module.parameters())
    layers = Counter(type(item).__name__ for item in module.modules() if next(item.children(), None) is None)
    devices = sorted({str(item.device) for item in parameters})
    kind = type(module).__name__
    blocks = repeated_blocks(module)
    repeated: Counter[str] = Counter()
    for group in blocks:
        repeated[type(group[0]).__name__] += len(group)
    return ModelFacts(
        name=kind,
        parameters=sum(elements(item) for item in parameters),
        dtypes=tuple(sorted({_dtype(item) for item in parameters})),
        device=",".join(devices),
        layers=dict(sorted(layers.items())),
        trained=any(item.requires_grad for item in parameters),
        compiled=kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None,
        channels_last=_is_channels_last(parameters),
        custom_autograd=_defines_autograd(module),
        repeated=dict(repeated),
        repeated_share=repeated_share(module, blocks),
        input_shapes=tuple(tuple(int(size) for size in item.shape) for item in tensors_in((args, kwargs or {}))),
    )


def elements(parameter: Any) -> int:
    """Elements of a parameter; a lazy one has none yet."""
    try:
        return int(parameter.numel())
    except (RuntimeError, ValueError):
        return 0


def _is_channels_last(parameters: Iterable[torch.Tensor]) -> bool:
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for item in parameters:
        wanted = formats.get(item.dim()) if item.layout is torch.strided and elements(item) else None
        if wanted is not None and not item.is_contiguous() and item.is_contiguous(memory_format=wanted):
            return True
    return False


def _defines_autograd(module: torch.nn.Module) -> bool:
    import torch

    packages = {type(item).__module__.partition(".")[0] for item in module.modules()} - {"torch"}
    waiting: list[type] = list(torch.autograd.Function.__subclasses__())
    while waiting:
        found = waiting.pop()
        if found.__module__.partition(".")[0] in packages:
            return True
        waiting.extend(found.__subclasses__())
    return False


def optimizer_facts(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    """Facts about an optimizer. `fused` and `foreach`: None where the default decides, or its groups differ."""
    import torch

    parameters = parameters_of(optimizer)
    trained = [item for item in parameters if item.requires_grad]
    return OptimizerFacts(
        name=type(optimizer).__name__,
        parameters=sum(elements(item) for item in trained),
        tensors=len(trained),
        device=",".join(sorted({str(item.device) for item in parameters})),
        dtypes=tuple(sorted({_dtype(item) for item in parameters})),
        fused=_flag(optimizer, "fused"),
        foreach=_flag(optimizer, "foreach"),
        closure=isinstance(optimizer, torch.optim.LBFGS),
        sparse=isinstance(optimizer, torch.optim.SparseAdam)
        or any(item.grad is not None and item.grad.is_sparse for item in trained),
    )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of all groups of an optimizer."""
    return [item for group in optimizer.param_groups for item in group["params"]]


def learning_rates(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[float, ...] | None:
    """The learning rate of every parameter group; None where one has none, or has it on an accelerator."""
    rates = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group.get("lr")
            device = getattr(rate, "device", None)
            if rate is None or (device is not None and device.type != "cpu"):
                return None
            try:
                rates.append(float(rate))
            except (TypeError, ValueError):
                return None
    return tuple(rates)


def decayed_vectors(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[float, int]:
    """The largest decoupled weight decay, and how many trained parameters of fewer than two dimensions are under one.

    Decoupled as in Loshchilov and Hutter 2019; an L2 penalty in the gradient is another thing and is not counted.
    """
    largest, count = 0.0, 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            decay = group.get("weight_decay", 0.0)
            decoupled = "AdamW" in type(optimizer).__name__ or group.get("decoupled_weight_decay")
            if decoupled and isinstance(decay, float) and decay > 0.0:
                largest = max(largest, decay)
                count += sum(1 for item in group["params"] if item.requires_grad and item.dim() < 2)
    return largest, count


def mode_layers(module: torch.nn.Module) -> tuple[str, ...]:
    """Kinds of torch's layers in a module that act differently in training and in evaluation mode."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    found = set()
    for item in module.modules():
        drop = 0.0
        if isinstance(item, _DropoutNd):
            drop = item.p
        elif isinstance(item, (nn.RNNBase, nn.MultiheadAttention)):
            drop = item.dropout
        # A subclass may have put a module there.
        drops = isinstance(drop, (int, float)) and drop > 0
        if drops or (isinstance(item, _BatchNorm) and item.track_running_stats):
            found.add(type(item).__name__)
    return tuple(sorted(found))


def _flag(optimizer: torch.optim.Optimizer, name: str) -> bool | None:
    values = {group.get(name) for group in optimizer.param_groups}
    value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, bool) else None


def loader_facts(loader: torch.utils.data.DataLoader[Any], training: bool) -> LoaderFacts:
    """Facts about a DataLoader; `samples` is None where its dataset has no length."""
    from torch.utils import data

    dataset = loader.dataset
    samples: int | None = None
    if not isinstance(dataset, data.IterableDataset):
        with contextlib.suppress(Exception):  # the user's own __len__
            samples = len(dataset)  # type: ignore[arg-type]
    stock = (data.default_collate, data.default_convert)
    sampler = loader.batch_sampler
    return LoaderFacts(
        name=type(loader).__name__,
        dataset=type(dataset).__name__,
        training=training,
        workers=loader.num_workers,
        batch_size=loader.batch_size if loader.batch_size is not None else getattr(sampler, "batch_size", None),
        samples=samples,
        iterable=isinstance(dataset, data.IterableDataset),
        persistent=bool(loader.persistent_workers),
        pinned=bool(loader.pin_memory),
        prefetch=loader.prefetch_factor,
        custom_fetch=(
            loader.collate_fn not in stock
            or (sampler is not None and type(sampler) is not data.BatchSampler)
            or loader.worker_init_fn is not None
        ),
    )


def flushes_denormals() -> bool:
    """Whether this thread's processor flushes denormal results to zero, by making one."""
    tiny = sys.float_info.min
    return tiny * float("0.5") == 0.0


def allocator(root: Path = Path("/")) -> str:
    """The allocator this process runs on: `tcmalloc`, `jemalloc`, `mimalloc`, `glibc`, `musl`; empty where unknown."""
    with contextlib.suppress(OSError):
        text = (root / "proc/self/maps").read_text(errors="replace")
        for name in _ALLOCATORS:
            if f"lib{name}" in text:
                return name
        for name, mark in (("glibc", "/libc.so.6"), ("glibc", "/libc-2."), ("musl", "/ld-musl-")):
            if mark in text:
                return name
    preload = os.environ.get("LD_PRELOAD", "")
    return next((name for name in _ALLOCATORS if name in preload), "")


def main_guard(script: str | Path) -> bool:
    """Whether a script has an `if __name__ == "__main__":` at top level. False where it cannot be parsed."""
    try:
        script = Path(script)
        if script.stat().st_size > _LARGEST_SOURCE:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(item, ast.If) and _is_guard(item.test) for item in tree.body)


def _is_guard(test: ast.expr) -> bool:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_is_guard(item) for item in test.values)
    if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
        return False
    sides = (test.left, test.comparators[0])
    return any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides) and any(
        isinstance(side, ast.Constant) and side.value == "__main__" for side in sides
    )


def _bf16_native() -> bool | None:
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return machine.bf16_native()


def process_facts(script: str | Path | None = None) -> dict[str, Any]:
    """What is true of this process, by the names of the fields of `ScriptFacts`.

    Keys: threads, cores, bf16_native (of the GPU once CUDA is in use), flush_denormal, compiler, allocator, frameworks,
    and main_guard where the script's file is given.
    """
    import torch

    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cores": machine.usable_cores(),
        "bf16_native": _bf16_native(),
        "flush_denormal": flushes_denormals(),
        "compiler": machine.has_compiler(),
        "allocator": allocator(),
        "frameworks": tuple(name for name in FRAMEWORKS if name in sys.modules),
    }
    if script:
        facts["main_guard"] = main_guard(script)
    return facts
