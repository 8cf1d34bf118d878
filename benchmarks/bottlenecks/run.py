"""Diagnose scripts whose bottleneck is known, and count how often the first finding is the right one.

    python benchmarks/bottlenecks/run.py                        all of them, about 15 s each
    python benchmarks/bottlenecks/run.py --only printing,tiny_batch
    python benchmarks/bottlenecks/run.py --gain                 also hold predicted gains against achieved ones
    python benchmarks/bottlenecks/run.py --again                judge the measurements of the last time anew
    python benchmarks/bottlenecks/run.py --set fresh            scripts that no rule was written to: an honest count

A script that cannot be diagnosed counts as wrong. Measurements and achieved gains are kept in the folder given with
--keep.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fresh_truth
import truth
from pace import achieved
from truth import Case

from upshift.diagnose import diagnose
from upshift.records import Finding, Measurement, codec

#: Predicted and achieved gain agree where they lie within this share of one another.
WITHIN = 0.25

#: Rules were written with the development set in sight, and are counted on the fresh one.
SETS = {"development": truth.CASES, "fresh": fresh_truth.CASES}

#: Seconds after which a diagnosis is given up.
PATIENCE = 180.0


def measure(case: Case, file: Path, seconds: float) -> None:
    """Diagnose the script of a case into `file`; without a file, why not was said on stderr."""
    command = [sys.executable, "-m", "upshift", "diagnose", "-q", "--seconds", f"{seconds:g}s", "--json", str(file)]
    file.unlink(missing_ok=True)
    child = subprocess.Popen(
        [*command, str(case.file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        output += f"\nno diagnosis within {PATIENCE:.0f} s"
    if child.returncode:
        file.unlink(missing_ok=True)
        print(f"{case.name}: diagnose failed\n{output}", file=sys.stderr)


def is_right(case: Case, findings: tuple[Finding, ...]) -> bool:
    """Whether the first finding names the bottleneck; for a clean script, whether nothing is called major."""
    if case.clean:
        return not any(item.severity == "major" for item in findings)
    return bool(findings) and findings[0].rule in case.expected


def said(findings: tuple[Finding, ...]) -> str:
    """The first findings, in a few words."""
    words = [f"{item.rule} {item.gain.value:.2f}x" if item.gain.known else item.rule for item in findings[:3]]
    return ", ".join(words) or "no finding"


def predicted(case: Case, findings: tuple[Finding, ...]) -> float | None:
    """The gain that the first right finding predicts."""
    return next((item.gain.value for item in findings if item.rule in case.expected), None)


def main() -> None:
    """Run the cases and print a table."""
    # Where other programs use the cores, threads that spin at a barrier keep each other from their work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", choices=tuple(SETS), default="development", help="which scripts (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="names of scripts, separated by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each script is watched")
    parser.add_argument("--gain", action="store_true", help="measure what the fix of each script achieves")
    parser.add_argument("--again", action="store_true", help="judge kept measurements; measure only what is missing")
    parser.add_argument("--keep", type=Path, default=Path(".upshift") / "bottlenecks", help="folder for measurements")
    args = parser.parse_args()
    wanted = set(filter(None, args.only.split(",")))
    chosen = SETS[args.set]
    if unknown := wanted - {case.name for case in chosen}:
        parser.error(f"no such script: {', '.join(sorted(unknown))}")
    args.keep.mkdir(parents=True, exist_ok=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    right = close = compared = 0
    cases = [case for case in chosen if not wanted or case.name in wanted]
    for case in cases:
        file, gain_file = args.keep / f"{case.name}.json", args.keep / f"{case.name}.gain.json"
        if not (args.again and file.exists()):
            measure(case, file, args.seconds)
        if not file.exists():
            print(f"{'WRONG':6}{case.name:25}no diagnosis", flush=True)
            continue
        # Findings about what is learnt predict no gain, and those that do are no part of judging them.
        seen = diagnose(codec.read(file, Measurement))
        findings = tuple(item for item in seen if item.gain.known is not case.about_learning)
        good = is_right(case, findings)
        right += good
        line = f"{'right' if good else 'WRONG':6}{case.name:25}{said(findings)}"
        if case.gain and not case.clean:
            if args.gain and not (args.again and gain_file.exists()):
                gain_file.write_text(json.dumps(achieved(case.file) * case.work))
            hoped = predicted(case, findings)
            if gain_file.exists():
                real = float(json.loads(gain_file.read_text()))
                compared += 1
                agrees = hoped is not None and abs(hoped / real - 1) <= WITHIN
                close += agrees
                line += f" | predicted {hoped or 1:.2f}x achieved {real:.2f}x{'' if agrees else ' OFF'}"
        print(line, flush=True)
    print(f"right: {right} of {len(cases)}")
    if compared:
        print(f"predicted within {WITHIN:.0%} of achieved: {close} of {compared}")


if __name__ == "__main__":
    main()
