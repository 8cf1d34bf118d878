"""Builders of realistic records with made-up figures: a small image classifier that waits for its data."""

from __future__ import annotations

import math
import random

from upshift.records import (
    Anatomy,
    Finding,
    Floor,
    Kept,
    LineCost,
    LoaderFacts,
    Measurement,
    ModelFacts,
    OptimizerFacts,
    Pairing,
    Phase,
    Plan,
    Proof,
    Quantity,
    Rejected,
    Run,
    ScriptFacts,
    Trial,
    TuneReport,
    unknown,
)
from upshift.records.plan import Fingerprint
from upshift.records.quantity import estimated
from upshift.records.run import Event, Window
from upshift.records.trial import UpdateCheck

STEP = 0.0614
SHARES = {
    "data": 0.412,
    "forward": 0.196,
    "loss": 0.011,
    "backward": 0.287,
    "optimizer": 0.061,
    "other": 0.033,
}

#: Names that must do no harm wherever they are drawn.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "train\x1b[31m\x1b]0;owned\x07\x1b[2J.py",
    "\u202egnp.exe\x00\x9b31m",
    "x" * 600,
    "训练/模型 é 🧪.py",
    "[bold red]not markup[/bold red] :smile:",
    "{{ 7 * 7 }}{% raw %}",
)


def seconds(value: float, spread: float = 0.01, n: int = 212) -> Quantity:
    return Quantity(value, "s", value * (1 - spread), value * (1 + spread), n)


def share(value: float) -> Quantity:
    return Quantity(value, "fraction", value * 0.98, value * 1.02, 212)


def anatomy() -> Anatomy:
    phases = [Phase(name, seconds(STEP * part, 0.02), share(part)) for name, part in SHARES.items()]
    phases.insert(1, Phase("h2d", unknown("s"), unknown("fraction"), "not applicable on CPU"))
    return Anatomy(
        step=seconds(STEP),
        phases=tuple(phases),
        steps_seen=232,
        warmup_steps=20,
        warmup=Quantity(2.31, "s", n=20),
        startup=Quantity(3.42, "s", n=1),
        evaluation=Quantity(1.87, "s", n=2),
        checkpointing=unknown("s"),
        micro_batches=Quantity(1.0, "micro-batches", n=212),
        samples=Quantity(64.0, "samples", n=212),
    )


def floor() -> Floor:
    return Floor(
        flops=estimated(1.94e9, "FLOP"),
        bytes_moved=estimated(4.1e8, "B"),
        dtype="float32",
        peak_flops=Quantity(9.4e10, "FLOP/s", 9.2e10, 9.5e10, 12),
        best_dtype="bfloat16",
        best_peak_flops=Quantity(1.71e11, "FLOP/s", 1.66e11, 1.74e11, 12),
        bandwidth=Quantity(1.83e10, "B/s", 1.79e10, 1.86e10, 12),
        mfu=estimated(1.94e9 / STEP / 9.4e10, "fraction"),
        arithmetic_floor=estimated(1.94e9 / 9.4e10, "s"),
        bandwidth_floor=estimated(4.1e8 / 1.83e10, "s"),
        note="Bytes moved are counted from tensor sizes and ignore caches.",
    )


def measurement(script: str = "examples/images.py", arguments: tuple[str, ...] = ("--epochs", "3")) -> Measurement:
    def line(number: int, function: str, text: str, part: float, kind: str = "data") -> LineCost:
        return LineCost(script, number, function, text, kind, share(part), seconds(STEP * part))  # type: ignore[arg-type]

    return Measurement(
        script=script,
        arguments=arguments,
        created="2026-11-21T11:58:02Z",
        anatomy=anatomy(),
        facts=ScriptFacts(
            models=(ModelFacts("SmallNet", 272_474, ("float32",), "cpu", {"Conv2d": 19, "BatchNorm2d": 19}),),
            optimizers=(OptimizerFacts("AdamW", 272_474, 65, "cpu", ("float32",), fused=False),),
            loaders=(LoaderFacts("DataLoader", "Digits", True, 0, 64, 12_000, False),),
            threads=2,
            cores=2,
        ),
        floor=floor(),
        lines=(
            line(41, "__getitem__", "image = augment(Image.open(path))", 0.318),
            line(44, "__getitem__", "return to_tensor(image), label", 0.071),
            line(97, "train", "running += loss.item()", 0.012, "host"),
        ),
        overhead=Quantity(0.004, "fraction", 0.002, 0.006, 40),
        machine={
            "cpu": "8-core x86-64 with AVX2 (2 in use)",
            "memory": "7.7 GiB",
            "torch": "2.13.0+cpu",
            "python": "CPython 3.12.4",
            "os": "Linux 6.8",
        },
        isolation="user-namespace overlay: the script's writes went to a scratch layer",
        notes=("Evaluation ran twice and is not part of the step.",),
    )


