"""What a job's record says of its epochs and of the time of its evaluations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from upshift import run
from upshift.records.runfold import fold

sys.path.insert(0, str(Path(__file__).parent))
from tiny_jobs import full, plain


def test_epochs_and_inference_time_are_in_the_record(tmp_path):
    run(full, out=tmp_path)
    found = fold(tmp_path)
    assert (found.epochs.value, found.epochs.basis) == (4.0, "measured")
    (event,) = [item for item in found.events if "inference_seconds" in item.values]
    took = sum(item.evaluation for item in found.windows)
    # Four evaluations of 192 samples.
    assert 0 < event.values["inference_seconds"] <= took / 192 and "3 evaluations" in event.text


def test_part_of_an_epoch_and_no_evaluation(tmp_path):
    run(plain.set(epochs=None, steps=10), out=tmp_path)  # 7 steps of 48 in 320 samples
    found = fold(tmp_path)
    assert found.epochs.value == pytest.approx(1 + 3 * 48 / 320)
    assert not [item for item in found.events if "inference_seconds" in item.values]
