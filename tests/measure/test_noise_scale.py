"""The noise scale against linear regressions whose |G|^2 and tr(Sigma) are known in closed form, float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.measure.noise_scale import LEAST_WINDOWS, Stretch, more_samples, noise_scale, unbiased


def stretch(gradients: np.ndarray) -> Stretch:
    """Of gradients [count, parameters]."""
    return Stretch(len(gradients), float((gradients**2).sum(1).mean()), float((gradients.mean(0) ** 2).sum()))


def regression(samples: int, features: int, seed: int) -> np.ndarray:
    """Gradients of each sample's (x.w - y)^2 / 2: [samples, features]."""
    draw = np.random.default_rng(seed)
    x, y, w = draw.normal(size=(samples, features)), draw.normal(size=samples), draw.normal(size=features)
    return x * (x @ w - y)[:, None]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    samples=st.integers(2, 4),
    features=st.integers(1, 5),
    sizes=st.sampled_from([(1, 2), (1, 3), (2, 4)]),
    seed=st.integers(0, 10**6),
)
def test_no_bias_over_every_batch_that_can_be_drawn(samples: int, features: int, sizes, seed: int) -> None:
    each = regression(samples, features, seed)
    whole = each.mean(0)
    trace = float(((each - whole) ** 2).sum(1).mean())

    def expected(size: int) -> float:
        draws = itertools.product(range(samples), repeat=size)
        return float(np.mean([(each[list(draw)].mean(0) ** 2).sum() for draw in draws]))

    found = unbiased(*map(expected, sizes), *sizes)
    assert found == pytest.approx((float((whole**2).sum()), trace), rel=1e-9, abs=1e-9 * float((each**2).sum()))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(steps=st.integers(3, 5), batch=st.integers(1, 2), features=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_no_bias_over_every_order_of_an_epoch(steps: int, batch: int, features: int, seed: int) -> None:
    """Batches drawn without replacement hide part of |G|^2; the size of the epoch gives it back."""
    batch = batch if steps * batch <= 6 else 1
    samples = steps * batch
    each = regression(samples, features, seed)
    whole = each.mean(0)
    trace = float(((each - whole) ** 2).sum() / (samples - 1))
    windows = [
        stretch(each[list(order)].reshape(-1, batch, features).mean(1)[:2])
        for order in itertools.permutations(range(samples))
    ]
    found = noise_scale(windows, stretch(each), epoch=samples / batch)
    assert len(windows) >= LEAST_WINDOWS
    size = 1e-9 * float((each**2).sum())
    assert found.variance.value == pytest.approx(trace / batch, rel=1e-9, abs=size)
    assert found.signal.value == pytest.approx(float((whole**2).sum()), rel=1e-9, abs=size)
    blind = noise_scale(windows, stretch(each))
    assert blind.signal.value == pytest.approx(float((whole**2).sum()) - trace / samples, rel=1e-9, abs=size)


def truth(features: int, noise: float, distance: float) -> float:
    """tr(Sigma) / |G|^2 where x and the noise of y are normal: E |x|^2 (x.D)^2 = (d + 2) |D|^2, and G = D."""
    return features + 1 + features * noise**2 / distance**2


def batches(count: int, size: int, features: int, noise: float, distance: float, draw) -> np.ndarray:
    x = draw.normal(size=(count, size, features))
    away = np.full(features, distance / math.sqrt(features))
    return (x * (x @ away + noise * draw.normal(size=(count, size)))[..., None]).mean(1)


def heard(windows: int, long: int, *problem, draw):
    return noise_scale(
        [stretch(batches(4, *problem, draw)) for _ in range(windows)], stretch(batches(long, *problem, draw))
    )


@pytest.mark.parametrize("problem", [(4, 10, 1.0, 1.0), (16, 3, 0.1, 2.0), (10, 40, 3.0, 1.0)])
def test_many_windows_find_the_scale_of_a_normal_regression(problem) -> None:
    size, expected = problem[0], truth(*problem[1:])
    found = heard(4000, 400, *problem, draw=np.random.default_rng(0))
    assert found.scale.value * size == pytest.approx(expected, rel=0.1)
    assert found.scale.low * size < expected < found.scale.high * size


@pytest.mark.parametrize(
    "problem", [(4, 10, 1.0, 1.0), (2, 3, 1.0, 1.0), (16, 10, 0.1, 1.0), (1, 2, 0.0, 1.0), (2, 32, 3.0, 1.0)]
)
@pytest.mark.parametrize(("windows", "long"), [(5, 12), (16, 64)])
def test_the_low_end_is_rarely_above_the_truth(problem, windows: int, long: int) -> None:
    draw = np.random.default_rng(1)
    expected = truth(*problem[1:]) / problem[0]
    trials = 300
    above = sum(heard(windows, long, *problem, draw=draw).scale.low > expected for _ in range(trials))
    assert above <= 0.05 * trials


def test_orders_without_replacement_never_raise_the_alarm_where_the_epoch_is_not_known() -> None:
    """A true scale of 4 batches in epochs of 8 looks like one of 8 batches to the windows alone."""
    draw = np.random.default_rng(2)
    far = 0
    for _ in range(100):
        each = draw.normal(size=(64, 16))
        each -= each.mean(0)
        each += math.sqrt(float((each**2).sum() / 63) / 8 / 4 / 16)
        steps = np.concatenate([draw.permutation(each).reshape(8, 8, 16).mean(1) for _ in range(16)])
        found = noise_scale([stretch(steps[i : i + 4]) for i in range(0, 64, 4)], stretch(steps[64:]))
        assert found.signal.value < 0.75 * float((each.mean(0) ** 2).sum())
        far += found.scale.low > 4
    assert far <= 5


def test_the_whole_data_in_every_step_has_no_noise() -> None:
    same = stretch(np.ones((4, 3)))
    found = noise_scale([same] * 6, same)
    assert found.scale.value == 0.0 and found.scale.low == 0.0 and found.steps == 28


def test_a_gradient_lost_in_noise_has_a_low_end_only() -> None:
    found = noise_scale([Stretch(4, 1.0, 0.24)] * 6, Stretch(16, 1.0, 0.05))
    assert found.scale.value is None and found.scale.high is None
    assert found.scale.low == pytest.approx((0.76 * 4 / 3) / 0.05)


@pytest.mark.parametrize("windows", [[Stretch(4, 2.0, 1.0)] * 4, [Stretch(4, math.inf, 1.0)] * 6])
def test_too_few_or_infinite_gradients_are_unknown(windows: list[Stretch]) -> None:
    found = noise_scale(windows, Stretch(16, 2.0, 1.0))
    assert found.why and found.scale.value is None and found.scale.low is None


def test_samples_that_a_larger_batch_needs() -> None:
    assert more_samples(1, 5) == 1 and more_samples(2, 8) == pytest.approx(10 / 9) and more_samples(4, 0) == 4
