"""Measurements as `diagnose` makes them for an estimate, by hand: round numbers, so that results can be reckoned."""

from __future__ import annotations

from typing import Any

from upshift.records import (
    Anatomy,
    LoaderFacts,
    Measurement,
    ModelFacts,
    OptimizerFacts,
    Phase,
    Quantity,
    ScriptFacts,
    unknown,
)
from upshift.records.estimate import DeviceFigures, OfferFigures
from upshift.records.stepwork import Moment, OpWork, StepWork

MIB, GIB = 2.0**20, 2.0**30


def q(value: float | None, unit: str = "s") -> Quantity:
    return unknown(unit) if value is None else Quantity(value=value, unit=unit, n=50)


#: 1 TFLOP/s and 100 GB/s: a product of 1 GFLOP takes 1 ms, 100 MB take 1 ms.
HERE = DeviceFigures(
    name="cpu Test", kind="cpu", flops={"float32": 1e12, "bfloat16": 2e12}, bandwidth=1e11, memory=16 * GIB,
    watts=100.0, watts_idle=20.0, measured=True, source="test",
)  # fmt: skip


def gpu(name: str = "Card", **changes: Any) -> DeviceFigures:
    fields: dict[str, Any] = {
        "name": name, "kind": "gpu", "flops": {"float32": 1e14, "bfloat16": 5e14}, "bandwidth": 1e12,
        "memory": 24e9, "watts": 300.0, "source": "test", "date": "2026",
    }  # fmt: skip
    return DeviceFigures(**{**fields, **changes})


def offer(hour: float | None = 2.0, **changes: Any) -> OfferFigures:
    fields: dict[str, Any] = {"provider": "Cloud", "instance": "one", "count": 1, "hour": hour, "source": "test"}
    return OfferFigures(**{**fields, **changes})


def op(phase: str, seconds: float | None, **changes: Any) -> OpWork:
    fields: dict[str, Any] = {"phase": phase, "name": "mm", "dtype": "float32", "calls": 1, "seconds": seconds}
    return OpWork(**{**fields, **changes})


def work(**changes: Any) -> StepWork:
    """Two products (forward, backward), one elementwise operation and an optimizer, at 32 samples."""
    fields: dict[str, Any] = {
        "device": "cpu", "batch": 32, "parameters": 400 * MIB, "gradients": 400 * MIB, "buffers": 0.0,
        "optimizer_state": 800 * MIB, "trained": 100 * 2**20, "saved": 640 * MIB,
        "moments": (Moment(0.0, 640 * MIB, "forward"), Moment(400 * MIB, 320 * MIB, "backward"),
                    Moment(600 * MIB, 0.0, "optimizer")),
        "moments_low": (Moment(200 * MIB, 320 * MIB, "forward"), Moment(600 * MIB, 160 * MIB, "backward"),
                        Moment(600 * MIB, 0.0, "optimizer")),
        "ops": (
            op("forward", 0.020, scaled_flops=10e9, scaled_bytes=1e8, fixed_bytes=1e8, product=True, low=1.0),
            op("forward", 0.010, name="relu", scaled_bytes=5e8),
            op("backward", 0.040, scaled_flops=20e9, scaled_bytes=2e8, fixed_bytes=2e8, product=True, low=1.0),
            op("optimizer", 0.010, name="add_", fixed_bytes=5e8),
        ),
    }  # fmt: skip
    return StepWork(**{**fields, **changes})


def seen(**changes: Any) -> Measurement:
    """A step of 0.1 s: 10 ms of data, 30 forward, 40 backward, 10 optimizer, 10 other."""
    seconds = {"data": 0.01, "forward": 0.03, "loss": 0.0, "backward": 0.04, "optimizer": 0.01, "other": 0.01}
    step = changes.pop("step", 0.1)
    phases = tuple(Phase(name, q(value), q(value / 0.1, "fraction")) for name, value in seconds.items())
    anatomy = Anatomy(
        step=q(step), phases=phases, steps_seen=100, warmup_steps=5, warmup=q(1.0), startup=q(5.0),
        evaluation=unknown("s"), checkpointing=unknown("s"), micro_batches=q(1.0, "batches"),
        samples=q(32.0, "samples"),
    )  # fmt: skip
    facts = ScriptFacts(
        models=(ModelFacts(name="Net", parameters=100 * 2**20, dtypes=("float32",), device="cpu", layers={"Linear": 24},
                           repeated={"Block": 12}, repeated_share=0.9),),
        optimizers=(OptimizerFacts(name="AdamW", parameters=100 * 2**20, tensors=48, device="cpu",
                                   dtypes=("float32",)),),
        loaders=(LoaderFacts(name="DataLoader", dataset="Rows", training=True, workers=0, batch_size=32, samples=3200,
                             iterable=False),),
        steps_total=1000,
    )  # fmt: skip
    fields: dict[str, Any] = {"script": "train.py", "arguments": (), "created": "2026-11-22", "anatomy": anatomy,
                              "facts": facts, "work": work()}  # fmt: skip
    return Measurement(**{**fields, **changes})
