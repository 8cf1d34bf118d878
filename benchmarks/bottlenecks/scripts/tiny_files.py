"""One small file a sample, opened whenever it is read."""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Signals(Dataset):
    def __init__(self, folder: Path, keep: bool) -> None:
        self.files = sorted(folder.glob("*.pt"))
        self.kept = [torch.load(file, weights_only=True) for file in self.files] if keep else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.kept is not None:
            return self.kept[index]
        return torch.load(self.files[index], weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    for number in range(512):
        torch.save(torch.randn(256), folder / f"{number:05}.pt")
    loader = DataLoader(Signals(folder, args.fixed), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(256, 768), nn.GELU(), nn.Linear(768, 768), nn.GELU(), nn.Linear(768, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in itertools.count():
        for signals in loader:
            noisy = signals + 0.1 * torch.randn_like(signals)
            loss = nn.functional.mse_loss(model(noisy), signals)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
