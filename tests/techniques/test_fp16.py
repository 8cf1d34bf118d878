"""fp16: bit for bit torch's own autocast and GradScaler; overflows, resumed runs, ranks, and where it stays away."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import often
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from upshift import Job
from upshift.checkpoint.compare import differences
from upshift.checkpoint.store import Store
from upshift.engine import loop
from upshift.engine.averages import Ema
from upshift.engine.group import Group
from upshift.engine.parts import Parts
from upshift.engine.preempt import StopRequest
from upshift.engine.recording import Recorder
from upshift.engine.run import train_job
from upshift.engine.saving import Saving
from upshift.engine.settings import Execution
from upshift.engine.training import Training
from upshift.records.measurement import ModelFacts
from upshift.sites import BackwardSeen, ModelSeen, NoEffect, Stage
from upshift.techniques.fp16 import LEAST_SCALE, Fp16
from upshift.testing.contract import Session, measurement

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import ranked

TECHNIQUE = Fp16()
STEPS, BATCH, ROWS = 20, 24, 240
_generator = torch.Generator().manual_seed(5)
X, Y = torch.randn(ROWS, 6, generator=_generator), torch.randint(3, (ROWS,), generator=_generator)
#: Finite in float16, and so is the loss; the gradient of the weights it meets is not, once the loss is scaled.
LARGE = 20_000.0

#: torch on a schedule that goes on while the first updates are left out.
STEPPED_FIRST = "ignore:Detected call of `lr_scheduler"


class Net(nn.Module):
    """Remembers in which dtype its products were made."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 3)
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, 6) to (n, 3)."""
        found = self.head(self.body(x))
        self.dtypes.add(found.dtype)
        return found


def data(poisoned: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples; the batches named have one sample whose gradients overflow."""
    x = X.clone()
    for batch in poisoned:
        x[batch * BATCH % ROWS] = LARGE * torch.eye(6)[0]
    return x, Y


def small() -> Net:
    """A network whose first layer begins small: before the first steps, large inputs do not saturate it."""
    torch.manual_seed(11)
    net = Net()
    with torch.no_grad():
        net.body[0].weight.mul_(1e-5)
    return net


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def decay(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)


def job(**changes) -> Job:
    found = Job(model=small, train_data=data(), loss=F.cross_entropy, optimizer=adamw, global_batch=BATCH, steps=STEPS,
                shuffle=False, seed=2)  # fmt: skip
    return found.set(**changes)


def plan(**settings):
    return {"fp16": {"scale": 65536.0, "interval": 2000, **settings}}


class Noted:
    """AdamW that notes the rate of every step it makes."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def __call__(self, parameters):
        optimizer = adamw(parameters)
        optimizer.register_step_post_hook(lambda *_: self.steps.append(optimizer.param_groups[0]["lr"]))
        return optimizer


def by_hand(poisoned=(), *, scale=65536.0, interval=2000, micro=BATCH, clip=None, scheduler=None):
    """Plain torch, as its documentation has it: weights, the scaler's state, rates of the steps that were made."""
    x, y = data(poisoned)
    model, made = small(), Noted()
    optimizer = made(model.parameters())
    rates = scheduler(optimizer) if scheduler else None
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % ROWS
        optimizer.zero_grad()
        for part in rows.split(micro):
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                output = model(x[part])
            loss = F.cross_entropy(output.float(), y[part]) * (len(part) / BATCH)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if rates is not None:
            rates.step()
    return model, scaler.state_dict(), made.steps


def trained(a_job, out=None, **more):
    """The result, and what was said."""
    said: list[str] = []
    return train_job(a_job, Execution(out=out, device="cpu", say=said.append, **more)), said


def in_parts(a_job, group, **more):
    """A job trained in this process; its parts are still open."""
    parts = Parts(a_job, Execution(device="cpu", **more), group, lambda *_: None)
    t = Training(parts, Recorder(None, 0.0), Saving(parts, None), StopRequest(30.0, lambda _: None))
    t.saving.begin(t)
    t.begins()
    loop.train(t)
    return parts


