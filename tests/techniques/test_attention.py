"""attention: the kernel asked for is the one that runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from upshift.records.measurement import ModelFacts
from upshift.sites import ModelSeen, NoEffect, Numerics
from upshift.techniques.attention import Attention, _allowed
from upshift.testing.contract import build, measurement

TECHNIQUE = Attention()


def kernels(call):
    """Names of attention operators that really ran."""
    with profile() as seen:
        call()
    return {event.key for event in seen.key_averages() if "scaled_dot_product" in event.key}


def applied_to(module, kernel="math"):
    outcome = TECHNIQUE.at(ModelSeen(module=module), {"kernel": kernel})
    assert not isinstance(outcome, NoEffect), outcome
    return outcome


def test_the_plain_product_replaces_flash_attention():
    net, x = build("attention"), torch.randn(2, 12, 16)
    assert any("flash" in name for name in kernels(lambda: net(x)))
    applied = applied_to(net)
    ran = kernels(lambda: applied.around(net, net, (x,), {}))
    assert any("math" in name for name in ran) and not any("flash" in name for name in ran)
    exact = net.double()(x.double())
    assert torch.allclose(applied.around(net.float(), net, (x,), {}).double(), exact, atol=1e-5)


def test_flags_are_as_before_after_each_call_and_after_an_error():
    net = build("attention")
    applied = applied_to(net)
    before = (_allowed(), torch._C._get_sdp_priority_order())
    applied.around(net, net, (torch.randn(2, 12, 16),), {})
    with pytest.raises(RuntimeError):
        applied.around(net, net, (torch.randn(2, 12, 3),), {})
    assert (_allowed(), torch._C._get_sdp_priority_order()) == before


def test_a_region_of_the_scripts_own_is_left_alone():
    net, x = build("attention"), torch.randn(2, 12, 16)
    applied = applied_to(net)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        ran = kernels(lambda: applied.around(net, net, (x,), {}))
    assert any("flash" in name for name in ran)


def test_off_is_the_usual_choice():
    net, x = build("attention"), torch.randn(2, 12, 16)
    applied = applied_to(net)
    applied.switch(False)
    assert any("flash" in name for name in kernels(lambda: applied.around(net, net, (x,), {})))


@pytest.mark.parametrize(("kernel", "reason"), [("flash", "already"), ("efficient", "CPU"), ("cudnn", "CPU")])
def test_what_changes_nothing_on_the_cpu_says_so(kernel, reason):
    outcome = TECHNIQUE.at(ModelSeen(module=build("attention")), {"kernel": kernel})
    assert isinstance(outcome, NoEffect) and reason in outcome.reason


def test_flash_does_act_where_the_script_allows_only_the_plain_product():
    net, x = build("attention"), torch.randn(2, 12, 16)
    with sdpa_kernel(SDPBackend.MATH):
        assert isinstance(TECHNIQUE.at(ModelSeen(module=net), {"kernel": "math"}), NoEffect)
        applied = applied_to(net, "flash")
        assert any("flash" in name for name in kernels(lambda: applied.around(net, net, (x,), {})))


def test_a_model_without_attention_is_found_out_in_its_first_call():
    net = build("mlp")
    applied = applied_to(net)
    applied.around(net, net, (torch.randn(2, 16),), {})
    assert "scaled_dot_product_attention" in applied.effect().reason
    net = build("attention")
    applied = applied_to(net)
    applied.around(net, net, (torch.randn(2, 12, 16),), {})
    assert applied.effect() is None


def test_attention_is_seen_although_somebody_has_wrapped_the_function(monkeypatch):
    function = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **more: function(*args, **more))
    net = build("attention")
    applied = applied_to(net)
    applied.around(net, net, (torch.randn(2, 12, 16),), {})
    assert applied.effect() is None


def test_code_compiled_later_is_compiled_once():
    """Watching is a mode that guards see: a first call under it would be compiled for that call alone."""
    from torch._dynamo.testing import CompileCounter

    inner, x, counter = build("attention"), torch.randn(2, 12, 16), CompileCounter()
    net = nn.Sequential(inner)
    applied = applied_to(net)
    inner.compile(backend=counter)
    for _ in range(2):
        applied.around(net, net, (x,), {})
    assert counter.frame_count == 1 and applied.effect() is None


def test_multi_head_attention_of_torch_counts_as_attention():
    net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    applied = applied_to(net)
    applied.around(net, net, (torch.randn(2, 5, 16),), {})
    assert applied.effect() is None


def test_gradients_agree_with_float64():
    net, x = build("attention"), torch.randn(2, 12, 16)
    applied_to(net).around(net, net, (x,), {}).square().sum().backward()
    found = {name: item.grad.double() for name, item in net.named_parameters()}
    net.zero_grad()
    net.double()(x.double()).square().sum().backward()
    for name, item in net.named_parameters():
        assert torch.allclose(found[name], item.grad, rtol=1e-4, atol=1e-5), name


def test_check_and_numerics():
    assert TECHNIQUE.check(measurement()).candidates == ({"kernel": "math"},)
    assert not TECHNIQUE.check(measurement(attention=False)).applies
    assert not TECHNIQUE.check(measurement(create_graph=True)).applies
    cuda = TECHNIQUE.check(measurement(device="cuda:0")).candidates
    assert {item["kernel"] for item in cuda} == {"math", "flash", "efficient", "cudnn"}
    plain = ModelFacts(name="Net", parameters=1, dtypes=("float32",), device="cpu", layers={"Linear": 2})
    assert TECHNIQUE.numerics({}, measurement(models=(plain,)).facts) is Numerics.ROUNDING
    assert TECHNIQUE.numerics({}, measurement().facts) is Numerics.RESEEDS


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "math"])
def test_on_cuda(kernel):
    net, x = build("attention").cuda().half(), torch.randn(2, 12, 16, device="cuda").half()
    applied = applied_to(net, kernel)
    assert torch.allclose(applied.around(net, net, (x,), {}).float(), net(x).float(), atol=2e-2)
