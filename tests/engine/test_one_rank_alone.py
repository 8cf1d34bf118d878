"""Timing one rank alone: nothing of the training changes, every figure is what the clock says, unknown has a reason."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import ranked
from hypothesis import given
from hypothesis import strategies as st

from upshift.engine import scaling
from upshift.engine.group import SAFE_STEPS
from upshift.engine.scaling import LEAST_QUADS, SHARE, WARM, efficiency, not_measured, schedule, sentence

# -- what is timed ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**7), st.booleans())
def test_few_updates_are_made_in_turn_and_as_many_together(left: int, overlaps: bool) -> None:
    kinds, why = schedule(left, sharded=False, overlaps=overlaps)
    assert bool(kinds) != bool(why)
    assert kinds.count("turn") == kinds.count("together") <= left * SHARE
    assert kinds.count("turn") % 2 == 0
    if kinds:
        assert kinds[:WARM] == [""] * WARM and kinds[WARM] and kinds[-1]
    if kinds and overlaps:
        # torch's reducer takes over after SAFE_STEPS updates: before it all turns, afterwards what is timed together.
        assert "turn" not in kinds[SAFE_STEPS:] and "together" not in kinds[: SAFE_STEPS + 1]


def test_drift_of_the_machine_cancels() -> None:
    kinds, _ = schedule(10**6, sharded=False, overlaps=False)
    for first in range(WARM, len(kinds), 4):
        places = [i for i in range(4) if kinds[first + i] == "turn"]
        assert sum(places) == 3  # as many before as after the middle


def test_what_cannot_be_timed_has_a_reason() -> None:
    assert "sharded" in schedule(10**6, sharded=True, overlaps=False)[1]
    assert "not known" in schedule(None, sharded=False, overlaps=False)[1]
    least = int(2 * LEAST_QUADS / SHARE)
    assert f"runs of {least:,} updates or more" in schedule(least - 1, sharded=False, overlaps=False)[1]
    assert schedule(least, sharded=False, overlaps=False)[0]
    assert "unknown: sharded" in sentence(1500.0, 2, not_measured("sharded"))


def test_the_ratio_has_bounds() -> None:
    found = efficiency([1500.0, 1600.0, 1400.0], 2, [1000.0, 1000.0, 1000.0])
    assert found.value == pytest.approx((1.5 * 1.6 * 1.4) ** (1 / 3) / 2)
    assert found.low is not None and found.high is not None and found.low < 0.75 < found.high and found.n == 3
    with pytest.raises(ValueError, match="positive"):
        efficiency([0.0], 2, [1.0])
    with pytest.raises(ValueError, match="pairs"):
        efficiency([1.0], 2, [1.0, 2.0])


# -- two ranks -------------------------------------------------------------------------------------------------------


def _train(ports: list[int]) -> Any:
    return [_trained(port, share) for port, share in zip(ports, (SHARE, 0.5), strict=True)]


def _trained(port: int, share: float) -> Any:
    import os

    import tiny_jobs
    import torch

    from upshift.engine.run import train_job
    from upshift.engine.settings import Execution

    os.environ["MASTER_PORT"] = str(port)
    scaling.SHARE = share
    said: list[str] = []
    order: list[Any] = []
    # Augmented samples, dropout, batch normalisation, an average of the weights, a schedule, clipping, accumulation.
    settings = Execution(
        device="cpu", micro_batch=10, signals=False, say=said.append, on_batch=lambda *batch: order.append(batch)
    )
    result = train_job(tiny_jobs.augmented.set(epochs=5, metrics={}), settings)
    state = result.model.state_dict().values()  # type: ignore[union-attr]
    return {
        "weights": hashlib.sha256(b"".join(value.numpy().tobytes() for value in state)).hexdigest(),
        "random": torch.randn(3).tolist(),  # where the random stream has come to
        "order": json.dumps(order),
        "metrics": result.metrics,
        "said": [text for text in said if "scaling" in text],
    }


def test_a_training_is_the_same_with_and_without_it_bit_for_bit(tmp_path: Any) -> None:
    ports = [ranked.free_port(), ranked.free_port()]
    found = ranked.run(2, _train, ports, folder=tmp_path)
    for plain, timed in found:
        for what in ("weights", "random", "order", "metrics"):
            assert plain[what] == timed[what], what
    plain, timed = (item["said"][0] for item in found[0])
    assert "unknown: one rank alone is timed in runs of 600 updates or more, this one makes 35" in plain
    assert "measured in 24 updates" in timed and "rank 0 with the others waiting" in timed


# -- the clock -------------------------------------------------------------------------------------------------------


def _slept(compute: float, exchange: float) -> Any:
    """Turns over sleeps: what each figure has to be is known."""
    import time

    import torch

    from upshift.engine.batches import Batch, Part
    from upshift.engine.group import Group

    with Group.here(device="cpu") as group:
        kinds, _ = schedule(10**6, sharded=False, overlaps=False)
        turns = scaling.Turns(group, kinds)
        part = Part(None, 1.0, torch.arange(8), 8)
        found = None
        for _ in kinds:
            turns.begins(Batch([part], 16))
            time.sleep(compute)
            turns.computed()
            group.agree([0.0])
            time.sleep(exchange)
            turns.agreed()
            found = turns.ends()
        if found is None:
            return None
        return [found.alone, found.together, found.efficiency.value, found.updates, turns.over]


def test_the_exchange_is_what_is_lost(tmp_path: Any) -> None:
    first, second = ranked.run(2, _slept, 0.01, 0.01, folder=tmp_path)
    alone, together, ratio, updates, over = first
    assert second is None and over and updates == 24
    # 8 samples in 10 ms alone; 16 in 20 ms together: half of twice as many. Sleeps only ever take longer.
    assert alone <= 8 / 0.01 and together <= 16 / 0.02
    assert ratio == pytest.approx(together / (2 * alone), rel=0.05)
    assert 0.2 < ratio < 0.9
