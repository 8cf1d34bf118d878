"""Which plan a run uses: the one beside its script, where it still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from upshift.errors import PlanError, UsageError
from upshift.hardware.device import device_name, kinds_here
from upshift.records import Plan, planfile
from upshift.records.fingerprint import changes, fingerprint, own_version
from upshift.records.plan import Fingerprint, Setting
from upshift.records.planfile import slug
from upshift.sites import Numerics
from upshift.sites.risk import suspicion
from upshift.sites.runner import ChildSpec
from upshift.techniques import registry

#: Rungs of the proof from weak to strong; bitwise losses are the strongest evidence of a trajectory.
_RUNG_ORDER = {"none": 0, "update": 1, "trajectory": 2, "bitwise": 2, "metric": 3}


class Wanted(msgspec.Struct, frozen=True):
    """What was asked for. `plan` empty: the file beside the script if there is one. `require`: least rung, or empty."""

    plan: str = ""
    no_plan: bool = False
    allow_stale: bool = False
    require: str = ""


@dataclass(frozen=True)
class Chosen:
    """The plan a run will use, and what to say about it."""

    techniques: dict[str, dict[str, Any]]
    file: str
    notes: tuple[str, ...]
    guard: dict[str, Any] = field(default_factory=dict)
    """What the run holds its loss against; see `hook.lossguard`."""
    pace: dict[str, Any] | None = None
    """How long a step took when the plan was made; see `hook.pace`."""


def stem(target: str, module: bool) -> Path:
    """Where files named after a target lie: beside the script, or in the current folder for a module."""
    return Path(target).with_suffix("") if not module else Path(target.replace(".", "-"))


def plan_beside(target: str, module: bool) -> Path:
    """`train.upshift.toml` beside `train.py`."""
    return Path(f"{stem(target, module)}.upshift.toml")


def read_plans(file: Path) -> dict[str, Plan]:
    """The plans in a file, by device slug.

    Raises:
        PlanError: there is no such file, it is no plan of this version, or names an unknown technique or setting.
    """
    if not file.exists():
        raise PlanError(f"there is no plan {file}.", remedy="Check the path, or run upshift tune first.")
    plans = planfile.read(file)
    for section, plan in plans.items():
        registry.check_plan(plan, f"{file}: devices.{section}")
    return plans


def choose_plan(spec: ChildSpec, wanted: Wanted) -> Chosen:
    """The plan for this script on this machine; the baseline, with the reason, where it no longer holds.

    Raises:
        PlanError: see `read_plans`.
    """
    if wanted.no_plan:
        return Chosen({}, "", ("no plan, as asked: the run is only recorded",))
    file = Path(wanted.plan) if wanted.plan else plan_beside(spec.target, spec.module)
    if not wanted.plan and not file.exists():
        return Chosen({}, "", (f"no plan beside {spec.target}: the run is only recorded",))
    plans = read_plans(file)
    for kind in kinds_here():
        device = device_name(kind)
        found = plans.get(slug(device))
        if found is not None:
            return _still_good(spec, wanted, file, found, device)
    names = ", ".join(plan.device for plan in plans.values()) or "none"
    if wanted.allow_stale and len(plans) == 1:
        (only,) = plans.values()
        note = f"plan for another device ({names}) used, as asked"
        return Chosen(only.techniques, str(file), (note,), _guard(only, stale=True))
    return Chosen({}, "", (f"{file} has no plan for this device (it has: {names}); training the baseline",))


def check_tuning(target: str, module: bool, wanted: Wanted, *, launcher: bool) -> None:
    """Whether a run can tune itself.

    Raises:
        UsageError: it has a plan, is to reach a rung that it cannot, or starts other programs.
    """
    if launcher:
        raise UsageError(
            f"{target} starts other programs; --tune works inside one process.",
            remedy="Name the training script itself, or leave --tune out.",
        )
    if wanted.require not in ("", "none", "update"):
        raise UsageError(
            f"--tune cannot reach the rung {wanted.require!r}: a run that tunes itself has no untouched twin to be "
            "compared with.",
            remedy="Make a plan with that proof: upshift tune; or leave --require out.",
        )
    file = Path(wanted.plan) if wanted.plan else plan_beside(target, module)
    if wanted.plan or (file.exists() and not wanted.no_plan):
        raise UsageError(
            f"--tune starts from the untouched script, but there is a plan: {file}.",
            remedy="Train with the plan (leave --tune out), or without it: --no-plan --tune DURATION.",
        )


def mark(
    target: str, arguments: Sequence[str], techniques: dict[str, dict[str, Setting]], device: str,
    files: Sequence[str], *, module: bool,
) -> Fingerprint:  # fmt: skip
    """What a plan of these techniques is measured on, and must still be when it is used."""
    return fingerprint(
        target, arguments, device, techniques, files=files, module=module, packages=registry.packages(techniques)
    )


def _still_good(spec: ChildSpec, wanted: Wanted, file: Path, plan: Plan, device: str) -> Chosen:
    now = mark(spec.target, spec.arguments, plan.techniques, device, plan.fingerprint.files, module=spec.module)
    notes: list[str] = []
    stale = changes(plan, now)
    if stale and not wanted.allow_stale:
        reasons = "; ".join(stale)
        return Chosen({}, "", (f"{file} is stale: {reasons}. Training the baseline (--allow-stale overrides).",))
    if stale:
        notes.append(f"stale plan used, as asked: {'; '.join(stale)}")
    if not plan.kept:
        return Chosen({}, "", (f"{file} says: keep your baseline",))
    rung = plan.proof.rung if plan.proof is not None else "none"
    labelled = plan.proof is not None and bool(plan.proof.weaker)
    least = wanted.require or ("update" if labelled else "trajectory")
    if _RUNG_ORDER[rung] < _RUNG_ORDER[least]:
        return Chosen({}, "", (f"{file} reached rung '{rung}', '{least}' is required; training the baseline",))
    if plan.energy is not None and plan.energy.mean is not None:
        less = f"{plan.energy.mean:.2f}x less energy ({plan.energy.basis}) to the target"
        notes.append(f"plan {file}: {' + '.join(plan.techniques)}, {less}, proof '{rung}'")
    elif plan.speedup is not None:
        notes.append(f"plan {file}: {' + '.join(plan.techniques)}, {plan.speedup:.2f}x, proof '{rung}'")
    elif plan.to_target is not None and plan.to_target.mean is not None:
        sooner = f"target {plan.to_target.mean:.2f}x sooner, another training"
        notes.append(f"plan {file}: {' + '.join(plan.techniques)}, {sooner}, proof '{rung}'")
    if labelled and plan.proof is not None:
        notes.append(f"weaker proof: {plan.proof.weaker}")
    here = own_version()
    if here and plan.upshift not in ("", here):
        notes.append(
            f"the plan was made with upshift {plan.upshift}, this is {here}: its techniques may act otherwise, "
            "and newer ones were not tried; tune again when there is time"
        )
    pace = msgspec.to_builtins(plan.pace) if plan.pace is not None and not stale else None
    return Chosen(plan.techniques, str(file), tuple(notes), _guard(plan, stale=bool(stale)), pace)


def _guard(plan: Plan, *, stale: bool) -> dict[str, Any]:
    """The band of the plan, or why there is none, and its techniques with the most suspect first."""
    proof = plan.proof
    band = proof.band if proof is not None and not stale else None
    why = proof.no_band if proof is not None else ""
    if stale:
        why = "the plan is stale, so that its band of the loss may not fit"
    elif band is None and not why:
        why = "the plan holds no band of the loss"
    # A kind this version does not know is suspected first.
    known = tuple(Numerics)
    kinds = {
        item.name: Numerics(item.numerics) if item.numerics in known else Numerics.CHANGES_TRAINING
        for item in plan.kept
    }
    order = sorted(kinds, key=lambda name: suspicion(kinds[name], registry.get(name).card.precision), reverse=True)
    return {
        "band": msgspec.to_builtins(band),
        "no_band": why,
        "suspects": {name: str(kinds[name]) for name in order},
    }
