"""FLOPs and bytes of exactly one global training step, and the floor they set for its duration.

Method: a dispatch mode sees every ATen call of one step (forward, backward, optimizer). Products, convolutions,
attention and recurrent layers are counted by formula, a multiply-add as two; the optimizer's elementwise updates per
element (`formulas.elementwise_cost`); other elementwise work is counted in bytes only, as in the usual FLOP counts
(Chowdhery et al. 2022, appendix B). The count slows every operation: it is for one step, never for the steady state.

Limits: a compiled region may show only the kernels it calls from outside, not those it generated; a CUDA graph replay
shows nothing. Both make the count a lower bound. Nothing is counted in another thread or process.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from upshift import units
from upshift.hardware.probe import Peak, Peaks
from upshift.measure import dispatch, formulas
from upshift.records.measurement import Floor
from upshift.records.quantity import Quantity, unknown

if TYPE_CHECKING:
    import torch

PHASES = ("forward", "backward", "optimizer")

#: Reading a few rows of a large table touches those rows only: the input counts as much as the output.
ROW_READERS = frozenset({"embedding", "index", "index_select", "gather", "select", "take", "_unsafe_index"})

ALLOCATORS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")


class StepCount(msgspec.Struct, frozen=True):
    """One global step. FLOPs; bytes; per phase `{"forward": FLOPs, ...}`.

    `bytes_moved` is the sum of the inputs and outputs of every operation: as if no cache were ever hit.
    `least_bytes` is what no implementation can avoid once it outgrows the caches: parameters, gradients and optimizer
    state read and written once each, and every other tensor that existed before the step and was read, once.
    `missing_ops` did arithmetic nobody counted: with any, `flops` is a lower bound (its basis is `estimated`).
    """

    flops: Quantity
    bytes_moved: Quantity
    least_bytes: Quantity
    by_phase: dict[str, float]
    missing_ops: tuple[str, ...]
    dtype: str
    by_dtype: dict[str, float] = {}
    operations: int = 0
    note: str = ""


def nothing_counted(note: str) -> StepCount:
    """A count of a step that was not seen."""
    return StepCount(
        flops=unknown("FLOP"),
        bytes_moved=unknown("B"),
        least_bytes=unknown("B"),
        by_phase={},
        missing_ops=(),
        dtype="unknown",
        note=note,
    )


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory a dense tensor spans; an expanded dimension (stride 0) is in memory once."""
    if not has_storage(tensor):
        return int(tensor.numel()) * tensor.element_size()
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 0:
            return 0
        if stride != 0:
            elements *= int(size)
    return elements * tensor.element_size()


