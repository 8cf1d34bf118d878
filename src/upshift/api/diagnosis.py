"""diagnose(): the script as it is, watched; see `diagnose`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from upshift.api.target import Say, Target
from upshift.errors import RecordError
from upshift.hardware import machine
from upshift.hook.process import HookRunner
from upshift.records import Finding, Measurement, codec
from upshift.records.plan import Setting
from upshift.sites.runner import ChildSpec

if TYPE_CHECKING:
    from upshift.hook.diagnosing import Diagnosis


@dataclass
class DiagnoseOptions:
    """How long to watch and what to write."""

    seconds: float = 20.0
    trace: str = ""
    isolate: bool = True
    allow_remote_writes: bool = False
    patience: float = 600.0
    probe: bool = True
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, dict[str, Setting]] = field(default_factory=dict)
    """Techniques that the script is watched with: empty, but where it cannot run without them."""


@dataclass(frozen=True)
class Diagnosed:
    """A diagnosis: what was measured, what follows from it."""

    measurement: Measurement
    findings: tuple[Finding, ...]
    verdict: str
    files: tuple[str, ...] = ()


def _peaks(device: str, say: Say) -> Any:
    """The machine's measured peaks, from the cache or from a process of its own; None where it could not be probed."""
    from upshift.hardware.probe import Peaks

    with tempfile.TemporaryDirectory(prefix="upshift-") as folder:
        file = Path(folder) / "peaks.json"
        say("measuring this machine's peaks (once)")
        subprocess.run(
            [sys.executable, "-m", "upshift.hardware.probe", "--device", device, "--json", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        return codec.read(file, Peaks) if file.exists() else None


def _with_floor(diagnosis: Diagnosis, say: Say) -> Measurement:
    from upshift.measure.flops import StepCount, floor

    measurement = diagnosis.measurement
    if diagnosis.count is None:
        return measurement
    try:
        peaks = _peaks(measurement.facts.device, say)
    except (subprocess.TimeoutExpired, RecordError, OSError):
        peaks = None
    if peaks is None:
        return measurement
    count = msgspec.convert(diagnosis.count, StepCount)
    return msgspec.structs.replace(measurement, floor=floor(count, measurement.anatomy.step, peaks))


def child(target: Target, options: DiagnoseOptions, mode: Any) -> ChildSpec:
    return ChildSpec(
        mode=mode,
        target=target.name,
        arguments=target.arguments,
        module=target.module,
        seed=options.seed,
        isolate=options.isolate,
        options={"allow_remote_writes": options.allow_remote_writes, **options.extra},
    )


def diagnose(target: Target, options: DiagnoseOptions | None = None, say: Say = lambda text: None) -> Diagnosed:
    """Run the script as it is, isolated, until enough is seen; nothing of the user's is touched.

    Raises:
        UsageError: no such script.
        NoTrainingError: no training step was seen.
        ScriptFailedError: it crashed first.
    """
    from upshift.diagnose.registry import diagnose as find
    from upshift.diagnose.verdict import verdict as say_verdict
    from upshift.hook.diagnosing import observe

    options = options or DiagnoseOptions()
    target = target.check().script
    spec = child(target, options, "diagnose")
    spec = msgspec.structs.replace(
        spec, plan=options.plan,
        options={**spec.options, "seconds": options.seconds, "trace": "trace" if options.trace else ""},
    )  # fmt: skip

    def progress(steps: int, seconds: float) -> None:
        say(f"watching: {steps} steps, {seconds:.0f} of at most {options.seconds:.0f} s")

    say("starting the script")
    found = observe(
        HookRunner(),
        spec,
        on_progress=progress,
        patience=options.patience,
        trace_to=Path(options.trace) if options.trace else None,
    )
    measurement = _with_floor(found, say) if options.probe else found.measurement
    measurement = msgspec.structs.replace(measurement, machine=machine.describe())
    if found.code not in (None, 0):
        note = f"the script failed after {measurement.anatomy.steps_seen} steps: {found.how}"
        measurement = msgspec.structs.replace(measurement, notes=(*measurement.notes, note))
    findings = find(measurement)
    return Diagnosed(measurement, findings, say_verdict(measurement, findings), found.files)
