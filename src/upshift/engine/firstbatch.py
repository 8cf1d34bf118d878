"""The first batch of a job: what does not fit together is said with shapes, not with a traceback of torch."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from upshift.engine.job import Weighted
from upshift.engine.memory import is_out_of_memory
from upshift.engine.ranks import disconnected
from upshift.errors import UpshiftError, UsageError

#: What a part of a job raises that is given something else than it expects; other errors are its own business.
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
#: Entries of a batch that are listed, and how deep.
_MOST, _DEPTH = 6, 2
#: Lines of a person's own code that are named.
_LINES = 3


def forward(call: Callable[[Any], tuple[Any, Any]], batch: Any) -> tuple[Any, Any]:
    """`call(batch)`, the model's first.

    Raises:
        UsageError: it does not take the batch.
    """
    with _fits("the model does not take the first batch", lambda: f"A batch is {shapes(batch)}."):
        return call(batch)


def loss(call: Callable[[Any, Any], Any], output: Any, target: Any) -> Any:
    """`call(output, target)`, the first loss.

    Raises:
        UsageError: it does not take them, or returns something else than one number with a gradient.
    """
    given = f"It gets the output {shapes(output)} and the target {shapes(target)}."
    with _fits("the loss of the first batch cannot be computed", lambda: given):
        found = call(output, target)
    import torch

    total = found.total if type(found) is Weighted else found
    if not isinstance(total, torch.Tensor):
        raise UsageError(
            f"the loss returned a {type(total).__name__}, not a tensor.", remedy=f"Return a scalar tensor. {given}"
        )
    if total.numel() != 1:
        raise UsageError(
            f"the loss returned {shapes(total)}: one number is needed.",
            remedy=f"Average it: .mean(), or return upshift.Weighted(sum, count). {given}",
        )
    if torch.is_grad_enabled() and not total.requires_grad:
        raise UsageError(
            "the loss has no gradient: it does not depend on a parameter that is trained.",
            remedy=f"Look for .detach(), .item() or argmax in the model and the loss. {given}",
        )
    return found


@contextlib.contextmanager
def _fits(what: str, given: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except UpshiftError:
        raise
    except _MISFITS as error:
        if is_out_of_memory(error) or disconnected(error):
            raise
        text = next(iter(str(error).strip().splitlines()), "")
        raise UsageError(f"{what}: {type(error).__name__}: {text}{_place(error)}", remedy=given()) from error


def _place(error: BaseException) -> str:
    """` (jobs.py, line 12; layers.py, line 40)`: the last lines on the way that are not torch's or ours."""
    import torch

    ours, torchs = Path(__file__).parents[1], Path(torch.__file__).parent
    lines = [
        f"{Path(frame.filename).name}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if (path := Path(frame.filename)).is_file() and not (path.is_relative_to(ours) or path.is_relative_to(torchs))
    ]
    return f" ({'; '.join(lines[-_LINES:])})" if lines else ""


def shapes(value: Any, depth: int = _DEPTH) -> str:
    """What a value is, in a few words: `{x: float32[64, 20], y: int64[64]}`."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict) and depth:
        items = [f"{key}: {shapes(item, depth - 1)}" for key, item in list(value.items())[:_MOST]]
        return f"{{{', '.join(items)}{', …' if len(value) > _MOST else ''}}}"
    if isinstance(value, (tuple, list)) and depth:
        items = [shapes(item, depth - 1) for item in value[:_MOST]]
        return f"({', '.join(items)}{', …' if len(value) > _MOST else ''})"
    return type(value).__name__
