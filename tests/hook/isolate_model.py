"""Do random things to files and print what came of it, for comparison with the same in isolation.

Usage: python isolate_model.py RUNG SCRATCH SEED STEPS, in a directory made by `prepare`; RUNG "none" is without
isolation.
"""

from __future__ import annotations

import errno
import os
import pathlib
import random
import shutil
import sys

NAMES = (
    "a",
    "b",
    "sub",
    "sub/a",
    "sub/b",
    "sub/deep",
    "sub/deep/a",
    "other",
    "other/a",
    "other/b",
    "link",
    "link/a",
)


def prepare(base: pathlib.Path) -> None:
    """What there is before."""
    (base / "sub/deep").mkdir(parents=True)
    (base / "other").mkdir()
    for name in ("a", "sub/a", "sub/deep/a", "other/b"):
        (base / name).write_text(name)
    (base / "link").symlink_to("sub")


def look() -> list[object]:
    """All that can be seen of the directory."""
    found: list[object] = []
    for folder, folders, files in os.walk("."):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            found.append((path, os.readlink(path) if os.path.islink(path) else pathlib.Path(path).read_text()))
        found += [(folder, name, os.path.islink(os.path.join(folder, name))) for name in folders]
    return found


def step(random: random.Random) -> object:
    """One random operation and its result."""
    one, two = random.choice(NAMES), random.choice(NAMES)
    text = str(random.random())
    kind = random.choice(
        [
            "write",
            "append",
            "update",
            "exclusive",
            "read",
            "remove",
            "rmdir",
            "mkdir",
            "makedirs",
            "rename",
            "replace",
            "listdir",
            "exists",
            "rmtree",
            "symlink",
            "link",
            "copytree",
            "move",
            "truncate",
            "chmod",
            "stat",
            "scan",
            "chdir",
            "islink",
            "copy",
        ]
    )
    print(kind, one, two, end=": ")
    if kind in ("write", "append", "update", "exclusive"):
        with open(one, {"write": "w", "append": "a", "update": "r+", "exclusive": "x"}[kind]) as file:
            return file.write(text)
    if kind == "read":
        return pathlib.Path(one).read_text()
    if kind in ("remove", "rmdir", "mkdir", "listdir", "readlink"):
        found = getattr(os, kind)(one)
        return sorted(found) if kind == "listdir" else found
    if kind == "makedirs":
        return os.makedirs(one, exist_ok=True)
    if kind in ("rename", "replace", "link"):
        return getattr(os, kind)(one, two)
    if kind == "symlink":
        return os.symlink(os.path.basename(one), two)
    if kind == "exists":
        return [os.path.exists(one), os.path.isdir(one), os.path.isfile(one), os.access(one, os.W_OK)]
    if kind == "islink":
        return [os.path.islink(one), os.path.lexists(one), os.path.relpath(os.path.realpath(one))]
    if kind == "rmtree":
        return os.path.islink(one) or shutil.rmtree(one)  # the error on a link depends on the implementation
    if kind == "copytree" and not os.path.realpath(two).startswith(os.path.realpath(one)):
        return shutil.copytree(one, two, symlinks=True)
    if kind in ("move", "copy"):
        return getattr(shutil, kind)(one, two)
    if kind == "truncate":
        return os.truncate(one, 3)
    if kind == "chmod":
        return os.chmod(one, 0o755)
    if kind == "stat":
        status = os.stat(one)
        return [oct(status.st_mode), status.st_size if os.path.isfile(one) else None]
    if kind == "scan":
        with os.scandir(one) as entries:
            return sorted((entry.name, entry.is_dir(), entry.is_file(follow_symlinks=False)) for entry in entries)
    if kind == "copytree":
        return None
    here = os.getcwd()
    os.chdir(one)
    try:
        return [os.path.relpath(os.getcwd(), here), sorted(os.listdir("."))]
    finally:
        os.chdir(here)


def main() -> None:
    rung, scratch, seed, steps = sys.argv[1:]
    os.umask(0o022)
    if rung != "none":
        from upshift.hook.isolate import enter

        enter(pathlib.Path(scratch), rung=rung)
    dice = random.Random(int(seed))
    for _ in range(int(steps)):
        try:
            print(step(dice))
        except shutil.Error as error:
            print("shutil.Error", len(error.args))
        except OSError as error:
            print(errno.errorcode.get(error.errno or 0, error.errno))
        print("   ", look())


if __name__ == "__main__":
    main()
