"""What the record of a run says beside its steps: metrics that the script logs or prints, its parameters, epochs and
inference time, and the steps it will make."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from upshift.hook.horizon import Horizon
from upshift.hook.passes import Passes
from upshift.hook.printed import Line, Printed
from upshift.measure.steps import StepRecord
from upshift.records.run import PRINTED
from upshift.records.runlog import RunLog

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Metrics are written this often at most, and ever more rarely in a long run: a log holds a few thousand of them.
SECONDS, SHARE = 1.0, 1e-3
#: The count of epochs is written anew when it has grown by this share.
GROWN = 0.1


class Remarks:
    """Writes to the log of a run, at the ends of its windows only."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._metrics: dict[str, float] = {}
        self._written = self._last = -math.inf
        self._told = False
        self._printed: Printed | None = None
        self.passes = Passes()
        self._epochs = 0.0

    def listen(self, watch: Watch) -> None:
        """torch is there: hear what the script prints from now on, and time its evaluations."""
        watch.on_span = self.passes.timed.add
        self._printed = Printed(watch)
        self._printed.install()

    def metrics(self, values: dict[str, float]) -> None:
        """The script logged these; the newest of each name counts."""
        self._metrics.update(values)

    def window(self, record: StepRecord, watch: Watch, steps: int) -> None:
        """A window of steps has ended."""
        if not self._told:
            self._told = True
            with contextlib.suppress(Exception):  # a script's own classes may raise anything when they are looked at
                self._tell(record, watch, steps)
        self.passes.look(watch)
        due = record.at - self._written >= max(SECONDS, SHARE * record.at)
        if self._printed is not None:
            self._printed.look()
            if due or self._printed.due(record.at):
                self._printed.tell(self._heard, record.at)
        if due:
            self.flush(record.at, steps)
            self._tell_epochs(watch, steps, record.at, GROWN)

    def flush(self, at: float, steps: int) -> None:
        """Write the metrics that were logged since."""
        values, self._metrics = self._metrics, {}
        if values:
            self._written = at
            self._write(at, steps, values, "")

    def end(self, at: float, watch: Watch, steps: int) -> None:
        """The script has ended: write what is left, and what can only be said now."""
        self.passes.look(watch)
        if self._printed is not None:
            self._printed.tell(self._heard, at, last=True)
            self._printed.close()
        self.flush(at, steps)
        self._tell_epochs(watch, steps, at, 0.0)
        found = self.passes.inference(steps)
        if found is not None and found.found is not None:
            self._log.append("model", at=at, text=found.told, values={"inference_seconds": found.found.value})
        if self._printed is not None and self._printed.left_out:
            told = f"{self._printed.left_out:,} lines that the script printed were too long or too many to be looked at"
            self._log.append("metrics thinned", at=at, text=told)

    def _heard(self, line: Line, values: dict[str, float]) -> None:
        self._written = max(self._written, line.at)
        self._write(line.at, line.step, values, PRINTED)

    def _write(self, at: float, step: int, values: dict[str, float], text: str) -> None:
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        # A time that goes back would begin a new start of the run.
        self._last = max(self._last, at)
        self._log.append("metrics", at=self._last, text=text, step=step, values=known)

    def _tell_epochs(self, watch: Watch, steps: int, at: float, grown: float) -> None:
        found = self.passes.epochs(watch, steps)
        if found is not None and found.value is not None and found.value > self._epochs * (1.0 + grown):
            self._epochs = found.value
            self._log.append("epochs", at=at, text=found.basis, values={"epochs": found.value})

    def _tell(self, record: StepRecord, watch: Watch, steps: int) -> None:
        models = [model for reference in watch.models if (model := reference()) is not None]
        parameters = {id(p): p.numel() for model in models for p in model.parameters() if p.requires_grad}
        if parameters:
            count = sum(parameters.values())
            self._log.append(
                "model", at=record.at, text=f"{count:,} parameters are trained", values={"parameters": count}
            )
        planned = Horizon.of_main().steps(_batches(watch), record.batches / max(record.steps, 1))
        if planned is not None and planned >= steps:
            self._log.append("planned", steps=planned)


def _batches(watch: Watch) -> int | None:
    """Batches of an epoch of the loader that training waits for."""
    loaders: list[Any] = [loader for reference in watch.loaders if (loader := reference()) is not None]
    training = [loader for loader in loaders if not watch.evaluation_only(loader)]
    try:
        return len(max(training, key=lambda loader: watch.waited(loader)[1]))
    except (TypeError, ValueError, NotImplementedError):
        return None
