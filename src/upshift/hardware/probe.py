"""Measured peaks of this machine: matrix multiplication per dtype, and memory bandwidth.

A peak is what the machine was seen to do under PyTorch on large square products and large copies, not what its maker
states: the roofline a training step is held against (Williams, Waterman and Patterson 2009) must be one the same
library can reach. Samples of all dtypes are interleaved, so that slow drift of the clock reaches all alike. The peak is
the 90th percentile of the samples with its distribution-free interval from order statistics; the samples are
correlated in time, so the interval is somewhat optimistic.

    python -m upshift.hardware.probe --device cpu --json FILE

runs the probe in a process of its own, so that it disturbs no measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from upshift.errors import UsageError
from upshift.hardware import machine

if TYPE_CHECKING:
    import torch

SCHEMA = 1
QUANTILE = 0.9

#: Order of the probe; `tf32` is float32 with TensorFloat-32 allowed, on CUDA only.
DTYPES_CPU = ("float32", "bfloat16", "float16", "float64")
DTYPES_CUDA = ("float32", "tf32", "bfloat16", "float16", "float64")

#: Seconds of sampling, shared by the dtypes and the copy; growing the sizes comes on top.
BUDGET_CPU = 2.5
BUDGET_CUDA = 2.0

#: Share of its cores' time a probe must have got for its figures to be kept for the next time.
LEAST_USE = 0.7

Say = Callable[[str], None]


class Peak(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure with unit, interval, count and basis; the same fields as `records.Quantity` (a sibling layer)."""

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 0
    basis: Literal["measured", "estimated", "unknown"] = "measured"
    level: float = 0.95


class Peaks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured: FLOP/s per dtype and bytes per second (read plus written), for one device.

    A dtype that is missing from `flops` was not measured; `notes` say why.
    """

    device: str
    device_name: str
    created: str
    torch: str
    threads: int
    cores: int
    flops: dict[str, Peak]
    bandwidth: Peak
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    busy: bool = False
    """Other work took the cores while this was measured: the figures are too low."""
    schema: int = SCHEMA


def peak_of(samples: Sequence[float], unit: str, *, level: float = 0.95) -> Peak:
    """The `QUANTILE` quantile of rates with its order-statistic interval (Hahn and Meeker 1991, section 5.2).

    With few samples no order statistic bounds the quantile from above at this level: the best sample stands in.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if not n:
        return Peak(value=None, unit=unit, basis="unknown")
    tail = (1 - level) / 2
    below, cumulative = -1, 0.0
    above = n - 1
    for k in range(n + 1):
        # P(exactly k samples lie below the quantile)
        cumulative += math.comb(n, k) * QUANTILE**k * (1 - QUANTILE) ** (n - k)
        if cumulative <= tail:
            below = k
        if cumulative >= 1 - tail:
            above = min(k, n - 1)
            break
    return Peak(
        value=ordered[min(n - 1, math.ceil(QUANTILE * n) - 1)],
        unit=unit,
        low=ordered[max(0, below)],
        high=ordered[above],
        n=n,
        level=level,
    )


def cache_file(device_name: str, cores: int, torch_version: str, threads: int) -> Path:
    """Where the peaks of this machine are kept: `$XDG_CACHE_HOME/upshift` or `~/.cache/upshift`."""
    key = f"{SCHEMA}|{device_name}|{machine.cpu_model()}|{cores}|{torch_version}|{threads}"
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return folder / "upshift" / f"probe-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _load(path: Path) -> Peaks | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Peaks)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.schema == SCHEMA else None


