"""What a training does about trouble in a step: smaller micro-batches, or back to the last good state.

All ranks have agreed on the trouble before they come here, and do the same about it. Then the epoch is entered anew at
its cursor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from upshift.engine.loop import CHANGING, Again
from upshift.engine.memory import smaller
from upshift.engine.recover import Place
from upshift.errors import TrainingError

if TYPE_CHECKING:
    from upshift.engine.training import Training


class Trouble:
    """Of one training. Public methods raise `Again`, or what keeps the training from going on."""

    def __init__(self, t: Training) -> None:
        self._t = t

    def out_of_memory(self, trouble: BaseException | None) -> NoReturn:
        """Go on with smaller micro-batches, the global batch as it was.

        Raises:
            Again: always, or the error itself where the micro-batch cannot be smaller.
        """
        t = self._t
        size = smaller(t.parts.data.micro_batch)
        if size is None:
            if trouble is not None:
                raise trouble
            raise TrainingError(
                "another rank ran out of memory with one sample at a time.", remedy="Use a smaller model or batch."
            )
        t.parts.data.micro_batch = size
        t.say("memory", f"out of memory at step {t.progress.step + 1}: micro-batches of {size} from here on, "
                        f"the global batch stays {t.job.global_batch}")  # fmt: skip
        t.parts.free_memory()
        raise Again

    def unusable(self, batch: Any, loss: float) -> NoReturn:
        """A loss that is not finite: back to the last good state, without this batch.

        Raises:
            Again: always, or TrainingError where going back does not help.
        """
        t = self._t
        what = f"the loss of step {t.progress.step + 1} is {loss:.6g}, not finite"
        if t.recovery.give_up() and not t.parts.stage.names:
            shown = ", ".join(str(index) for part in batch.parts[:1] for index in part.indices[:8])
            raise TrainingError(
                f"{what}, after going back {t.recovery.tries} times.",
                remedy=f"Lower the learning rate, clip the gradient, or look at the samples of this batch: {shown}, …",
            )
        self.go_back(what, [(t.progress.epoch, t.progress.cursor)], batch.samples)

    def spiked(self, places: list[Place], loss: float, samples: int) -> None:
        """The last losses are far above all before: back to the last good state, without their batches.

        Raises:
            Again: always, unless that was tried too often.
        """
        t = self._t
        if t.recovery.give_up() and not t.parts.stage.names:
            t.spikes.off = True
            t.say("guard", f"losses spike again after going back {t.recovery.tries} times: left as they are now")
            return
        self.go_back(f"the loss has risen to {loss:.6g} within {len(places)} steps", places, samples)

    def go_back(self, what: str, places: list[Place], samples: int) -> NoReturn:
        """Techniques come off first; where none is on, these places are left out from here on.

        Raises:
            Again: always.
        """
        t = self._t
        t.boundary.enter(CHANGING)
        recovery = t.recovery
        if t.parts.stage.names:
            names = ", ".join(t.parts.stage.names)
            t.parts.without_techniques(what)
            t.forward = t.parts.make_forward()
            t.before_step, t.scaling = (), None
            t.say("guard", f"{what}; {names} came off, back to the last good state")
        else:
            recovery.went_back(t.progress.step, places)
            (epoch, first), last = places[0], places[-1][1] + samples - 1
            left_out = f"without samples {first} to {last} of epoch {epoch}"
            t.say("guard", f"{what}; back to the last good state, {left_out}")
        elapsed, off = t.progress.seconds, t.spikes.off
        t.saving.rewind(t)
        t.recovery, t.progress.seconds = recovery, elapsed
        t.spikes.forget()
        t.spikes.off = off
        t.recorder.rewound(t.progress.step)
        raise Again
