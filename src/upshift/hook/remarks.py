"""What the record of a run says beside its steps: metrics that the script logs, parameters, the steps it will make."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

from upshift.hook.horizon import Horizon
from upshift.measure.steps import StepRecord
from upshift.records.runlog import RunLog

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

#: Metrics are written this often at most, and ever more rarely in a long run: a log holds a few thousand of them.
SECONDS, SHARE = 1.0, 1e-3


class Remarks:
    """Writes to the log of a run, at the ends of its windows only."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._metrics: dict[str, float] = {}
        self._written = -math.inf
        self._told = False

    def metrics(self, values: dict[str, float]) -> None:
        """The script logged these; the newest of each name counts."""
        self._metrics.update(values)

    def window(self, record: StepRecord, watch: Watch, steps: int) -> None:
        """A window of steps has ended."""
        if not self._told:
            self._told = True
            with contextlib.suppress(Exception):  # a script's own classes may raise anything when they are looked at
                self._tell(record, watch, steps)
        if record.at - self._written >= max(SECONDS, SHARE * record.at):
            self.flush(record.at, steps)

    def flush(self, at: float, steps: int) -> None:
        """Write the metrics that were logged since."""
        values, self._metrics = self._metrics, {}
        if values:
            self._written = at
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._log.append("metrics", at=at, text="", step=steps, values=known)

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