def _store(path: Path, peaks: Peaks) -> None:
    """Keep the peaks for the next time; a cache that cannot be written is only slower."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(peaks), indent=1))
        os.replace(temporary, path)
    except OSError:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass


@contextmanager
def _settings(kind: str, threads: int) -> Iterator[None]:
    """Threads for the probe, gradients off; global settings are put back."""
    import torch

    before = torch.get_num_threads()
    precision = torch.backends.cuda.matmul.fp32_precision if kind == "cuda" else ""
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
        if kind == "cuda":
            torch.backends.cuda.matmul.fp32_precision = precision


class _Product:
    """Square products of one dtype on one device; grows until one call is long enough to time."""

    def __init__(self, name: str, device: torch.device, longest: float, largest: int) -> None:
        import torch

        self.name = name
        self.device = device
        self.dtype: torch.dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        self.size = 256 if device.type == "cpu" else 1024
        self.rates: list[float] = []
        self.cost = 0.0
        self.processor = 0.0
        self._longest, self._largest = longest, largest
        self._make()

    def _make(self) -> None:
        import torch

        shape = (self.size, self.size)
        self._a = torch.full(shape, 0.5, dtype=self.dtype, device=self.device)
        self._b = torch.full(shape, 0.25, dtype=self.dtype, device=self.device)
        self._out = torch.empty(shape, dtype=self.dtype, device=self.device)

    def once(self) -> float:
        """Seconds of one product."""
        import torch

        if self.device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if self.name == "tf32" else "ieee"
        begin = time.process_time()
        seconds = timed(lambda: torch.mm(self._a, self._b, out=self._out), self.device)
        self.processor += time.process_time() - begin
        self.cost += seconds
        return seconds

    def _work(self) -> tuple[float, float]:
        """Seconds of one product: of wall time, and on a CPU of processor time per thread.

        Other work on the machine makes a small product take many times too long on the wall clock, since its threads
        wait for one another; processor time is what says whether the product itself is long.
        """
        import torch

        before = self.processor
        seconds = self.once()
        if self.device.type != "cpu":
            return seconds, seconds
        return seconds, min(seconds, (self.processor - before) / torch.get_num_threads())

    def grow(self) -> None:
        """Warm up, then double the size while a call stays short. A very slow dtype stays at the first size."""
        _, work = self._work()
        seconds, work = min((self._work() for _ in range(3 if work < 0.03 else 1)), key=lambda item: item[1])
        while self.size * 2 <= self._largest and work * 8 < self._longest:
            self.size *= 2
            self._make()
            self.once()
            seconds, work = min((self._work() for _ in range(2)), key=lambda item: item[1])
        self.rates.append(2.0 * self.size**3 / seconds)

    def sample(self) -> None:
        """One more rate, in FLOP/s: 2 n^3 operations per product."""
        self.rates.append(2.0 * self.size**3 / self.once())


class _Copy:
    """Copies between two arrays several times the last-level cache; rate counts bytes read plus bytes written."""

    def __init__(self, device: torch.device) -> None:
        import torch

        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            size = min(2**30, free // 4)
        else:
            cache = machine.last_level_cache() or 32 * 2**20
            size = min(max(4 * cache, 64 * 2**20), 512 * 2**20, machine.memory_limit() // 16)
        self.device = device
        self.bytes = max(1, size // 4) * 4
        self._source = torch.zeros(self.bytes // 4, dtype=torch.float32, device=device)
        self._target = torch.ones(self.bytes // 4, dtype=torch.float32, device=device)
        self.rates: list[float] = []

    def sample(self) -> None:
        """One more rate, in bytes per second."""
        self.rates.append(2.0 * self.bytes / timed(lambda: self._target.copy_(self._source), self.device))


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock where it has one."""
    if device.type == "cuda":
        import torch

        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return max(float(first.elapsed_time(last)) / 1e3, 1e-9)
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)


def _unprobed(device: str, name: str, note: str) -> Peaks:
    import torch

    return Peaks(
        device=device,
        device_name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=str(torch.__version__),
        threads=0,
        cores=machine.usable_cores(),
        flops={},
        bandwidth=Peak(value=None, unit="B/s", basis="unknown"),
        notes=(note,),
    )


def probe(device: str = "cpu", *, refresh: bool = False, threads: int | None = None, say: Say | None = None) -> Peaks:
    """Measure (or read back) the peaks of a device; at most about six seconds on a CPU.

    Args:
        device: a torch device string, `cpu` or `cuda[:index]`.
        refresh: measure anew although there is a cached figure.
        threads: intra-op threads to probe with; the usable cores by default.
        say: told what is going on, one line at a time.

    Returns:
        The peaks. For a device type that cannot be probed, or that is not there, they are unknown and a note says so.

    Raises:
        UsageError: `device` is no device string.
    """
    import torch

    tell = say or (lambda text: None)
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{device!r} is no device: {error}.", remedy="Name one such as cpu or cuda:0.") from None
    if wanted.type not in ("cpu", "cuda"):
        return _unprobed(device, wanted.type, f"no probe is known for devices of type {wanted.type!r}")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        return _unprobed(device, "cuda", "PyTorch sees no CUDA device")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        return _unprobed(device, "cuda", f"there is no CUDA device number {wanted.index}")
    name = machine.cpu_model() if wanted.type == "cpu" else torch.cuda.get_device_name(wanted)
    cores = machine.usable_cores()
    threads = threads or cores
    path = cache_file(name, cores, str(torch.__version__), threads)
    if not refresh and (found := _load(path)) is not None:
        tell(f"peaks of {name} were measured {found.created}")
        return msgspec.structs.replace(found, device=device)
    start = time.perf_counter()
    with _settings(wanted.type, threads):
        flops, bandwidth, used, notes = _measure(wanted, tell)
    seconds = time.perf_counter() - start
    busy = used < LEAST_USE
    if busy:
        notes.append(f"other work was running: the probe got {used:.0%} of its cores, so the peaks are too low")
    peaks = Peaks(
        device=device,
        device_name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=str(torch.__version__),
        threads=threads,
        cores=cores,
        flops=flops,
        bandwidth=bandwidth,
        seconds=seconds,
        notes=tuple(notes),
        busy=busy,
    )
    if not busy:
        _store(path, peaks)
    return peaks


