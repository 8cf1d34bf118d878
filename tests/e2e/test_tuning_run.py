"""`upshift run --tune`: planted techniques are tried inside a real run; what wins, and harms nothing, stays on."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import python, upshift

from upshift.records.runfold import fold

# Nothing of upshift's own applies: double precision, a step of its own, one core, denormals flushed. It trains until
# the record says something: how many steps a decision takes depends on the machine.
SCRIPT = """
import glob, hashlib, os, time, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_flush_denormal(True)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


class Model(torch.nn.Sequential):
    nap = float(os.environ["NAP"])
    calls = 0

    def forward(self, x):
        self.calls += 1
        time.sleep(self.nap)
        return super().forward(x)


class Plain(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("m", torch.zeros_like(p))
                buffer.mul_(0.9).add_(p.grad)
                p.add_(buffer, alpha=-group["lr"])


x = torch.randn(512, 8)
y = (x @ torch.randn(8, 4)).argmax(1)
model = Model(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.1),
              torch.nn.Linear(32, 4))
optimizer = Plain(model.parameters())
for step in range(int(os.environ["STEPS"])):
    logs = glob.glob(".upshift/runs/*/log.jsonl") if step % 20 == 0 else []
    if any(os.environ["UNTIL"] in open(log).read() for log in logs):
        break
    i = torch.randint(0, 512, (128,))
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x[i]), y[i])
    loss.backward()
    optimizer.step()
found = hashlib.sha256()
for value in (*model.state_dict().values(), torch.rand(1)):
    found.update(value.numpy().tobytes())
print(found.hexdigest(), model.calls)
"""

TECHNIQUES = """
import time
from upshift.sites import Card, ModelSeen, Numerics, OptimizerSeen, Verdict
from upshift.sites.protocol import BaseApplied


class NoNap(BaseApplied):
    def __init__(self, model):
        self.note = "no nap"
        self.model = model
        self.switch(True)

    def switch(self, on):
        self.model.nap = 0.0 if on else type(self.model).nap

    def close(self):
        self.switch(False)


class BeforeStep(BaseApplied):
    def __init__(self, act):
        self.act, self.on = act, True

    def switch(self, on):
        self.on = on

    def before_step(self, optimizer):
        if self.on:
            self.act([p.grad for group in optimizer.param_groups for p in group["params"]])

    def close(self):
        pass


class Planted:
    gain, act, naps = 1.0, staticmethod(lambda gradients: None), False

    def __init__(self):
        self.card = Card(name=type(self).__name__.lower(), summary="", source="", numerics=self.kind,
                         sites=("model_created", "optimizer_created"), switchable="live", targets=("forward",))

    def numerics(self, settings, facts):
        return self.kind

    def check(self, seen):
        return Verdict(True, "planted", gain=self.gain)

    def at(self, moment, settings):
        if isinstance(moment, ModelSeen) and self.naps:
            return NoNap(moment.module)
        return BeforeStep(self.act) if isinstance(moment, OptimizerSeen) else None


class Quick(Planted):
    kind, gain, naps = Numerics.BITWISE, 5.0, True


class Slow(Planted):
    kind, gain, act = Numerics.BITWISE, 4.0, staticmethod(lambda gradients: time.sleep(0.008))


class Idle(Planted):
    kind = Numerics.BITWISE


class Halved(Planted):
    kind, gain, naps = Numerics.ROUNDING, 4.0, True
    act = staticmethod(lambda gradients: [item.mul_(0.5) for item in gradients])


class Dropped(Planted):
    kind, gain, naps = Numerics.ROUNDING, 3.0, True
    act = staticmethod(lambda gradients: gradients[-1].zero_())


class Turned(Planted):
    kind, gain, naps = Numerics.ROUNDING, 2.0, True
    act = staticmethod(lambda gradients: gradients[-1].neg_())
"""


def plant(write, *names: str) -> None:
    points = "".join(f"{name} = planted:{name.title()}\n" for name in names)
    write("train.py", SCRIPT)
    write("site/planted.py", TECHNIQUES)
    write("site/planted-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    write("site/planted-1.dist-info/entry_points.txt", f"[upshift.techniques]\n{points}")


def said_about(tmp_path: Path, ended) -> dict[str, str]:
    """Technique -> what was said of it; the record must have the same lines."""
    lines = [line.removeprefix("upshift: tuning: ").strip() for line in ended.said if "tuning:" in line]
    (folder,) = (tmp_path / ".upshift" / "runs").iterdir()
    assert [event.text for event in fold(folder).events if event.kind == "tuning"] == lines
    found = {}
    for line in lines:
        head, _, reason = line.partition(": ")
        verdict, _, name = head.rpartition(" ")
        if verdict in ("kept", "not kept"):
            found[name] = f"{verdict}: {reason}"
    return found


def test_what_is_faster_stays_on_and_the_parameters_are_those_of_plain_python(tmp_path, write):
    plant(write, "quick", "slow", "idle")
    env = {"PYTHONPATH": str(tmp_path / "site"), "STEPS": "9000", "NAP": "0.008", "UNTIL": "kept slow"}
    ended = upshift("run", "--tune", "60s", "train.py", cwd=tmp_path, **env)
    assert ended.code == 0, ended.err
    said = said_about(tmp_path, ended)
    steps = ended.out.split()[1]
    assert said["quick"].startswith("kept: ") and "3 batches replayed" in said["quick"]
    assert said["slow"].startswith("not kept: ") and "slower" in said["slow"]
    assert "not kept" in said.get("idle", "not kept")
    assert any("quick stays on, guarded" in line and "not paired" in line for line in ended.said)
    (folder,) = (tmp_path / ".upshift" / "runs").iterdir()
    run = fold(folder)
    assert run.techniques == {"quick": {}} and run.steps == int(steps) and not run.guard_fired
    assert len(run.windows) < 100
    assert ended.out == python("train.py", cwd=tmp_path, **{**env, "NAP": "0", "STEPS": steps, "UNTIL": "never"}).out
    assert not list(tmp_path.glob("*.toml"))


@pytest.mark.extra
def test_what_is_faster_and_harms_does_not_stay(tmp_path, write):
    names = ("halved", "dropped", "turned")
    plant(write, *names)
    env = {"PYTHONPATH": str(tmp_path / "site"), "STEPS": "9000", "NAP": "0.008", "UNTIL": "done within"}
    ended = upshift("run", "--tune", "60s", "train.py", cwd=tmp_path, **env)
    assert ended.code == 0, ended.err
    said = said_about(tmp_path, ended)
    assert all(said[name].startswith("not kept: ") and ", but " in said[name] for name in names), said
    assert "times as long" in said["halved"]
    assert "4.bias has no gradient" in said["dropped"]
    assert "gradient before the step of 4.bias" in said["turned"] and "cosine -1.000" in said["turned"]
    assert any("nothing stays on" in line for line in ended.said)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--require", "trajectory", "train.py"], "no untouched twin"),
        (["train.py"], "there is a plan"),
        (["--", "sh", "train.sh"], "starts other programs"),
    ],
)
def test_what_does_not_go_with_tune_is_refused(tmp_path, train, options, reason):
    if options == ["train.py"]:
        (tmp_path / "train.upshift.toml").write_text("")
    ended = upshift("run", "--tune", "1m", *options, cwd=tmp_path)
    assert ended.code == 2 and reason in " ".join(line.strip() for line in (*ended.said, ended.err))
    assert not ended.out
