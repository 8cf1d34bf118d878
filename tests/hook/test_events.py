"""Device time by events, against a device that only exists as a queue."""

from __future__ import annotations

import pytest
import torch
from watched import Keeping, watched

from upshift.hook.events import WAITING_STEPS, DevicePhases, StreamEvent


class Device:
    """Kernels take a fixed time each; an event happens when the device has come that far."""

    def __init__(self) -> None:
        self.queued = 0.0
        self.done = 0.0

    def event(self):
        device = self

        class Event:
            at = 0.0

            def record(self):
                self.at = device.queued

            def query(self):
                return device.done >= self.at

            def elapsed_time(self, end):
                assert self.query() and end.query(), "an event that has not happened must not be read"
                return (end.at - self.at) * 1e3

        return Event()


class Model(torch.nn.Module):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.device = device

    def forward(self, x):
        self.device.queued += 3.0
        y = self.layer(x)
        y.register_hook(lambda gradient: setattr(self.device, "queued", self.device.queued + 5.0))
        return y


def train(device: Device, phases_of, steps: int, lag: float) -> DevicePhases:
    with watched(Keeping()) as seen:
        model = Model(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        phases = None
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 2)).mean()
            with torch.no_grad():
                model.layer(torch.ones(1, 2))
            loss.backward()
            optimizer.step()
            if phases is None:
                phases = phases_of(seen.watch)
                phases.install(torch)
            else:
                device.done = max(device.queued - lag, device.done)
                phases.after_step()
        phases.close()
    assert phases is not None
    return phases


@pytest.mark.parametrize("lag", [0.0, 20.0])
def test_phases_are_the_time_between_their_events(lag):
    device = Device()
    phases = train(device, lambda watch: DevicePhases(watch, device.event), 12, lag)
    found = {name: quantity.value for name, quantity in phases.seconds(2).items()}
    assert found == {"forward": 3.0, "backward": 5.0, "optimizer": 0.0}
    assert phases.dropped == 0


def test_a_device_that_never_comes_along_is_unknown_not_zero():
    device = Device()
    phases = train(device, lambda watch: DevicePhases(watch, device.event), WAITING_STEPS + 12, 1e9)
    assert phases.seconds(0) == {} and phases.dropped > 0


def test_closing_puts_everything_back():
    device = Device()
    before = (torch.nn.Module.__call__, torch.autograd.backward)
    train(device, lambda watch: DevicePhases(watch, device.event), 3, 0.0)
    assert (torch.nn.Module.__call__, torch.autograd.backward) == before


@pytest.mark.cuda
def test_on_a_device_the_backward_takes_longer_than_nothing():
    with watched(Keeping()) as seen:
        model = torch.nn.Linear(2048, 2048).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.ones(2048, 2048, device="cuda")
        phases = DevicePhases(seen.watch, lambda: StreamEvent(torch, torch.device("cuda")))
        for step in range(20):
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()
            if step == 0:
                phases.install(torch)
            else:
                phases.after_step()
        torch.cuda.synchronize()
        phases.after_step()
        phases.close()
    assert phases.seconds(5)["backward"].value > 1e-5
