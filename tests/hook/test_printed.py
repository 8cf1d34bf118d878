"""What a script prints is heard, and neither it nor its streams notice."""

from __future__ import annotations

import io
import json
import os
import sys
import types

import pytest
from conftest import python, upshift
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.hook import printed as printed_module
from upshift.hook.printed import MANY_LINES, MOST_EACH, MOST_KINDS, MOST_LINE, ONE_OF, Printed
from upshift.records.runfold import fold


class Raw(io.BytesIO):
    def fileno(self):
        return 1


def hearing(index=1, evaluated=False):
    watch = types.SimpleNamespace(index=index, span_start=1.0 if evaluated else 0.0, born=0.0, loss_seen=True)
    return Printed(watch), watch


@pytest.fixture
def stream(monkeypatch):
    made = io.TextIOWrapper(Raw(), encoding="utf-8", write_through=True)
    # Those of pytest, which stand for the others meanwhile, are of another kind.
    for name in ("__stdout__", "__stderr__"):
        monkeypatch.setattr(sys, name, made)
    return made


def told(printed, at=0.0, last=True):
    found = []
    printed.tell(lambda line, values: found.append((line.step, values)), at, last=last)
    return found


def test_only_the_attribute_write_differs_and_it_comes_back(stream):
    printed, _ = hearing()
    before = vars(stream).copy()
    printed.look()
    printed.look()
    assert type(stream) is io.TextIOWrapper and set(vars(stream)) - set(before) == {"write"}
    assert print("val acc", 0.5, file=stream) is None and stream.write("val acc 0.75\n") == 13
    assert stream.buffer.getvalue() == b"val acc 0.5\nval acc 0.75\n"
    printed.close()
    assert vars(stream) == before
    assert told(printed) == []


def test_errors_are_the_scripts_own(stream):
    plain = io.TextIOWrapper(Raw(), encoding="ascii")
    printed, _ = hearing()
    printed.look()
    for wrong in ((), (1,), ("a", "b"), (b"a",)):
        with pytest.raises(TypeError) as expected:
            plain.write(*wrong)
        with pytest.raises(TypeError) as caught:
            stream.write(*wrong)
        assert str(caught.value) == str(expected.value)
    stream.close()
    with pytest.raises(ValueError):
        stream.write("x")


def test_what_the_script_puts_in_its_place_stays(stream):
    printed, _ = hearing()
    printed.look()
    heard, inner = [], stream.write

    def tee(text):
        heard.append(text)
        return inner(text)

    stream.write = tee
    print("test accuracy: 0.5", file=stream)
    printed.look()
    assert told(printed) == [(1, {"test accuracy": 0.5})]
    printed.close()
    assert stream.write is tee and heard == ["test accuracy: 0.5", "\n"]


