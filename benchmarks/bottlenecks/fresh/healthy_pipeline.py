"""A loader that keeps pace, rare validation, a rare checkpoint: what a tidy script does."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    losses = [nn.functional.mse_loss(model(x), y) for x, y in loader]
    model.train()
    return torch.stack(losses).mean().item()


def main(folder: Path) -> None:
    torch.manual_seed(33)
    x = torch.randn(20_000, 400)
    y = torch.cos(x[:, :40]) + 0.1 * torch.randn(20_000, 40)
    train = DataLoader(TensorDataset(x[:18_000], y[:18_000]), batch_size=600, shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(x[18_000:], y[18_000:]), batch_size=1000)
    model = nn.Sequential(nn.Linear(400, 1800), nn.ReLU(), nn.Linear(1800, 1800), nn.ReLU(), nn.Linear(1800, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for epoch in range(10_000):
        for features, target in train:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(features), target)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: train {loss.item():.4f} held out {validate(model, held_out):.4f}")
        if epoch % 10 == 9:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
