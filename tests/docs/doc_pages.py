"""What the documentation is made of: pages, fenced blocks, links. Shared by the tests; imports nothing of upshift."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
)

_FENCE = re.compile(
    r"^(?P<mark>`{3,})(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=mark)[ \t]*$", re.MULTILINE | re.DOTALL
)
_REMARK = re.compile(r"<!--\s*(?P<remark>[^\n]*?)\s*-->\s*\Z")
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is that of its first line of content; `remark` is the comment right before it."""

    page: Path
    line: int
    language: str
    body: str
    remark: str

    @property
    def no_run(self) -> str | None:
        """The reason it must not be executed."""
        return self.remark.partition("no-run:")[2].strip() if self.remark.startswith("no-run:") else None

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    """A page as people name it: its path below the root."""
    return page.relative_to(ROOT).as_posix()


def text(page: Path) -> str:
    """The text of a page."""
    return page.read_text(encoding="utf-8")


def blocks_in(content: str, page: Path = ROOT / "README.md") -> list[Block]:
    """All fenced blocks of a text, in order."""
    found = []
    for match in _FENCE.finditer(content):
        before = _REMARK.search(content[: match.start()])
        found.append(
            Block(
                page=page,
                line=content.count("\n", 0, match.start("body")) + 1,
                language=match["language"],
                body=match["body"],
                remark=before["remark"] if before else "",
            )
        )
    return found


def blocks(*languages: str) -> list[Block]:
    """All blocks of all pages in one of these languages."""
    return [item for page in PAGES for item in blocks_in(text(page), page) if item.language in languages]


def prose(content: str) -> str:
    """A text without its fenced blocks."""
    return _FENCE.sub("", content)


def links(content: str) -> list[str]:
    """The targets of all links and pictures outside fenced blocks."""
    return _LINK.findall(prose(content))


def anchors(content: str) -> set[str]:
    """The anchors GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", prose(content), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number, unique = 0, slug
        while unique in found:
            number += 1
            unique = f"{slug}-{number}"
        found.add(unique)
    return found
