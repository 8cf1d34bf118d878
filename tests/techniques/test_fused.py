"""fused: plain optimizer steps to rounding, whatever the memory layout, and the script's own flags back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from upshift.records.measurement import OptimizerFacts
from upshift.sites import NoEffect, OptimizerSeen, Stage
from upshift.techniques.channels_last import ChannelsLast
from upshift.techniques.fused import FOREACH, Fused, base_class, dense, obstacle, same_order
from upshift.testing.contract import Session, build, measurement

TECHNIQUE = Fused()
LAST = torch.channels_last

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam amsgrad decay": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=1e-3, maximize=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd dampening": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, lr_decay=1e-3, weight_decay=1e-2),
}


def applied_to(optimizer, kind="fused"):
    outcome = TECHNIQUE.at(OptimizerSeen(optimizer=optimizer), {"kind": kind})
    assert not isinstance(outcome, NoEffect), outcome
    return outcome


def tensors(dtype=torch.float32):
    """Parameters of all sorts: vector, matrix, image kernel, 1 x 1 kernel, scalar, empty."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(7,), (5, 3), (4, 3, 3, 3), (4, 8, 1, 1), (), (0, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(50 + step)
    for parameter in parameters:
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = value.to(parameter.dtype)


def run(build_optimizer, *, dtype=torch.float32, technique=None, steps=6, between=lambda step, params, opt: None):
    """Train on given gradients; returns parameters and the `Applied`."""
    parameters = tensors(dtype)
    optimizer = build_optimizer(parameters)
    applied = None
    for step in range(steps):
        gradients(parameters, step)
        between(step, parameters, optimizer)
        if technique and applied is None:
            applied = applied_to(optimizer, technique)
        if applied:
            applied.before_step(optimizer)
        optimizer.step()
    return [parameter.detach() for parameter in parameters], applied


def close(found, expected, exact=None):
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-7), (a.shape, (a - b).abs().max())
    for a, b in zip(found, exact or (), strict=bool(exact)):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6), (a.shape, (a.double() - b).abs().max())


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_plain_step_and_float64_to_rounding(name, kind):
    found, applied = run(OPTIMIZERS[name], technique=kind)
    expected, _ = run(OPTIMIZERS[name])
    exact, _ = run(OPTIMIZERS[name], dtype=torch.float64)
    close(found, expected, exact)
    assert applied.effect() is None


@pytest.mark.parametrize("name", [name for name in FOREACH if name not in ("Adam", "AdamW", "SGD", "Adagrad")])
def test_other_optimizers_have_a_foreach_step(name):
    build_optimizer = lambda p: getattr(torch.optim, name)(p, lr=1e-3)  # noqa: E731
    found, _ = run(build_optimizer, technique="foreach")
    expected, _ = run(build_optimizer)
    close(found, expected)
    outcome = TECHNIQUE.at(OptimizerSeen(optimizer=build_optimizer(tensors())), {"kind": "fused"})
    assert isinstance(outcome, NoEffect) and name in outcome.reason


# -- layouts -----------------------------------------------------------------------------------------------------------


def flip(tensor, step):
    order = LAST if step % 2 else torch.contiguous_format
    tensor.data = tensor.data.contiguous(memory_format=order)


def contiguous_gradients(step, params, opt):
    """Gradients forced contiguous under channels-last weights."""
    flip(params[2], 1)
    params[2].grad = params[2].grad.contiguous()