def state(out):
    store = Store(out)
    return store.load(store.newest(), rank=0)[0]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


# -- against plain torch -----------------------------------------------------------------------------------------------


def as_plain_torch_does(poisoned, exponent, interval, micro, clip):
    """Train both ways, and compare every bit."""
    how = {"scale": 2.0**exponent, "interval": interval}
    expected, scaler, rates = by_hand(tuple(poisoned), micro=micro, clip=clip, scheduler=decay, **how)
    made = Noted()
    a_job = job(train_data=data(tuple(poisoned)), optimizer=made, clip=clip, schedule=decay)
    parts = in_parts(a_job, Group(torch.device("cpu")), plan=plan(**how), micro_batch=micro)
    assert same(parts.model, expected)
    assert parts.stage.states() == {"fp16": [scaler]}
    # A skipped update has no step; the schedule goes on all the same.
    assert made.steps == rates
    assert parts.model.dtypes == {torch.float16}
    parts.close()


@pytest.mark.filterwarnings(STEPPED_FIRST)
@pytest.mark.parametrize(
    ("poisoned", "exponent", "interval", "micro", "clip"),
    [({0, 4}, 16, 2, 8, 0.05), (set(), 24, 2000, BATCH, 1.0), (set(), 40, 2000, 12, None)],
)
def test_a_job_is_trained_bit_for_bit_as_plain_torch_does(poisoned, exponent, interval, micro, clip):
    as_plain_torch_does(poisoned, exponent, interval, micro, clip)


@pytest.mark.extra
@pytest.mark.filterwarnings(STEPPED_FIRST)
@given(
    poisoned=st.sets(st.integers(0, 9), max_size=3),
    exponent=st.integers(4, 30),
    interval=st.integers(1, 6),
    micro=st.sampled_from([6, 8, 12, BATCH]),
    clip=st.sampled_from([None, 0.05, 1.0]),
)
def test_whatever_the_scale_and_the_batches(poisoned, exponent, interval, micro, clip):
    as_plain_torch_does(poisoned, exponent, interval, micro, clip)


def test_the_examples_do_overflow_and_recover():
    """What the tests above rest on: the poisoned batches overflow, and nothing else does at that scale."""
    assert len(by_hand()[2]) == STEPS
    model, scaler, made = by_hand((0,))
    assert len(made) == STEPS - 1 and scaler["scale"] == 32768.0
    assert all(item.isfinite().all() for item in model.state_dict().values())
    # A scale that grows overflows again and again, in the middle of the training.
    assert STEPS // 2 <= len(by_hand(interval=2)[2]) <= STEPS - 2
    assert not by_hand(scale=2.0**40)[2]


def test_what_clips_and_steps_sees_gradients_of_the_loss_itself():
    seen = []

    def watched(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append(max(float(p.grad.abs().max()) for g in optimizer.param_groups for p in g["params"]))
        )
        return optimizer

    found, _ = trained(job(optimizer=watched, steps=3), plan=plan())
    half, seen[:] = list(seen), []
    trained(job(optimizer=watched, steps=3))
    assert half == pytest.approx(seen, rel=0.02) and half != seen
    assert found.steps == 3


def test_close_to_float32_where_float16_alone_vanishes():
    """Gradients of 1e-9: without a scale nothing is left of them in float16."""

    def tiny(output, target):
        return F.cross_entropy(output, target) * 1e-6

    def normalised(parameters):
        return torch.optim.Adam(parameters, lr=0.01, eps=1e-30)

    a_job = job(loss=tiny, optimizer=normalised)
    exact = trained(a_job)[0].model.state_dict()
    scaled = trained(a_job, plan=plan(scale=2.0**30))[0].model.state_dict()
    unscaled = trained(a_job, plan=plan(scale=1.0))[0].model.state_dict()
    start = small().state_dict()

    def off(found):
        return max(float((found[name] - exact[name]).norm() / (exact[name] - start[name]).norm()) for name in exact)

    assert off(scaled) < 0.1 < 0.5 < off(unscaled)


