"""Lazy imports of optional packages, with an install hint."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from upshift.errors import MissingExtraError


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import `module`, or say what to install.

    Raises:
        MissingExtraError: the package is not installed; the remedy is the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        raise MissingExtraError(
            f"{why} needs the package '{module}', which is not installed in this environment.",
            remedy=f"pip install 'upshift[{extra}]'" if extra else f"pip install {module}",
        ) from None


def available(module: str) -> bool:
    """Whether `module` could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
