"""Faster because it trains less, or otherwise: every such plan fails at its updates, its curve or its first loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from arms import Training, trained, verdict
from torch import nn

from upshift.measure.updates import check_updates
from upshift.sites import Numerics


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Same sums in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def at(moment: str, act: Callable[[Training], Any], first: int = 1, every: int = 1) -> Callable[[Training, str], Any]:
    """A cheat that acts at one moment of every n-th step from `first` on."""

    def cheat(training: Training, now: str) -> Any:
        due = training.step >= first and (training.step - first) % every == 0
        return act(training) if now == moment and due else None

    return cheat


def scale_loss(training: Training) -> None:
    training.scale = 0.97


def drop_layer(training: Training) -> None:
    for parameter in training.model[5].parameters():  # type: ignore[index]
        parameter.grad = torch.zeros_like(parameter)


def freeze_norm(training: Training) -> None:
    training.model[1].eval()  # type: ignore[index]


def fewer_samples(training: Training) -> None:
    training.rows = training.rows[: len(training.rows) // 2]


def shorter_samples(training: Training) -> None:
    if "shortened" not in training.kept:
        training.x = training.x.clone()
        training.x[:, :, :, 4:] = 0.0
        training.kept["shortened"] = True


def shuffle_labels(training: Training) -> None:
    if "shuffled" not in training.kept:
        training.y = training.y[torch.randperm(len(training.y), generator=torch.Generator().manual_seed(2))]
        training.kept["shuffled"] = True


def reset_state(training: Training) -> None:
    training.optimizer.state.clear()


def change_epsilon(training: Training) -> None:
    training.optimizer.param_groups[0]["eps"] = 1e-3


def change_rate(training: Training) -> None:
    training.optimizer.param_groups[0]["lr"] *= 1.03


def skip(training: Training) -> bool:
    return True


def old_gradients(training: Training) -> None:
    """Steps with the gradients of the step before: no need to wait for the backward pass."""
    now = [parameter.grad.clone() for parameter in training.model.parameters()]  # type: ignore[union-attr]
    old = training.kept.get("old", now)
    for parameter, gradient in zip(training.model.parameters(), old, strict=True):
        parameter.grad = gradient
    training.kept["old"] = now


def same_batch(training: Training) -> None:
    """A cache that hands out the first batch again."""
    training.rows = training.kept.setdefault("rows", training.rows)


def half_batches(training: Training) -> None:
    training.bf16 = True
    fewer_samples(training)


def one_layer_late(training: Training) -> None:
    """bfloat16, and the first layer is only updated in the first steps."""
    training.model[0].weight.grad.zero_()  # type: ignore[index]


CHEATS = {
    "scales the loss": at("batch", scale_loss),
    "drops the gradients of one layer": at("backward", drop_layer),
    "freezes BatchNorm": at("forward", freeze_norm),
    "leaves out half of each batch": at("batch", fewer_samples),
    "leaves out samples behind real bfloat16": at("batch", half_batches),
    "shortens the samples": at("start", shorter_samples, first=0),
    "shuffles labels from step 20 on": at("batch", shuffle_labels, first=20),
    "resets the optimizer's state at step 10": at("update", reset_state, first=10, every=10**6),
    "changes eps": at("start", change_epsilon, first=0),
    "raises the learning rate": at("start", change_rate, first=0),
    "uses the gradients of the step before": at("backward", old_gradients),
    "serves the first batch again": at("batch", same_batch),
    "skips every second optimizer step": at("update", skip, first=2, every=2),
    "skips every fifth optimizer step, unseen by the updates that are compared": at("update", skip, first=13, every=5),
    "does not train one layer after the updates were compared": at("backward", drop_layer, first=12),
}


@pytest.fixture(scope="module")
def stock() -> Any:
    return {name: trained(optimizer_name=name) for name in ("adam", "sgd")}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("cheat", CHEATS)
def test_less_work_or_other_work_is_no_win(cheat: str, optimizer: str, stock: Any) -> None:
    if cheat == "changes eps" and optimizer == "sgd":
        pytest.skip("SGD has no eps")
    found = verdict(stock[optimizer], trained(CHEATS[cheat], optimizer_name=optimizer))
    assert not found.passed and found.rung == "none" and found.reason, found


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_same_judge_accepts_honest_bfloat16(optimizer: str, stock: Any) -> None:
    def bf16(training: Training, moment: str) -> None:
        training.bf16 = True

    found = verdict(stock[optimizer], trained(bf16, optimizer_name=optimizer))
    assert found.passed, found


def test_dropout_switched_off_after_the_updates_were_compared_is_no_win() -> None:
    def off(training: Training, moment: str) -> None:
        if moment == "forward":
            for module in training.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    stock = trained(dropout=0.5, steps=80)
    found = verdict(stock, trained(off, dropout=0.5, steps=80), dropout=True)
    assert not found.passed and "faster per step than stock" in found.reason, found


def test_rounding_that_calls_itself_bitwise_is_no_win(stock: Any) -> None:
    def rounds(training: Training, moment: str) -> None:
        if moment == "update" and training.step == 40:
            with torch.no_grad():
                training.model[7].bias.mul_(1 + 1e-6)  # type: ignore[index]

    found = verdict(stock["adam"], trained(rounds), numerics=Numerics.BITWISE, precision="float32")
    assert not found.passed and "not identical" in found.reason


def test_one_parameter_that_goes_elsewhere_is_no_win() -> None:
    """A tenth of the update points elsewhere: of all parameters together, bfloat16 may differ as much."""
    rng = np.random.default_rng(0)
    large, small, other = (rng.normal(size=5000).astype(np.float32) for _ in range(3))
    stock, planned = {"large": large, "small": small / 3}, {"large": large, "small": other / 3}
    found = check_updates(1, stock, planned, None, Numerics.ROUNDING, "bfloat16")
    assert found.cosine > 0.85 and abs(found.norm_ratio - 1.0) < 0.01
    assert not found.passed and found.worst == "small"
