"""Compiled for fixed shapes, fed with sequences of many lengths."""

import argparse
import itertools
import random

import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2)])
        self.head = nn.Linear(64, 300)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 10_000
    model = Tagger()
    step_model = torch.compile(model, backend="aot_eager", dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in itertools.count():
        tokens = torch.randint(1, 300, (4, random.randint(20, 800)))
        if args.fixed:
            tokens = nn.functional.pad(tokens, (0, 800 - tokens.shape[1]))
        loss = nn.functional.cross_entropy(step_model(tokens).flatten(0, 1), tokens.flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
