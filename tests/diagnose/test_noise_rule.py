"""The rule on the batch and the noise scale: when it speaks, what it promises, and where it is silent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from built_measurements import PLAIN, anatomy, facts, floor, loader, measurement, model, optimizer, q

from upshift.diagnose import registry
from upshift.records import Finding, Measurement, Quantity, unknown
from upshift.records.codec import dumps, loads
from upshift.records.recipe import GradientNoise, RecipeFacts

NAME = "batch_below_noise_scale"
#: A step whose arithmetic takes a thousandth of it.
IDLE = floor(flops=q(1e7, "FLOP", 0), arithmetic_floor=q(1e-4))
FALLING = tuple(2.0 - 0.005 * i for i in range(200))


def heard(low: float, value: float | None = 100.0, high: float | None = 300.0) -> GradientNoise:
    scale = Quantity(value=value, unit="batches", low=low, high=high, n=96)
    return GradientNoise(scale=scale, signal=q(1.0, "squared gradient"), variance=q(1.0, "squared gradient"), steps=96)


def made(noise: GradientNoise | None, *, of: Any = IDLE, recipe: Any = None, **changes: Any) -> Measurement:
    fields = {"curve": FALLING, "declared": ("seed",), "noise": noise, **(recipe or {})}
    known = {"recipe": RecipeFacts(**fields), "steps_total": 36_000, "loaders": (loader(samples=100_000),), **changes}
    return measurement(floor=of, facts=facts(**known))


def speaks(m: Measurement) -> Finding:
    found = registry.rule(NAME)(m)
    assert found is not None and found.rule == NAME and loads(dumps(found), Finding) == found
    return found


def silent(m: Measurement) -> None:
    assert registry.rule(NAME)(m) is None


def test_it_tells_the_batch_the_scale_its_interval_and_the_steps() -> None:
    found = speaks(made(heard(40.0)))
    for part in ("takes 32 samples", "3,200 samples (1,280 to 9,600)", "over 96 steps", "4 times the batch", "7.32 %"):
        assert part in found.evidence, part
    assert "36,000 steps planned" in found.evidence and "about 9,659 would be left" in found.evidence
    assert found.techniques == ("larger_batch",) and "changes training" in found.helps and found.severity == "major"
    fixed = 0.02 + 0.96 - 5 * 1e-4 / 0.1
    assert found.share.value == pytest.approx(fixed, rel=0.02) and found.share.basis == "estimated"
    assert found.gain.value == pytest.approx(1 / (1 - fixed * 0.75) / (44 / 41), rel=0.05)
    assert found.gain.low == 1.0 and found.gain.basis == "estimated"


@pytest.mark.parametrize(("low", "factor"), [(8.01, 2), (25.9, 2), (26.1, 4), (61.9, 4), (62.1, 8), (1e4, 8)])
def test_no_factor_costs_more_than_a_ninth_more_samples(low: float, factor: int) -> None:
    assert f"{factor} times the batch" in speaks(made(heard(low))).helps


def test_a_scale_without_an_upper_end_has_a_lower_one() -> None:
    found = speaks(made(heard(10.0, value=None, high=None)))
    assert "larger than can be told samples (at least 320, no upper end)" in found.evidence


def test_without_a_loader_it_speaks_of_batches_and_names_no_technique() -> None:
    fed = measurement(
        floor=IDLE,
        anatomy=anatomy(PLAIN, samples=unknown("samples"), micro_batches=q(2.0, "batches")),
        facts=facts(
            recipe=RecipeFacts(declared=("seed",), noise=heard(40.0)), loaders=(),
            models=(model(input_shapes=((16, 64),)),),
        ),
    )  # fmt: skip
    found = speaks(fed)
    assert (
        "one batch (32 rows fed to the model)" in found.evidence and "100.0 batches (40.0 to 300.0)" in found.evidence
    )
    assert found.techniques == ()


def test_what_it_costs_in_time_is_unknown_without_a_floor() -> None:
    found = speaks(made(heard(40.0), of=None))
    assert found.severity == "note" and found.gain.value is None and "rest takes is unknown" in found.evidence
    assert found.share.value == pytest.approx(0.02)


@pytest.mark.parametrize(
    "m",
    [
        made(None),
        made(GradientNoise(why="several optimizers make a step")),
        made(heard(8.0)),
        made(heard(2.0, value=500.0, high=None)),
        made(heard(0.0, value=0.0, high=0.1)),
        made(heard(40.0), of=floor()),
        made(heard(40.0), optimizers=(optimizer(), optimizer())),
        made(heard(40.0), frameworks=("lightning",)),
        made(heard(40.0), recipe={"declared": ("reward",)}),
        made(heard(40.0), recipe={"declared": None}),
        made(heard(40.0), recipe={"first_not_finite": 3}),
        made(heard(40.0), recipe={"curve": tuple(0.99**i for i in range(2000))}),
        made(heard(40.0), recipe={"curve": (2.0, 2.001) * 100}),
        made(heard(40.0), loaders=(loader(samples=400),)),
        measurement(facts=facts(recipe=None)),
    ],
    ids=[
        "not heard", "unknown", "at the limit", "wide", "no noise", "arithmetic fills the step", "gan", "framework",
        "rewards", "no source", "not finite", "zero", "flat", "short epoch", "not watched",
    ],
)  # fmt: skip
def test_it_is_silent(m: Measurement) -> None:
    silent(m)


def test_its_page_names_the_paper() -> None:
    card = registry.card(NAME)
    assert "1812.06162" in card.source and card.techniques == ("larger_batch",) and card.limits
