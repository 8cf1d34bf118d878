"""One bottleneck or mistake, with its evidence and what would help."""

from __future__ import annotations

from typing import Literal

from upshift.records.quantity import Quantity, Record


class Finding(Record, frozen=True):
    """A bottleneck: evidence, share of the step, what would help and the gain that predicts.

    `gain` is a predicted speed-up of the training step (1.0 = none), `rests_on` says what it is computed from.
    `techniques` are registry names; `edit` names a line of the user's script where only an edit helps.
    """

    rule: str
    title: str
    evidence: str
    share: Quantity
    helps: str
    gain: Quantity
    rests_on: str
    techniques: tuple[str, ...] = ()
    edit: str = ""
    severity: Literal["major", "minor", "note"] = "minor"
