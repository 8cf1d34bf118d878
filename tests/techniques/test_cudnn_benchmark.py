"""cudnn_benchmark: the flag goes on and comes back, and is given up where inputs keep changing shape."""

from __future__ import annotations

import pytest
import torch

from upshift.records.measurement import ModelFacts
from upshift.sites import ModelSeen, NoEffect
from upshift.techniques.cudnn_benchmark import SHAPES, CudnnBenchmark, CudnnBenchmarkApplied
from upshift.testing.contract import build, measurement

TECHNIQUE = CudnnBenchmark()
CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def untouched():
    yield
    CUDNN.benchmark, CUDNN.deterministic = False, False


def test_the_flag_comes_back():
    applied = CudnnBenchmarkApplied()
    assert CUDNN.benchmark
    applied.close()
    CUDNN.benchmark = True  # by the script, afterwards
    applied.close()
    assert CUDNN.benchmark


def test_a_few_shapes_are_measured_and_many_give_up():
    net, applied = torch.nn.Conv1d(2, 2, 1), CudnnBenchmarkApplied()
    for length in [*range(1, SHAPES + 1)] * 3:
        assert applied.around(net, net, (torch.ones(1, 2, length),), {}).shape == (1, 2, length)
    assert CUDNN.benchmark and applied.effect() is None
    applied.around(net, net, (torch.ones(1, 2, 100),), {})
    assert not CUDNN.benchmark and "shapes" in applied.effect().reason


def test_what_the_script_sets_later_is_said():
    applied = CudnnBenchmarkApplied()
    CUDNN.benchmark = False
    assert isinstance(applied.effect(), NoEffect)


def test_check():
    convolutional = ModelFacts(name="Net", parameters=1, dtypes=("float32",), device="cuda:0", layers={"Conv2d": 3})
    linear = ModelFacts(name="Net", parameters=1, dtypes=("float32",), device="cuda:0", layers={"Linear": 3})
    assert TECHNIQUE.check(measurement(device="cuda:0", models=(convolutional,))).applies
    assert not TECHNIQUE.check(measurement(device="cuda:0", models=(linear,))).applies
    assert not TECHNIQUE.check(measurement(models=(convolutional,))).applies


def test_a_model_on_the_cpu_is_left_alone():
    assert isinstance(TECHNIQUE.at(ModelSeen(module=build("conv")), {}), NoEffect) and not CUDNN.benchmark


@pytest.mark.cuda
def test_on_cuda():
    net, x = build("conv").cuda(), torch.randn(8, 3, 8, 8, device="cuda")
    plain = net.eval()(x)
    applied = TECHNIQUE.at(ModelSeen(module=net), {})
    assert CUDNN.benchmark and "already" in TECHNIQUE.at(ModelSeen(module=net), {}).reason
    assert torch.allclose(applied.around(net, net, (x,), {}), plain, rtol=1e-2, atol=1e-3)
    applied.close()
    assert not CUDNN.benchmark
    assert isinstance(TECHNIQUE.at(ModelSeen(module=build("mlp").cuda()), {}), NoEffect)
    CUDNN.deterministic = True
    assert "deterministic" in TECHNIQUE.at(ModelSeen(module=net), {}).reason
