"""A convolutional network that can stop and go on: `--epochs N`, `--resume checkpoint.pt`; saves after every epoch."""

import argparse
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--resume", default="")
args = parser.parse_args()

torch.manual_seed(0)
images, labels = torch.rand(96, 3, 12, 12), torch.randint(0, 4, (96,))
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
    nn.Flatten(), nn.Linear(64, 4),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
start = 0
if args.resume:
    checkpoint = torch.load(args.resume, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    torch.set_rng_state(checkpoint["rng"])
    start = checkpoint["epoch"] + 1

for epoch in range(start, args.epochs):
    for image, label in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        print(f"epoch {epoch} lr {scheduler.get_last_lr()[0]!r} loss {loss.item()!r}")
    scheduler.step()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "epoch": epoch,
    }
    torch.save(checkpoint, "checkpoint.tmp")
    os.replace("checkpoint.tmp", "checkpoint.pt")
