"""Stock against plan on the example scripts (or any script): tune, then time fresh interleaved pairs.

    python benchmarks/bench.py                       every example, sizes as in benchmarks/README.md
    python benchmarks/bench.py --only digits,vae     some of them
    python benchmarks/bench.py --script path/to/train.py -- --epochs 3     somebody else's script

Every ratio comes from two fresh processes that pass a token (ABBA quads), not from the search that picked the plan.
Prints a markdown table and appends it, with machine and versions, to the file given with --into.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from upshift import api
from upshift.hardware import machine
from upshift.hook.process import HookRunner
from upshift.measure.paired import pairing
from upshift.search.duel import ArmFailed, Duel, Ended
from upshift.search.screening import one_off_seconds, with_epochs
from upshift.sites.runner import ChildSpec
from upshift.units import seconds as in_words

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ("char_gpt", "digits", "cifar_resnet", "vae", "lstm_lm", "dcgan", "tabular_mlp")


def fresh_pair(target: api.Target, plan: dict, seconds: float, per_epoch: float | None) -> dict:
    """Stock and plan in two fresh processes, alternating for `seconds`."""
    spec = ChildSpec(mode="arm", target=target.name, arguments=target.arguments, module=target.module, seed=1)
    duel = Duel(HookRunner(), spec, timeout=300.0, patience=600.0, seed=7)
    try:
        duel.start({})
        duel.start(plan)
        duel.level(8)
        if per_epoch and "cache" in plan:
            duel.level(int(per_epoch) + 4, chunk=50)
        once = one_off_seconds(*duel.arms)
        quads: list[float] = []
        duel.fight(seconds, decide=False, on_quad=lambda found, _: quads.__setitem__(slice(None), found.quads))
        found = with_epochs(pairing(quads, steps=(duel.step(0), duel.step(1))), *duel.arms, per_epoch)
        return {"pairing": found, "once": once}
    finally:
        duel.close()


def one(name: str, target: api.Target, budget: float | None, seconds: float) -> dict:
    """Tune a script and time its plan on fresh pairs."""
    began = time.monotonic()
    tuned = api.tune(target, api.TuneOptions(budget=budget), say=lambda text: print(f"  {text}", file=sys.stderr))
    search = time.monotonic() - began
    assert tuned.plan is not None
    row = {
        "name": name,
        "search": search,
        "plan": " + ".join(tuned.plan.techniques) or "baseline",
        "rung": tuned.plan.proof.rung if tuned.plan.proof else "-",
        "steps": tuned.report.measurement.facts.steps_total,
        "step": tuned.report.measurement.anatomy.step.value,
        "ratio": 1.0,
        "low": 1.0,
        "high": 1.0,
        "quads": 0,
        "once": 0.0,
    }
    if tuned.plan.kept:
        from upshift.search.autopilot import steps_per_epoch

        per_epoch = steps_per_epoch(tuned.report.measurement)
        try:
            fresh = fresh_pair(target, tuned.plan.techniques, seconds, per_epoch)
        except (ArmFailed, Ended, ValueError) as error:
            row["plan"] += f" (not timed: {error})"
            return row
        found = fresh["pairing"]
        row.update(ratio=found.ratio, low=found.low, high=found.high, quads=found.quads, once=fresh["once"])
        row["step"] = found.reference_step
    return row


def whole(row: dict) -> float | None:
    """Whole training, stock over planned with the search included; estimated from the measured steps."""
    if not row["steps"] or not row["step"]:
        return None
    stock = row["steps"] * row["step"]
    return stock / (stock / row["ratio"] + row["once"] + row["search"])


def table(rows: list[dict]) -> str:
    """The rows as markdown."""
    lines = [
        "| script | plan | proof | stock step | faster (99 % bounds) | quads | one-off | search | run with search |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total = whole(row)
        lines.append(
            f"| {row['name']} | {row['plan']} | {row['rung']} | {in_words(row['step'] or 0)} "
            f"| {row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f}) | {row['quads']} | {in_words(row['once'])} "
            f"| {in_words(row['search'])} | {'unknown' if total is None else f'{total:.2f}x'} |"
        )
    mean = math.exp(math.fsum(math.log(row["ratio"]) for row in rows) / max(len(rows), 1))
    totals = [found for row in rows if (found := whole(row)) is not None]
    lines.append("")
    lines.append(f"Geometric mean {mean:.2f}x over {len(rows)} scripts; least {min(r['ratio'] for r in rows):.2f}x.")
    if totals:
        geo = math.exp(math.fsum(map(math.log, totals)) / len(totals))
        lines.append(f"With the search included, at full length (estimated from steps): {geo:.2f}x.")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated example names")
    parser.add_argument("--budget", type=float, help="search budget in seconds (default: that of `upshift tune`)")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the fresh pair")
    parser.add_argument("--script", help="another script; its arguments follow --")
    parser.add_argument("--into", type=Path, help="append the table to this file")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    rows = []
    if options.script:
        targets = [(Path(options.script).stem, api.Target(options.script, tuple(options.arguments)))]
    else:
        chosen = options.only.split(",") if options.only else EXAMPLES
        targets = [(name, api.Target(str(ROOT / "examples" / f"{name}.py"))) for name in chosen]
    for name, target in targets:
        print(f"== {name}", file=sys.stderr)
        try:
            rows.append(one(name, target, options.budget, options.seconds))
        except Exception as error:  # one script must not end the others
            print(f"  {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(table(rows[-1:]), file=sys.stderr)
    if not rows:
        raise SystemExit("nothing was measured")
    found = machine.describe()
    head = (
        f"{time.strftime('%Y-%m-%d')}, {found['cpu']}, {found['cores']}, bf16 {found['bf16']}, "
        f"{found['memory']}, torch {version('torch')}, python {platform.python_version()}"
    )
    text = f"{head}\n\n{table(rows)}\n"
    print(text)
    if options.into:
        with open(options.into, "a", encoding="utf-8") as file:
            file.write(f"\n{text}")


if __name__ == "__main__":
    main()
