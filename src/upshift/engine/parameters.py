"""Parameter groups of an optimizer: which weights do not decay, and at what share of the rate a layer learns.

Weight decay pulls matrices towards zero; for the gains of norms and for biases, which have no scale to lose, it only
hurts. Layer-wise rates let the layers near the input, which are the most general ones of a pretrained model, move less.
The groups hold neither a rate nor a decay of their own: both are given once, to the optimizer, and `build_optimizer`
lays the exemptions and shares over them.

Sources: Loshchilov and Hutter 2019 (arXiv:1711.05101) on decoupled decay; He et al. 2019, "Bag of Tricks"
(arXiv:1812.01187), no decay on biases and norms; Howard and Ruder 2018 (arXiv:1801.06146), discriminative rates;
Bao et al. 2022, "BEiT" (arXiv:2106.08254), decay of the rate per layer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

#: What a parameter is. `matrix`: a weight of two or more dimensions. `vector`: biases, gains, scales.
Kind = Literal["matrix", "vector", "norm", "embedding", "head"]

#: Keys of a group that `build_optimizer` reads and the optimizer never sees.
SHARE, MATRICES = "rate_share", "matrices"


@dataclass(frozen=True)
class ParameterGroups:
    """How the parameters of a model are grouped.

    Args:
        embeddings: leave embeddings without decay as well.
        exempt: further names without decay, as patterns: `("pos_embed", "*.gate")`.
        layer_decay: the share of the rate from one layer to the one before it (0 < share <= 1); 1 switches it off.
        layers: name of the `ModuleList` or `Sequential` with the layers, such as `encoder.blocks`; unless given, the
            longest one whose members are all of one type.
    """

    embeddings: bool = False
    exempt: tuple[str, ...] = ()
    layer_decay: float = 1.0
    layers: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer_decay is {self.layer_decay!r}.", remedy="Give 0 < layer_decay <= 1, say 0.75.")

    def __call__(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The groups, for `build_optimizer`: `params`, `name`, `rate_share`, `matrices`; `weight_decay` 0 where exempt.

        Each trained parameter is in exactly one group, once even where it is tied; frozen ones are left out.

        Raises:
            UsageError: nothing is trained, a pattern fits no name, or the layers are not found.
        """
        _trained(model)
        self._check_patterns(model)
        kinds = kinds_of(model)
        shares = self._shares(model)
        groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
        for name, item in model.named_parameters():
            if not item.requires_grad:
                continue
            free, matrix, share = self.is_exempt(name, kinds[name]), kinds[name] == "matrix", shares[name]
            group = groups.setdefault((free, matrix and item.ndim == 2, share), {"params": []})
            group["params"].append(item)
        for (free, matrix, share), group in groups.items():
            said = ["no decay" if free else "decay", *(["matrices"] if matrix else [])]
            group["name"] = ", ".join(said + ([f"{share:.3g} of the rate"] if share != 1 else []))
            group.update({SHARE: share, MATRICES: matrix, **({"weight_decay": 0.0} if free else {})})
        return list(groups.values())

    def is_exempt(self, name: str, kind: Kind) -> bool:
        """Whether a parameter does not decay."""
        if kind in ("vector", "norm") or (self.embeddings and kind == "embedding"):
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exempt)

    def _check_patterns(self, model: torch.nn.Module) -> None:
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.exempt:
            if not fnmatch.filter(names, pattern):
                raise UsageError(
                    f"exempt: no parameter is called {pattern!r}.",
                    remedy=f"The names are {', '.join(names[:4])}{', …' if names[4:] else ''}.",
                )

    def _shares(self, model: torch.nn.Module) -> dict[str, float]:
        """The share of the rate for each parameter: 1 after the layers, less with each layer towards the input."""
        names = [name for name, _ in model.named_parameters()]
        if self.layer_decay == 1:
            return dict.fromkeys(names, 1.0)
        path, count = _layers(model, self.layers)
        depths: dict[str, int] = {}
        depth = 0  # what comes before the first layer
        for name in names:
            if name.startswith(path + "."):
                depth = int(name[len(path) + 1 :].split(".")[0]) + 1
            elif depth:
                depth = count + 1
            depths[name] = depth
        return {name: self.layer_decay ** (count + 1 - depth) for name, depth in depths.items()}


