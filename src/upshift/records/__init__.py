"""The record nouns: frozen, versioned, serialisable. No torch, nothing that measures."""

from upshift.records.finding import Finding
from upshift.records.measurement import (
    Anatomy,
    Floor,
    LineCost,
    LoaderFacts,
    Measurement,
    ModelFacts,
    OptimizerFacts,
    Phase,
    ScriptFacts,
)
from upshift.records.plan import Kept, Plan, Rejected
from upshift.records.quantity import Quantity, unknown
from upshift.records.run import Run
from upshift.records.trial import Pairing, Proof, Trial, TuneReport

__all__ = [
    "Anatomy", "Finding", "Floor", "Kept", "LineCost", "LoaderFacts", "Measurement", "ModelFacts",
    "OptimizerFacts", "Pairing", "Phase", "Plan", "Proof", "Quantity", "Rejected", "Run", "ScriptFacts",
    "Trial", "TuneReport", "unknown",
]  # fmt: skip
