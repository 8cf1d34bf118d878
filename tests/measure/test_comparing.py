"""Comparisons: identical approaches are not called different, real differences are, and nothing unknown passes."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from upshift.errors import UsageError
from upshift.measure import comparing, gates, groups, perrun, series
from upshift.measure.comparing import Group
from upshift.measure.perrun import Seen
from upshift.records import codec
from upshift.records.comparison import FIGURES, Comparison, Point
from upshift.records.ledger import Entry, Ledger
from upshift.records.quantity import Quantity, estimated, unknown
from upshift.records.run import Event, Run, Window

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
AMOUNTS = st.floats(1e-6, 1e6)


def run(
    at: int, accuracy: float | None = 0.9, step: float = 0.01, *, steps: int = 400, device: str = "cpu X",
    metric: str = "accuracy", loss: float | None = 0.5, windows: int = 4,
) -> Run:  # fmt: skip
    """A run of a few windows whose metric climbs to `accuracy`."""
    n = steps // windows
    made = tuple(
        Window(k * n, n, (k + 1) * n * step, n * step, loss=None if loss is None else loss + 1 / (k + 1))
        for k in range(windows)
    )
    shares = (0.5, 0.9, 1.0)
    events = tuple(
        Event(at=steps * step * share, kind="metrics", text="", step=int(steps * share),
              values={metric: None if accuracy is None else accuracy * share})
        for share in shares
    ) if metric else ()  # fmt: skip
    return Run(
        id=f"r{at}", script="train.py", arguments=(), started=f"2026-01-01 00:{at // 60:02d}:{at % 60:02d}",
        status="finished", exit_code=0, seconds=steps * step, steps=steps, windows=made, events=events,
        environment={"device": device},
    )  # fmt: skip


def seen(one: Run, ledger: Ledger | None = None) -> Seen:
    return Seen(one, ledger, series.events(one), one.id)


def group(name: str, *runs: Run) -> Group:
    return Group(name, tuple(seen(item) for item in runs))


def compare(*given: Group, **more: object) -> Comparison:
    return comparing.compare(given, created="2026-01-01T00:00:00Z", **more)  # type: ignore[arg-type]


def answers(found: Comparison, approach: str = "b") -> dict[str, str]:
    return {item.figure: item.answer for item in found.differences if item.approach == approach}


def book(**known: Quantity) -> Ledger:
    fields = {
        "seconds": "s", "device_hours": "h", "cpu_hours": "h", "energy": "J", "carbon": "g", "cost": "USD",
        "cost_per_epoch": "USD", "lost": "s", "memory": "B", "gpu_memory": "B", "cpu_utilisation": "1",
        "gpu_utilisation": "1",
    }  # fmt: skip
    entries = {name: Entry(known.get(name, unknown(unit))) for name, unit in fields.items()}
    return Ledger(run="r", **entries)  # type: ignore[arg-type]


# -- statistics against other ways to the same figure ----------------------------------------------------------------


def t_density_beyond(t: float, df: float) -> float:
    """Both tails of Student's t by numerical integration of its density."""
    x = np.linspace(0.0, abs(t), 20_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    return float(1 - 2 * np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x))


def test_welch_agrees_with_the_formula_and_an_integral() -> None:
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0], [27.1, 32.0, 20.8, 33.4, 29.4]
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    t = (statistics.mean(b) - statistics.mean(a)) / math.sqrt(sum(parts))
    df = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 4)
    found = groups.difference(a, b)
    assert found.value == pytest.approx(statistics.mean(b) - statistics.mean(a))
    assert found.p == pytest.approx(t_density_beyond(t, df), abs=1e-6) and f"{df:.1f} degrees" in found.method
    # The interval touches zero where the level is that of the test.
    assert found.p is not None
    edge = groups.difference(a, b, level=1 - found.p)
    assert edge.low == pytest.approx(0, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=6), st.lists(NUMBERS, min_size=2, max_size=6))
