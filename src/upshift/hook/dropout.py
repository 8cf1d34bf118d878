"""Dropout switched off for some steps of a trial, in every way a model can ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from upshift.hook.patch import Patches


def dropout_off(torch: Any, masks: list[float] | None = None) -> Callable[[], None]:
    """Make dropout the identity, so that the updates of two arms can be compared (masks depend on the layout).

    Args:
        masks: takes the probability of every mask that would have been drawn.

    Returns:
        What switches it on again.
    """
    patches = Patches()
    functional = torch.nn.functional
    state = {"off": True}

    def switched(original: Any) -> Any:
        # A script may keep the function under a name of its own: it must be itself again later.
        default = inspect.signature(original).parameters["training"].default

        def maybe(input: Any, p: float = 0.5, training: bool = default, *args: Any, **kwargs: Any) -> Any:
            if not state["off"]:
                return original(input, p, training, *args, **kwargs)
            if masks is not None and training and p > 0.0:
                masks.append(p)
            return input

        return maybe

    for name in (
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
    ):
        if hasattr(functional, name):
            patches.set(functional, name, switched(getattr(functional, name)))
    attention = functional.scaled_dot_product_attention

    def without_dropout(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        if state["off"] and masks is not None and dropout_p > 0.0:
            masks.append(dropout_p)
        p = 0.0 if state["off"] else dropout_p
        return attention(query, key, value, attn_mask, p, *args, **kwargs)

    patches.set(functional, "scaled_dot_product_attention", without_dropout)

    def on_again() -> None:
        state["off"] = False
        patches.close()

    return on_again
