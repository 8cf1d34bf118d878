"""On a machine with an NVIDIA GPU, without network: the tests marked `cuda`, then stock against plan on two scripts.

    python benchmarks/gpu.py                 at most ten minutes; prints a markdown table
    python benchmarks/gpu.py --into FILE     and appends it to a file
    python benchmarks/gpu.py --skip-tests

For each script in benchmarks/gpu/, at its stock command line: `upshift tune --untested` searches a plan, whose ratio
with bounds comes from two fresh processes that take turns; then the script runs alone, stock and under the plan, and
tells its own throughput. These two runs follow each other, so their ratio has no interval and only has to agree. MFU is
against the dense bfloat16 peak that the maker of the GPU states. Needs Python 3.11, torch 2.10, pytest and upshift.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from upshift.hardware import catalog
from upshift.records import planfile
from upshift.records.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
UPSHIFT = [sys.executable, "-m", "upshift"]
SCRIPTS = ("gpt2", "resnet50")

#: Seconds: for everything, for the tests at most, and by which a process may exceed what it was given.
TOTAL, TESTS, GRACE = 600.0, 150.0, 45.0


@dataclass(frozen=True)
class Alone:
    """What a script told of itself, running alone."""

    unit: str
    flops: float
    per_second: float | None
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """One script: stock and under the plan."""

    name: str
    stock: Alone
    planned: Alone
    plan: Plan | None
    search: float
    note: str = ""


def run(command: list[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Exit code and output of a command; 124 where it had to be stopped."""
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return 124, process.communicate()[0]


def alone(command: list[str], folder: Path, seconds: float) -> Alone:
    """Run a script that prints JSON lines about itself."""
    code, text = run(command, folder, seconds)
    said: dict = {}
    for line in text.splitlines():
        if line.startswith("{"):
            said.update(json.loads(line))
    failure = "" if code == 0 else f"exit code {code}: {(text.strip().splitlines() or ['no output'])[-1]}"
    return Alone(said.get("unit", "?"), said.get("flops_per_unit", 0.0), said.get("per_second"), failure)


def tests_marked(name: str) -> list[str]:
    """The command that runs them, with whatever plugins of pytest are installed here."""
    beside = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    bare = ["-o", "addopts=", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-q", "-m", name, *bare, *beside]


def measure(name: str, arguments: list[str], seconds: float) -> Row:
    """Tune one script, then time it alone, in `seconds` altogether."""
    with tempfile.TemporaryDirectory(prefix="upshift-gpu-") as place:
        folder = Path(place)
        script = shutil.copy(ROOT / "benchmarks" / "gpu" / f"{name}.py", folder)
        own, plan_file = max(seconds * 0.05, 2.0), folder / "plan.toml"
        began = time.monotonic()
        budget = max(seconds * 0.5, 10.0)
        code, text = run(
            [*UPSHIFT, "tune", "--untested", "--quiet", "--budget", f"{budget:.0f}s",
             "--plan", str(plan_file), script, *arguments], folder, budget + GRACE + 0.1 * seconds,
        )  # fmt: skip
        search = time.monotonic() - began
        print(text, file=sys.stderr)
        plan = next(iter(planfile.read(plan_file).values())) if plan_file.exists() else None
        note = "" if plan is not None else f"tune ended with exit code {code}"
        timed, limit = [script, *arguments, "--seconds", f"{own:.1f}"], seconds * 0.1 + GRACE
        stock = alone([sys.executable, *timed], folder, limit)
        planned = stock
        if plan is not None and plan.kept:
            use = ["--plan", str(plan_file), "--allow-stale", "--require", "none", "--quiet"]
            planned = alone([*UPSHIFT, "run", *use, *timed], folder, limit)
        return Row(name, stock, planned, plan, search, note or stock.failure or planned.failure)


def figure(value: float | None, form: str, text: str = "unknown") -> str:
    """A figure, or that it is unknown."""
    return text if value is None else format(value, form)


def table(rows: list[Row], peak: float | None) -> str:
    """The rows as markdown. `peak`: FLOP/s of the device in bfloat16; None where its maker states none."""
    lines = [
        "| script | stock | MFU | plan | proof | faster (99 % bounds) | under the plan | MFU | run alone | search |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def speed(found: Alone) -> str:
        return f"{figure(found.per_second, ',.0f')} {found.unit}/s"

    def mfu(found: Alone) -> str:
        return figure(None if not peak or not found.per_second else found.per_second * found.flops / peak, ".1%")

    for row in rows:
        plan = row.plan
        names = "unknown" if plan is None else " + ".join(plan.techniques) or "baseline"
        proof = plan.proof.rung if plan is not None and plan.proof is not None else "-"
        faster = "-"
        if plan is not None and plan.speedup is not None:
            faster = f"{plan.speedup:.2f}x ({figure(plan.low, '.2f')} to {figure(plan.high, '.2f')})"
        both = row.stock.per_second and row.planned.per_second and plan is not None and plan.kept
        ratio = row.planned.per_second / row.stock.per_second if both else None
        lines.append(
            f"| {row.name} | {speed(row.stock)} | {mfu(row.stock)} | {names} | {proof} | {faster} "
            f"| {speed(row.planned)} | {mfu(row.planned)} | {figure(ratio, '.2f', '-')} | {row.search:.0f} s |"
        )
    lines += [f"\n{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join(lines)


def device() -> tuple[str, float | None]:
    """Name of the GPU, and its stated peak in bfloat16; asked in a process of its own, which leaves no context here."""
    code = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', torch.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, _, version = done.stdout.strip().rpartition(" ")
    found = catalog.find(name)
    return f"{name}, torch {version}, python {platform.python_version()}", found[1].bfloat16 if found else None


def main() -> None:
    """Test, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", default="", help="comma-separated script names")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything")
    parser.add_argument("--into", type=Path, help="append the table to this file")
    parser.add_argument("arguments", nargs="*", help="for the scripts, after --; without them the stock command line")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds - 10.0
    head, peak = device()
    tests = "not run"
    if not options.skip_tests:
        limit = min(TESTS, options.seconds / 4)
        code, text = run(tests_marked("cuda"), ROOT, limit)
        tests = f"exit code {code}: {(text.strip().splitlines() or ['no output'])[-1]}"
        print(text, file=sys.stderr)
    names = options.only.split(",") if options.only else SCRIPTS
    rows = []
    for number, name in enumerate(names):
        print(f"== {name}", file=sys.stderr)
        rows.append(measure(name, options.arguments, (end - time.monotonic()) / (len(names) - number)))
    text = f"{time.strftime('%Y-%m-%d')}, {head}\n\ntests marked cuda: {tests}\n\n{table(rows, peak)}\n"
    print(text)
    if options.into:
        with open(options.into, "a", encoding="utf-8") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
