"""Hooked children: what they report, that nothing goes on after enough was seen, and that none of them stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from upshift import api
from upshift.errors import EnvironmentError_, NotIsolatedError, UsageError
from upshift.hook.diagnosing import refusal
from upshift.hook.process import HookRunner
from upshift.sites.runner import ChildGone, ChildSpec


def wait_for(child, *kinds, seconds=90.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = child.receive(1.0)
        if message is not None and message["kind"] in kinds:
            return message
    raise AssertionError(f"no {kinds} within {seconds} s: {child.output()}")


@pytest.fixture
def start(tmp_path):
    children = []

    def started(source, mode="diagnose", **options):
        script = tmp_path / "train.py"
        script.write_text(source)
        spec = ChildSpec(mode=mode, target=str(script), options=options, seed=0)
        children.append(HookRunner(scratch=tmp_path).start(spec))
        return children[-1]

    yield started
    for child in children:
        child.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


IN_A_THREAD = """
import threading, time, torch
p = torch.nn.Parameter(torch.ones(2))
o = torch.optim.SGD([p], lr=0.1)
def train():
    while True:
        try:
            p.square().sum().backward()
            o.step()
            print("step", flush=True)
        except BaseException:
            pass
threading.Thread(target=train).start()
while True:
    print("main", flush=True)
    time.sleep(0.001)
"""


@pytest.mark.extra
def test_nothing_of_the_script_goes_on_after_enough_was_seen(start):
    child = start(IN_A_THREAD, most_steps=20)
    message = wait_for(child, "diagnosis")
    assert message["how"] == "enough seen" and message["steps"] == 20
    process = psutil.Process(child._process.pid)
    deadline = time.monotonic() + 5
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.status() == psutil.STATUS_STOPPED
    before = os.path.getsize(child._scratch / "output.txt")
    time.sleep(0.3)
    assert os.path.getsize(child._scratch / "output.txt") == before
    assert child.output().count("step") <= 20
    # Somebody continues it: that is its end.
    child.resume()
    assert wait_for(child, "gone", seconds=10)["code"] == 0


def test_trial_ends_without_unwinding(start):
    source = """
import torch
p = torch.nn.Parameter(torch.ones(2))
o = torch.optim.SGD([p], lr=0.1)
try:
    while True:
        p.square().sum().backward()
        o.step()
finally:
    print("unwound", flush=True)
