"""Muon for the matrices of hidden layers and AdamW for everything else, as one optimizer.

Idea: Muon replaces the momentum of a matrix by the nearest orthogonal one (a few Newton-Schulz iterations), so that all
directions learn alike. That means something for a linear map between hidden layers only: embeddings, the last layer,
gains and biases, and kernels of more than two dimensions go to AdamW.
With `adjust_lr_fn="match_rms_adamw"`, the default here, an update of Muon is as large as one of AdamW would be, and
both share one rate and one decay. `optimizer("muon", lr=0.02, adamw={"lr": 3e-4})` gives AdamW a rate of its own; Muon
then takes its original scale.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv:2502.16982); `torch.optim.Muon`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch


def muon_settings(
    settings: Mapping[str, Any], accepted: Callable[[str, Callable[..., Any], Iterable[str]], None] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of Muon and those of AdamW.

    Args:
        settings: of `torch.optim.Muon`, and `adamw`, a dict of `torch.optim.AdamW`'s where they differ.
        accepted: checks the names of settings.

    Raises:
        UsageError: two rates are needed and one is given.
    """
    import torch

    muon = {key: value for key, value in settings.items() if key != "adamw"}
    given = dict(settings.get("adamw", {}))
    if accepted is not None:
        accepted("muon", torch.optim.Muon, muon)
        accepted("adamw", torch.optim.AdamW, given)
    if "lr" not in given and muon.setdefault("adjust_lr_fn", "match_rms_adamw") != "match_rms_adamw":
        raise UsageError(
            f"With adjust_lr_fn={muon['adjust_lr_fn']!r} the rate of Muon does not fit AdamW.",
            remedy='Give AdamW its own: optimizer("muon", lr=0.02, adamw={"lr": 3e-4}).',
        )
    shared = {key: muon[key] for key in ("lr", "weight_decay") if key in muon}
    return muon, {**shared, **given}


def build_muon(parameters: Iterable[Any], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """One optimizer with groups of both kinds; each group says which it `uses`.

    Args:
        parameters: tensors or groups. A group with `matrices` (see `parameters.ParameterGroups`) says whether it holds
            hidden matrices; without it every 2-D weight counts as one, embeddings too.
        settings: see `muon_settings`.

    Raises:
        UsageError: there is no matrix.
    """
    groups: list[dict[str, Any]] = []
    for group in _groups(parameters):
        rest = {key: value for key, value in group.items() if key not in ("params", "matrices")}
        hidden = group.get("matrices")
        kinds: dict[str, list[torch.Tensor]] = {"muon": [], "adamw": []}
        for item in group["params"]:
            kinds["muon" if item.ndim == 2 and hidden is not False else "adamw"].append(item)
        groups.extend({**rest, "params": items, "uses": kind} for kind, items in kinds.items() if items)
    if not any(group["uses"] == "muon" for group in groups):
        raise UsageError(
            "Muon is for 2-D weights of hidden layers, and there is none.", remedy='Take optimizer("adamw").'
        )
    muon, adamw = muon_settings(settings)
    built: torch.optim.Optimizer = _muon_with_adamw()(groups, muon, adamw)
    return built


def _groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    items = list(parameters)
    if items and all(isinstance(item, dict) for item in items):
        return [{**item, "params": _tensors(item["params"])} for item in items]
    return [{"params": _tensors(items)}]


def _tensors(items: Any) -> list[torch.Tensor]:
    """Tensors, of which each may come with its name."""
    listed = list(items) if isinstance(items, Iterable) and not hasattr(items, "ndim") else [items]
    return [item[1] if isinstance(item, tuple) else item for item in listed]


@functools.cache
def _muon_with_adamw() -> Any:
    import torch

    class MuonWithAdamW(torch.optim.Optimizer):
        """Muon and AdamW over the same groups and the same state: rates, state dict and hooks are one optimizer's."""

        def __init__(self, groups: list[dict[str, Any]], muon: dict[str, Any], adamw: dict[str, Any]) -> None:
            by_kind = {kind: [group for group in groups if group["uses"] == kind] for kind in ("muon", "adamw")}
            self._parts: dict[str, torch.optim.Optimizer] = {
                "muon": torch.optim.Muon(by_kind["muon"], **muon),
            }
            if by_kind["adamw"]:
                self._parts["adamw"] = torch.optim.AdamW(by_kind["adamw"], **adamw)
            # The groups of the parts, with all their settings filled in, are this optimizer's.
            super().__init__([group for part in self._parts.values() for group in part.param_groups], {})
            self._link()

        def _link(self) -> None:
            for kind, part in self._parts.items():
                mine = [group for group in self.param_groups if group["uses"] == kind]
                part.__setstate__({"state": self.state, "param_groups": mine})

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            self._link()

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            """One step of both."""
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for part in self._parts.values():
                part.step()
            return loss

    return MuonWithAdamW
