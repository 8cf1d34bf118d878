"""A notebook as a script: its code cells in `.upshift/notebook/`, under a name that stays, so that its plan does, too.

Format: nbformat.readthedocs.io/en/latest/format_description.html (version 4)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from modulefinder import ModuleFinder
from pathlib import Path

from upshift.api.cells import plain_python
from upshift.errors import EnvironmentError_, UsageError
from upshift.records.planfile import slug

SUFFIX = ".ipynb"
FOLDER = Path(".upshift") / "notebook"

#: Cells with this tag are left out, as by nbclient.
SKIP = "skip-execution"

_FUTURE = re.compile(r"^from __future__ import [^\n(]+$", re.MULTILINE)


@dataclass(frozen=True)
class Converted:
    """The script of a notebook, and the lines of it that a script cannot have."""

    script: Path
    dropped: tuple[str, ...]


def convert(notebook: Path) -> Converted:
    """Write the code cells of a notebook as a script.

    Raises:
        UsageError: it is no notebook with Python code, or a cell holds what only a notebook can run.
        EnvironmentError_: the script cannot be written.
    """
    cells = _code_cells(notebook)
    return write(slug(str(notebook)), cells, title=f"The code cells of {notebook.name}", beside=notebook.parent)


def write(name: str, cells: Sequence[tuple[int, str]], *, title: str, beside: Path) -> Converted:
    """Write cells, each with its number in the notebook, as `.upshift/notebook/NAME.py`.

    Args:
        beside: the folder whose modules the code imports.

    Raises:
        UsageError, EnvironmentError_: see `convert`.
    """
    parts: list[str] = []
    dropped: list[str] = []
    for number, source in cells:
        code, lines = plain_python(source, f"cell {number}")
        parts.append(f"# %% cell {number}\n{code}\n")
        dropped += lines
    body = "\n".join(parts)
    future = sorted({item.strip() for item in _FUTURE.findall(body)})
    body = _FUTURE.sub(lambda found: f"# {found[0]}", body)
    folder = beside.resolve()
    script = FOLDER / f"{name}.py"
    # A plan holds for one content of the script: the digest makes it that of its modules, too.
    head = [
        f"# {title}; written anew by upshift at every use.",
        f"# Modules beside it: {_modules(body, folder) or 'none'}",
        *future,
        "import sys",
        "",
        f"sys.path.insert(0, {str(folder)!r})",
    ]
    if re.search(r"\bdisplay\(", body):
        head.append("display = print  # as a notebook has it")
    _replace(script, "\n".join([*head, "", body]))
    return Converted(script, tuple(dropped))


def _code_cells(notebook: Path) -> list[tuple[int, str]]:
    """Code cells that are not to be skipped, each with its number among the code cells, from 1."""
    try:
        content = json.loads(notebook.read_text("utf-8"))
        language = content["metadata"].get("kernelspec", {}).get("language", "python")
        code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        found = [
            (number, "".join(cell["source"]))
            for number, cell in enumerate(code, 1)
            if SKIP not in cell.get("metadata", {}).get("tags", ())
        ]
    except OSError as error:
        raise UsageError(f"{notebook} cannot be read: {error.strerror}.", remedy="Check the path.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{notebook} is not a notebook of format 4.", remedy="Open it in Jupyter and save it once."
        ) from None
    if str(language).lower() != "python":
        raise UsageError(f"{notebook} is a notebook in {language}.", remedy="upshift runs Python.")
    if not any(source.strip() for _, source in found):
        raise UsageError(f"{notebook} has no code to run.", remedy="Name the notebook that trains.")
    return found


def _modules(body: str, folder: Path) -> str:
    """The modules below `folder` that the code imports, directly or not, with a digest; nothing is run."""
    finder = ModuleFinder(path=[str(folder)])
    try:
        finder.scan_code(compile(body, "cells", "exec", dont_inherit=True), finder.add_module("__main__"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return "unknown"  # the run will say what is wrong
    files = sorted({file for item in finder.modules.values() if (file := getattr(item, "__file__", None))})
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    names = ", ".join(str(Path(file).relative_to(folder)) for file in files)
    return f"{names} ({digest.hexdigest()[:16]})"


def _replace(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text("utf-8") != text:
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text(text, "utf-8")
            scratch.replace(file)
    except OSError as error:
        raise EnvironmentError_(
            f"{file} cannot be written: {error.strerror}.", remedy="Start upshift in a folder that can be written."
        ) from None
