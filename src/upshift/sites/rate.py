"""A base for what multiplies a learning rate: only while the optimizer steps, so that the script finds its own rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch


class RateApplied(BaseApplied):
    """Multiplies the rate of every group of one optimizer just before each step and puts it back right after.

    Whatever sets the rate in between (a scheduler with its `base_lrs`, a line of the script) goes on from the script's
    own value, and the step has that value times the factor: the rule holds for every schedule. What the script logs or
    saves is its own rate.
    """

    #: Groups multiplied at this moment: an optimizer may step inside another that has the same groups.
    _multiplied: ClassVar[set[tuple[type, int]]] = set()

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._held: list[tuple[dict[str, Any], Any, Any]] = []
        self._handle = optimizer.register_step_post_hook(self._after)

    def factor(self, optimizer: torch.optim.Optimizer) -> float:
        """What the rates of the step about to be made are multiplied by; the script's own rates are in the groups."""
        raise NotImplementedError

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply."""
        self._give_back()  # a step that raised has left them
        factor = self.factor(optimizer)
        if factor == 1.0:
            return
        for group in optimizer.param_groups:
            rate, key = group.get("lr"), (type(self), id(group))
            if rate is not None and key not in self._multiplied:
                self._multiplied.add(key)
                # A new tensor where it is one: groups may share theirs.
                group["lr"] = rate * factor
                self._held.append((group, rate, group["lr"]))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for group, before, ours in self._held:
            self._multiplied.discard((type(self), id(group)))
            if group.get("lr") is ours:
                group["lr"] = before
        self._held.clear()

    def close(self) -> None:
        """The rate is the script's own from here on."""
        self._give_back()
        self._handle.remove()
