"""How often is the proof wrong? Trials whose truth is known, through the real decisions, on real processes.

    python benchmarks/bench_proof.py --quick                       a few minutes
    python benchmarks/bench_proof.py --into FILE                   about an hour; tables are appended to FILE
    python benchmarks/bench_proof.py --only identical --minutes 20 as many decisions about identical arms as fit

identical   two arms that do not differ, while a load on the machine comes and goes: every `faster` is a false win
gains       a true 3 % in steps of several lengths: is it found?
wins        techniques that change rounding or nothing: is the quality of these shown?
faults      known harm of graded size: is it rejected?
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from upshift.hardware import machine
from upshift.hook.process import HookRunner
from upshift.measure.paired import AT_LEAST
from upshift.search.duel import ArmFailed, ArmPlan, Duel, Ended
from upshift.search.selftest import Truth, Twins, planted, rate_high, rate_low, tiny, truth
from upshift.sites import Numerics
from upshift.sites.runner import ChildSpec
from upshift.techniques import registry
from upshift.units import percent
from upshift.units import seconds as in_words

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

#: Seconds of a decision about identical arms, and decisions a pair of processes is used for.
DECISION_SECONDS, DECISIONS_A_PAIR = 2.0, 10

#: Busy on some of the cores, then idle, for times drawn at random; ends with its parent.
LOAD = """
import os, random, sys, time
draw, parent = random.Random(int(sys.argv[1])), os.getppid()
while os.getppid() == parent:
    until = time.monotonic() + draw.expovariate(0.5)
    children = []
    for _ in range(draw.randint(1, os.cpu_count() or 1)):
        child = os.fork()
        if not child:
            while time.monotonic() < until:
                sum(range(10000))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    time.sleep(draw.expovariate(0.5))
"""


def example(name: str, *arguments: str) -> ChildSpec:
    """One of the example scripts."""
    return ChildSpec(mode="arm", target=str(EXAMPLES / f"{name}.py"), arguments=arguments, seed=1)


#: Scripts of the identical arms.
SCRIPTS = {
    "tiny mlp": tiny("--model", "mlp"),
    "tiny conv": tiny("--model", "conv"),
    "tiny attention": tiny("--model", "attention", "--optimizer", "adamw"),
    "digits": example("digits", "--epochs", "100000", "--batch-size", "16"),
    "tabular_mlp": example("tabular_mlp", "--epochs", "100000", "--limit", "4000"),
    "char_gpt": example(
        "char_gpt", "--layers", "2", "--width", "64", "--block-size", "32", "--accumulate", "1",
        "--max-chars", "200000", "--max-steps", "10000000", "--eval-interval", "10000000",
    ),
    "vae": example("vae", "--epochs", "100000", "--limit", "6400"),
}  # fmt: skip


@dataclass(frozen=True)
class Harm:
    """A fault with its sizes from small to large, the script it is planted in, and what the plan claims to be."""

    kind: str
    sizes: tuple[float, ...]
    script: tuple[str, ...]
    from_step: int = 0
    numerics: Numerics = Numerics.ROUNDING
    precision: Any = "float32"


_CONV, _MLP = ("--model", "conv"), ("--model", "mlp")
_ADAM = ("--optimizer", "adamw")

#: From step 20 on: after the updates that are compared, so that only the losses can tell.
LATE = 20

HARMS = (
    Harm("loss_scale", (0.001, 0.005, 0.02, 0.1), _MLP),
    Harm("loss_scale", (0.02, 0.1, 0.5), _MLP, LATE),
    Harm("dropped_gradient", (0.01, 0.05, 0.2, 1.0), _MLP),
    Harm("dropped_gradient", (0.2, 1.0), _MLP, LATE),
    Harm("frozen_norm", (1.0,), _CONV),
    Harm("frozen_norm", (1.0,), _CONV, LATE),
    Harm("cached_transform", (0.05, 0.25, 1.0), _MLP, LATE, numerics=Numerics.BITWISE),
    Harm("cached_transform", (0.05, 0.25, 1.0), _MLP, LATE, numerics=Numerics.RESEEDS),
    Harm("shuffled_labels", (0.05, 0.2, 0.5, 1.0), _MLP, LATE),
    Harm("state_reset", (100.0, 20.0, 5.0), (*_MLP, *_ADAM), LATE),
    Harm("dropout_off", (0.1, 0.5, 1.0), (*_MLP, "--dropout", "0.3")),
    Harm("wrong_eps", (1e-6, 1e-5, 1e-4, 1e-2), (*_MLP, *_ADAM), precision="optimizer"),
    Harm("fused_strides", (1.0,), (*_CONV, *_ADAM), precision="optimizer"),
)

#: Script and plan; the claims are those of the technique's card.
WINS: tuple[tuple[str, ArmPlan], ...] = (
    ("tabular_mlp", {"fused": {"kind": "fused"}}),
    ("tiny attention", {"fused": {"kind": "fused"}}),
    ("digits", {"channels_last": {}}),
    ("tiny conv", {"channels_last": {}}),
    ("digits", {"allocator": {"kind": "glibc"}}),
    ("tiny mlp", {"allocator": {"kind": "glibc"}}),
)


class Load:
    """A process that keeps cores busy now and then, while the block runs."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", LOAD, str(self._seed)])

    def __exit__(self, *error: object) -> None:
        # Its children end by themselves, after some seconds at most.
        self._process.kill()
        self._process.wait()


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


