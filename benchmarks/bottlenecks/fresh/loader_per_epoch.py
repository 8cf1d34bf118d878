"""Makes a new loader, with its workers, at the start of each short epoch."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Sums(Dataset):
    def __init__(self) -> None:
        self.digits = torch.randint(0, 10, (480, 6))

    def __len__(self) -> int:
        return 480

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        digits = self.digits[index]
        return nn.functional.one_hot(digits, 10).float().flatten(), digits.sum()


def loader(workers: int, persistent: bool) -> DataLoader:
    return DataLoader(Sums(), batch_size=40, shuffle=True, num_workers=workers, persistent_workers=persistent)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(17)
    model = nn.Sequential(nn.Linear(60, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 55))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4)
    kept = loader(2, persistent=True) if args.fixed else None
    for epoch in range(1_000_000):
        for x, y in kept or loader(2, persistent=False):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch}: {loss.item():.3f}")


if __name__ == "__main__":
    main()
