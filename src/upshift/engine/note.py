"""What belongs to a boundary between two updates, remembered while the next update is under way.

Large tensors that only an update changes (parameters, the optimizer's state, averages) are referred to; all that a
forward pass may change (buffers, random states, what techniques keep) is copied. Version counters of the tensors tell
whether one of those that are referred to was changed in place after all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Parts of a state whose tensors an update changes, and nothing else does.
_BY_UPDATES = ("optimizer", "average")


class Note:
    """The state after `step` updates.

    Args:
        tree: as it would be saved now; its tensors are live.
        facts: of the checkpoint.
        parameters: of the model; tensors of `tree["model"]` in the same memory are referred to.
    """

    def __init__(
        self, step: int, tree: Mapping[str, Any], facts: dict[str, Any], parameters: Iterable[torch.Tensor]
    ) -> None:
        self.step, self.facts = step, facts
        self._referred: list[torch.Tensor] = []
        places = {item.data_ptr() for item in parameters if item.numel()}
        self._tree: dict[str, Any] = {}
        for key, value in tree.items():
            if key == "model":
                self._tree[key] = {name: self._copied(item, _place(item) in places) for name, item in value.items()}
            else:
                self._tree[key] = self._copied(value, key in _BY_UPDATES)
        self.stamp()

    def stamp(self) -> None:
        """The tensors referred to are as they should be now."""
        self._versions = [item._version for item in self._referred]

    @property
    def changed(self) -> bool:
        """Whether a tensor that is referred to was changed since."""
        return self._versions != [item._version for item in self._referred]

    def tree(self, originals: Mapping[int, torch.Tensor]) -> dict[str, Any]:
        """The state, to be saved before anything changes it.

        Args:
            originals: address of a parameter that holds something else just now -> what belongs there.
        """
        model = {name: originals.get(_place(item), item) for name, item in self._tree["model"].items()}
        return {**self._tree, "model": model}

    def _copied(self, value: Any, refer: bool) -> Any:
        """Containers are copied, tensors cloned, or referred to."""
        import torch

        if isinstance(value, torch.Tensor):
            if not refer or value.is_inference():  # those of inference mode count no versions
                return value.detach().clone()
            self._referred.append(value)
            return value
        if isinstance(value, dict):
            return {key: self._copied(item, refer) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self._copied(item, refer) for item in value])
        return value


def _place(value: Any) -> int:
    """The address of a tensor; 0 for anything else and for tensors without elements."""
    import torch

    return value.data_ptr() if isinstance(value, torch.Tensor) and value.numel() else 0
