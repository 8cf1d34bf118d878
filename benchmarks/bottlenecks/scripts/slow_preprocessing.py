"""Tokenizes the sentences of each batch in the training loop."""

import argparse
import itertools
import random

import torch
from torch import nn

WORDS = ["".join(random.choices("abcdefgh", k=5)) for _ in range(2000)]


def encode(sentences: list[str], vocabulary: dict[str, int]) -> torch.Tensor:
    return torch.tensor([[vocabulary[word.strip().lower()] for word in sentence.split(" ")] for sentence in sentences])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 64)
        self.head = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    sentences = [" ".join(random.choices(WORDS, k=60)) for _ in range(4096)]
    ready = encode(sentences, vocabulary) if args.fixed else None
    labels = torch.randint(0, 4, (4096,))
    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in itertools.count():
        start = step * 128 % 4096
        tokens = encode(sentences[start : start + 128], vocabulary) if ready is None else ready[start : start + 128]
        loss = nn.functional.cross_entropy(model(tokens), labels[start : start + 128])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
