"""How often the guard of a run cries wolf, and how soon it sees harm. Seeded; one thread; under three minutes.

    python benchmarks/guard_simulation.py [--runs 400] [--trainings 160] [--only simulated|trained]

Simulated: a band from one curve, runs from others: a power law with heavy-tailed batch noise, a lag of its own per seed
(standard deviation 10 %), 3,000 steps, horizons of 40, 150 and 500 steps.

Trained: eight tiny tasks (logistic, MLPs, a convolution with batch norm, dropout, regression, an autoencoder, XOR, a
memorised set). The band is from one seed, the runs from others (initial weights and order of the batches), no harm in
any. Harms, each from a given step on: gradients scaled, gradients with noise added, parameters that decay.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from statistics import median

from upshift.measure.band import band_of
from upshift.measure.guard import ALPHA, Guard, Signal

HORIZONS = (40, 150, 500)


def upper(alarms: int, runs: int, level: float = 0.95) -> float:
    """Clopper and Pearson's (1934) one-sided upper bound of a rate: the p for which P(X <= alarms) = 1 - level."""
    low, high = alarms / runs, 1.0
    for _ in range(60):
        p = (low + high) / 2.0
        below = math.fsum(math.comb(runs, k) * p**k * (1.0 - p) ** (runs - k) for k in range(alarms + 1))
        low, high = (p, high) if below > 1.0 - level else (low, p)
    return high


def alarm(reference: list[float], losses: list[float]) -> Signal | None:
    """The first alarm of a run against the band of another."""
    band, _ = band_of(reference)
    assert band is not None
    return next(iter(Guard(band).add(range(len(losses)), losses)), None)


def tell(what: str, found: list[Signal | None]) -> None:
    """Print the rate of false alarms of clean runs."""
    within = sum(item is not None and not item.beyond for item in found)
    beyond = sum(item is not None and item.beyond for item in found)
    total = within + beyond
    print(
        f"{what:<42} {len(found):>5} runs, alarms {within} within + {beyond} beyond the band: "
        f"{total / len(found):.2%}, below {upper(total, len(found)):.2%} (95 %)",
        flush=True,
    )


# -- simulated ------------------------------------------------------------------------------------------------------


def curve(rng: random.Random, steps: int, noise: float, raised: float = 0.0, begins: int = 0) -> list[float]:
    """A run of one seed; its loss is raised by so much after step `begins`."""
    lag = 1.0 + rng.gauss(0.0, 0.10)
    return [
        1.2
        + 3.3 * ((t + 5) / lag) ** -0.3
        + noise * rng.gauss(0.0, 1.0) / math.sqrt(rng.gammavariate(2.5, 0.4))
        + (raised if t > begins else 0.0)
        for t in range(1, steps + 1)
    ]


def simulated(runs: int) -> None:
    """False alarms and delays on simulated curves."""
    rng, found = random.Random(1), []
    for i in range(runs):
        horizon, noise = HORIZONS[i % 3], (0.03, 0.1, 0.3)[i // 3 % 3]
        found.append(alarm(curve(rng, horizon, noise), curve(rng, 3000, noise)))
    tell("simulated curves, 3,000 steps", found)
    print("\nloss raised from step 100 on (band of 500 steps, noise 0.1, fallen by 1.1 there), 60 runs each:")
    for size in (0.1, 0.2, 0.4, 0.8, 1.6):
        pairs = [(curve(rng, 500, 0.1), curve(rng, 500, 0.1, size, 100)) for _ in range(60)]
        delays(f"by {size:g}", 100, [alarm(band, run) for band, run in pairs])
    print("\nthe same from step 1,500 on, beyond a band of 150 steps, of 3,000 (fallen by 1.6):")
    for size in (0.4, 0.8, 1.6, 3.2):
        pairs = [(curve(rng, 150, 0.1), curve(rng, 3000, 0.1, size, 1500)) for _ in range(60)]
        delays(f"by {size:g}", 1500, [alarm(band, run) for band, run in pairs])


def delays(what: str, begins: int, found: list[Signal | None]) -> None:
    """Print in how many runs a harm was seen, and after how many steps."""
    early = sum(item is not None and item.step <= begins for item in found)
    after = sorted(item.step - begins for item in found if item is not None and item.step > begins)
    steps = (
        f"after {median(after):.0f} steps (median), {after[math.ceil(0.9 * len(after)) - 1]} (90 %)" if after else ""
    )
    print(f"  {what:<34} seen in {len(after)} of {len(found)} {steps}{f'; {early} before it' if early else ''}")


# -- trained --------------------------------------------------------------------------------------------------------

TASKS = ("logistic", "mlp", "regression", "autoencoder", "dropout", "xor", "convolution", "memorised")


def task(kind: str, seed: int) -> tuple:
    """Model, optimizer, loss function and data of a task; only the model depends on the seed."""
    import torch
    from torch import nn
    from torch.nn import functional

    fixed = torch.Generator().manual_seed(5)
    x, w = torch.randn(512, 8, generator=fixed), torch.randn(8, 4, generator=fixed)
    y, loss = (x @ w).sin().argmax(1), functional.cross_entropy
    torch.manual_seed(seed)

    def mlp(inside: nn.Module, *after: nn.Module, width: int = 32, out: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), inside, *after, nn.Linear(width, out))

    if kind == "logistic":
        y, model = (x @ w + torch.randn(512, 4, generator=fixed)).argmax(1), nn.Linear(8, 4)
    elif kind == "regression":
        y, model, loss = (
            (x @ w).tanh() + 0.1 * torch.randn(512, 4, generator=fixed),
            mlp(nn.Tanh()),
            functional.mse_loss,
        )
    elif kind == "autoencoder":
        y, model, loss = x, mlp(nn.ReLU(), width=4, out=8), functional.mse_loss
    elif kind == "dropout":
        model = mlp(nn.ReLU(), nn.Dropout(0.3), width=64)
    elif kind == "xor":
        y, model = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long(), mlp(nn.ReLU(), width=16, out=2)
    elif kind == "convolution":
        y = (x[:, :4].sum(1) > 0).long() + 2 * (x[:, 4:].sum(1) > 0).long()
        front = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        model = nn.Sequential(front, nn.Flatten(), nn.Linear(64, 4))
    elif kind == "memorised":
        x, y, model = x[:64], torch.randint(0, 4, (64,), generator=fixed), mlp(nn.ReLU(), width=64)
    else:
        model = mlp(nn.ReLU())
    adam = kind in ("mlp", "autoencoder", "xor", "memorised")
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 0.01) if adam else torch.optim.SGD(parameters, 0.1, momentum=0.9)
    return model, optimizer, loss, x, y


