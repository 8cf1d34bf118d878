"""bf16: what is cast, what comes back, and where it stays away."""

from __future__ import annotations

import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from upshift.records.measurement import ModelFacts
from upshift.sites import ModelSeen, NoEffect, OptimizerSeen, Stage
from upshift.techniques.bf16 import Bf16, predicted_gain, to_float32
from upshift.testing.contract import Session, measurement

TECHNIQUE = Bf16()


def applied_to(module, *args):
    outcome = TECHNIQUE.at(ModelSeen(module=module, args=args, training=module.training), {})
    assert not isinstance(outcome, NoEffect), outcome
    return outcome


def call(applied, module, *args, **kwargs):
    return applied.around(module, module, args, kwargs)


class Recorder(nn.Module):
    """Remembers the dtype its product was computed in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.dtypes = []

    def forward(self, x):
        y = self.layer(x)
        self.dtypes.append(y.dtype)
        return y


def test_products_run_in_bfloat16_and_the_script_gets_float32():
    net = Recorder()
    applied = applied_to(net)
    x = torch.randn(5, 4)
    y = call(applied, net, x)
    assert net.dtypes == [torch.bfloat16]
    assert y.dtype is torch.float32
    exact = net.double()(x.double())
    # One rounding of each operand and of the result: 3 x 2^-9 of the largest term.
    assert (y.double() - exact).abs().max().item() < 3 * 2**-9 * 4
    assert not torch.equal(y.double(), exact)


def test_gradients_arrive_in_float32_close_to_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(64, 32)
    call(applied_to(net), net, x).square().mean().backward()
    found = {name: item.grad.clone() for name, item in net.named_parameters()}
    net.zero_grad()
    net.double()(x.double()).square().mean().backward()
    for name, item in net.named_parameters():
        assert found[name].dtype is torch.float32
        cosine = torch.nn.functional.cosine_similarity(found[name].double().flatten(), item.grad.flatten(), dim=0)
        assert cosine > 0.9995, (name, cosine)


def test_a_no_grad_forward_does_not_take_gradients_from_the_next_one():
    """A cast cached without gradients would leave the weight without one (pytorch#112583)."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            self.cached = torch.is_autocast_cache_enabled()
            with torch.no_grad():
                target = self.layer(x)
            return (self.layer(x) - target.detach() + 1).sum()

    net = Both()
    call(applied_to(net), net, torch.randn(3, 4)).backward()
    assert net.layer.weight.grad is not None and net.layer.weight.grad.abs().sum() > 0
    assert not net.cached, "some versions of torch train on without it, others do not"


def test_autocast_is_over_after_the_call_and_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            self.layer(x)
            raise ValueError("mine")

    net = Fails()
    with pytest.raises(ValueError, match="mine"):
        call(applied_to(net), net, torch.ones(1, 2))
    assert not torch.is_autocast_enabled("cpu")


def test_an_autocast_of_the_script_is_left_alone():
    net = Recorder()
    applied = applied_to(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(applied, net, torch.ones(1, 4))
    assert y.dtype is torch.bfloat16  # as the script had it
    assert isinstance(applied.effect(), NoEffect) and "autocast" in applied.effect().reason


def test_evaluation_calls_are_wrapped_too():
    net = Recorder().eval()
    with torch.no_grad():
        y = call(applied_to(net), net, torch.ones(1, 4))
    assert net.dtypes == [torch.bfloat16] and y.dtype is torch.float32 and y.numpy().shape == (1, 3)


def test_a_model_that_cannot_run_in_bfloat16_is_run_again_as_it_is():
    """Assigning by index needs equal dtypes; buffers and random streams are as if the failed call had not been."""

    class Scatter(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            y = torch.zeros(x.shape[0], 1)
            y[torch.arange(x.shape[0])] = self.layer(self.drop(self.norm(x)))
            return y

    torch.manual_seed(3)
    net = Scatter()
    x = torch.randn(16, 4)
    copy = pickle.loads(pickle.dumps(net.state_dict()))
    torch.manual_seed(5)
    expected = net(x)
    after = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(copy)
    applied = applied_to(net)
    torch.manual_seed(5)
    found = call(applied, net, x)
    assert torch.equal(found, expected)
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert "bfloat16" in applied.effect().reason
    assert torch.equal(call(applied, net.eval(), x), net(x))


def test_an_error_of_the_script_itself_stays_the_scripts_error():
    net = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call(applied_to(net), net, torch.ones(2, 3))


# -- outputs -----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "logits size")


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()
    name: str = "x"


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class ModelOutput(OrderedDict):
    """As transformers has it: keys are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


def half():
    return torch.ones(2, dtype=torch.bfloat16)


def test_nested_outputs_come_back_as_float32_in_their_own_containers():
    whole, integers = torch.ones(2), torch.arange(2)
    pair = to_float32(Pair(half(), 3))
    assert type(pair) is Pair and pair.logits.dtype is torch.float32 and pair.size == 3
    nested = to_float32({"a": [half(), (half(), integers)], "b": whole})
    assert nested["a"][0].dtype is nested["a"][1][0].dtype is torch.float32
    assert nested["a"][1][1] is integers and nested["b"] is whole
    output = to_float32(Output(half(), (half(),)))
    assert type(output) is Output and output.logits.dtype is output.hidden[0].dtype is torch.float32
    assert to_float32(Frozen(half())).logits.dtype is torch.float32
    model_output = ModelOutput()
    model_output["loss"] = half()
    cast = to_float32(model_output)
    assert type(cast) is ModelOutput and cast.loss.dtype is cast["loss"].dtype is torch.float32
    normal = to_float32(torch.distributions.Normal(half(), half()))
    assert normal.loc.dtype is normal.scale.dtype is torch.float32
    values, indices = to_float32(torch.max(torch.ones(2, 2, dtype=torch.bfloat16), dim=0))
    assert values.dtype is torch.float32 and indices.dtype is torch.int64


@pytest.mark.parametrize(
    "value",
    [None, 3, "text", torch.ones(2), (torch.ones(1), 2), [torch.ones(1).double()], {"a": torch.ones(1).half()}, Output],
    ids=str,
)
def test_what_has_no_bfloat16_is_the_very_same_object(value):
    assert to_float32(value) is value


def test_containers_of_the_model_are_not_changed_in_place():
    kept = [half()]
    assert to_float32(kept) is not kept and kept[0].dtype is torch.bfloat16


def test_packed_sequences_and_the_cast_are_differentiable():
    weight = torch.ones(3, requires_grad=True)
    packed = nn.utils.rnn.pack_sequence([weight.bfloat16() * 2])
    found = to_float32(packed)
    assert type(found) is type(packed) and found.data.dtype is torch.float32
    found.data.sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


# -- where it does not apply -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(2, 2).double(), "float64"),
        (nn.Linear(2, 2).bfloat16(), "half-precision"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half()), "half-precision"),
        (nn.ReLU(), "no float32"),
    ],
)
def test_other_precisions_say_no_effect(module, reason):
    outcome = TECHNIQUE.at(ModelSeen(module=module), {})
    assert isinstance(outcome, NoEffect) and reason in outcome.reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"autocast": True}, "autocast"),
        ({"grad_scaler": True}, "GradScaler"),
        ({"create_graph": True}, "create_graph"),
        ({"models": ()}, "no trained model"),
        ({"bf16_native": False}, "this CPU has no native bf16 arithmetic (AMX or AVX-512 BF16)"),
        ({"bf16_native": False, "device": "cuda:0"}, "this device has no native bf16"),
    ],
)
def test_check_says_why_not(facts, reason):
    verdict = TECHNIQUE.check(measurement(**facts))
    assert not verdict.applies and reason in verdict.reason


@pytest.mark.parametrize("dtypes", [("float64",), ("torch.float64",), ("bfloat16", "float32"), ("torch.float16",)])
def test_check_reads_the_dtypes(dtypes):
    facts = ModelFacts(name="Net", parameters=10, dtypes=dtypes, device="cpu")
    assert not TECHNIQUE.check(measurement(models=(facts,))).applies


def test_check_tries_where_native_or_unknown():
    for native in (True, None):
        verdict = TECHNIQUE.check(measurement(bf16_native=native))
        assert verdict.applies and "assumed" in verdict.rests_on
        # Amdahl: 70 % of the step 1.8 times faster.
        assert verdict.gain == pytest.approx(1 / (0.3 + 0.7 / 1.8))


def test_no_gain_is_predicted_from_unknown_shares():
    seen = measurement()
    phases = tuple(phase for phase in seen.anatomy.phases if phase.name != "backward")
    import msgspec

    assert predicted_gain(msgspec.structs.replace(seen.anatomy, phases=phases)) is None


def test_switching_through_the_stage_gives_plain_training_in_between():
    stage = Stage([(TECHNIQUE, {})], lambda *_: None)
    session, plain = Session(stage, "mlp"), Session(None, "mlp")
    stage.switch([])
    assert [session.step(), session.step()] == [plain.step(), plain.step()]
    stage.switch(["bf16"])
    assert session.step() != plain.step()
    stage.close()
    assert TECHNIQUE.at(OptimizerSeen(optimizer=session.optimizer), {}) is None


@pytest.mark.cuda
def test_on_cuda():
    net = Recorder().cuda()
    y = call(applied_to(net), net, torch.ones(1, 4, device="cuda"))
    assert net.dtypes == [torch.bfloat16] and y.dtype is torch.float32