# -- stopped and resumed -----------------------------------------------------------------------------------------------


class Stop(Exception):
    """Pulls the plug."""


full = job(
    model=partial(Net, 0.2), train_data=data((1, 7)), shuffle=True, average=Ema(0.9), clip=0.5, schedule=decay
)  # fmt: skip


def stopped(at, out, **more):
    def on_batch(step, epoch, rows):
        if step == at:
            raise Stop

    with pytest.raises(Stop):
        trained(full, out, on_batch=on_batch, save_steps=1, **more)


@pytest.mark.filterwarnings(STEPPED_FIRST)
@pytest.mark.parametrize("at", often(range(STEPS), 0, 7, 15))
def test_a_stopped_run_goes_on_bitwise_from_any_step(at, tmp_path):
    how = {"plan": plan(scale=2.0**24, interval=3), "micro_batch": 8}
    whole, _ = trained(full, tmp_path / "whole", **how)
    stopped(at, tmp_path / "run", **how)
    again, _ = trained(full, tmp_path / "run", **how)
    assert same(again.model, whole.model)
    theirs, ours = state(tmp_path / "whole"), state(tmp_path / "run")
    assert theirs["techniques"]["fp16"][0]["scale"] < 2.0**24
    for part in ("techniques", "optimizer", "average", "schedule", "model"):
        assert differences(theirs[part], ours[part]) == [], part


def test_a_resumed_run_keeps_how_the_scale_grows_as_it_is_set_now(tmp_path):
    trained(full.set(steps=6), tmp_path / "run", plan=plan(interval=1000))
    trained(full, tmp_path / "run", plan=plan(interval=4))
    assert state(tmp_path / "run")["techniques"]["fp16"][0]["growth_interval"] == 4


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class NeverFinite(torch.autograd.Function):
    """The identity, with a gradient that no scale makes finite where it is in float16."""

    @staticmethod
    def forward(ctx, x):
        ctx.half = x.dtype is torch.float16
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan if ctx.half else gradient


class Broken(Net):
    def forward(self, x):
        return NeverFinite.apply(super().forward(x))


def test_gradients_that_no_scale_makes_finite_take_it_off():
    def build():
        torch.manual_seed(1)
        return Broken()

    a_job = job(model=build, steps=30)
    result, said = trained(a_job, plan=plan(scale=LEAST_SCALE * 8))
    assert any("not finite, however little the loss is scaled" in text for text in said)
    assert same(result.model, trained(a_job)[0].model)


def test_a_loss_that_is_not_finite_is_no_overflow():
    """In float16 the output overflows, in float32 it does not: the technique comes off, as others do."""

    def build():
        net = small()
        with torch.no_grad():
            net.body[0].bias.fill_(10.0)
            net.head.weight.fill_(3e4)
        return net

    a_job = job(model=build)
    result, said = trained(a_job, plan=plan())
    assert any("not finite; fp16 came off" in text for text in said), said
    assert same(result.model, trained(a_job)[0].model)


def test_an_operation_without_float16_leaves_the_job_in_float32():
    class Scatter(Net):
        def forward(self, x):
            y = torch.zeros(len(x), 3)
            y[torch.arange(len(x))] = super().forward(x)
            return y

    def build():
        torch.manual_seed(4)
        return Scatter()

    a_job = job(model=build)
    result, said = trained(a_job, plan=plan())
    assert any("no effect fp16: the model does not run in float16" in text for text in said)
    assert same(result.model, trained(a_job)[0].model)  # a scale of 2^16 changes no bit in float32


