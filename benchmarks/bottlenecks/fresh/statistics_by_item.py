"""Keeps the loss and the hit of every sample, read one `.item()` at a time in each step."""

import argparse
import itertools
from collections import deque

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(11)
    x = torch.randn(20_000, 40)
    y = (x @ torch.randn(40, 6)).argmax(dim=1)
    net = nn.Sequential(nn.Linear(40, 256), nn.Tanh(), nn.Linear(256, 6))
    optim = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses: deque[float] = deque(maxlen=10_000)
    hits, seen = [0] * 6, [0] * 6
    for step in itertools.count():
        pick = torch.randperm(len(x))[:400]
        inputs, labels = x[pick], y[pick]
        output = net(inputs)
        each = nn.functional.cross_entropy(output, labels, reduction="none")
        optim.zero_grad()
        each.mean().backward()
        optim.step()
        guess = output.argmax(dim=1)
        if args.fixed:
            losses.extend(each.tolist())
            for label, count in enumerate(torch.bincount(labels[guess == labels], minlength=6).tolist()):
                hits[label] += count
            for label, count in enumerate(torch.bincount(labels, minlength=6).tolist()):
                seen[label] += count
        else:
            for i in range(len(pick)):
                losses.append(each[i].item())
                label = labels[i].item()
                seen[label] += 1
                hits[label] += guess[i].item() == label
        if step % 200 == 199:
            print("accuracy by class", [f"{h / max(s, 1):.2f}" for h, s in zip(hits, seen, strict=True)])


if __name__ == "__main__":
    main()
