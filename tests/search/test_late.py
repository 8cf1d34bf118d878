"""The late step through real processes: what begins late is seen, although the losses do not tell yet."""

from __future__ import annotations

import pytest

from upshift.hook.process import HookRunner
from upshift.search.duel import Duel
from upshift.search.late import late_step
from upshift.search.selftest.planted import Planting, planted, tiny


@pytest.mark.parametrize(
    ("fault", "size", "said"),
    [
        ("dropped_gradient", 1.0, "at step 17, from one and the same state, the gradients differ more"),
        ("dropout_off", 1.0, "dropout draws no mask, "),
        ("loss_scale", 1e-7, ""),
    ],
)
def test_what_is_seen(tmp_path, fault, size, said):
    script = tiny("--model", "mlp", "--batch-size", "8", "--dropout", "0.3")
    duel = Duel(Planting(HookRunner(scratch=tmp_path)), script, timeout=120.0, patience=240.0)
    try:
        a = duel.start({})
        b = duel.start(planted(fault=fault, size=size, from_step=14))
        duel.level(16)
        found = late_step(duel, a, b, "float32")
        assert said in found and bool(found) == bool(said)
        assert a.losses[16] == pytest.approx(b.losses[16], rel=1e-6), "the same batch, the same state, no dropout"
    finally:
        duel.close()
