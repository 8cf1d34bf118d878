"""docs/tutorial-job.md does what it says: its file is written, its commands are executed in order, Ctrl-C included.

Output is compared as on the how-to pages: figures count for nothing, `...` stands for what was left out.
"""

from __future__ import annotations

import doctest
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import doc_pages as pages
import pytest
import test_how_to as how_to

PAGE = pages.ROOT / "docs" / "tutorial-job.md"

#: Seconds for one command on a machine with other work.
PATIENCE = 120.0


def blocks() -> list[pages.Block]:
    return pages.blocks_in(pages.text(PAGE), PAGE)


def command(line: str, folder: Path, until: str = "") -> tuple[str, int]:
    """What a command prints, and how it ends; SIGINT is sent to it once a line begins with `until`."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line} 2>&1"],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    clock = threading.Timer(PATIENCE, process.kill)
    clock.start()
    said = []
    assert process.stdout is not None
    for output in process.stdout:
        said.append(output)
        if until and output.startswith(until):
            process.send_signal(signal.SIGINT)
            until = ""
    process.wait()
    clock.cancel()
    assert not until, f"{line} never printed {until!r}:\n{''.join(said)}"
    return "".join(said), process.returncode


def same(expected: str, said: str) -> bool:
    want, got = (how_to.figures_masked(text.strip()) + "\n" for text in (expected, said))
    return doctest.OutputChecker().check_output(want, got, how_to.OPTIONS)


@pytest.mark.extra
def test_the_tutorial_does_what_it_shows(tmp_path: Path) -> None:
    code, executed = 0, 0
    for block in blocks():
        file = re.search(r"file: (\S+)", block.remark)
        if file:
            (tmp_path / file[1]).write_text(block.body, encoding="utf-8")
        if block.language != "console" or block.no_run is not None:
            continue
        stop = re.search(r"interrupt: (.+)", block.remark)
        for line, expected in how_to.exchanges(block):
            place = f"{block}: $ {line}"
            if line == "echo $?":
                assert expected.strip() == str(code), place
                code = 0
                continue
            assert code == 0, f"exit code {code}, which the page does not show; before {place}"
            said, code = command(line, tmp_path, stop[1] if stop else "")
            assert same(expected, said), f"{place}\n{said}"
            executed += 1
    assert code == 0
    assert executed >= 4
    assert (tmp_path / "model.safetensors").is_file()


def test_what_is_not_executed_takes_minutes_or_is_tried_elsewhere() -> None:
    left_out = [block for block in blocks() if block.language == "console" and block.no_run is not None]
    assert len(left_out) <= 2
    for block in left_out:
        file = re.search(r"tests/\S+\.py", block.no_run or "")
        assert "minutes" in (block.no_run or "") or (file and (pages.ROOT / file[0]).is_file()), str(block)


def test_the_script_and_the_job_share_their_functions() -> None:
    """The job is the same training: what is kept of the script is kept word by word."""
    script, job, *_ = [block.body for block in blocks() if block.language == "python"]
    for name in ("points", "build_model"):
        found = [re.search(rf"^def {name}\(.*?(?=^\S)", text, re.MULTILINE | re.DOTALL) for text in (script, job)]
        assert found[0] and found[1] and found[0][0] == found[1][0], name
