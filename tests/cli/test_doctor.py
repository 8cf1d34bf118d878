"""`upshift doctor`: what it looks at, what it calls wrong, and what the self-test says in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import upshift

from upshift.cli.doctor import health_words, selftest_words
from upshift.hardware import health
from upshift.hardware.health import Health
from upshift.records import Pairing
from upshift.search.selftest import Identical, SelftestReport, Truth


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine(tmp_path):
    """Every check speaks, whatever the machine is; the exit code says whether anything is wrong."""
    ended = upshift("doctor", "--json", "found.json", cwd=tmp_path, OMP_NUM_THREADS="1")
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [check["name"] for check in found] == [
        "torch", "processor", "cores", "OpenMP", "compiler", "temporary files", "shared memory", "isolation",
        "allocators",
    ]  # fmt: skip
    assert all(check["found"] and check["why"] for check in found)
    assert ended.code == int(any(check["state"] == "wrong" for check in found))
    assert ended.out == "" and all(check["found"].split()[0] in ended.err for check in found)


def test_too_many_threads_are_wrong_and_the_exit_code_says_so(tmp_path):
    ended = upshift("doctor", "-q", cwd=tmp_path, OMP_NUM_THREADS="4096")
    assert ended.code == 1
    assert "wrong OpenMP" in ended.err and "mend it: unset OMP_NUM_THREADS" in ended.err


@pytest.mark.parametrize(
    ("env", "state", "mend"),
    [
        ({}, "ok", ""),
        ({"OMP_NUM_THREADS": "4"}, "ok", ""),
        ({"OMP_NUM_THREADS": "1"}, "note", "unset OMP_NUM_THREADS"),
        ({"MKL_NUM_THREADS": "8"}, "wrong", "unset MKL_NUM_THREADS"),
        ({"OMP_PROC_BIND": "close"}, "note", "unset OMP_PROC_BIND"),
        ({"OMP_PROC_BIND": "false"}, "ok", ""),
        ({"OMP_NUM_THREADS": "4,2"}, "ok", ""),
    ],
)
def test_openmp(env, state, mend):
    found = health.openmp(env, 4)
    assert (found.state, found.mend) == (state, mend)


@pytest.mark.parametrize(("quota", "state"), [("max 100000", "ok"), ("400000 100000", "ok"), ("300000 100000", "note"),
                                              ("100000 100000", "wrong")])  # fmt: skip
def test_a_quota_below_the_affinity(tmp_path, quota, state):
    root = write(tmp_path, sys__fs__cgroup__cpu_max="")
    (root / "sys/fs/cgroup/cpu.max").write_text(quota)
    found = health.cores(root, affinity=4)
    assert found.state == state and bool(found.mend) == (state != "ok")


@pytest.mark.parametrize(("flags", "said"), [("avx2 amx_bf16", "amx_bf16"), ("avx2", "no bf16 in hardware")])
def test_the_processor(tmp_path, flags, said):
    assert said in health.processor(write(tmp_path, proc__cpuinfo=f"model name : Some CPU\nflags : {flags}\n")).found


def test_room_and_shared_memory():
    assert [health.room("/t", size).state for size in (2**20, 2**30, 2**40)] == ["wrong", "note", "ok"]
    assert [health.shared_memory(size).state for size in (2**26, 2**28, 2**31, None)] == ["wrong", "note", "ok", "note"]


def test_isolation_compiler_and_allocators():
    states = [health.isolation(rung).state for rung in ("overlay", "landlock", "redirect", "")]
    assert states == ["ok", "note", "note", "wrong"]
    assert [health.compiler(there).state for there in (True, False)] == ["ok", "note"]
    assert [health.allocators(found).state for found in ({"tcmalloc": "/lib/x.so"}, {})] == ["ok", "note"]


def test_what_is_not_well_says_why_and_what_mends_it():
    bad, good = health.shared_memory(2**26), health.compiler(True)
    text = health_words(Health((bad, good)))
    assert bad.why in " ".join(text.split()) and bad.mend in text and good.why not in text
    assert Health((bad, good)).wrong() == ("shared memory",)


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


def test_a_short_self_test(tmp_path):
    """Real processes; a machine that is slow just then has time for less, and says so."""
    ended = upshift("doctor", "--selftest", "--minutes", "0.1", "--json", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert ended.out == "" and "False wins" in ended.err
    assert found["identical"]["decisions"] >= 1 and found["problems"] == []
