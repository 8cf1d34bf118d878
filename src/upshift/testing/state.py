"""What a technique could leave changed: global state of torch and Python, modules, param groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def snapshot() -> dict[str, Any]:
    """Global state of torch and Python that a technique could leave changed."""
    import gc

    import torch
    from torch.backends import cuda, cudnn

    flags: Any = cuda
    small = torch.full((4,), 1e-20) * torch.full((4,), 1e-20)
    wide = torch.full((1 << 18,), 1e-20)
    return {
        "threads": torch.get_num_threads(),
        "denormal": (bool((small != 0).all()), int(torch.count_nonzero((wide * wide).view(torch.int32)))),
        "sdp": (
            flags.flash_sdp_enabled(),
            flags.math_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
            flags.cudnn_sdp_enabled(),
        ),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "default dtype": torch.get_default_dtype(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "grad": torch.is_grad_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "garbage collector": (gc.isenabled(), gc.get_threshold()),
        "classes": {
            cls.__qualname__: {name: id(value) for name, value in vars(cls).items() if not name.startswith("__abc")}
            for cls in (torch.nn.Module, torch.Tensor, torch.utils.data.DataLoader, torch.optim.AdamW)
        },
    }


def module_state(module: torch.nn.Module) -> dict[str, Any]:
    """Identity, layout and attributes of everything in a module."""
    return {
        "parameters": {name: (id(item), item.stride(), item.dtype) for name, item in module.named_parameters()},
        "buffers": {name: (id(item), item.dtype) for name, item in module.named_buffers()},
        "attributes": {
            name: sorted(key for key in vars(item) if key != "_compiled_call_impl")
            for name, item in module.named_modules()
        },
        "hooks": {
            name: sum(len(value) for key, value in vars(item).items() if key.endswith("_hooks"))
            for name, item in module.named_modules()
        },
        "compiled": [name for name, item in module.named_modules() if getattr(item, "_compiled_call_impl", None)],
        "classes": {name: type(item).__qualname__ for name, item in module.named_modules()},
    }


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rate, flags and the like of each param group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