def findings() -> tuple[Finding, ...]:
    return (
        Finding(
            "data-bound",
            "The step waits for its data",
            "next() blocks 25.3 ms of each 61.4 ms step; the loader has no workers, so nothing is read ahead",
            share(0.412),
            "read ahead in worker processes",
            estimated(1.62, "x"),
            "the time blocked in next(), if one worker hides all but the longer of the two",
            ("loader", "cache"),
            severity="major",
        ),
        Finding(
            "unfused-optimizer",
            "The optimizer runs tensor by tensor",
            "65 tensors in 65 updates take 3.7 ms a step",
            share(0.061),
            "one fused kernel",
            estimated(1.04, "x"),
            "three quarters of the optimizer's time",
            ("fused",),
        ),
        Finding(
            "sync-in-loop",
            "loss.item() in every step",
            "the value is read back every step, though it is printed every 50",
            share(0.012),
            "read the loss every 50 steps",
            unknown("x"),
            "",
            edit="examples/images.py:97: move .item() out of the loop",
            severity="note",
        ),
    )


def curves(steps: int = 480, seed: int = 7) -> tuple[tuple[float, ...], tuple[float, ...]]:
    rng = random.Random(seed)
    stock, planned = [], []
    for step in range(steps):
        level = 0.35 + 1.95 * math.exp(-step / 110)
        common = rng.gauss(0, 0.07) * level
        stock.append(level + common)
        planned.append(level * (1 + 0.004 * math.sin(step / 50)) + common + rng.gauss(0, 0.01))
    return tuple(stock), tuple(planned)


def proof(passed: bool = True, losses: bool = True) -> Proof:
    stock, planned = curves() if losses else ((), ())
    return Proof(
        rung="trajectory" if passed else "update",
        passed=passed,
        reason="the lag's upper bound is at most 1 %" if passed else "the lag's upper bound is 2.4 %, more than 1 %",
        steps=480,
        lag=0.0012 if passed else 0.011,
        lag_high=0.0053 if passed else 0.024,
        smallest_lag=0.0041,
        updates=tuple(
            UpdateCheck(step, 0.99991 - step * 1e-5, 1.0003, 0.0021, 0.62, "layer1.0.conv1.weight", 0.9992, passed)
            for step in (1, 2, 10)
        ),
        stock_losses=stock,
        planned_losses=planned,
    )


def pairing(ratio: float, half: float, quads: int = 52) -> Pairing:
    return Pairing(
        ratio,
        ratio * (1 - half),
        ratio * (1 + half),
        quads,
        reference_step=0.0617,
        candidate_step=0.0617 / ratio,
        smallest=half * 0.8,
        method="two fresh processes passing a token every 2 steps, Hodges-Lehmann over quads",
    )


CHOSEN = {"loader": {"workers": 1, "prefetch": 4}, "channels_last": {}, "fused": {}}


def trials() -> tuple[Trial, ...]:
    loader = {"loader": CHOSEN["loader"]}
    layout = {**loader, "channels_last": {}}
    return (
        Trial("bf16", {"bf16": {}}, {}, "slower", "bfloat16 is emulated here", "screen", pairing(0.58, 0.02, 24)),
        Trial("loader(workers=1, prefetch=4)", loader, {}, "faster", "stays on", "screen", pairing(1.512, 0.018, 44),
              None, 21.4, 0.31),
        Trial("channels_last", layout, loader, "faster", "stays on", "screen", pairing(1.091, 0.016, 60)),
        Trial("fused", CHOSEN, layout, "faster", "stays on", "screen", pairing(1.042, 0.011, 60)),
        Trial("threads(threads=1)", {**CHOSEN, "threads": {"threads": 1}}, CHOSEN, "no change", "inside the noise",
              "screen", pairing(0.997, 0.014, 60)),
        Trial("compile", {"compile": {}}, {}, "failed", "no C++ compiler was found", "check",
              failure="InvalidCxxCompiler: No working C++ compiler found in ('search',)"),
        Trial("attention", {"attention": {}}, {}, "not applicable", "the model has no attention", "check"),
        Trial("allocator", {"allocator": {}}, {}, "not tried", "the budget is used up", "check"),
        Trial("loader + channels_last + fused", CHOSEN, {}, "faster", "", "confirm", pairing(1.713, 0.019), proof(),
              40.2, 0.42),
    )  # fmt: skip