def test_an_overflow_elsewhere_is_one_here():
    told: list[list[float]] = []
    elsewhere = [0.0]

    def agree(values):
        told.append(values)
        return [values[0] + elsewhere[0], values[1] + 1.0]

    model = small()
    optimizer = adamw(model.parameters())
    applied = TECHNIQUE.at(BackwardSeen(module=model, optimizer=optimizer, agree=agree), plan()["fp16"])
    for elsewhere[0], usable, scale in ((0.0, True, 65536.0), (1.0, False, 32768.0), (0.0, True, 32768.0)):
        optimizer.zero_grad()
        applied.scaled(F.cross_entropy(applied.around(model, model, (X[:8],), {}), Y[:8])).backward()
        assert applied.unscaled(optimizer) is usable and applied.scale == scale
    assert told == [[0.0, 1.0]] * 3 and applied.skipped == 1
    # A rank that has no gradient at all scales alike.
    optimizer.zero_grad()
    applied.scaled(torch.zeros((), requires_grad=True) * 1.0).backward()
    elsewhere[0] = 1.0
    assert not applied.unscaled(optimizer) and applied.scale == 16384.0


def test_no_gradient_anywhere_teaches_nothing_about_the_scale():
    model = small()
    optimizer = adamw(model.parameters())
    applied = TECHNIQUE.at(BackwardSeen(module=model, optimizer=optimizer), plan(interval=1)["fp16"])
    for _ in range(2):
        applied.scaled(torch.zeros((), requires_grad=True) * 1.0).backward()
        assert applied.unscaled(optimizer) and applied.scale == 65536.0


def test_closed_within_an_update_it_ends_that_update_at_its_scale():
    stage = Stage([(TECHNIQUE, plan()["fp16"])], lambda *_: None)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stage.raise_site(BackwardSeen(module=model, optimizer=optimizer))
    applied = stage.backward()
    loss = model(X[:8]).square().mean()
    applied.scaled(loss).backward(retain_graph=True)
    stage.close()
    assert applied.scaled(loss) is not loss
    applied.scaled(loss).backward(retain_graph=True)
    assert applied.unscaled(optimizer)
    found = [item.grad.clone() for item in model.parameters()]
    optimizer.zero_grad()
    (loss * 2).backward(retain_graph=True)
    assert all(torch.equal(a, b.grad) for a, b in zip(found, model.parameters(), strict=True))
    assert applied.scaled(loss) is loss and applied.unscaled(optimizer)
    assert stage.backward() is None


# -- several ranks -----------------------------------------------------------------------------------------------------


def _train(kinds: list[str]) -> object:
    with Group.here(device="cpu") as group:
        return [_trained(group, kind) for kind in kinds]


def _trained(group: Group, kind: str) -> dict:
    """The steps that were made, the scaler's last state, and the weights."""
    made = Noted()
    parts = in_parts(lopsided(made), group, parallel=kind, plan=plan())
    scaler = parts.stage.states()["fp16"][0]
    skipped = parts.stage.backward().skipped
    weights = {name: whole(item).tolist() for name, item in parts.model.named_parameters()}
    parts.close()
    return {"steps": len(made.steps), "scale": scaler["scale"], "skipped": skipped, "weights": weights}


def whole(item):
    """A parameter, put together from the shards of all ranks."""
    return item.full_tensor() if hasattr(item, "full_tensor") else item


def lopsided(optimizer) -> Job:
    """A job that overflows on the second of two ranks only: by the last sample of the first batch."""
    x, y = data()
    x[BATCH - 1] = LARGE * torch.eye(6)[0]
    return job(train_data=(x, y), steps=4, clip=0.5, optimizer=optimizer)


def test_all_ranks_leave_out_what_overflows_on_one(tmp_path):
    kinds = ["ddp", "fsdp2"]
    first, second = ranked.run(2, _train, kinds, folder=tmp_path)
    for a, b in zip(first, second, strict=True):
        for found in (a, b):
            assert (found["steps"], found["skipped"], found["scale"]) == (3, 1, 32768.0)
    # One process and the same data: its gradients are rounded over whole batches.
    alone = in_parts(lopsided(adamw), Group(torch.device("cpu")), plan=plan())
    assert alone.stage.backward().skipped == 1
    for found in (*first, *second):
        for name, value in alone.model.state_dict().items():
            assert float((torch.tensor(found["weights"][name]) - value).abs().max()) < 2e-3
    alone.close()


