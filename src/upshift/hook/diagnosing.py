"""The parent's side of `diagnose`: one isolated child, watched until it has seen enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from upshift.errors import NotIsolatedError, NoTrainingError, ScriptFailedError, UpshiftError, UsageError
from upshift.measure.metrics import pairs, suggestions
from upshift.records import Measurement
from upshift.sites.runner import ChildSpec, Runner


class Diagnosis(msgspec.Struct):
    """What the child reported."""

    measurement: Measurement
    count: dict[str, Any] | None
    how: str
    code: int | None
    files: tuple[str, ...] = ()


def observe(
    runner: Runner,
    spec: ChildSpec,
    *,
    on_progress: Callable[[int, float], None] = lambda steps, seconds: None,
    patience: float = 600.0,
    trace_to: Path | None = None,
) -> Diagnosis:
    """Run the script of `spec` in isolation and return what was seen.

    Args:
        on_progress: told steps seen and seconds since the first.
        patience: seconds to wait for the first step.
        trace_to: where to put the profiler trace, if one was asked for.

    Raises:
        NoTrainingError: it ended, or `patience` ran out, without a training step.
        ScriptFailedError: it crashed before a step was seen.
    """
    child = runner.start(spec, name="diagnose")
    isolation = ""
    deadline = time.monotonic() + patience
    try:
        while True:
            message = child.receive(max(deadline - time.monotonic(), 0.0))
            if message is None:
                raise NoTrainingError(
                    f"{spec.target} made no training step within {patience:.0f} s.",
                    remedy="If its start-up is that slow, raise --patience; check that its arguments start a training.",
                )
            kind = message.get("kind")
            if kind == "isolation":
                isolation = f"{message['rung']}: {message['detail']}"
            elif kind == "progress":
                on_progress(int(message["steps"]), float(message["seconds"]))
                deadline = time.monotonic() + patience
            elif kind == "refused":
                raise refusal(message)
            elif kind == "gone":
                raise ScriptFailedError(
                    f"{spec.target} died without a word (exit code {message.get('code')}).\n{_tail(child.output())}",
                    remedy="Run it once with plain python; if it is killed there too, it may need more memory.",
                )
            elif kind == "diagnosis":
                if "measurement" not in message:
                    _explain_nothing(spec, message, child.output())
                measurement = msgspec.convert(message["measurement"], Measurement)
                notes = (*measurement.notes, *_metrics_in(child.output()))
                measurement = msgspec.structs.replace(measurement, isolation=isolation, notes=notes)
                trace = child.record / "trace.json"
                if trace_to is not None and trace.exists():
                    trace_to.write_bytes(trace.read_bytes())
                return Diagnosis(
                    measurement=measurement, count=message.get("count"), how=message["how"], code=message["code"],
                    files=tuple(message.get("files", ())),
                )  # fmt: skip
    finally:
        child.kill()


def _metrics_in(output: str) -> list[str]:
    """A note on numbers in the output that look like a metric of an evaluation."""
    names = [name for line in output.splitlines() for name, _ in pairs(line)]
    found = suggestions(names)
    if not found:
        return []
    options = " or ".join(f"--metric '{name}'" for name in found[:3])
    return [f"the script prints a metric: upshift verify {options} can hold a plan to it"]


def refusal(message: dict[str, Any]) -> UpshiftError:
    """The error a child stated before anything of the script ran."""
    known: dict[int, type[UpshiftError]] = {item.exit_code: item for item in (UsageError, NotIsolatedError)}
    kind = known.get(int(message.get("code", 0)), UpshiftError)
    return kind(str(message["text"]), remedy=str(message.get("remedy", "")))


def _explain_nothing(spec: ChildSpec, message: dict[str, Any], output: str) -> None:
    code, how = message.get("code"), message["how"]
    tail = _tail(output)
    if code not in (0, None):
        remedy = "It must run under plain python with these arguments first."
        if "EOFError" in how or "EOF when reading" in tail:
            remedy = "It reads standard input, which a trial does not have; give its input as arguments."
        elif code == 2 and "usage:" in output:
            remedy = f"It wants other arguments; everything after {spec.target} is passed to it."
        raise ScriptFailedError(f"{spec.target} failed before its first training step: {how}\n{tail}", remedy=remedy)
    what = "without importing torch" if not message.get("torch") else "without a training step"
    remedy = "upshift needs a script that trains: a backward pass and an optimizer step."
    if message.get("backward"):
        remedy = "A backward pass was seen, but no torch.optim optimizer stepped; updates by hand are not seen."
    elif message.get("torch"):
        remedy += " Trainings in processes that a script starts itself can be run and recorded, but not diagnosed."
    raise NoTrainingError(f"{spec.target} ended {what}.", remedy=remedy)


def _tail(output: str, lines: int = 12) -> str:
    return "\n".join(output.rstrip().splitlines()[-lines:])