def test_a_difference_turns_round_with_its_sides(a: list[float], b: list[float]) -> None:
    one, other = groups.difference(a, b), groups.difference(b, a)
    assert one.value is not None and other.value is not None and one.p is not None and other.p is not None
    assert one.value == pytest.approx(-other.value, abs=1e-9) and one.p == pytest.approx(other.p, abs=1e-9)
    assert one.low is not None and one.high is not None and one.low <= one.value <= one.high
    assert 0 <= one.p <= 1
    # The interval and the test say the same.
    assert (one.p < 0.05) == (not one.low <= 0 <= one.high) or abs(one.p - 0.05) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(AMOUNTS, min_size=2, max_size=5), st.lists(AMOUNTS, min_size=2, max_size=5), st.floats(0.01, 100))
def test_amounts_compare_the_same_in_every_unit(a: list[float], b: list[float], unit: float) -> None:
    one = groups.difference(a, b, "log")
    other = groups.difference([x * unit for x in a], [x * unit for x in b], "log")
    assert one.value == pytest.approx(other.value, abs=1e-6) and one.p == pytest.approx(other.p, abs=1e-6)


def by_enumeration(a: list[float], b: list[float]) -> float:
    """The share of all relabellings whose rank sum lies as far out, by going through them."""
    values = [*a, *b]
    order = sorted(values)
    rank = [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]
    centre = len(b) * sum(rank) / len(rank)
    far = abs(sum(rank[len(a) :]) - centre)
    sums = [sum(pick) for pick in itertools.combinations(rank, len(b))]
    return sum(abs(total - centre) >= far - 1e-9 for total in sums) / len(sums)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.inf]), min_size=1, max_size=5),
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.inf]), min_size=1, max_size=5),
)
def test_ranks_are_exact_also_with_ties_and_the_unreached(a: list[float], b: list[float]) -> None:
    assert groups.rank_p(a, b) == pytest.approx(by_enumeration(a, b))


def test_many_ranks_take_the_normal_limit() -> None:
    chance = random.Random(1)
    a, b = ([chance.random() for _ in range(29)] for _ in range(2))
    exact = groups.rank_p(a, b)
    wide = groups.rank_p([*a, *(x + 1e-9 for x in a)], [*b, *(x + 1e-9 for x in b)])
    assert 0 <= wide <= exact + 0.05 and groups.rank_p([1.0] * 40, [1.0] * 40) == 1.0
    assert groups.rank_p([1.0] * 40, [2.0] * 40) < 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_plain_and_bonferroni(p: list[float]) -> None:
    corrected = groups.holm(p)
    for plain, found in zip(p, corrected, strict=True):
        assert plain <= found <= min(1.0, len(p) * plain) + 1e-12
    assert sorted(range(len(p)), key=lambda i: p[i]) == sorted(range(len(p)), key=lambda i: (corrected[i], p[i]))


def test_holm_by_hand() -> None:
    assert groups.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_middle_and_its_interval(scale: str) -> None:
    values = [1.0, 2.0, 4.0]
    found = groups.middle(values, "s", scale)  # type: ignore[arg-type]
    t = 4.30265273  # two-sided 95 %, 2 degrees of freedom
    if scale == "linear":
        mean, reach = 7 / 3, t * statistics.stdev(values) / math.sqrt(3)
        assert (found.value, found.low, found.high) == pytest.approx((mean, mean - reach, mean + reach))
    else:
        reach = t * math.log(2) / math.sqrt(3)
        assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 * math.exp(-reach), 2 * math.exp(reach)))


def test_unreached_runs_have_medians_and_bounds_only_where_there_are_enough() -> None:
    few = groups.middle([1.0, 2.0, math.inf], "s")
    assert (few.value, few.low, few.high) == (2.0, None, None)
    assert groups.middle([1.0, math.inf], "s").value is None
    assert groups.middle([math.inf], "s").basis == "unknown"
    six = groups.middle([1.0, 2.0, 3.0, 4.0, 5.0, math.inf], "s")
    # 6 values: the extremes are bounds at 1 - 2 / 64 = 97 %; the upper one is not known.
    assert (six.value, six.low, six.high) == (3.5, 1.0, None)
    worst_first = groups.middle([-math.inf, 0.5, 0.7], "")
    assert worst_first.value == 0.5