def weights_change_order(step, params, opt):
    flip(params[2], step // 2)


def gradients_change_order(step, params, opt):
    flip(params[2].grad, step)


def transposed_gradients(step, params, opt):
    params[1].grad = params[1].grad.t().contiguous().t()


def expanded_gradients(step, params, opt):
    if step % 2:
        params[0].grad = params[0].grad[:1].clone().expand(7)


def state_changes_order_in_place(step, params, opt):
    if step == 3:
        for value in opt.state[params[2]].values():
            if value.dim() == 4:
                flip(value, 1)


def state_is_replaced_by_hand(step, params, opt):
    if step == 3:
        state = opt.state[params[2]]
        for key, value in state.items():
            if value.dim() == 4:
                state[key] = value.contiguous(memory_format=LAST)


def contiguous_checkpoint_under_channels_last(step, params, opt):
    if step == 3:
        flip(params[2], 1)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def weights_get_gaps(step, params, opt):
    if step == 2:
        params[1].data = torch.cat([params[1].data, torch.zeros(5, 2, dtype=params[1].dtype)], 1)[:, :3]


DISTURBANCES = (
    contiguous_gradients, weights_change_order, gradients_change_order, transposed_gradients, expanded_gradients,
    state_changes_order_in_place, state_is_replaced_by_hand, contiguous_checkpoint_under_channels_last,
    weights_get_gaps,
)  # fmt: skip


@pytest.mark.parametrize("name", ["adam amsgrad decay", "adamw", "sgd momentum", "adagrad"])
@pytest.mark.parametrize("between", DISTURBANCES, ids=lambda item: item.__name__)
def test_layouts_that_corrupt_an_unguarded_fused_step(between, name):
    found, _ = run(OPTIMIZERS[name], technique="fused", between=between)
    expected, _ = run(OPTIMIZERS[name], between=between)
    exact, _ = run(OPTIMIZERS[name], dtype=torch.float64, between=between)
    close(found, expected, exact)


@pytest.mark.parametrize("between", DISTURBANCES, ids=lambda item: item.__name__)
def test_the_same_layouts_do_corrupt_torchs_own_fused_step(between):
    """Without this the test above would show nothing. Should it fail, torch respects strides and the guard can go."""
    found, _ = run(lambda p: torch.optim.Adam(p, lr=1e-2, fused=True), between=between)
    expected, _ = run(lambda p: torch.optim.Adam(p, lr=1e-2), between=between)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_a_gap_in_a_parameter_is_never_written():
    whole = torch.zeros(4, 6)
    parameter = nn.Parameter(whole[:, :3])
    parameter.grad = torch.ones(4, 3)
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    applied = applied_to(optimizer)
    for _ in range(3):
        applied.before_step(optimizer)
        optimizer.step()
    assert torch.equal(whole[:, 3:], torch.zeros(4, 3)) and (whole[:, :3] < -0.2).all()
    assert "lie in memory" in applied.effect().reason


def test_with_channels_last_switched_on_and_off_every_two_steps():
    def train(stage):
        session = Session(stage, "conv")
        for step in range(10):
            if stage is not None and step % 2 == 0:
                on = {"channels_last"} if step % 4 else set()
                stage.switch(on | ({"fused"} if step not in (4, 6) else set()))
            session.step()
        return session.parameters()

    techniques = [(ChannelsLast(), {"volumes": False}), (TECHNIQUE, {"kind": "fused"})]
    said = []
    found = train(Stage(techniques, lambda *item: said.append(item)))
    assert {item[:2] for item in said} == {("applied", "channels_last"), ("applied", "fused")}
    for name, value in train(None).items():
        assert torch.allclose(found[name], value, atol=2e-5), (name, (found[name] - value).abs().max())


@pytest.mark.parametrize(
    ("strides", "shape", "expected"),
    [((3, 1), (2, 3), True), ((1, 2), (2, 3), True), ((4, 1), (2, 3), False), ((0, 1), (2, 3), False),
     ((99, 1), (1, 3), True), ((), (), True), ((2,), (3,), False), ((7, 7), (0, 3), True)],
)  # fmt: skip
def test_dense(strides, shape, expected):
    tensor = torch.empty(100).as_strided(shape, strides)
    assert dense(tensor) is expected


def test_same_order_ignores_strides_of_dimensions_of_size_one():
    weight = torch.empty(4, 8, 1, 1)
    assert same_order(weight, weight.as_strided((4, 8, 1, 1), (8, 1, 77, 5)))
    assert not same_order(torch.empty(2, 3), torch.empty(3, 2).t())
    assert not same_order(torch.empty(2, 3), torch.empty(3, 2))


# -- the optimizer stays the script's ----------------------------------------------------------------------------------


def groups(optimizer):
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("foreach", [None, True, False])
def test_flags_come_back_on_switch_and_close(foreach):
    optimizer = torch.optim.AdamW(tensors(), foreach=foreach)
    before = groups(optimizer)
    applied = applied_to(optimizer)
    assert [(group["fused"], group["foreach"]) for group in optimizer.param_groups] == [(True, False)]
    applied.switch(False)
    assert groups(optimizer) == before
    applied.switch(True)
    applied.close()
    applied.close()
    assert groups(optimizer) == before
    assert not optimizer._optimizer_state_dict_post_hooks


def test_off_is_bit_for_bit_the_plain_step():
    parameters, twins = tensors(), tensors()
    ours, plain = torch.optim.AdamW(parameters), torch.optim.AdamW(twins)
    applied = applied_to(ours)
    for step in range(8):
        if step % 2 == 0:
            applied.switch(step % 4 == 0)
        for group in (parameters, twins):
            gradients(group, step)
        if step % 4 >= 2:
            plain.load_state_dict(copy.deepcopy(ours.state_dict()))
            for a, b in zip(parameters, twins, strict=True):
                b.data.copy_(a.data)
        applied.before_step(ours)
        ours.step()
        plain.step()
        if step % 4 >= 2:
            assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


def test_load_state_dict_brings_other_flags_which_are_set_again_and_given_back():
    found, _ = run(
        OPTIMIZERS["adamw"], technique="fused", between=lambda s, p, o: s == 3 and o.load_state_dict(o.state_dict())
    )
    expected, _ = run(OPTIMIZERS["adamw"])
    close(found, expected)
    optimizer = torch.optim.AdamW(tensors())
    applied = applied_to(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["foreach"] = True
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["fused"] is not True
    gradients(optimizer.param_groups[0]["params"], 0)
    applied.before_step(optimizer)
    assert optimizer.param_groups[0]["fused"] is True
    applied.close()
    assert optimizer.param_groups[0]["foreach"] is True and optimizer.param_groups[0]["fused"] is None


def test_checkpoints_carry_the_scripts_flags():
    optimizer = torch.optim.Adam(tensors())
    expected = optimizer.state_dict()["param_groups"]
    applied_to(optimizer)
    assert optimizer.state_dict()["param_groups"] == expected
    assert optimizer.param_groups[0]["fused"] is True


def test_schedulers_and_two_groups():
    def build_optimizer(parameters):
        return torch.optim.AdamW(
            [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "lr": 1e-3}], lr=1e-2
        )

    schedulers = {}

    def between(step, parameters, optimizer):
        scheduler = schedulers.setdefault(id(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        if step:
            scheduler.step()

    found, _ = run(build_optimizer, technique="fused", between=between)
    expected, _ = run(build_optimizer, between=between)
    exact, _ = run(build_optimizer, dtype=torch.float64, between=between)
    close(found, expected, exact)


def test_a_group_added_later_is_fused_too():
    extra = {}

    def between(step, parameters, optimizer):
        if step == 2:
            extra[id(optimizer)] = nn.Parameter(torch.ones(3, dtype=parameters[0].dtype))
            optimizer.add_param_group({"params": [extra[id(optimizer)]], "lr": 0.1})
        if step >= 2:
            extra[id(optimizer)].grad = torch.full((3,), 0.5, dtype=parameters[0].dtype)
            parameters.append(extra[id(optimizer)]) if step == 5 else None

    found, applied = run(OPTIMIZERS["adamw"], technique="fused", between=between)
    expected, _ = run(OPTIMIZERS["adamw"], between=between)
    close(found, expected)
    assert applied.effect() is None


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adagrad"])
def test_parameters_without_gradients_at_times(name):
    """SGD's fused kernel has one first step for all; a parameter that joins later must not be given an empty buffer."""

    def between(step, parameters, optimizer):
        for index, parameter in enumerate(parameters):
            if (step + index) % 3 == 0:
                parameter.grad = None

    found, _ = run(OPTIMIZERS[name], technique="fused", between=between)
    expected, _ = run(OPTIMIZERS[name], between=between)
    exact, _ = run(OPTIMIZERS[name], dtype=torch.float64, between=between)
    close(found, expected, exact)


def test_closures():
    def train(technique):
        net = build("mlp")
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
        applied = applied_to(optimizer) if technique else None

        def closure():
            optimizer.zero_grad()
            loss = net(torch.ones(2, 16)).square().sum()
            loss.backward()
            return loss

        for _ in range(4):
            if applied:
                applied.before_step(optimizer)
            optimizer.step(closure)
        return [item.detach() for item in net.parameters()]

    close(train(True), train(False))


def test_double_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        found, _ = run(OPTIMIZERS["adamw"], dtype=torch.float64, technique="fused")
        expected, _ = run(OPTIMIZERS["adamw"], dtype=torch.float64)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_optimizer_that_is_gone_is_not_kept_alive():
    import gc
    import weakref

    optimizer = torch.optim.Adam(tensors())
    applied = applied_to(optimizer)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    applied.switch(False)
    applied.close()


# -- where it does not apply -------------------------------------------------------------------------------------------


class Own(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


class Named(torch.optim.SGD):
    pass


class Sub(nn.Parameter):
    pass


def of(optimizer, **kwargs):
    return optimizer([nn.Parameter(torch.ones(2))], **kwargs)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (of(torch.optim.Adam, fused=True), "already"),
        (of(torch.optim.Adam, differentiable=True), "differentiable"),
        (of(torch.optim.Adam, lr=torch.tensor(0.1)), "tensor"),
        (of(torch.optim.LBFGS), "LBFGS"),
        (of(Own), "Own"),
        (torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]), "bfloat16"),
        (torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex"),
        (torch.optim.SGD([Sub(torch.ones(2))]), "Sub"),
        (torch.optim.SparseAdam([nn.Parameter(torch.ones(2))]), "SparseAdam"),
    ],
)
def test_no_effect_is_said(optimizer, reason):
    before = groups(optimizer)
    outcome = TECHNIQUE.at(OptimizerSeen(optimizer=optimizer), {"kind": "fused"})
    assert isinstance(outcome, NoEffect) and reason in outcome.reason, outcome
    assert groups(optimizer) == before


def test_sparse_gradients_before_and_during():
    def net():
        return nn.Embedding(5, 3, sparse=True)

    one = net()
    one(torch.tensor([1])).sum().backward()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    assert "sparse" in TECHNIQUE.at(OptimizerSeen(optimizer=optimizer), {"kind": "fused"}).reason
    late = net()
    optimizer = torch.optim.SGD(late.parameters(), lr=0.1)
    applied = applied_to(optimizer)
    for _ in range(2):
        late(torch.tensor([1])).sum().backward()
        applied.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert "sparse" in applied.effect().reason and optimizer.param_groups[0]["fused"] is None


def test_subclasses_that_keep_torchs_step_count_as_torchs():
    assert base_class(of(Named, lr=0.1)) == "SGD" and base_class(of(Own)) == ""
    assert base_class(of(torch.optim.AdamW)) == "AdamW"
    assert obstacle(of(Named, lr=0.1), "fused") == ""


def test_check():
    verdict = TECHNIQUE.check(measurement())
    assert verdict.applies and verdict.candidates == ({"kind": "fused"}, {"kind": "foreach"})
    assert verdict.gain == pytest.approx(1 / (1 - 0.15 / 2))

    def facts(name="AdamW", **values):
        base = {"parameters": 1, "tensors": 1, "device": "cpu", "dtypes": ("float32",)}
        return {"optimizers": (OptimizerFacts(name=name, **{**base, **values}),)}

    for refused in (facts(fused=True), facts("LBFGS"), facts(sparse=True), facts(dtypes=("torch.bfloat16",))):
        verdict = TECHNIQUE.check(measurement(**refused))
        assert not verdict.applies and verdict.reason
    assert TECHNIQUE.check(measurement(**facts("RMSprop"))).candidates == ({"kind": "foreach"},)
    assert TECHNIQUE.check(measurement(**facts(device="cuda:0"))).candidates == ({"kind": "fused"},)


@pytest.mark.cuda
def test_step_counters_move_with_the_flag_on_cuda():
    parameters = [nn.Parameter(torch.ones(3, device="cuda"))]
    optimizer = torch.optim.Adam(parameters)
    for step in range(6):
        parameters[0].grad = torch.ones(3, device="cuda")
        if step == 1:
            applied = applied_to(optimizer)
        if step in (2, 4):
            applied.switch(step == 4)
        if step >= 1:
            applied.before_step(optimizer)
        on = step in (1, 4, 5)
        optimizer.step()
        assert optimizer.state[parameters[0]]["step"].device.type == ("cuda" if on else "cpu")
    assert float(optimizer.state[parameters[0]]["step"]) == 6
