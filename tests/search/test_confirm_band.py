"""What the confirmation leaves for the guard of the real run: a band of the stock loss, or why there is none."""

from __future__ import annotations

import pytest

from upshift.records.trial import Proof
from upshift.search.confirm import with_band


def proof(steps):
    losses = tuple(3.0 * (t + 1) ** -0.3 for t in range(steps))
    return Proof(rung="trajectory", passed=True, reason="", steps=steps, stock_losses=losses)


def plain(steps, **more):
    return with_band(proof(steps), **{"several": False, "rescaled": False, "dropout": False, **more})


def test_band_reaches_over_the_steps_compared():
    found = plain(200)
    assert found.band.first[0] == 0 and found.band.horizon == 200 and found.no_band == ""


def test_steps_with_dropout_off_are_not_in_it():
    assert plain(200, dropout=True).band.first[0] == 12


@pytest.mark.parametrize(
    ("steps", "more", "names"),
    [
        (200, {"several": True}, "several optimizers"),
        (200, {"rescaled": True}, "GradScaler"),
        (20, {"dropout": True}, "8 steps are too few"),
        (0, {}, "0 steps are too few"),
    ],
)
def test_where_there_is_none_the_reason_is_kept(steps, more, names):
    found = plain(steps, **more)
    assert found.band is None and names in found.no_band
