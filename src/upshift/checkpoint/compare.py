"""What differs between two saved states, bit by bit."""

from __future__ import annotations

from typing import Any


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths (`model.head.weight`) at which two states are not equal to the last bit; empty where they are the same.

    Tensors are compared by dtype, shape and bits: NaNs of the same bits are equal, 0.0 and -0.0 are not.
    """
    import torch

    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and _same_bits(a, b) else [path or "state"]
    if isinstance(a, dict):
        if not isinstance(b, dict) or list(map(str, a)) != list(map(str, b)):
            return [path or "state"]
        return [item for key in a for item in differences(a[key], b[key], f"{path}.{key}" if path else str(key))]
    if isinstance(a, (list, tuple)):
        if not isinstance(b, (list, tuple)) or len(a) != len(b):
            return [path or "state"]
        pairs = enumerate(zip(a, b, strict=True))
        return [item for place, (x, y) in pairs for item in differences(x, y, f"{path}.{place}")]
    return [] if type(a) is type(b) and (a == b or (a != a and b != b)) else [path or "state"]


def _same_bits(a: Any, b: Any) -> bool:
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a, b) and not a.is_floating_point():
        return True
    left, right = a.detach().cpu().contiguous().flatten(), b.detach().cpu().contiguous().flatten()
    return bool(torch.equal(left.view(torch.uint8), right.view(torch.uint8)))