def test_runs_that_take_turns() -> None:
    def stamps(text: str) -> tuple[list[str], list[str]]:
        return [f"{at:03d}" for at, c in enumerate(text) if c == "a"], [
            f"{at:03d}" for at, c in enumerate(text) if c == "b"
        ]

    for fair in ("abab", "abba", "ababab", "abbaab", "aabbba", "abababab", "baba"):
        assert groups.in_turn(*stamps(fair)), fair
    for unfair in ("aabb", "aaabbb", "aaababbb", "ab", "aab", "aaaaabbbab"):
        assert not groups.in_turn(*stamps(unfair)), unfair
    assert not groups.in_turn(["1", "1"], ["1", "1"]) and not groups.in_turn(["", "3"], ["2", "4"])


# -- A/A: the same approach twice ------------------------------------------------------------------------------------

NOISES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_t(2.5, size=n),
    "skewed": lambda rng, n: rng.lognormal(sigma=1.0, size=n),
    "spikes": lambda rng, n: rng.normal(size=n) * 0.1 + 3 * (rng.random(n) < 0.2),
    "rounded": lambda rng, n: np.round(rng.normal(size=n) * 1.2),
    "coin": lambda rng, n: rng.integers(0, 2, size=n).astype(float),
}


@pytest.mark.parametrize("noise", NOISES)
def test_identical_groups_are_rarely_called_different(noise: str) -> None:
    rng = np.random.default_rng(7)
    rounds = 500
    for a, b in ((3, 3), (4, 4), (5, 5), (3, 5)):
        called = 0
        for _ in range(rounds):
            values = (0.9 + 0.01 * NOISES[noise](rng, a + b)).tolist()
            p = groups.difference(values[:a], values[a:]).p
            called += p is not None and p < comparing.ALPHA
        # 5 % and what 500 rounds may be off by (two standard errors).
        assert called / rounds <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds), (a, b, called)


