"""A number of threads that was right for a server with many more cores."""

import argparse
import itertools
import os

import torch
from torch import nn

CONFIG = {"width": 320, "depth": 4, "batch": 160, "lr": 3e-4}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores if parser.parse_args().fixed else 16 * cores)
    torch.manual_seed(15)
    layers: list[nn.Module] = [nn.Linear(50, CONFIG["width"])]
    for _ in range(CONFIG["depth"]):
        layers += [nn.LayerNorm(CONFIG["width"]), nn.GELU(), nn.Linear(CONFIG["width"], CONFIG["width"])]
    model = nn.Sequential(*layers, nn.Linear(CONFIG["width"], 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG["lr"], fused=True)
    x = torch.randn(16_000, 50)
    y = (x[:, ::2].sum(dim=1, keepdim=True) > 0).float()
    for step in itertools.count():
        at = step * CONFIG["batch"] % len(x)
        logits = model(x[at : at + CONFIG["batch"]])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y[at : at + CONFIG["batch"]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
