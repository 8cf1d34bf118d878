"""A language model that reads each batch again after the step, for its perplexity."""

import argparse
import itertools

import torch
from torch import nn


class Characters(nn.Module):
    def __init__(self, vocabulary: int = 80, width: int = 192) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, kernel_size=5)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(self.embed(text).transpose(1, 2), (4, 0))
        x = torch.relu(self.mix(x)).transpose(1, 2)
        return self.head(x + self.feed(x))


def loss_of(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    logits = model(text[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(18)
    book = (torch.arange(200_000) * 7 % 80 + torch.randint(0, 3, (200_000,))) % 80
    model = Characters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    logged = torch.zeros(())
    for step in itertools.count(1):
        starts = torch.randint(0, len(book) - 65, (24,))
        text = book[starts[:, None] + torch.arange(65)]
        loss = loss_of(model, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.fixed:
            logged += loss.detach().exp()
        else:
            with torch.no_grad():
                logged += loss_of(model, text).exp()
        if step % 50 == 0:
            print(f"perplexity {logged.item() / 50:.2f}")
            logged.zero_()


if __name__ == "__main__":
    main()
