"""The micro-batch: the largest that really runs, and the fastest of those that do.

Idea. The global batch is the mathematics, the micro-batch is not: it decides memory and speed alone. Formulas for the
memory of a step miss what the allocator, the kernels and the user's own code take, so each size is tried: `probe(size)`
makes full steps in a fresh process and says how that went. The whole share of a rank comes first (it often fits), then
sizes double from one until one fails, then the gap is bisected. Only sizes that leave no small rest are of use: a share
of n samples in k passes takes passes of ceil(n / k), so the others would take as many passes and only more memory.
The fastest size is rarely the smallest and need not be the largest: larger ones that fill the device gain nothing and
leave the caches. So half the largest is tried too, and so on while that is faster. The choice is tried once more before
it is handed out.

Limits. Speed is that of one process trying alone, with samples as heavy as the heaviest seen. Buffers of a process
group (gradients of DDP are held twice) are not in it.

Sources: doubling and bisection as in the batch size finders of Lightning and Composer, which try in the process that
trains; what a failed try leaves behind there is why these are fresh processes. `HEADROOM` is for what the steps that
were tried did not meet: fragmentation, other shapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from upshift.errors import TrainingError, UsageError
from upshift.units import binary

#: Share of the limit that a size may take.
HEADROOM = 0.9

#: Speeds closer than this are the same: fewer passes are then better.
SAME_SPEED = 0.02


@dataclass(frozen=True)
class Outcome:
    """How a size went.

    Args:
        fits: it made its steps within the limit. peak_bytes: the most memory it held, None where it was not seen.
        seconds: of one update of the whole share with this size (measured passes, times their number, and the
            optimizer's step); None where it did not get there. why: why it does not fit.
        batch_norm: a layer of the model whose result depends on the size, if there is one.
    """

    fits: bool
    peak_bytes: int | None = None
    seconds: float | None = None
    why: str = ""
    batch_norm: str = ""


@dataclass(frozen=True)
class Found:
    """What a search found: `size` is the fastest that fits, `largest` the largest that does; `share` the samples of one
    rank in a global batch. `tried`: what came of each size, last try. All speeds are measured."""

    size: int
    largest: int
    share: int
    limit: int | None
    tried: dict[int, Outcome] = field(default_factory=dict)

    def rate(self, size: int) -> float | None:
        """Samples per second with this size; None where it was not measured."""
        outcome = self.tried.get(size)
        return self.share / outcome.seconds if outcome is not None and outcome.fits and outcome.seconds else None

    @property
    def warning(self) -> str:
        """What a smaller micro-batch changes in this model; empty where nothing."""
        layer = self.tried[self.size].batch_norm
        return _of_batch_norm(layer, self.size, self.share) if layer and self.size < self.share else ""

    def __str__(self) -> str:
        text = f"micro-batch {self.size}: {self._told(self.size)}"
        if self.size != self.largest:
            text += f"; the largest that fits is {self.largest}: {self._told(self.largest)}"
        return text

    def _told(self, size: int) -> str:
        peak, rate = self.tried[size].peak_bytes, self.rate(size)
        speed = f"{rate:,.0f} samples/s" if rate is not None else "speed unknown"
        return f"{speed}, {binary(peak) if peak is not None else 'unknown memory'} (measured)"


#: Tries a size. Whatever else goes wrong than memory is raised.
Probe = Callable[[int], Outcome]


def useful_sizes(share: int) -> list[int]:
    """Micro-batches worth trying for `share` samples, ascending: ceil(share / k) for k = 1, 2, ..., share.

    Raises:
        UsageError: no samples.
    """
    if share < 1:
        raise UsageError(f"a share of {share} samples.", remedy="It is a whole number, at least 1.")
    found, passes = [], 1
    while True:
        size = -(-share // passes)
        found.append(size)
        if size == 1:
            return found[::-1]
        # The fewest passes that make it smaller by at least one.
        passes = -(-share // (size - 1))


def search(probe: Probe, share: int, *, limit: int | None = None, exact: bool = False,
           say: Callable[[str], None] = lambda text: None) -> Found:  # fmt: skip
    """Find the micro-batch for `share` samples a rank.

    Args:
        probe: tries a size.
        limit: bytes that may be held; a size that held more than `HEADROOM` of it does not fit. None: as `probe` says.
        exact: decline micro-batches that change what is trained (batch normalisation).
        say: told how each try went.

    Raises:
        TrainingError: not even one sample fits.
        UsageError: with `exact`, the model has batch normalisation and the whole share does not fit.
    """
    return _Search(probe, share, limit, exact, say).run()


class _Search:
    def __init__(self, probe: Probe, share: int, limit: int | None, exact: bool, say: Callable[[str], None]) -> None:
        self.probe, self.share, self.limit, self.exact, self.say = probe, share, limit, exact, say
        self.sizes = useful_sizes(share)
        self.tried: dict[int, Outcome] = {}

    def run(self) -> Found:
        largest = self.largest()
        self.compare(largest)
        return self.confirmed()

    def fits(self, size: int, *, again: bool = False) -> bool:
        if size not in self.tried or again:
            found = self.probe(size)
            allowed = self.limit * HEADROOM if self.limit is not None else None
            if found.fits and allowed is not None and found.peak_bytes is not None and found.peak_bytes > allowed:
                why = f"held {binary(found.peak_bytes)}, {binary(allowed)} are allowed"
                found = Outcome(False, found.peak_bytes, found.seconds, why, found.batch_norm)
            self.tried[size] = found
            self.say(self.told(size, found))
            if self.exact and found.fits and found.batch_norm and size < self.share:
                self.decline(found.batch_norm, size)
        return self.tried[size].fits

    def told(self, size: int, found: Outcome) -> str:
        if not found.fits:
            return f"micro-batch {size} does not fit: {found.why or 'out of memory'}"
        speed = f", {self.share / found.seconds:,.0f} samples/s" if found.seconds else ""
        held = f", holds {binary(found.peak_bytes)}" if found.peak_bytes is not None else ""
        return f"micro-batch {size} fits{held}{speed}"

    def largest(self) -> int:
        """The largest useful size that fits."""
        sizes = self.sizes
        if self.fits(sizes[-1]):
            return sizes[-1]
        if not self.fits(sizes[0]):
            self.hopeless(sizes[0])
        low, high = 0, len(sizes) - 1
        while (step := max(bisect_left(sizes, 2 * sizes[low]), low + 1)) < high:
            if not self.fits(sizes[step]):
                high = step
                break
            low = step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(sizes[middle]) else (low, middle)
        return sizes[low]

    def compare(self, largest: int) -> None:
        """Halve while that is faster."""
        if self.exact and self.tried[largest].batch_norm:
            return
        size = largest
        while size > 1:
            half = self.sizes[bisect_left(self.sizes, size // 2)]
            if half >= size or not self.fits(half) or not self.faster(half, size):
                return
            size = half

    def faster(self, size: int, than: int) -> bool:
        mine, other = self.tried[size].seconds, self.tried[than].seconds
        return mine is not None and other is not None and mine < other * (1 - SAME_SPEED)

    def confirmed(self) -> Found:
        """The fastest of those that fit, once it has run again; one that then fails takes all larger ones with it."""
        while True:
            fitting = sorted(size for size, found in self.tried.items() if found.fits)
            if not fitting:
                below = [size for size in self.sizes if size < min(self.tried)]
                if not below:
                    self.hopeless(min(self.tried))
                self.fits(below[-1])
                continue
            best = self.fastest(fitting)
            if self.fits(best, again=True):
                return Found(best, fitting[-1], self.share, self.limit, dict(self.tried))
            why = f"a larger one failed: {self.tried[best].why}"
            for size in [size for size in fitting if size > best]:
                self.tried[size] = Outcome(False, why=why)

    def fastest(self, fitting: list[int]) -> int:
        """Of speeds that are the same the largest size; without speeds the largest."""
        seconds = {size: found for size in fitting if (found := self.tried[size].seconds) is not None}
        if not seconds:
            return fitting[-1]
        least = min(seconds.values())
        return max(size for size, value in seconds.items() if value <= least / (1 - SAME_SPEED))

    def hopeless(self, size: int) -> None:
        raise TrainingError(
            f"a micro-batch of {size} does not fit"
            + (f" into {binary(self.limit)}" if self.limit is not None else "")
            + f": {self.tried[size].why or 'out of memory'}.",
            remedy="Use a smaller model, shorter samples, a larger limit, or the technique activation_checkpointing.",
        )

    def decline(self, layer: str, size: int) -> None:
        raise UsageError(
            f"{_of_batch_norm(layer, size, self.share)} The whole share does not fit: "
            f"{self.tried[self.share].why or 'out of memory'}.",
            remedy="Allow it (exact=False), use normalisation without batch statistics, or a smaller global batch.",
        )


def _of_batch_norm(layer: str, size: int, share: int) -> str:
    return (
        f"The model has batch normalisation ({layer}): its statistics are those of {size} samples, not of {share}, "
        "so a smaller micro-batch is another training."
    )