@pytest.mark.parametrize("other", [None, io.StringIO(), object()])
def test_streams_of_another_kind_are_left_alone(monkeypatch, other):
    for name in ("stdout", "__stdout__", "stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, other)
    printed, _ = hearing()
    printed.look()
    assert other is None or "write" not in getattr(other, "__dict__", {})


def test_a_file_in_the_place_of_stdout_is_left_alone(monkeypatch, tmp_path):
    with open(tmp_path / "log.txt", "w") as file:
        for name in ("stdout", "__stdout__", "stderr", "__stderr__"):
            monkeypatch.setattr(sys, name, file)
        printed, _ = hearing()
        printed.look()
        assert "write" not in vars(file)


def test_pieces_progress_bars_and_several_lines_make_lines(stream):
    printed, watch = hearing()
    printed.look()
    print("val acc:", 0.25, "of all", file=stream)
    watch.index = 2
    stream.write("a\ntest f1 = 0.5\nb")
    watch.index = 3
    for at in (1, 2):
        stream.write(f"\r {at}0%|█  | {at}/10 [00:0{at}<00:09, 1.2s/it, top1=0.{at}]")
    stream.write("\n")
    stream.writelines(["dice", " 0.125", "\n"])
    assert told(printed) == [(3, {"val acc": 0.25, "test f1": 0.5, "top1": 0.2, "dice": 0.125})]


def test_every_evaluation_counts_and_of_training_the_newest(stream):
    printed, watch = hearing()
    printed.look()
    for epoch in range(5):
        for step in range(10):
            watch.index += 1
            watch.span_start = 0.0
            print(f"epoch {epoch} step {step} loss {1 / watch.index:.4f} acc {watch.index}", file=stream)
        watch.span_start = 1.0
        print(f"epoch {epoch} val acc {epoch / 10}", file=stream)
    found = told(printed)
    assert [item for item in found if "val acc" in item[1]] == [(11 + 10 * e, {"val acc": e / 10}) for e in range(5)]
    assert [item for item in found if "acc" in item[1]] == [(51, {"acc": 51.0})]


def test_nothing_before_the_first_update_is_a_metric(stream):
    printed, watch = hearing(index=0)
    printed.look()
    print("accuracy 3", file=stream)
    watch.span_start = 1.0
    print("accuracy 0.1 before training", file=stream)
    assert told(printed) == [(0, {"accuracy": 0.1})]


def test_names_of_no_known_direction_count_when_they_come_again(stream):
    printed, watch = hearing()
    printed.look()
    for watch.index in (1, 2, 3):
        print("distance", watch.index, flush=True, file=stream)
        found = told(printed)
        assert found == ([] if watch.index == 1 else [(watch.index, {"distance": float(watch.index)})])


def test_what_upshift_says_is_not_heard(stream):
    printed, _ = hearing()
    printed.look()
    print("upshift: guard: accuracy 0.5", file=stream)
    assert told(printed) == []


def test_floods_are_thinned_and_counted(stream):
    printed, _ = hearing(evaluated=True)
    printed.look()
    for at in range(MANY_LINES):
        print(f"val acc {at}", file=stream)
    found = told(printed)
    assert len(found) == MOST_EACH and found[-1][1] == {"val acc": MANY_LINES - 1.0} and printed.left_out == 0
    for at in range(10_000):
        print(f"val acc {at}", file=stream)
    assert printed.left_out >= 10_000 * (1 - 1 / ONE_OF) - 1
    (last,) = told(printed)[-1][1].values()
    assert 10_000 - ONE_OF <= last < 10_000
    printed.look()
    for at in range(26 * 26):
        print(f"{chr(97 + at // 26)}{chr(97 + at % 26)} 1", file=stream)
    assert printed.left_out >= 10_000 * (1 - 1 / ONE_OF) - 1 + MANY_LINES - MOST_KINDS
    told(printed)
    printed.look()
    left = printed.left_out
    print("val acc 1" + " " * MOST_LINE, file=stream)
    print("x" * 1_000_000, file=stream)
    assert told(printed) == [] and printed.left_out > left
    # Half a line that never ends is not kept.
    for _ in range(10_000):
        stream.write("val acc 0.5 ")
    print(file=stream)
    assert told(printed) == []


def test_taking_apart_rests_when_it_has_cost_much(stream, monkeypatch):
    clock = iter(range(1000))
    printed, _ = hearing(evaluated=True)
    printed.look()
    monkeypatch.setattr(printed_module.time, "perf_counter", lambda: float(next(clock)))
    print("val acc 0.5", file=stream)
    assert len(told(printed, at=5.0, last=False)) == 1
    print("val acc 0.6", file=stream)
    assert told(printed, at=6.0, last=False) == [] and not printed.due(6.0)
    assert told(printed, at=7.0, last=True) == [(1, {"val acc": 0.6})]


@settings(max_examples=60)
@given(st.lists(st.text(max_size=40) | st.sampled_from(["\n", "\r", "val acc 0.5\n", "\x1b[2K"]), max_size=30))
def test_any_text_goes_through_unchanged(pieces):
    stream = io.TextIOWrapper(Raw(), encoding="utf-8", errors="surrogatepass", newline="")
    printed, _ = hearing()
    write = printed._hearing(stream.write)
    for piece in pieces:
        assert write(piece) == len(piece)
    stream.flush()
    assert stream.buffer.getvalue().decode("utf-8", "surrogatepass") == "".join(pieces)
    for _, values in told(printed):
        json.dumps(values)


def test_a_forked_child_is_not_heard(stream):
    printed, _ = hearing()
    printed.install()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"1" if "write" in vars(stream) else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"0" and "write" in vars(stream)
    os.close(read), os.close(write)
    printed.close()


SCRIPT = """
import contextlib, io, logging, os, subprocess, sys
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
logging.basicConfig(level=logging.INFO, format="%(message)s")
x = torch.randn(64, 4); y = x.sum(1, keepdim=True)
train = DataLoader(TensorDataset(x[:48], y[:48]), batch_size=8)
test = DataLoader(TensorDataset(x[48:], y[48:]), batch_size=8)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
print(type(sys.stdout), sys.stdout is sys.__stdout__, isinstance(sys.stdout, io.TextIOWrapper), sys.stdout.isatty(),
      sys.stdout.fileno(), sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout.write_through, "accuracy", 7)
for epoch in range(3):
    model.train()
    for a, b in train:
        optimizer.zero_grad(); loss = (model(a) - b).square().mean(); loss.backward(); optimizer.step()
        print("step loss", loss.item(), end="\\r")
    model.eval()
    with torch.no_grad():
        error = sum((model(a) - b).square().sum().item() for a, b in test) / 16
    print("epoch", epoch, "test mse:", error)
    logging.info("epoch %d val score=%.3f secret_key=%d", epoch, epoch / 2, 4242)
    with contextlib.redirect_stdout(io.StringIO()) as hidden:
        print("hidden accuracy 1.0")
os.write(1, b"raw accuracy 0.1\\n")
sys.stdout.buffer.write(b"buffer accuracy 0.2\\n")
sys.stdout.flush()
subprocess.run([sys.executable, "-c", "print('child accuracy 0.3')"])
sys.stdout.reconfigure(line_buffering=True)
saved = os.dup(1)
with open("redirected.txt", "w") as file:
    os.dup2(file.fileno(), 1)
    print("final bleu 12.5")
    sys.stdout.flush()
os.dup2(saved, 1)
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", errors="replace", line_buffering=True)
print("caf\\u00e9 accuracy", 0.25)
try:
    sys.stdout.write(1)
except TypeError as error:
    print(error)
"""


def test_a_run_prints_what_python_prints_and_its_metrics_are_in_the_record(write, tmp_path):
    write("train.py", SCRIPT)
    plain = python("train.py", cwd=tmp_path)
    before = (tmp_path / "redirected.txt").read_bytes()
    ended = upshift("run", "-q", "--runs", "runs", "train.py", cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (plain.code, plain.out, plain.err) and plain.code == 0
    assert (tmp_path / "redirected.txt").read_bytes() == before == b"final bleu 12.5\n"
    (folder,) = (tmp_path / "runs").iterdir()
    run = fold(folder)
    found = {}
    for event in run.events:
        if event.kind == "metrics":
            assert event.text == "printed"
            for name, value in event.values.items():
                found.setdefault(name, []).append((event.step, value))
    printed = [float(line.split()[-1]) for line in plain.out.splitlines() if "test mse" in line]
    assert found["test mse"] == [(6 * (at + 1), value) for at, value in enumerate(printed)]
    assert found["val score"] == [(6, 0.0), (12, 0.5), (18, 1.0)]
    assert found["final bleu"] == [(18, 12.5)]
    assert not {name for name in found if "key" in name or "loss" in name or "accuracy" in name}
    assert run.epochs.value == 3.0 and run.epochs.basis == "measured"
    (inference,) = [item.values["inference_seconds"] for item in run.events if "inference_seconds" in item.values]
    assert 0 < inference < 1.0
    assert b"4242" not in (folder / "log.jsonl").read_bytes()
