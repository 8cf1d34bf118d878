"""Measurements built by hand: a plain one on which no rule speaks, and one in which everything is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from upshift.records import (
    Anatomy,
    Floor,
    LineCost,
    LoaderFacts,
    Measurement,
    ModelFacts,
    OptimizerFacts,
    Phase,
    Quantity,
    ScriptFacts,
    unknown,
)
from upshift.records.measurement import PHASES

STEP = 0.1


def q(value: float | None, unit: str = "s", spread: float = 0.05) -> Quantity:
    if value is None:
        return unknown(unit)
    return Quantity(value=value, unit=unit, low=value * (1 - spread), high=value * (1 + spread), n=50)


def phases(shares: Mapping[str, float | None], step: float | None = STEP) -> tuple[Phase, ...]:
    """Phases with these shares; those not named are unknown."""
    found = []
    for name in PHASES:
        share = shares.get(name)
        seconds = None if share is None or step is None else share * step
        note = "not applicable on CPU" if name in ("h2d", "sync") and share is None else ""
        found.append(Phase(name=name, seconds=q(seconds), share=q(share, "fraction"), note=note))
    return tuple(found)


PLAIN = {"data": 0.01, "forward": 0.3, "loss": 0.02, "backward": 0.64, "optimizer": 0.02, "other": 0.01}


def anatomy(shares: Mapping[str, float | None] = PLAIN, **changes: Any) -> Anatomy:
    step = changes.pop("step", q(STEP))
    fields: dict[str, Any] = {
        "step": step,
        "phases": phases(shares, step.value),
        "steps_seen": 110,
        "warmup_steps": 10,
        "warmup": q(1.0),
        "startup": q(2.0),
        "evaluation": unknown("s"),
        "checkpointing": unknown("s"),
        "micro_batches": q(1.0, "batches"),
        "samples": q(32.0, "samples"),
    }
    return Anatomy(**{**fields, **changes})


def floor(**changes: Any) -> Floor:
    """Half the step is arithmetic: no rule has anything to say."""
    fields: dict[str, Any] = {
        "flops": q(5e9, "FLOP", 0),
        "bytes_moved": Quantity(value=1e6, unit="B", low=1e6, high=2e7, n=1),
        "dtype": "float32",
        "peak_flops": q(1e11, "FLOP/s"),
        "best_dtype": "float32",
        "best_peak_flops": q(1e11, "FLOP/s"),
        "bandwidth": q(1e10, "B/s"),
        "mfu": q(0.5, "fraction"),
        "arithmetic_floor": q(0.05),
        "bandwidth_floor": q(1e-4),
    }
    return Floor(**{**fields, **changes})


def model(**changes: Any) -> ModelFacts:
    fields: dict[str, Any] = {
        "name": "Net",
        "parameters": 1000,
        "dtypes": ("float32",),
        "device": "cpu",
        "layers": {"Linear": 3, "ReLU": 2},
    }
    return ModelFacts(**{**fields, **changes})


def optimizer(**changes: Any) -> OptimizerFacts:
    fields: dict[str, Any] = {
        "name": "AdamW",
        "parameters": 1000,
        "tensors": 6,
        "device": "cpu",
        "dtypes": ("float32",),
    }
    return OptimizerFacts(**{**fields, **changes})


def loader(**changes: Any) -> LoaderFacts:
    fields: dict[str, Any] = {
        "name": "DataLoader",
        "dataset": "Pictures",
        "training": True,
        "workers": 0,
        "batch_size": 32,
        "samples": 1000,
        "iterable": False,
    }
    return LoaderFacts(**{**fields, **changes})


def facts(**changes: Any) -> ScriptFacts:
    fields: dict[str, Any] = {
        "models": (model(),),
        "optimizers": (optimizer(fused=True),),
        "loaders": (loader(),),
        "loss_seen": True,
        "threads": 4,
        "cores": 4,
        "compiler": True,
        "allocator": "glibc",
        "bf16_native": False,
    }
    return ScriptFacts(**{**fields, **changes})


def line(text: str, share: float, kind: str = "host", function: str = "train", number: int = 10) -> LineCost:
    return LineCost(
        file="/home/u/train.py",
        line=number,
        function=function,
        text=text,
        kind=kind,  # type: ignore[arg-type]
        share=Quantity(value=share, unit="fraction", low=share * 0.8, high=min(1.0, share * 1.2), n=900),
        seconds=q(share * 10),
    )


def measurement(**changes: Any) -> Measurement:
    fields: dict[str, Any] = {
        "script": "train.py",
        "arguments": (),
        "created": "2026-01-01",
        "anatomy": anatomy(),
        "facts": facts(),
        "floor": floor(),
    }
    return Measurement(**{**fields, **changes})


def nothing_known() -> Measurement:
    """Facts at their defaults, every figure unknown."""
    empty = Anatomy(
        step=unknown("s"),
        phases=phases({}, None),
        steps_seen=0,
        warmup_steps=0,
        warmup=unknown("s"),
        startup=unknown("s"),
        evaluation=unknown("s"),
        checkpointing=unknown("s"),
        micro_batches=unknown("batches"),
        samples=unknown("samples"),
    )
    blank = {field: unknown("1") for field in Floor.__struct_fields__ if field not in ("dtype", "best_dtype", "note")}
    return Measurement(
        script="train.py",
        arguments=(),
        created="",
        anatomy=empty,
        facts=ScriptFacts(),
        floor=Floor(dtype="unknown", best_dtype="unknown", **blank),
    )


def replaced(m: Measurement, **changes: Any) -> Measurement:
    return msgspec.structs.replace(m, **changes)
