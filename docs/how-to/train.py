"""A small training: 640 lines of text are parsed into samples, and a classifier learns them. It is made for the how-to
pages: it takes seconds, and parsing is what makes it slow."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Lines(Dataset):
    """Samples kept as text, as in a CSV file; the label says which half of the numbers is larger."""

    def __init__(self, seed: int, size: int) -> None:
        values = torch.randn(size, 512, generator=torch.Generator().manual_seed(seed))
        self.labels = (values[:, :256].sum(1) > values[:, 256:].sum(1)).long()
        self.lines = [" ".join(f"{value:.4f}" for value in row) for row in values.tolist()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(number) for number in self.lines[index].split()]), self.labels[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=256, help="of the hidden layer")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train = DataLoader(Lines(1, 640), batch_size=32, shuffle=True)
    held_out = DataLoader(Lines(2, 320), batch_size=320)
    model = nn.Sequential(nn.Linear(512, args.width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(args.width, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for epoch in range(1, args.epochs + 1):
        model.train()
        for x, y in train:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0 or epoch == args.epochs:
            model.eval()
            with torch.no_grad():
                right = sum((model(x).argmax(1) == y).sum().item() for x, y in held_out)
            print(f"epoch {epoch}  accuracy {right / 320:.4f}")


if __name__ == "__main__":
    main()
