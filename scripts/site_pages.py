"""Gathers the pages of the site into one folder, with links that work there.

The pages are written for the forge: those of docs/ link to the README, the examples and other files outside. A site
knows one folder of pages only. So pages are copied, a link to a page of the site is rewritten to where it lies there,
and a link to anything else becomes plain text. Usage: site_pages.py FOLDER
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Pages outside docs/ -> where they lie in the site.
OUTSIDE = {
    "README.md": "project.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples/README.md",
}
#: What a page may show or offer beside text.
BESIDE = {".png", ".svg", ".py", ".sh", ".css", ".js"}

_FENCE = re.compile(r"^(`{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s:#]*)(?P<anchor>#[^)\s]*)?\)")


def pages(root: Path = ROOT) -> dict[str, str]:
    """Every page and file of the site: path in the repository -> path in the site."""
    docs = root / "docs"
    inside = [path for path in docs.rglob("*") if path.suffix in BESIDE | {".md"}]
    found = {path.relative_to(root).as_posix(): path.relative_to(docs).as_posix() for path in sorted(inside)}
    return found | OUTSIDE


def rewritten(text: str, source: str, places: dict[str, str]) -> str:
    """A page's text with its relative links as they must be in the site. Code is left as it is."""
    here = os.path.dirname(places[source])

    def link(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        if not path:
            return match[0]
        target = os.path.normpath(os.path.join(os.path.dirname(source), path))
        there = places.get(target) or places.get(f"{target}/README.md")
        if there is None:
            return match["text"]
        return f"{match['picture']}[{match['text']}]({os.path.relpath(there, here or '.')}{anchor})"

    done, parts = 0, []
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[done : fence.start()]), fence[0]]
        done = fence.end()
    return "".join([*parts, _LINK.sub(link, text[done:])])


def gather(folder: Path, root: Path = ROOT) -> None:
    """Write all pages below `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    places = pages(root)
    for source, place in places.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            path.write_text(rewritten((root / source).read_text(encoding="utf-8"), source, places), encoding="utf-8")
        else:
            shutil.copy(root / source, path)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
