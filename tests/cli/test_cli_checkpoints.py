"""`upshift checkpoints`: what is there, which is resumed, what is damaged; weights exported for plain torch."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from upshift import api
from upshift.checkpoint import Store
from upshift.cli.main import cli
from upshift.errors import CheckpointError, RecordError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.fixture
def run(tmp_path, model):
    with Store(tmp_path / "run") as store:
        for step in (10, 20, 30):
            facts = {"samples": step * 8, "metrics": {"accuracy": step / 100}}
            store.save(step, {"model": model.state_dict(), "step": step}, facts=facts, best=step == 10)
    return tmp_path / "run"


def listed(*arguments):
    found = CliRunner().invoke(cli, ["checkpoints", "-q", *map(str, arguments)])
    assert found.exit_code == 0, found.output
    return found.output


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_what_is_there(run, inner, tmp_path):
    text = listed("--json", tmp_path / "found.json", run / inner)
    lines = text.splitlines()
    assert lines[0].endswith("3 checkpoints")
    assert "step-10-a1" in lines[1] and "best, accuracy 0.1" in lines[1] and "whole" in lines[1]
    assert "would be resumed, accuracy 0.3" in lines[3]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["resumed"] == "step-30-a1" and [item["step"] for item in found["checkpoints"]] == [10, 20, 30]


def test_damage_is_shown_and_nothing_is_moved(run):
    (run / "checkpoints/step-30-a1/state.json").write_text("{}")
    text = listed(run)
    assert "damaged" in text and "state.json has 2 bytes" in text
    assert "would be resumed" in text.splitlines()[2] and (run / "checkpoints/step-30-a1").is_dir()


def test_none_is_whole(run):
    for path in (run / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    assert "None is whole: a resumed run would begin anew." in listed(run)
    with pytest.raises(CheckpointError, match="whole"):
        api.export(run, run / "x.pt")


def test_exported_weights_load_in_plain_torch(run, tmp_path, model):
    listed("--export", tmp_path / "w.safetensors", run)
    model.load_state_dict(load_file(tmp_path / "w.safetensors"))
    listed("--export", tmp_path / "w.pt", run)
    model.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))


def test_a_run_in_progress_is_not_disturbed(run):
    with Store(run) as store:
        listed(run)
        store.save(40, {"step": 40})


def test_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(RecordError, match="holds no checkpoints"):
        api.checkpoints(tmp_path)


def test_a_state_without_a_model(tmp_path):
    with Store(tmp_path) as store:
        store.save(1, {"step": 1})
    with pytest.raises(CheckpointError, match="no weights under 'model'"):
        api.export(tmp_path, tmp_path / "w.pt")
