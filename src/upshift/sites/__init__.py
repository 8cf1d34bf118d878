"""Sites: the moments in any training that a technique can act on. Raised alike by every adapter."""

from upshift.sites.moments import (
    BackwardSeen,
    LoaderArgs,
    LoaderReady,
    LossFunctionSeen,
    ModelSeen,
    Moment,
    OptimizerSeen,
    ProcessEnv,
    ProcessStart,
)
from upshift.sites.protocol import (
    Applied,
    BackwardApplied,
    Card,
    CheckpointApplied,
    ForwardApplied,
    LossApplied,
    NoEffect,
    Numerics,
    StepApplied,
    Technique,
    Verdict,
)
from upshift.sites.stage import Stage

__all__ = [
    "Applied", "BackwardApplied", "BackwardSeen", "Card", "CheckpointApplied", "ForwardApplied", "LoaderArgs",
    "LoaderReady", "LossApplied", "LossFunctionSeen", "ModelSeen", "Moment", "NoEffect", "Numerics", "OptimizerSeen",
    "ProcessEnv", "ProcessStart", "Stage", "StepApplied", "Technique", "Verdict",
]  # fmt: skip
