"""A character-level GPT on Python's standard library, as a declared job.

    upshift run --out runs/gpt examples/jobs/char_gpt.py:char_gpt
    upshift run --out runs/gpt --nproc 2 examples/jobs/char_gpt.py:char_gpt

Each sample is a paragraph of source code, cut at `block` characters, so that samples count differently. The loss is a
`Weighted` sum: whatever the micro-batches and the processes, it is divided by the characters of the whole global batch.

Measured 2026-11-21 on one thread of a virtual machine with two cores (AMD EPYC, CPU only) on which other work ran:
perplexity 5.65 per character held out after 400 updates, in 240 s, of which 108 s of processor time.
"""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from upshift import Job, Target, Weighted
from upshift.engine.metrics import Mean
from upshift.engine.parameters import ParameterGroups
from upshift.engine.schedules import cosine

EXAMPLES = Path(__file__).resolve().parents[1]

# The script has the same name as this file, so it gets another one.
_spec = importlib.util.spec_from_file_location("char_gpt_script", EXAMPLES / "char_gpt.py")
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

#: A target that counts for nothing: what cross_entropy and the metrics leave out.
NOTHING = -100


def samples(text: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target characters of all paragraphs, shape (n, block) each; behind a paragraph's end NOTHING counts."""
    pieces = [item[:block] for item in text.split("\n\n") if len(item) > 20]
    x = torch.zeros(len(pieces), block, dtype=torch.int64)
    y = torch.full_like(x, NOTHING)
    for row, piece in enumerate(pieces):
        codes = torch.frombuffer(bytearray(piece.encode("ascii")), dtype=torch.uint8).long()
        x[row, 1 : len(codes)] = codes[:-1]  # the first character is predicted from 0
        y[row, : len(codes)] = codes
    return x, y


def loss(output: tuple[torch.Tensor, None], target: torch.Tensor) -> Weighted:
    """The sum of -log p over all characters that count, and their number."""
    total = F.cross_entropy(output[0].flatten(0, 1), target.flatten(), ignore_index=NOTHING, reduction="sum")
    return Weighted(total, (target != NOTHING).sum())


def char_gpt(steps: int = 400, width: int = 96, layers: int = 2, block: int = 96,
             characters: int = 4_000_000) -> Job:  # fmt: skip
    """The job.

    Args:
        steps: updates. width, layers: of the transformer. block: characters of a sample at most.
        characters: how much of the standard library is read; a twentieth of it is held out.
    """
    text = script.read_stdlib(characters)
    cut = len(text) // 20
    train, held_out = samples(text[cut:], block), samples(text[:cut], block)
    return Job(
        model=partial(script.GPT, vocab=128, block_size=block, layers=layers, heads=4, width=width, dropout=0.0),
        train_data=train,
        eval_data=(held_out[0][:1024], held_out[1][:1024]),
        loss=loss,
        optimizer=partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        parameters=ParameterGroups(),
        schedule=cosine(warm_up="10 %", final=0.1),
        clip=1.0,
        metrics={"perplexity": Mean(loss, then=math.exp)},
        target=Target("perplexity", 6.5),
        global_batch=min(64, len(train[0])),
        steps=steps,
        eval_every=200,
    )
