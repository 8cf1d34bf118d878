"""`verify`: whole runs of the script, stock and plan in turn, over several seeds; the user's metric decides.

The order of the arms alternates from seed to seed, so that a drift of the machine does not favour one of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

from upshift.errors import ScriptFailedError, UsageError
from upshift.measure.metrics import Metric, Reader
from upshift.measure.noninferior import interval, judge, ratio, spread
from upshift.measure.power import Meter
from upshift.records.runfold import fold
from upshift.records.verification import Arm, Energy, Interval, Verification, WholeRun
from upshift.search.duel import ArmPlan
from upshift.sites.runner import Child, ChildSpec, Runner
from upshift.units import seconds as in_words

#: How often a run's output is looked at: the error of a time to target.
LOOK_EVERY = 0.2
TELL_EVERY = 2.0
#: How often its energy is read: counters go round, and processes end, much more slowly.
READ_EVERY = 1.0

#: Of a metric's stock value, what may be lost unless the person says otherwise.
DEFAULT_MARGIN = 0.01


@dataclass
class Options:
    """What the person asked for. `margin` in the metric's unit; None: 1 % of the mean stock value.

    `first_seed`: seeds are this and those that follow. `meter`: what reads the energy of the runs, where it counts.
    """

    metric: Metric
    seeds: int = 3
    margin: float | None = None
    take: Literal["last", "best"] = "last"
    price: float | None = None
    timeout: float = 24 * 3600.0
    first_seed: int = 0
    meter: Meter | None = None


def spec_of(base: ChildSpec, plan: ArmPlan, seed: int) -> ChildSpec:
    """The whole run of a plan with a seed."""
    return msgspec.structs.replace(
        base, plan=plan, seed=seed, options={**base.options, "seed_shift": seed, "quiet": True}
    )


def whole_run(
    runner: Runner,
    spec: ChildSpec,
    arm: Arm,
    seed: int,
    options: Options,
    tell: Callable[[float, str], None],
    enough: Callable[[Sequence[tuple[float, float]], float | None], bool] | None = None,
) -> WholeRun:
    """Run the script to its end and collect the metric as it appears.

    Args:
        tell: called now and then with the seconds passed and the latest value in words.
        enough: given (seconds, value) so far and what was spent, whether the run may be ended early. Spent are the
            seconds passed; with a meter, the joules (None: not known).

    Raises:
        ScriptFailedError: it ended with an error, or ran into the time limit.
        UsageError: the metric was not found.
    """
    reader = Reader(options.metric)
    child = runner.start(spec, name=arm)
    began = time.monotonic()
    read: dict[Path, int] = {}
    told = looked = 0.0
    joules: float | None = None
    try:
        power = options.meter.begin(child.pid) if options.meter is not None else None
        code: int | None = None
        while code is None:
            message = child.receive(LOOK_EVERY)
            at = time.monotonic() - began
            _read_on(child, reader, read, at)
            if power is not None and at - looked >= READ_EVERY:
                looked, joules = at, power()
            kind = (message or {}).get("kind")
            if message is not None and kind == "refused":
                raise ScriptFailedError(str(message.get("text", "")), remedy=str(message.get("remedy", "")))
            if message is not None and kind == "gone":
                code = int(message.get("code") or 0)
            elif enough is not None and enough(_so_far(reader), at if power is None else joules):
                break
            elif at > options.timeout:
                raise ScriptFailedError(
                    f"the {arm} run did not end within {in_words(options.timeout)}.",
                    remedy="Allow more with --timeout.",
                )
            if at - told >= TELL_EVERY:
                told = at
                tell(at, _latest(reader))
        seconds = time.monotonic() - began
        joules = power() if power is not None else None  # before `kill`, which lets the process go
        reader.end(seconds)
        if code is None:
            values = tuple(_so_far(reader))
            return WholeRun(arm=arm, seed=seed, seconds=seconds, code=0, values=values, joules=joules)
        if code != 0:
            tail = "\n".join(child.output().strip().splitlines()[-8:])
            raise ScriptFailedError(f"the {arm} run with seed {seed} ended with exit code {code}:\n{tail}")
        record = fold(child.record)
        return WholeRun(
            arm=arm,
            seed=seed,
            seconds=seconds,
            code=code,
            values=tuple(reader.series()),
            steps=record.steps,
            notes=tuple(event.text for event in record.events if event.kind == "guard"),
            joules=joules,
        )
    finally:
        child.kill()


def _read_on(child: Child, reader: Reader, read: dict[Path, int], at: float) -> None:
    for file in child.written():
        try:
            size = file.stat().st_size
            if size < read.get(file, 0):
                read[file] = 0  # written anew
            if size == read.get(file, 0):
                continue
            with open(file, "rb") as opened:
                opened.seek(read.get(file, 0))
                data = opened.read(8 * 2**20)
        except OSError:
            continue
        read[file] = read.get(file, 0) + len(data)
        reader.feed(str(file), data.decode(errors="replace").replace("\r", "\n"), at)


def _so_far(reader: Reader) -> Sequence[tuple[float, float]]:
    try:
        return reader.series()
    except UsageError:
        return ()


def _latest(reader: Reader) -> str:
    try:
        return f"{reader.metric.name} {reader.series()[-1][1]:.5g}"
    except UsageError:
        return f"{reader.metric.name} not seen yet"


class Verifier:
    """Makes the runs that are missing and judges those there are."""

    def __init__(
        self,
        runner: Runner,
        base: ChildSpec,
        plan: ArmPlan,
        options: Options,
        say: Callable[[str], None],
        on_run: Callable[[tuple[WholeRun, ...]], None],
        earlier: Sequence[WholeRun] = (),
    ) -> None:
        """
        Args:
            on_run: told of all runs after each, to save them.
            earlier: runs of an interrupted verification of the same plan.
        """
        self.runner = runner
        self.base = base
        self.plan = plan
        self.options = options
        self.say = say
        self.on_run = on_run
        self.runs = list(earlier)

    def order(self) -> list[tuple[Arm, int]]:
        """The runs to make: stock first for even seeds, the plan first for odd ones."""
        arms: tuple[Arm, Arm] = ("stock", "plan")
        seeds = range(self.options.first_seed, self.options.first_seed + self.options.seeds)
        wanted = [(arm, seed) for seed in seeds for arm in (arms if seed % 2 == 0 else arms[::-1])]
        done = {(run.arm, run.seed) for run in self.runs}
        return [item for item in wanted if item not in done]

    def run(self) -> list[WholeRun]:
        """Make the runs. What is done is kept by `on_run` when this is interrupted."""
        todo = self.order()
        for place, (arm, seed) in enumerate(todo):
            spec = spec_of(self.base, self.plan if arm == "plan" else {}, seed)

            def tell(at: float, latest: str, arm: Arm = arm, seed: int = seed, place: int = place) -> None:
                left = self._left(todo[place:], at)
                self.say(
                    f"run {place + 1} of {len(todo)} ({arm}, seed {seed}): {in_words(at)}, {latest}; "
                    f"{'time left unknown' if left is None else f'about {in_words(left)} left'}"
                )

            self.runs.append(whole_run(self.runner, spec, arm, seed, self.options, tell))
            self.on_run(tuple(self.runs))
        return self.runs

    def _left(self, todo: Sequence[tuple[Arm, int]], at: float) -> float | None:
        known = {arm: [run.seconds for run in self.runs if run.arm == arm] for arm in ("stock", "plan")}
        every = known["stock"] + known["plan"]
        if not every:
            return None
        each = {arm: median(found or every) for arm, found in known.items()}
        return max(sum(each[arm] for arm, _ in todo) - at, 0.0)


def final(run: WholeRun, metric: Metric, take: str) -> float | None:
    """The run's metric: its last value, or its best finite one. None where that is no finite number."""
    if take == "last":
        last = run.values[-1][1] if run.values else math.nan
        return last if math.isfinite(last) else None
    values = [value for _, value in run.values if math.isfinite(value)]
    if not values:
        return None
    return max(values) if metric.mode == "max" else min(values)


