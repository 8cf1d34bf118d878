"""tf32: both interfaces agree, what the script decided wins, and everything is put back."""

from __future__ import annotations

import warnings

import msgspec
import pytest
import torch

from upshift.records.measurement import Floor, ModelFacts
from upshift.records.quantity import unknown
from upshift.sites import ModelSeen, NoEffect, Numerics
from upshift.techniques.tf32 import Tf32, Tf32Applied
from upshift.testing.contract import build, measurement

TECHNIQUE = Tf32()
MATMUL = torch.backends.cuda.matmul


def put_back():
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def untouched():
    put_back()
    yield
    put_back()


def state():
    """What both interfaces say; the old one raises where they disagree."""
    return (
        MATMUL.fp32_precision,
        MATMUL.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.allow_tf32,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


def test_both_interfaces_agree_while_on_and_are_as_before_when_off():
    before = state()
    assert before[:3] == ("none", False, "highest")
    applied = Tf32Applied()
    assert state()[:3] == ("tf32", True, "high") and state()[3:] == before[3:]
    applied.switch(False)
    assert state() == before
    applied.switch(True)
    assert state()[:3] == ("tf32", True, "high")
    applied.close()
    applied.close()
    assert state() == before and applied.effect() is None


def test_it_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tf32Applied().close()


@pytest.mark.parametrize("later", [lambda: setattr(MATMUL, "allow_tf32", False),
                                   lambda: torch.set_float32_matmul_precision("highest"),
                                   lambda: setattr(MATMUL, "fp32_precision", "ieee")])  # fmt: skip
def test_what_the_script_sets_later_stays(later):
    applied = Tf32Applied()
    later()
    assert isinstance(applied.effect(), NoEffect)
    applied.close()
    assert MATMUL.fp32_precision == "ieee"
    applied.switch(True)
    assert MATMUL.fp32_precision == "ieee"


def test_check_and_numerics():
    model = ModelFacts(name="Net", parameters=10, dtypes=("float32",), device="cuda:0", layers={"Linear": 2})
    cuda = {"device": "cuda:0", "models": (model,)}
    found = TECHNIQUE.check(measurement(**cuda))
    assert found.applies and found.gain > 1.0 and found.rests_on
    for other in (
        {},
        {**cuda, "autocast": True},
        {**cuda, "create_graph": True},
        {**cuda, "bf16_native": False},
        {**cuda, "models": (msgspec.structs.replace(model, dtypes=("bfloat16",)),)},
        {**cuda, "models": ()},
    ):
        assert not TECHNIQUE.check(measurement(**other)).applies, other
    none = unknown("1")
    floor = Floor(none, none, "tf32", none, "bfloat16", none, none, none, none, none)
    assert not TECHNIQUE.check(msgspec.structs.replace(measurement(**cuda), floor=floor)).applies
    assert TECHNIQUE.numerics({}, measurement().facts) is Numerics.ROUNDING


def test_a_model_on_the_cpu_is_left_alone():
    before = state()
    assert isinstance(TECHNIQUE.at(ModelSeen(module=build("mlp")), {}), NoEffect)
    assert state() == before


def error(a, b):
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


@pytest.mark.cuda
def test_on_cuda_products_are_rounded_while_on_and_only_then():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    a, b = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    plain = a @ b
    assert error(a, b) < 1e-6
    applied = TECHNIQUE.at(ModelSeen(module=torch.nn.Linear(2, 2).cuda()), {})
    assert isinstance(applied, Tf32Applied)
    assert 1e-5 < error(a, b) < 2e-3  # 10 bits of mantissa
    applied.switch(False)
    assert torch.equal(a @ b, plain)
    applied.switch(True)
    applied.close()
    assert torch.equal(a @ b, plain)


@pytest.mark.cuda
@pytest.mark.parametrize("set_by", ["old", "new"])
def test_on_cuda_what_the_script_set_wins(set_by):
    if set_by == "old":
        torch.set_float32_matmul_precision("highest")
    else:
        MATMUL.fp32_precision = "ieee"
    assert isinstance(TECHNIQUE.at(ModelSeen(module=torch.nn.Linear(2, 2).cuda()), {}), NoEffect)
    assert MATMUL.fp32_precision == "ieee"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        put_back()
        assert "autocast" in TECHNIQUE.at(ModelSeen(module=torch.nn.Linear(2, 2).cuda()), {}).reason
