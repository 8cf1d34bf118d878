"""upshift: makes PyTorch training faster and cheaper on an unmodified script, and proves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upshift.api import Target, diagnose, tune

__all__ = ["Target", "diagnose", "tune"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that a hooked process does not load the command line's machinery.
    if name in __all__:
        from upshift import api

        return getattr(api, name)
    raise AttributeError(f"module 'upshift' has no attribute {name!r}")