def reached(run: WholeRun, metric: Metric) -> float | None:
    """Seconds until the target was seen; None where it was not reached."""
    if metric.target is None:
        return None
    return next((at for at, value in run.values if metric.better(value, metric.target)), None)


def joules_to(run: WholeRun, metric: Metric) -> float | None:
    """Joules until the target was seen: the time to it times the run's mean power; None where one is not known."""
    at = reached(run, metric)
    if at is None or run.joules is None or run.joules <= 0.0 or run.seconds <= 0.0:
        return None
    return at * run.joules / run.seconds


def _energy(pairs: Sequence[tuple[WholeRun, WholeRun]], options: Options) -> Energy | None:
    """Energy to the target, where every run reached it and all joules are known; None where it was not asked for."""
    if options.meter is None:
        return None
    spent = [(joules_to(a, options.metric), joules_to(b, options.metric)) for a, b in pairs]
    stock = [a for a, _ in spent if a is not None]
    planned = [b for _, b in spent if b is not None]
    found = Interval(None, None, None, 0)
    if pairs and len(stock) == len(planned) == len(pairs):
        found = ratio(stock, planned)
    return Energy(
        found.mean, found.low, found.high, found.n, found.level, basis=options.meter.basis, how=options.meter.how,
        stock=sum(stock) / len(stock) if stock else None, plan=sum(planned) / len(planned) if planned else None,
    )  # fmt: skip


