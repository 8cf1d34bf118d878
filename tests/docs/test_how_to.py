"""The how-to pages do what they say: their commands are executed in order, and end and speak as shown.

A page has a folder of its own with `train.py` and `train.sh` of docs/how-to. Comments before a block, which readers do
not see, say what else holds: `given: a plan` (once a page), `varies: says "a", "b"` for output that differs from
machine to machine, and `no-run: why`.
"""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import doc_pages as pages
import pytest

from upshift.hardware.device import device_name
from upshift.records import Plan, Proof, planfile
from upshift.records.fingerprint import fingerprint
from upshift.records.plan import Kept

FOLDER = pages.ROOT / "docs" / "how-to"
HOW_TO = tuple(page for page in pages.PAGES if page.parent == FOLDER)
SAME = doctest.OutputChecker()
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def console(page: Path) -> list[pages.Block]:
    return [item for item in pages.blocks_in(pages.text(page), page) if item.language == "console"]


def executed(page: Path) -> list[pages.Block]:
    return [item for item in console(page) if item.no_run is None]


def exchanges(block: pages.Block) -> list[tuple[str, str]]:
    """The commands of a block, each with the output shown under it."""
    parts = re.split(r"^\$ (.*)\n", block.body, flags=re.MULTILINE)
    assert not parts[0].strip(), f"{block}: output before the first command"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def figures_masked(text: str) -> str:
    """A text in which figures, with their units of time, are the same on every machine."""
    text = re.sub(r"\d[\d.,:]*(-\d+)*", "#", text)
    return re.sub(r"# (s|ms|us|min|h)\b( # (s|ms|us|min|h)\b)*", "# s", text)


def a_plan(folder: Path) -> None:
    """What `upshift tune` leaves on this machine when the cache has won."""
    techniques = {"cache": {"max_bytes": 1 << 26, "recheck": 0.01}}
    device, script = device_name("cpu"), str(folder / "train.py")
    plan = Plan(
        script="train.py", arguments=(), created="2026-01-01 00:00:00", device=device, verdict="cache: faster steps",
        fingerprint=fingerprint(script, (), device, techniques, files=("train.py",)), speedup=4.0, low=3.6, high=4.4,
        pairs=20, proof=Proof(rung="bitwise", passed=True, reason="identical losses and parameters", steps=400),
        kept=tuple(Kept(name=name, settings=settings, numerics="bitwise") for name, settings in techniques.items()),
    )  # fmt: skip
    planfile.write(folder / "train.upshift.toml", plan)


def execute(commands: list[str], folder: Path) -> list[tuple[str, int]]:
    """The commands in one shell, so that `$?` means what it says: what each printed, and how it ended."""
    mark = "== end of a command =="
    lines = [f'{command}\ncode=$?; echo; echo "{mark}$code"; (exit $code)' for command in commands]
    done = subprocess.run(
        ["bash", "-c", "exec 2>&1\n" + "\n".join(lines)],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return [(said, int(code)) for said, code in re.findall(rf"(.*?)\n{mark}(\d+)\n", done.stdout, re.DOTALL)]


@pytest.mark.parametrize("page", [page for page in HOW_TO if executed(page)], ids=lambda page: page.stem)
def test_commands_do_what_the_page_shows(page, tmp_path):
    for name in ("train.py", "train.sh"):
        shutil.copy(FOLDER / name, tmp_path)
    if "<!-- given: a plan -->" in pages.text(page):
        a_plan(tmp_path)
    for block in executed(page):
        shown = exchanges(block)
        done = execute([command for command, _ in shown], tmp_path)
        assert len(done) == len(shown), block
        varies = re.search(r"varies: says (.*)", block.remark)
        following = [command for command, _ in shown[1:]] + [""]
        for (command, expected), (said, code), after in zip(shown, done, following, strict=True):
            place = f"{block}: $ {command}\n{said}"
            assert code == 0 or after == "echo $?", f"exit code {code}, which the page does not show; {place}"
            if varies and command == "echo $?":
                continue
            if varies:
                words = re.findall(r'"([^"]+)"', varies[1])
                assert words and all(word in " ".join(said.split()) for word in words), place
            else:
                # An exit code is no figure of the machine.
                mask = str if command == "echo $?" else figures_masked
                want, got = mask(expected.strip()) + "\n", mask(said.strip()) + "\n"
                difference = SAME.output_difference(doctest.Example(command, want), got, OPTIONS)
                assert SAME.check_output(want, got, OPTIONS), difference + place


def test_the_pages_execute_commands():
    """A block that is left out takes minutes, or names the test that tries the same."""
    assert sum(len(executed(page)) for page in HOW_TO) >= 8
    for page in HOW_TO:
        for block in console(page):
            assert block.no_run is None or re.search(r"minutes|tests/\S+\.py", block.no_run), str(block)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("step 1.2 ms, 40 %", "step 3.4 s, 51.2 %", True),
        ("record: ...", "record: x/20261121-181041-24466", True),
        ("plan: cache", "plan: fused", False),
        ("one\n...\nthree", "one\ntwo\nthree", True),
        ("one\nthree", "one\ntwo\nthree", False),
    ],
)
def test_what_counts_as_the_same_output(shown, printed, same):
    assert SAME.check_output(figures_masked(shown) + "\n", figures_masked(printed) + "\n", OPTIONS) is same
