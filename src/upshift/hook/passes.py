"""Passes over the data, as a run shows them: epochs of training, and the time of a sample in evaluation."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from upshift.measure.inference import InferenceTime
from upshift.records.quantity import Quantity

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: A count of epochs this close to a whole number of passes begun is that number: a last batch may be left over.
WHOLE = 0.02
#: More evaluations than these a step are part of the step: a teacher, or a network of targets.
APART = 0.6


class Passes:
    """Counts epochs and times evaluations. Looked at between windows only."""

    def __init__(self) -> None:
        self._lengths: dict[int, tuple[int, int]] = {}
        """Number of a loader -> batches of a pass, samples of its data."""
        self._looked = 0
        self.timed = InferenceTime()

    # -- epochs -------------------------------------------------------------------------------------------------

    def look(self, watch: Watch) -> None:
        """Ask new loaders for their length: they may be gone when the script ends."""
        while self._looked < len(watch.loaders):
            loader: Any = watch.loaders[self._looked]()
            self._looked += 1
            if loader is not None:
                with contextlib.suppress(Exception):  # a length is the script's own code, or there is none
                    self._lengths[self._looked] = len(loader), len(loader.dataset)

    def epochs(self, watch: Watch, steps: int) -> Quantity | None:
        """Passes over the training data in `steps` updates; None where no loader of known length was trained from.

        Batches are counted in the steps that are timed, so between two whole passes it is an estimate. A script that
        makes a new loader for each epoch has several of one size, which are added up.
        """
        found: dict[int, float] = {}
        for number, (_, batches) in watch.waits.items():
            length, samples = self._lengths.get(number, (0, 0))
            if length and batches:
                found[samples] = found.get(samples, 0.0) + batches / length
        if not found or not steps:
            return None
        # Of several sets of data at once, the one that went round least often is the largest or the slowest: the
        # one with the most samples is what people call an epoch.
        share = found[max(found)] * steps / max(watch.timed_steps, 1)
        whole = round(share)
        if whole and abs(share - whole) <= WHOLE * whole + 0.5 * WHOLE:
            return Quantity(float(whole), "epochs", n=whole)
        return Quantity(share, "epochs", basis="estimated")

    # -- evaluation ---------------------------------------------------------------------------------------------

    def apart(self, steps: int) -> bool:
        """Whether work without gradients is evaluation, now and then, and no part of each of the `steps`."""
        return self.timed.evaluations <= max(APART * steps, 3)

    def inference(self, steps: int) -> InferenceTime | None:
        """The time of a sample in evaluation; None: none was seen, or it is part of each of the `steps`."""
        return self.timed if self.timed.found is not None and self.apart(steps) else None
