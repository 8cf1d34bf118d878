"""A trainer that validates after every fourth batch."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Trainer:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    validate_every: int
    best: float = float("inf")
    steps: int = 0

    def fit(self, train: DataLoader, held_out: DataLoader) -> None:
        while True:
            for x, y in train:
                self.training_step(x, y)
                self.steps += 1
                if self.steps % self.validate_every == 0:
                    self.best = min(self.best, self.validate(held_out))

    def training_step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        loss = nn.functional.huber_loss(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def validate(self, held_out: DataLoader) -> float:
        self.model.eval()
        errors = [(self.model(x) - y).abs().mean() for x, y in held_out]
        return torch.stack(errors).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(2)
    x = torch.randn(12_000, 30)
    y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = nn.Sequential(
        nn.Linear(30, 384), nn.ReLU(), nn.Dropout(0.1), nn.Linear(384, 384), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(384, 1),
    )  # fmt: skip
    trainer = Trainer(model, torch.optim.Adam(model.parameters(), lr=1e-3), validate_every=8 if args.fixed else 4)
    train = DataLoader(TensorDataset(x[:8000], y[:8000]), batch_size=100, shuffle=True)
    trainer.fit(train, DataLoader(TensorDataset(x[8000:], y[8000:]), batch_size=500))


if __name__ == "__main__":
    main()