class Bench:
    """The four measurements. `quick` makes each trial once, shorter, and leaves out sizes and lengths in between."""

    def __init__(
        self, quick: bool, minutes: float, seed: int, repeats: int | None = None, sizes: str = "", harms: str = ""
    ) -> None:
        self.runner = HookRunner()
        self.harms = [item for item in HARMS if not harms or item.kind in harms.split(",")]
        self.minutes = minutes
        self.seed = seed
        self.repeats = repeats or (1 if quick else 5)
        self.sizes = sizes or ("ends" if quick else "all")
        self.seconds = 6.0 if quick else 20.0
        self.fault_seconds = 4.0 if quick else 10.0

    def identical(self) -> str:
        """Decisions about identical arms, scripts in turn, half of them taken early and half at one look."""
        counts: dict[str, dict[str, int]] = {name: defaultdict(int) for name in SCRIPTS}
        until = time.monotonic() + 60.0 * self.minutes
        turn = 0
        with Load(self.seed):
            while time.monotonic() < until:
                name = list(SCRIPTS)[turn % len(SCRIPTS)]
                turn += 1
                self._on_one_pair(name, counts[name], until)
        rows = [self._identical_row(name, found) for name, found in counts.items() if found]
        total: dict[str, int] = defaultdict(int)
        for found in counts.values():
            for key, value in found.items():
                total[key] += value
        rows.append(self._identical_row("**all**", total))
        head = ("script", "decisions", "pairs", "false wins", "rate, at most (95 %)", "false losses", "failed")
        return f"Identical arms under a load that comes and goes\n\n{table(head, rows)}"

    def _identical_row(self, name: str, found: dict[str, int]) -> list[object]:
        n = found["decisions"]
        return [name, n, found["pairs"], found["faster"], percent(rate_high(found["faster"], n)), found["slower"],
                found["failed"]]  # fmt: skip

    def _on_one_pair(self, name: str, found: dict[str, int], until: float) -> None:
        self.seed += 1
        twins = Twins(lambda: Duel(self.runner, SCRIPTS[name], timeout=300.0, patience=600.0, seed=self.seed))
        try:
            for number in range(DECISIONS_A_PAIR):
                if time.monotonic() >= until:
                    break
                decision, pairing = twins.decide(DECISION_SECONDS, early=number % 2 == 0)
                found["pairs"] += number == 0
                found["decisions"] += 1
                found[decision] += 1
                if decision == "faster":
                    tell(f"{name}: false win {pairing}")
            tell(
                f"{name}: {found['decisions']} decisions, {found['faster']} false wins, {found['slower']} false losses"
            )
        except (ArmFailed, Ended) as error:
            found["failed"] += 1
            tell(f"{name}: {error}")
        finally:
            twins.close()

    def gains(self) -> str:
        """A true 3 % in steps of several lengths."""
        rows = []
        for length in ("1", "4", "16") if self.repeats > 1 else ("1", "16"):
            for kind in ("sleep", "arithmetic"):
                spec = tiny(*_MLP, "--batch-size", "64", "--accumulate", length, "--waste", f"{kind}:0.03")
                found = self._truths(f"3 % {kind}", spec, planted(waste="none"), self.seconds, Numerics.BITWISE)
                timed = [item.pairing for item in found if item.pairing is not None]
                if timed:
                    rows.append([
                        in_words(statistics.median(item.reference_step for item in timed)), kind,
                        f"{sum(item.kept for item in found)} of {len(found)}",
                        f"{statistics.median(item.ratio for item in timed):.3f}x",
                        percent(AT_LEAST * (1 + statistics.median(item.smallest or 0.0 for item in timed)) - 1.0),
                    ])  # fmt: skip
        head = ("step", "3 % spent on", "found", "median ratio", "smallest gain kept 9 times in 10")
        return f"A true gain of 3 %, {self.seconds:.0f} s of alternation\n\n{table(head, rows)}"

    def wins(self) -> str:
        """Techniques that are not harmful: the proof has to pass."""
        rows = []
        for script, plan in WINS:
            ((name, _),) = plan.items()
            card = registry.get(name).card
            found = self._truths(f"{name} on {script}", SCRIPTS[script], plan, self.seconds, card.numerics,
                                 card.precision)  # fmt: skip
            passed = sum(item.shown for item in found)
            timed = [item.pairing.ratio for item in found if item.pairing is not None]
            rows.append([
                script, name, card.numerics, f"{passed} of {len(found)}",
                f"{sum(item.kept for item in found)} of {len(found)}",
                f"{statistics.median(timed):.3f}x" if timed else "-",
                next((item.reason for item in found if not item.shown), ""),
            ])  # fmt: skip
        head = ("script", "technique", "numerics", "quality shown", "kept", "median ratio", "why not")
        return f"Harmless techniques\n\n{table(head, rows)}"

    def faults(self) -> str:
        """Known harm of graded size: the proof must not pass. One trial of each in turn, so that a run that ends
        early has seen all."""
        harms = [
            (harm, size)
            for harm in self.harms
            for size in {
                "all": harm.sizes,
                "ends": sorted({harm.sizes[0], harm.sizes[-1]}),
                "largest": harm.sizes[-1:],
            }[self.sizes]
        ]
        trials: list[list[Truth]] = [[] for _ in harms]
        try:
            for number in range(self.repeats):
                for (harm, size), found in zip(harms, trials, strict=True):
                    plan = planted(fault=harm.kind, size=size, from_step=harm.from_step)
                    found += self._truth(number, f"{harm.kind} {size:g}", tiny(*harm.script), plan,
                                         self.fault_seconds, harm.numerics, harm.precision,
                                         "--dropout" in harm.script)  # fmt: skip
        except KeyboardInterrupt:
            tell("interrupted: the table holds what was seen by now")
        rows = []
        for (harm, size), found in zip(harms, trials, strict=True):
            if found:
                rejected = sum(not item.shown for item in found)
                weak = sum(item.shown and item.rung == "update" for item in found)
                reasons = Counter(item.reason for item in found if not item.shown)
                rows.append([
                    harm.kind, f"{size:g}", harm.from_step, harm.numerics, f"{rejected} of {len(found)}", weak,
                    percent(rate_low(rejected, len(found))), round(statistics.median(item.steps for item in found)),
                    reasons.most_common(1)[0][0] if reasons else "",
                ])  # fmt: skip
        head = ("fault", "size", "from step", "claimed", "rejected", "accepted, labelled", "rejected, at least (95 %)",
                "steps", "most common reason")  # fmt: skip
        return f"Planted faults, {self.fault_seconds:.0f} s of alternation\n\n{table(head, rows)}"

    def _truths(self, *trial: Any) -> list[Truth]:
        return [item for number in range(self.repeats) for item in self._truth(number, *trial)]

    def _truth(self, number: int, name: str, spec: ChildSpec, plan: ArmPlan, seconds: float, numerics: Numerics,
               precision: Any = "float32", has_dropout: bool = False) -> list[Truth]:  # fmt: skip
        """One trial of one training; empty where it could not be made."""
        self.seed += 1
        # Another training each time; of two --seed the last one wins.
        other = msgspec.structs.replace(spec, arguments=(*spec.arguments, "--seed", str(number)))
        item = truth(name, self.runner, other, plan, seconds, numerics=numerics, precision=precision,
                     has_dropout=has_dropout, seed=self.seed)  # fmt: skip
        tell(f"{name}: {item.failure or f'{item.decision}, quality shown: {item.shown}, {item.reason}'}")
        return [] if item.failure else [item]


