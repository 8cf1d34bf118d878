"""A statistics thread holds the lock that every training step needs."""

import argparse
import itertools
import threading
import time

import torch
from torch import nn


def collect(lock: threading.Lock, losses: list[float]) -> None:
    while True:
        with lock:
            recent = losses[-100:]
            time.sleep(0.03)  # a slow store
        time.sleep(0.001 if recent else 0.01)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    store_lock = threading.Lock()
    losses: list[float] = []
    threading.Thread(target=collect, args=(store_lock, losses), daemon=True).start()
    model = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    features, labels = torch.randn(4096, 128), torch.randint(0, 10, (4096,))
    lock = threading.Lock() if args.fixed else store_lock
    for _ in itertools.count():
        rows = torch.randint(4096, (128,))
        loss = nn.functional.cross_entropy(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with lock:
            losses.append(float(loss.detach()))


if __name__ == "__main__":
    main()
