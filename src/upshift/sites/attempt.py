"""A first call that may fail: what it may have changed is put back before it is made again without the technique."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class BeforeCall:
    """Buffers of a module and the random streams of the process and of `device`, as they are now."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        import random

        import torch

        self.buffers = [(item, item.detach().clone()) for item in module.buffers()]
        self.python = random.getstate()
        self.cpu = torch.get_rng_state()
        self.device = device
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """As if the call had not been made."""
        import random

        import torch

        with torch.no_grad():
            for item, old in self.buffers:
                item.copy_(old)
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
