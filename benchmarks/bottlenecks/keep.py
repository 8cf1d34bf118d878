"""Write kept measurements, with the findings that are right for them, as the recorded cases of the tests.

    python benchmarks/bottlenecks/keep.py .upshift/bottlenecks tests/diagnose/recorded.jsonl

Losses, machine and paths are left out: rules do not read them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from truth import CASES

from upshift.records import Measurement, codec


def rounded(value: Any) -> Any:
    """The same nested value with five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Write one line for every case that was measured."""
    folder, into = Path(sys.argv[1]), Path(sys.argv[2])
    lines = []
    for case in CASES:
        file = folder / f"{case.name}.json"
        if not file.exists():
            continue
        m = codec.read(file, Measurement)
        m = msgspec.structs.replace(
            m,
            script=case.file.name,
            machine={},
            isolation="",
            facts=msgspec.structs.replace(m.facts, losses=(), recipe=None),
            lines=tuple(msgspec.structs.replace(item, file=Path(item.file).name) for item in m.lines),
        )
        record = {"name": case.name, "accepted": case.accepted, "measurement": rounded(msgspec.to_builtins(m))}
        lines.append(json.dumps(record))
    into.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