def a_a(rng: np.random.Generator, noise: str, n: int) -> Comparison:
    """The same approach twice, its runs in turn; metric, times, memory and energy have noise of their own."""
    sides: tuple[list[Seen], list[Seen]] = ([], [])
    for at in range(2 * n):
        metric, times, memory, watts = (float(NOISES[noise](rng, 1)[0]) for _ in range(4))
        one = run(at, 0.9 + 0.01 * metric, 0.01 * math.exp(0.03 * times))
        ledger = book(
            memory=Quantity(1e9 * math.exp(0.02 * memory), "B"), cost=Quantity(one.seconds, "USD"),
            seconds=Quantity(one.seconds, "s"), energy=Quantity(50 * math.exp(0.02 * watts), "J"),
        )  # fmt: skip
        sides[at % 2 if (at // 2) % 2 == 0 else 1 - at % 2].append(seen(one, ledger))
    return compare(Group("a", tuple(sides[0])), Group("b", tuple(sides[1])), target=0.8)


def called_different(rounds: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {
        noise: sum(
            bool({"better", "worse"} & set(answers(a_a(rng, noise, 3 + at % 3)).values())) for at in range(rounds)
        )
        / rounds
        for noise in NOISES
    }


def test_whole_tables_of_identical_approaches_are_rarely_called_different() -> None:
    found = called_different(40, 11)
    assert sum(found.values()) / len(found) <= 0.05, found


@pytest.mark.extra
def test_whole_tables_of_identical_approaches_over_many_rounds() -> None:
    found = called_different(2000, 12)
    assert max(found.values()) <= 0.05, found


def test_a_difference_of_several_deviations_is_shown() -> None:
    rng = np.random.default_rng(5)
    shown = 0
    for _ in range(40):
        a = [run(2 * i, 0.90 + 0.002 * rng.normal(), 0.0100 * math.exp(0.01 * rng.normal())) for i in range(4)]
        b = [run(2 * i + 1, 0.92 + 0.002 * rng.normal(), 0.0080 * math.exp(0.01 * rng.normal())) for i in range(4)]
        told = answers(compare(group("a", *a), group("b", *b)))
        shown += told["metric"] == told["step"] == "better"
    assert shown >= 36


# -- what may be claimed ---------------------------------------------------------------------------------------------


def test_one_run_each_is_no_evidence_however_large_the_difference() -> None:
    found = compare(group("a", run(0, 0.5, 0.02)), group("b", run(1, 0.99, 0.001)))
    assert set(answers(found).values()) <= {"not distinguishable", "not tested", "unknown"}
    assert (
        next(d for d in found.differences if d.figure == "metric").reason == "one run each: no evidence of a difference"
    )
    assert any("no evidence" in note for note in found.notes)
    assert all(entry.value.low is None for item in found.approaches for entry in item.figures.values())


def test_two_runs_each_have_an_interval_and_no_verdict() -> None:
    a = [run(0, 0.500), run(3, 0.501)]
    b = [run(1, 0.900), run(2, 0.901)]
    found = compare(group("a", *a), group("b", *b))
    metric = next(d for d in found.differences if d.figure == "metric")
    assert metric.answer == "not distinguishable" and "too few" in metric.reason and metric.p is None
    # As wide as one degree of freedom makes it: 12.7 standard errors.
    reach = 12.7062 * math.sqrt(2 * 0.001**2 / 2 / 2)
    assert (metric.change.low, metric.change.high) == pytest.approx((0.4 - reach, 0.4 + reach), rel=1e-4)


def test_times_of_runs_that_did_not_take_turns_are_not_told_apart() -> None:
    chance = random.Random(2)
    a = [run(i, 0.90 + chance.gauss(0, 0.001), 0.01 + chance.gauss(0, 1e-5)) for i in range(4)]
    b = [run(10 + i, 0.95 + chance.gauss(0, 0.001), 0.02 + chance.gauss(0, 1e-5)) for i in range(4)]
    found = compare(group("a", *a), group("b", *b))
    assert answers(found)["metric"] == "better" and answers(found)["step"] == "not distinguishable"
    assert next(d for d in found.differences if d.figure == "step").reason == comparing.TAKE_TURNS
    # On another machine turns are not the matter; that it is another one is said.
    elsewhere = [run(10 + i, 0.95, 0.02 + chance.gauss(0, 1e-5), device="cuda H200") for i in range(4)]
    found = compare(group("a", *a), group("b", *elsewhere))
    step = next(d for d in found.differences if d.figure == "step")
    assert step.answer == "worse" and "another machine" in step.reason
    assert any("different machines" in note for note in found.notes)


def test_repeats_that_are_copies_of_each_other_are_no_evidence() -> None:
    a, b = [run(2 * i, 0.90) for i in range(3)], [run(2 * i + 1, 0.93) for i in range(3)]
    found = compare(group("a", *a), group("b", *b))
    assert answers(found)["metric"] == "not distinguishable"
    assert sum("different seeds" in note for note in found.notes) == 2


def test_a_target_that_was_missed_is_worse_than_any() -> None:
    reached = [run(2 * i, 0.95 + 0.001 * i) for i in range(5)]
    missed = [run(2 * i + 1, 0.70 + 0.001 * i) for i in range(5)]
    found = compare(group("a", *reached), group("b", *missed), target=0.9)
    assert [item.reached for item in found.approaches] == [5, 0]
    later = found.approaches[1].figures["to_target"]
    assert later.value.value is None and "not reached" in later.how
    assert answers(found)["steps_to_target"] == answers(found)["to_target"] == "worse"
    assert any("not reached" in note for line in found.approaches[1].runs for note in line.notes)
    # With some of them the middle is a median, and the missed lie beyond it.
    mixed = [*reached[:3], run(9, 0.5)]
    found = compare(group("a", *reached), group("b", *mixed), target=0.9)
    assert found.approaches[1].reached == 3 and found.approaches[1].figures["to_target"].value.value is not None
    assert answers(found)["to_target"] == "not distinguishable"


def test_steps_and_seconds_to_the_target_are_the_first_that_reached_it() -> None:
    found = compare(group("a", run(0, 1.0)), group("b", run(1, 1.0)), target=0.9)
    assert found.approaches[0].figures["steps_to_target"].value.value == 360
    assert found.approaches[0].figures["to_target"].value.value == pytest.approx(3.6)


def test_a_metric_that_ends_as_nan_counts_as_worst() -> None:
    bad = run(1, 0.99)
    bad = replace(bad, events=(*bad.events, Event(5.0, "metrics", "", step=401, values={"accuracy": None})))
    good = [run(2 * i, 0.9 + 0.001 * i) for i in range(3)]
    found = compare(group("a", *good), group("b", bad))
    assert found.approaches[1].figures["metric"].value.value is None
    assert "not finite" in " ".join(found.approaches[1].runs[0].notes)
    assert answers(found)["metric"] != "better"


def test_unlike_lengths_are_compared_at_the_same_step() -> None:
    found = compare(group("a", run(0, 0.9, steps=400)), group("b", run(1, 0.9, steps=800)))
    assert found.common_step == 400
    # At 400 of 800 steps the second is half way.
    assert found.approaches[0].figures["at_step"].value.value == pytest.approx(0.9)
    assert found.approaches[1].figures["at_step"].value.value == pytest.approx(0.45)
    assert any("unlike length" in note for note in found.notes)
    assert "at_step" not in compare(group("a", run(0)), group("b", run(1))).approaches[0].figures


# -- which metric ----------------------------------------------------------------------------------------------------


def test_the_metric_all_share_is_chosen_and_others_are_listed() -> None:
    a = Seen(run(0), None, {"val_accuracy": (Point(1, 1, 0.5),), "val_loss": (Point(1, 1, 2.0),)})
    b = Seen(
        run(1), None, {"val_accuracy": (Point(1, 1, 0.6),), "val_loss": (Point(1, 1, 1.0),), "lr": (Point(1, 1, 1.0),)}
    )
    found = compare(Group("a", (a,)), Group("b", (b,)))
    assert (found.metric, found.mode, found.metrics) == ("val_accuracy", "max", ("val_accuracy", "val_loss"))
    found = compare(Group("a", (a,)), Group("b", (b,)), metric="val_loss")
    assert (found.mode, found.approaches[1].figures["metric"].value.value) == ("min", 1.0)


def test_without_a_shared_metric_the_loss_is_used_and_said() -> None:
    found = compare(group("a", run(0, metric="accuracy")), group("b", run(1, metric="f1")))
    assert found.metric == series.LOSS and "accuracy, f1" in found.metric_note and "stands in" in found.metric_note
    bare = compare(group("a", run(0, metric="", loss=None)), group("b", run(1, metric="", loss=None)))
    assert bare.metric == "" and "metric" not in bare.approaches[0].figures and "step" in bare.approaches[0].figures


def test_a_metric_only_one_has_is_unknown_of_the_other() -> None:
    found = compare(group("a", run(0)), group("b", run(1, metric="")), metric="accuracy")
    assert answers(found)["metric"] == "unknown" and "metric" not in found.approaches[1].figures
    with pytest.raises(UsageError, match="no run has"):
        compare(group("a", run(0)), group("b", run(1)), metric="bleu:max")
    with pytest.raises(UsageError, match="which way"):
        compare(group("a", run(0)), group("b", run(1)), metric="accuracy_of_what_is_not:up")


def test_ambiguous_names_are_refused() -> None:
    both = Seen(run(0), None, {"val_top_acc": (Point(1, 1, 0.5),), "val_mean_acc": (Point(1, 1, 0.5),)})
    with pytest.raises(UsageError, match="several numbers"):
        compare(Group("a", (both,)), Group("b", (both,)), metric="acc:max")


def test_too_few_approaches() -> None:
    with pytest.raises(UsageError, match="two runs"):
        compare(group("a", run(0)))


# -- books, bases, efficiency ----------------------------------------------------------------------------------------


def priced(at: int, accuracy: float, cost: float, **more: Quantity) -> Seen:
    one = run(at, accuracy)
    return seen(one, book(cost=Quantity(cost, "USD"), seconds=Quantity(one.seconds, "s"), **more))


def test_efficiency_and_the_front() -> None:
    found = compare(
        Group("a", (priced(0, 0.9, 2.0),)), Group("b", (priced(1, 0.8, 1.0),)), Group("c", (priced(2, 0.7, 3.0),)),
    )  # fmt: skip
    assert found.efficiency == "accuracy / cost"
    assert [item.figures["efficiency"].value.value for item in found.approaches] == pytest.approx([0.45, 0.8, 0.7 / 3])
    assert ["cost" in item.front for item in found.approaches] == [True, True, False]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 10)), min_size=2, max_size=6))
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    found = compare(*(Group(str(at), (priced(at, y, x),)) for at, (y, x) in enumerate(points)))
    placed = [(item.figures["metric"].value.value, item.figures["cost"].value.value) for item in found.approaches]
    for at, item in enumerate(found.approaches):
        y, x = placed[at]
        beaten = any(b >= y and c <= x and (b, c) != (y, x) for b, c in placed)  # type: ignore[operator]
        assert ("cost" in item.front) is not beaten


