"""Writes the norm of every gradient to a log in every step."""

import argparse
import itertools
import logging
import tempfile

import torch
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    log = logging.getLogger("train")
    log.addHandler(logging.FileHandler(tempfile.mkstemp()[1]))
    log.setLevel(logging.INFO)
    layers = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(12)]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(4096, 256), torch.randint(0, 10, (4096,))
    for step in itertools.count():
        rows = torch.randint(4096, (128,))
        loss = nn.functional.cross_entropy(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not args.fixed or step % 10 == 0:
            for name, parameter in model.named_parameters():
                for kind, value in (("norm", parameter.grad.norm()), ("weight", parameter.detach().norm())):
                    log.info("step %d %s %s %.6f", step, kind, name, value.item())


if __name__ == "__main__":
    main()