class _Tally:
    """Sums of one step. Never raises into the script: what fails is noted."""

    def __init__(self) -> None:
        self.registry = formulas.registry()
        self.flops: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.by_dtype: dict[str, float] = {}
        self.bytes = 0
        self.operations = 0
        self.missing: dict[str, None] = {}
        self.external: dict[int, tuple[int, dict[tuple[Any, ...], int]]] = {}
        self.produced: set[int] = set()
        self.updated: dict[int, tuple[int, dict[tuple[Any, ...], int]]] = {}
        self.temporary: set[int] = set()
        self.regions: list[bool] = []
        self.trouble = ""

    def region(self, func: Any, args: tuple[Any, ...]) -> None:
        """Follow PyTorch's own profiler regions: every optimizer step is one."""
        if func._overloadpacket.__name__.startswith("_record_function_enter"):
            self.regions.append(bool(args) and str(args[0]).startswith("Optimizer.step#"))
        elif self.regions:  # the end of one that began before the count did is nobody's
            self.regions.pop()

    @property
    def in_optimizer(self) -> bool:
        """Whether an optimizer is stepping."""
        return any(self.regions)

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, phase: str) -> None:
        namespace = func.namespace
        packet = func._overloadpacket
        name = packet.__name__
        self.operations += 1
        if formula := self.registry.get(packet):
            self._add_flops(float(formula(*args, **kwargs, out_val=out)), func, args, kwargs, phase)
        elif phase == "optimizer" and namespace == "aten" and (cost := formulas.elementwise_cost(name)) is not None:
            changed = out if tensors_in(out) else args[:1]
            self.flops[phase] += cost * sum(int(item.numel()) for item in tensors_in(changed))
        elif formulas.is_heavy(namespace, name):
            self.missing[f"{namespace}::{name}"] = None
        if func.is_view or name == "detach" or name in ALLOCATORS:
            if not func.is_view and name != "detach":
                self._remember(tensors_in(out), [], phase)
            return
        self._add_bytes(func, name, args, kwargs, out, phase)

    def _add_flops(self, flops: float, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], phase: str) -> None:
        tensors = tensors_in(args)
        if "attention" in func._overloadpacket.__name__ and _argument(func, "is_causal", args, kwargs):
            # PyTorch's formulas count the masked half too; kernels skip it, and a floor must not be above the truth.
            query, key = _query_key(func, args, kwargs)
            flops *= formulas.causal_fraction(int(query.shape[-2]), int(key.shape[-2]))
        self.flops[phase] += flops
        if tensors:
            dtype = _dtype_name(tensors[0])
            self.by_dtype[dtype] = self.by_dtype.get(dtype, 0.0) + flops

    def _add_bytes(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, phase: str
    ) -> None:
        results = tensors_in(out)
        reads = tensors_in((args, {key: value for key, value in kwargs.items() if key != "out"}))
        if not results:  # `_foreach_add_` and the like return nothing: what they write is marked in their schema
            results = [
                tensor
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tensors_in(value)
            ]
        written = sum(touched_bytes(item) for item in results)
        if name in ROW_READERS and reads:
            read = min(touched_bytes(reads[0]), written) + sum(touched_bytes(item) for item in reads[1:])
        elif name in ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"):
            read = sum(touched_bytes(item) for item in reads[1:])
        else:
            read = sum(touched_bytes(item) for item in reads)
        self.bytes += read + written
        for tensor in reads:
            rows = written if name in ROW_READERS else None
            if phase == "optimizer":
                _note(self.updated, self.temporary, tensor, rows)
            else:
                _note(self.external, self.produced, tensor, rows)
        self._remember(results, reads, phase)

    def _remember(self, results: list[Any], inputs: list[Any], phase: str) -> None:
        """Storages made in this step are not inputs of it; those made by an optimizer are not its state."""
        known = {item.untyped_storage().data_ptr() for item in inputs if has_storage(item)}
        for item in results:
            if has_storage(item) and (pointer := item.untyped_storage().data_ptr()) not in known:
                self.produced.add(pointer)
                if phase == "optimizer":
                    self.temporary.add(pointer)

    def least_bytes(self) -> int:
        """What must be moved: all that the optimizers touch twice (read, written), other older storages once."""
        updated = {key: min(size, sum(parts.values())) for key, (size, parts) in self.updated.items()}
        older = sum(
            min(size, sum(parts.values())) for key, (size, parts) in self.external.items() if key not in updated
        )
        return 2 * sum(updated.values()) + older


def _note(
    table: dict[int, tuple[int, dict[tuple[Any, ...], int]]], own: set[int], tensor: Any, rows: int | None
) -> None:
    """Remember a tensor that is not among the storages `own`: by storage, and there by the part touched."""
    if not has_storage(tensor):
        return
    storage = tensor.untyped_storage()
    pointer = storage.data_ptr()
    if pointer == 0 or pointer in own:
        return
    _, parts = table.setdefault(pointer, (storage.nbytes(), {}))
    whole = touched_bytes(tensor)
    key = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
    parts[key] = whole if rows is None else min(whole, max(rows, parts.get(key, 0)))