def train(kind: str, seed: int, steps: int, harm: Callable = lambda parameters: None, begins: int = 0) -> list[float]:
    """Train; the loss of every step. `harm` acts on the parameters before each step from `begins` on."""
    import torch

    model, optimizer, loss_of, x, y = task(kind, seed)
    order, left = torch.Generator().manual_seed(seed + 1000), []
    losses = []
    for step in range(steps):
        if len(left) < 16:
            left = torch.randperm(len(x), generator=order).tolist()
        batch, left = left[:16], left[16:]
        optimizer.zero_grad()
        loss = loss_of(model(x[batch]), y[batch])
        loss.backward()
        if step >= begins:
            harm(model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


def scaled(factor: float) -> Callable:
    """Gradients multiplied by a factor."""

    def act(parameters: object) -> None:
        for parameter in parameters:
            parameter.grad.mul_(factor)

    return act


def noisy(size: float) -> Callable:
    """Noise of `size` times the gradient's own norm added to it."""
    import torch

    def act(parameters: object) -> None:
        for parameter in parameters:
            parameter.grad.add_(torch.randn_like(parameter) * parameter.grad.square().mean().sqrt(), alpha=size)

    return act


def decaying(share: float) -> Callable:
    """Parameters lose a share of themselves each step."""

    def act(parameters: object) -> None:
        for parameter in parameters:
            parameter.data.mul_(1.0 - share)

    return act


def trained(trainings: int) -> None:
    """False alarms and delays on tiny trainings."""
    import torch

    torch.set_num_threads(1)
    stock = {kind: train(kind, 0, max(HORIZONS)) for kind in TASKS}
    found: list[Signal | None] = []
    for i in range(trainings):
        kind, horizon = TASKS[i % len(TASKS)], HORIZONS[i // len(TASKS) % 3]
        found.append(alarm(stock[kind][:horizon], train(kind, i + 1, 800)))
    tell("tiny trainings, other seeds, 800 steps", found)
    print("\nharm from step 100 on in trainings with other seeds (band of 500 steps, 500 steps trained):")
    harms = {
        "gradients scaled by 0": scaled(0.0),
        "gradients scaled by 0.1": scaled(0.1),
        "gradients scaled by 10": scaled(10.0),
        "gradients with 10 x noise": noisy(10.0),
        "parameters lose 1 % a step": decaying(0.01),
        "parameters lose 5 % a step": decaying(0.05),
        "gradients of the wrong sign": scaled(-1.0),
    }
    for name, harm in harms.items():
        delays(name, 100, [alarm(stock[kind], train(kind, 500 + i, 500, harm, 100)) for i, kind in enumerate(TASKS)])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--trainings", type=int, default=160)
    parser.add_argument("--only", choices=("simulated", "trained"))
    options = parser.parse_args()
    began = time.monotonic()
    print(f"stated rate of false alarms: {ALPHA:.0%} of runs\n")
    if options.only != "trained":
        simulated(options.runs)
        print()
    if options.only != "simulated":
        trained(options.trainings)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