"""
    child = start(source, mode="arm")
    ready = wait_for(child, "ready")["step"]
    assert ready["first"] == 0 and len(ready["losses"]) == 1
    child.send({"kind": "go", "steps": 3})
    steps = wait_for(child, "steps")
    assert len(steps["seconds"]) == 3 and steps["losses"][0] != steps["losses"][2]
    child.send({"kind": "finish"})
    assert wait_for(child, "finished")["steps"] == 4
    assert "unwound" not in child.output()


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("/proc/self/comm", "w").write("hiding")
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


def test_daemon_dies_with_its_trial(start):
    child = start(DAEMON)
    mark = f"UPSHIFT_TRIAL={child._scratch}".encode()

    def marked():
        found = []
        for pid in psutil.pids():
            try:
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
            except OSError:
                continue
        return found

    # A process on its way to becoming a daemon lives for a moment only: two looks must agree.
    deadline, before, now = time.monotonic() + 60, [], marked()
    while (len(now) < 2 or now != before) and time.monotonic() < deadline:
        time.sleep(0.2)
        before, now = now, marked()
    assert len(now) >= 2
    child.kill()
    deadline = time.monotonic() + 5
    while marked() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked() == []
    child.kill()  # twice is allowed


def test_child_that_is_gone(start):
    child = start("import os; os._exit(5)")
    assert wait_for(child, "gone")["code"] == 5
    # Not reaped before the group is killed: nobody else can have been given its number.
    assert psutil.Process(child._process.pid).status() == psutil.STATUS_ZOMBIE
    with pytest.raises(ChildGone):
        for _ in range(100):
            child.send({"kind": "go", "steps": 1, "filler": "x" * 10_000})


def test_descendant_that_keeps_the_channel_open_does_not_hide_the_end(start):
    began = time.monotonic()
    child = start("import os, time\nif os.fork(): os._exit(6)\ntime.sleep(600)")
    assert wait_for(child, "gone")["code"] == 6
    assert time.monotonic() - began < 60


def test_child_does_not_outlive_its_parent(tmp_path):
    import subprocess
    import sys

    (tmp_path / "train.py").write_text("import time\ntime.sleep(600)")
    code = (
        "import os, time\nfrom upshift.hook.process import HookRunner\nfrom upshift.sites.runner import ChildSpec\n"
        f"c = HookRunner().start(ChildSpec(mode='diagnose', target={str(tmp_path / 'train.py')!r}))\n"
        "print(c._process.pid, flush=True)\nprint(c.receive(60)['kind'], flush=True)\ntime.sleep(0.5)\nos._exit(0)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=90)
    pid = int(done.stdout.split()[0])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_failed_start_leaves_no_folder(tmp_path):
    spec = ChildSpec(mode="diagnose", target="train.py")
    with pytest.raises(EnvironmentError_, match="cannot be started"):
        HookRunner(python=str(tmp_path / "no-python"), scratch=tmp_path).start(spec)
    with pytest.raises(EnvironmentError_):
        HookRunner(scratch=tmp_path / "nowhere").start(spec)
    assert list(tmp_path.iterdir()) == []


def test_refusals_keep_their_kind():
    assert isinstance(refusal({"text": "a", "remedy": "b", "code": 2}), UsageError)
    found = refusal({"text": "a", "remedy": "b", "code": 7})
    assert isinstance(found, NotIsolatedError) and found.remedy == "b"
    assert refusal({"text": "a"}).exit_code == 1


PLANTED = """
import time, torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, i):
        time.sleep(0.010)  # planted: data
        return torch.ones(3)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
    def forward(self, x):
        time.sleep(0.006)
        return self.linear(x)

class Optimizer(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(0.004)
        super().step(closure)

torch.manual_seed(0)
net = Net()
optimizer = Optimizer(net.parameters(), lr=0.01)
for step, x in enumerate(DataLoader(Slow(), batch_size=2)):
    loss = net(x).square().mean()
    time.sleep(0.005)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.008)
    if step % 20 == 19:
        net.eval()
        with torch.no_grad():
            for _ in range(10):
                net(x)
        net.train()
"""


def test_planted_bottlenecks_are_found_where_they_are(tmp_path):
    (tmp_path / "train.py").write_text(PLANTED)
    options = api.DiagnoseOptions(seconds=6.0, probe=False)
    found = api.diagnose(api.Target(str(tmp_path / "train.py"), ("--epochs", "3")), options)
    seen = found.measurement
    seconds = {item.name: item.seconds.value for item in seen.anatomy.phases if item.seconds.known}
    planted = {"data": 0.020, "forward": 0.006, "loss": 0.005, "optimizer": 0.004, "other": 0.008}
    for name, least in planted.items():
        assert seconds[name] >= least, name
    # A sleep is never shorter; on a busy machine everything is longer, so the rest is compared by order.
    assert max(seconds, key=seconds.get) == "data"
    assert seconds["forward"] > seconds["optimizer"] and seconds["other"] > seconds["optimizer"]
    assert sum(seconds.values()) == pytest.approx(seen.anatomy.step.value, rel=1e-6)
    assert seen.anatomy.evaluation.value >= 0.06
    assert seen.facts.losses and seen.facts.seeded and seen.facts.loss_seen
    (loader,) = seen.facts.loaders
    assert loader.training and loader.wait.value >= 0.020 and loader.batch_size == 2
    lines = [line for line in seen.lines if "planted: data" in line.text]
    assert lines and lines[0].share.value == max(line.share.value for line in seen.lines)
    assert found.findings[0].rule in ("data_starved", "slow_dataset_line")
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]
