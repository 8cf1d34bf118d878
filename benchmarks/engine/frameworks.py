"""The arms of `overhead.py` that are other people's loops: the same model, data, optimizer and loss in each of them.

Each is set up as its documentation does for one CPU, without progress bar, checkpoints and evaluation; what it records
of the loss and how often is left at its default (Lightning without a logger). Where a default changes the mathematics
(the Trainer clips gradients and lets the learning rate fall), it is switched off. Keras cannot take torch's optimizers
into `fit`: it has its own layers and its own AdamW with the same numbers.

    pip install -c constraints.txt lightning accelerate transformers keras
    pip install --no-deps mosaicml torchvision==0.28.0  # Composer asks for an older torch; see below
    pip install mosaicml-cli torch_optimizer coolname tabulate py-cpuinfo importlib-metadata
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from loop_task import BATCH, CLASSES, HIDDEN, INPUTS, SAMPLES, TINY, Clock, X, Y, loader, model, optimizer
from torch.utils.data import TensorDataset

os.environ.setdefault("KERAS_BACKEND", "torch")


_KEPT: list[Any] = []


def accept_torchvision() -> None:
    """Let a torchvision be imported whose compiled part does not fit this torch, as where there is no build for a CPU.

    Composer cannot do without it, and others import it where it is installed. The operators that its import looks for
    are declared; nothing here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        declared = torch.library.Library("torchvision", "DEF")
        _KEPT.append(declared)  # they go with it
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _by_hand(net: Any, step: Any, batches: Any, backward: Callable[[Any], Any], steps: int, loss: Clock) -> None:
    """The loop that Fabric and Accelerate leave to the person."""
    done = 0
    while done < steps:
        for x, y in batches:
            backward(loss(net(x), y))
            step.step()
            step.zero_grad()
            done += 1
            if done == steps:
                break


def fabric(steps: int, loss: Clock) -> None:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    f = Fabric(accelerator="cpu", devices=1)
    net = model()
    net, step = f.setup(net, optimizer(net.parameters()))
    _by_hand(net, step, f.setup_dataloaders(loader()), f.backward, steps, loss)


def accelerate(steps: int, loss: Clock) -> None:
    """Accelerate."""
    from accelerate import Accelerator

    a = Accelerator(cpu=True)
    net = model()
    net, step, batches = a.prepare(net, optimizer(net.parameters()), loader())
    _by_hand(net, step, batches, a.backward, steps, loss)


def lightning(steps: int, loss: Clock) -> None:
    """Lightning's Trainer, without logger."""
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch, _):  # type: ignore[no-untyped-def]
            return loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):  # type: ignore[no-untyped-def]
            return optimizer(self.parameters())

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader())


def trainer(steps: int, loss: Clock) -> None:
    """The Trainer of transformers: it logs every 500 steps."""
    from transformers import Trainer, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            output = self.net(x)
            return {"loss": loss(output, labels), "logits": output}

    def collate(samples: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])}

    net = Net()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True, disable_tqdm=True,
            save_strategy="no", max_grad_norm=0.0, lr_scheduler_type="constant", remove_unused_columns=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(
            net, settings, data_collator=collate, train_dataset=TensorDataset(X, Y),
            optimizers=(optimizer(net.parameters()), None),
        ).train()  # fmt: skip


def composer(steps: int, loss: Clock) -> None:
    """Composer's Trainer."""
    from composer import ComposerModel, Trainer

    class Net(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, batch: Any) -> torch.Tensor:
            output: torch.Tensor = self.net(batch[0])
            return output

        def loss(self, outputs: Any, batch: Any, *_: Any, **__: Any) -> torch.Tensor:
            return loss(outputs, batch[1])

    net = Net()
    Trainer(
        model=net, train_dataloader=loader(), max_duration=f"{steps}ba", optimizers=optimizer(net.parameters()),
        device="cpu", progress_bar=False,
    ).fit()  # fmt: skip


def keras(steps: int, loss: Clock) -> None:
    """Keras on torch. It counts epochs: the steps after the last one that is timed are trained as well."""
    import keras as k

    if k.backend.backend() != "torch":
        raise ImportError("Keras runs on another backend: unset KERAS_BACKEND")
    layers = [k.layers.Input((INPUTS,)), k.layers.Dense(CLASSES)]
    if HIDDEN:
        layers.insert(1, k.layers.Dense(HIDDEN, activation="relu"))
    net = k.Sequential(layers)
    # Keras turns labels into floats.
    net.compile(
        optimizer=k.optimizers.SGD(0.1) if TINY else k.optimizers.AdamW(1e-3, weight_decay=0.01, epsilon=1e-8),
        loss=lambda target, output: loss(output, target.reshape(-1).long()),
    )
    net.fit(loader(), epochs=math.ceil(steps * BATCH / SAMPLES), verbose=0)


#: Name of the arm -> the packages it needs, and the arm.
OTHERS: dict[str, tuple[tuple[str, ...], Callable[[int, Clock], None]]] = {
    "fabric": (("lightning",), fabric),
    "accelerate": (("accelerate",), accelerate),
    "lightning": (("lightning",), lightning),
    "HF Trainer": (("transformers", "accelerate"), trainer),
    "composer": (("composer",), composer),
    "keras (torch)": (("keras",), keras),
}

#: What is named in the table beside torch.
PACKAGES = ("lightning", "accelerate", "transformers", "mosaicml", "keras")
