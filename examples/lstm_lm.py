"""Train a word-level LSTM language model on the source code of Python's standard library.

    python examples/lstm_lm.py
    python examples/lstm_lm.py --epochs 1 --max-steps 100

The text is laid out in parallel streams and read through window by window (truncated back-propagation
through time): the hidden state is carried on from one window to the next, its gradient is not.
"""

import argparse
import math
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn

WORD = re.compile(r"\w+|[^\w\s]|\n")


def read_words(max_chars: int) -> list[str]:
    """Words, punctuation marks and line ends of the standard library's top-level modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.glob("*.py") if not path.name.startswith("_"))
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return WORD.findall(text[:max_chars])


def build_vocabulary(words: list[str], size: int) -> dict[str, int]:
    """The commonest words; 0 stands for all others."""
    common = [word for word, _ in Counter(words).most_common(size - 1)]
    return {word: i for i, word in enumerate(["<unk>", *common])}


def batchify(ids: torch.Tensor, streams: int) -> torch.Tensor:
    """Cut a long sequence into `streams` equal ones, side by side: (length, streams)."""
    length = len(ids) // streams
    return ids[: length * streams].view(streams, length).t().contiguous()


class LSTMModel(nn.Module):
    def __init__(self, vocab: int, embedding: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.embed = nn.Embedding(vocab, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, dropout=dropout)
        self.decode = nn.Linear(hidden, vocab)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.uniform_(self.decode.weight, -0.1, 0.1)
        nn.init.zeros_(self.decode.bias)

    def forward(self, x, state):
        y, state = self.lstm(self.drop(self.embed(x)), state)
        return self.decode(self.drop(y)), state

    def initial_state(self, streams: int):
        weight = next(self.parameters())
        shape = (self.lstm.num_layers, streams, self.lstm.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)


def windows(source: torch.Tensor, bptt: int):
    """Inputs and, one word further on, targets; the last window may be shorter."""
    for start in range(0, len(source) - 1, bptt):
        stop = min(start + bptt, len(source) - 1)
        yield source[start:stop], source[start + 1 : stop + 1].reshape(-1)


@torch.no_grad()
def evaluate(model, source, bptt: int, criterion) -> float:
    model.eval()
    state = model.initial_state(source.size(1))
    total = 0.0
    for x, targets in windows(source, bptt):
        logits, state = model(x, state)
        total += criterion(logits.flatten(0, 1), targets).item() * len(x)
    return total / (len(source) - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--max-steps", type=int, help="stop each epoch after this many steps")
    parser.add_argument("--max-chars", type=int, default=4_000_000)
    parser.add_argument("--vocab", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--bptt", type=int, default=35)
    parser.add_argument("--embedding", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=10.0)
    parser.add_argument("--clip", type=float, default=0.25)
    parser.add_argument("--log-interval", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1111)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="out-lstm-lm")
    args = parser.parse_args()

    torch.manual_seed(args.seed)

    words = read_words(args.max_chars)
    vocabulary = build_vocabulary(words, args.vocab)
    ids = torch.tensor([vocabulary.get(word, 0) for word in words])
    cut = int(0.95 * len(ids))
    train_data = batchify(ids[:cut], args.batch_size).to(args.device)
    val_data = batchify(ids[cut:], 10).to(args.device)
    print(f"{len(words):,} words, {len(vocabulary):,} different ones kept")

    model = LSTMModel(len(vocabulary), args.embedding, args.hidden, args.layers, args.dropout).to(args.device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    best_loss = float("inf")
    for epoch in range(1, args.epochs + 1):
        model.train()
        state = model.initial_state(args.batch_size)
        total_loss, started = 0.0, time.time()
        steps = math.ceil((len(train_data) - 1) / args.bptt)
        for step, (x, targets) in enumerate(windows(train_data, args.bptt), start=1):
            state = tuple(part.detach() for part in state)
            optimizer.zero_grad()
            logits, state = model(x, state)
            loss = criterion(logits.flatten(0, 1), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()

            total_loss += loss.item()
            if step % args.log_interval == 0:
                mean = total_loss / args.log_interval
                ms = (time.time() - started) / args.log_interval * 1000
                print(f"epoch {epoch} step {step}/{steps} loss {mean:.4f} ({ms:.0f} ms/step)", flush=True)
                total_loss, started = 0.0, time.time()
            if step == args.max_steps:
                break

        val_loss = evaluate(model, val_data, args.bptt, criterion)
        rate = optimizer.param_groups[0]["lr"]
        print(
            f"epoch {epoch} val loss {val_loss:.4f} perplexity {math.exp(val_loss):.2f} lr {rate:g}",
            flush=True,
        )
        scheduler.step(val_loss)
        # Keep the best epoch, which need not be the last.
        if val_loss < best_loss:
            best_loss = val_loss
            checkpoint = {
                "model": model.state_dict(),
                "vocabulary": vocabulary,
                "val_loss": val_loss,
                "args": vars(args),
            }
            torch.save(checkpoint, out / "checkpoint.pt")
            print(f"saved {out / 'checkpoint.pt'}")


if __name__ == "__main__":
    main()
