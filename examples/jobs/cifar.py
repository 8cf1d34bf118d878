"""A small ResNet on CIFAR-10, as a declared job.

    python examples/get_data.py cifar10
    upshift run --out runs/cifar examples/jobs/cifar.py:cifar
    upshift run --out runs/deeper --set blocks=3 --set epochs=30 examples/jobs/cifar.py:cifar

Crops and flips are drawn for each sample: the job gives every sample a seed of its own, so that they are the same with
any number of loader processes, and after a resume.

Measured 2026-11-21 on one thread of a virtual machine with two cores (AMD EPYC, CPU only) on which other work ran:
accuracy 0.571 on the test images after 391 updates, in 440 s, of which 137 s of processor time.
Longer and deeper ones were not measured.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from upshift import Job, Target
from upshift.engine.parameters import ParameterGroups
from upshift.engine.schedules import one_cycle

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(EXAMPLES))

from cifar_resnet import CIFAR10, ResNet  # noqa: E402  (model and data are those of the script)
from get_data import DEFAULT_FOLDER, load_npz  # noqa: E402


def cifar(epochs: int = 1, blocks: int = 1, width: int = 16, limit: int | None = None,
          data: str | Path = DEFAULT_FOLDER) -> Job:  # fmt: skip
    """The job.

    Args:
        epochs: passes over the training images. blocks: residual blocks a stage, 6 * blocks + 2 layers.
        width: channels of the first stage. limit: use the first images only. data: folder with cifar10.npz.
    """
    found, part = load_npz("cifar10", data), slice(limit)
    return Job(
        model=partial(ResNet, blocks, width),
        train_data=CIFAR10(found["train_images"][part], found["train_labels"][part], augment=True),
        eval_data=CIFAR10(found["test_images"][part], found["test_labels"][part], augment=False),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True),
        parameters=ParameterGroups(),  # norms and biases do not decay
        schedule=one_cycle("25 %"),
        metrics={"accuracy": "accuracy"},
        target=Target("accuracy", 0.55),
        global_batch=min(128, len(found["train_labels"][part])),
        epochs=epochs,
    )
