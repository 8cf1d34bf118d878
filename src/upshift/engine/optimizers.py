"""Optimizers by name: `optimizer("lamb", lr=2e-3)` is a function of the parameters that builds one, for a job.

Names stand for torch's own optimizers, for well-tried ones of the library pytorch_optimizer (extra `optimizers`), and
for AdamW with 8-bit or 4-bit states of torchao (extra `lowbit`). Any other function of the parameters is as good:
`partial(torch.optim.AdamW, lr=3e-4)`. How a step is computed (`fused`, `foreach`) is execution, not mathematics: it is
refused here and decided by a plan. Optimizers that need a closure, or the curvature of the loss, are left out: the loop
computes one gradient a step.

Sources: You et al. 2020, LAMB (arXiv:1904.00962); Chen et al. 2023, Lion (arXiv:2302.06675); Defazio et al. 2024,
schedule-free (arXiv:2405.15682); Jordan et al. 2024, Muon (kellerjordan.github.io/posts/muon); Liu et al. 2025, "Muon
is Scalable" (arXiv:2502.16982), one rate for Muon and AdamW; Dettmers et al. 2022, 8-bit states (arXiv:2110.02861).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from upshift._optional import require
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

_TORCH = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "asgd": "ASGD",
    "muon": "Muon",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "sgd": "SGD",
}
_LIBRARY = {
    "adabelief": "AdaBelief",
    "adan": "Adan",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "lamb": "Lamb",
    "lars": "LARS",
    "lion": "Lion",
    "novograd": "NovoGrad",
    "prodigy": "Prodigy",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "schedule_free_radam": "ScheduleFreeRAdam",
    "schedule_free_sgd": "ScheduleFreeSGD",
    "soap": "SOAP",
    "stable_adamw": "StableAdamW",
}
_LOW_BIT = {
    "adam_4bit": "Adam4bit",
    "adam_8bit": "Adam8bit",
    "adam_fp8": "AdamFp8",
    "adamw_4bit": "AdamW4bit",
    "adamw_8bit": "AdamW8bit",
    "adamw_fp8": "AdamWFp8",
}

#: Name -> module, class, extra that brings it.
KNOWN: dict[str, tuple[str, str, str]] = {
    **{name: ("torch.optim", kind, "torch") for name, kind in _TORCH.items()},
    **{name: ("pytorch_optimizer", kind, "optimizers") for name, kind in _LIBRARY.items()},
    **{name: ("torchao.optim", kind, "lowbit") for name, kind in _LOW_BIT.items()},
}

_EXECUTION = frozenset(("fused", "foreach", "capturable", "compile_backend"))


@dataclass(frozen=True)
class NamedOptimizer:
    """A named optimizer with its settings: call it with parameters or groups to build one."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    @property
    def separates_matrices(self) -> bool:
        """Whether it treats the matrices of hidden layers in a way of their own (`parameters.build_optimizer`)."""
        return self.name == "muon"

    def __call__(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """Build it.

        Raises:
            MissingExtraError: its package is not installed. UsageError: it has no such setting.
        """
        module, kind, extra = KNOWN[self.name]
        builder: Callable[..., torch.optim.Optimizer] = getattr(
            require(module, extra=extra, why=f"The optimizer {self.name!r}"), kind
        )
        if self.name == "muon":
            from upshift.engine.muon import build_muon, muon_settings

            muon_settings(self.settings, _accepted)
            return build_muon(parameters, self.settings)
        _accepted(self.name, builder, self.settings)
        built = builder(parameters, **self.settings)
        if extra == "lowbit":
            from upshift.engine.lowbit import store_plainly

            return store_plainly(built)
        return built


def optimizer(name: str, **settings: Any) -> NamedOptimizer:
    """An optimizer by name: `optimizer("adamw", lr=3e-4, weight_decay=0.05)`; `KNOWN` has the names.

    Raises:
        UsageError: no such name, or a setting that is not mathematics.
    """
    plain = name.lower().replace("-", "_")
    if plain not in KNOWN:
        raise UsageError(
            f"No optimizer is called {name!r}.",
            remedy=f"Known: {', '.join(KNOWN)}. Or give a function: partial(torch.optim.AdamW, lr=3e-4).",
        )
    if found := sorted(_EXECUTION & settings.keys()):
        raise UsageError(
            f"{', '.join(found)}: how a step is computed is not part of a job.",
            remedy="Leave it out; a plan decides it (technique `fused`).",
        )
    return NamedOptimizer(plain, settings)


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The weights that the optimizer wants evaluated and saved as its result, inside the block.

    Schedule-free optimizers train at one point and evaluate at another, and have `eval()` and `train()` to go between
    the two. The way back rounds; here the training weights are kept, so that an evaluation leaves no trace, bit for
    bit. For other optimizers nothing happens.
    """
    there, back = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if not (callable(there) and callable(back)):
        yield
        return
    import torch

    kept = [(item, item.detach().clone()) for group in optimizer.param_groups for item in group["params"]]
    there()
    try:
        yield
    finally:
        back()
        with torch.inference_mode(False), torch.no_grad():
            for item, weights in kept:
                item.copy_(weights)


def _accepted(name: str, builder: Callable[..., Any], settings: Iterable[str]) -> None:
    """Refuse settings that the optimizer does not name; some would take anything and ignore it.

    Raises:
        UsageError: one of `settings` is not known.
    """
    named = [
        item.name
        for item in list(inspect.signature(builder).parameters.values())[1:]  # the first are the parameters
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY) and item.name not in _EXECUTION
    ]
    for setting in settings:
        if setting not in named:
            raise UsageError(f"The optimizer {name!r} has no {setting!r}.", remedy=f"It has: {', '.join(named)}.")
