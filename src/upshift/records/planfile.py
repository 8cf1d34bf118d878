"""The plan as a TOML file: made to be read, edited and committed. Nothing in it can import or execute anything.

One section per device: `[devices.<slug>]`. A file may hold plans for several machines.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import tomlkit
from tomlkit.items import Table

from upshift.errors import PlanError
from upshift.records.codec import write_bytes
from upshift.records.plan import SCHEMA, Plan, Setting

#: Larger, deeper or longer than any plan of ours.
MAX_BYTES = 1 << 20
MAX_DEPTH = 8

HEADER = """upshift plan. `upshift run` applies it when it lies beside the script; edit or delete it freely.
Speed-ups are ratios of step times, stock / planned, from interleaved pairs; low and high are one-sided 99 % bounds.
An edited setting was not measured: `upshift run` then trains the baseline and says so (--allow-stale overrides)."""


def slug(device: str) -> str:
    """A device name as a TOML key: `cpu-amd-epyc-2-cores`."""
    return re.sub(r"-+", "-", re.sub(r"[^a-z0-9]+", "-", device.lower())).strip("-")[:80] or "unknown"


def settings_digest(techniques: dict[str, dict[str, Setting]]) -> str:
    """SHA-256 of techniques and settings: what was measured."""
    data = msgspec.json.encode({name: dict(sorted(value.items())) for name, value in sorted(techniques.items())})
    return hashlib.sha256(data).hexdigest()[:16]


def _without_none(value: Any) -> Any:
    """TOML has no null: unknown is left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def _table(values: dict[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in values.items():
        table.add(key, value)
    return table


def write(path: Path, plan: Plan) -> None:
    """Write or update the plan for its device in `path`; sections of other devices are kept.

    Raises:
        OSError: the file cannot be written.
        PlanError: a file is there already that is no plan.
    """
    others = _parse(path) if path.exists() else {}
    document = tomlkit.document()
    for line in HEADER.splitlines():
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    document.add("schema", tomlkit.item(SCHEMA))
    devices = tomlkit.table(is_super_table=True)
    name = slug(plan.device)
    for key, section in others.get("devices", {}).items():
        if key != name:
            devices.add(key, tomlkit.item(section))
    values = _without_none(msgspec.to_builtins(plan))
    values.pop("schema", None)
    kept = values.pop("kept", [])
    rejected = values.pop("rejected", [])
    proof = values.pop("proof", None)
    tables = {key: values.pop(key) for key in ("fingerprint", "pace", "to_target", "energy") if key in values}
    section = _table(values)
    for key, item in tables.items():
        section.add(key, _table(item))
    if proof is not None:
        # Curves belong to the report; the plan keeps what was concluded from them.
        for long in ("stock_losses", "planned_losses"):
            proof.pop(long, None)
        updates = proof.pop("updates", [])
        band = proof.pop("band", None)
        proof_table = _table(proof)
        if band is not None:
            proof_table.add("band", _table(band))
        if updates:
            array = tomlkit.aot()
            for item in updates:
                array.append(_table(item))
            proof_table.add("updates", array)
        section.add("proof", proof_table)
    for key, items in (("kept", kept), ("rejected", rejected)):
        if items:
            array = tomlkit.aot()
            for item in items:
                settings = item.pop("settings", {})
                table = _table(item)
                if settings:
                    inline = tomlkit.inline_table()
                    inline.update(settings)
                    table.add("settings", inline)
                array.append(table)
            section.add(key, array)
    devices.add(name, section)
    document.add("devices", devices)
    write_bytes(path, tomlkit.dumps(document).encode())


def _depth(value: Any, level: int = 0) -> int:
    if level > MAX_DEPTH:
        return level
    if isinstance(value, dict):
        return max((_depth(item, level + 1) for item in value.values()), default=level)
    if isinstance(value, list):
        return max((_depth(item, level + 1) for item in value), default=level)
    return level


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    if len(data) > MAX_BYTES:
        raise PlanError(
            f"the plan {path} is larger than any plan ({len(data)} bytes).", remedy="Run upshift tune anew."
        )
    try:
        found = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PlanError(f"the plan {path} is not TOML: {error}.", remedy="Mend it, or run upshift tune anew.") from None
    if _depth(found) > MAX_DEPTH:
        raise PlanError(f"the plan {path} is nested deeper than any plan.", remedy="Run upshift tune anew.")
    schema = found.get("schema")
    if schema != SCHEMA:
        raise PlanError(
            f"the plan {path} has schema {schema!r}, this version reads {SCHEMA}.", remedy="Run upshift tune anew."
        )
    extra = set(found) - {"schema", "devices"}
    if extra:
        raise PlanError(f"the plan {path} has an unknown key: {sorted(extra)[0]}.", remedy="Remove it.")
    if not isinstance(found.get("devices"), dict):
        raise PlanError(f"the plan {path} has no [devices.*] section.", remedy="Run upshift tune anew.")
    return found


def read(path: Path) -> dict[str, Plan]:
    """All plans in a file, by device slug.

    Raises:
        PlanError: not TOML, another schema, an unknown key or a wrong type, with its place.
    """
    plans = {}
    for key, section in _parse(path)["devices"].items():
        try:
            plans[key] = msgspec.convert(section, Plan)
        except msgspec.ValidationError as error:
            text = str(error)
            place = text.replace("`$", f"`devices.{key}") if "`$" in text else f"{text} - at `devices.{key}`"
            raise PlanError(
                f"the plan {path}: {place}.", remedy="Correct that entry, or run upshift tune anew."
            ) from None
    return plans
