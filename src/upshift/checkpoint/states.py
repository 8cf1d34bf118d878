"""state.json: a part per rank, with all of its state that is no tensor; bounded before anything is made of it."""

from __future__ import annotations

from typing import Any

import msgspec

from upshift.checkpoint.manifest import STATE
from upshift.errors import CheckpointError

#: A larger state.json is refused. A training of 10,000 parameters takes about 5 MB of it.
MAX_STATE = 32 * 2**20

#: Brackets and commas in a rank's part, which bound how many values parsing can make: at most about 60 MB of them.
MAX_SIGNS = 1_500_000

_LONG = "Keep long lists of numbers in tensors."


class RankState(msgspec.Struct, forbid_unknown_fields=True):
    """What one rank wrote: the skeleton of its state, and dtypes that the format of the tensors lacks."""

    tree: Any
    dtypes: dict[str, str] = {}


class _State(msgspec.Struct, forbid_unknown_fields=True):
    schema: int
    ranks: list[msgspec.Raw]


def rank_state(data: bytes | bytearray, world: int, rank: int) -> RankState:
    """The part of a rank in the bytes of state.json.

    Raises:
        CheckpointError: it is of another version or number of ranks, or holds more than it may.
    """
    try:
        state = msgspec.json.decode(data, type=_State)
        if state.schema != 1 or len(state.ranks) != world:
            raise CheckpointError(f"{STATE} belongs to another version or number of ranks.")
        check_values(bytes(state.ranks[rank]))
        return msgspec.json.decode(state.ranks[rank], type=RankState)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{STATE} cannot be read: {error!s:.200}.") from None


def state_file(ranks: list[Any]) -> bytes:
    """The bytes of state.json, a part per rank.

    Raises:
        CheckpointError: larger than what is read back.
    """
    parts = [msgspec.json.encode(part) for part in ranks]
    for part in parts:
        check_values(part)
    data = msgspec.json.encode(_State(1, [msgspec.Raw(part) for part in parts]))
    if len(data) > MAX_STATE:
        raise CheckpointError(f"{STATE} has {len(data):,} bytes, more than {MAX_STATE:,}.", remedy=_LONG)
    return data


def check_values(part: bytes) -> None:
    """Raises CheckpointError where a rank's part holds more values than are read back."""
    # Every value but the first follows a bracket or a comma.
    if (signs := sum(part.count(sign) for sign in (b"[", b"{", b","))) > MAX_SIGNS:
        raise CheckpointError(f"{STATE} holds up to {signs:,} values, more than {MAX_SIGNS:,}.", remedy=_LONG)