def conclude(runs: Sequence[WholeRun], options: Options, blank: Verification) -> Verification:
    """Judge the pairs of runs with the same seed.

    Args:
        blank: a verification with what does not come from the runs.
    """
    metric = options.metric
    by_seed: dict[int, dict[str, WholeRun]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.arm] = run
    pairs = [(found["stock"], found["plan"]) for _, found in sorted(by_seed.items()) if len(found) == 2]
    sign = 1.0 if metric.mode == "max" else -1.0
    finals = [(final(a, metric, options.take), final(b, metric, options.take)) for a, b in pairs]
    stock = [a for a, _ in finals if a is not None]
    planned = [b for _, b in finals if b is not None]
    both = [(a, b) for a, b in finals if a is not None and b is not None]
    margin, note = _margin(options, stock)
    differences = [sign * (b - a) for a, b in both]
    answer, reason = judge(differences, margin)
    came_off = [run.seed for run in runs if run.arm == "plan" and run.notes]
    if came_off:
        answer, reason = "not shown", f"the guard acted in the plan's runs with seed {', '.join(map(str, came_off))}"
    if any(a is not None and b is None for a, b in finals):
        answer, reason = "worse", "the metric is no number in runs with the plan"
    elif answer == "as good" and len(set(stock)) == 1:
        answer, reason = "not shown", _same_every_time(runs)
    times = [(reached(a, metric), reached(b, metric)) for a, b in pairs]
    hits = (sum(a is not None for a, _ in times), sum(b is not None for _, b in times))
    target_speedup: Interval | None = None
    if metric.target is not None and pairs and hits == (len(pairs), len(pairs)):
        target_speedup = ratio([a for a, _ in times if a], [b for _, b in times if b])
    elif metric.target is not None and hits[1] < hits[0]:
        answer, reason = "worse", f"the plan reached the target in {hits[1]} runs, stock in {hits[0]} of {len(pairs)}"
    return msgspec.structs.replace(
        blank,
        runs=tuple(runs),
        margin=margin,
        margin_note=note,
        answer=answer,
        reason=reason,
        stock=interval(stock),
        plan=interval(planned),
        difference=interval(differences),
        speedup=ratio([a.seconds for a, _ in pairs], [b.seconds for _, b in pairs]),
        target_speedup=target_speedup,
        reached=hits,
        seed_spread=spread(stock) if len(stock) > 1 else None,
        energy=_energy(pairs, options),
    )


def _same_every_time(runs: Sequence[WholeRun]) -> str:
    """Why runs that end alike show nothing."""
    if len({value for run in runs for _, value in run.values}) == 1:
        return "the metric never changes, so it cannot tell a good plan from a bad one"
    return "every stock run ends with the same value: the seed changes nothing, so the runs are copies of one"


def _margin(options: Options, stock: Sequence[float]) -> tuple[float, str]:
    if options.margin is not None:
        return options.margin, "as asked"
    if not stock:
        return 0.0, "unknown: no stock run"
    mean = abs(sum(stock) / len(stock))
    return DEFAULT_MARGIN * mean, f"{DEFAULT_MARGIN:.0%} of the mean stock value"
