"""Lengths of a training as a person says them: `"5 epochs"`, `"10_000 samples"`, `"200 steps"`, `"5 %"`.

A step is one optimizer step, that is one global batch. The last batch of an epoch may be incomplete and is a step like
any other, so an epoch of n samples has ceil(n / global batch) steps, and a length in samples ends with the step that
consumes the last of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from upshift.errors import UsageError

#: Steps as an int, a share of the whole training as a float in 0..1, or a number with its unit as text.
Length = int | float | str

_TEXT = re.compile(
    r"\s*(?P<number>\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*(?P<unit>%|steps?|samples?|epochs?)\s*", re.IGNORECASE
)
_FORMS = 'Write 200, "200 steps", "10_000 samples", "5 epochs", "5 %", or a share such as 0.05.'


@dataclass(frozen=True)
class Span:
    """What lengths are converted with: how long the training is, and what it takes in at each step.

    Args:
        steps: optimizer steps of the whole training; None where the end is not known.
        global_batch: samples of one optimizer step, over all ranks.
        epoch_samples: samples of one epoch; None for a stream without an end.
    """

    steps: int | None
    global_batch: int = 1
    epoch_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "epoch_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}.", remedy=f"Give a {name} of at least 1.")

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps of one epoch, the incomplete last one included."""
        return None if self.epoch_samples is None else -(-self.epoch_samples // self.global_batch)

    def total(self, why: str) -> int:
        """Steps of the whole training.

        Raises:
            UsageError: the end is not known, and `why` needs it.
        """
        if self.steps is None:
            raise UsageError(
                f"{why} needs the length of the whole training, which is not known.",
                remedy="Give the job a number of steps or epochs, or say the length in steps or samples.",
            )
        return self.steps

    def exact(self, length: Length, name: str) -> float:
        """A length in optimizer steps; a share of the whole may come out between two steps.

        Args:
            length: see `Length`. name: what it is the length of, for the error.

        Raises:
            UsageError: no length, a negative one, or one that needs what is not known.
        """
        number, unit = _parsed(length, name)
        if unit == "step":
            return number
        if unit == "%":
            return number / 100 * self.total(f"{name} = {length!r}")
        if unit == "sample":
            return self._of_samples(number)
        if self.epoch_samples is None:
            raise UsageError(
                f"{name} = {length!r} counts epochs, but the number of samples of an epoch is not known.",
                remedy="Say it in steps or samples, or give the data a length.",
            )
        return self._of_samples(number * self.epoch_samples)

    def count(self, length: Length, name: str) -> int:
        """A length in whole optimizer steps; a share of the whole is rounded to the nearest. Errors as `exact`."""
        return round(self.exact(length, name))

    def _of_samples(self, samples: float) -> float:
        """The steps after which that many samples have been consumed."""
        samples = math.ceil(samples - 1e-9)
        if self.epoch_samples is None or self.epoch_steps is None:
            return -(-samples // self.global_batch)
        epochs, rest = divmod(samples, self.epoch_samples)
        return epochs * self.epoch_steps + -(-rest // self.global_batch)


def _parsed(length: Length, name: str) -> tuple[float, str]:
    """The number and its unit: step, sample, epoch or %."""
    if isinstance(length, str):
        found = _TEXT.fullmatch(length)
        if not found:
            raise UsageError(f"{name} = {length!r} is not a length.", remedy=_FORMS)
        number, unit = float(found["number"]), found["unit"].lower().rstrip("s")
        if unit in ("step", "sample") and number != int(number):
            raise UsageError(f"{name} = {length!r} is not a whole number of {unit}s.", remedy=_FORMS)
        if unit == "%" and number > 100:
            raise UsageError(f"{name} = {length!r} is more than the whole training.", remedy=_FORMS)
        return number, unit
    if isinstance(length, bool) or not isinstance(length, int | float) or not 0 <= length < math.inf:
        raise UsageError(f"{name} = {length!r} is not a length.", remedy=_FORMS)
    if isinstance(length, int):
        return float(length), "step"
    if length > 1:
        raise UsageError(f"{name} = {length!r} is more than the whole training.", remedy=_FORMS)
    return length * 100, "%"
