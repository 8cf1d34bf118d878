"""The state after the last update, for a thread that has to save it while the next update is under way.

Parameters, the optimizer's state and averages change in the update itself only, at its end: while the loop is in a
forward or backward pass, waits for data or evaluates, they are those of the boundary. Buffers and random states change
in a forward pass, so that a note of them is taken before an update that may be long: the first ones of a process, those
of a batch of a new size (a compiler may go to work), all where updates are slow, and before evaluations. A fast loop
takes none.

    at rest      between two updates: the state is that of the boundary
    computing    in gradients or an evaluation: it is, with the note
    changing     in the optimizer's step, or in a save: nobody can know

The loop announces each change of phase, then looks whether the thread has taken the state (`taken`); the thread takes
it, then looks at the phase. So at least one of them sees the other: the loop waits, or the thread gives the state back.
A forward pass that changes parameters itself is told by their version counters; such a state is not saved.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from upshift.engine.loop import CHANGING, COMPUTING, RESTING, Halted

if TYPE_CHECKING:
    from upshift.engine.note import Note
    from upshift.engine.training import Training

#: Updates at the beginning of a process that a note is taken for.
FIRST = 3

#: Updates are slow from so many seconds on; a note may cost this share of one; what it costs is forgotten by this
#: factor at each look at the clock without one.
SLOW, SHARE, FADE = 0.25, 0.005, 0.9

#: Sizes of a batch that are remembered.
SIZES = 1024


class Boundary:
    """What can be saved of one training at any moment, and by whom.

    `phase` and `note` are the loop's to set. `taken`: the other thread works on the state, the loop has to wait.
    """

    def __init__(self, t: Training) -> None:
        self._t = t
        self.phase = CHANGING
        self.taken = False
        self.kept = ""
        """What was saved in the middle of an update, in words."""
        self.on = t.alone and t.saving.store is not None and t.settings.signals
        self.note: Note | None = None
        self.sizes: set[int] = set()
        self.noting = self.on
        self._first = FIRST
        self._costs: list[float] = []
        self._evaluations = -1.0
        self._free = threading.Event()

    # -- the loop -----------------------------------------------------------------------------------------------

    def enter(self, phase: int) -> None:
        """From here on the loop is in this phase. Raises Halted as `give_way` does."""
        self.phase = phase
        if self.taken:
            self.give_way()

    def give_way(self) -> None:
        """Wait while the state is being saved.

        Raises:
            Halted: it was saved, and the training is over.
        """
        self._free.wait()
        if self.kept:
            raise Halted

    def close(self) -> None:
        """The loop is over, or ends with an error; waits while the state is being saved."""
        self.phase = CHANGING
        if self.taken:
            self._free.wait()

    def rest(self) -> None:
        """A boundary is reached: take a note where the next update may be long."""
        self.phase, self.note = RESTING, None
        if self.noting:
            self.take_note()
            self._first -= 1
            if self._first <= 0:
                self.noting = False  # until a look at the clock says otherwise

    def new_size(self, samples: int) -> None:
        """The next batch has a size that this process has not seen."""
        if len(self.sizes) < SIZES:
            self.sizes.add(samples)
            # The position of a stream is that behind this batch already.
            if self.on and self._t.parts.data.kind != "stream":
                self.take_note()

    def paced(self, seconds: float) -> None:
        """An update takes so long on average."""
        if self._first <= 0:
            self.noting = self.on and seconds > SLOW and self._cost < SHARE * seconds
            if not self.noting:
                # What was too much once is tried again after a while: the machine may have been busy.
                self._costs = [FADE * cost for cost in self._costs]

    def before_evaluation(self) -> None:
        """An evaluation begins: it may change buffers, and holds other weights while it lasts."""
        t = self._t
        exchanges = callable(getattr(t.optimizer, "eval", None))
        if exchanges:
            self.note = None  # its weights would be those that are evaluated
        if not self.on or self.note is not None or 0.0 <= self._evaluations < max(SLOW, self._cost / SHARE):
            return
        if not exchanges:
            self.take_note()
        elif self._evaluations < 0.0 and not t.saving.holds(t.progress.step):
            # Weights that the optimizer alone can bring back: they have to be on disk.
            self.enter(CHANGING)
            t.saving.save(t)
            self.phase = RESTING

    def after_evaluation(self, seconds: float) -> None:
        """It took so long; what came of it is added to the state now."""
        self._evaluations = seconds
        self.enter(CHANGING)

    def take_note(self) -> None:
        """Remember what the next forward pass changes."""
        began = time.perf_counter()
        try:
            self.note = self._t.saving.note(self._t)
        except RuntimeError:
            self.note, self.on, self.noting = None, False, False  # no memory for it: saved is between updates only
        self._costs = [*self._costs[-2:], time.perf_counter() - began]

    @property
    def _cost(self) -> float:
        """Seconds that a note takes; the least of the last ones, since a busy machine only adds."""
        return min(self._costs, default=0.0)

    def computes(self) -> None:
        """The averaged weights were put in for an evaluation, or taken out again: that was no change of the state."""
        if self.note is not None:
            self.note.stamp()
        self.phase = COMPUTING

    def failed(self, error: Exception) -> bool:
        """Whether this error came after somebody asked to stop, who may have killed a compiler, too.

        Then what belongs to the last update is saved, where that can be, and the training is over.
        """
        t = self._t
        if not (t.stop.asked and t.alone):
            return False
        phase = self.phase
        self.close()
        self.kept = self.kept or self._saved(phase, 60.0)
        if not self.kept:
            self.kept = "the last checkpoint stands"
            t.saving.leave_it()
        t.say("stop", f"the update under way failed after the request to stop ({type(error).__name__}: {error})")
        return True

    # -- the thread of the request to stop ----------------------------------------------------------------------

    @property
    def write_seconds(self) -> float:
        """Seconds that the last save took to write."""
        return self._t.saving.write_seconds

    def save(self, seconds: float) -> str:
        """Save what belongs to the last update, and say so; empty where that is not possible at this moment."""
        self._free.clear()
        self.taken = True
        try:
            self.kept = self._saved(self.phase, seconds)
        except Exception as error:
            self._t.settings.say(f"not saved in the middle of an update: {type(error).__name__}: {error}")
        finally:
            if not self.kept:
                self.taken = False
            # Where the process ends now, the loop must not go on meanwhile.
            if not (self.kept and self._t.settings.process_ends):
                self._free.set()
        return self.kept

    def record(self, code: int, how: str) -> None:
        """The last words of the record."""
        self._t.recorder.end(code, how, self._t.progress.step)

    def _saved(self, phase: int, seconds: float) -> str:
        t, saving = self._t, self._t.saving
        if phase == CHANGING:
            return ""
        step = t.progress.step
        text = f"stopped after step {step:,}, without the end of what was under way"
        # Ranks are in the same update; those that have left cannot be waited for any more.
        if (t.alone or t.settings.process_ends) and saving.holds(step, seconds):
            return text
        if not t.alone:
            return ""
        note = self.note
        if note is None and phase == RESTING and self._draws_nothing:
            note = saving.note(t)
        if note is None or note.step != step or not saving.write(note, seconds, self._originals()):
            return ""
        return text

    @property
    def _draws_nothing(self) -> bool:
        """Whether waiting for data leaves the random streams of this process alone."""
        data = self._t.parts.data
        workers = getattr(getattr(data, "loader", None), "num_workers", 0)
        return data.kind == "tensors" or (data.kind == "map" and workers > 0)

    def _originals(self) -> dict[int, Any]:
        average = self._t.average
        return average.originals() if average is not None else {}
