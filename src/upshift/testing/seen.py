"""What `diagnose` might have seen: measurements for `check` to judge, and the settings worth testing."""

from __future__ import annotations

from typing import Any

from upshift.records.measurement import (
    PHASES,
    Anatomy,
    LoaderFacts,
    Measurement,
    ModelFacts,
    OptimizerFacts,
    Phase,
    ScriptFacts,
)
from upshift.records.plan import Setting
from upshift.records.quantity import Quantity, unknown
from upshift.records.recipe import RecipeFacts
from upshift.sites import Technique

#: A model most of which is one block, repeated.
BLOCKS = ModelFacts(
    name="GPT",
    parameters=10_000,
    dtypes=("float32",),
    device="cpu",
    layers={"Embedding": 2, "LayerNorm": 9, "Linear": 17},
    repeated={"Block": 4},
    repeated_share=0.86,
)

#: Facts of scripts and machines that differ from those of `measurement()`.
WORLDS: tuple[dict[str, Any], ...] = (
    {},
    {"models": (), "optimizers": (), "loaders": ()},
    {"device": "cuda:0", "attention": False},
    {"autocast": True, "grad_scaler": True, "create_graph": True, "distributed": True},
    {"threads": 0, "cores": 0},
    {"compiler": True, "models": (BLOCKS,)},
    {"bf16_native": False, "flush_denormal": True, "allocator": "tcmalloc"},
)


def _known(value: float, unit: str) -> Quantity:
    return Quantity(value=value, unit=unit, n=20)


def measurement(**facts: Any) -> Measurement:
    """A plausible measurement of a small training on a two-core CPU; `facts` replace fields of its `ScriptFacts`."""
    shares = {"data": 0.1, "forward": 0.3, "loss": 0.02, "backward": 0.4, "optimizer": 0.15, "other": 0.03}
    phases = tuple(
        Phase(name=name, seconds=_known(0.03 * shares.get(name, 0.0), "s"), share=_known(shares.get(name, 0.0), "1"))
        for name in PHASES
    )
    values: dict[str, Any] = {
        "models": (
            ModelFacts(
                name="Net",
                parameters=10_000,
                dtypes=("float32",),
                device="cpu",
                layers={"Conv2d": 2, "Linear": 2, "Dropout": 1},
                input_shapes=((8, 3, 8, 8),),
            ),
        ),
        "optimizers": (OptimizerFacts(name="AdamW", parameters=10_000, tensors=8, device="cpu", dtypes=("float32",)),),
        "loaders": (
            LoaderFacts(
                name="DataLoader", dataset="Data", training=True, workers=0, batch_size=8, samples=256, iterable=False
            ),
        ),
        "attention": True,
        "loss_seen": True,
        "threads": 2,
        "cores": 2,
        "main_guard": True,
        "steps_total": 1000,
        "recipe": RecipeFacts(rate_first=1e-3, rate_last=1e-3, rate_changes=0, evaluations=1),
    }
    values.update(facts)
    anatomy = Anatomy(
        step=_known(0.03, "s"),
        phases=phases,
        steps_seen=40,
        warmup_steps=5,
        warmup=_known(0.5, "s"),
        startup=_known(2.0, "s"),
        evaluation=unknown("s"),
        checkpointing=unknown("s"),
        micro_batches=_known(1, "1"),
        samples=_known(8, "1"),
    )
    return Measurement(
        script="train.py",
        arguments=(),
        created="2026-01-01T00:00:00Z",
        anatomy=anatomy,
        facts=ScriptFacts(**values),
    )


def defaults(technique: Technique) -> dict[str, Setting]:
    """The settings of a plan that names the technique and nothing else."""
    return {key: spec.default for key, spec in technique.card.settings.items()}


def variants(technique: Technique) -> list[dict[str, Setting]]:
    """Settings worth testing: the defaults, each choice, and the candidates for a two-core CPU."""
    result: list[dict[str, Setting]] = [{}]
    for key, spec in technique.card.settings.items():
        result += [{key: choice} for choice in spec.choices if choice != spec.default]
        if isinstance(spec.default, bool):
            result.append({key: not spec.default})
    for item in technique.check(measurement()).candidates:
        if item not in result and item != defaults(technique):
            result.append(dict(item))
    return result