def test_measured_is_not_held_against_estimated() -> None:
    a = [priced(2 * i, 0.9, 1.0, energy=Quantity(100.0 + i, "J")) for i in range(3)]
    b = [priced(2 * i + 1, 0.9, 1.0, energy=estimated(10.0 + i, "J", 5.0, 20.0)) for i in range(3)]
    found = compare(Group("a", tuple(a)), Group("b", tuple(b)))
    energy = next(d for d in found.differences if d.figure == "energy")
    assert energy.answer == "not distinguishable" and "estimated in the other" in energy.reason
    # The bounds of the estimates are wider than the scatter, and stay.
    value = found.approaches[1].figures["energy"].value
    assert value.basis == "estimated" and value.low is not None and value.low <= 5.0 and (value.high or 0) >= 20.0
    gate = gates.judge(found, [gates.parse("energy>+2%")])[0]
    assert gate.outcome == "unknown" and "estimated" in gate.reason


def test_unknown_figures_stay_unknown() -> None:
    found = compare(group("a", run(0)), group("b", run(1)))
    for name in ("cost", "energy", "carbon", "memory", "gpu_memory", "parameters", "inference"):
        assert name not in found.approaches[0].figures
    assert all(item.value.value != 0 for approach in found.approaches for item in approach.figures.values())