def tune_report(script: str = "examples/images.py") -> TuneReport:
    return TuneReport(
        script=script,
        arguments=("--epochs", "3"),
        created="2026-11-21T12:01:14Z",
        measurement=measurement(script),
        findings=findings(),
        trials=trials(),
        verdict=(
            "The plan trains 1.71x faster: a worker reads ahead, the optimizer is fused and convolutions run in "
            "channels-last order. Over 480 paired steps the loss followed the untouched script within a lag of 0.5 %."
        ),
        plan_file="images.plan.toml",
        kept=("loader", "channels_last", "fused"),
        seconds=171.3,
        budget=180.0,
        forecast="3 epochs of 188 steps: 38 s untouched, 24 s with the plan, evaluation included.",
        isolation="user-namespace overlay: the script's writes went to a scratch layer",
        final=pairing(1.713, 0.019),
        proof=proof(),
    )


def baseline_report() -> TuneReport:
    slow = tuple(trial for trial in trials() if trial.outcome != "faster")
    return TuneReport(
        script="train.py", arguments=(), created="2026-11-21T12:01:14Z", measurement=measurement(), findings=(),
        trials=slow, verdict="Keep your baseline.", plan_file="", kept=(), seconds=160.0, budget=180.0,
    )  # fmt: skip


def plan() -> Plan:
    return Plan(
        script="examples/images.py",
        arguments=("--epochs", "3"),
        created="2026-11-21T12:01:14Z",
        device="cpu",
        verdict="1.71x faster, same trajectory.",
        fingerprint=Fingerprint("examples/images.py", "aa" * 32, "bb" * 32, "cpu", "torch 2.13.0", "cc" * 32),
        speedup=1.713, low=1.68, high=1.746, pairs=52, break_even_steps=17.0, one_off_seconds=0.42,
        search_seconds=171.3, step_seconds=0.036, proof=proof(),
        kept=(
            Kept("loader", {"workers": 1, "prefetch": 4}, "bitwise", 1.512, 1.485, 1.539, 52, 1.497, 1.45, 1.54),
            Kept("channels_last", {}, "rounding", 1.091, 1.074, 1.108, 60, 1.082, 1.04, 1.126),
            Kept("fused", {}, "rounding", 1.042, 1.031, 1.053, 60),
        ),
        rejected=(Rejected("bf16", "slower: bfloat16 is emulated here", {}, 0.58, 0.57, 0.59),),
    )  # fmt: skip


def run(script: str = "examples/images.py", step: float = 0.036, planned: bool = True, seed: int = 3) -> Run:
    rng = random.Random(seed)
    parts = {"data": 0.06, "forward": 0.33, "loss": 0.02, "backward": 0.47, "optimizer": 0.07, "other": 0.05}
    windows = []
    at = 3.1
    for index in range(120):
        each = step * (1 + rng.gauss(0, 0.03)) * (1.6 if index == 0 else 1)
        at += each * 10
        level = 0.35 + 1.95 * math.exp(-index / 22) + rng.gauss(0, 0.02)
        windows.append(
            Window(index * 10, 10, at, each * 10, {k: v * each * 10 for k, v in parts.items()}, level, level,
                   1.4 if index % 40 == 39 else 0.0)
        )  # fmt: skip
    return Run(
        id="20261121-120455-3f2a",
        script=script,
        arguments=("--epochs", "3"),
        started="2026-11-21T12:04:55Z",
        status="finished",
        exit_code=0,
        seconds=at + 1.2,
        plan="images.plan.toml" if planned else "",
        techniques={"loader": {"workers": 1, "prefetch": 4}, "fused": {}} if planned else {},
        steps=1200,
        windows=tuple(windows),
        events=(Event(0.4, "applied", "loader: workers=1, prefetch=4"), Event(0.9, "applied", "fused: AdamW")),
        environment={"torch": "2.13.0+cpu", "python": "3.12.4"},
    )
