"""One kernel for the whole optimizer step.

Idea: by default torch updates parameter by parameter with a dozen small operations each (on the CPU), or list by list
(foreach, on CUDA). A fused kernel reads and writes each tensor once. The optimizer object stays; only the `fused` flag
of its groups changes, and the group's own value comes back when the technique is off.
Limits: fused kernels walk memory and ignore strides: where parameter, gradient and state lie differently, they corrupt
weights without an error, and a parameter with gaps in memory has its gaps written too. So the layout of every tensor is
checked before every step, state and gradients are brought into the parameter's order, and a group that cannot be helped
is stepped unfused. In a step with a closure, gradients are new after the check; autograd gives those the parameter's
layout unless the closure assigns `.grad` itself.

Sources: docs.pytorch.org/docs/stable/optim.html ("fused", "foreach"); pytorch#71274 (fused AdamW).
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from upshift.records.measurement import Measurement, OptimizerFacts, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec

if TYPE_CHECKING:
    import torch

FUSED = ("Adam", "AdamW", "SGD", "Adagrad")
FOREACH = (*FUSED, "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD")
KINDS = ("fused", "foreach")

#: Assumed speed-up of the optimizer's phase; only orders the trials.
ASSUMED_FACTOR = 2.0

_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
_FLOATS = {"float32", "float", "float64", "double"}


def dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, each once, in whatever order."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape and lie alike in memory (strides of dimensions of size one mean nothing)."""
    if a.shape != b.shape:
        return False
    return all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size != 1)


def base_class(optimizer: torch.optim.Optimizer) -> str:
    """Name of the torch optimizer whose `step` this one runs, or the empty string (a step of its own)."""
    import torch

    for name in FOREACH:
        base = getattr(torch.optim, name)
        if not isinstance(optimizer, base) or (name == "Adam" and isinstance(optimizer, torch.optim.AdamW)):
            continue
        if type(optimizer) is base:
            return name
        ours, theirs = type(optimizer), base
        # Torch and profilers wrap `step` at class level, so that what is wrapped is compared.
        if inspect.unwrap(ours.step) is inspect.unwrap(theirs.step) and getattr(ours, "_init_group", None) is getattr(
            theirs, "_init_group", None
        ):
            return name
    return ""


def obstacle(optimizer: torch.optim.Optimizer, kind: str) -> str:
    """Why `kind` cannot be used for any step of this optimizer, or the empty string."""
    import torch

    name = base_class(optimizer)
    if not name or (kind == "fused" and name not in FUSED):
        return f"{type(optimizer).__name__} has no {kind} step"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "a differentiable step is written out operation by operation"
        values = [group.get("lr"), group.get("weight_decay"), *(group.get("betas") or ())]
        if any(isinstance(value, torch.Tensor) for value in values):
            return "a learning rate or another hyperparameter is a tensor"
        for parameter in group["params"]:
            if type(parameter) not in (torch.Tensor, torch.nn.Parameter):
                return f"a parameter is a {type(parameter).__name__}"
            if parameter.device.type not in _DEVICES:
                return f"there is no {kind} step for device type {parameter.device.type}"
            if not parameter.is_floating_point():
                return f"a parameter is {parameter.dtype}"
            if parameter.dtype not in (torch.float32, torch.float64):
                # Unfused, every operation of the update rounds to the parameter's dtype; fused, only the last.
                return f"parameters are {parameter.dtype}, which a {kind} step would round differently"
            if parameter.layout is not torch.strided:
                return "a parameter is sparse"
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                return "gradients are sparse"
    return ""


