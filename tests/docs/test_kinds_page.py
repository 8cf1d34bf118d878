"""docs/kinds.md: every row names an example and a test that exist, and no kind that is tested is missing."""

from __future__ import annotations

import ast
import re

import doc_pages as pages

PAGE = pages.ROOT / "docs" / "kinds.md"
E2E = pages.ROOT / "tests" / "e2e"


def rows() -> dict[str, str]:
    """Test -> example."""
    row = re.compile(r"^\| .+ \| \[(?P<example>[\w.]+)\]\((?P<path>[^)]+)\) \| `(?P<test>\w+)` \|", re.MULTILINE)
    found = {}
    for match in row.finditer(pages.text(PAGE)):
        assert (PAGE.parent / match["path"]).resolve() == E2E / "scripts" / "kinds" / match["example"]
        assert match["test"] not in found
        found[match["test"]] = match["example"]
    return found


def in_the_tests() -> dict[str, str]:
    """Kind -> script, as the tests have them."""
    found = {}
    for node in ast.parse((E2E / "kinds.py").read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Dict)
            and node.targets[0].id
            in (
                "KINDS",
                "GROUPS",
            )
        ):
            for key, call in zip(node.value.keys, node.value.values, strict=True):
                texts = [item.value for item in call.args if isinstance(item, ast.Constant)]
                found[key.value] = next(text for text in texts if str(text).endswith((".py", ".sh")))
    return found


def test_rows_are_the_kinds_that_are_tested():
    assert rows() == in_the_tests()
    assert len(rows()) > 20


def test_every_line_of_the_tables_is_a_row():
    lines = [line for line in pages.text(PAGE).splitlines() if line.startswith("| ")]
    assert len([line for line in lines if not line.startswith(("| Kind |", "| --- |"))]) == len(rows())


def test_tests_named_exist():
    named = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", pages.text(PAGE)))
    assert len(named) >= 5
    for file, function in named:
        tree = ast.parse((pages.ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, function


def test_every_example_is_in_the_tables():
    examples = {path.name for path in (E2E / "scripts" / "kinds").glob("*.[ps][yh]")}
    assert examples == set(rows().values())