# -- where it acts -----------------------------------------------------------------------------------------------------


def test_a_script_is_left_alone_and_told_why():
    said: list[tuple] = []
    stage = Stage([(TECHNIQUE, plan()["fp16"])], lambda *text: said.append(text))
    stage.raise_site(ModelSeen(module=small(), args=(X[:2],)))
    assert "declared jobs only" in stage.effects()["fp16"]
    assert stage.backward() is None and not stage.acted and not said


def _unhooked():
    return small()


def _hooked_module():
    model = small()
    model.head.register_full_backward_hook(lambda *_: None)
    return model


def _hooked_parameter():
    model = small()
    model.head.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return model


def _hooked_later():
    model = small()
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def _frozen():
    return small().requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "optimizer", "words"),
    [
        (_hooked_module, adamw, "a hook on head would see scaled gradients"),
        (_hooked_parameter, adamw, "a hook on head.weight would see"),
        (_hooked_later, adamw, "a hook on head.weight would see"),
        (lambda: small().half(), adamw, "half-precision parameters"),
        (lambda: small().bfloat16(), adamw, "half-precision parameters"),
        (lambda: small().double(), adamw, "float64"),
        (_frozen, lambda _: adamw([nn.Parameter(torch.ones(1))]), "not trained"),
        (lambda: small().to("meta"), adamw, "device type meta"),
        (_unhooked, torch.optim.LBFGS, "in a closure"),
        (_unhooked, lambda parameters: adamw(list(parameters)[:2]), "leaves out some trained parameters"),
    ],
)
def test_what_cannot_be_scaled_is_refused_with_the_reason(build, optimizer, words):
    model = build()
    outcome = TECHNIQUE.at(BackwardSeen(module=model, optimizer=optimizer(model.parameters())), plan()["fp16"])
    assert isinstance(outcome, NoEffect) and words in outcome.reason


def test_parameters_that_are_not_trained_may_be_left_out():
    model = small()
    model.body.requires_grad_(False)
    optimizer = adamw(model.head.parameters())
    assert not isinstance(TECHNIQUE.at(BackwardSeen(module=model, optimizer=optimizer), plan()["fp16"]), NoEffect)


CUDA = {"device": "cuda:0", "models": (ModelFacts(name="Net", parameters=9, dtypes=("float32",), device="cuda:0"),)}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "runs on cpu"),
        ({"models": ()}, "no trained model"),
        ({**CUDA, "bf16_native": True}, "native bf16"),
        ({**CUDA, "bf16_native": False, "grad_scaler": True}, "manages its own precision"),
        ({**CUDA, "bf16_native": False, "autocast": True}, "manages its own precision"),
        ({**CUDA, "bf16_native": False, "create_graph": True}, "create_graph"),
        ({**CUDA, "bf16_native": False}, "declared jobs only"),
    ],
)
def test_it_is_never_proposed_by_itself(facts, words):
    verdict = TECHNIQUE.check(measurement(**facts))
    assert not verdict.applies and words in verdict.reason


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_the_contract_suite_really_scales(kind):
    """Its oracle would pass for a technique that does nothing, too."""
    stage = Stage([(TECHNIQUE, plan(scale=2.0**40)["fp16"])], lambda *_: None)
    session = Session(stage, kind)
    before = session.parameters()
    session.step()
    assert stage.backward().skipped == 1 and stage.acted == ("fp16",)
    names = [name for name, _ in session.module.named_parameters()]
    assert all(torch.equal(before[name], session.parameters()[name]) for name in names)
    stage.close()
