"""The error tree. Every error names the remedy; the CLI prints both and exits with `exit_code`.

UpshiftError                 1   anything upshift itself refuses or cannot do
├── UsageError               2   a wrong command line, a missing script
│   ├── EmptyDataError           data without samples
│   ├── BatchTooLargeError       a global batch larger than the data
│   └── DataChangedError         a run resumed with other data, or read in another way
├── PlanError                3   a plan that cannot be read, or is from another version
├── NoTrainingError          4   the script ran, but no training step was seen
├── ScriptFailedError        5   the script crashed or ended before enough was seen
├── EnvironmentError_        6   disk full, read-only folder, missing compiler
├── NotIsolatedError         7   a trial could not be kept away from the user's files
├── MissingExtraError        8   an optional package is not installed
├── NotShownError            9   `verify`: the plan is worse, or was not shown to be as good
├── CheckpointError          10  a checkpoint that cannot be written, or cannot be read and trusted
│   ├── InUseError           10  another process owns the run folder
│   └── ResumeError          10  a run folder that holds another training
├── DoesNotFitError          13  `tune --fit`: nothing tried needs so little memory
├── TrainingError            12  a training that cannot go on: its loss is not finite, whatever is left out
├── DataError                11  data that cannot be read: bad samples beyond the budget, loader workers that die
├── DistributedError         75  a process that trains together with this one is gone or stands still: try again
└── RecordError              3   a record that cannot be read

`run` passes the script's own exit code through. 130 is Ctrl-C.
"""

from __future__ import annotations


class UpshiftError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what happened, one sentence.
        remedy: what the person can do about it, one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(UpshiftError):
    """A wrong command line: no such script, an option in the wrong place."""

    exit_code = 2


class EmptyDataError(UsageError):
    """Data without samples."""


class BatchTooLargeError(UsageError):
    """A global batch larger than the data."""


class DataChangedError(UsageError):
    """A run is resumed with data of another length or kind, or with another number of workers where that matters."""


class PlanError(UpshiftError):
    """A plan that is not TOML, has an unknown key, type or technique, or another schema version."""

    exit_code = 3


class NoTrainingError(UpshiftError):
    """The script ran but no training step (a backward pass and an optimizer step) was seen."""

    exit_code = 4


class ScriptFailedError(UpshiftError):
    """The script crashed, hung or ended before enough was seen."""

    exit_code = 5


class EnvironmentError_(UpshiftError):
    """The machine stands in the way: full disk, read-only folder, missing compiler."""

    exit_code = 6


class NotIsolatedError(UpshiftError):
    """A trial could not be kept away from the user's files."""

    exit_code = 7


class MissingExtraError(UpshiftError):
    """An optional package is needed and not installed."""

    exit_code = 8


class NotShownError(UpshiftError):
    """A plan is worse than stock on the user's metric, or was not shown to be as good."""

    exit_code = 9


class DoesNotFitError(UpshiftError):
    """No plan that was tried fits in the memory allowed."""

    exit_code = 13


class CheckpointError(UpshiftError):
    """A checkpoint that cannot be written (disk full, I/O error), or that is damaged, hostile or of another version."""

    exit_code = 10


class InUseError(CheckpointError):
    """Another process owns the run folder, or a newer attempt has taken it over."""


class ResumeError(CheckpointError):
    """The run folder holds another training: another model, other data, another seed; the message says what differs."""


class TrainingError(UpshiftError):
    """A training that cannot go on: the loss is not finite whatever is left out, or one sample is too much memory."""

    exit_code = 12


class DataError(UpshiftError):
    """Data that cannot be read: more bad samples than allowed, or worker processes that die again and again."""

    exit_code = 11


class DistributedError(UpshiftError):
    """A process that trains together with this one did not come, is gone, stands still or holds other values."""

    exit_code = 75


class RecordError(UpshiftError):
    """A record (run, measurement, trial) that cannot be read."""

    exit_code = 3
