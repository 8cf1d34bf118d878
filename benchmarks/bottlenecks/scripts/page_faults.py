"""Large activations, which the allocator returns to the system in every step."""

import argparse
import ctypes
import itertools

import torch
from torch import nn

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.fixed:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    model = nn.Sequential(nn.Conv1d(1, 64, 5, padding=2), nn.ReLU(), nn.Tanh(), nn.Conv1d(64, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    signals = torch.randn(256, 1, 8000)
    for step in itertools.count():
        batch = signals[step * 8 % 256 :][:8]
        loss = nn.functional.mse_loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
