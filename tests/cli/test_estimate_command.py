"""`upshift estimate`: what it refuses, and one real estimate of a small script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import TRAIN

from upshift.cli.estimate import command
from upshift.errors import UsageError
from upshift.records import codec
from upshift.records.estimate import Estimate


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments))


def test_help() -> None:
    done = invoke("--help")
    assert done.exit_code == 0 and "--deadline" in done.output and "order of magnitude" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--budget", "0", "train.py"), ("--budget", "nan", "train.py"), ("--deadline", "soon", "train.py"),
        ("--batch", "0", "train.py"), ("--precision", "fp7", "train.py"), ("--epochs", "-1", "train.py"),
        ("--steps", "many", "train.py"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments)
    assert done.exit_code != 0
    if done.exit_code == 2:  # refused while it was parsed
        assert arguments[0] in done.output
    else:
        assert isinstance(done.exception, UsageError) and arguments[0] in done.exception.message


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--gpu", "Voodoo", "train.py"), "Voodoo"),
        (("--steps", "3", "--epochs", "2", "train.py"), "two ways"),
        (("no-such-script.py",), "no script"),
        ((), "no script"),
    ],
)
def test_errors_name_a_remedy(arguments: tuple[str, ...], word: str) -> None:
    done = invoke(*arguments)
    assert isinstance(done.exception, UsageError)
    assert word in done.exception.message and done.exception.remedy


@pytest.mark.extra
def test_a_script_is_watched_and_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("train.py").write_text(TRAIN.format(steps=5000))
    done = invoke("--gpu", "L4", "--gpu", "H100", "--steps", "1000", "--measure", "--seconds", "3s", "--json", "e.json",
                  "train.py")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = codec.read(Path("e.json"), Estimate)
    assert [item.device.name for item in found.devices if item.fits] == ["H100", "L4"] or len(found.devices) == 2
    assert found.here.step.value and found.here.memory.value
    # 8 -> 16 -> 1: 161 parameters, SGD without momentum.
    assert found.here.parts["parameters"].value == 161 * 4
    assert found.here.parts["optimizer state"].value == 0
    assert found.batch == 64 and found.steps.value == 1000
    assert all(item.order_of_magnitude for item in found.devices)
    assert found.compared and "earlier estimates here were off" in found.experience
