"""channels_last: the same training in another order of memory, and everything that must follow the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from upshift.records.measurement import ModelFacts
from upshift.sites import ModelSeen, NoEffect, Numerics, OptimizerSeen, Stage
from upshift.techniques.channels_last import ChannelsLast, align_state, weights
from upshift.testing.contract import Session, build, measurement

TECHNIQUE = ChannelsLast()
LAST = torch.channels_last


def is_last(tensor):
    return tensor.is_contiguous(memory_format=LAST) and not tensor.is_contiguous()


def seen(module, *args):
    return TECHNIQUE.at(ModelSeen(module=module, args=args, training=module.training), {"volumes": False})


def applied_to(module, *args):
    outcome = seen(module, *args)
    assert not isinstance(outcome, NoEffect), outcome
    return outcome


def call(applied, module, *args):
    return applied.around(module, module, args, {})


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.orders = []

    def forward(self, x):
        y = self.conv(x)
        self.orders.append((is_last(x), is_last(y)))
        return y


def test_weights_and_images_are_channels_last_inside_and_usual_outside():
    net, x = Spy(), torch.randn(2, 3, 5, 5)
    weight, before = net.conv.weight, net.conv.weight.detach().clone()
    expected = net.double()(x.double())
    net.float()
    applied = applied_to(net, x)
    assert net.conv.weight is weight and is_last(weight) and torch.equal(weight, before)
    y = call(applied, net, x)
    assert net.orders[-1] == (True, True)
    assert y.is_contiguous() and y.view(2, -1).shape == (2, 150)
    assert torch.allclose(y.double(), expected, atol=1e-5)


def test_switching_moves_weight_gradient_and_state_together_without_changing_a_value():
    net, x = Spy(), torch.randn(2, 3, 5, 5)
    optimizer = torch.optim.AdamW(net.parameters())
    applied = applied_to(net, x)
    call(applied, net, x).square().sum().backward()
    other = TECHNIQUE.at(OptimizerSeen(optimizer=optimizer), {})
    other.before_step(optimizer)
    optimizer.step()
    state = optimizer.state[net.conv.weight]
    tensors = [net.conv.weight, net.conv.weight.grad, state["exp_avg"], state["exp_avg_sq"]]
    values = [tensor.detach().clone() for tensor in tensors]
    for on in (False, True, False):
        applied.switch(on)
        other.switch(on)
        assert all(is_last(tensor) == on for tensor in tensors)
        assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, values, strict=True))
        assert net.conv.weight.grad is tensors[1]


def test_close_restores_the_strides_also_when_the_optimizer_was_closed_before():
    stage = Stage([(TECHNIQUE, {"volumes": False})], lambda *_: None)
    session = Session(stage, "conv")
    strides = {name: item.stride() for name, item in session.module.named_parameters()}
    for _ in range(2):
        session.step()
    stage.close()
    assert {name: item.stride() for name, item in session.module.named_parameters()} == strides
    for parameter in session.module.parameters():
        for tensor in (parameter.grad, *session.optimizer.state[parameter].values()):
            assert tensor.dim() == 0 or tensor.stride() == parameter.stride()


def test_a_fused_optimizer_of_the_scripts_own_never_meets_a_mismatch():
    """Torch's fused CPU kernels ignore strides; here the order of weights changes between steps that keep state."""

    def train(stage, kind_fused):
        session = Session(stage, "conv")
        session.optimizer = torch.optim.Adam(session.module.parameters(), lr=1e-2, fused=kind_fused)
        for step in range(8):
            if stage is not None and step in (2, 4, 6):
                stage.switch(["channels_last"] if step == 4 else [])
            session.step()
        return session.parameters()

    stage = Stage([(TECHNIQUE, {"volumes": False})], lambda *_: None)
    found, expected = train(stage, True), train(None, False)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4), (name, (found[name] - value).abs().max())


def test_a_contiguous_checkpoint_loaded_before_and_during_training_is_brought_in_order():
    donor = Session(None, "conv")
    for _ in range(2):
        donor.step()
    saved = copy.deepcopy((donor.module.state_dict(), donor.optimizer.state_dict()))
    stage = Stage([(TECHNIQUE, {"volumes": False})], lambda *_: None)
    session, plain = Session(stage, "conv"), Session(None, "conv")
    for at in (0, 3):
        for one in (session, plain):
            one.module.load_state_dict(copy.deepcopy(saved[0]))
            one.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        for _ in range(3):
            assert session.step() == pytest.approx(plain.step(), rel=1e-5), at
        weight = session.module[3].weight
        assert is_last(weight) and is_last(session.optimizer.state[weight]["exp_avg"])
    for name, value in plain.parameters().items():
        assert torch.allclose(session.parameters()[name], value, atol=1e-5)