def test_several_currencies_are_not_compared() -> None:
    a, b = priced(0, 0.9, 1.0), priced(1, 0.9, 1.0)
    assert a.ledger is not None
    euro = replace(a.ledger, currency="EUR")
    found = compare(Group("a", (a._replace(ledger=euro),)), Group("b", (b,)))
    assert "cost" not in found.approaches[0].figures and any("currencies" in note for note in found.notes)


def test_figures_of_the_model_are_read_where_recorded() -> None:
    one = run(0)
    told = Event(0.0, perrun.MODEL, "", values={"parameters": 7.0, "inference_seconds": 0.5})
    one = replace(one, events=(*one.events, told))
    found = compare(group("a", one), group("b", run(1)))
    assert found.approaches[0].figures["parameters"].value.value == 7.0
    assert found.approaches[0].figures["inference"].value.value == 0.5
    assert answers(found)["parameters"] == "unknown"


# -- resumed and odd logs --------------------------------------------------------------------------------------------


def test_a_resumed_run_adds_its_times_up_and_repeats_replace() -> None:
    events = tuple(
        Event(at=at, kind="metrics", text="", step=step, values={"accuracy": value})
        for at, step, value in ((1.0, 100, 0.1), (2.0, 200, 0.2), (0.5, 150, 0.9), (1.0, 250, 0.3))
    )
    one = Run(id="r", script="t", arguments=(), started="", status="finished", seconds=1.5, steps=250, events=events,
              earlier=(2.5,))  # fmt: skip
    points = series.events(one)["accuracy"]
    assert [(p.step, p.at, p.value) for p in points] == [(100, 1.0, 0.1), (150, 3.0, 0.9), (250, 3.5, 0.3)]
    assert perrun.duration(seen(one)) == 4.0


