"""Sounds turned into the same spectrograms again in every epoch."""

import argparse
import itertools

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

FRAME, HOP, BANDS = 256, 64, 32


def spectrogram(sound: np.ndarray) -> np.ndarray:
    """The log power of a (samples,) sound in (bands, frames)."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(1, power.shape[1] - 1, BANDS + 1).astype(int)
    bands = [power[:, low : max(high, low + 1)].mean(axis=1) for low, high in itertools.pairwise(edges)]
    return np.log1p(np.stack(bands)).astype(np.float32)


class Sounds(Dataset):
    def __init__(self, count: int, cached: bool) -> None:
        rng = np.random.default_rng(24)
        self.pitch = rng.integers(0, 12, count)
        time = np.arange(4000) / 8000
        tone = 110.0 * 2 ** (self.pitch[:, None] / 12 * 3)
        self.sounds = np.sin(2 * np.pi * tone * time) + rng.normal(0, 0.3, (count, 4000))
        self.cache = [spectrogram(sound) for sound in self.sounds] if cached else None

    def __len__(self) -> int:
        return len(self.sounds)

    def __getitem__(self, index: int):
        picture = self.cache[index] if self.cache is not None else spectrogram(self.sounds[index])
        return picture, self.pitch[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fixed", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(24)
    loader = DataLoader(Sounds(384, args.fixed), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(200), nn.ReLU(), nn.Linear(200, 12))
    model(torch.zeros(1, BANDS, (4000 - FRAME) // HOP + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for epoch in itertools.count(1):
        correct = 0
        for picture, pitch in loader:
            scores = model(picture)
            loss = nn.functional.cross_entropy(scores, pitch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct += int((scores.argmax(dim=1) == pitch).sum())
        print(f"epoch {epoch}: {correct / 384:.1%}")


if __name__ == "__main__":
    main()
