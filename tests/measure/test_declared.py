"""What a script's source speaks of: by names, options and keys, not by sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from upshift.measure import declared as module
from upshift.measure.declared import declared


def spoken_of(tmp_path: Path, source: str) -> tuple[str, ...] | None:
    file = tmp_path / "train.py"
    file.write_text(source)
    return declared([file])


@pytest.mark.parametrize(
    ("source", "topic"),
    [
        ("model.eval()", "validation"),
        ("with torch.no_grad(): pass", "validation"),
        ("val_loss = 0", "validation"),
        ("def runValidation(): pass", "validation"),
        ("splits = {'val': data}", "validation"),
        ("from lib import evaluate as ev, TestLoader", "validation"),
        ("sched = CosineAnnealingLR(o)", "schedule"),
        ("group['lr'] = 0.1", "schedule"),
        ("def adjust_learning_rate(): pass", "schedule"),
        ("parser.add_argument('--lr-decay')", "schedule"),
        ("f(warmup=3)", "schedule"),
        ("class EarlyStopping: pass", "stopping"),
        ("if patience > 3: pass", "stopping"),
        ("total_reward = 0", "reward"),
        ("random.seed(0)", "seed"),
        ("parser.add_argument('--seed')", "seed"),
    ],
)
def test_spoken_of(tmp_path: Path, source: str, topic: str) -> None:
    assert topic in (spoken_of(tmp_path, source) or ())


@pytest.mark.parametrize(
    "source",
    [
        '"""Test the validation schedule with patience and a seed."""',
        "latest = interval = 1",
        "optimizer = SGD(p, lr=0.1, weight_decay=5e-4)",
        "lr = args.lr",
        "rate = group['lr']",
        "value = contest",
    ],
)
def test_not_spoken_of(tmp_path: Path, source: str) -> None:
    assert spoken_of(tmp_path, source) == ()


def test_what_cannot_be_read_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spoken_of(tmp_path, "def broken(:") is None
    assert declared([]) is None and declared([tmp_path / "missing.py"]) is None
    monkeypatch.setattr(module, "LARGEST", 3)
    assert spoken_of(tmp_path, "seed = 1") is None
