"""The loss of a backward pass, as it is kept until it is read."""

from __future__ import annotations

import pytest
import torch

from upshift.hook.peek import start_value


def test_on_the_cpu_it_is_a_number():
    loss = torch.tensor(2.5, requires_grad=True)
    assert start_value(loss, torch.Tensor) == 2.5
    assert start_value([loss, loss], torch.Tensor) == 5.0
    assert start_value(torch.ones(2), torch.Tensor) is None


def test_on_a_device_it_is_a_copy_without_a_graph():
    loss = torch.ones((), device="meta", requires_grad=True) * 2
    found = start_value(loss, torch.Tensor)
    loss.detach().mul_(3)  # a write to the same memory
    assert not found.requires_grad and loss._version == 1 and found._version == 0


@pytest.mark.cuda
def test_on_cuda_it_stays_what_it_was():
    loss = torch.full((), 2.0, device="cuda", requires_grad=True) * 1
    found = start_value(loss, torch.Tensor)
    with torch.no_grad():
        loss.mul_(3)
    assert float(found) == 2.0
