"""The site: every page is in its menu, and what its pages link to, show and load lies in it. Needs no generator."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import doc_pages as pages
import pytest

ROOT = pages.ROOT
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def script() -> ModuleType:
    """scripts/site_pages.py, which is no package."""
    found = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


SITE = script()
MENU = re.findall(r"^ +- (?:[^:\n]+: )?([\w./-]+\.md)$", CONFIG.partition("\nnav:\n")[2], re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site") / "pages"
    SITE.gather(place)
    return place


def test_every_page_is_in_the_menu_once_and_there_is_nothing_else(folder):
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
    assert sorted(MENU) == sorted(there)
    assert {place.relative_to(ROOT / "docs").as_posix() for place in (ROOT / "docs").rglob("*.md")} <= there


def test_links_pictures_and_anchors_lead_to_something_in_the_site(folder):
    missing, seen = [], 0
    for page in sorted(folder.rglob("*.md")):
        for target in pages.links(pages.text(page)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            seen += 1
            if not there.is_file() or not there.is_relative_to(folder):
                missing.append(f"{page.relative_to(folder)}: {target}")
            elif anchor and anchor not in pages.anchors(pages.text(there)):
                missing.append(f"{page.relative_to(folder)}: no heading {target}")
    assert not missing
    assert seen > 80


def test_nothing_is_loaded_from_elsewhere():
    """The configuration names files of the site; the script for the search keeps the theme from loading its own."""
    assert not re.findall(r"https?://\S+", CONFIG)
    assert re.search(r"^  font: false", CONFIG, re.MULTILINE)
    named = re.findall(r"assets/[\w.-]+", CONFIG)
    assert "assets/iframe-worker.js" in named
    assert all((ROOT / "docs" / name).is_file() for name in named)


def test_links_are_rewritten_to_where_a_page_lies():
    places = {
        "README.md": "project.md",
        "docs/a.md": "a.md",
        "docs/sub/README.md": "sub/README.md",
        "docs/p.png": "p.png",
    }
    text = "[r](../README.md#x) [s](sub/) ![p](p.png) [code](../src/x.py) [web](https://example.org) [h](#here)\n"
    assert SITE.rewritten(text, "docs/a.md", places) == (
        "[r](project.md#x) [s](sub/README.md) ![p](p.png) code [web](https://example.org) [h](#here)\n"
    )
    up = "```text\n[a](docs/a.md)\n```\n[a](docs/a.md)\n"
    assert SITE.rewritten(up, "README.md", places) == "```text\n[a](docs/a.md)\n```\n[a](a.md)\n"
    assert SITE.rewritten("[r](../../README.md)", "docs/sub/README.md", places) == "[r](../project.md)"
