"""What is tried where: a technique never run on a kind of device is left off there, and the reason says so."""

from __future__ import annotations

import pytest

from upshift.search.candidates import candidates
from upshift.techniques import registry
from upshift.testing.contract import measurement

NEVER_ON_CUDA = ("tf32", "cudnn_benchmark", "expandable_segments", "device_dataset", "prefetch", "fused", "compile")


def found(names, **more):
    facts = {"device": more.pop("device", "cuda:0"), "compiler": True}
    techniques = [registry.get(name) for name in names]
    return candidates(techniques, measurement(**facts), **more)


def test_on_cuda_nothing_untested_is_tried_and_the_reason_says_how_to():
    tried, refused = found(NEVER_ON_CUDA)
    assert not tried
    reasons = {trial.name: trial.reason for trial in refused}
    for name in ("tf32", "cudnn_benchmark", "expandable_segments", "fused"):
        assert reasons[name] == f"untested on cuda; --untested or --only {name} would try it"
    assert all(trial.outcome == "not applicable" for trial in refused)


def test_asked_for_it_is_tried():
    tried, _ = found(NEVER_ON_CUDA, untested=True)
    assert {"tf32", "cudnn_benchmark", "expandable_segments", "fused", "compile"} <= {item.name for item in tried}
    tried, refused = found(NEVER_ON_CUDA, only=("tf32",))
    assert [item.name for item in tried] == ["tf32"]
    assert {trial.reason for trial in refused} == {"not asked for"}


@pytest.mark.parametrize("name", ["tf32", "cudnn_benchmark", "expandable_segments", "device_dataset", "prefetch"])
def test_on_a_cpu_the_reason_is_that_it_does_not_apply(name):
    tried, refused = found([name], device="cpu", untested=True)
    assert not tried and "untested" not in refused[0].reason


def test_techniques_that_save_memory_take_part_under_a_limit_only():
    from upshift.testing.seen import BLOCKS

    seen, technique = measurement(models=(BLOCKS,)), registry.get("activation_checkpointing")
    found, refused = candidates([technique], seen)
    assert not found and "--fit" in refused[0].reason
    assert candidates([technique], seen, fit=True)[0] and candidates([technique], seen, only=[technique.card.name])[0]
