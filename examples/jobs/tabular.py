"""Prices of diamonds, as a declared job: a multi-layer perceptron with embeddings of the grades.

    python examples/get_data.py diamonds
    upshift run --out runs/diamonds examples/jobs/tabular.py:diamonds

Batches are tuples of three tensors: the model is called with the first two, the last one is the target. What counts is
the mean error in dollars, a metric of the job's own; its weights are an average over the updates.

Measured 2026-11-21 on one thread of a virtual machine with two cores (AMD EPYC, CPU only) on which other work ran:
mean error 279.2 dollars on held-out rows after 6,760 updates, in 47 s, of which 29 s of processor time.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from upshift import Job, Target
from upshift.engine.averages import Ema
from upshift.engine.schedules import cosine

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(EXAMPLES))

from get_data import DEFAULT_FOLDER, load_npz  # noqa: E402
from tabular_mlp import TabularMLP  # noqa: E402  (the model of the script)


def diamonds(epochs: int = 20, width: int = 128, limit: int | None = None,
             data: str | Path = DEFAULT_FOLDER) -> Job:  # fmt: skip
    """The job.

    Args:
        epochs: passes over the training rows. width: of the first dense layer. limit: use the first rows only.
        data: folder with diamonds.npz.
    """
    found = load_npz("diamonds", data)
    order = np.random.default_rng(0).permutation(len(found["price"]))[:limit]
    numeric, grades, price = (found[key][order] for key in ("numeric", "categorical", "price"))
    train, test = slice(len(order) // 5, None), slice(len(order) // 5)
    # A few rows hold impossible sizes (a diamond 6 cm high); far out they would be spikes of the loss.
    numeric = ((numeric - numeric[train].mean(0)) / numeric[train].std(0)).clip(-5, 5)
    logs = np.log(price)
    offset, scale = float(logs[train].mean()), float(logs[train].std())
    target = ((logs - offset) / scale).astype(np.float32)

    def dollars(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Absolute errors, shape (n,)."""
        return ((output * scale + offset).exp() - (wanted * scale + offset).exp()).abs()

    cardinalities = [len(found[column]) for column in ("cut", "color", "clarity")]
    return Job(
        model=partial(TabularMLP, numeric.shape[1], cardinalities, [width, width // 2, width // 4], 0.0),
        train_data=(numeric[train], grades[train], target[train]),
        eval_data=(numeric[test], grades[test], target[test]),
        loss=F.mse_loss,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2),
        schedule=cosine(warm_up="5 %"),
        average=Ema(0.999),
        metrics={"mean_error": dollars},
        target=Target("mean_error", 290.0),
        global_batch=min(128, len(target[train])),
        epochs=epochs,
    )