def test_the_step_time_leaves_warm_up_out() -> None:
    slow = Window(first=0, n=10, at=10.0, seconds=10.0)
    steady = tuple(Window(first=10 * k, n=10, at=10.0 + k, seconds=0.1) for k in range(1, 12))
    one = Run(id="r", script="t", arguments=(), started="", status="finished", windows=(slow, *steady))
    assert series.step_seconds(one) == pytest.approx(0.01)
    assert series.step_seconds(Run(id="r", script="t", arguments=(), started="", status="unknown")) is None


def test_phases_and_the_guard_are_told() -> None:
    one = run(0)
    windows = tuple(replace(item, phases={"data": 0.5, "odd": math.nan}) for item in one.windows)
    found = compare(group("a", replace(one, windows=windows, guard_fired=True)), group("b", run(1)))
    # 4 windows of 100 steps, half a second of waiting in each.
    assert found.approaches[0].phases == {"data": pytest.approx(0.005)} and found.approaches[1].phases == {}
    assert any("guard" in note for note in found.notes)


def test_scalars_beside_the_log(tmp_path) -> None:  # type: ignore[no-untyped-def]
    lines = [
        '{"acc": 0.5, "step": 10, "at": 1.5}',
        "torn {",
        "[1]",
        '{"acc": "x"}',
        '{"acc": NaN, "_step": 20}',
        '{"b": true}',
    ]
    (tmp_path / series.SCALARS).write_text("\n".join(lines))
    found = series.scalars(tmp_path)
    assert found == {"acc": (Point(10, 1.5, 0.5), Point(20, None, None))}
    assert series.scalars(tmp_path / "none") == {}


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "figure", "above", "kind", "number"),
    [
        ("step>+2%", "step", True, "share", 0.02), ("metric < -0.01", "metric", False, "change", -0.01),
        ("time>2h", "time", True, "value", 7200.0), ("memory>+1GiB", "memory", True, "change", 2.0**30),
        ("to-target>5%", "to_target", True, "share", 0.05), ("cost<1e2", "cost", False, "value", 100.0),
        ("energy>.5kWh", "energy", True, "value", 1.8e6),
    ],
)  # fmt: skip
def test_limits_are_read(text: str, figure: str, above: bool, kind: str, number: float) -> None:
    limit = gates.parse(text)
    assert (limit.figure, limit.above, limit.kind) == (figure, above, kind) and limit.number == pytest.approx(number)


@pytest.mark.parametrize(
    "text",
    ["", "step", "step>=2%", "step>", "speed>2%", "step>2%%", "step>nan", "step>1e999", "time>2GiB", "metric>1s",
     "step>2%;ls", "step>٢%"],
)  # fmt: skip
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        gates.parse(text)


def judged(found: Comparison, text: str, *, strict: bool = False) -> str:
    return gates.judge(found, [gates.parse(text)], strict=strict)[0].outcome


def test_one_run_each_is_judged_by_the_figure_itself() -> None:
    found = compare(group("a", run(0, 0.9, 0.0100)), group("b", run(1, 0.88, 0.0103)))
    assert judged(found, "step>+2%") == "failed" and judged(found, "step>+4%") == "passed"
    assert judged(found, "metric<-0.01") == "failed" and judged(found, "metric<-0.05") == "passed"
    assert judged(found, "metric<0.85") == "passed" and judged(found, "step>0.02") == "passed"
    assert judged(found, "cost>1") == judged(found, "memory>+1%") == judged(found, "to-target>+1%") == "unknown"
    assert "interval" in gates.judge(found, [gates.parse("step>+2%")])[0].reason