def tell(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="identical,gains,wins,faults", help="comma-separated parts")
    parser.add_argument("--minutes", type=float, help="time for identical arms (default 20; 2 with --quick)")
    parser.add_argument("--repeats", type=int, help="trials of each gain, win and fault (default 5; 1 with --quick)")
    parser.add_argument(
        "--sizes", choices=["all", "ends", "largest"], help="of each fault (default all; ends with --quick)"
    )
    parser.add_argument("--harms", default="", help="comma-separated faults (default all)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--into", type=Path, help="append the tables to this file")
    options = parser.parse_args()
    minutes = options.minutes or (2.0 if options.quick else 20.0)
    bench = Bench(options.quick, minutes, options.seed, options.repeats, options.sizes, options.harms)
    parts: dict[str, Callable[[], str]] = {
        "identical": bench.identical, "gains": bench.gains, "wins": bench.wins, "faults": bench.faults,
    }  # fmt: skip
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    found = machine.describe()
    head = (
        f"{time.strftime('%Y-%m-%d')}, {found['cpu']}, {found['cores']}, torch {version('torch')}, "
        f"python {platform.python_version()}, seed {options.seed}"
    )
    write(head, options.into)
    for name in chosen:
        write(parts[name](), options.into)


def write(text: str, into: Path | None) -> None:
    """Print, and append to a file."""
    print(f"{text}\n", flush=True)
    if into:
        with open(into, "a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")


if __name__ == "__main__":
    main()