def tensors_in(value: Any) -> list[Any]:
    """All tensors in nested lists, tuples and dicts."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def has_storage(tensor: Any) -> bool:
    import torch

    return tensor.layout is torch.strided


def _argument(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of an argument by the name in the operation's schema; None where it has none."""
    if name in kwargs:
        return kwargs[name]
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else argument.default_value
    return None


def _query_key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _argument(func, "query", args, kwargs), _argument(func, "key", args, kwargs)


def _dtype_name(tensor: Any) -> str:
    """`float32`, `bfloat16` ...; `tf32` for float32 on CUDA where TensorFloat-32 is allowed."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name == "float32" and tensor.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return name


class StepCounter:
    """Counts one global step: `start()` after one optimizer step, `stop()` after the next, in any stack frame.

    The backward pass is recognised by autograd's own task, the optimizer by the profiler region PyTorch puts around
    every step; all else is `forward`. `start` refuses (returns False) while the script has a dispatch mode of its own,
    which would be taken off in the wrong order. A counter that is never stopped only slows the script.
    """

    def __init__(self) -> None:
        self._mode: Any = None
        self._tally: _Tally | None = None
        self._thread = 0

    @property
    def running(self) -> bool:
        """Whether a step is being counted."""
        return self._mode is not None

    def start(self) -> bool:
        """Begin counting on this thread. Returns whether it could."""
        import torch

        if self._mode is not None:
            return False
        tally = _Tally()

        def counted(mode: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if func._overloadpacket not in tally.registry and func.namespace == "aten":
                with mode:
                    out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            out = func(*args, **kwargs)
            try:
                if func.namespace == "profiler":
                    tally.region(func, args)
                    return out
                phase = "optimizer" if tally.in_optimizer else "forward"
                if torch._C._current_graph_task_id() != -1:
                    phase = "backward"
                tally.add(func, args, kwargs, out, phase)
            except Exception as error:
                tally.trouble = f"{func}: {type(error).__name__}: {error}"
                tally.missing[str(func)] = None
            return out

        mode = dispatch.enter(counted)
        if mode is None:
            return False
        self._mode, self._tally = mode, tally
        self._thread = threading.get_ident()
        return True

    def stop(self) -> StepCount:
        """End counting and return the step's count; without a step under way everything in it is unknown."""
        mode, tally = self._mode, self._tally
        if mode is None or tally is None:
            return nothing_counted("no step was counted")
        if threading.get_ident() != self._thread:
            return nothing_counted("stop() came from another thread than start()")
        self._mode = self._tally = None
        clean = dispatch.take_off(mode)
        if not tally.operations:
            return nothing_counted("no operation was seen in the step")
        total = sum(tally.flops.values())
        missing = tuple(tally.missing)
        notes = [f"lower bound: no formula for {', '.join(missing)}"] if missing else []
        if tally.trouble:
            notes.append(f"one operation could not be counted ({tally.trouble})")
        if not clean:
            notes.append("the script left a dispatch mode of its own behind")
        return StepCount(
            flops=Quantity(
                value=total,
                unit="FLOP",
                low=total,
                high=None if missing else total,
                n=1,
                basis="estimated" if missing else "measured",
            ),
            bytes_moved=Quantity(value=float(tally.bytes), unit="B", n=1),
            least_bytes=Quantity(value=float(tally.least_bytes()), unit="B", n=1),
            by_phase=dict(tally.flops),
            missing_ops=missing,
            dtype=max(tally.by_dtype, key=lambda name: tally.by_dtype[name], default="unknown"),
            by_dtype=dict(tally.by_dtype),
            operations=tally.operations,
            note="; ".join(notes),
        )


def _quantity(peak: Peak | None, unit: str, busy: bool) -> Quantity:
    """A peak of the probe (which sits in a layer that cannot see records) as a quantity.

    What was probed on a busy machine is no peak: it is marked as an estimate, without an upper end.
    """
    if peak is None:
        return unknown(unit)
    if busy and peak.value is not None:
        return Quantity(value=peak.value, unit=unit, low=peak.low, n=peak.n, basis="estimated", level=peak.level)
    return Quantity(
        value=peak.value, unit=unit, low=peak.low, high=peak.high, n=peak.n, basis=peak.basis, level=peak.level
    )


