"""Sequences of different lengths, padded element by element when a batch is put together."""

import argparse
import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader


def pad(samples: list[list[int]]) -> torch.Tensor:
    longest = max(len(sample) for sample in samples)
    batch = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        for column, token in enumerate(sample):
            batch[row, column] = token
    return batch


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 64)
        self.inner = nn.Linear(64, 256)
        self.outer = nn.Linear(256, 500)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(self.embed(tokens))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    sequences = [torch.randint(1, 500, (20 + index % 30,)).tolist() for index in range(2048)]
    workers = 2 if args.fixed else 0
    loader = DataLoader(
        sequences, batch_size=32, shuffle=True, collate_fn=pad, num_workers=workers, persistent_workers=bool(workers)
    )
    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in itertools.count():
        for tokens in loader:
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
