"""No rule on the recipe speaks on the examples, which do it right: over measurements of small runs of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from upshift.diagnose import registry
from upshift.records import Measurement
from upshift.records.codec import read
from upshift.records.recipe import RecipeFacts

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
EXAMPLES = {path.stem for path in (Path(__file__).parents[2] / "examples").glob("*.py")} - {"get_data"}
RULES = (
    "overfitting", "loss_not_falling", "loss_at_zero", "never_learns", "not_in_optimizer", "trains_in_eval_mode",
    "evaluates_in_train_mode", "no_early_stopping", "constant_rate", "no_validation", "decay_on_norms", "no_seed",
)  # fmt: skip


def recipe_of(file: Path) -> tuple[Measurement, RecipeFacts]:
    found = read(file, Measurement)
    assert found.facts.recipe is not None
    return found, found.facts.recipe


def changed(m: Measurement, **changes: object) -> Measurement:
    recipe = msgspec.structs.replace(m.facts.recipe, **changes)  # type: ignore[type-var]
    return msgspec.structs.replace(m, facts=msgspec.structs.replace(m.facts, recipe=recipe))


def said(m: Measurement) -> set[str]:
    return {name for name in RULES if registry.rule(name)(m) is not None}


def test_every_example_was_recorded() -> None:
    assert {file.stem for file in RECORDED} == EXAMPLES


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_nothing_is_said_of_an_example(file: Path) -> None:
    assert said(recipe_of(file)[0]) == set()


@pytest.mark.parametrize("name", ["tabular_mlp", "vae"])
def test_the_same_recordings_with_their_losses_in_reverse_are_found_out(name: str) -> None:
    m, recipe = recipe_of(Path(__file__).parent / "recorded" / f"{name}.json")
    assert "loss_not_falling" in said(changed(m, curve=recipe.curve[::-1]))


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_the_same_recordings_without_a_word_in_the_source(file: Path) -> None:
    m, _ = recipe_of(file)
    bare = msgspec.structs.replace(m, facts=msgspec.structs.replace(m.facts, seeded=False))
    assert "no_seed" in said(changed(bare, declared=()))
