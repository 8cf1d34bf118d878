"""Training without autograd's anomaly detection, where a script left it on.

Anomaly detection is a flag of the process. It makes every operation of the forward pass record where it was called, and
looks for NaN in every gradient of the backward pass. It changes no number.

Source: docs.pytorch.org/docs/stable/autograd.html#anomaly-detection
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, Moment, NoEffect, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied

if TYPE_CHECKING:
    import torch


class _Off(BaseApplied):
    """Anomaly detection is off, until `close`, or until the script itself switches it on again."""

    note = "anomaly detection is off"

    def __init__(self) -> None:
        import torch

        self._looks_for_nan = torch.is_anomaly_check_nan_enabled()
        self._off = False
        self._given_up = False
        self.switch(True)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the flag to a script that manages it: `with detect_anomaly()` sets it back at its end."""
        import torch

        if self._off and torch.is_anomaly_enabled():
            self._given_up = True

    def switch(self, on: bool) -> None:
        import torch

        if not self._given_up:
            self._off = on
            torch.autograd.set_detect_anomaly(not on, self._looks_for_nan)

    def effect(self) -> NoEffect | None:
        return NoEffect("the script switches anomaly detection on again and again") if self._given_up else None

    def close(self) -> None:
        if self._off:
            self.switch(False)


class AnomalyOff:
    """Switches autograd's anomaly detection off."""

    card: ClassVar[Card] = Card(
        name="anomaly_off",
        summary="trains without autograd's anomaly detection, where the script left it on",
        source="docs.pytorch.org/docs/stable/autograd.html#anomaly-detection",
        sites=("optimizer_created", "step"),
        numerics=Numerics.BITWISE,
        switchable="live",
        targets=("forward", "backward"),
        details=(
            "A backward pass that gives NaN then raises no error. The guard of `upshift run` sees a loss that is not\n"
            "finite; it takes this technique off, and from the next step on anomaly detection is back."
        ),
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """What is recorded and looked at does not enter a number."""
        return Numerics.BITWISE

    def check(self, seen: Measurement) -> Verdict:
        """A measurement does not say whether anomaly detection was on, so that no gain can be predicted."""
        if not seen.facts.optimizers:
            return Verdict(False, "no optimizer was seen")
        return Verdict(True, "whether anomaly detection is on shows when the script runs")

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts before the first optimizer step; there a `with` block around a backward pass has ended."""
        import torch

        if not isinstance(moment, OptimizerSeen):
            return None
        if not torch.is_anomaly_enabled():
            return NoEffect("anomaly detection is not on")
        return _Off()
