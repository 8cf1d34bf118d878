"""Small trainings that stand for kinds of models: what estimates of memory and time are held against.

Each is a function of (scale, batch): the scale multiplies widths. `Training.step()` is one update; `batch_of(n)` makes
the batch it is called with. Sizes suit two slow cores: a step takes 50 to 500 ms, its memory some hundred MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Training:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[torch.Tensor, ...]
    loss: Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]
    bf16: bool = False

    def forward(self) -> torch.Tensor:
        if self.bf16:
            with torch.autocast("cpu", torch.bfloat16):
                return self.loss(self.model, self.batch)
        return self.loss(self.model, self.batch)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()


def classify(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def regress(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def language(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def images(n: int, size: int, classes: int = 100) -> tuple[torch.Tensor, ...]:
    return torch.randn(n, 3, size, size), torch.randint(classes, (n,))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.m, self.n = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.n(self.b(F.relu(self.m(self.a(x))))))


class Gpt(nn.Module):
    """A decoder of equal blocks with causal attention."""

    def __init__(self, width: int, depth: int, length: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x) + self.places
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.n, self.m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.n(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.m(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], width: int, layers: int = 2) -> None:
        super().__init__()
        self.cells: Any = kind(64, width, num_layers=layers, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Table(nn.Module):
    """A large table of embeddings and a small net, as recommenders have."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 32)
        self.net = nn.Sequential(nn.Linear(20 * 32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                 nn.Linear(width, 1))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.table(x).flatten(1))


class Unet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.c = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up, self.d = nn.ConvTranspose2d(2 * width, width, 2, stride=2), nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = F.relu(self.a(x))
        low = F.relu(self.c(F.relu(self.b(F.max_pool2d(top, 2)))))
        return self.d(torch.cat([top, self.up(low)], 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _mlp(scale: float, batch: int, optimizer: Any, depth: int, width: int) -> Training:
    width = int(width * scale)
    layers: list[nn.Module] = [nn.Linear(256, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    return Training(model, optimizer(model), (torch.randn(batch, 256), torch.randint(10, (batch,))), classify)


def mlp_adam(scale: float, batch: int) -> Training:
    return _mlp(scale, batch, adamw, 4, 1536)


def mlp_sgd(scale: float, batch: int) -> Training:
    return _mlp(scale, batch, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3), 8, 2048)


def resnet(scale: float, batch: int) -> Training:
    width = int(64 * scale)
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *(Block(width) for _ in range(3)), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(width, 100))  # fmt: skip
    return Training(model, sgd(model), images(batch, 32), classify)


def vgg(scale: float, batch: int) -> Training:
    layers: list[nn.Module] = []
    before = 3
    for width in (32, 64, 128, 256):
        now = int(width * scale)
        layers += [nn.Conv2d(before, now, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        before = now
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 16, 2048), nn.ReLU(), nn.Linear(2048, 100))
    return Training(model, adamw(model), images(batch, 64), classify)


def depthwise(scale: float, batch: int) -> Training:
    width = int(96 * scale)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1)]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU6(),
                   nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU6()]  # fmt: skip
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 100))
    return Training(model, sgd(model), images(batch, 64), classify)


def gpt(scale: float, batch: int) -> Training:
    width, length, words = int(256 * scale) // 4 * 4, 128, 4096
    model = Gpt(width, 4, length, words)
    rows = torch.randint(words, (batch, length))
    return Training(model, adamw(model), (rows, rows), language)


def gpt_bf16(scale: float, batch: int) -> Training:
    found = gpt(scale, batch)
    found.bf16 = True
    return found


def encoder(scale: float, batch: int) -> Training:
    width = int(192 * scale) // 4 * 4
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.1)
    model = nn.Sequential(
        nn.Linear(32, width), nn.TransformerEncoder(layer, 4), nn.Flatten(), nn.Linear(width * 96, 10)
    )
    rows = torch.randn(batch, 96, 32)
    return Training(model, adamw(model), (rows, torch.randint(10, (batch,))), classify)


def lstm(scale: float, batch: int) -> Training:
    model = Recurrent(nn.LSTM, int(384 * scale))
    return Training(model, adamw(model), (torch.randn(batch, 64, 64), torch.randint(10, (batch,))), classify)


def gru(scale: float, batch: int) -> Training:
    model = Recurrent(nn.GRU, int(384 * scale))
    return Training(model, adamw(model), (torch.randn(batch, 64, 64), torch.randint(10, (batch,))), classify)


def recommender(scale: float, batch: int) -> Training:
    model = Table(400_000, int(512 * scale))
    rows = torch.randint(400_000, (batch, 20))
    return Training(model, torch.optim.Adagrad(model.parameters()), (rows, torch.randn(batch, 1)), regress)


def autoencoder(scale: float, batch: int) -> Training:
    wide, narrow = int(2048 * scale), int(512 * scale)
    model = nn.Sequential(nn.Linear(784, wide), nn.GELU(), nn.Linear(wide, narrow), nn.GELU(), nn.Linear(narrow, wide),
                          nn.GELU(), nn.Linear(wide, 784), nn.Sigmoid())  # fmt: skip
    rows = torch.rand(batch, 784)
    return Training(model, torch.optim.RMSprop(model.parameters()), (rows, rows), regress)


def unet(scale: float, batch: int) -> Training:
    model = Unet(int(32 * scale))
    rows = torch.randn(batch, 3, 96, 96)
    return Training(model, adamw(model), (rows, rows), regress)


def norms(scale: float, batch: int) -> Training:
    """Mostly memory traffic: wide normalisations and activations between narrow products."""
    width = int(4096 * scale)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(64, width), nn.LayerNorm(width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 64)]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return Training(model, adamw(model), (torch.randn(batch, 64), torch.randint(10, (batch,))), classify)


#: Name -> (what makes it, samples of a pass that are watched).
ALL: dict[str, tuple[Callable[[float, int], Training], int]] = {
    "mlp adam": (mlp_adam, 256), "mlp sgd": (mlp_sgd, 512), "resnet": (resnet, 32), "vgg": (vgg, 32),
    "depthwise": (depthwise, 32), "gpt": (gpt, 8), "gpt bf16": (gpt_bf16, 8), "encoder": (encoder, 16),
    "lstm": (lstm, 64), "gru": (gru, 64), "recommender": (recommender, 512), "autoencoder": (autoencoder, 256),
    "unet": (unet, 16), "norms": (norms, 256),
}  # fmt: skip
