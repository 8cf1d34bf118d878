"""Train a small character-level GPT on the source code of Python's standard library.

    python examples/char_gpt.py
    python examples/char_gpt.py --max-steps 50 --eval-interval 25

There is no data loader: the whole text is one tensor, and every batch is cut out of it at random places.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


def read_stdlib(max_chars: int) -> str:
    """The standard library's modules, in the order of their names, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    texts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(root).parts):
            texts.append(path.read_bytes().decode("ascii", errors="ignore"))
            size += len(texts[-1])
            if size >= max_chars:
                break
    return "".join(texts)[:max_chars]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def attend(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.drop(self.attend(self.ln1(x)))
        return x + self.drop(self.mlp(self.ln2(x)))


class GPT(nn.Module):
    def __init__(self, vocab: int, block_size: int, layers: int, heads: int, width: int, dropout: float):
        super().__init__()
        self.block_size = block_size
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(block_size, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        positions = self.positions(torch.arange(idx.size(1), device=idx.device))
        x = self.drop(self.tokens(idx) + positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, count: int, temperature: float = 0.8):
        for _ in range(count):
            logits, _ = self(idx[:, -self.block_size :])
            probabilities = F.softmax(logits[:, -1] / temperature, dim=-1)
            idx = torch.cat((idx, torch.multinomial(probabilities, 1)), dim=1)
        return idx


def get_batch(data, block_size: int, batch_size: int, device):
    starts = torch.randint(len(data) - block_size, (batch_size,)).tolist()
    x = torch.stack([data[i : i + block_size] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in starts])
    return x.to(device), y.to(device)


@torch.no_grad()
def estimate_loss(model, splits, args):
    model.eval()
    losses = {}
    for name, data in splits.items():
        batches = (get_batch(data, args.block_size, args.batch_size, args.device) for _ in range(args.eval_batches))
        losses[name] = sum(model(x, y)[1].item() for x, y in batches) / args.eval_batches
    model.train()
    return losses


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then a half cosine down to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.max_steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in one forward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="forward passes in one optimizer step")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-interval", type=int, default=250)
    parser.add_argument("--eval-batches", type=int, default=20)
    parser.add_argument("--log-interval", type=int, default=20)
    parser.add_argument("--sample", type=int, default=300, help="characters to write at the end")
    parser.add_argument("--max-chars", type=int, default=8_000_000)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out-char-gpt")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text = read_stdlib(args.max_chars)
    chars = sorted(set(text))
    index = {char: i for i, char in enumerate(chars)}
    data = torch.tensor([index[char] for char in text])
    cut = int(0.9 * len(data))
    splits = {"train": data[:cut], "val": data[cut:]}

    model = GPT(len(chars), args.block_size, args.layers, args.heads, args.width, args.dropout)
    model.to(args.device)
    print(f"{len(text):,} characters, {sum(p.numel() for p in model.parameters()):,} parameters")

    # Matrices decay; biases and layer norms do not.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))

    started = time.time()
    for step in range(args.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)

        optimizer.zero_grad(set_to_none=True)
        step_loss = 0.0
        for _ in range(args.accumulate):
            x, y = get_batch(splits["train"], args.block_size, args.batch_size, args.device)
            _, loss = model(x, y)
            (loss / args.accumulate).backward()
            step_loss += loss.item() / args.accumulate
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        done = step + 1
        if done % args.log_interval == 0 or done == args.max_steps:
            elapsed = time.time() - started
            print(f"step {done}/{args.max_steps} loss {step_loss:.4f} ({elapsed:.0f} s)", flush=True)
        if done % args.eval_interval == 0 or done == args.max_steps:
            losses = estimate_loss(model, splits, args)
            print(f"step {done} train loss {losses['train']:.4f} val loss {losses['val']:.4f}", flush=True)

    model.eval()
    start = torch.tensor([[index["\n"]]], device=args.device)
    print("".join(chars[i] for i in model.generate(start, args.sample)[0].tolist()))

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint |= {"chars": "".join(chars), "val_loss": losses["val"], "args": vars(args)}
    torch.save(checkpoint, out / "checkpoint.pt")
    print(f"saved {out / 'checkpoint.pt'}")


if __name__ == "__main__":
    main()
