"""What saves cost is told apart from the steps, and the interval follows from saves that nobody waited for."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from upshift.engine import saving
from upshift.engine.recording import Recorder
from upshift.engine.run import train_job
from upshift.engine.settings import Execution

sys.path.insert(0, str(Path(__file__).parent))
from tiny_jobs import plain


@pytest.mark.parametrize("kept", ["saved", "evaluated"])
def test_what_came_before_the_first_update_is_not_taken_from_its_steps(kept, tmp_path):
    recorder = Recorder(tmp_path, time.perf_counter())
    if kept == "saved":
        recorder.saved(1000.0)
    else:
        recorder.evaluated(1000.0, 0, {})
    recorder.rewound(0)
    recorder.window(3)
    [window] = [
        item for item in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if item["kind"] == "steps"
    ]
    assert window["seconds"] >= 0.0
    assert window["checkpoint" if kept == "saved" else "evaluation"] == 1000.0


@pytest.mark.parametrize(("settings", "told"), [({}, False), ({"save_steps": 5}, True)])
def test_only_saves_beside_the_training_set_the_interval(settings, told, tmp_path, monkeypatch):
    """The first and the last save are waited for: they would make the interval too long."""
    seen: list[float] = []

    class Noted(saving.Pace):
        def saved(self, stall: float, write: float = 0.0) -> None:
            seen.append(stall)
            super().saved(stall, write)

    monkeypatch.setattr(saving, "Pace", Noted)
    train_job(plain, Execution(out=tmp_path, **settings))
    assert bool(seen) == told
