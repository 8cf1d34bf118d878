"""A training that stops under a plan goes on without upshift, and one that stopped without it goes on under a plan."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Ended, python, upshift
from kinds import CACHE, FOLDER, assert_same, contents, write_plan

SCRIPT = FOLDER / "resumable.py"
HALF, WHOLE = ("--epochs", "2"), ("--epochs", "4")
FAST = {"allocator": {"kind": "glibc"}, "loader": {"workers": 1}, "channels_last": {}, "fused": {"kind": "fused"}}

CHECKPOINT = "checkpoint.pt"


def losses(ended: Ended) -> list[float]:
    return [float(found) for found in re.findall(r"loss (\S+)", ended.out)]


def trained(folder: Path, *arguments: str, plan: dict | None = None, after: Path | None = None) -> Ended:
    """One run in a folder of its own, from the checkpoint of another where one is given."""
    folder.mkdir()
    if after is not None:
        shutil.copy(after / CHECKPOINT, folder / "before.pt")
        arguments = (*arguments, "--resume", "before.pt")
    if plan is None:
        ended = python(str(SCRIPT), *arguments, cwd=folder)
    else:
        # Tuned for the whole training; that it is resumed shapes no step.
        file = write_plan(folder / "plan.toml", SCRIPT, WHOLE, plan)
        ended = upshift("run", "--plan", str(file), "--runs", "runs", str(SCRIPT), *arguments, cwd=folder)
        said = "".join(ended.said)
        assert "no effect" not in said and all(f"applied {name}" in said for name in plan if name != "allocator"), said
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The first half without upshift, and the losses of the whole training."""
    folder = tmp_path_factory.mktemp("stock")
    trained(folder / "half", *HALF)
    return folder, losses(trained(folder / "whole", *WHOLE))


@pytest.mark.parametrize(
    ("plan", "bitwise"),
    [
        pytest.param(FAST, False, id="rounding", marks=pytest.mark.extra),
        pytest.param(CACHE, True, id="bitwise", marks=pytest.mark.extra),
    ],
)
@pytest.mark.kinds
def test_either_way(tmp_path: Path, stock: tuple[Path, list[float]], plan: dict, bitwise: bool) -> None:
    before, whole = stock
    first = losses(trained(tmp_path / "planned", *HALF, plan=plan))
    there = first + losses(trained(tmp_path / "plain", *WHOLE, after=tmp_path / "planned"))
    back = whole[:24] + losses(trained(tmp_path / "again", *WHOLE, plan=plan, after=before / "half"))
    assert len(there) == len(back) == len(whole) == 48
    for folder, reference in (("planned", "half"), ("plain", "whole"), ("again", "whole")):
        (found,) = contents(tmp_path / folder, (CHECKPOINT,)).values()
        (expected,) = contents(before / reference, (CHECKPOINT,)).values()
        if bitwise:
            assert_same(found, expected)
        else:
            assert_alike(found, expected)
    if bitwise:
        assert there == back == whole
    else:
        assert there == pytest.approx(whole, rel=1e-3) and back == pytest.approx(whole, rel=1e-3)


def assert_alike(one: object, other: object, place: str = "") -> None:
    """The same keys, types, shapes and order in memory; values within what another order of sums explains."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, other.is_contiguous()), place
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3, msg=place)
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_alike(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{place}.{number}")
    else:
        assert one == other, place
