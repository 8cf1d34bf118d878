"""Targets that leave a little probability to the other classes.

Idea: the loss against one certain class is never satisfied and drives logits apart without end; with a share of the
target spread evenly over all classes it is, which regularises and often generalises better.
Limits: acts on `cross_entropy` with class indices, as a function or as `nn.CrossEntropyLoss`, while training. Soft
targets, a smoothing of the script's own, losses written out by hand and calls inside regions the script compiles stay
as they are. The probabilities the model learns are less sharp, which a metric of calibration or likelihood sees.

Source: Szegedy et al. 2015, "Rethinking the Inception Architecture" (arXiv:1512.00567), section 7.
"""

from __future__ import annotations

from typing import Any, ClassVar

from upshift.records.measurement import Measurement, ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Applied, Card, LossFunctionSeen, Moment, NoEffect, Numerics, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec


def obstacle(arguments: dict[str, Any]) -> str:
    """Why a call of `cross_entropy` with these bound arguments is left alone, or the empty string."""
    if arguments.get("label_smoothing"):
        return "the script smooths its labels itself"
    target: Any = arguments.get("target")
    if not hasattr(target, "is_floating_point") or target.is_floating_point():
        return "the targets are probabilities, not class indices"
    return ""


class _Smoothing(BaseApplied):
    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._acted = False
        self._why = "no loss was computed"
        self.note = (
            f"label_smoothing={smoothing:g} in training; the training loss shown and recorded is the smoothed one"
        )

    def before_loss(self, arguments: dict[str, Any]) -> None:
        if reason := obstacle(arguments):
            self._why = reason
            return
        arguments["label_smoothing"] = self._smoothing
        self._acted = True

    def switch(self, on: bool) -> None:
        """Nothing is kept: while it is off, it is not asked."""

    def effect(self) -> NoEffect | None:
        return None if self._acted else NoEffect(self._why)


class LabelSmoothing:
    """`label_smoothing` for the cross entropy of the training."""

    card: ClassVar[Card] = Card(
        name="label_smoothing",
        summary="Smooths the targets of the cross entropy while training.",
        source="Szegedy et al. 2015 (arXiv:1512.00567); torch.nn.functional.cross_entropy(label_smoothing=)",
        sites=("loss_function", "loss"),
        numerics=Numerics.CHANGES_TRAINING,
        switchable="live",
        targets=("loss",),
        details=(
            "Weights of classes, ignore_index and reduction stay the script's. A loss computed without gradients or "
            "while evaluating is not smoothed. The training loss is another quantity and reads higher."
        ),
        settings={
            "smoothing": SettingSpec(0.1, "share of the target that is spread over all classes", choices=(0.05, 0.1))
        },
    )

    def numerics(self, settings: dict[str, Setting], facts: ScriptFacts) -> Numerics:
        """Another loss."""
        return Numerics.CHANGES_TRAINING

    def check(self, seen: Measurement) -> Verdict:
        """Applies to a training with a loss; which loss function it is shows at its first call."""
        if not seen.facts.models or not seen.facts.loss_seen:
            return Verdict(False, "no model with a loss was seen")
        return Verdict(
            True,
            "a loss was seen; whether it is a cross entropy over class indices shows when it is computed",
            candidates=({"smoothing": 0.1}, {"smoothing": 0.05}),
        )

    def at(self, moment: Moment, settings: dict[str, Setting]) -> Applied | NoEffect | None:
        """Acts on cross entropy."""
        if not isinstance(moment, LossFunctionSeen) or moment.name != "cross_entropy":
            return None
        return _Smoothing(float(settings["smoothing"]))