def kinds_of(model: torch.nn.Module) -> dict[str, Kind]:
    """What each parameter is, by the name it has in `named_parameters()`.

    A tied weight of an embedding and a head is an embedding. `head` is the last linear layer, when its weight is 2-D
    and the model has other matrices.
    """
    import torch

    seen: dict[int, Kind] = {}
    last: int | None = None
    for module in model.modules():
        for leaf, item in module.named_parameters(recurse=False):
            kind = _kind(module, leaf, item)
            if seen.get(id(item)) != "embedding":
                seen[id(item)] = kind
            if kind == "matrix" and isinstance(module, torch.nn.Linear):
                last = id(item)
    matrices = [key for key, kind in seen.items() if kind == "matrix"]
    if last is not None and seen[last] == "matrix" and len(matrices) > 1:
        seen[last] = "head"
    return {name: seen[id(item)] for name, item in model.named_parameters()}


def build_optimizer(
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
    model: torch.nn.Module,
    groups: ParameterGroups | Callable[[torch.nn.Module], Iterable[Any]] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a model, with its exemptions from decay and its layer-wise rates.

    Args:
        optimizer: a callable that takes parameters or groups: `partial(torch.optim.AdamW, lr=3e-4)`, `optimizer(…)`.
        model: the module, on its device. groups: how it is grouped; unless given, its trained parameters are one group.

    Raises:
        UsageError: nothing is trained, layers are not found, or a pattern fits no name.
    """
    separates = bool(getattr(optimizer, "separates_matrices", False))
    if groups is None and not separates:
        return optimizer(_trained(model))
    if groups is None:
        groups = ParameterGroups()
        made = [_without_exemption(group) for group in groups(model)]
    else:
        made = list(groups(model))
    if not all(isinstance(group, dict) for group in made):
        return optimizer(made)
    shares = [float(group.pop(SHARE, 1.0)) for group in made]
    if not separates:
        made = [{key: value for key, value in group.items() if key != MATRICES} for group in made]
    built = optimizer(made)
    by_parameter = {id(item): share for group, share in zip(made, shares, strict=True) for item in group["params"]}
    for group in built.param_groups:
        # Not by position: an optimizer may order its groups in a way of its own.
        share = by_parameter[id(group["params"][0])]
        if share != 1:
            group["lr"] = group["lr"] * share
    return built


def _trained(model: torch.nn.Module) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [item for item in model.parameters() if item.requires_grad]
    if not found:
        raise UsageError("No parameter of the model is trained.", remedy="Set requires_grad where it should learn.")
    return found


def _without_exemption(group: dict[str, Any]) -> dict[str, Any]:
    """A group that only says what a matrix is: nobody asked for less decay."""
    return {key: value for key, value in group.items() if key not in ("weight_decay", "name")}


def _kind(module: torch.nn.Module, leaf: str, item: torch.Tensor) -> Kind:
    import torch

    nn = torch.nn
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    # Other libraries have norms of their own; what they share is the name (LlamaRMSNorm, LayerNorm2d).
    if isinstance(module, norms) or "norm" in type(module).__name__.lower():
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if item.ndim <= 1 or leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_"):
        return "vector"
    return "matrix"


def _layers(model: torch.nn.Module, path: str | None) -> tuple[str, int]:
    """Name and length of the list of layers."""
    import torch

    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) and name
    }
    if path is not None:
        if path not in lists:
            known = ", ".join(lists) or "none"
            raise UsageError(
                f"layers = {path!r} is no ModuleList or Sequential of the model.", remedy=f"The model has: {known}."
            )
        return path, len(lists[path])
    alike = {name: len(members) for name, members in lists.items() if len({type(item) for item in members}) == 1}
    longest = max(alike, key=lambda name: alike[name], default="")
    if not longest or alike[longest] < 2:
        raise UsageError(
            "layer_decay: no list of layers of one type was found in the model.",
            remedy="Name it: ParameterGroups(layer_decay=…, layers='encoder.blocks').",
        )
    return longest, alike[longest]
