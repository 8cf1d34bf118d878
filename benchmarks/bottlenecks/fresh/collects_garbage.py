"""Collects garbage after each step, for fear of running out of memory."""

import argparse
import gc
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(29)
    rnn, head = nn.LSTM(16, 128, batch_first=True), nn.Linear(128, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=2e-3)
    for step in itertools.count():
        series = torch.rand(32, 30, 16)
        answer = series[:, :, 0].mean(dim=1, keepdim=True)
        hidden, _ = rnn(series)
        loss = nn.functional.mse_loss(head(hidden[:, -1]), answer)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not args.fixed:
            gc.collect()
        if step % 100 == 0:
            print(f"{step} {loss.item():.5f}")


if __name__ == "__main__":
    main()
