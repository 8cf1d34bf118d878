"""Where the tables of these benchmarks go."""

from __future__ import annotations

from pathlib import Path


def publish(text: str, into: Path | None) -> None:
    """Print a table; append it to a file, if one is named."""
    print(text)
    if into is not None:
        with open(into, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
