"""Gradients of consecutive steps at the same weights, for the noise scale (`measure/noise_scale.py`). Diagnosis only.

Listened to after the last step that is timed, in a process that ends right after it. So the updates can be withheld:
the optimizer is given no gradients, and each window's gradients belong to one set of weights, not to nearly the same.
Between windows a few steps are made as ever. Weights that anything else changes within a window (an embedding with
`max_norm`, clamping) are noticed, and the window is not used.

Read right after the last backward pass of a step, before a script clips or unscales. What changes gradients within the
backward pass (a hook on a parameter or module) cannot be seen around, so then nothing is said. A loss scale cancels out
as long as it stays; when a `GradScaler` changes it, what was gathered is dropped.

Memory: one sum of the gradients, in float32 or wider, and the work space of one tensor. Only the steps' squared lengths
are kept. The script's random numbers are not touched.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from upshift import units
from upshift.hook.patch import Patches
from upshift.hook.peek import like
from upshift.measure.facts import FRAMEWORKS, parameters_of
from upshift.measure.noise_scale import LEAST_WINDOWS, Stretch, noise_scale
from upshift.measure.steps import median_of
from upshift.records.recipe import GradientNoise

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Gradients in a window, steps that are made as ever after one (|G| differs from one set of weights to the next, and
#: the interval must know of it), and gradients at least in the long stretch after the windows.
WINDOW, FREE, LONG = 4, 2, 12
LEAST, MOST = LEAST_WINDOWS * (WINDOW + FREE) + LONG, 160
#: Part of the time planned for, since reading takes some; and of the free memory the sum may take.
MARGIN, MEMORY = 0.8, 0.25
#: A batch that is smaller or larger than usual by more than this is not of the usual size.
SIZES = 0.25


def steps_within(seconds: float, step: float) -> int:
    """How many steps of `step` seconds to listen to in `seconds`; 0 where they are too few to say anything."""
    count = MOST if step <= 0.0 else min(MOST, int(MARGIN * seconds / step))
    return count if count >= LEAST else 0


class NoiseListener:
    """Listens from `begin` on, where there is no `obstacle`, until `step_ended` is True; `found` tells."""

    def __init__(self, watch: Watch, torch: Any, *, steps: int, seconds: float, epoch: float | None) -> None:
        """
        Args:
            steps: to listen for, `LEAST` or more.
            seconds: after which it ends in any case.
            epoch: steps in one pass over the data, where it is known.
        """
        self._watch, self._torch, self._epoch = watch, torch, epoch
        self._patches = Patches()
        self._until = time.perf_counter() + seconds
        self._windows_wanted = max(LEAST_WINDOWS, steps // 2 // (WINDOW + FREE))
        self._long_wanted = steps - (WINDOW + FREE) * self._windows_wanted
        self._free = 0
        self._parameters: list[Any] = []
        self._windows: list[Stretch] = []
        self._long: Stretch | None = None
        self._why = ""
        #: Backward passes of the step under way, and of every step; what the models were fed in them.
        self._passes = self._usual = 0
        self._fed = 0
        self._sizes: list[float] = []
        #: Of the stretch under way: the sum of the gradients, their squared lengths, and whether it is of no use.
        self._sums: dict[int, Any] = {}
        self._squares: list[float] = []
        self._version = 0
        self._spoilt = False
        self._last_spoilt = ""

    def close(self) -> None:
        """Take everything out."""
        self._patches.close()
        self._sums.clear()

    def found(self) -> GradientNoise:
        """The scale, or why it is not known."""
        if self._why:
            return GradientNoise(why=self._why)
        if self._long is None:
            return GradientNoise(why=self._last_spoilt or "time was over before enough steps were seen")
        return noise_scale(self._windows, self._long, self._epoch)

    # -- whether ---------------------------------------------------------------------------------------------------

    def obstacle(self) -> str:
        """Why it cannot be listened to; empty where it can."""
        return self._unfit() or self._changed_unseen() or self._no_memory()

    def _unfit(self) -> str:
        watch = self._watch
        optimizers = [item for reference in watch.optimizers if (item := reference()) is not None]
        if len(optimizers) != 1 or len(watch.optimizers) != 1:
            return "several optimizers make a step"
        optimizer = optimizers[0]
        name = type(optimizer).__name__
        if id(optimizer) in watch.closures:
            return f"{name} calls the model within its step"
        if not type(optimizer).__module__.startswith("torch.optim"):
            return f"{name} is not one of torch's optimizers, and may not bear a step without gradients"
        if any(item in sys.modules for item in FRAMEWORKS):
            return "a framework drives the training"
        distributed = self._torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return "gradients are averaged over processes"
        self._parameters = [item for item in parameters_of(optimizer) if item.requires_grad]
        if any(item.grad is not None and item.grad.layout is not self._torch.strided for item in self._parameters):
            return "gradients are sparse"
        return ""

    def _changed_unseen(self) -> str:
        """Hooks that may change a gradient before it can be read."""
        for item in self._parameters:
            if item._backward_hooks or getattr(item, "_post_accumulate_grad_hooks", None):
                return "hooks on parameters may change gradients (clip them) before they can be read"
        for reference in self._watch.models:
            model = reference()
            for module in model.modules() if model is not None else ():
                if module._backward_hooks or module._backward_pre_hooks:
                    return "hooks on modules may change gradients before they can be read"
        return ""

    def _no_memory(self) -> str:
        """The sum of the gradients must be small beside what is free, on each device."""
        needed: dict[Any, int] = {}
        for item in self._parameters:
            size = item.numel() * max(item.element_size(), 4)
            needed[item.device] = needed.get(item.device, 0) + size
        for device, size in needed.items():
            free = _free(self._torch, device)
            if size > MEMORY * free:
                return (
                    f"a sum of the gradients takes {units.binary(size)}, more than {MEMORY:.0%} of the "
                    f"{units.binary(free)} of memory that are free"
                )
        return ""

    # -- what is listened to -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Listen from the next step on."""
        torch, watch, ident = self._torch, self._watch, threading.get_ident
        backward, call, grad_enabled = torch.autograd.backward, torch.nn.Module.__call__, torch.is_grad_enabled

        def backward_(*args: Any, **kwargs: Any) -> Any:
            if ident() != watch.thread or watch._in_backward:
                return backward(*args, **kwargs)
            self._before_pass()
            result = backward(*args, **kwargs)
            self._after_pass()
            return result

        def __call__(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            if not watch._busy and ident() == watch.thread and grad_enabled():
                shape = getattr(next(iter(args or kwargs.values()), None), "shape", None)
                self._fed += int(shape[0]) if shape else 0
            return call(module, *args, **kwargs)

        self._patches.set(torch.autograd, "backward", like(backward, backward_))
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not getattr(dynamo.utils, "counters", {}).get("stats"):  # would be compiled anew
            self._patches.set(torch.nn.Module, "__call__", like(call, __call__))
        scaler = torch.amp.GradScaler
        update = scaler.update

        def update_(this: Any, *args: Any, **kwargs: Any) -> Any:
            before = this.get_scale()
            update(this, *args, **kwargs)
            if this.get_scale() != before:
                self._windows.clear()
                self._spoil("the loss scale keeps changing")

        self._patches.set(scaler, "update", like(update, update_))

    def _before_pass(self) -> None:
        self._passes += 1
        if (
            self._passes == 1
            and self._usual
            and not self._free
            and any(_not_zero(item.grad) for item in self._parameters)
        ):
            self._spoil("gradients are not cleared before a step")

    def _after_pass(self) -> None:
        if not self._usual or self._free:
            return  # the first step is only for counting its passes
        self._watch._skip = True
        if self._passes == self._usual and not self._spoilt:
            try:
                with self._torch.no_grad():
                    self._squares.append(self._add())
            except (RuntimeError, NotImplementedError) as error:
                self._why = f"a gradient cannot be read ({type(error).__name__})"

    def _add(self) -> float:
        """Add the gradients to the sum; their squared length."""
        torch, squares = self._torch, []
        for item in self._parameters:
            gradient = item.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise NotImplementedError
            wide = torch.promote_types(gradient.dtype, torch.float32)
            squares.append(torch.linalg.vector_norm(gradient, dtype=wide))
            total = self._sums.get(id(item))
            if total is None:
                self._sums[id(item)] = gradient.to(wide, copy=True)
            else:
                total.add_(gradient)
        return _squared(torch, squares)

    # -- steps -------------------------------------------------------------------------------------------------------

    def step_ended(self) -> bool:
        """A step has ended; True when all has been gathered or time is over."""
        late = time.perf_counter() >= self._until
        passes, self._passes = self._passes, 0
        fed, self._fed = self._fed, 0
        if not self._usual:
            self._usual = passes
            if not passes:
                self._why = "no backward pass was seen"
            self._start()
            return bool(self._why)
        if self._free:
            self._free -= 1
            self._start()
            return late
        windows = len(self._windows) < self._windows_wanted
        self._look(passes, fed, windows)
        if self._spoilt:
            self._start()
            return late or bool(self._why)
        count = len(self._squares)
        if windows and count == WINDOW:
            self._windows.append(self._stretch())
            self._start()
            self._free = FREE
        elif not windows and (count == self._long_wanted or (late and count >= LONG)):
            self._long = self._stretch()
        return late or self._long is not None

    def _look(self, passes: int, fed: int, windows: bool) -> None:
        """Whether the step that ended may be used."""
        if self._spoilt:
            return
        if passes != self._usual:
            self._spoil("steps differ in the number of their backward passes")
        elif self._why or not self._squares or not math.isfinite(self._squares[-1]):
            self._spoil("gradients are not finite")
        elif self._versions() != self._version:
            self._spoil("the weights are changed by something else than the optimizer")
        self._sizes.append(float(fed))
        usual = median_of(self._sizes)
        # The long stretch errs to the safe side whatever it is made of, and is longer than many an epoch.
        if windows and not (1.0 - SIZES) * usual <= fed <= (1.0 + SIZES) * usual:
            self._spoil("batches differ in size")

    def _start(self) -> None:
        """A new stretch."""
        self._spoilt = False
        self._sums.clear()
        self._squares = []
        self._version = self._versions()

    def _spoil(self, why: str) -> None:
        self._spoilt, self._last_spoilt = True, why

    def _versions(self) -> int:
        """Goes up with every change of a weight in place."""
        return sum(item._version for item in self._parameters)

    def _stretch(self) -> Stretch:
        count = len(self._squares)
        torch = self._torch
        with torch.no_grad():
            square = _squared(torch, [torch.linalg.vector_norm(item) for item in self._sums.values()])
        return Stretch(count, math.fsum(self._squares) / count, square / count**2)


def _squared(torch: Any, lengths: list[Any]) -> float:
    """The sum of squares of scalar tensors, which may lie on several devices; read at once, since that waits."""
    if not lengths:
        return 0.0
    return math.fsum(value**2 for value in torch.stack([item.to(lengths[0].device) for item in lengths]).tolist())


def _not_zero(gradient: Any) -> bool:
    return gradient is not None and bool(gradient.any())


def _free(torch: Any, device: Any) -> float:
    """Bytes of memory that are free on a device."""
    import psutil

    from upshift.hardware.machine import memory_limit

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(min(psutil.virtual_memory().available, max(memory_limit() - psutil.Process().memory_info().rss, 0)))
