"""Trainings below a launcher: any command, started unchanged, whose Python processes find the hook by themselves.

The environment names a spec and puts `start/below/` first on Python's path; its `sitecustomize.py` waits for torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import msgspec

from upshift.errors import PlanError
from upshift.hook.choosing import Chosen, Wanted, choose_plan
from upshift.hook.offspring import BELOW, follow
from upshift.sites.runner import ChildSpec
from upshift.techniques import registry

#: Environment variable that names the spec of a launch.
LAUNCH = "UPSHIFT_LAUNCH"

#: Programs, and packages run with `-m`, that import torch and only start others.
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
NO_TRAINING = ("torch", "pip", "upshift", *LAUNCHERS)

_TOO_LATE = "it acts on the environment a process starts with, and a launcher starts this one"


def environment(spec_file: Path) -> dict[str, str]:
    """The environment of a launcher, in which every Python below it finds the hook."""
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(BELOW), *([inherited] if inherited else [])])
    return {**os.environ, "PYTHONPATH": path, LAUNCH: str(spec_file)}


def started(command: list[str]) -> tuple[str, bool]:
    """What an interpreter was started with (`sys.orig_argv`): a script or module, and whether it is a module.

    `-c` for code on the command line, `-` for standard input.
    """
    rest = iter(command[1:])
    for item in rest:
        if not item.startswith("-") or item == "-":
            return item, False
        if item.startswith("--"):
            next(rest, None)
            continue
        for place, letter in enumerate(item):
            if letter in "cmWX":
                value = item[place + 1 :] or next(rest, "")
                if letter in "cm":
                    return (value, True) if letter == "m" else ("-c", False)
                break
    return "-", False


def _only_starts_others(name: str, module: bool, torch: ModuleType) -> bool:
    """Launchers, and the helpers that torch itself starts (the compilers of inductor)."""
    if module:
        return name.partition(".")[0] in NO_TRAINING
    torch_folder = Path(str(torch.__file__)).parent
    return Path(name).name in LAUNCHERS or torch_folder in Path(name).absolute().parents


def torch_imported(spec_file: str, torch: ModuleType) -> None:
    """This process lies below a launcher and has imported torch: choose its plan and follow it.

    Args:
        spec_file: what was asked for, as `api.run` wrote it.
    """
    name, module = started(sys.orig_argv)
    if _only_starts_others(name, module, torch):
        return
    launch = msgspec.json.decode(Path(spec_file).read_bytes(), type=ChildSpec)
    spec = msgspec.structs.replace(launch, target=name, arguments=tuple(sys.argv[1:]), module=module)
    try:
        chosen = choose_plan(spec, msgspec.convert(launch.options["wanted"], Wanted))
    except PlanError as error:
        chosen = Chosen({}, "", (f"{error.message} Training the baseline.",))
    notes = chosen.notes
    if chosen.techniques and os.environ.get("WORLD_SIZE", "1") != "1":
        notes = (*notes, "the plan was measured with one process: its speed-up need not hold for several")
    more = {"plan_file": chosen.file, "notes": notes, "guard": chosen.guard, "pace": chosen.pace}
    spec = msgspec.structs.replace(spec, plan=chosen.techniques, options={**launch.options, **more})
    outside = {
        technique.card.name: _TOO_LATE
        for technique, _ in registry.in_order(spec.plan)
        if "process_env" in technique.card.sites
    }
    follow(spec, outside, torch)