def test_repeats_need_the_whole_interval_beyond() -> None:
    a = [run(2 * i, 0.9, 0.0100 * (1 + 0.002 * i)) for i in range(4)]
    b = [run(2 * i + 1, 0.9, 0.0105 * (1 + 0.002 * i)) for i in range(4)]
    found = compare(group("a", *a), group("b", *b))
    assert judged(found, "step>+2%") == "failed" and judged(found, "step>+20%") == "passed"
    # The figure is at +5 %: beyond +4.9 %, but its interval is not.
    assert judged(found, "step>+4.9%") == "warned" and judged(found, "step>+4.9%", strict=True) == "failed"
    assert judged(found, "step>+0.0001") == "failed" and judged(found, "step<0.5") == "failed"


def test_a_missed_target_breaks_a_limit() -> None:
    reached, missed = [run(2 * i, 0.95) for i in range(3)], [run(2 * i + 1, 0.5) for i in range(3)]
    assert judged(compare(group("a", *reached), group("b", *missed), target=0.9), "to-target>+2%") == "failed"
    partly = compare(group("a", *reached), group("b", *missed[:1], *reached[:2]), target=0.9)
    assert judged(partly, "to-target>+2%") == "warned" and judged(partly, "to-target>+2%", strict=True) == "failed"
    assert judged(compare(group("a", *missed), group("b", *reached), target=0.9), "to-target>+2%") == "unknown"


# -- any runs at all -------------------------------------------------------------------------------------------------

ANY = st.one_of(st.floats(), st.sampled_from([0.0, 1e308, -1e308, math.nan, math.inf, -math.inf, 5e-324]))


@st.composite
def any_run(draw: st.DrawFn) -> Run:
    windows = tuple(
        Window(
            first=draw(st.integers(0, 50)), n=draw(st.integers(-1, 5)), at=draw(ANY), seconds=draw(ANY), loss=draw(ANY)
        )
        for _ in range(draw(st.integers(0, 3)))
    )
    events = tuple(
        Event(at=draw(ANY), kind="metrics", text="", step=draw(st.one_of(st.none(), st.integers(0, 50))),
              values={"accuracy": draw(st.one_of(st.none(), ANY))})
        for _ in range(draw(st.integers(0, 3)))
    )  # fmt: skip
    return Run(
        id="r", script="t", arguments=(), started=draw(st.sampled_from(["", "2026-01-01 00:00:00", "x"])),
        status=draw(st.sampled_from(["running", "finished", "unknown"])), seconds=draw(st.one_of(st.none(), ANY)),
        steps=draw(st.integers(0, 50)), windows=windows, events=events,
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(any_run(), min_size=1, max_size=3), min_size=2, max_size=3),
    st.one_of(st.none(), st.floats(-1, 1)),
)
def test_any_runs_give_a_comparison_that_can_be_kept(runs: list[list[Run]], target: float | None) -> None:
    given_ = [Group(str(at), tuple(seen(item) for item in items)) for at, items in enumerate(runs)]
    try:
        found = compare(*given_, target=target)
    except UsageError:
        return
    again = codec.loads(codec.dumps(found), Comparison)
    assert [item.name for item in again.approaches] == [group.name for group in given_]
    for approach in found.approaches:
        for name, entry in approach.figures.items():
            assert name in FIGURES and (entry.value.value is None or math.isfinite(entry.value.value))
    for limit in ("step>+2%", "metric<0.5", "loss>+1%", "to-target>+1%"):
        for gate in gates.judge(found, [gates.parse(limit)]):
            assert gate.outcome in ("passed", "warned", "failed", "unknown") and gate.reason
