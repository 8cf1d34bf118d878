"""Step time predicted against step time measured, from one measurement of each training.

    python benchmarks/ledger/steptime.py [--only NAME] [--malloc default] [--json FILE]

A fresh process for each training and number of threads. It times the phases of a step, looks at one with
`StepObserver`, and times steps at other samples (half, twice, four times), widths (0.75, 1.5) and in bfloat16 under
autocast. What was seen of the first predicts all others: other samples and precisions by `steptime.scale`, other widths
by `steptime.of_other` from a dry run on meta tensors. Then one thread predicts as many as there are cores, and they
one: stand-ins for other devices, whose peaks the probe measured. Reported: how many are within 20 %, and how many of
the devices' and precisions' intervals hold what was measured. Times are medians. What glibc gives back to the system
costs a page fault when it is taken again, from some size of the samples on, so it keeps all here; `--malloc default`
leaves it as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GOAL, SHARE = 0.20, 0.9
BATCHES, WIDTHS = (0.5, 2.0, 4.0), (0.75, 1.5)
SECONDS, LEAST = 1.0, 4

#: glibc keeps what was freed, as the technique `allocator` has it.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def timed(training: Any, seconds: float = SECONDS) -> dict[str, float]:
    """Medians of a step and its phases."""
    rows: list[tuple[float, float, float]] = []
    begin = time.perf_counter()
    while len(rows) < LEAST + 2 or time.perf_counter() - begin < seconds:
        training.optimizer.zero_grad()
        start = time.perf_counter()
        loss = training.forward()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        training.optimizer.step()
        rows.append((forward - start, backward - forward, time.perf_counter() - backward))
    rows = rows[2:]
    forward, backward, optimizer = (statistics.median(column) for column in zip(*rows, strict=True))
    step = statistics.median(sum(row) for row in rows)
    return {"forward": forward, "backward": backward, "optimizer": optimizer, "step": step}


def observed(training: Any, batch: int) -> Any:
    from upshift.hook.activations import StepObserver

    observer = StepObserver([training.model], [training.optimizer], batch)
    assert observer.start()
    for _ in range(2):
        training.step()
        observer.step_ended()
    return observer.found()


def child(name: str, threads: int) -> None:
    import msgspec
    import torch
    from workloads import ALL

    from upshift.hardware.machine import bf16_native
    from upshift.hardware.probe import probe

    torch.set_num_threads(threads)
    make, batch = ALL[name]
    peaks = probe("cpu", threads=threads)
    torch.manual_seed(0)
    training = make(1.0, batch)
    first = timed(training)
    work = observed(training, batch)
    found: dict[str, Any] = {"batch": batch, "measured": {}, "others": {}}
    if threads > 1:
        for factor in BATCHES:
            other = make(1.0, int(batch * factor))
            found["measured"][f"batch {factor:g}"] = timed(other)["step"]
            del other
        for scale in WIDTHS:
            found["measured"][f"width {scale:g}"] = timed(make(scale, batch))["step"]
            with torch.device("meta"):
                dry = make(scale, batch)
            for state in dry.optimizer.state.values():
                # Adagrad counts its steps from the beginning, and a counter must hold a number.
                state.update({key: torch.tensor(0.0) for key in state if key == "step"})
            found["others"][f"width {scale:g}"] = msgspec.to_builtins(observed(dry, batch))
        # Emulated, it takes many times as long, and the probe cannot tell how many.
        if not training.bf16 and bf16_native():
            training.bf16 = True
            found["measured"]["bf16"] = timed(training)["step"]
            training.bf16 = False
    again = timed(training)
    # Before and after the others: the machine drifts.
    found["phases"] = {key: (first[key] + again[key]) / 2 for key in first}
    found["work"] = msgspec.to_builtins(work)
    found["autocast"] = training.bf16
    found["peaks"] = {"flops": {key: peak.value for key, peak in peaks.flops.items()},
                      "bandwidth": peaks.bandwidth.value}  # fmt: skip
    print(json.dumps(found))


def in_process(name: str, threads: int, malloc: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(KEPT if malloc == "kept" else {})}
    command = [sys.executable, __file__, "--child", str(threads), "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measurement(found: dict[str, Any]) -> Any:
    """What `diagnose` would have recorded."""
    import msgspec

    from upshift.records import Anatomy, Measurement, Phase, Quantity, ScriptFacts, unknown
    from upshift.records.stepwork import StepWork

    def seconds(value: float) -> Quantity:
        return Quantity(value=value, unit="s", n=1)

    phases = found["phases"]
    shown = tuple(Phase(name, seconds(phases[name]), Quantity(phases[name] / phases["step"], "fraction"))
                  for name in ("forward", "backward", "optimizer"))  # fmt: skip
    anatomy = Anatomy(
        step=seconds(phases["step"]), phases=shown, steps_seen=10, warmup_steps=2, warmup=unknown("s"),
        startup=unknown("s"), evaluation=unknown("s"), checkpointing=unknown("s"), micro_batches=unknown("batches"),
        samples=unknown("samples"),
    )  # fmt: skip
    return Measurement(script="benchmark", arguments=(), created="", anatomy=anatomy,
                       facts=ScriptFacts(autocast=found["autocast"]),
                       work=msgspec.convert(found["work"], StepWork))  # fmt: skip


def device(found: dict[str, Any], threads: int) -> Any:
    from upshift.records.estimate import DeviceFigures

    peaks = found["peaks"]
    return DeviceFigures(name=f"{threads} threads", kind="cpu", flops=peaks["flops"], bandwidth=peaks["bandwidth"],
                         measured=True)  # fmt: skip


def rows_of(name: str, many: dict[str, Any], one: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    import msgspec

    from upshift.advise import steptime
    from upshift.records.stepwork import StepWork

    seen, here, single = measurement(many), device(many, threads), device(one, 1)
    predicted: dict[str, tuple[str, Any, float]] = {}
    for factor in BATCHES:
        key = f"batch {factor:g}"
        samples = int(many["batch"] * factor)
        predicted[key] = ("same", steptime.scale(seen, here, here, batch=samples), many["measured"][key])
    for scale in WIDTHS:
        key = f"width {scale:g}"
        other = msgspec.convert(many["others"][key], StepWork)
        predicted[key] = ("same", steptime.of_other(seen, other, here), many["measured"][key])
    if "bf16" in many["measured"]:
        predicted["bf16"] = ("device", steptime.scale(seen, here, here, precision="bf16"), many["measured"]["bf16"])
    predicted["to one thread"] = ("device", steptime.scale(seen, here, single), one["phases"]["step"])
    predicted["from one thread"] = ("device", steptime.scale(measurement(one), single, here), many["phases"]["step"])
    rows = []
    for key, (kind, answer, measured) in predicted.items():
        step = answer.step
        if step.value is None or step.low is None or step.high is None:
            raise SystemExit(f"{name}, {key}: unknown: {answer.why}")
        rows.append({"name": name, "what": key, "kind": kind, "predicted": step.value, "measured": measured,
                     "error": step.value / measured - 1, "held": step.low <= measured <= step.high,
                     "low": step.low, "high": step.high})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    parser.add_argument("--malloc", choices=["kept", "default"], default="kept")
    parser.add_argument("--child", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if options.child:
        child(options.only, options.child)
        return
    from workloads import ALL

    from upshift.hardware.machine import usable_cores

    threads = max(usable_cores(), 2)
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for name in [options.only] if options.only else list(ALL):
        found = rows_of(name, in_process(name, threads, options.malloc), in_process(name, 1, options.malloc), threads)
        rows += found
        for row in found:
            held = "" if row["kind"] == "same" else " held" if row["held"] else " MISSED"
            print(f"{name:<12} {row['what']:<16} predicted {row['predicted'] * 1e3:8.1f} ms, measured "
                  f"{row['measured'] * 1e3:8.1f} ms, {row['error']:+.1%}{held}", flush=True)  # fmt: skip
    same = [row for row in rows if row["kind"] == "same" or row["what"] == "bf16"]
    others = [row for row in rows if row["kind"] == "device"]
    good, held = sum(abs(row["error"]) <= GOAL for row in same), sum(row["held"] for row in others)
    print(f"same machine: {good} of {len(same)} within {GOAL:.0%} (goal: {SHARE:.0%} of them)")
    print(f"stand-ins for other devices: {held} of {len(others)} intervals hold (goal: {SHARE:.0%})")
    print(f"{time.monotonic() - began:.0f} s; {platform.processor() or platform.machine()}, {threads} threads")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
