"""Update checks on real training steps, and the acceptance rule."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from upshift.measure.lag import LagResult, lag
from upshift.measure.updates import NOTHING_MOVED, check_updates
from upshift.records.codec import dumps
from upshift.records.trial import RUNGS, Proof, UpdateCheck
from upshift.search.accept import accept
from upshift.sites import Numerics

Updates = dict[str, np.ndarray]
STEPS = (1, 2, 10)

# Real training steps


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


class Attention(nn.Module):
    """Rows of the picture as tokens: embedding, one transformer layer, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x.squeeze(1))).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "attention": Attention}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.02, "momentum": 0.9, **k}),
    "adam": lambda p, **k: torch.optim.Adam(p, **{"lr": 1e-3, **k}),
    "adamw": lambda p, **k: torch.optim.AdamW(p, **{"lr": 1e-3, "weight_decay": 0.05, **k}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Same sums in every run, and no fight for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def train(
    model: str,
    optimizer: str,
    *,
    bf16: bool = False,
    drop: str = "",
    reset: bool = False,
    sign: float = 1.0,
    scale: float = 1.0,
    channels_last: bool = False,
    permute: bool = False,
    frozen: bool = False,
    steps: int = 11,
    **settings: object,
) -> tuple[dict[int, Updates], list[float]]:
    """Updates of every step and the losses; batches and parameters are the same in every call."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    torch.manual_seed(0)
    net = MODELS[model]()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = OPTIMIZERS[optimizer](net.parameters(), **settings)
    choice = torch.Generator().manual_seed(1)
    updates: dict[int, Updates] = {}
    losses = []
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (64,), generator=choice)
        if frozen:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        batch = x[rows].to(memory_format=torch.channels_last) if channels_last else x[rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            out = net(batch)
        loss = nn.functional.cross_entropy(out.float(), y[rows])
        made.zero_grad()
        (loss * scale).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(sign)
            if drop and name.startswith(drop):
                parameter.grad.zero_()
            if permute and step > 1 and parameter.dim() == 4:
                # What a fused step does that reads a channels_last gradient as if it were contiguous.
                moved = parameter.grad.permute(0, 2, 3, 1).reshape(parameter.shape)
                parameter.grad.copy_(moved.clone())
        if reset and step == 10:
            made.state.clear()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        made.step()
        updates[step] = {name: (p.detach() - before[name]).contiguous().numpy() for name, p in net.named_parameters()}
        losses.append(float(loss.detach()))
    return updates, losses


def checks(
    stock: dict[int, Updates],
    planned: dict[int, Updates],
    precision: str = "bfloat16",
    kind: Numerics = Numerics.ROUNDING,
) -> list[UpdateCheck]:
    found: list[UpdateCheck] = []
    for step in STEPS:
        found.append(
            check_updates(step, stock[step], planned[step], stock[step + 1], kind, precision, earlier=found)  # type: ignore[arg-type]
        )
    return found


COMBINATIONS = [(model, optimizer) for model in MODELS for optimizer in OPTIMIZERS]


@pytest.fixture(scope="module")
def stock() -> dict[tuple[str, str], dict[int, Updates]]:
    return {key: train(*key)[0] for key in COMBINATIONS}


@pytest.mark.parametrize(("model", "optimizer"), COMBINATIONS)
def test_bf16_is_accepted(model: str, optimizer: str, stock: dict) -> None:
    found = checks(stock[model, optimizer], train(model, optimizer, bf16=True)[0])
    assert [check.passed for check in found] == [True] * 3, found
    assert all(check.relative_error > 1e-4 and check.noise is not None for check in found)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_fused_step_is_accepted_on_the_tightest_terms(model: str, optimizer: str, stock: dict) -> None:
    found = checks(stock[model, optimizer], train(model, optimizer, fused=True)[0], "optimizer")
    assert all(check.passed for check in found), found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_channels_last_is_accepted(optimizer: str, stock: dict) -> None:
    found = checks(stock["conv", optimizer], train("conv", optimizer, channels_last=True)[0], "float32")
    assert all(check.passed for check in found), found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "optimizer"), COMBINATIONS)
@pytest.mark.parametrize("fault", ["rate", "sign", "drop"])
def test_faults_are_rejected(model: str, optimizer: str, fault: str, precision: str, stock: dict) -> None:
    rate = 0.02 if optimizer == "sgd" else 1e-3
    layer = {"mlp": "3", "conv": "4", "attention": "layer.linear1"}[model]
    arguments: dict = {"rate": {"lr": rate * 1.03}, "sign": {"sign": -1.0}, "drop": {"drop": layer}}[fault]
    bf16 = precision == "bfloat16" and (fault == "rate" or model == "mlp")
    found = checks(stock[model, optimizer], train(model, optimizer, bf16=bf16, **arguments)[0], precision)
    assert not all(check.passed for check in found), found


def test_a_scaled_loss_matters_to_sgd_and_not_to_adam(stock: dict) -> None:
    for model in MODELS:
        assert not all(c.passed for c in checks(stock[model, "sgd"], train(model, "sgd", scale=0.97)[0]))
        assert all(c.passed for c in checks(stock[model, "adam"], train(model, "adam", scale=0.97)[0]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_reset_state_is_rejected(optimizer: str, stock: dict) -> None:
    for precision in ("float32", "bfloat16"):
        found = checks(stock["mlp", optimizer], train("mlp", optimizer, reset=True, steps=11)[0], precision)
        assert [check.passed for check in found] == [True, True, False]


def test_a_gradient_read_in_the_wrong_order_is_rejected(stock: dict) -> None:
    for optimizer in OPTIMIZERS:
        for precision in ("float32", "bfloat16"):
            found = checks(stock["conv", optimizer], train("conv", optimizer, permute=True)[0], precision)
            assert found[0].passed and not all(check.passed for check in found)


def test_frozen_batch_norm_and_a_wrong_epsilon_are_rejected(stock: dict) -> None:
    assert not checks(stock["conv", "sgd"], train("conv", "sgd", frozen=True)[0])[0].passed
    assert not all(c.passed for c in checks(stock["mlp", "adam"], train("mlp", "adam", eps=1e-3)[0]))


def test_missing_weight_decay_is_rejected_where_only_the_optimizer_changes(stock: dict) -> None:
    for model in MODELS:
        found = checks(stock[model, "adamw"], train(model, "adamw", weight_decay=0.0, fused=True)[0], "optimizer")
        assert not found[0].passed


# What is compared at all


def random_update(seed: int = 0) -> Updates:
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(20, 10)).astype(np.float32), "b": rng.normal(size=30).astype(np.float32)}


def test_measures_agree_with_their_definitions() -> None:
    r, c = random_update(0), random_update(1)
    found = check_updates(1, r, c, r, Numerics.ROUNDING, "bfloat16")
    x, y = (np.concatenate([u["a"].ravel(), u["b"]]).astype(np.float64) for u in (r, c))
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert found.norm_ratio == pytest.approx(np.linalg.norm(y) / np.linalg.norm(x))
    assert found.relative_error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    assert found.noise == 0.0 and not found.passed


def test_bitwise_needs_every_bit() -> None:
    r = random_update()
    c = {name: value.copy() for name, value in r.items()}
    assert check_updates(1, r, c, None, Numerics.BITWISE, "float32").passed
    c["b"][3] = np.nextafter(c["b"][3], np.float32(9))
    assert not check_updates(1, r, c, None, Numerics.BITWISE, "float32").passed
    assert check_updates(1, r, c, None, Numerics.ROUNDING, "optimizer").passed


@pytest.mark.parametrize("broken", ["missing", "shape", "nan", "inf", "empty"])
def test_what_cannot_be_compared_fails_and_names_the_parameter(broken: str) -> None:
    r, c = random_update(), random_update()
    if broken == "missing":
        del c["b"]
    elif broken == "shape":
        c["b"] = c["b"][:5]
    elif broken == "empty":
        r, c = {}, {}
    else:
        c["b"][0] = float(broken)
    found = check_updates(1, r, c, None, Numerics.ROUNDING, "bfloat16")
    assert not found.passed and ("b " in found.worst or broken == "empty")
    dumps(found)


def test_a_dead_small_parameter_is_found() -> None:
    r = random_update()
    r["small"] = np.full(3, 0.5, dtype=np.float32)
    c = {name: value.copy() for name, value in r.items()}
    assert check_updates(1, r, c, None, Numerics.ROUNDING, "bfloat16").passed
    c["small"][:] = 0
    found = check_updates(1, r, c, None, Numerics.ROUNDING, "bfloat16")
    assert not found.passed and found.worst == "small"


def test_parameters_that_do_not_move_prove_nothing() -> None:
    zero = {name: value * 0 for name, value in random_update().items()}
    still = check_updates(1, zero, zero, None, Numerics.ROUNDING, "bfloat16")
    assert still.passed and still.worst == NOTHING_MOVED
    assert not check_updates(1, zero, random_update(), None, Numerics.ROUNDING, "bfloat16").passed
    assert not accept(
        Numerics.ROUNDING, bitwise_equal=False, updates=[still], lag=curve_lag(0.0), losses_seen=True
    ).passed


# The rule

GOOD = UpdateCheck(1, 0.999, 1.0, 0.03, 1.0, passed=True)
BAD = UpdateCheck(2, 0.5, 1.0, 1.0, 1.0, worst="head", passed=False)


def curve_lag(true: float, steps: int = 200, noise: float = 0.0) -> LagResult:
    rng = random.Random(0)
    stock = [1.2 + 3.3 * t**-0.3 + rng.gauss(0, 0.05) for t in range(1, steps + 1)]
    planned = [
        value + 3.3 * ((t / (1 + true)) ** -0.3 - t**-0.3) + noise * rng.gauss(0, 1) + 1e-5
        for t, value in enumerate(stock, 1)
    ]
    return lag(stock, planned)


def judge(numerics: Numerics = Numerics.ROUNDING, **changes: object) -> Proof:
    arguments: dict = {
        "bitwise_equal": False, "updates": [GOOD], "lag": curve_lag(0.0, noise=1e-4), "losses_seen": True,
    }  # fmt: skip
    arguments.update(changes)
    return accept(numerics, **arguments)


def test_the_rungs() -> None:
    assert (judge().rung, judge().passed, judge().weaker) == ("trajectory", True, "")
    shown = judge()
    assert shown.lag_high is not None and shown.lag_high <= 0.01 and shown.steps == 200
    short = judge(lag=curve_lag(0.0, 25, noise=0.05))
    assert (short.rung, short.passed) == ("update", True) and "too few" in short.weaker
    assert short.smallest_lag is not None and short.smallest_lag > 0.01
    none = judge(lag=None)
    assert (none.rung, none.passed) == ("update", True) and none.weaker
    gan = judge(several_optimizers=True)
    assert (gan.rung, gan.passed) == ("update", True) and "several optimizers" in gan.weaker
    assert "dropout" in judge(has_dropout=True).weaker
    assert judge(bitwise_equal=True).rung == "bitwise"


def test_bitwise_is_all_or_nothing() -> None:
    assert judge(Numerics.BITWISE, bitwise_equal=True, updates=[]).rung == "bitwise"
    for equal in (False, None):
        found = judge(Numerics.BITWISE, bitwise_equal=equal)
        assert not found.passed and found.rung == "none"


def test_what_is_rejected() -> None:
    assert not judge(Numerics.CHANGES_TRAINING).passed
    assert not judge(lag=curve_lag(0.02)).passed
    assert not judge(lag=curve_lag(0.10, 25, noise=0.01)).passed
    assert not judge(updates=[]).passed
    assert not judge(updates=[GOOD, BAD]).passed
    assert "head" in judge(updates=[GOOD, BAD]).reason
    assert not judge(lag=lag([1.0] * 3, [1.1] * 3)).passed, "no horizon at all"
    assert not judge(lag=lag([math.nan] * 50, [1.0] * 50)).passed


def test_a_flat_curve_keeps_the_update_rung_unless_the_plan_rises_above_it() -> None:
    rng = random.Random(5)
    stock = [2.0 + rng.gauss(0, 0.05) for _ in range(80)]
    same = judge(lag=lag(stock, [value + rng.gauss(0, 1e-4) for value in stock]))
    assert (same.rung, same.passed) == ("update", True) and "fall" in same.weaker
    assert not judge(lag=lag(stock, [value + 0.03 for value in stock])).passed


def test_an_explosion_is_not_called_too_short_a_horizon() -> None:
    stock = [1.2 + 3.3 * t**-0.3 for t in range(1, 101)]
    rng = random.Random(6)
    stock = [value + rng.gauss(0, 0.05) for value in stock]
    planned = [value + (4.0 if t > 92 else 1e-4) for t, value in enumerate(stock)]
    found = lag(stock, planned)
    assert found.low is not None and found.low < 0.0, "its interval must be the kind that excludes nothing"
    assert not judge(lag=found).passed
    # Where rounding alone decorrelates the arms, only its size tells an explosion from noise.
    wild = msgspec.structs.replace(GOOD, step=3, relative_error=0.9)
    exploded = judge(lag=found, updates=[GOOD, wild])
    assert not exploded.passed and "far higher" in exploded.reason


def test_another_random_stream_is_held_to_the_spread_of_seeds() -> None:
    far = curve_lag(0.03, noise=0.002)
    assert not judge(Numerics.RESEEDS, lag=far).passed
    near = judge(Numerics.RESEEDS, lag=far, seed_spread=0.06)
    assert (near.rung, near.passed) == ("trajectory", True) and "seeds" in near.weaker
    assert not judge(Numerics.ROUNDING, lag=far, seed_spread=0.06).passed


def test_faster_learning_is_rejected_where_only_rounding_may_differ() -> None:
    faster = curve_lag(-0.1)
    found = judge(lag=faster)
    assert not found.passed and "faster" in found.reason
    assert "faster" in judge(Numerics.RESEEDS, lag=curve_lag(-0.05)).weaker
    # Randomness that was left out looks like this.
    much = judge(Numerics.RESEEDS, lag=curve_lag(-0.2))
    assert not much.passed and "than another random stream explains" in much.reason
    wild = UpdateCheck(10, 0.3, 1.0, 0.9, 1.0, passed=True)
    assert "faster" in judge(updates=[GOOD, wild], lag=faster).weaker


kinds = st.sampled_from(list(Numerics))
maybe = st.sampled_from([True, False, None])
lists = st.lists(st.sampled_from([GOOD, BAD]), max_size=3)


@settings(max_examples=200)
@given(kinds, maybe, lists, st.booleans(), st.booleans(), st.sampled_from([None, 0.0, 0.05, math.nan]), st.data())
def test_never_passes_without_evidence(kind, equal, updates, several, dropout, spread, data) -> None:  # type: ignore[no-untyped-def]
    """No loss, a loss that is not finite, a failed update or a changed training: never."""
    fault = data.draw(st.sampled_from(["no loss", "not finite", "failed update", "changes"]))
    stock = [2.0 - 0.01 * t for t in range(40)]
    evidence = lag(stock, [value + 1e-6 for value in stock])
    if fault == "not finite":
        evidence = lag(stock, [*stock[:-1], data.draw(st.sampled_from([math.nan, math.inf]))])
    found = accept(
        Numerics.CHANGES_TRAINING if fault == "changes" else kind,
        bitwise_equal=equal,
        updates=[*updates, BAD] if fault == "failed update" else updates,
        lag=evidence,
        losses_seen=fault != "no loss",
        several_optimizers=several,
        seed_spread=spread,
        has_dropout=dropout,
    )
    assert not found.passed and found.rung == "none" and found.reason
    dumps(found)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([25, 60, 200]),
    st.sampled_from(["scale", "add", "lag"]),
    st.sampled_from([1e-4, 1e-3, 1e-2, 0.1]),
    st.sampled_from([Numerics.ROUNDING, Numerics.RESEEDS]),
)
def test_worse_losses_never_turn_a_rejection_into_acceptance(
    seed: int, steps: int, family: str, size: float, kind: Numerics
) -> None:
    rng = random.Random(seed)
    stock = [1.2 + 3.3 * t**-0.3 + rng.gauss(0, 0.05) for t in range(1, steps + 1)]
    shape = [size * rng.gauss(0.2, 1.0) for _ in stock]
    if sum(shape[steps // 3 :]) <= 0:
        return  # better than stock where it matters: another rule, and then worse may be more alike
    ranks = []
    for amount in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0):
        if family == "scale":
            planned = [value + amount * d for value, d in zip(stock, shape, strict=True)]
        elif family == "add":
            planned = [value + d + 0.01 * amount for value, d in zip(stock, shape, strict=True)]
        else:
            planned = [
                value + 0.1 * d + 3.3 * ((t / (1 + 0.01 * amount)) ** -0.3 - t**-0.3)
                for t, (value, d) in enumerate(zip(stock, shape, strict=True), 1)
            ]
        found = judge(kind, lag=lag(stock, planned))
        ranks.append(RUNGS.index(found.rung) if found.passed else 0)
    assert ranks == sorted(ranks, reverse=True), ranks
