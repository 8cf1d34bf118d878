"""What ranks tell each other beside the training: it arrives, or it is said why not, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from upshift.checkpoint.ranks import Ranks
from upshift.engine.channel import MOST, Channel
from upshift.errors import CheckpointError


def channels(world: int = 2, timeout: float = 20.0, **more: Any) -> tuple[Any, list[Channel]]:
    store = dist.HashStore()
    return store, [Channel(store, rank, world, timeout=timeout, **more) for rank in range(world)]


def together(*acts: Any) -> list[Any]:
    """What each returned or raised, all at once."""
    found: list[Any] = [None] * len(acts)

    def one(place: int) -> None:
        try:
            found[place] = acts[place]()
        except CheckpointError as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=(place,), daemon=True) for place in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return found


def test_all_arrives_in_order_and_nothing_is_left_in_the_store() -> None:
    store, ranks = channels(3)

    def talk(rank: int) -> Any:
        return [
            (ranks[rank].gather({"rank": rank, "n": n, "text": "ä" * n}), ranks[rank].broadcast([rank, n, None]))
            for n in range(20)
        ]

    first, *others = together(*(lambda rank=rank: talk(rank) for rank in range(3)))
    for n, (said, verdict) in enumerate(first):
        assert said == [{"rank": rank, "n": n, "text": "ä" * n} for rank in range(3)] and verdict == [0, n, None]
    assert all(other == [(None, [0, n, None]) for n in range(20)] for other in others)
    assert store.num_keys() <= 2  # the last verdict


def test_a_text_larger_than_an_entry_of_the_store() -> None:
    store, ranks = channels()
    text = "x" * (2 * MOST + 5)
    first, second = together(lambda: ranks[0].gather(0), lambda: ranks[1].gather(text))
    assert first == [0, text] and second is None
    assert store.num_keys() <= 1


def test_a_silent_rank_fails_the_exchange_on_all_and_the_next_one_goes_well() -> None:
    _, channel = channels(timeout=0.3)
    ranks = [Ranks(rank, 2, channel[rank].gather, channel[rank].broadcast) for rank in range(2)]

    def late() -> Any:
        time.sleep(0.6)
        with pytest.raises(CheckpointError, match="rank 1 did not answer within 300 ms"):
            ranks[1].decide(lambda said: "first", lambda: 1)
        return ranks[1].decide(lambda said: "second", lambda: 2)

    def root() -> Any:
        with pytest.raises(CheckpointError, match="rank 1 did not answer within 300 ms"):
            ranks[0].decide(lambda said: "first", lambda: 1)
        time.sleep(0.4)
        return ranks[0].decide(lambda said: f"second {said}", lambda: 2)

    assert together(root, late) == ["second [2, 2]", "second [2, 2]"]


def test_a_rank_left_without_a_verdict_says_no_more() -> None:
    """What it said later could be taken for the answer to another question."""
    _, channel = channels(timeout=0.1)
    ranks = Ranks(1, 2, channel[1].gather, channel[1].broadcast)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="rank 0 did not answer"):
            ranks.decide(lambda said: None)
    with pytest.raises(CheckpointError, match="rank 1 did not answer"):
        for _ in range(2):
            channel[0].gather(None)


def test_a_rank_that_is_gone_is_not_waited_for() -> None:
    gone = [""]
    _, channel = channels(timeout=600.0, lost=lambda: gone[0])

    def lose() -> None:
        time.sleep(0.2)
        gone[0] = "rank 1 is gone (process 7)"

    error, _ = together(lambda: channel[0].gather(0), lose)
    assert "rank 1 is gone (process 7)" in error.message


def test_closing_ends_what_waits() -> None:
    _, channel = channels(timeout=600.0)

    def end() -> None:
        time.sleep(0.2)
        channel[1].close()

    error, _ = together(lambda: channel[1].broadcast(None), end)
    assert "the run is over" in error.message


def test_a_store_that_is_gone_is_said() -> None:
    class Gone:
        def set(self, name: str, text: str) -> None:
            raise dist.DistNetworkError("connection reset by peer\nand so on")

    with pytest.raises(CheckpointError, match=r"cannot be reached: connection reset by peer\n"):
        Channel(Gone(), 1, 2, timeout=1.0).gather(1)
