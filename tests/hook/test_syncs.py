"""Waits are found by line. The device is played by tensors marked as being on it; the CUDA test uses a real one."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch

from upshift.hook.syncs import COPYING, WAITING, Syncs


def make_watch() -> Any:
    return types.SimpleNamespace(thread=threading.get_ident(), sync=0.0, h2d=0.0, accounted=0.0, inner=0.0)


def test_waits_are_charged_to_the_line_that_waits_and_everything_is_restored() -> None:
    before = {name: getattr(torch.Tensor, name) for name in (*WAITING, *COPYING)}
    watch = make_watch()
    device = {id(value): value for value in (torch.ones(1), torch.zeros(3))}
    one, three = device.values()
    syncs = Syncs(watch, lambda name: name == __file__, on_device=lambda tensor: id(tensor) in device)
    syncs.install(torch)
    try:
        for _ in range(5):
            assert one.item() == 1.0
        assert three.tolist() == [0.0, 0.0, 0.0]
        assert float(one) == 1.0 and bool(one)
        torch.ones(2).tolist()  # on the host: no wait
    finally:
        syncs.close()
    lines = {line.text: line for line in syncs.lines(5, 1.0)}
    assert lines["assert one.item() == 1.0"].seconds.n == 5
    assert lines["assert three.tolist() == [0.0, 0.0, 0.0]"].seconds.n == 1
    assert not any("torch.ones(2)" in text for text in lines)
    assert watch.sync > 0 and watch.sync == pytest.approx(watch.accounted)
    assert {name: getattr(torch.Tensor, name) for name in before} == before


def test_copies_to_the_device_are_no_waits() -> None:
    watch = make_watch()
    source = torch.ones(4)
    syncs = Syncs(watch, lambda name: name == __file__, on_device=lambda tensor: tensor.dtype == torch.float64)
    syncs.install(torch)
    try:
        source.to(torch.float64)
    finally:
        syncs.close()
    assert watch.h2d > 0 and watch.sync == 0.0 and not syncs.lines(1, 1.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_item_on_cuda_is_a_wait() -> None:
    watch = make_watch()
    syncs = Syncs(watch, lambda name: name == __file__)
    value = torch.ones(1, device="cuda")
    syncs.install(torch)
    try:
        value.item()
    finally:
        syncs.close()
    (line,) = syncs.lines(1, 1.0)
    assert line.text == "value.item()"
