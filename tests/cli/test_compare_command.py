"""`upshift compare`: folders of runs and seeds, files it writes, the gate's exit codes, folders that are none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import upshift

from upshift.api import comparing
from upshift.api.comparing import CompareOptions
from upshift.errors import RecordError, UsageError
from upshift.records import codec
from upshift.records.comparison import Comparison
from upshift.records.runlog import LOG, RunLog


def write(folder: Path, accuracy: float = 0.9, step: float = 0.01, at: int = 0, *, steps: int = 400, ended: bool = True,
          metric: str = "accuracy", code: int = 0) -> Path:  # fmt: skip
    log = RunLog(folder)
    log.append("start", script="train.py", arguments=[], started=f"2026-01-01 00:{at:02d}:00", clock=0.0, pid=1 << 22,
               environment={"device": "cpu X"})  # fmt: skip
    for k in range(4):
        n = steps // 4
        seconds = n * step
        log.append("steps", first=k * n, n=n, at=(k + 1) * seconds, seconds=seconds, loss=1 / (k + 1), last_loss=0.1)
        if metric:
            value = accuracy * (k + 1) / 4
            log.append("metrics", at=(k + 1) * seconds, text="", step=(k + 1) * n, values={metric: value})
    if ended:
        log.append("end", code=code, how="", seconds=steps * step, steps=steps)
    log.close()
    return folder


def seeds(folder: Path, accuracy: float, step: float, offset: int, n: int = 4) -> Path:
    chance = random.Random(offset)
    for at in range(n):
        write(
            folder / f"seed{at}", accuracy + chance.gauss(0, 0.002), step * (1 + chance.gauss(0, 0.01)), 2 * at + offset
        )
    return folder


def compare(*paths: Path, **options: object) -> Comparison:
    return comparing.compare(paths, CompareOptions(**options))  # type: ignore[arg-type]


def test_seeds_side_by_side_with_every_output(tmp_path: Path) -> None:
    seeds(tmp_path / "stock", 0.90, 0.010, 0), seeds(tmp_path / "planned", 0.93, 0.008, 1)
    ended = upshift(
        "compare", "--target", "0.6", "--price", "2.5", "--html", "out/page.html", "--json", "out/found.json",
        "--markdown", "out/found.md", "--fail-if", "step>+2%", "stock", "planned", cwd=tmp_path,
    )  # fmt: skip
    assert ended.code == 0 and ended.out == "", ended.err
    assert "planned is better" in ended.err and "accuracy" in ended.err
    found = codec.read(tmp_path / "out/found.json", Comparison)
    assert [item.name for item in found.approaches] == ["stock", "planned"]
    answers = {item.figure: item.answer for item in found.differences}
    assert answers["metric"] == answers["step"] == answers["cost"] == "better"
    # 400 steps of 10 ms at 2.5 an hour.
    assert found.approaches[0].figures["cost"].value.value == pytest.approx(4 / 3600 * 2.5, rel=0.03)
    assert found.gates[0].outcome == "passed"
    assert (
        "<svg" in (tmp_path / "out/page.html").read_text() and "| planned |" in (tmp_path / "out/found.md").read_text()
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["found.json", "found.md", "page.html"]


def test_the_gate_fails_and_what_is_unknown_does_not_pass(tmp_path: Path) -> None:
    write(tmp_path / "a"), write(tmp_path / "b", step=0.02, at=1)
    slower = upshift("compare", "--fail-if", "step>+2%", "--names", "main,branch", "a", "b", cwd=tmp_path)
    assert slower.code == 1 and any("failed: step>+2%: branch" in said for said in slower.said)
    assert "not distinguishable" in " ".join(slower.err.lower().split())
    unverified = upshift("compare", "--fail-if", "energy>+2%", "a", "b", cwd=tmp_path)
    assert unverified.code == 2 and any("energy" in said and "not known" in said for said in unverified.said)


def test_one_run_folder_each(tmp_path: Path) -> None:
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", 0.99, 0.001, 1))
    assert {item.answer for item in found.differences} <= {"not distinguishable", "not tested", "unknown"}
    assert found.approaches[0].runs[0].status == "finished"


def test_a_launch_is_its_first_rank(tmp_path: Path) -> None:
    for rank in (10, 0, 2):
        write(tmp_path / "launch" / f"rank{rank}", accuracy=rank / 10 + 0.1)
    found = compare(tmp_path / "launch", write(tmp_path / "b"))
    assert len(found.approaches[0].runs) == 1 and found.approaches[0].runs[0].run.endswith("rank0")
    # Processes without a rank are named by their ids; a file tells the launch from a folder of seeds.
    for pid in ("411", "409"):
        write(tmp_path / "pids" / pid)
    assert len(compare(tmp_path / "pids", tmp_path / "b").approaches[0].runs) == 2
    (tmp_path / "pids" / comparing.LAUNCH).write_text("{}")
    found = compare(tmp_path / "pids", tmp_path / "b")
    assert [item.run.rpartition("/")[2] for item in found.approaches[0].runs] == ["409"]


def test_seeds_that_are_launches(tmp_path: Path) -> None:
    for seed in range(2):
        (
            write(tmp_path / "many" / f"s{seed}" / "rank0", 0.9 + seed / 100),
            write(tmp_path / "many" / f"s{seed}" / "rank1"),
        )
    found = compare(tmp_path / "many", write(tmp_path / "b"))
    assert [item.run.rpartition("many/")[2] for item in found.approaches[0].runs] == ["s0/rank0", "s1/rank0"]


def test_names(tmp_path: Path) -> None:
    a, b = write(tmp_path / "x" / "run"), write(tmp_path / "y" / "run")
    assert [item.name for item in compare(a, b).approaches] == ["x/run", "y/run"]
    assert [item.name for item in compare(a, a).approaches] == ["run (1)", "run (2)"]
    assert [item.name for item in compare(a / LOG, b, names=["one", " two"]).approaches] == ["one", "two"]
    for wrong in (["one"], ["one", "one"], ["one", ""]):
        with pytest.raises(UsageError, match="names"):
            compare(a, b, names=wrong)


def test_half_written_and_torn_logs(tmp_path: Path) -> None:
    half = write(tmp_path / "half", ended=False)
    with open(half / LOG, "ab") as file:
        file.write(b'{"kind":"steps","first":400,"n":1')
    found = compare(half, write(tmp_path / "whole"))
    run = found.approaches[0].runs[0]
    assert run.status == "unknown" and run.figures["step"] is not None
    assert any("could not be read" in note for note in run.notes)
    assert any("not the end of a training" in note for note in found.notes)


def test_a_broken_seed_is_left_out_and_told(tmp_path: Path) -> None:
    folder = seeds(tmp_path / "a", 0.9, 0.01, 0, n=2)
    (folder / "bad").mkdir()
    (folder / "bad" / LOG).write_bytes(b"\0\0\n{]")
    (folder / "empty").mkdir()
    found = compare(folder, write(tmp_path / "b"))
    assert len(found.approaches[0].runs) == 2
    assert [note for note in found.notes if "bad is left out" in note] and not any("empty" in n for n in found.notes)


def bad_folders(root: Path) -> dict[str, Path]:
    paths = {
        name: root / name for name in ("missing", "empty", "binary", "other", "future", "all-torn", "file", "loop")
    }
    for name in ("empty", "binary", "other", "future", "all-torn"):
        paths[name].mkdir()
    paths["binary"].joinpath(LOG).write_bytes(bytes(range(256)) * 50)
    paths["other"].joinpath(LOG).write_text('{"kind":"steps","first":0}\n{"a":1}\n')
    write(paths["future"])
    text = paths["future"].joinpath(LOG).read_text()
    paths["future"].joinpath(LOG).write_text(text.replace('{"kind":"start",', '{"kind":"start","schema":99,'))
    lines = ['{"kind":"start","script":"t","arguments":[],"started":"x"}', '{"kind":"steps","begin":0}', '{"kind":7}']
    paths["all-torn"].joinpath(LOG).write_text("\n".join(lines) + "\n")
    paths["file"].write_text("x")
    paths["loop"].symlink_to(paths["loop"])
    return paths


@pytest.mark.parametrize("name", ["missing", "empty", "binary", "other", "future", "all-torn", "file", "loop"])
def test_folders_that_hold_no_run_are_refused_in_words(tmp_path: Path, name: str) -> None:
    bad = bad_folders(tmp_path)[name]
    with pytest.raises(RecordError) as caught:
        compare(write(tmp_path / "good"), bad)
    assert caught.value.remedy and name in caught.value.message
    if name == "future":
        assert "schema 99" in caught.value.message


def test_wrong_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    for options in ({"fail_if": ["speed>1%"]}, {"metric": "nonsense"}, {"metric": "bleu:max"}, {"price": "-1"},
                    {"pue": 0.1}, {"region": "nowhere at all"}):  # fmt: skip
        with pytest.raises(UsageError):
            compare(a, a, **options)
    with pytest.raises(UsageError, match="two runs"):
        compare(a)


def test_scalars_beside_the_log_are_metrics(tmp_path: Path) -> None:
    paths = []
    for at, name in enumerate(("a", "b")):
        folder = write(tmp_path / name, metric="", at=at)
        lines = [json.dumps({"val/acc": 0.1 * k + at / 10, "global_step": 100 * k}) for k in range(1, 5)]
        (folder / "scalars.jsonl").write_text("\n".join(lines))
        paths.append(folder)
    found = compare(*paths, target=0.4)
    assert found.metric == "val/acc" and found.approaches[0].figures["metric"].value.value == pytest.approx(0.4)
    # When it was reached in seconds is not recorded; at which step is.
    assert [item.figures["steps_to_target"].value.value for item in found.approaches] == [400, 300]
    assert "to_target" not in found.approaches[0].figures
