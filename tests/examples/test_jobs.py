"""The declared jobs among the examples build and train through the command line, in small variants on made-up data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from upshift import Job, Weighted
from upshift.engine.reference import load_job

JOBS = Path(__file__).resolve().parents[2] / "examples" / "jobs"

#: Job, its small variant, and the updates that makes.
SMALL = {
    "cifar.py:cifar": ("epochs=6 width=4", 6),
    "char_gpt.py:char_gpt": ("steps=3 width=16 layers=1 block=32 characters=60000", 3),
    "tabular.py:diamonds": ("epochs=2 width=16", 4),
    "text.py:reviews": ("epochs=2 width=8 words=50", 4),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like those that get_data.py writes, with a few made-up rows each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.savez(
        folder / "cifar10.npz",
        train_images=rng.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8),
        train_labels=rng.integers(0, 10, 96),
        test_images=rng.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8),
        test_labels=rng.integers(0, 10, 32),
    )
    names = {"cut": ["Fair", "Ideal"], "color": ["J", "D", "E"], "clarity": ["I1", "IF"]}
    np.savez(
        folder / "diamonds.npz",
        numeric=rng.normal(size=(200, 6)).astype(np.float32),
        categorical=np.stack([rng.integers(0, len(values), 200) for values in names.values()], axis=1),
        price=rng.uniform(300, 9000, 200).astype(np.float32),
        **{column: np.array(values) for column, values in names.items()},
    )
    words = ["good", "bad", "film", "plot", "never", "always"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(160)]
    np.savez(folder / "reviews.npz", texts=np.array(texts), labels=rng.integers(0, 2, 160))
    return folder


def settings(reference: str, data: Path) -> dict[str, str]:
    found = dict(item.split("=") for item in SMALL[reference][0].split())
    return found if "char_gpt" in reference else {**found, "data": str(data)}


@pytest.fixture
def loaded(data: Path, monkeypatch: pytest.MonkeyPatch):
    """`load_job` for a job of the examples; the modules it imports are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)

    def load(reference: str) -> Job:
        return load_job(str(JOBS / reference), settings(reference, data))

    yield load
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(JOBS.parent)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "reference",
    # One of them in every run of the tests, all with `make soak`.
    [pytest.param(item, marks=() if "tabular" in item else pytest.mark.extra) for item in SMALL],
)
def test_job_trains_and_is_saved(reference: str, data: Path, tmp_path: Path) -> None:
    values = [f"--set={key}={value}" for key, value in settings(reference, data).items()]
    done = subprocess.run(
        [sys.executable, "-m", "upshift", "run", "--out", "run", *values, str(JOBS / reference)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    steps = SMALL[reference][1]
    assert f"upshift: {steps:,} steps" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob(f"step-{steps}-a1/manifest.json"))
    shown = re.findall(r"^epoch: \d+ step: \d+ (\S+): (\S+) loss: (\S+)$", done.stdout, re.MULTILINE)
    assert shown and all(np.isfinite(float(value)) for row in shown for value in row[1:]), done.stdout


@pytest.mark.parametrize("reference", SMALL)
def test_target_is_evaluated_and_every_head_states_what_was_measured(reference: str, loaded) -> None:
    job = loaded(reference)
    assert job.target is not None and job.target.metric in job.metrics and job.eval_data is not None
    head = (JOBS / reference.partition(":")[0]).read_text(encoding="utf-8").split('"""')[1]
    measured = re.search(r"^Measured \d{4}-\d{2}-\d{2} on .*:\n\D+(?P<value>[\d.]+)", head, re.MULTILINE)
    assert measured, head
    assert job.target.reached(float(measured["value"]))


def test_gpt_counts_characters_and_leaves_padding_out(loaded) -> None:
    job = loaded("char_gpt.py:char_gpt")
    x, y = job.train_data
    total, count = job.loss((torch.zeros(*y.shape, 128), None), y)
    assert isinstance(job.loss((torch.zeros(*y.shape, 128), None), y), Weighted)
    assert 0 < count == (y != -100).sum() < y.numel()
    assert torch.allclose(total / count, torch.tensor(128.0).log())
    row = next(item for item in range(len(y)) if (y[item] == -100).any())
    end = int((y[row] != -100).sum())
    assert torch.equal(x[row, 1:end], y[row, : end - 1])  # the input is the target, one place later


def test_reviews_are_padded_to_the_longest(loaded) -> None:
    job = loaded("text.py:reviews")
    samples = [(torch.tensor([2, 3, 4]), 1), (torch.tensor([5]), 0)]
    batch = job.collate(samples)
    assert batch["words"].tolist() == [[2, 3, 4], [5, 0, 0]]
    model = job.model().eval()
    alone = model(torch.tensor([[5]]))
    assert torch.allclose(model(batch["words"])[1:], alone, atol=1e-6)  # padding is not read


def test_missing_data_names_the_command_that_gets_it(capsys: pytest.CaptureFixture[str], loaded) -> None:
    with pytest.raises(SystemExit) as left:
        load_job(str(JOBS / "cifar.py:cifar"), {"data": "nowhere"})
    assert left.value.code == 2
    assert "get_data.py cifar10 --into nowhere" in capsys.readouterr().err
