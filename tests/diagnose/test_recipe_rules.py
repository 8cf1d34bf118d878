"""Rules on how a training is set up: each speaks on what it is for, and stays silent where it cannot know."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from built_measurements import PLAIN, anatomy, facts, measurement, model, optimizer, q

from upshift.diagnose import diagnose, registry
from upshift.records import Finding, Measurement
from upshift.records.codec import dumps, loads
from upshift.records.recipe import LeftOut, ModelMode, RecipeFacts, Scores

RULES = (
    "overfitting", "loss_not_falling", "loss_at_zero", "never_learns", "not_in_optimizer", "trains_in_eval_mode",
    "evaluates_in_train_mode", "no_early_stopping", "constant_rate", "no_validation", "decay_on_norms", "no_seed",
)  # fmt: skip

#: 36,000 steps of 0.1 s: one hour.
HOUR = 36_000


def curve(start: float, end: float, noise: float, n: int = 200, seed: int = 0) -> tuple[float, ...]:
    """A loss that falls by equal parts per step, under noise."""
    draw = random.Random(seed)
    return tuple(start + (end - start) * i / (n - 1) + draw.gauss(0, noise) for i in range(n))


def levelled(floor: float, noise: float, n: int = 200) -> tuple[float, ...]:
    draw = random.Random(1)
    return tuple(floor + 2 * math.exp(-i / 8) + draw.gauss(0, noise) for i in range(n))


def mode(**changes: Any) -> ModelMode:
    fields: dict[str, Any] = {
        "name": "Net", "steps": 100, "eval_steps": 0, "last_eval_steps": 0, "trained_in_eval": False,
        "put_in_eval": True, "optimized": True, "mode_layers": ("Dropout",),
    }  # fmt: skip
    return ModelMode(**{**fields, **changes})


def recipe(**changes: Any) -> RecipeFacts:
    """A training that is set up well."""
    fields: dict[str, Any] = {
        "curve": curve(2.0, 1.0, 0.1), "stride": 2, "rate_first": 0.1, "rate_last": 0.1, "rate_changes": 0,
        "schedulers": ("StepLR",), "declared": ("schedule", "seed", "validation"), "evaluations": 2,
        "modes": (mode(),), "gradient_steps": 400,
    }  # fmt: skip
    return RecipeFacts(**{**fields, **changes})


def made(*, total: int | None = HOUR, more: dict[str, Any] | None = None, **changes: Any) -> Measurement:
    return measurement(facts=facts(recipe=recipe(**changes), seeded=True, steps_total=total, **(more or {})))


def speaks(name: str, m: Measurement) -> Finding:
    found = registry.rule(name)(m)
    assert found is not None and found.rule == name and found.helps and found.edit == m.script
    assert found.gain.value is None and found.share.value is None
    assert loads(dumps(found), Finding) == found
    return found


def silent(name: str, m: Measurement) -> None:
    assert registry.rule(name)(m) is None


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_said_of_a_good_recipe_or_of_one_that_was_not_watched(name: str) -> None:
    silent(name, made())
    silent(name, measurement(facts=facts(recipe=None)))
    silent(name, measurement(facts=facts(recipe=RecipeFacts())))


def test_records_from_before_the_recipe_was_watched_still_load() -> None:
    old = json.loads(dumps(measurement()))
    del old["facts"]["recipe"]
    assert loads(json.dumps(old).encode(), Measurement) == measurement()


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_a_flat_loss_is_useless_training_and_costs_what_is_planned() -> None:
    found = speaks("loss_not_falling", made(curve=curve(2.0, 2.0, 0.02)))
    assert found.severity == "major" and "does not fall" in found.title
    assert "400 steps" in found.evidence and "60 min 0 s" in found.evidence
    unknown = speaks("loss_not_falling", made(curve=curve(2.0, 2.0, 0.02), total=None))
    assert "unknown" in unknown.evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"curve": curve(2.0, 2.0, 0.5)},
        {"curve": curve(2.0, 2.0, 0.02, n=30)},
        {"curve": curve(2.0, 2.0, 0.02), "rate_last": 0.5},
        {"curve": curve(2.0, 2.0, 0.02), "rate_first": None},
        {"curve": curve(2.0, 2.0, 0.02), "loaded": True},
        {"curve": curve(2.0, 2.0, 0.02), "declared": ("reward",)},
        {"curve": curve(2.0, 2.0, 0.02), "declared": None},
        {"curve": curve(2.0, 2.0, 0.02), "more": {"optimizers": (optimizer(), optimizer())}},
        {"curve": curve(2.0, 2.0, 0.02), "more": {"frameworks": ("lightning",)}},
        {"curve": curve(2.0, 1.9, 0.02)},
    ],
    ids=["noisy", "short", "warm-up", "rate unknown", "loaded", "rewards", "no source", "gan", "framework", "falls"],
)
def test_a_loss_that_may_yet_fall_is_not_called_flat(changes: dict[str, Any]) -> None:
    silent("loss_not_falling", made(**changes))


def test_a_flat_loss_is_rarely_called_where_it_falls_within_its_noise() -> None:
    called = sum(
        registry.rule("loss_not_falling")(made(curve=curve(2.0, 1.9, 0.1, seed=seed))) is not None
        for seed in range(300)
    )
    assert called <= 3


def test_a_rising_loss_and_one_that_is_not_finite() -> None:
    assert "rises" in speaks("loss_not_falling", made(curve=curve(1.0, 1.5, 0.05))).title
    silent("loss_not_falling", made(curve=curve(1.0, 1.5, 0.05), rate_last=0.2))
    found = speaks("loss_not_falling", made(first_not_finite=6))
    assert found.severity == "major" and "step 7" in found.evidence
    silent("loss_not_falling", made(first_not_finite=6, more={"grad_scaler": True}))


def test_a_loss_at_zero_costs_the_steps_still_planned() -> None:
    zero = tuple(math.exp(-i / 4) for i in range(200))
    found = speaks("loss_at_zero", made(curve=zero))
    assert f"{HOUR - 400:,} steps still planned" in found.evidence
    silent("loss_not_falling", made(curve=(0.0,) * 200))
    silent("loss_at_zero", made(curve=tuple(value + 0.01 for value in zero)))
    silent("loss_at_zero", made(curve=tuple(value - 0.5 for value in zero)))


BARE = {"schedulers": (), "declared": ("seed", "validation")}


def test_a_loss_that_has_levelled_off_with_nothing_to_stop_it() -> None:
    found = speaks("no_early_stopping", made(curve=levelled(1.0, 1e-3), **BARE))
    assert found.severity == "minor" and f"{HOUR - 400:,} steps still planned" in found.evidence


@pytest.mark.parametrize(
    "changes",
    [
        {"curve": levelled(1.0, 0.1)},
        {"curve": curve(2.0, 1.0, 1e-3)},
        {"curve": curve(1.0, 1.0, 1e-3)},
        {"curve": tuple(2.0 - 0.1 * math.log(i + 1) for i in range(200))},
        {"schedulers": ("StepLR",)},
        {"rate_changes": 3},
        {"declared": ("stopping",)},
        {"declared": ("schedule",)},
        {"total": None},
        {"total": 800},
        {"curve": levelled(0.0, 0.0)},
    ],
    ids=[
        "noisy",
        "falls",
        "never fell",
        "falls by the log",
        "scheduler",
        "rate",
        "stops",
        "declared",
        "unknown",
        "near end",
        "zero",
    ],
)
def test_it_is_not_said_to_have_levelled_off(changes: dict[str, Any]) -> None:
    silent("no_early_stopping", made(**{"curve": levelled(1.0, 1e-3), **BARE, **changes}))


@pytest.mark.parametrize("power", [0.1, 0.5])
def test_a_power_law_has_not_levelled_off(power: float) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        falling = tuple(1 + (i + 1) ** -power + draw.gauss(0, 0.005) for i in range(200))
        silent("no_early_stopping", made(curve=falling, **BARE))


# -- rate, validation, seed, decay ------------------------------------------------------------------------------------


def test_constant_rate_over_a_long_training() -> None:
    found = speaks("constant_rate", made(**BARE))
    assert "0.1" in found.evidence and "36,000 steps" in found.evidence and "unknown" in found.evidence
    for changes in (
        {"total": HOUR - 1},
        {"total": None},
        {"rate_changes": 1},
        {"rate_changes": None},
        {"declared": ("schedule",)},
        {"declared": None},
        {"schedulers": ("StepLR",)},
        {"more": {"optimizers": (optimizer(name="AdamWScheduleFree"),)}},
        {"more": {"optimizers": (optimizer(), optimizer())}},
    ):
        silent("constant_rate", made(**{**BARE, **changes}))
    few = facts(recipe=recipe(**BARE), steps_total=19_000)
    silent("constant_rate", measurement(facts=few, anatomy=anatomy(PLAIN, step=q(10.0))))


def test_no_validation_seen_or_spoken_of() -> None:
    bare = {"evaluations": 0, "declared": ("seed",)}
    assert speaks("no_validation", made(**bare)).severity == "minor"
    assert speaks("no_validation", made(**bare, total=1000)).severity == "note"
    assert speaks("no_validation", made(**bare, total=None)).severity == "note"
    silent("no_validation", made(evaluations=1, declared=()))
    silent("no_validation", made(evaluations=0, declared=("validation",)))
    silent("no_validation", made(evaluations=0, declared=None))
    silent("no_validation", made(**bare, more={"optimizers": (optimizer(), optimizer())}))
    watched = facts(recipe=recipe(**bare))
    silent("no_validation", measurement(facts=watched, anatomy=anatomy(PLAIN, evaluation=q(0.2))))


def test_no_seed_is_a_note() -> None:
    bare = facts(recipe=recipe(declared=()), seeded=False)
    assert speaks("no_seed", measurement(facts=bare)).severity == "note"
    silent("no_seed", measurement(facts=facts(recipe=recipe(declared=("seed",)), seeded=False)))
    silent("no_seed", measurement(facts=facts(recipe=recipe(declared=()), seeded=True)))


def test_decay_on_norms_is_a_note() -> None:
    norms = {"models": (model(layers={"LayerNorm": 2}),)}
    assert speaks("decay_on_norms", made(decay=0.1, decayed_vectors=4, more=norms)).severity == "note"
    silent("decay_on_norms", made(decay=0.01, decayed_vectors=4, more=norms))
    silent("decay_on_norms", made(decay=0.1, decayed_vectors=0, more=norms))
    silent("decay_on_norms", made(decay=0.1, decayed_vectors=4))


# -- modes and gradients ----------------------------------------------------------------------------------------------


def test_training_in_evaluation_mode() -> None:
    forgotten = mode(eval_steps=60, last_eval_steps=60, trained_in_eval=True)
    found = speaks("trains_in_eval_mode", made(modes=(mode(), forgotten)))
    assert "last 60 of 100" in found.evidence and "Dropout" in found.evidence and found.severity == "minor"
    always = mode(eval_steps=100, last_eval_steps=100, trained_in_eval=True)
    assert "all 100" in speaks("trains_in_eval_mode", made(modes=(always,))).evidence
    assert speaks("trains_in_eval_mode", made(modes=(always,), loaded=True)).severity == "note"
    for changes in ({"optimized": False}, {"mode_layers": ()}, {"trained_in_eval": False}, {"last_eval_steps": 0}):
        fields = {"eval_steps": 60, "last_eval_steps": 60, "trained_in_eval": True, **changes}
        silent("trains_in_eval_mode", made(modes=(mode(**fields),)))


def test_evaluation_in_training_mode() -> None:
    kept = mode(put_in_eval=False)
    assert "2 evaluations" in speaks("evaluates_in_train_mode", made(modes=(kept,))).evidence
    silent("evaluates_in_train_mode", made(modes=(kept,), evaluations=0))
    silent("evaluates_in_train_mode", made(modes=(kept, mode())))
    silent("evaluates_in_train_mode", made(modes=(mode(),)))
    silent("evaluates_in_train_mode", made(modes=(mode(put_in_eval=False, mode_layers=()),)))


@pytest.mark.parametrize(("share", "severity"), [(0.9, "major"), (0.1, "minor"), (0.001, "note")])
def test_parameters_that_never_learn(share: float, severity: str) -> None:
    left = LeftOut(names=("fc.weight", "fc.bias"), tensors=5, share=share)
    found = speaks("never_learns", made(no_gradient=left))
    assert found.severity == severity and "fc.weight, fc.bias and 3 more never had a gradient" in found.evidence
    assert "only zeros" in speaks("never_learns", made(zero_gradient=left)).evidence
    silent("never_learns", made(no_gradient=left, gradient_steps=10))


def test_gradients_that_no_optimizer_uses() -> None:
    found = speaks("not_in_optimizer", made(not_optimized=LeftOut(names=("a.weight",), tensors=1, share=0.5)))
    assert "a.weight" in found.evidence and "50 %" in found.evidence and found.severity == "minor"


def test_they_come_after_a_bottleneck_with_a_predicted_gain_and_notes_last() -> None:
    m = measurement(
        anatomy=anatomy({**PLAIN, "data": 0.5, "forward": 0.2, "backward": 0.26}),
        facts=facts(recipe=recipe(**{**BARE, "declared": ()}), steps_total=HOUR),
    )
    found = [item.rule for item in diagnose(m)]
    assert found[0] == "data_starved" and found[-1] == "no_seed" and "constant_rate" in found


# -- evaluation -------------------------------------------------------------------------------------------------------


def passes(evaluation: list[float], training: list[float]) -> tuple[Scores, ...]:
    pairs = zip(training, evaluation, strict=True)
    return tuple(Scores(step=100 * i, training=a, evaluation=b) for i, (a, b) in enumerate(pairs, 1))


FALLING = [2.0, 1.5, 1.2, 1.0, 0.8, 0.6]


def test_overfitting_names_the_best_pass_and_the_steps_after_it() -> None:
    found = speaks("overfitting", made(scores=passes([2.1, 1.6, 1.5, 1.6, 1.7, 1.9], FALLING)))
    assert "lowest after 300 steps (1.5)" in found.evidence and f"{HOUR - 300:,} steps still" in found.evidence


@pytest.mark.parametrize(
    ("evaluation", "training"),
    [
        ([2.1, 1.6, 1.5, 1.6, 1.55, 1.9], FALLING),
        ([2.1, 1.8, 1.7, 1.6, 1.7, 1.8], FALLING),
        ([2.1, 1.6, 1.5, 1.51, 1.52, 1.53], FALLING),
        ([2.1, 1.6, 1.5, 1.6, 1.7, 1.9], [1.0] * 6),
        ([-2.1, -1.6, -1.5, -1.3, -1.2, -1.1], FALLING),
    ],
    ids=["not steadily", "too few", "within 3 %", "training flat", "negative"],
)
def test_it_is_not_said_to_overfit(evaluation: list[float], training: list[float]) -> None:
    silent("overfitting", made(scores=passes(evaluation, training)))