def test_align_state_keeps_values_and_leaves_what_is_in_order():
    net = nn.Conv2d(4, 4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    assert align_state(optimizer) == 0
    buffer = optimizer.state[net.weight]["momentum_buffer"]
    value = buffer.clone()
    net.weight.data = net.weight.data.contiguous(memory_format=LAST)
    assert align_state(optimizer) == 2
    assert is_last(buffer) and is_last(net.weight.grad) and torch.equal(buffer, value)


class Viewing(nn.Module):
    """As many a tutorial has it: `view` fails on images in another order."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4 * 36, 2)

    def forward(self, x):
        y = self.drop(self.norm(self.conv(x)))
        return self.out(y.view(-1, 4 * 36))


def test_a_model_that_views_its_images_goes_on_in_the_usual_order():
    torch.manual_seed(0)
    net = Viewing()
    plain = copy.deepcopy(net)
    x = torch.randn(5, 3, 8, 8)
    applied = applied_to(net, x)
    torch.manual_seed(1)
    found = call(applied, net, x)
    torch.manual_seed(1)
    expected = plain(x)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))
    assert net.conv.weight.is_contiguous() and "usual order" in applied.effect().reason
    applied.switch(True)
    assert net.conv.weight.is_contiguous()


def test_an_error_of_the_script_itself_stays_the_scripts_error():
    net, x = Spy(), torch.randn(2, 3, 5, 5)
    with pytest.raises(RuntimeError, match="channels"):
        call(applied_to(net, x), net, torch.randn(2, 4, 5, 5))


def test_evaluation_is_watched_on_its_own():
    class OnlyEval(Spy):
        def forward(self, x):
            y = super().forward(x)
            return y if self.training else y.view(-1)

    net, x = OnlyEval(), torch.randn(2, 3, 5, 5)
    applied = applied_to(net, x)
    call(applied, net, x)
    assert applied.effect() is None
    net.eval()
    assert call(applied, net, x).shape == (300,)
    assert isinstance(applied.effect(), NoEffect)


def test_outputs_in_containers_are_usual_too():
    class Many(Spy):
        def forward(self, x):
            y = super().forward(x)
            return {"a": y, "b": 3} if self.training else (y, [y])

    net, x = Many(), torch.randn(2, 3, 5, 5)
    applied = applied_to(net, x)
    assert call(applied, net, x)["a"].is_contiguous()
    assert call(applied, net.eval(), x)[0].is_contiguous()


def test_two_root_modules_that_share_weights_end_as_they_began():
    net = nn.Sequential(Spy(), nn.ReLU())
    x = torch.randn(1, 3, 5, 5)
    outer, inner = applied_to(net, x), seen(net[0], x)
    weight = net[0].conv.weight
    assert is_last(weight)
    for applied in (outer, inner):
        applied.switch(False)
    assert weight.is_contiguous()
    for applied in (inner, outer):
        applied.close()
    assert weight.is_contiguous()


def test_weights_that_share_memory_stay():
    net = nn.Conv2d(3, 4, 3)
    flat = torch.cat([net.weight.detach().flatten(), torch.zeros(5)])
    net.weight.data = flat[:108].view(4, 3, 3, 3)
    assert weights(net, False) == []
    assert isinstance(seen(net, torch.randn(1, 3, 5, 5)), NoEffect)
    shared = nn.Conv2d(3, 4, 3).share_memory()
    assert weights(shared, False) == []


def test_volumes_are_a_setting():
    net, x = nn.Conv3d(2, 3, 3), torch.randn(1, 2, 4, 4, 4)
    assert isinstance(seen(net, x), NoEffect)
    applied = TECHNIQUE.at(ModelSeen(module=net, args=(x,)), {"volumes": True})
    assert net.weight.is_contiguous(memory_format=torch.channels_last_3d)
    exact = nn.functional.conv3d(x.double(), net.weight.double(), net.bias.double())
    assert torch.allclose(call(applied, net, x).double(), exact, atol=1e-5)
    applied.close()
    assert net.weight.is_contiguous()


@pytest.mark.parametrize(
    ("module", "reason"),
    [(nn.Linear(2, 2), "no convolution"), (nn.Conv1d(2, 2, 3), "no convolution"), (nn.LazyConv2d(2, 3), "no conv")],
)
def test_nothing_to_do(module, reason):
    outcome = seen(module, torch.ones(1))
    assert isinstance(outcome, NoEffect) and reason in outcome.reason


def test_a_model_that_is_channels_last_already_says_so():
    net = build("conv").to(memory_format=LAST)
    outcome = seen(net, torch.randn(2, 3, 8, 8).to(memory_format=LAST))
    assert isinstance(outcome, NoEffect) and "already" in outcome.reason
    applied = applied_to(net, torch.randn(2, 3, 8, 8))  # its images are not
    applied.close()
    assert is_last(net[0].weight)


def test_gradients_agree_with_float64():
    net, x = build("conv"), torch.randn(4, 3, 8, 8)
    call(applied_to(net, x), net, x).square().sum().backward()
    found = {name: item.grad.double() for name, item in net.named_parameters()}
    exact = build("conv").double()
    exact(x.double()).square().sum().backward()
    for name, item in exact.named_parameters():
        assert torch.allclose(found[name], item.grad, rtol=1e-3, atol=1e-4), name


def test_a_dropout_mask_over_images_is_another_one_so_numerics_says_reseeds():
    x = torch.ones(2, 8, 6, 6)
    torch.manual_seed(0)
    usual = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    last = nn.functional.dropout(x.to(memory_format=LAST), 0.5)
    assert not torch.equal(usual, last)
    assert TECHNIQUE.numerics({}, measurement().facts) is Numerics.RESEEDS
    plain = ModelFacts(name="Net", parameters=1, dtypes=("float32",), device="cpu", layers={"Conv2d": 2})
    assert TECHNIQUE.numerics({}, measurement(models=(plain,)).facts) is Numerics.ROUNDING


def test_check():
    assert TECHNIQUE.check(measurement()).applies
    assert not TECHNIQUE.check(measurement(distributed=True)).applies

    def facts(**values):
        return ModelFacts(name="Net", parameters=1, dtypes=("float32",), device="cpu", **values)

    assert not TECHNIQUE.check(measurement(models=(facts(layers={"Linear": 1}),))).applies
    assert not TECHNIQUE.check(measurement(models=(facts(layers={"Conv2d": 1}, channels_last=True),))).applies
    assert TECHNIQUE.check(measurement(models=(facts(layers={"Conv3d": 1}),))).candidates == ({"volumes": True},)
