"""What a plan was measured on, and what has changed since."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from upshift.records.plan import Fingerprint, Plan, Setting
from upshift.records.planfile import settings_digest

#: Arguments that change how long or where a script runs, not the shape of a step.
_HARMLESS = re.compile(
    r"^-{0,2}((n[-_]?)?(num[-_]?)?(epochs?|max[-_]?(iters?|steps|epochs)|steps|iters|iterations)|seed|resume|name|"
    r"(log|save|print|eval|ckpt|checkpoint)s?[-_]?(every|interval|freq|frequency|steps|iters|dir|path|file|folder|name|to)|"
    r"log[-_]level|save|ckpt|checkpoint|out|outf|output|out(put)?[-_]?(dir|path|file|folder|name)|"
    r"dry[-_]run|run[-_]?name|wandb[-_]?\w*)$",
    re.IGNORECASE,
)

#: Larger files are not Python modules.
_MOST_BYTES = 16 << 20


def _digest(parts: Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:16]


def shaping(arguments: Sequence[str]) -> tuple[str, ...]:
    """The arguments that may shape a step: all but those known to be harmless (epochs, seeds, paths of output)."""
    kept: list[str] = []
    skip_value = False
    for item in arguments:
        name, equals, _ = item.partition("=")
        if skip_value and not item.startswith("-"):
            skip_value = False
            continue
        skip_value = False
        if _HARMLESS.match(name) and (item.startswith("-") or equals):
            skip_value = not equals
            continue
        kept.append(item)
    return tuple(kept)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def own_version() -> str:
    """The version of upshift as it is installed; empty where it runs from a folder."""
    found = _version("upshift")
    return "" if found == "none" else found


def _script_path(script: str, module: bool) -> Path | None:
    """Where the code lies, found without importing anything."""
    if not module:
        return Path(script)
    inside = Path(*script.split("."))
    for folder in (Path.cwd(), *map(Path, sys.path)):
        for path in (folder / inside.with_suffix(".py"), folder / inside / "__main__.py"):
            if path.is_file():
                return path
    return None


def _content(folder: Path, name: str) -> bytes:
    """A module beside the script. A plan may come from anywhere: nothing outside the folder is opened, no device."""
    path = folder / name
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    try:
        if not inside or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return b"missing"
        return path.read_bytes()
    except (OSError, ValueError):
        return b"missing"


def _versions() -> tuple[str, ...]:
    return f"torch {_version('torch')}", f"numpy {_version('numpy')}", f"python {platform.python_version()}"


def fingerprint(
    script: str,
    arguments: Sequence[str],
    device: str,
    techniques: dict[str, dict[str, Setting]],
    *,
    files: Sequence[str] = (),
    module: bool = False,
    packages: Sequence[str] = (),
) -> Fingerprint:
    """The fingerprint of a plan for `script` as it is now.

    Args:
        files: modules beside the script that it imports, relative to its folder.
        packages: name and version of the packages other than upshift that the techniques come from.
    """
    path = _script_path(script, module)
    content = b"" if path is None else _content(path.parent, path.name)
    folder = Path.cwd() if module else (path or Path()).parent
    sources = [_content(folder, name) for name in files]
    return Fingerprint(
        script=_digest([content]),
        sources=_digest(sources),
        arguments=" ".join(shaping(arguments)),
        device=device,
        versions=", ".join((*_versions(), *packages)),
        files=tuple(files),
        settings=settings_digest(techniques),
    )


def changes(plan: Plan, now: Fingerprint) -> list[str]:
    """What is no longer as it was when the plan was measured, in words; empty where the plan still holds."""
    was = plan.fingerprint
    found = []
    if was.script != now.script:
        found.append("the script has changed")
    elif was.sources != now.sources:
        found.append("a module beside the script has changed")
    if was.arguments != now.arguments:
        found.append(f"the arguments were '{was.arguments}', now '{now.arguments}'")
    if was.device != now.device:
        found.append(f"the device was '{was.device}', now '{now.device}'")
    if was.versions != now.versions:
        found.append(f"the versions were '{was.versions}', now '{now.versions}'")
    if was.settings != settings_digest(plan.techniques):
        found.append("a technique or setting in the plan was edited after it was measured")
    return found
