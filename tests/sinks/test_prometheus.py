"""The text that Prometheus scrapes: escaped, whole, and true to the record."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import recorded_runs as recorded
from hypothesis import given
from hypothesis import strategies as st

from upshift.sinks.prometheus import MOST_LABEL, MOST_SERIES, Exposition, Prometheus, escape

LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{(.*)\} (\S+)")


def unescaped(text: str) -> str:
    """By the words of the format: backslash, then one of backslash, quote, n."""
    found, rest = "", iter(text)
    for char in rest:
        found += {"\\": "\\", '"': '"', "n": "\n"}[next(rest)] if char == "\\" else char
    return found


def parsed(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """A reader of the format of our own; refuses what a collector would refuse."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    typed: set[str] = set()
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            name, kind = line[7:].split(" ")
            assert kind in ("gauge", "counter") and name not in typed, "a family comes once"
            assert name.endswith("_total") == (kind == "counter")
            typed.add(name)
        elif not line.startswith("# HELP "):
            match = LINE.fullmatch(line)
            assert match and match[1] in typed, line
            # A quote ends a label unless an odd number of backslashes stands before it.
            labels = re.findall(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"(?:,|$)', match[2])
            assert ",".join(f'{key}="{value}"' for key, value in labels) == match[2], line
            key = tuple((label, unescaped(value)) for label, value in labels)
            assert key not in found.setdefault(match[1], {}), "a series comes once"
            found[match[1]][key] = float(match[3])
    return found


@given(st.text(max_size=MOST_LABEL), st.floats(allow_nan=False))
def test_any_label_and_number_come_back(label, value):
    state = Exposition(run=label)
    state.set("x", "gauge", "help", value, name=label)
    whole = label.encode("utf-8", "replace").decode()
    assert parsed(state.text()) == {"upshift_x": {(("run", whole), ("name", whole)): value}}


@given(st.text(alphabet='\\"\nab', max_size=30))
def test_escaping_is_undone_by_the_rule_of_the_format(text):
    assert unescaped(escape(text)) == text
    assert "\n" not in escape(text)


def test_another_reader_agrees(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser")
    sink = Prometheus(tmp_path / "out.prom", recorded.write(tmp_path / 'a "run"\\'))
    sink.close()
    text = (tmp_path / "out.prom").read_text()
    theirs = {
        (sample.name, tuple(sample.labels.items()), str(sample.value))
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    ours = {(name, key, str(value)) for name, series in parsed(text).items() for key, value in series.items()}
    assert theirs == ours


def test_numbers_that_are_not_finite():
    state = Exposition()
    for value in (math.nan, math.inf, -math.inf):
        state.set(f"v{len(state.text())}", "gauge", "help", value)
    assert re.findall(r"\} (\S+)", state.text()) == ["NaN", "+Inf", "-Inf"]


def test_the_state_of_a_run(tmp_path):
    file = tmp_path / "deep" / "run.prom"
    sink = Prometheus(file, recorded.write(tmp_path / "run"))
    sink.poll()
    state = parsed(file.read_text())
    run = (("run", "run"),)
    assert state["upshift_step"][run] == 60
    assert state["upshift_loss"][run] == recorded.losses()[-1]
    assert state["upshift_steps_per_second"][run] == 20
    phases = {dict(key)["phase"]: value for key, value in state["upshift_phase_seconds_total"].items()}
    assert phases == {"forward": pytest.approx(1.2), "backward": pytest.approx(1.8), "evaluation": 0, "checkpoint": 0}
    metrics = {dict(key)["name"]: value for key, value in state["upshift_metric"].items()}
    assert metrics["accuracy"] == 0.5 + 5 / 16 and math.isnan(metrics["broken"])
    assert state["upshift_cpu_seconds_total"][run] == 3.0
    assert state["upshift_memory_bytes"][run] == 2.0**30
    assert state["upshift_alarms_total"][(*run, ("name", "memory"))] == 1
    assert (state["upshift_running"][run], state["upshift_exit_code"][run]) == (0, 0)


def test_it_runs_until_it_ends_and_is_replaced_as_a_whole(tmp_path):
    folder, file = tmp_path / "run", tmp_path / "run.prom"
    log = recorded.begin(folder)
    sink = Prometheus(file, folder)
    sink.poll()
    assert parsed(file.read_text())["upshift_running"][(("run", "run"),)] == 1
    before = file.stat().st_ino
    sink.poll()
    assert file.stat().st_ino == before, "nothing new, nothing written"
    with open(file) as held:
        recorded.window(log, 0)
        sink.poll()
        assert "upshift_step" not in held.read(), "who reads it keeps the old one"
    assert parsed(file.read_text())["upshift_step"][(("run", "run"),)] == 10
    # Killed: the log has no end.
    sink.close()
    state = parsed(file.read_text())
    assert state["upshift_running"][(("run", "run"),)] == 0 and "upshift_exit_code" not in state
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == ["run.prom"], "no leftovers"
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_place_that_cannot_be_written_raises_and_leaves_nothing(tmp_path):
    file = tmp_path / "there" / "run.prom"
    file.mkdir(parents=True)
    with pytest.raises(OSError):
        Prometheus(file, recorded.write(tmp_path / "run")).poll()
    assert list((tmp_path / "there").iterdir()) == [file]


def test_a_flood_of_names_is_bounded(tmp_path):
    log = recorded.begin(tmp_path / "run")
    log.append("metrics", at=0.0, text="", step=1, values={f"m{i}": float(i) for i in range(3 * MOST_SERIES)})
    sink = Prometheus(tmp_path / "run.prom", tmp_path / "run")
    sink.poll()
    assert len(parsed(Path(sink.file).read_text())["upshift_metric"]) == MOST_SERIES