def _measure(device: torch.device, tell: Say) -> tuple[dict[str, Peak], Peak, float, list[str]]:
    """Peaks per dtype, bandwidth, the share of its cores' time the probe got (1 on a device), and notes."""
    import torch

    cuda = device.type == "cuda"
    names: tuple[str, ...] = DTYPES_CUDA if cuda else DTYPES_CPU
    if cuda:
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability(device)[0] < 8 and torch.version.hip is None:
            # TF32 and bfloat16 tensor cores came with compute capability 8.0; before it they are emulated.
            names = tuple(item for item in names if item not in ("tf32", "bfloat16"))
    budget = BUDGET_CUDA if cuda else BUDGET_CPU
    notes: list[str] = []
    products: list[_Product] = []
    for name in names:
        tell(f"probing {name} products")
        try:
            product = _Product(name, device, 0.1, 16384 if cuda else 4096)
            product.grow()
        except (RuntimeError, TypeError) as error:
            notes.append(f"{name} was not measured: {str(error).splitlines()[0][:200]}")
            continue
        products.append(product)
    tell("probing memory bandwidth")
    copy = _Copy(device)
    timed(lambda: copy._target.copy_(copy._source), device)
    best = max((max(item.rates) for item in products), default=0.0)
    # A dtype ten times slower than the best is no candidate for anything: a few samples say so.
    share = budget / (len(products) + 1)
    limits = {item.name: item.cost + (share if max(item.rates) * 10 > best else share / 8) for item in products}
    deadline = time.perf_counter() + budget
    spent = 0.0
    while time.perf_counter() < deadline:
        busy = False
        for item in products:
            if item.cost < limits[item.name]:
                item.sample()
                busy = True
        if spent < share:
            begin = time.perf_counter()
            copy.sample()
            spent += time.perf_counter() - begin
            busy = True
        if not busy:
            break
    for item in products:
        if item.size < 512:
            notes.append(f"{item.name} is so slow here that it was measured on {item.size} x {item.size} only")
    flops = {item.name: peak_of(item.rates, "FLOP/s") for item in products}
    used = 1.0
    if not cuda and products:
        # The fastest product keeps every thread busy unless other work takes the cores; slow fallbacks use one.
        fastest = max(products, key=lambda item: max(item.rates))
        used = fastest.processor / (fastest.cost * torch.get_num_threads())
    return flops, peak_of(copy.rates, "B/s"), used, notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe in a process of its own; progress goes to stderr, the record to a file."""
    parser = argparse.ArgumentParser(prog="python -m upshift.hardware.probe", description="Measure this machine.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--refresh", action="store_true", help="measure anew although there is a cached figure")
    options = parser.parse_args(arguments)

    def say(text: str) -> None:
        sys.stderr.write(f"upshift: {text}\n")
        sys.stderr.flush()

    try:
        peaks = probe(options.device, refresh=options.refresh, threads=options.threads, say=say)
    except UsageError as error:
        say(str(error))
        return error.exit_code
    for name, peak in peaks.flops.items():
        say(f"{name}: {(peak.value or 0) / 1e9:.4g} GFLOP/s ({peak.n} samples)")
    if peaks.bandwidth.value is not None:
        say(f"memory: {peaks.bandwidth.value / 1e9:.4g} GB/s ({peaks.bandwidth.n} samples)")
    for note in peaks.notes:
        say(note)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(peaks), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
