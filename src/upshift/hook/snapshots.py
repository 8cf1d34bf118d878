"""Parameter updates of chosen steps, kept for a comparison between two processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from upshift.hook.watch import Watch

#: At most this many elements of a tensor are kept, evenly strided: cosines of large tensors need no more.
MOST_ELEMENTS = 32768


def sampled(tensor: torch.Tensor) -> NDArray[np.float32]:
    """A copy of a tensor in logical order, as float32; of a large one evenly strided elements."""
    flat = tensor.detach().reshape(-1)
    stride = max(-(-flat.numel() // MOST_ELEMENTS), 1)
    return flat[::stride].float().cpu().numpy().copy()  # type: ignore[no-any-return]


class Snapshots:
    """Writes `update-<step>.npz` (parameter name -> float32 update, flattened in logical order) into a folder."""

    def __init__(self, watch: Watch, folder: str, steps: tuple[int, ...]) -> None:
        self._watch = watch
        self._folder = Path(folder)
        self._steps = steps
        self._before: dict[str, Any] = {}
        self._seen: dict[int, int] = {}
        self._handle: Any = None

    def install(self) -> None:
        """Copy parameters before the steps wanted (torch's own step hook)."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._watch.index + 1 in self._steps:
            for name, value in self._values(optimizer).items():
                self._before.setdefault(name, value)

    def _values(self, optimizer: Any) -> dict[str, Any]:
        number = self._seen.setdefault(id(optimizer), len(self._seen))
        found = {}
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                found[f"optimizer{number}.group{g}.{p}"] = sampled(parameter)
        return found

    def after_step(self, step: int) -> None:
        """Write the updates of `step` (counted from 1), if it is one of those wanted."""
        if step not in self._steps or not self._before:
            return
        import numpy

        after: dict[str, Any] = {}
        for reference in self._watch.optimizers:
            optimizer = reference()
            if optimizer is not None:
                after.update(self._values(optimizer))
        updates = {name: after[name] - value for name, value in self._before.items() if name in after}
        if step == self._steps[0]:
            updates.update({f"start:{name}": value for name, value in self._before.items()})
        numpy.savez(self._folder / f"update-{step}.npz", **updates)
        self._before = {}
        if step == self._steps[-1] and self._handle is not None:
            self._handle.remove()
            self._handle = None
