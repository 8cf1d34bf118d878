"""The state of every random generator a training draws from; what cannot be restored exactly is refused."""

from __future__ import annotations

import random
import sys
from typing import Any

from upshift.errors import UpshiftError


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch (all devices), Python and, where it is loaded, numpy; ranks draw different streams."""
    import torch

    own = (seed * 1_000_003 + rank) % 2**63
    torch.manual_seed(own)
    random.seed(own)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(own % 2**32)


def random_state() -> dict[str, Any]:
    """The states of all generators: tensors of uint8 and plain values."""
    import torch

    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, place, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = {
            "name": name, "keys": torch.from_numpy(keys.astype("int64")), "place": int(place),
            "has_gauss": int(has_gauss), "cached": float(cached),
        }  # fmt: skip
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned.

    Raises:
        UpshiftError: a state is missing, so that the run would draw other numbers than an uninterrupted one.
    """
    import torch

    for name in ("torch", "python"):
        if name not in state:
            raise UpshiftError(
                f"the checkpoint holds no state of the random generator of {name}; the run would not go on exactly.",
                remedy="Load only the weights: --resume force.",
            )
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((int(python["version"]), tuple(python["words"].tolist()), python["gauss"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        found = state["numpy"]
        keys = found["keys"].numpy().astype("uint32")
        numpy.random.set_state((found["name"], keys, found["place"], found["has_gauss"], found["cached"]))
