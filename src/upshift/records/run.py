"""One training run: the fold of its append-only log."""

from __future__ import annotations

from typing import Literal

from upshift.records.quantity import Quantity, Record

#: Text of an event of metrics that were found in what the script prints.
PRINTED = "printed"


class Window(Record, frozen=True, gc=False):
    """Steps [first, first + n) summed: seconds per phase, and the losses seen (None: no loss read).

    `seconds` are those of training, without `evaluation` (work without gradients) and `checkpoint`.
    """

    first: int
    n: int
    at: float
    """Seconds since the run started, at the end of the window."""
    seconds: float
    phases: dict[str, float] = {}
    loss: float | None = None
    last_loss: float | None = None
    evaluation: float = 0.0
    checkpoint: float = 0.0


class Event(Record, frozen=True):
    """Something worth a line: a technique applied, one taken off, a guard that fired."""

    at: float
    kind: str
    text: str
    step: int | None = None
    values: dict[str, float | None] = {}
    """Metrics of an evaluation after `step` updates; None where a value is not finite."""


class Run(Record, frozen=True):
    """A run of a script, with or without a plan."""

    id: str
    script: str
    arguments: tuple[str, ...]
    started: str
    status: Literal["running", "finished", "failed", "interrupted", "unknown"]
    exit_code: int | None = None
    seconds: float | None = None
    plan: str = ""
    techniques: dict[str, dict[str, bool | int | float | str]] = {}
    steps: int = 0
    windows: tuple[Window, ...] = ()
    events: tuple[Event, ...] = ()
    environment: dict[str, str] = {}
    guard_fired: bool = False
    torn_lines: int = 0
    """Lines of the log that could not be read (a last line torn by a kill)."""
    steps_planned: int | None = None
    """How many steps the run will make in all; None: nothing says so."""
    earlier: tuple[float, ...] = ()
    """Seconds of each earlier start recorded in the same folder; `seconds` is the last one's, every `at` its own's."""
    epochs: Quantity | None = None
    """Passes over the training data so far, those of earlier starts of a job included; None: not recorded."""
    schema: int = 1
