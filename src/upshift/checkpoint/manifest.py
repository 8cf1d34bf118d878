"""The manifest of a checkpoint: which files belong to it, their sizes and digests, and what is known about it.

    {"sha256": "<of the exact bytes of the manifest below>",
    "manifest": {"step": 1200, "files": {"rank-0-of-1.safetensors": {"size": ..., "sha256": ...}, ...}, ...}}

The schema is closed. File names follow from the number of ranks, so a manifest cannot name a path; every bound is
checked before anything is parsed or allocated. A change of one bit anywhere in the file is found.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated, Any

import msgspec

from upshift.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"

#: A larger manifest is not one of ours (four ranks take less than 2 KiB beside the facts).
MAX_BYTES = 4 * 2**20
MAX_STEP = 10**15
MAX_WORLD = 10_000

_MAX_FACTS_DEPTH = 16
_NAME = re.compile(r"step-(0|[1-9]\d{0,15})-a([1-9]\d{0,8})(?:-([1-9]\d{0,5}))?", re.ASCII)

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a checkpoint: bytes, and SHA-256 over them."""

    size: _Count
    sha256: _Digest


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint is made of.

    `created` is for people; nothing is ordered by it. `facts` are the writer's: plain JSON.
    """

    schema: Annotated[int, msgspec.Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    step: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
    attempt: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    world: Annotated[int, msgspec.Meta(ge=1, le=MAX_WORLD)]
    files: dict[str, File]
    best: bool = False
    before_spike: bool = False
    created: str = ""
    versions: dict[str, str] = {}
    facts: dict[str, Any] = {}


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    sha256: _Digest
    manifest: msgspec.Raw


def folder_name(step: int, attempt: int, serial: int = 1) -> str:
    """`step-<n>-a<attempt>`, and a number where this attempt has used that name before."""
    return f"step-{step}-a{attempt}" + (f"-{serial}" if serial > 1 else "")


def parse_name(name: str) -> tuple[int, int, int] | None:
    """(step, attempt, serial) of a folder's name; None for any other name."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[2]), int(found[3] or 1)) if found else None


def rank_file(rank: int, world: int) -> str:
    """The name of a rank's tensors."""
    return f"rank-{rank}-of-{world}.safetensors"


def render(manifest: Manifest) -> bytes:
    """The bytes of manifest.json.

    Raises:
        CheckpointError: larger than any manifest may be.
    """
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    data = _frame(hashlib.sha256(body).hexdigest(), body)
    if len(data) > MAX_BYTES:
        raise CheckpointError(
            f"the facts of a checkpoint take {len(data):,} bytes, more than {MAX_BYTES:,}.",
            remedy="Keep large things in the state, as tensors.",
        )
    return data


def read(data: bytes, name: str) -> Manifest:
    """The manifest in the bytes of manifest.json of the folder `name`.

    Raises:
        CheckpointError: damaged, not ours, from another version, or of another folder.
    """
    try:
        found = msgspec.json.decode(data, type=_Envelope)
        body = bytes(found.manifest)
        if _frame(found.sha256, body) != data or hashlib.sha256(body).hexdigest() != found.sha256:
            raise CheckpointError("its manifest is damaged (the digest differs).")
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"its manifest cannot be read: {error!s:.200}.") from None
    parts = parse_name(name)
    if parts is None or parts[:2] != (manifest.step, manifest.attempt):
        raise CheckpointError(f"its manifest belongs to step {manifest.step}, attempt {manifest.attempt}.")
    expected = {STATE, *(rank_file(rank, manifest.world) for rank in range(manifest.world))}
    if len(manifest.files) != manifest.world + 1 or set(manifest.files) != expected:
        raise CheckpointError("its manifest does not list the files of a checkpoint.")
    return manifest


def _frame(digest: str, body: bytes) -> bytes:
    return b'{"sha256": "' + digest.encode() + b'",\n"manifest": ' + body + b"}\n"


def plain(facts: Any, depth: int = 0, path: str = "facts") -> Any:
    """Facts as JSON holds them: tuples as lists; nan and infinities, which JSON lacks, as the texts "nan", "inf".

    Raises:
        CheckpointError: a value that is no JSON, or nesting beyond 16; the place is named.
    """
    if depth > _MAX_FACTS_DEPTH:
        raise CheckpointError(f"{path:.200} is nested too deeply.", remedy="Facts are small and flat.")
    if facts is None or isinstance(facts, bool):
        return facts
    if isinstance(facts, int) and -(2**63) <= facts < 2**63:
        return int(facts)
    if isinstance(facts, float):
        return float(facts) if math.isfinite(facts) else repr(float(facts))
    if isinstance(facts, str):
        return facts.encode("utf-8", "replace").decode()
    if isinstance(facts, (list, tuple)):
        return [plain(item, depth + 1, f"{path}[{i}]") for i, item in enumerate(facts)]
    if isinstance(facts, dict) and all(isinstance(key, str) for key in facts):
        return {plain(key): plain(item, depth + 1, f"{path}[{key!r}]") for key, item in facts.items()}
    raise CheckpointError(
        f"{path:.200} is a {type(facts).__name__}, which JSON does not hold.",
        remedy="Facts are None, bool, int, float, str, and lists and dicts of them; tensors belong to the state.",
    )
