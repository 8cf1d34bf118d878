"""Schedules of the learning rate, as what the base rate is multiplied by at each step.

    schedule = cosine(warm_up="5 epochs")          # declared in a job, in lengths (see `lengths`)
    factor = schedule.factor(Span(steps=1000))     # a pure function of the optimizer steps made before: factor(0) …

Each is a closed form: the rate of any step is known without those before, so that a resumed run has the very same.
A warm-up of w steps rises in a straight line over 1/(w+1), 2/(w+1), … and reaches 1 at step w; what follows begins
there. After the last step the last factor holds. A schedule only touches rates; a torch scheduler that also cycles
momentum, or one that watches a metric, is declared as a function of the optimizer instead.

Sources: Loshchilov and Hutter 2016, "SGDR" (arXiv:1608.03983), cosine; Goyal et al. 2017 (arXiv:1706.02677), warm-up;
Smith and Topin 2017 (arXiv:1708.07120), one cycle; Vaswani et al. 2017 (arXiv:1706.03762), inverse square root;
Hu et al. 2024, "MiniCPM" (arXiv:2404.06395), and Hägele et al. 2024 (arXiv:2405.18392), warm-up, stable, decay.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from upshift.engine.lengths import Length, Span
from upshift.engine.rates import Rates, TorchRates
from upshift.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Optimizer steps made before this one -> what the base rate is multiplied by.
Factor = Callable[[int], float]

#: How a rate falls from 1 to 0, of the share done.
_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "1-sqrt": lambda done: 1 - math.sqrt(done),
}
Fall = Literal["linear", "cosine", "1-sqrt"]


@dataclass(frozen=True)
class Schedule:
    """A declared schedule; made by the functions of this file.

    Args:
        text: how it was declared, for records. plan: makes the factor for a training of a known length.
    """

    text: str
    plan: Callable[[Span], Factor] = field(repr=False, compare=False)

    def __repr__(self) -> str:
        return self.text

    def factor(self, span: Span) -> Factor:
        """The pure function of the step (>= 0), for a training of that length.

        Raises:
            UsageError: a length cannot be converted, or does not fit into the training.
        """
        return self.plan(span)

    def bind(self, optimizer: torch.optim.Optimizer, span: Span) -> Rates | TorchRates:
        """The schedule of one optimizer: `rates(step)` sets the rate of the step that is about to be made."""
        return Rates(optimizer, self.factor(span))


@dataclass(frozen=True, repr=False)
class TorchSchedule(Schedule):
    """A scheduler of torch as a schedule: it keeps a state of its own and has no closed form here."""

    builder: Callable[[torch.optim.Optimizer], Any] = field(kw_only=True, compare=False)
    every: Length = field(kw_only=True, default=1)

    def bind(self, optimizer: torch.optim.Optimizer, span: Span) -> TorchRates:
        """The scheduler, built for this optimizer."""
        return TorchRates(self.builder(optimizer), _positive(span.count(self.every, "every"), "every", self.every))


def from_torch(builder: Callable[[torch.optim.Optimizer], Any], every: Length = 1) -> Schedule:
    """A scheduler of torch: `from_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=30), every="1 epoch")`.

    Args:
        builder: makes the scheduler. every: length between two calls of its `step()`; `ReduceLROnPlateau` is stepped
            with the metric after each evaluation instead.
    """

    def plan(span: Span) -> Factor:
        raise UsageError("A scheduler of torch is no pure function of the step.", remedy="Bind it to an optimizer.")

    return TorchSchedule(_text("from_torch", builder=_named(builder), every=every), plan, builder=builder, every=every)


def bind(schedule: Any, optimizer: torch.optim.Optimizer, span: Span) -> Rates | TorchRates | None:
    """What a job declares as its schedule, bound to its optimizer: `bound(step)` before each optimizer step.

    Args:
        schedule: a `Schedule`; a function of the optimizer that makes a torch scheduler, stepped after every optimizer
            step; None for constant rates.

    Raises:
        UsageError: something else, or a length that does not fit.
    """
    if schedule is None:
        return None
    if isinstance(schedule, Schedule):
        return schedule.bind(optimizer, span)
    if not callable(schedule):
        raise UsageError(f"schedule is a {type(schedule).__name__}.", remedy='schedule=cosine(warm_up="5 %")')
    return TorchRates(schedule(optimizer))


def constant(warm_up: Length = 0) -> Schedule:
    """The base rate, after a warm-up."""
    return Schedule(_text("constant", warm_up=warm_up), lambda span: _warmed(span, warm_up, lambda step: 1.0))


def cosine(warm_up: Length = 0, final: float = 0.0) -> Schedule:
    """Half a cosine from 1 to `final` (a share of the base rate), which the end of the training would reach."""
    return _falling("cosine", warm_up, final)


def linear(warm_up: Length = 0, final: float = 0.0) -> Schedule:
    """A straight line from 1 to `final` (a share of the base rate), which the end of the training would reach."""
    return _falling("linear", warm_up, final)


def step(
    every: Length | None = None, *, at: tuple[Length, ...] = (), gamma: float = 0.1, warm_up: Length = 0
) -> Schedule:
    """Multiplied by `gamma` at regular distances, or at the places named; both counted from the first step.

    Raises:
        UsageError: neither or both of `every` and `at` are given.
    """
    if (every is None) == (not at):
        raise UsageError("A step schedule falls either every so often or at named places.", remedy='every="30 epochs"')

    def plan(span: Span) -> Factor:
        if every is not None:
            distance = _positive(span.count(every, "every"), "every", every)
            return _warmed(span, warm_up, lambda now: gamma ** (now // distance))
        places = sorted(span.count(place, "at") for place in at)
        return _warmed(span, warm_up, lambda now: gamma ** bisect.bisect_right(places, now))

    return Schedule(_text("step", every=every, at=at, gamma=gamma, warm_up=warm_up), plan)


def one_cycle(
    rise: Length = "30 %", *, start: float = 25.0, final: float = 1e4, shape: Literal["cosine", "linear"] = "cosine"
) -> Schedule:
    """Up to the base rate, which is the largest one, and down again; as `OneCycleLR`, without its cycle of momentum.

    Args:
        rise: length of the way up.
        start: the first rate is the base rate through this. final: the last one is the first one through this.
    """
    fall = _fall(shape)

    def plan(span: Span) -> Factor:
        last = span.total("one_cycle") - 1
        # A share is not rounded to a whole step: torch turns between two steps.
        top = span.exact(rise, "rise") - 1
        if not 0 < top < last:
            raise UsageError(f"rise = {rise!r} does not fit into {last + 1} steps.", remedy="Take another rise.")
        low, lowest = 1 / start, 1 / start / final

        def factor(now: int) -> float:
            if now <= top:
                return 1 + (low - 1) * fall(now / top)
            return lowest + (1 - lowest) * fall(min((now - top) / (last - top), 1.0))

        return factor

    return Schedule(_text("one_cycle", rise=rise, start=start, final=final, shape=shape), plan)


def warm_up_stable_decay(
    warm_up: Length = 0, decay: Length = "20 %", *, final: float = 0.0, shape: Fall = "1-sqrt"
) -> Schedule:
    """The base rate for most of the time, and a fall to `final` in the last part ("WSD", trapezoid).

    Args:
        decay: length of the fall. shape: `linear`, `cosine`, or `1-sqrt`, the best one in Hägele et al. 2024.
    """
    fall = _fall(shape)

    def plan(span: Span) -> Factor:
        steps = span.total("warm_up_stable_decay")
        falling = _positive(span.count(decay, "decay"), "decay", decay)
        begin = steps - falling
        if span.count(warm_up, "warm_up") > begin:
            raise UsageError(
                f"warm_up = {warm_up!r} and decay = {decay!r} do not fit into {steps} steps.",
                remedy="Shorten one of them.",
            )

        def factor(now: int) -> float:
            return 1.0 if now < begin else final + (1 - final) * fall(min((now - begin) / falling, 1.0))

        return _warmed(span, warm_up, factor)

    return Schedule(_text("warm_up_stable_decay", warm_up=warm_up, decay=decay, final=final, shape=shape), plan)


def inverse_square_root(warm_up: Length = 0, timescale: Length | None = None) -> Schedule:
    """1 / sqrt(1 + (steps since the warm-up) / timescale); with the default, sqrt(w / step) after w steps of warm-up.

    Args:
        timescale: length in which the rate falls to 1 / sqrt(2); that of the warm-up unless given.

    Raises:
        UsageError: when the factor is made, if there is neither a warm-up nor a timescale.
    """

    def plan(span: Span) -> Factor:
        rising = span.count(warm_up, "warm_up")
        scale = rising if timescale is None else span.count(timescale, "timescale")
        scale = _positive(scale, "timescale", warm_up if timescale is None else timescale)
        return _warmed(span, warm_up, lambda now: 1 / math.sqrt((now - rising + scale) / scale))

    return Schedule(_text("inverse_square_root", warm_up=warm_up, timescale=timescale), plan)


def from_function(function: Factor, text: str = "") -> Schedule:
    """A schedule of one's own: a pure function of the steps made before, which multiplies the base rate."""
    return Schedule(text or f"from_function({_named(function)})", lambda span: function)


