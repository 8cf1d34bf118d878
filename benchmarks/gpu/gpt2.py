"""GPT-2 of 124 million parameters (Radford et al. 2019) on synthetic text, in plain PyTorch without upshift.

The stock command line is `python gpt2.py`: micro-batches of 32 x 1,024 tokens, two to a step, bfloat16 autocast and
TensorFloat-32, AdamW as PyTorch builds it. Data, a text whose next token mostly follows from the last one, is made from
a seed. The first line printed says what a step is; with --seconds it ends after so long and prints its own throughput.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> the same."""
        batch, length, width = x.shape
        q, k, v = self.attend(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """The decoder; input and output embeddings are tied."""

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) -> logits (batch, length, vocabulary)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def text(count: int, vocabulary: int) -> torch.Tensor:
    """Tokens of which seven in eight follow from the one before by a fixed table."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(vocabulary, generator=generator).tolist()
    jumps = torch.randint(0, vocabulary, (count,), generator=generator).tolist()
    jump = (torch.rand(count, generator=generator) < 1 / 8).tolist()
    found = [0]
    for i in range(1, count):
        found.append(jumps[i] if jump[i] else table[found[-1]])
    return torch.tensor(found)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so many seconds of training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(options.vocabulary, options.length, options.layers, options.heads, options.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    data = text(2_000_000 if device == "cuda" else 20_000, options.vocabulary)
    per_step = options.batch * options.accumulate * options.length
    # Chowdhery et al. 2022 (PaLM), appendix B: 6 per parameter that multiplies, and attention.
    multiplies = sum(item.numel() for item in model.parameters()) - model.positions.weight.numel()
    flops = 6 * multiplies + 12 * options.layers * options.width * options.length
    print(json.dumps({"unit": "tokens", "per_step": per_step, "flops_per_unit": flops}), flush=True)
    began, seen = 0.0, 0
    for step in range(options.steps):
        optimizer.zero_grad()
        for _ in range(options.accumulate):
            start = torch.randint(len(data) - options.length - 1, (options.batch,)).tolist()
            x = torch.stack([data[i : i + options.length] for i in start]).to(device)
            y = torch.stack([data[i + 1 : i + 1 + options.length] for i in start]).to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / options.accumulate
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item() * options.accumulate:.4f}", flush=True)
        if step == 9:
            began = _now(device)
        seen = step - 9
        if options.seconds and seen > 0 and time.perf_counter() - began >= options.seconds:
            break
    if seen > 0:
        print(json.dumps({"per_second": seen * per_step / (_now(device) - began), "steps": seen}), flush=True)


def _now(device: str) -> float:
    """The time when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
