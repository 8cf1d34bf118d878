"""`upshift doctor`: what it looks at, what it calls wrong, and what the self-test says in words."""

from __future__ import annotations

import io
import json
from importlib import metadata

import pytest
from conftest import upshift
from rich.console import Console

from upshift import api
from upshift.cli.doctor import command, drawn, selftest_words
from upshift.hardware.health import Check, Health, environment, memory
from upshift.records import Pairing, codec
from upshift.search.selftest import Identical, SelftestReport, Truth

NAMES = {
    "system", "processor", "cores", "OpenMP", "NUMA nodes", "clock",
    "torch", "torch installations", "torch and device", "vector instructions", "compiler",
    "GPU", "memory", "swap", "huge pages", "shared memory", "temporary files", "this folder", "cache folder",
    "disk speed", "open files", "Python", "environment", "module path", "isolation", "allocators",
}  # fmt: skip
GROUPS = ["machine", "torch", "accelerator", "memory and disk", "environment"]


def test_this_machine(tmp_path):
    """Every check speaks, whatever the machine is; the exit code says whether anything is wrong."""
    ended = upshift("doctor", "--json", "found.json", cwd=tmp_path, OMP_NUM_THREADS="1", COLUMNS="120")
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert {check["name"] for check in found} >= NAMES
    assert list(dict.fromkeys(check["group"] for check in found)) == GROUPS
    assert all(check["found"] and check["why"] for check in found)
    assert all(check["mend"] for check in found if check["state"] == "wrong")
    assert ended.code == int(any(check["state"] == "wrong" for check in found))
    assert ended.out == "" and "Traceback" not in ended.err
    lines = ended.err.splitlines()
    assert all(any(f"{check['name']}: " in line for line in lines) for check in found)
    assert [line for line in lines if line in GROUPS] == GROUPS, "headings"
    speed = next(check for check in found if check["name"] == "disk speed")
    assert "measured" in speed["found"]
    torch = next(check for check in found if check["name"] == "torch")
    assert torch["found"].startswith(metadata.version("torch").partition("+")[0]), "the torch of this environment"
    assert not list(tmp_path.glob(".upshift*"))


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("unknown", 0), ("wrong", 1)])
def test_the_exit_code_and_the_file(state, code, tmp_path, monkeypatch, capsys):
    check = Check("swap", state, "8 GiB", "why", "swapoff -a", "memory and disk")
    asked = []
    monkeypatch.setattr(api, "doctor", lambda say, quick: asked.append(quick) or Health((check,)))
    file = tmp_path / "found.json"
    assert command.main(["--quick", "-q", "--json", str(file)], standalone_mode=False) == code
    assert asked == [True] and codec.read(file, Health) == Health((check,))
    said = capsys.readouterr()
    assert said.out == "" and ("swapoff -a" in said.err) == (state != "ok") and f"{state:<8}swap: 8 GiB" in said.err


@pytest.mark.extra
def test_quick_in_another_language_and_time_zone(tmp_path):
    """What is read from other programs, and the clock, do not depend on them; too many threads are wrong."""
    ended = upshift("doctor", "--quick", "-q", "--json", "found.json", cwd=tmp_path, OMP_NUM_THREADS="4096",
                    LC_ALL="de_DE.UTF-8", LANGUAGE="de", TZ="Pacific/Kiritimati", PYTHONPATH="/nowhere")  # fmt: skip
    found = {check["name"]: check for check in json.loads((tmp_path / "found.json").read_text())["checks"]}
    assert ended.code == 1
    assert "wrong   OpenMP" in ended.err and "mend it: unset OMP_NUM_THREADS" in ended.err
    assert found["clock"]["state"] in ("ok", "note") and "behind" not in found["clock"]["found"]
    assert found["module path"]["mend"] == "unset PYTHONPATH"
    assert found["disk speed"]["state"] == "unknown" and "--quick" in found["disk speed"]["found"]


def shown(*checks: Check) -> str:
    console = Console(width=60, file=io.StringIO(), highlight=False)
    for line in drawn(Health(checks), 60):
        console.print(line, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_what_is_not_well_says_why_and_what_mends_it():
    bad, good = memory.shared_memory(2**26), environment.isolation("overlay")
    text = shown(bad, good)
    assert bad.why in " ".join(text.split()) and good.why not in text
    assert f"mend it: {bad.mend}\n" in text, "a command is never broken into lines"
    assert all(len(line) <= 60 and line == line.rstrip() for line in text.splitlines() if "mend it" not in line)
    assert "1 ok, 0 to note, 1 wrong, 0 unknown" in text
    assert Health((bad, good)).wrong() == ("shared memory",)


def test_hostile_text_drives_no_terminal():
    text = shown(
        Check("module path", "note", "PYTHONPATH=\x1b[31m[red]/x[/red]:smile:", "a\x1b]0;b\x07", "unset \x1bX")
    )
    assert "\x1b" not in text and "\x07" not in text and "[red]/x[/red]:smile:" in text


def truth(name: str, **changes: object) -> Truth:
    given = {"kept": False, "shown": False, "decision": "no change", "reason": "it needs more steps", "seconds": 10.0}
    return Truth(name=name, **{**given, **changes})  # type: ignore[arg-type]


def test_the_self_test_in_words():
    found = SelftestReport(
        created="", machine={}, seconds=118.0,
        identical=Identical(decisions=40, faster=0, slower=1, pairs=4, seconds=1.5),
        gains=(
            truth("sleep", kept=True, shown=True,
                  pairing=Pairing(ratio=1.03, low=1.02, high=1.04, quads=30, smallest=0.01)),
            truth("arithmetic", shown=True, pairing=Pairing(ratio=1.02, low=0.99, high=1.05, quads=30, smallest=0.03)),
        ),
        faults=(truth("loss scale"), truth("labels", shown=True, reason="updates agree")),
    )  # fmt: skip
    text = " ".join(selftest_words(found).split())
    assert "0 of 40 decisions" in text and "at most 7.22 %" in text, "1 - 0.05 ** (1 / 40)"
    assert "sleep: kept (1.030x" in text and "arithmetic: not found" in text
    assert "a true gain of 4.03 %" in text
    assert "loss scale: rejected: it needs more steps." in text and "labels: accepted (updates agree)." in text
    assert "Wrong: A planted fault was accepted: labels." in text and "Nothing wrong" not in text


def test_an_interrupted_self_test_in_words():
    found = SelftestReport(created="", machine={}, seconds=3.0, identical=Identical(), left_out=("a", "b"),
                           interrupted=True)  # fmt: skip
    text = selftest_words(found)
    assert "no decision" in text and "Interrupted" in text and "in this time: a; b." in text


@pytest.mark.extra
def test_a_short_self_test(tmp_path):
    """Real processes; a machine that is slow just then has time for less, and says so."""
    ended = upshift("doctor", "--selftest", "--minutes", "0.1", "--json", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert ended.out == "" and "False wins" in ended.err
    assert found["identical"]["decisions"] >= 1 and found["problems"] == []