def quotient(top: Quantity, bottom: Quantity, unit: str) -> Quantity:
    """`top / bottom`; unknown where either is, or where `bottom` is zero.

    The interval pairs opposite ends (both errors at their worst), so it covers at least what either level says.
    """
    if top.value is None or not bottom.value:
        return unknown(unit)
    low = high = None
    if top.low is not None and bottom.high:
        low = top.low / bottom.high
    if top.high is not None and bottom.low:
        high = top.high / bottom.low
    counts = [item.n for item in (top, bottom) if item.n]
    measured = top.basis == bottom.basis == "measured"
    return Quantity(
        value=top.value / bottom.value,
        unit=unit,
        low=low,
        high=high,
        n=min(counts, default=0),
        basis="measured" if measured else "estimated",
        level=min(top.level, bottom.level),
    )


def _exact(quantity: Quantity) -> Quantity:
    """A count without interval is its own interval."""
    if quantity.value is None or quantity.low is not None or quantity.high is not None:
        return quantity
    return msgspec.structs.replace(quantity, low=quantity.value, high=quantity.value)


def floor(count: StepCount, step_seconds: Quantity, peaks: Peaks, dtype: str = "") -> Floor:
    """The least time this step could take here, and how near it is (MFU: Chowdhery et al. 2022).

    Args:
        count: one global step.
        step_seconds: its duration, seconds.
        peaks: of the device the step runs on.
        dtype: the dtype of the products; the count's own by default.

    Returns:
        MFU against the peak of the dtype in use; the arithmetic floor with the fastest usable dtype (TF32 or bfloat16
        where their measured peak is higher; float64 stays float64; float16 needs a loss scaler and is never proposed);
        the bandwidth floor from the least bytes. `bytes_moved` is that least, its `high` the sum over all operations.
        What is not known stays unknown.
    """
    dtype = dtype or count.dtype
    present = _quantity(peaks.flops.get(dtype), "FLOP/s", peaks.busy)
    best_dtype, best = dtype, present
    candidates = () if dtype in ("float64", "unknown") else ("float32", "tf32", "bfloat16")
    for name in candidates:
        other = _quantity(peaks.flops.get(name), "FLOP/s", peaks.busy)
        if other.value is not None and (best.value is None or other.value > best.value):
            best_dtype, best = name, other
    flops = _exact(count.flops)
    least = _exact(count.least_bytes)
    bandwidth = _quantity(peaks.bandwidth, "B/s", peaks.busy)
    moved = least
    if least.value is not None and count.bytes_moved.value is not None:
        moved = msgspec.structs.replace(least, high=max(least.value, count.bytes_moved.value))
    notes = [count.note] if count.note else []
    if present.value is None:
        notes.append(f"no peak was measured for {dtype} on {peaks.device_name}")
    notes.extend(peaks.notes)
    present_floor = quotient(flops, present, "s")
    if present_floor.value is not None and best_dtype != dtype:
        notes.append(f"arithmetic floor in {dtype}: {units.seconds(present_floor.value)}")
    mfu = quotient(present_floor, step_seconds, "fraction")
    if mfu.value is not None and mfu.value > 1 and math.isfinite(mfu.value):
        notes.append("above 100 %: the step beats the probed peak, so the machine was slower while it was probed")
    return Floor(
        flops=count.flops,
        bytes_moved=moved,
        dtype=dtype,
        peak_flops=present,
        best_dtype=best_dtype,
        best_peak_flops=best,
        bandwidth=bandwidth,
        mfu=mfu,
        arithmetic_floor=quotient(flops, best, "s"),
        bandwidth_floor=quotient(least, bandwidth, "s"),
        note="; ".join(notes),
        by_phase=dict(count.by_phase),
    )
