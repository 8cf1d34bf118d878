"""Compilation in place: the numbers of the uncompiled model, and a module that stays what it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import msgspec
import pytest
import torch
from torch import nn

from upshift.hardware import machine
from upshift.records import Anatomy, Measurement, ModelFacts, Phase, Quantity, ScriptFacts, unknown
from upshift.sites import ForwardApplied, ModelSeen, NoEffect, Numerics
from upshift.techniques.compile import Compile, CompileApplied

DEFAULTS = {key: spec.default for key, spec in Compile.card.settings.items()}
needs_compiler = pytest.mark.skipif(not machine.has_compiler(), reason="no C++ compiler")


def offer(module, **changes):
    return Compile().at(ModelSeen(module=module, args=(torch.zeros(1),)), {**DEFAULTS, **changes})


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.4), nn.Linear(16, 3))


def step(module, x, call):
    module.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    output = call(module, x)
    output.square().mean().backward()
    return output.detach().clone(), [p.grad.clone() for p in module.parameters()], torch.rand(1)


@needs_compiler
def test_compiled_training_equals_uncompiled_within_rounding_and_closing_restores_it():
    module, x = made(), torch.randn(6, 8)
    exact = copy.deepcopy(module).double()
    expected, gradients, drawn = step(module, x, lambda m, x: m(x))
    exact.eval()
    keys, before = list(module.state_dict()), set(module.__dict__)
    applied = offer(module)
    assert isinstance(applied, CompileApplied) and isinstance(applied, ForwardApplied)

    def call(module, x):
        return applied.around(module, module, (x,), {})

    output, mine, after = step(module, x, call)
    assert applied.graphs == 1  # a root out of torch.nn alone is really compiled
    assert applied.effect() is None and applied.one_off_seconds > 0
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, gradients, rtol=1e-5, atol=1e-6)
    assert torch.equal((output == 0), (expected == 0)) and torch.equal(after, drawn)  # same masks, same stream

    module.eval()
    torch.testing.assert_close(call(module, x), exact(x.double()).float(), rtol=1e-5, atol=1e-6)
    module.train()
    short, short_gradients, _ = step(module, x[:5], call)
    assert applied.recompiles >= 2

    assert type(module) is nn.Sequential and list(module.state_dict()) == keys
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._compiled_call_impl is None and list(twin.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert list(torch.load(buffer, weights_only=False).state_dict()) == keys

    applied.close()
    applied.close()
    assert set(module.__dict__) == before
    eager, eager_gradients, _ = step(module, x, lambda m, x: m(x))
    assert torch.equal(eager, expected) and all(map(torch.equal, eager_gradients, gradients))
    plain, plain_gradients, _ = step(module, x[:5], lambda m, x: m(x))
    torch.testing.assert_close(short, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short_gradients, plain_gradients, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_a_hook_registered_or_removed_later_is_obeyed():
    module, x, seen = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), []
    applied = offer(module)
    with torch.no_grad():
        applied.around(module, module, (x,), {})
        torch.ones(1, requires_grad=True).register_hook(lambda grad: None)  # a hook elsewhere changes nothing
        applied.around(module, module, (x,), {})
        assert applied.effect() is None
        handle = module[0].register_forward_hook(lambda *_: seen.append(1))
        applied.around(module, module, (x,), {})
    assert seen == [1] and "hooks" in applied.effect().reason
    handle.remove()
    applied.close()


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        torch.rand(3)
        raise ValueError("broken")


@needs_compiler
def test_a_failing_first_call_comes_through_and_draws_nothing():
    module = Fails()
    applied = offer(module)
    before = torch.get_rng_state()
    with pytest.raises(Exception, match="broken"):
        applied.around(module, module, (torch.ones(1, 2),), {})
    assert torch.equal(torch.get_rng_state(), before)
    applied.close()


@needs_compiler
def test_a_model_the_script_lets_go_of_is_freed():
    module = made()
    applied, gone = offer(module), weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    applied.close()


def frozen():
    return made().requires_grad_(False)


def hooked():
    module = made()
    module[0].register_full_backward_hook(lambda *_: None)
    return module


def compiled():
    module = made()
    module[1].compile()
    return module


@pytest.mark.parametrize(
    ("make", "changes", "why"),
    [
        (lambda: nn.Sequential(torch.compile(made())), {}, "itself"),
        (compiled, {}, "itself"),
        (frozen, {}, "not trained"),
        (hooked, {}, "backward hook"),
        (lambda: nn.DataParallel(made()), {}, "DataParallel"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), {}, "TorchScript"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, "meta"),
        (made, {"mode": "reduce-overhead"}, "CUDA"),
    ],
)
def test_what_must_not_be_compiled_is_left_alone(make, changes, why):
    module = make()
    before = dict(module.__dict__)
    outcome = offer(module, **changes)
    assert isinstance(outcome, NoEffect) and why in outcome.reason
    assert dict(module.__dict__) == before


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = offer(made())
    assert isinstance(outcome, NoEffect) and "install" in outcome.reason


def test_numerics_follow_the_random_stream():
    technique = Compile()
    assert technique.numerics(DEFAULTS, ScriptFacts()) is Numerics.ROUNDING
    assert technique.numerics({**DEFAULTS, "eager_random": False}, ScriptFacts()) is Numerics.RESEEDS


def measured(**changes):
    none = unknown("s")
    phases = tuple(Phase(name, Quantity(0.4, "s"), Quantity(0.4, "1")) for name in ("forward", "backward"))
    anatomy = Anatomy(
        step=Quantity(1.0, "s"), phases=phases, steps_seen=10, warmup_steps=1, warmup=none, startup=none,
        evaluation=none, checkpointing=none, micro_batches=none, samples=none,
    )  # fmt: skip
    model = ModelFacts(name="Net", parameters=10, dtypes=("float32",), device="cpu")
    facts = ScriptFacts(**{"models": (model,), "compiler": True, **changes})
    return Measurement(script="t.py", arguments=(), created="", anatomy=anatomy, facts=facts)


def test_the_verdict_follows_what_was_seen():
    technique = Compile()
    verdict = technique.check(measured())
    assert verdict.applies and verdict.gain > 1 and verdict.rests_on
    assert verdict.candidates == ({"mode": "default"},)
    on_cuda = measured(device="cuda")
    assert [item["mode"] for item in technique.check(on_cuda).candidates] == ["default", "max-autotune-no-cudagraphs"]
    for micro_batches, graphs in ((1.0, True), (4.0, False)):
        counted = msgspec.structs.replace(on_cuda.anatomy, micro_batches=Quantity(micro_batches, "1"))
        found = technique.check(msgspec.structs.replace(on_cuda, anatomy=counted)).candidates
        assert ({"mode": "reduce-overhead"} in found) is graphs
    for candidate in technique.check(measured(device="cuda")).candidates:
        assert not technique.card.settings["mode"].problem(candidate["mode"])
    for changes in (
        {"models": ()},
        {"compiler": False},
        {"create_graph": True},
        {"distributed": True},
        {"frameworks": ("pytorch_lightning",)},
    ):
        assert not technique.check(measured(**changes)).applies


def test_cuda_graphs_are_given_up_where_shapes_keep_changing_and_their_outputs_are_copied():
    module, kept = made(), []

    def call(x):
        kept.append(x * 2)
        return {"loss": kept[-1]}

    applied = CompileApplied(module, "reduce-overhead", None, True)
    for size in (1, 2, 3, 4, 4, 1):
        output = applied.around(call, module, (torch.ones(size),), {})
        assert torch.equal(output["loss"], kept[-1]) and output["loss"].data_ptr() != kept[-1].data_ptr()
    assert "_compiled_call_impl" in vars(module)
    applied.around(call, module, (torch.ones(5),), {})
    assert "shapes" in applied.effect().reason and "_compiled_call_impl" not in vars(module)


def cuda_step(module, x, mode):
    module = copy.deepcopy(module)
    applied = None if mode is None else Compile().at(ModelSeen(module=module), {**DEFAULTS, "mode": mode})
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(6):
        optimizer.zero_grad()
        output = module(x) if applied is None else applied.around(module, module, (x,), {})
        losses.append(output.square().mean())
        losses[-1].backward()
        optimizer.step()
    assert applied is None or applied.effect() is None
    return [float(loss.detach()) for loss in losses]  # read late, as logs are


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_on_cuda_every_mode_trains_alike(mode):
    module = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).cuda()
    x = torch.randn(32, 64, device="cuda")
    assert cuda_step(module, x, mode) == pytest.approx(cuda_step(module, x, None), rel=1e-3)
