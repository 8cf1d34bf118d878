"""What a whole run under verification logs and writes reaches the parent; its seeds are shifted."""

from __future__ import annotations

import builtins
import random
import sys
import types

import numpy as np
import torch

from upshift.hook import seeding
from upshift.hook.imports import AfterImport
from upshift.hook.scalars import FILE, Scalars, into_file
from upshift.hook.written import Written


def test_text_files_are_copied_as_they_grow(tmp_path):
    folder = tmp_path / "record"
    folder.mkdir()
    written = Written(folder)
    before = builtins.open
    written.install()
    try:
        with open(tmp_path / "a.csv", "w") as file:
            file.write("epoch,accuracy\n1,0.5\n")
            file.flush()
            written.copy()
            assert (folder / "0.csv").read_text() == "epoch,accuracy\n1,0.5\n"
            file.write("2,0.75\n")
        (tmp_path / "weights.bin").write_bytes(b"1")
        with open(tmp_path / "a.csv") as file:
            assert file.read().endswith("0.75\n")
    finally:
        written.close()
    assert builtins.open is before
    assert (folder / "0.csv").read_text() == "epoch,accuracy\n1,0.5\n2,0.75\n"
    assert len(list(folder.iterdir())) == 1


def test_a_file_written_anew_follows_what_was_there(tmp_path):
    folder = tmp_path / "record"
    folder.mkdir()
    written = Written(folder)
    written.install()
    try:
        for text in ("longer first\n", "second\n"):
            with open(tmp_path / "last.json", "w") as file:
                file.write(text)
            written.copy()
    finally:
        written.close()
    assert (folder / "0.json").read_text() == "longer first\nsecond\n"


def test_wandb_and_tensorboard_scalars(tmp_path, monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")

    class Run:
        def log(self, data, step=None):
            calls.append((data, step))

    def init(**options):
        run = Run()
        wandb.log = run.log
        return run

    wandb.init = init

    class SummaryWriter:
        def add_scalar(self, tag, scalar_value, global_step=None):
            calls.append((tag, scalar_value))

        def add_scalars(self, main_tag, tag_scalar_dict, global_step=None):
            calls.append((main_tag, tag_scalar_dict))

    writer = types.ModuleType("torch.utils.tensorboard.writer")
    writer.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", writer)
    Scalars(into_file(tmp_path)).install(AfterImport())
    wandb.init(project="x")
    wandb.log({"val/acc": torch.tensor(0.5), "name": "text"}, step=3)
    SummaryWriter().add_scalar("loss", 0.25, 1)
    SummaryWriter().add_scalars("eval", {"f1": 0.75})
    lines = (tmp_path / FILE).read_text().splitlines()
    assert lines == ['{"val/acc": 0.5}', '{"loss": 0.25}', '{"eval/f1": 0.75}']
    assert len(calls) == 3 and calls[0][1] == 3


def test_shifted_seeds_are_other_streams_and_repeat(monkeypatch):
    monkeypatch.setattr(random, "seed", random.seed)
    monkeypatch.setattr(np.random, "seed", np.random.seed)
    monkeypatch.setattr(np.random, "default_rng", np.random.default_rng)
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)

    def draws():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return random.random(), np.random.rand(), np.random.default_rng(1).random(), torch.rand(1).item()

    plain = draws()
    seeding.shift(2, AfterImport())
    shifted = draws()
    assert all(a != b for a, b in zip(plain, shifted, strict=True))
    assert shifted == draws()
    random.seed(-1)
    np.random.default_rng()
