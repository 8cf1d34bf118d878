"""Third-party techniques that cheat, found by entry point and confirmed in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import UPSHIFT, execute, often

from upshift.hook.process import HookRunner
from upshift.search.confirm import Confirmation, confirm
from upshift.search.duel import ArmFailed, Duel
from upshift.sites import Numerics
from upshift.sites.runner import ChildSpec

#: Each step waits 3 ms for its forward pass. The loss is never printed.
SCRIPT = """
import time
import torch
from torch.utils.data import DataLoader, TensorDataset

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

    def forward(self, x):
        time.sleep(0.003)
        return self.body(x)

torch.manual_seed(0)
x = torch.randn(320, 16)
loader = DataLoader(TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long()), batch_size=16, shuffle=True)
net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for epoch in range(100_000):
    for rows, labels in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(rows), labels)
        loss.backward()
        optimizer.step()
"""

#: The cheats. Each claims what its `Card` says and does what its `at` does.
CHEATS = '''
import time
from upshift.sites import Card, LoaderArgs, ModelSeen, Numerics, OptimizerSeen, ProcessStart, Verdict
from upshift.sites.protocol import BaseApplied


class Cheat:
    numerics_claimed = Numerics.ROUNDING

    def __init_subclass__(cls, name="", sites=(), claims=Numerics.ROUNDING, switchable="process"):
        cls.card = Card(name=name, summary="", source="", sites=sites, numerics=claims, switchable=switchable,
                        targets=("forward",), precision="bfloat16")

    def numerics(self, settings, facts):
        return self.card.numerics

    def check(self, seen):
        return Verdict(True, "it says so", gain=2.0)


class Around(BaseApplied):
    """Calls `act(number of the call, call)` instead of the module, without its waiting."""

    def __init__(self, module, act):
        self.module, self.act, self.calls = module, act, 0

    def around(self, call, module, args, kwargs):
        self.calls += 1
        return self.act(self.calls, lambda: module.body(*args), call=lambda: call(*args, **kwargs))

    def switch(self, on): ...


class Rounds(Cheat, name="cheat-rounds", sites=("model_created",), claims=Numerics.BITWISE):
    def at(self, moment, settings):
        return Around(moment.module, lambda n, body, call: body() * (1 + 1e-6 * (n > 20)))


class Previous(Cheat, name="cheat-previous", sites=("model_created",), switchable="live"):
    def at(self, moment, settings):
        kept = {}

        def act(n, body, call):
            now = body()
            old = kept.get("out", now)
            kept["out"] = now.detach()
            return now + (old - now).detach()

        return Around(moment.module, act)


class Late(Cheat, name="cheat-late", sites=("model_created",)):
    def at(self, moment, settings):
        def act(n, body, call):
            if n > 30:
                raise ValueError("too late")
            return body()

        return Around(moment.module, act)


class Halves(Cheat, name="cheat-halves", sites=("loader_args",)):
    def at(self, moment, settings):
        moment.args["batch_size"] //= 2
        return BaseApplied()


class Skips(Cheat, name="cheat-skips", sites=("optimizer_created",)):
    def at(self, moment, settings):
        optimizer, step, made = moment.optimizer, moment.optimizer.step, [0]

        def skipping(*args, **kwargs):
            made[0] += 1
            if made[0] <= 12 or made[0] % 4:
                return step(*args, **kwargs)

        optimizer.step = skipping
        return BaseApplied()


class Clock(Cheat, name="cheat-clock", sites=("process_start",), claims=Numerics.BITWISE):
    def at(self, moment, settings):
        true, began = time.perf_counter, time.perf_counter()
        time.perf_counter = lambda: began + (true() - began) / 2
        return BaseApplied()


class Sleeps(Cheat, name="cheat-sleeps", sites=("model_created",), claims=Numerics.BITWISE, switchable="live"):
    """Does nothing, and makes the others wait while it is off."""

    def at(self, moment, settings):
        whole = type(moment.module).forward
        state = {"on": True}

        def forward(module, x):
            time.sleep(0.0 if state["on"] else 0.01)
            return whole(module, x)

        type(moment.module).forward = forward
        applied = BaseApplied()
        applied.switch = lambda on: state.update(on=on)
        return applied


class Hides(Cheat, name="cheat-hides", sites=("model_created",)):
    """Trains well, fast, and shows no loss: backward starts from a vector."""

    def at(self, moment, settings):
        import torch

        torch.Tensor.backward = lambda loss: torch.autograd.backward([loss.expand(2)], [torch.ones(2) / 2])
        return Around(moment.module, lambda n, body, call: body())
'''

NAMES = {
    "rounds": "Rounds", "previous": "Previous", "late": "Late", "halves": "Halves", "skips": "Skips", "clock": "Clock",
    "sleeps": "Sleeps", "hides": "Hides",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the script, and the cheats installed as a package with entry points."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "packages" / "upshift_cheats-1.dist-info").mkdir(parents=True)
    (tmp_path / "packages" / "upshift_cheats.py").write_text(CHEATS)
    info = tmp_path / "packages" / "upshift_cheats-1.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: upshift-cheats\nVersion: 1\n")
    points = "".join(f"cheat-{name} = upshift_cheats:{kind}\n" for name, kind in NAMES.items())
    (info / "entry_points.txt").write_text(f"[upshift.techniques]\n{points}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def confirmed(name: str, numerics: Numerics, seconds: float = 2.0) -> Confirmation:
    """The confirmation of a plan with this cheat alone."""
    duels = 0

    def make() -> Duel:
        nonlocal duels
        duels += 1
        return Duel(HookRunner(), ChildSpec(mode="arm", target="train.py", seed=0), timeout=60.0, seed=duels)

    return confirm(
        make, {name: {}}, seconds, numerics=numerics, precision="bfloat16", live={}, has_dropout=False,
        steps_per_epoch=20.0, fills=False, targets=frozenset({"forward"}), say=lambda text: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "numerics", "reason"),
    [
        ("cheat-rounds", Numerics.BITWISE, "not identical"),
        ("cheat-previous", Numerics.ROUNDING, "updates of step"),
        pytest.param("cheat-halves", Numerics.ROUNDING, "updates of step", marks=pytest.mark.extra),
        pytest.param("cheat-skips", Numerics.ROUNDING, "not the same work", marks=pytest.mark.extra),
        pytest.param("cheat-hides", Numerics.ROUNDING, "0 losses at backward calls", marks=pytest.mark.extra),
    ],
)
def test_a_technique_that_cheats_is_told_why_not(place: Path, name: str, numerics: Numerics, reason: str) -> None:
    found = confirmed(name, numerics)
    assert not found.proof.passed and reason in found.proof.reason, found.proof.reason


@pytest.mark.parametrize("name", often(["cheat-clock", "cheat-sleeps"], "cheat-clock"))
def test_a_technique_that_only_looks_faster_is_not_faster(place: Path, name: str) -> None:
    found = confirmed(name, Numerics.BITWISE, seconds=3.0)
    assert found.decision != "faster", found.pairing


def test_a_technique_that_raises_late_has_failed(place: Path) -> None:
    with pytest.raises(ArmFailed, match="too late") as failed:
        confirmed("cheat-late", Numerics.ROUNDING)
    assert failed.value.techniques == ("cheat-late",)


@pytest.mark.extra
def test_the_command_line_keeps_the_baseline(place: Path) -> None:
    ended = execute([UPSHIFT, "tune", "--budget", "120s", "--only", "cheat-previous", "train.py"], place, timeout=280)
    said = "".join(ended.said) + ended.err
    assert ended.code == 0, said
    assert "keep your baseline" in said.lower(), said
    assert 'name = "cheat-previous"' not in (place / "train.upshift.toml").read_text().partition("rejected")[0]