class _Group:
    """What the script had in one group."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group
        self.before = {key: group[key] for key in ("fused", "foreach") if key in group}
        self.plain = False
        """Stepped as the script has it, because the layout cannot be helped."""


class _Fused(BaseApplied):
    def __init__(self, optimizer: torch.optim.Optimizer, kind: str) -> None:
        self.note = f"{kind} {type(optimizer).__name__}"
        self._optimizer = weakref.ref(optimizer)
        self._kind = kind
        self._on = False
        self._refused = ""
        self._rewritten = 0
        self._groups: list[_Group] = []
        self._contiguous: list[torch.Tensor] = []
        self._other: list[tuple[torch.Tensor, tuple[int, ...]]] = []
        self._kernels: list[tuple[torch.Tensor, tuple[int, ...], dict[str, Any], tuple[str, ...]]] = []
        self._state: Any = None
        self._dicts: list[int] = []
        self._missing: list[int] = []
        self._handle = optimizer.register_state_dict_post_hook(self._clean)
        self.switch(True)

    def switch(self, on: bool) -> None:
        optimizer = self._optimizer()
        if on == self._on or optimizer is None or (on and self._refused):
            return
        self._on = on
        if on:
            self._adopt(optimizer)
        else:
            for item in self._groups:
                self._give_back(optimizer, item)
            self._groups = []
        self._forget()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._on:
            return
        groups = optimizer.param_groups
        if len(groups) != len(self._groups) or any(
            group is not item.group or not (item.plain or group.get(self._kind) is True)
            for group, item in zip(groups, self._groups, strict=True)
        ):
            # A group was added, or `load_state_dict` brought the flags of the checkpoint.
            if reason := obstacle(optimizer, self._kind):
                self._refuse(reason)
                return
            self._adopt(optimizer)
            self._forget()
        if self._kind == "fused" and not self._unchanged(optimizer):
            self._check(optimizer)

    def _unchanged(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether all tensors lie as at the last check. The hot path: a few tenths of a microsecond per parameter.

        State was checked against its parameter and changes by being replaced, which is seen by identity of its dicts.
        For images' kernels, whose order does change in practice, the tensors in them are looked at too.
        """
        if optimizer.state is not self._state:
            return False
        missing = []
        try:
            for parameter in self._contiguous:
                gradient = parameter.grad
                if gradient is None:
                    missing.append(parameter)
                elif not (gradient.is_contiguous() and parameter.is_contiguous()):
                    return False
            for parameter, stride in self._other:
                gradient = parameter.grad
                if parameter.stride() != stride:
                    return False
                if gradient is None:
                    missing.append(parameter)
                elif gradient.stride() != stride and not same_order(gradient, parameter):
                    return False
            for parameter, stride, state, keys in self._kernels:
                for key in keys:
                    value = state[key]
                    if value.stride() != stride and not same_order(value, parameter):
                        return False
        except (RuntimeError, AttributeError, KeyError):  # a sparse gradient has no strides
            return False
        return list(map(id, missing)) == self._missing and list(map(id, optimizer.state.values())) == self._dicts

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at every tensor of the next step, bring it in order, and remember what was seen."""
        import torch

        self._forget()
        settled = True
        for item in self._groups:
            stepped = [parameter for parameter in item.group["params"] if parameter.grad is not None]
            if any(parameter.grad.layout is not torch.strided for parameter in stepped):
                self._refuse("gradients are sparse")
                return
            kept = [bool(optimizer.state.get(parameter)) for parameter in stepped]
            # SGD's fused kernel knows one first step for the whole group, when no momentum is there yet.
            momentum = [_momentum(optimizer, parameter) for parameter in stepped] if item.group.get("momentum") else []
            helped = [self._align(optimizer, parameter) for parameter in stepped]
            item.plain = not all(helped) or (any(momentum) and not all(momentum))
            if item.plain:
                self._give_back(optimizer, item)
            else:
                item.group.update(self._flags(item.group))
                _move_steps(optimizer, item.group, fused=True)
            # State still to be made by the step, or a group that goes unfused: look again next time.
            settled = settled and not item.plain and all(momentum) and (all(kept) or _stateless(item.group))
        if not settled:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.is_contiguous():
                    self._contiguous.append(parameter)
                else:
                    self._other.append((parameter, parameter.stride()))
                if parameter.dim() >= 4 and (state := optimizer.state.get(parameter)):
                    keys = tuple(key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim())
                    self._kernels.append((parameter, parameter.stride(), state, keys))
        ordered = (*self._contiguous, *(parameter for parameter, _ in self._other))
        self._missing = [id(parameter) for parameter in ordered if parameter.grad is None]
        self._state = optimizer.state
        self._dicts = list(map(id, optimizer.state.values()))

    def _align(self, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
        """Bring gradient and state into the parameter's order. Returns whether a fused step is then correct."""
        import torch

        if not dense(parameter):
            return False
        state = optimizer.state.get(parameter) or {}
        tensors = [value for key, value in state.items() if key != "step" and isinstance(value, torch.Tensor)]
        gradient = parameter.grad
        for tensor in (gradient, *tensors):
            if tensor is None:
                continue
            if (
                tensor.shape != parameter.shape
                or tensor.dtype != parameter.dtype
                or tensor.device != parameter.device
                or tensor.layout is not torch.strided
            ):
                return False
            if not same_order(tensor, parameter):
                with torch.no_grad():
                    tensor.data = torch.empty_like(parameter).copy_(tensor)
                if not same_order(tensor, parameter):
                    return False
                self._rewritten += 1
        return True

    def _adopt(self, optimizer: torch.optim.Optimizer) -> None:
        known = {id(item.group): item for item in self._groups}
        self._groups = []
        for group in optimizer.param_groups:
            item = known.get(id(group))
            if item is None or item.group is not group:
                item = _Group(group)
            item.plain = False
            self._groups.append(item)
            group.update(self._flags(group))
            _move_steps(optimizer, group, fused=self._kind == "fused")

    def _flags(self, group: dict[str, Any]) -> dict[str, bool]:
        return {name: name == self._kind for name in KINDS if name in group}

    def _give_back(self, optimizer: torch.optim.Optimizer, item: _Group) -> None:
        for key, value in item.before.items():
            item.group[key] = value
        _move_steps(optimizer, item.group, fused=bool(item.before.get("fused")))

    def _refuse(self, reason: str) -> None:
        self._refused = reason
        self.switch(False)

    def _forget(self) -> None:
        self._contiguous, self._other, self._kernels, self._missing = [], [], [], []
        self._state, self._dicts = None, []

    def _clean(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """A checkpoint has the script's own flags: it may be loaded without this technique."""
        if not self._on:
            return
        for group, item in zip(state["param_groups"], self._groups, strict=False):
            group.update(item.before)

    def effect(self) -> NoEffect | None:
        if self._refused:
            return NoEffect(self._refused)
        if self._groups and all(item.plain for item in self._groups):
            return NoEffect("parameters, gradients or state lie in memory in a way a fused kernel cannot follow")
        return None

    def close(self) -> None:
        self.switch(False)
        self._handle.remove()


def _momentum(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
    return (optimizer.state.get(parameter) or {}).get("momentum_buffer") is not None


def _stateless(group: dict[str, Any]) -> bool:
    """SGD without momentum keeps nothing."""
    return "momentum" in group and not group["momentum"] and "betas" not in group


def _move_steps(optimizer: torch.optim.Optimizer, group: dict[str, Any], *, fused: bool) -> None:
    """Step counters lie on the device as float32 for a fused (or capturable) step, else on the CPU."""
    import torch

    on_device = fused or bool(group.get("capturable"))
    kept = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for parameter in group["params"]:
        state = optimizer.state.get(parameter)
        step = state.get("step") if state else None
        if state is None or not isinstance(step, torch.Tensor):
            continue
        device = parameter.device if on_device else torch.device("cpu")
        dtype = torch.float32 if fused else kept
        if step.device != device or step.dtype != dtype:
            state["step"] = step.to(device=device, dtype=dtype)


class Fused:
    """Fused or foreach optimizer steps, by the flags of the script's own optimizer."""

    card: ClassVar[Card] = Card(
        name="fused",
        summary="Updates all parameters in one optimizer kernel.",
        source="torch.optim (fused, foreach); pytorch#71274",
        sites=("optimizer_created", "step"),
        numerics=Numerics.ROUNDING,
        switchable="live",
        precision="optimizer",
        targets=("optimizer",),
        details="The layout of every tensor is checked before every step, since fused kernels ignore strides.",
        settings={
            "kind": SettingSpec(
                default="fused", doc="fused: one kernel; foreach: one call for a list of tensors", choices=KINDS
            )
        },
        after=("channels_last", "bf16"),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """The same update in another order of operations (4e-8 relative for AdamW)."""
        return Numerics.ROUNDING

    def check(self, seen: Measurement) -> Verdict:
        """Applies where an optimizer has a fused or foreach step that it does not use."""
        optimizers = seen.facts.optimizers
        if not optimizers:
            return Verdict(applies=False, reason="no optimizer was seen")
        reasons = {item.name: _why_not(item) for item in optimizers}
        able = [item for item in optimizers if not _why_not(item)]
        if not able:
            return Verdict(applies=False, reason="; ".join(f"{name}: {why}" for name, why in reasons.items()))
        kinds = ["fused"] if any(item.name in FUSED for item in able) else []
        if any(item.device.startswith("cpu") and not item.foreach for item in able):
            kinds.append("foreach")
        if not kinds:
            return Verdict(applies=False, reason="on this device torch takes the foreach step by itself")
        tensors = sum(item.tensors for item in able)
        share = next((phase.share.value for phase in seen.anatomy.phases if phase.name == "optimizer"), None)
        return Verdict(
            applies=True,
            reason=f"{', '.join(item.name for item in able)} updates {tensors} tensors one after the other",
            gain=None if share is None else 1.0 / (1.0 - min(share, 1.0) * (1.0 - 1.0 / ASSUMED_FACTOR)),
            rests_on="" if share is None else f"share of the optimizer, assumed {ASSUMED_FACTOR}x faster",
            candidates=tuple({"kind": kind} for kind in kinds),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Sets the flags before an optimizer's first step."""
        if not isinstance(moment, OptimizerSeen):
            return None
        kind = str(settings.get("kind", "fused"))
        if all(group.get(kind) for group in moment.optimizer.param_groups):
            return NoEffect(f"{type(moment.optimizer).__name__} is {kind} already")
        if reason := obstacle(moment.optimizer, kind):
            return NoEffect(reason)
        return _Fused(moment.optimizer, kind)


def _why_not(item: OptimizerFacts) -> str:
    if item.fused:
        return "fused already"
    if item.name not in FOREACH:
        return "torch has no fused or foreach step for it"
    if item.sparse:
        return "its gradients are sparse"
    if {dtype.removeprefix("torch.") for dtype in item.dtypes} - _FLOATS:
        return "its parameters are not float32 or float64"
    if item.name not in FUSED and item.foreach:
        return "foreach already"
    return ""
