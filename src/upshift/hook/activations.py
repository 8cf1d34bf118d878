"""See one training step operation by operation: what memory it holds, and which work it does.

A dispatch mode is told of every ATen call, so every block of tensor memory is seen when it is made; a weak reference
tells when it is given back. What is alive is summed in two heaps: what grows with the samples of a pass, and what does
not. The sums of the highest moments, for many numbers of samples at once, are what `advise.memory` predicts from. Two
steps are looked at: in the first what lives from step to step is met (the last loss, its outputs), the second counts.

What grows: whatever depends on more than parameters, buffers and optimizer state, and has a number of elements that the
samples divide; in the backward pass not what has the shape of a parameter. What would lie in bfloat16 under autocast is
followed by autocast's own rules (docs.pytorch.org/docs/stable/amp.html, the lists of operations).

Limits. Scratch memory inside one operation (cuDNN, oneDNN) is not a tensor and is not seen; nor are the rounding and
the fragmentation of an allocator. Compiled regions show only what they hand out. Times of operations are those of this
step on the host: on a device they say nothing and are left out.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upshift.measure import dispatch, formulas
from upshift.measure import flops as counting
from upshift.records.stepwork import Moment, OpWork, StepWork

if TYPE_CHECKING:
    import torch

#: Numbers of samples, as multiples of those seen, for which the highest moment is kept.
RATIOS = (0.0, *(2.0**power for power in range(-10, 11)))

#: Rows of operations kept; the smallest of more are summed per phase.
MOST_ROWS = 256

#: What autocast runs in the lower precision, by the beginning of the name below autograd.
_LOWER = (
    "mm", "addmm", "_addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "matmul", "linear", "convolution", "conv",
    "_convolution", "mkldnn_convolution", "cudnn_convolution", "_scaled_dot_product", "_flash_attention",
    "_efficient_attention", "mkldnn_rnn", "_cudnn_rnn", "_thnn_fused", "einsum",
)  # fmt: skip

#: What autocast keeps in float32 (the lists of CUDA; those of the CPU are shorter).
_HIGHER = (
    "_softmax", "_log_softmax", "softmax", "log_softmax", "native_layer_norm", "native_group_norm", "nll_loss",
    "mse_loss", "l1_loss", "smooth_l1", "huber_loss", "binary_cross_entropy", "kl_div", "soft_margin", "exp", "log",
    "pow", "rsqrt", "reciprocal", "sum", "cumsum", "cumprod", "prod", "norm", "linalg_vector_norm", "mean", "var",
    "softplus", "cosh", "sinh", "tan", "acos", "asin", "erfinv", "cdist", "renorm",
)  # fmt: skip


def resident() -> int | None:
    """Resident bytes of this process; None where the system does not say."""
    return _status("VmRSS:")


def resident_peak() -> int | None:
    """The most it ever had since it began its program; None where the system does not say."""
    return _status("VmHWM:")


def _status(key: str) -> int | None:
    # getrusage would do, were its peak not inherited from the process that started this one.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


class _Held(NamedTuple):
    """A block of memory: bytes, bytes under bfloat16 autocast; what it grows with, and where it was made."""

    size: int
    low_size: int
    scaled: bool
    low: bool
    derived: bool
    """Whether it depends on parameters, buffers and optimizer state alone."""
    phase: str


class _Row:
    __slots__ = ("calls", "fixed_bytes", "fixed_flops", "low", "scaled_bytes", "scaled_flops", "seconds")

    def __init__(self) -> None:
        self.calls = 0
        self.scaled_flops = self.fixed_flops = self.scaled_bytes = self.fixed_bytes = self.low = self.seconds = 0.0

    def add(self, other: _Row) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class StepObserver:
    """Sees two steps after `start`: tell it the end of each by `step_ended`. Never raises into the script."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        batch: int | None,
        *,
        process_base: int | None = None,
    ) -> None:
        """
        Args:
            models: those that are trained, or only called.
            batch: samples of a pass; None where nobody knows.
            process_base: resident bytes before anything of the training was there.
        """
        self.models, self.optimizers = list(models), list(optimizers)
        self.batch = batch
        self.device = self._device()
        self.trouble = ""
        peak = resident_peak()
        self.process_peak = None if peak is None or process_base is None else max(float(peak - process_base), 0.0)
        self.allocator_peak = self._allocator_peak()
        self._registry = formulas.registry()
        self._mode: Any = None
        self._live: dict[int, _Held] = {}
        self._refs: dict[int, Any] = {}
        self._state: set[int] = set()
        self._shapes: set[tuple[int, ...]] = set()
        self._regions: list[bool] = []
        self._sums = [0.0, 0.0, 0.0, 0.0]  # fixed, scaled, and both under bfloat16 autocast
        self._copies = 0.0
        self._found: StepWork | None = None
        self._steps = 0
        self._begin_counting()

    def _begin_counting(self) -> None:
        self._rows: dict[tuple[Any, ...], _Row] = {}
        self._tops: dict[str, list[tuple[float, float, float]]] = {}
        self._low_tops: dict[str, list[tuple[float, float, float]]] = {}
        self._saved: float | None = None
        self._passes: set[int] = set()

    # -- from outside --------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it is looking."""
        return self._mode is not None

    def start(self) -> bool:
        """Begin to look, on this thread. Returns whether it could."""
        if self._mode is not None:
            return False

        def seen(mode: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            begin = time.perf_counter()
            out = func(*args, **kwargs)
            took = time.perf_counter() - begin
            try:
                self._seen(func, args, kwargs, out, took)
            except Exception as error:
                self.trouble = f"{func}: {type(error).__name__}: {error}"
            return out

        state = self._read_state()
        mode = dispatch.enter(seen)
        if mode is None:
            return False
        self._state, self._shapes = state
        self._mode, self._thread = mode, threading.get_ident()
        return True

    def step_ended(self) -> bool:
        """A step has ended; True once enough was seen."""
        if self._mode is None:
            return True
        self._steps += 1
        if self._steps == 1:
            self._state, self._shapes = self._read_state()
            self._drop_state()
            self._begin_counting()
            self._top("forward")
            return False
        self._found = self._fold()
        self.stop()
        return True

    def stop(self) -> None:
        """Look no longer."""
        mode, self._mode = self._mode, None
        if mode is not None and threading.get_ident() == self._thread:
            dispatch.take_off(mode)
        self._live.clear()
        self._refs.clear()
        self.models, self.optimizers = [], []

    def found(self) -> StepWork | None:
        """What was seen; None before two steps have ended."""
        return self._found

    # -- what belongs to the training all the time ---------------------------------------------------------------

    def _device(self) -> Any:
        parameters = [item for module in self.models for item in module.parameters()]
        return next((item.device for item in parameters if item.device.type != "cpu"),
                    parameters[0].device if parameters else None)  # fmt: skip

    def _allocator_peak(self) -> float | None:
        if self.device is None or self.device.type != "cuda":
            return None
        import torch

        return float(torch.cuda.max_memory_allocated(self.device))

    def _parameters(self) -> list[Any]:
        found = {id(item): item for module in self.models for item in module.parameters()}
        for optimizer in self.optimizers:
            found.update((id(item), item) for group in optimizer.param_groups for item in group["params"])
        return list(found.values())

    def _optimizer_tensors(self) -> list[Any]:
        return [item for optimizer in self.optimizers for state in optimizer.state.values()
                for item in counting.tensors_in(state)]  # fmt: skip

    def _buffers(self) -> list[Any]:
        return [item for module in self.models for item in module.buffers()]

    def _read_state(self) -> tuple[set[int], set[tuple[int, ...]]]:
        parameters = self._parameters()
        state = {key for item in (*parameters, *self._buffers(), *self._optimizer_tensors())
                 if (key := _key(item)) is not None}  # fmt: skip
        shapes = {tuple(item.shape) for item in parameters if item.dim()}
        # Products give the gradient of a weight as it lies, or turned.
        shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
        # Autocast keeps a bfloat16 copy of every float32 weight that meets a product.
        self._copies = 2.0 * sum(item.numel() for item in parameters
                                 if item.dim() >= 2 and item.requires_grad and item.element_size() == 4)  # fmt: skip
        return state, shapes

    def _drop_state(self) -> None:
        """What turned out to be optimizer state since it was made is no memory of the step."""
        for key in self._state & self._live.keys():
            self._forget(key)

    # -- one operation -------------------------------------------------------------------------------------------

    def _seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, took: float) -> None:
        import torch

        name = func._overloadpacket.__name__
        if func.namespace == "profiler":
            if name.startswith("_record_function_enter"):
                self._regions.append(bool(args) and str(args[0]).startswith("Optimizer.step#"))
            elif self._regions:
                self._regions.pop()
            return
        task = torch._C._current_graph_task_id()
        phase = "backward" if task != -1 else "optimizer" if any(self._regions) else "forward"
        if task != -1:
            self._passes.add(task)
            if self._saved is None:
                self._saved = float(sum(h.size for h in self._live.values() if h.scaled and h.phase == "forward"))
        reads = counting.tensors_in((args, {k: v for k, v in kwargs.items() if k != "out"}))
        results = counting.tensors_in(out)
        inputs = [self._of(item, phase) for item in reads]
        product = name.startswith(_LOWER)
        low = self._low(name, phase, product, reads, inputs)
        derived = bool(reads) and all(item is None or item.derived for item in inputs)
        for item in results:
            key = _key(item)
            if key is not None and key not in self._live and key not in self._state:
                self._hold(key, item, phase, low, derived if reads else not self._has_samples(item))
        if not func.is_view and name not in counting.ALLOCATORS and name != "detach":
            self._count(func, name, phase, product, reads, args, kwargs, out, results, took)

    def _low(self, name: str, phase: str, product: bool, reads: list[Any], inputs: list[_Held | None]) -> bool:
        if phase == "optimizer":
            return False
        if product:
            return True
        if name.startswith(_HIGHER):
            return False
        floats = [held.low for item, held in zip(reads, inputs, strict=True)
                  if held is not None and not held.derived and item.is_floating_point()]  # fmt: skip
        return bool(floats) and all(floats)

    def _of(self, item: Any, phase: str) -> _Held | None:
        """What is known of a tensor's memory; None for parameters, buffers and optimizer state."""
        key = _key(item)
        if key is None or key in self._state:
            return None
        held = self._live.get(key)
        if held is None:
            # It came from elsewhere: a loader's process, or from before the look.
            held = self._hold(key, item, phase, False, False, stranger=True)
        return held

    def _has_samples(self, item: Any) -> bool:
        return self.batch is not None and self.batch > 1 and self.batch in tuple(item.shape)

    def _hold(self, key: int, item: Any, phase: str, low: bool, derived: bool, stranger: bool = False) -> _Held:
        storage = item.untyped_storage()
        size = int(storage.nbytes()) if self.device is None or item.device.type == self.device.type else 0
        batch = self.batch or 1
        if stranger:
            scaled = self._has_samples(item)
            if not scaled and item.device.type == "cpu":
                size = 0  # data of the host: with what the process holds beside tensors, and on no other device
        else:
            scaled = not derived and phase != "optimizer" and int(item.numel()) % batch == 0 and item.dim() > 0
            if scaled and phase == "backward" and tuple(item.shape) in self._shapes:
                scaled = False
        low = low and item.is_floating_point() and item.element_size() == 4
        held = _Held(size, size // 2 if low and scaled else size, scaled, low, derived, phase)
        self._live[key] = held
        self._refs[key] = weakref.ref(storage, self._goodbye(key))
        self._add(held, 1)
        self._top(phase)
        return held

    def _goodbye(self, key: int) -> Callable[[Any], None]:
        observer = weakref.ref(self)

        def gone(_: Any) -> None:
            found = observer()
            if found is not None:
                found._forget(key)

        return gone

    def _forget(self, key: int) -> None:
        held = self._live.pop(key, None)
        self._refs.pop(key, None)
        if held is not None:
            self._add(held, -1)

    def _add(self, held: _Held, sign: int) -> None:
        place = 1 if held.scaled else 0
        self._sums[place] += sign * held.size
        self._sums[place + 2] += sign * held.low_size

    def _top(self, phase: str) -> None:
        """Remember this moment where it is the highest of its phase so far for some number of samples."""
        fixed, scaled, low_fixed, low_scaled = self._sums
        if phase != "optimizer":
            low_fixed += self._copies
        tops = self._tops.setdefault(phase, [(-1.0, 0.0, 0.0)] * len(RATIOS))
        low_tops = self._low_tops.setdefault(phase, [(-1.0, 0.0, 0.0)] * len(RATIOS))
        for place, ratio in enumerate(RATIOS):
            if fixed + ratio * scaled > tops[place][0]:
                tops[place] = (fixed + ratio * scaled, fixed, scaled)
            if low_fixed + ratio * low_scaled > low_tops[place][0]:
                low_tops[place] = (low_fixed + ratio * low_scaled, low_fixed, low_scaled)

    def _count(self, func: Any, name: str, phase: str, product: bool, reads: list[Any], args: tuple[Any, ...],
               kwargs: dict[str, Any], out: Any, results: list[Any], took: float) -> None:  # fmt: skip
        if not results:  # `_foreach_add_` and the like return nothing: they write into their first arguments
            results = counting.tensors_in(args[:1])
        seen = [(item, counting.touched_bytes(item)) for item in (*reads, *results)]
        if name in counting.ROW_READERS and reads:
            written = sum(size for _, size in seen[len(reads) :])
            seen[0] = (reads[0], min(seen[0][1], written))
        flops = 0.0
        if formula := self._registry.get(func._overloadpacket):
            flops = float(formula(*args, **kwargs, out_val=out))
        elif phase == "optimizer" and (cost := formulas.elementwise_cost(name)) is not None:
            flops = float(cost * sum(int(item.numel()) for item in results))
        total = sum(size for _, size in seen)
        dtype = str(reads[0].dtype if reads else results[0].dtype if results else "").removeprefix("torch.")
        key = (phase, name, dtype, product, int(flops).bit_length(), int(total).bit_length())
        row = self._rows.setdefault(key, _Row())
        grows = False
        for item, size in seen:
            place = _key(item)
            held = self._live.get(place) if place is not None else None
            if held is not None and held.scaled:
                row.scaled_bytes += size
                grows = True
            else:
                row.fixed_bytes += size
            if (held is not None and held.low) or (product and item.is_floating_point() and item.element_size() == 4):
                row.low += size
        row.calls += 1
        row.seconds += took
        if grows:
            row.scaled_flops += flops
        else:
            row.fixed_flops += flops

    # -- the end -------------------------------------------------------------------------------------------------

    def _fold(self) -> StepWork:
        parameters = self._parameters()
        trained = [item for item in parameters if item.requires_grad]
        gradients = _bytes([item.grad for item in trained if item.grad is not None])
        if not gradients:
            gradients = float(sum(item.numel() * item.element_size() for item in trained))
        kind = self.device.type if self.device is not None else "cpu"
        return StepWork(
            device=kind,
            batch=self.batch,
            parameters=_bytes(parameters),
            gradients=gradients,
            buffers=_bytes(self._buffers()),
            optimizer_state=_bytes([item for item in self._optimizer_tensors() if item.device.type == kind]),
            trained=sum(int(item.numel()) for item in trained),
            moments=_moments(self._tops),
            moments_low=_moments(self._low_tops),
            saved=self._saved,
            ops=self._operations(kind == "cpu"),
            passes=max(len(self._passes), 1),
            allocator_peak=self.allocator_peak,
            process_peak=self.process_peak,
            note=f"not everything was seen ({self.trouble})" if self.trouble else "",
        )

    def _operations(self, timed: bool) -> tuple[OpWork, ...]:
        items = sorted(self._rows.items(), key=lambda item: -(item[1].seconds if timed else item[1].scaled_bytes))
        kept = dict(items[:MOST_ROWS])
        for key, row in items[MOST_ROWS:]:
            kept.setdefault((key[0], "others", key[2], False, 0, 0), _Row()).add(row)
        return tuple(
            OpWork(
                phase=key[0], name=key[1], dtype=key[2], product=key[3], calls=row.calls,
                scaled_flops=row.scaled_flops, fixed_flops=row.fixed_flops,
                scaled_bytes=row.scaled_bytes, fixed_bytes=row.fixed_bytes,
                low=min(row.low / max(row.scaled_bytes + row.fixed_bytes, 1.0), 1.0),
                seconds=row.seconds if timed else None,
            )
            for key, row in kept.items()
        )  # fmt: skip


def _moments(tops: dict[str, list[tuple[float, float, float]]]) -> tuple[Moment, ...]:
    """The moments kept, each once; before the look a sum may be a little below zero."""
    found = ((max(fixed, 0.0), max(scaled, 0.0), phase) for phase, rows in tops.items() for _, fixed, scaled in rows)
    return tuple(Moment(*item) for item in dict.fromkeys(found))


def _key(item: Any) -> int | None:
    """What tells one block of memory from another while it lives; None for what has no plain memory."""
    if not counting.has_storage(item):
        return None
    try:
        return int(item.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None


def _bytes(tensors: Sequence[Any]) -> float:
    """Bytes of the memory behind tensors, shared memory once."""
    found = {}
    for item in tensors:
        key = _key(item)
        if key is None:
            values = getattr(item, "numel", lambda: 0)() * item.element_size()
            found[id(item)] = int(values)
        else:
            found[key] = int(item.untyped_storage().nbytes())
    return float(sum(found.values()))
