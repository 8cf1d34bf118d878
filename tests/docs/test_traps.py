"""docs/traps.md names a test for every guard; those tests exist."""

from __future__ import annotations

import ast
import re

import doc_pages as pages
import pytest

PAGE = pages.ROOT / "docs" / "traps.md"
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in pages.text(PAGE).splitlines()
    if line.startswith("| ") and not line.startswith(("| Trap |", "| Attempt |", "| --- |"))
]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`(tests/[^`]+)`", row[-1])})


def functions(file: str) -> set[str]:
    """The test functions of a file."""
    tree = ast.parse((pages.ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_row_names_its_tests_or_says_not_yet(row):
    assert len(row) == 3, row
    assert re.search(r"`tests/[^`]+\.py::test_\w+`", row[2]) or (row[2] == "not yet" and "not yet" in " ".join(row[1:]))


@pytest.mark.parametrize("name", NAMED)
def test_named_tests_exist(name):
    file, _, function = name.partition("::")
    assert function in functions(file)


def test_every_attempt_at_a_false_win_is_in_the_table():
    there = {
        f"{path.relative_to(pages.ROOT).as_posix()}::{name}"
        for path in (pages.ROOT / "tests" / "hostile").glob("test_false_wins_*.py")
        for name in functions(str(path.relative_to(pages.ROOT)))
        if name.startswith("test_")
    }
    assert there - set(NAMED) == set()
    assert len(there) >= 30
