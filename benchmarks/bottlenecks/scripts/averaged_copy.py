"""Averages the weights over the steps by way of a deep copy of the whole state each time."""

import argparse
import copy
import itertools

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(28)
    model = nn.Sequential(nn.Linear(256, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 16))
    average = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = torch.randn(6400, 256)
    target = torch.tanh(data[:, :16] * data[:, 16:32])
    for step in itertools.count():
        at = step * 32 % 6400
        loss = nn.functional.mse_loss(model(data[at : at + 32]), target[at : at + 32])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.fixed:
            with torch.no_grad():
                for name, weight in model.state_dict().items():
                    average[name].lerp_(weight, 0.001)
        else:
            state = copy.deepcopy(model.state_dict())
            average = {name: 0.999 * average[name] + 0.001 * state[name] for name in average}


if __name__ == "__main__":
    main()