def _falling(name: str, warm_up: Length, final: float) -> Schedule:
    fall = _FALLS[name]

    def plan(span: Span) -> Factor:
        rising = span.count(warm_up, "warm_up")
        falling = span.total(name) - rising

        def factor(now: int) -> float:
            return final + (1 - final) * fall(min((now - rising) / falling, 1.0))

        return _warmed(span, warm_up, factor)

    return Schedule(_text(name, warm_up=warm_up, final=final), plan)


def _warmed(span: Span, warm_up: Length, after: Factor) -> Factor:
    """`after` behind a warm-up."""
    rising = span.count(warm_up, "warm_up")
    if span.steps is not None and rising >= span.steps:
        raise UsageError(
            f"warm_up = {warm_up!r} is {rising} steps; the whole training has {span.steps}.",
            remedy="Shorten the warm-up.",
        )
    return (lambda now: (now + 1) / (rising + 1) if now < rising else after(now)) if rising else after


def _fall(shape: str) -> Callable[[float], float]:
    if shape not in _FALLS:
        raise UsageError(f"shape = {shape!r} is not known.", remedy=f"Take one of {', '.join(_FALLS)}.")
    return _FALLS[shape]


def _positive(steps: int, name: str, length: Length) -> int:
    if steps < 1:
        raise UsageError(f"{name} = {length!r} is no whole step.", remedy=f"Give {name} at least one step.")
    return steps


def _named(function: Any) -> str:
    # Never the address of an object: the text has to be the same in a resumed run.
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def _text(name: str, **settings: Any) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
