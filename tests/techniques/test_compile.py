"""Compilation in place: the numbers of the uncompiled model, and a module that stays what it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
import weakref

import msgspec
import pytest
import torch
from torch import nn

from upshift.hardware import machine
from upshift.records import Anatomy, Measurement, ModelFacts, Phase, Quantity, ScriptFacts, unknown
from upshift.sites import ForwardApplied, ModelSeen, NoEffect, Numerics
from upshift.techniques.compile import Compile, CompileApplied, regional_refusal
from upshift.testing import contract
from upshift.testing.training import TOLERANCE

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


class Block(nn.Module):
    def __init__(self, width=8, rate=0.0):
        super().__init__()
        self.rate = rate
        self.norm, self.inner, self.drop = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x):
        return x + (1.0 - self.rate) * self.drop(nn.functional.gelu(self.inner(self.norm(x))))


class Stack(nn.Module):
    """Blocks between two layers that do not repeat."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(count=4):
    torch.manual_seed(0)
    return Stack(*(Block() for _ in range(count)))


def train(module, call, steps=3):
    """How far each parameter moves in a few steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    start = [item.detach().clone() for item in module.parameters()]
    torch.manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        call(module, torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
    return [item.detach() - before for item, before in zip(module.parameters(), start, strict=True)]


@pytest.fixture
def captured_only(monkeypatch):
    """Dynamo captures and guards as always; the graphs run as they are, which saves the time of a code generator."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic, options: real(fn, backend="eager", dynamic=dynamic))


@needs_compiler
def test_equal_blocks_share_one_graph_and_train_as_uncompiled():
    module, x = stack(), torch.randn(6, 8)
    plain = copy.deepcopy(module)
    keys, before = list(module.state_dict()), [set(item.__dict__) for item in module.modules()]
    expected, gradients, drawn = step(plain, x, lambda m, x: m(x))
    applied = offer(module, region="blocks")
    assert isinstance(applied, CompileApplied) and "4 Block of Stack" in applied.note

    def call(module, x):
        return applied.around(module, module, (x,), {})

    output, mine, after = step(module, x, call)
    assert applied.graphs == 1 and applied.recompiles == 0 and applied.effect() is None
    assert module._compiled_call_impl is None and all(block._compiled_call_impl for block in module.blocks)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)  # and so are its dropout masks
    torch.testing.assert_close(mine, gradients, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, drawn)

    for moved, reference in zip(train(module, call), train(plain, lambda m, x: m(x)), strict=True):
        assert float((moved - reference).norm() / reference.norm()) < TOLERANCE["float32"][0]
    assert applied.graphs == 1

    assert list(module.state_dict()) == keys
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(item._compiled_call_impl is None for item in twin.modules())
    applied.close()
    applied.close()
    assert [set(item.__dict__) for item in module.modules()] == before
    plain.load_state_dict(module.state_dict())
    assert all(map(torch.equal, step(module, x, lambda m, x: m(x))[1], step(plain, x, lambda m, x: m(x))[1]))


@needs_compiler
def test_a_hook_on_a_block_is_obeyed_and_one_elsewhere_changes_nothing(captured_only):
    module, x, seen = stack(2), torch.randn(2, 8), []
    applied = offer(module, region="blocks")
    with torch.no_grad():
        applied.around(module, module, (x,), {})
        module.head.register_forward_hook(lambda *_: seen.append("head"))  # of what is not compiled
        applied.around(module, module, (x,), {})
        assert seen == ["head"] and applied.effect() is None
        module.blocks[1].inner.register_forward_hook(lambda *_: seen.append("block"))
        applied.around(module, module, (x,), {})
    assert seen == ["head", "block", "head"] and "hooks" in applied.effect().reason
    assert all(block._compiled_call_impl is None for block in module.blocks)


@needs_compiler
def test_blocks_that_look_alike_and_are_not_are_told_apart(captured_only):
    """A number of their own, another mode, a forward of their own: what Dynamo has to see in each."""
    torch.manual_seed(0)
    module, x = Stack(*(Block(rate=0.2 * (index == 1)) for index in range(4))), torch.randn(6, 8)
    module.blocks[2].eval()
    module.blocks[3].forward = types.MethodType(lambda self, x: x - Block.forward(self, x), module.blocks[3])
    expected, gradients, drawn = step(copy.deepcopy(module), x, lambda m, x: m(x))
    applied = offer(module, region="blocks")
    output, mine, after = step(module, x, lambda m, x: applied.around(m, m, (x,), {}))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, gradients, rtol=1e-5, atol=1e-6)
    assert torch.equal(after, drawn) and applied.recompiles >= 2 and applied.effect() is None
    applied.close()


@needs_compiler
def test_each_group_of_blocks_has_a_graph_and_a_model_let_go_of_is_freed(captured_only):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 4), Block(4), Block(4))
    plain = copy.deepcopy(module)
    applied, gone = offer(module, region="blocks"), weakref.ref(module)
    output, _, _ = step(module, torch.ones(2, 8), lambda m, x: applied.around(m, m, (x,), {}))
    expected, _, _ = step(plain, torch.ones(2, 8), lambda m, x: m(x))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert applied.graphs == 2 and applied.recompiles == 0
    del module, output
    gc.collect()
    assert gone() is None
    applied.close()


def test_the_contract_meets_compiled_blocks():
    assert {"region": "blocks"} in contract.variants(Compile())
    module = contract.build("mlp")
    applied = offer(module, region="blocks")
    if machine.has_compiler():
        assert isinstance(applied, CompileApplied) and len(applied._placed) == 2
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


def hooked_block():
    module = stack()
    module.blocks[1].norm.register_forward_hook(lambda *_: None)
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
        (made, {"region": "blocks"}, "repeats"),
        (hooked_block, {"region": "blocks"}, "hooks"),
        (lambda: Stack(Block(), Block().double()), {"region": "blocks"}, "repeats"),
        (lambda: Stack(Block(), Block().requires_grad_(False)), {"region": "blocks"}, "repeats"),
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
    for share, proposed in ((None, False), (0.2, False), (0.9, True)):
        model = ModelFacts(name="Net", parameters=1, dtypes=("float32",), device="cpu", repeated_share=share)
        found = technique.check(measured(models=(model,))).candidates
        assert found[-1] == {"mode": "default"}
        assert found[:-1] == (({"mode": "default", "region": "blocks"},) if proposed else ())
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


def test_code_that_depends_on_the_order_of_shapes_is_told_to_who_resumes():
    assert "up to rounding" in offer(made()).inexact
    assert {offer(made(), dynamic=how).inexact for how in ("no", "yes")} == {""}


def test_cuda_graphs_are_not_recorded_per_block():
    assert "region" in regional_refusal([[Block(), Block()]], "reduce-overhead")
    assert not regional_refusal([[Block(), Block()]], "default")


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


def cuda_step(module, x, **changes):
    module = copy.deepcopy(module)
    applied = offer(module, **changes) if changes else None
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
    assert cuda_step(module, x, mode=mode) == pytest.approx(cuda_step(module, x), rel=1e-3)


@pytest.mark.cuda
def test_on_cuda_blocks_train_alike():
    module, x = stack().cuda(), torch.randn(32, 8, device="cuda")
    assert isinstance(offer(copy.deepcopy(module), region="blocks"), CompileApplied)
    expected = cuda_step(module.eval(), x)
    assert cuda_step(module, x, region="blocks") == pytest.approx(expected, rel=1e-3)
