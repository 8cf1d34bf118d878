"""The errors of earlier estimates: kept, read back whatever happened to the file, and told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.advise import experience
from upshift.records.estimate import Error


def error(predicted: float = 1.2, measured: float = 1.0, what: str = "step", device: str = "cpu") -> Error:
    return Error("2026-11-22", what, device, "train.py", predicted, measured, "s")


def test_there_and_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "estimates.jsonl"
    assert experience.read(file) == ()
    assert experience.append([error(), error(0.9)], file)
    assert experience.append([error(1.1)], file)
    assert [item.predicted for item in experience.read(file)] == [1.2, 0.9, 1.1]


def test_the_usual_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert experience.default_file() == tmp_path / "upshift" / "estimates.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert experience.default_file() == tmp_path / ".cache" / "upshift" / "estimates.jsonl"


@given(st.binary(max_size=300))
def test_whatever_stands_in_the_file(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    file = tmp_path_factory.mktemp("e") / "estimates.jsonl"
    file.write_bytes(junk)
    experience.append([error()], file)
    assert experience.read(file)[-1] == error()


@pytest.mark.parametrize(
    "line",
    [b'{"when":"","what":"step","device":"cpu","script":"","predicted":1,"measured":0,"unit":"s"}', b"[" * 9000,
     b'{"when":"","what":"step","device":"cpu","script":"","predicted":-1,"measured":1,"unit":"s"}', b"{}", b"\xff"],
)  # fmt: skip
def test_lines_that_are_no_errors(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "estimates.jsonl"
    file.write_bytes(line + b"\n")
    assert experience.read(file) == ()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not experience.append([error()], tmp_path / "file" / "estimates.jsonl")


def test_the_median_of_what_fits() -> None:
    known = [error(1.1), error(0.7), error(1.2), error(3.0, device="gpu"), error(5.0, what="memory")]
    found = experience.error(known, "step", "cpu")
    assert found.value == pytest.approx(0.2) and found.n == 3 and found.high == pytest.approx(0.3)
    assert experience.error(known, "step", "tpu").value is None


def test_in_words() -> None:
    assert experience.sentence([], "cpu") == ""
    text = experience.sentence([error(1.1), error(1.1), error(2.0, what="memory")], "cpu")
    assert "step by 10 % (median of 2" in text and "memory by 100 %" in text
