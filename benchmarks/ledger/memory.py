"""Memory predicted against memory measured: the most a training takes on the CPU.

    python benchmarks/ledger/memory.py [--only NAME] [--malloc default] [--json FILE]

Two fresh processes for each training. The first makes some steps, reads its own peak and looks at a step with
`StepObserver`, at the samples it was given; from what it saw the peak is predicted for other samples (`--factor`).
The second trains at those, seeing nothing: its peak is the most resident memory (VmHWM, set back before the model is
made) above what the process had after a tiny training of the same kind, so that libraries, threads and code do not
count on either side. Reported: each error, and how many are within 10 %. One thread each would hide the kernels' own
scratch memory: as many threads as cores are used.

Gaps in glibc's heap depend on the order of a hundred frees and differ by 15 % between equal runs, so blocks are mapped
one by one (MALLOC_MMAP_THRESHOLD_=65536); `--malloc default` leaves them as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOAL, SHARE = 0.10, 0.9

#: glibc gives every larger block its own pages, so that what is given back leaves no gaps.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def warmed(make: Callable[[float, int], Any]) -> int:
    """Resident bytes after a tiny training of the same kind; the peak is counted from here on."""
    import torch

    from upshift.hook.activations import resident

    torch.manual_seed(0)
    small = make(0.125, 2)
    small.step()
    small.step()
    del small
    Path("/proc/self/clear_refs").write_text("5")
    base = resident()
    assert base is not None
    return base


def observe(name: str, factor: float) -> None:
    from workloads import ALL

    from upshift.advise import memory
    from upshift.hook.activations import StepObserver

    make, batch = ALL[name]
    base = warmed(make)
    training = make(1.0, batch)
    for _ in range(4):
        training.step()
    observer = StepObserver([training.model], [training.optimizer], batch, process_base=base)
    assert observer.start()
    for _ in range(2):
        training.step()
        observer.step_ended()
    work = observer.found()
    found = memory.predict(work, batch=int(batch * factor), autocast=training.bf16)
    parts = {key: part.value for key, part in found.parts.items()}
    print(json.dumps({"bytes": found.total.value, "parts": parts, "low": found.total.low, "high": found.total.high}))


def measure(name: str, factor: float) -> None:
    from workloads import ALL

    from upshift.hook.activations import resident_peak

    make, batch = ALL[name]
    base = warmed(make)
    training = make(1.0, int(batch * factor))
    for _ in range(4):
        training.step()
    peak = resident_peak()
    assert peak is not None
    print(json.dumps({"bytes": peak - base}))


def child(what: str, name: str, factor: float, malloc: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, "--only", name, "--factor", str(factor)]
    environment = {**os.environ, **(MAPPED if malloc == "mapped" else {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{what} {name}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    parser.add_argument("--factor", type=float, default=2.0, help="samples measured, by those watched")
    parser.add_argument("--malloc", choices=["mapped", "default"], default="mapped")
    parser.add_argument("--child", choices=["observe", "measure"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.child:
        sys.path.insert(0, str(Path(__file__).parent))
        {"observe": observe, "measure": measure}[options.child](options.only, options.factor)
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from workloads import ALL

    names = [options.only] if options.only else list(ALL)
    rows, began = [], time.monotonic()
    for name in names:
        predicted, measured = (child(what, name, options.factor, options.malloc) for what in ("observe", "measure"))
        error = predicted["bytes"] / measured["bytes"] - 1
        rows.append({"name": name, "predicted": predicted["bytes"], "measured": measured["bytes"], "error": error})
        print(f"{name:<12} predicted {predicted['bytes'] / 2**20:7.1f} MiB, measured "
              f"{measured['bytes'] / 2**20:7.1f} MiB, {error:+.1%}", flush=True)  # fmt: skip
    good = sum(abs(row["error"]) <= GOAL for row in rows)
    print(f"{good} of {len(rows)} within {GOAL:.0%} (goal: {SHARE:.0%} of them); {time.monotonic() - began:.0f} s; "
          f"{platform.processor() or platform.machine()}, python {platform.python_version()}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
