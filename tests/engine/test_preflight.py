"""Before the first step: who did not come, who holds another job, and whether sums are right."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ranked
import torch.distributed as dist

from upshift.engine.group import Group
from upshift.engine.preflight import ELEMENTS, _right, meet, preflight
from upshift.errors import DistributedError


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(ranked.free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(DistributedError, match=r"ranks 1, 2 of 3 did not come within 300 ms") as caught:
        meet(0, 3, 0.3)
    assert caught.value.remedy and caught.value.exit_code == 75
    monkeypatch.setenv("MASTER_PORT", str(ranked.free_port()))
    with pytest.raises(DistributedError, match="rank 0 did not come"):
        meet(1, 2, 1.0)


def _said(call: Any) -> str:
    try:
        call()
    except DistributedError as error:
        return str(error)
    return ""


def _checks() -> Any:
    with Group.here(device="cpu") as group:
        ready = preflight(group, digest="a1", parameters=10)
        other = _said(lambda: preflight(group, digest=f"a{group.rank}", parameters=10 + group.rank))

        def corrupt(vector: Any) -> None:
            dist.all_reduce(vector)
            if group.rank == 1:
                vector[17] += 1.0

        wrong = _said(lambda: _right(group, corrupt))
        absent = _said(lambda: preflight(group, timeout=0.5)) if group.rank == 0 else time.sleep(1.5)
        group.barrier()
        return {"ready": [ready.world, ready.bytes, ready.seconds], "other": other, "wrong": wrong, "absent": absent}


def test_ranks_check_each_other(tmp_path):
    first, second = ranked.run(2, _checks, folder=tmp_path)
    world, size, seconds = first["ready"]
    assert first["ready"] == second["ready"] and (world, size) == (2, 4 * ELEMENTS) and seconds > 0
    assert first["other"] == second["other"]
    assert "the job's description is 'a1' on rank 1 and 'a0' on rank 0" in first["other"]
    assert "the number of parameters is 11 on rank 1" in first["other"]
    assert first["wrong"] == second["wrong"] and f"1 of {ELEMENTS} on rank 1" in first["wrong"]
    assert "rank 1 of 2 did not come within 500 ms" in first["absent"]
