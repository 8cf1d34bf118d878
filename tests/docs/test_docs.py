"""The documentation is true: its code runs, its links lead somewhere, its options and commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import doc_pages as pages
import pytest

from upshift.cli.main import COMMANDS, cli
from upshift.records import planfile
from upshift.techniques import registry

ROOT = pages.ROOT
RUNNABLE = sorted({block.page for block in pages.blocks("python") if block.no_run is None})


# -- code --------------------------------------------------------------------------------------------------------------


def toml_of(page: Path) -> list[pages.Block]:
    return [block for block in pages.blocks_in(pages.text(page), page) if block.language == "toml"]


@pytest.mark.parametrize("page", RUNNABLE, ids=pages.name)
def test_python_blocks_run(page, tmp_path):
    """All blocks of a page, in order, in one fresh interpreter and one empty folder; line numbers are the page's."""
    lines = [""] * (pages.text(page).count("\n") + 1)
    for block in pages.blocks_in(pages.text(page), page):
        if block.language == "python" and block.no_run is None:
            for offset, line in enumerate(block.body.splitlines()):
                lines[block.line - 1 + offset] = line
    # `from __future__` must come first, wherever on the page it stands.
    future = [line for line in lines if line.startswith("from __future__ ")]
    lines = ["" if line in future else line for line in lines]
    assert not lines[0]
    lines[0] = "; ".join(sorted(set(future)))
    script = tmp_path / page.with_suffix(".py").name
    script.write_text("\n".join(lines), encoding="utf-8")
    for plan in toml_of(page):
        (tmp_path / "train.upshift.toml").write_text(plan.body, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{pages.name(page)}:\n{done.stderr}"


def test_there_is_code_to_run():
    names = {pages.name(page) for page in RUNNABLE}
    assert {"docs/add-a-technique.md", "docs/plan-file.md", "docs/cli.md", "docs/isolation.md"} <= names


def test_only_blocks_that_train_for_long_are_left_out():
    """A block that is not run says why, and can at least be compiled."""
    skipped = [block for block in pages.blocks("python") if block.no_run is not None]
    assert len(skipped) <= 3, [str(block) for block in skipped]
    for block in skipped:
        assert re.search(r"minutes|long|trains", block.no_run or ""), f"{block}: {block.no_run!r} is no reason"
        compile(block.body, str(block), "exec")


@pytest.mark.parametrize("block", pages.blocks("toml"), ids=str)
def test_toml_blocks_are_plans(block, tmp_path):
    """Readable, with known techniques and settings, and a digest that belongs to them."""
    file = tmp_path / "train.upshift.toml"
    file.write_text(block.body, encoding="utf-8")
    plans = planfile.read(file)
    assert plans
    for section, plan in plans.items():
        registry.check_plan(plan, str(block))
        assert section == planfile.slug(plan.device)
        assert plan.fingerprint.settings == planfile.settings_digest(plan.techniques)


def test_every_block_names_its_language():
    """Otherwise code could hide from these tests."""
    known = {"python", "console", "text", "toml", "mermaid"}
    found = {str(b): b.language for page in pages.PAGES for b in pages.blocks_in(pages.text(page), page)}
    assert not {place: language for place, language in found.items() if language not in known}


# -- commands ----------------------------------------------------------------------------------------------------------


def subcommand(name: str) -> click.Command:
    context = click.Context(cli, info_name="upshift")
    found = cli.get_command(context, name)
    assert found is not None, f"there is no command {name}"
    return found


def parse(arguments: list[str]) -> None:
    """Parse a command line of upshift as the program would, without running anything."""
    context = cli.make_context("upshift", list(arguments))
    # click 8 keeps the command's name apart from its arguments.
    before = getattr(context, "_protected_args", [])
    name, command, rest = cli.resolve_command(context, [*before, *context.args])
    assert name is not None and command is not None
    command.make_context(name, rest, parent=context)


def commands() -> list[tuple[str, str]]:
    found = []
    for block in pages.blocks("console"):
        for offset, line in enumerate(block.body.splitlines()):
            if line.startswith("$ "):
                found.append((f"{pages.name(block.page)}:{block.line + offset}", line[2:]))
    return found


@pytest.mark.parametrize(("place", "line"), commands(), ids=lambda value: value)
def test_console_lines_parse(place, line):
    words = shlex.split(line, comments=True)
    if words[0] == "upshift":
        parse(words[1:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{place}: no such target"
    elif words[0] == "pip":
        assert words[1] == "install", place
        extras = re.findall(r"\[(\w+)\]", line)
        project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras), place
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"{place}: no such script"
    else:
        assert words == ["echo", "$?"], f"{place}: a command these tests do not know: {words[0]}"


@pytest.mark.parametrize("line", ["tune --no-such-option train.py", "no-such-command", "run --require best train.py"])
def test_the_parser_of_these_tests_refuses_what_the_program_refuses(line):
    with pytest.raises(click.ClickException):
        parse(line.split())


def section(title: str) -> str:
    """The part of docs/cli.md under a heading."""
    content = pages.text(ROOT / "docs" / "cli.md")
    match = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", content, re.MULTILINE | re.DOTALL)
    assert match, f"docs/cli.md has no section {title!r}"
    return match[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name):
    told = set(re.findall(r"`(--?[\w-]+)", section(f"upshift {name}")))
    real = {
        spelling
        for parameter in subcommand(name).params
        if isinstance(parameter, click.Option)
        for spelling in (*parameter.opts, *parameter.secondary_opts)
    }
    assert real <= told, f"not documented: {sorted(real - told)}"
    assert told - real <= {"-h", "--help"}, f"documented, but not there: {sorted(told - real)}"


def test_documented_commands_are_the_commands():
    content = pages.text(ROOT / "docs" / "cli.md")
    assert re.findall(r"^## upshift (\w+)$", content, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_exit_codes_are_those_of_the_errors(page):
    from upshift import errors

    real = {
        item.exit_code
        for item in vars(errors).values()
        if isinstance(item, type) and issubclass(item, errors.UpshiftError)
    }
    part = re.search(r"^## Exit codes$(.*?)(?=^## |\Z)", pages.text(ROOT / page), re.MULTILINE | re.DOTALL)
    assert part
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", part[1], re.MULTILINE)}
    assert told == real | {0, 130}


def test_explain_lists_every_technique_and_every_finding():
    """By the files in the folders, not by the registries that `explain` reads."""
    from click.testing import CliRunner

    shown = CliRunner().invoke(cli, ["explain"]).output
    listed = set(re.findall(r"^  (\w+)\s", shown, re.MULTILINE))
    source = ROOT / "src" / "upshift"
    files = {path.stem for path in (source / "techniques").glob("*.py")} - {"__init__", "registry"}
    rules = {path.stem for path in (source / "diagnose" / "rules").glob("*.py")} - {"__init__"}
    assert files and rules
    assert files | rules == listed


def test_the_changelog_names_every_technique_and_the_version():
    content = pages.text(ROOT / "CHANGELOG.md")
    assert all(f"`{name}`" in content for name in registry.BUILT_IN)
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and f"## [{version[1]}]" in content


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_relative_links_lead_somewhere(page):
    content = pages.text(page)
    for target in pages.links(content):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{pages.name(page)} links to {target}, which does not exist"
        assert there.is_relative_to(ROOT), f"{pages.name(page)} links out of the project: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in pages.anchors(pages.text(there)), f"{pages.name(page)}: no heading {target}"


def test_every_page_can_be_reached():
    """From the README, by links; a page nobody finds is not documentation."""
    seen: set[Path] = set()
    pending = [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        for target in pages.links(pages.text(page)):
            if not re.match(r"[a-z]+:", target):
                pending.append((page.parent / target.partition("#")[0]).resolve())
    assert set(pages.PAGES) <= seen, sorted(pages.name(page) for page in set(pages.PAGES) - seen)


def test_files_named_in_the_text_exist():
    """Paths such as `src/upshift/errors.py` or `measure/lag.py`."""
    missing = []
    for page in pages.PAGES:
        for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", pages.prose(pages.text(page))):
            places = (ROOT / path, ROOT / "src" / "upshift" / path, page.parent / path)
            made_by_use = path.startswith((".upshift/", "~/"))
            if not made_by_use and not any(place.exists() for place in places):
                missing.append(f"{pages.name(page)}: {path}")
    assert not missing, missing


def test_decisions_are_numbered_without_gaps_and_have_four_parts():
    records = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        content = pages.text(path)
        assert content.startswith(f"# {path.name[:4]} "), path.name
        for part in ("Context", "Decision", "Consequences", "Alternatives"):
            assert f"**{part}.**" in content, f"{path.name}: {part} is missing"


# -- style -------------------------------------------------------------------------------------------------------------


def test_excerpts_can_be_replaced():
    """Each excerpt stands between its comments and holds one block."""
    content = pages.text(ROOT / "README.md")
    found = re.findall(r"<!-- excerpt:(\w+) -->\n(.*?)<!-- /excerpt -->", content, re.DOTALL)
    assert [name for name, _ in found] == ["diagnose", "tune", "run", "explain"]
    assert content.count("<!-- excerpt:") == content.count("<!-- /excerpt -->") == len(found)
    for name, body in found:
        inside = pages.blocks_in(body)
        assert [block.language for block in inside] == ["console"], name
        assert inside[0].body.startswith(f"$ upshift {name}"), name
    assert re.search(r"excerpts are from a[^.]*machine", content), "where the excerpts come from is not said"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_nothing_of_the_authors_machine(page):
    content = pages.text(page)
    assert not re.findall(r"(?:/home/|/root/|/work/|/tmp/|/Users/)\S*", content)
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX)\b", content)


# -- the reader of pages itself ----------------------------------------------------------------------------------------


def test_the_reader_finds_blocks_links_and_anchors():
    sample = (
        "# A `title` (x)\n\n[one](a.md#b) ![p](i.png) <!-- no-run: trains for minutes -->\n```python\nx = 1\n```\n"
        "```console\n$ upshift\n```\n````text\n```python\ninner\n```\n[no](no.md)\n````\n## A `title` (x)\n"
    )
    found = pages.blocks_in(sample)
    assert [(item.language, item.line) for item in found] == [("python", 5), ("console", 8), ("text", 11)]
    assert found[0].no_run == "trains for minutes" and found[1].no_run is None
    assert pages.links(sample) == ["a.md#b", "i.png"]
    assert pages.anchors(sample) == {"a-title-x", "a-title-x-1"}
