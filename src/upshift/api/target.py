"""What a command acts on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from upshift.errors import UsageError
from upshift.hook import choosing
from upshift.records.plan import Fingerprint, Setting

#: The module that runs a declared job as a script, and what names a job: `jobs.py:cifar`.
ENTRY = "upshift.cli.job"
_JOB = re.compile(r".+\.py:[A-Za-z_]\w*$")

#: Told what is going on.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What to run: a script, a declared job (`jobs.py:NAME`), or with `module` a module, and its arguments."""

    name: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    @property
    def job(self) -> str:
        """The job that is named, by itself or behind a launcher; empty where it is a script."""
        if self.module:
            return self.arguments[0] if self.name == ENTRY and self.arguments else ""
        if _JOB.match(self.name) and not Path(self.name).exists():
            return self.name
        return next((item for item in self.arguments if _JOB.match(item)), "") if self.starts_others else ""

    @property
    def script(self) -> Target:
        """What is run in its place: a job is trained by a module of ours, which is a script like any other."""
        if self.module or not self.job:
            return self
        return Target(ENTRY, (self.job, *bare_settings(self.arguments)), module=True)

    @property
    def starts_others(self) -> bool:
        """Whether this is no Python script but a command: `torchrun`, `sh`, an executable that is no script."""
        path = Path(self.name)
        if self.module or path.suffix == ".py" or _JOB.match(self.name):
            return False
        if path.is_file():
            return os.access(path, os.X_OK) and not _is_python_script(path)
        return os.sep not in self.name and shutil.which(self.name) is not None

    def check(self) -> Target:
        """Raises UsageError where there is no such script, or it is a command that starts others."""
        if self.starts_others:
            script = next((item for item in self.arguments if item.endswith(".py")), "train.py")
            raise UsageError(
                f"{self.name} starts other programs; only upshift run follows those.",
                remedy=f"Name the training script itself: {script}, as one process.",
            )
        if self.job:
            file = Path(self.job.rpartition(":")[0])
            if not file.is_file():
                raise UsageError(f"there is no file {file}.", remedy="Name a job as jobs.py:NAME.")
        elif not self.module:
            path = Path(self.name)
            if not path.exists():
                raise UsageError(f"there is no script {self.name}.", remedy="Check the path; options go before it.")
            if path.suffix == ".ipynb":
                raise UsageError(
                    f"{self.name} is a notebook.",
                    remedy="On the command line it is converted; in Python: upshift.api.notebook.convert(path).script.",
                )
            if path.is_dir():
                raise UsageError(f"{self.name} is a folder.", remedy="Name the training script inside it.")
        return self

    @property
    def stem(self) -> Path:
        """Where files named after the target lie: beside the script, or in the current folder for a module."""
        if self.job:
            file, _, name = self.job.rpartition(":")
            return Path(f"{Path(file).with_suffix('')}-{name}")
        return choosing.stem(self.name, self.module)

    @property
    def plan_file(self) -> Path:
        """`train.upshift.toml` beside `train.py`."""
        return Path(f"{self.stem}.upshift.toml")

    @property
    def known_as(self) -> str:
        """What a person calls it."""
        return self.job or self.name

    def mark(self, techniques: dict[str, dict[str, Setting]], device: str, files: tuple[str, ...]) -> Fingerprint:
        """What a plan of these techniques for this target is measured on; `files`: the modules it imports."""
        return choosing.mark(self.name, self.arguments, techniques, device, files, module=self.module)


def bare_settings(arguments: Sequence[str]) -> tuple[str, ...]:
    """`--set KEY=VALUE` and `--set=KEY=VALUE` as KEY=VALUE: a plan holds for one set of them, however written."""
    return tuple(item.removeprefix("--set=") for item in arguments if item != "--set")


def _is_python_script(path: Path) -> bool:
    """Whether an executable file is a person's Python script; launchers are written in Python, too."""
    from upshift.hook.launched import LAUNCHERS

    with path.open("rb") as file:
        first = file.readline(256)
    return first.startswith(b"#!") and b"python" in first and path.name not in LAUNCHERS
