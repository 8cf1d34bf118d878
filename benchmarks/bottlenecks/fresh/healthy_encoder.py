"""A wide transformer encoder with library attention, a fused optimizer and a rare log."""

import itertools

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(32)
    layer = nn.TransformerEncoderLayer(512, nhead=8, dim_feedforward=2048, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=2)
    embed, head = nn.Embedding(500, 512), nn.Linear(512, 500)
    model = nn.Sequential(embed, encoder, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    corpus = torch.arange(40_000) * 11 % 500
    for step in itertools.count():
        starts = torch.randint(0, len(corpus) - 64, (12,))
        tokens = corpus[starts[:, None] + torch.arange(64)]
        noisy = torch.where(torch.rand(tokens.shape) < 0.15, 0, tokens)
        loss = nn.functional.cross_entropy(model(noisy).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
