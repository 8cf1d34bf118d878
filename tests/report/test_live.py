"""What `watch` and the page of a run show: figures against arithmetic, drawings at any width, nothing made up."""

from __future__ import annotations

import io
import math
import re
from fractions import Fraction
from html.parser import HTMLParser

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from sample_records import HOSTILE, run

from upshift.records.ledger import Entry, Ledger
from upshift.records.quantity import Quantity, unknown
from upshift.records.resources import Alarm, GpuSample, Head, Resources, Sample
from upshift.records.run import Event, Run, Window
from upshift.report import current, html, live, meters, resource_views
from upshift.report.current import Moment

replace = msgspec.structs.replace


def gpu(utilisation: float | None = 0.9) -> GpuSample:
    return GpuSample("H200", utilisation, 3e10, 1.5e11, 400.0, 1e5, 60.0, 1.9e9, 1.98e9, ("power limit",))


def sample(at: float, **more: object) -> Sample:
    known = {
        "cpu_seconds": 3 * at, "machine_cpu_seconds": 3.5 * at, "memory": 2e9, "memory_available": 5e9,
        "read": 1e6 * at, "written": 2e5 * at, "sent": 0.0, "received": 1e3 * at, "disk_free": 1e11,
        "processes": 3, "threads": 22, "watts": 45.0, "joules": 45.0 * at,
    }  # fmt: skip
    return Sample(at=at, **{**known, **more})  # type: ignore[arg-type]


HEAD = Head(pid=1, cores=4.0, memory_limit=8e9, energy="RAPL", energy_basis="measured")


def used(count: int = 100, head: Head = HEAD, **more: object) -> Resources:
    return Resources(head, tuple(sample(float(at), **more) for at in range(count)), (Alarm(40.0, "starved", "GPU"),))


def ledger(**more: Entry) -> Ledger:
    none = Entry(unknown("1"), "not seen")
    fields = ("seconds", "device_hours", "cpu_hours", "energy", "carbon", "cost", "cost_per_epoch", "lost", "memory",
              "gpu_memory", "cpu_utilisation", "gpu_utilisation")  # fmt: skip
    return Ledger("x", **{**dict.fromkeys(fields, none), **more})


def going(steps_planned: int | None = 5000) -> Run:
    return replace(run(), status="running", exit_code=None, steps_planned=steps_planned)


def bare() -> Run:
    return Run(id="x", script="train.py", arguments=(), started="", status="running")


def windows(count: int, seconds: float = 1.0, n: int = 10, **more: object) -> tuple[Window, ...]:
    return tuple(
        Window(first=i * n, n=n, at=(i + 1) * seconds, seconds=seconds, **more)  # type: ignore[arg-type]
        for i in range(count)
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def test_rates_and_shares_from_counters():
    seen = current.snapshot(Moment(going(), resources=used(), elapsed=100.0))
    assert seen.cpu.value == pytest.approx(3.0) and seen.cpu_share.value == pytest.approx(0.75)
    assert seen.machine_share.value == pytest.approx(0.875)
    assert seen.read.value == pytest.approx(1e6) and seen.written.value == pytest.approx(2e5)
    assert seen.sent.value == 0.0 and seen.sent.basis == "measured"
    assert (seen.swapped.value, seen.swapped.basis) == (None, "unknown")
    assert seen.watts == Quantity(45.0, "W") and seen.memory.value == 2e9


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000), st.booleans()), min_size=2, max_size=80),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_rate_is_the_slope_over_the_last_half_minute(moves, gaps):
    samples, at, read = [], 0, 0
    for span, more, known in moves:
        at, read = at + span, read + more
        samples.append(Sample(at=float(at), read=float(read) if known else None))
    told = [(int(item.at), int(item.read)) for item in samples if item.read is not None]
    found = current.rate(samples, lambda item: item.read, "B/s")
    if len(told) < 2:
        assert found == unknown("B/s")
        return
    end = told[-1]
    begin = next((one for one in reversed(told[:-1]) if end[0] - one[0] >= current.SPAN), told[0])
    assert found.value == pytest.approx(float(Fraction(end[1] - begin[1], end[0] - begin[0])))


def test_a_counter_that_falls_gives_no_rate_and_another_start_begins_anew():
    assert current.rate([sample(0.0, read=9.0), sample(1.0, read=3.0)], lambda item: item.read, "B/s").value is None
    again = Resources(HEAD, (*used(50).samples, sample(0.0), sample(2.0, cpu_seconds=2.0)))
    seen = current.snapshot(Moment(going(), resources=again, elapsed=3.0))
    assert seen.cpu.value == pytest.approx(1.0)


def test_without_anything_all_is_unknown_and_nothing_is_zero():
    seen = current.snapshot(Moment(bare()))
    quantities = [value for value in msgspec.structs.astuple(seen) if isinstance(value, Quantity)]
    assert len(quantities) > 15
    assert all(item.value is None and item.basis == "unknown" for item in quantities)
    told = live.text(Moment(bare()))
    assert "time left unknown: how many steps it will make is not recorded" in told.replace("\n", " ")
    assert "nothing is recorded of the resources" in told
    assert not re.search(r"(?<![\d.])0 (s|W|B|%)", told)


def test_estimated_power_says_so():
    estimated = replace(HEAD, energy_basis="estimated")
    moment = Moment(going(), resources=used(head=estimated), elapsed=100.0)
    assert current.snapshot(moment).watts.basis == "estimated"
    assert "45 W (estimated)" in live.text(moment)
    assert "45 W (estimated)" not in live.text(Moment(going(), resources=used(), elapsed=100.0))


def test_time_left_lies_between_the_paces():
    slow, fast = windows(10, seconds=10.0), windows(60, seconds=1.0)
    both = replace(bare(), windows=slow + fast, steps=700, steps_planned=1700)
    left, how = current.time_left(both, fast[-30:])
    whole = Fraction(10 * 10 + 60, 700)
    assert left.low == pytest.approx(1000 * 0.1) and left.high == pytest.approx(float(1000 * whole))
    assert left.low < left.value < left.high and left.basis == "estimated" and "300 steps" in how


def test_time_left_counts_evaluation_and_checkpoints():
    some = windows(10, evaluation=1.0, checkpoint=2.0)
    left, _ = current.time_left(replace(bare(), windows=some, steps=100, steps_planned=200), some)
    assert left.value == pytest.approx(100 * 0.4)
    seen = current.snapshot(Moment(replace(bare(), windows=some, steps=100)))
    assert seen.speed.value == pytest.approx(10.0)
    assert seen.evaluation.value == pytest.approx(0.25) and seen.checkpoint.value == pytest.approx(0.5)


@pytest.mark.parametrize(("change", "why"), [
    ({"steps_planned": None}, "not recorded"),
    ({"steps_planned": 1200}, "all planned steps"),
    ({"windows": ()}, "too few steps"),
    ({"windows": windows(2)}, "too few steps"),
    ({"status": "finished"}, "over"),
])  # fmt: skip
def test_time_left_is_unknown_with_a_reason(change, why):
    left, how = current.time_left(replace(going(), **change), windows(2))
    assert left == unknown("s") and why in how


def test_sums_of_a_part_of_the_log_are_not_told_as_those_of_the_run():
    seen = current.snapshot(Moment(going(), share=0.4))
    assert seen.evaluation.value is None and "part read so far" in seen.left_how
    assert "40 % so far" in live.text(Moment(going(), share=0.4))


def test_phases_are_shares_of_the_last_half_minute():
    old, new = windows(100, phases={"data": 1.0}), windows(60, phases={"data": 0.25, "backward": 0.5, "mine": 0.125})
    seen = current.snapshot(Moment(replace(bare(), windows=old + new), recent=new))
    assert {name: share.value for name, share in seen.phases.items()} == {"data": 0.25, "backward": 0.5, "mine": 0.125}
    assert list(seen.phases)[-1] == "mine"


def test_old_samples_are_called_old():
    fresh, old = (Moment(going(), resources=used(), elapsed=99.0 + late) for late in (2.0, 60.0))
    assert not current.snapshot(fresh).sample_old and "ago" not in live.text(fresh)
    assert current.snapshot(old).sample_old and "last looked at 60 s ago" in live.text(old)


def test_silence_is_told_when_it_is_longer_than_usual():
    recent = windows(20, seconds=20.0)
    assert "No step for" not in live.text(Moment(going(), recent=recent, silent=60.0))
    assert "No step for 5 min" in live.text(Moment(going(), recent=recent, silent=300.0))
    assert "No step for" not in live.text(Moment(replace(going(), status="finished"), recent=recent, silent=300.0))


def test_the_snapshot_survives_json():
    seen = current.snapshot(Moment(going(), resources=used(), ledger=ledger(), elapsed=100.0))
    assert msgspec.json.decode(msgspec.json.encode(seen), type=current.Snapshot) == seen


# -- drawings ----------------------------------------------------------------------------------------------------------


def draw(renderable: object, width: int, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    Console(file=file, width=width, color_system=None, force_terminal=False).print(renderable)
    file.seek(0)
    return file.read().removesuffix("\n")


figures = st.one_of(st.none(), st.floats(-1e300, 1e300), st.just(math.nan), st.just(math.inf))


@given(values=st.lists(figures, max_size=300), count=st.integers(1, 120))
@settings(max_examples=100, deadline=None)
def test_buckets_are_means_of_neighbours(values, count):
    found = meters.buckets(values, count)
    known = [value for value in values if value is not None and math.isfinite(value)]
    assert len(found) == min(count, len(values))
    assert all(min(known) <= value or math.isclose(value, min(known)) for value in found if value is not None)
    assert all(value <= max(known) or math.isclose(value, max(known)) for value in found if value is not None)
    assert bool(known) == any(value is not None for value in found)


@given(values=st.lists(figures, max_size=100), width=st.integers(1, 120), encoding=st.sampled_from(["utf-8", "ascii"]))
@settings(max_examples=100, deadline=None)
def test_a_curve_fills_its_width(values, width, encoding):
    assert cell_len(draw(meters.Spark(values), width, encoding)) == width


def test_a_curve_rises_where_its_values_do():
    drawn = draw(meters.Spark([1, 2, 3, 4, None, 8]), 6)
    levels = ["▁▂▃▄▅▆▇█".index(char) for char in drawn if char != " "]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == 7 and drawn[4] == " "
    assert draw(meters.Spark([4.0, 4.0], low=0.0), 2) == "██"
    assert draw(meters.Spark([4.0, 4.0]), 2) == "▁▁"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(8, 120))
@settings(max_examples=100, deadline=None)
def test_shares_fill_the_width_in_proportion(shares, width):
    names = ["data", "h2d", "forward", "loss", "backward", "optimizer", "sync", "other"]
    parts = list(zip(names, shares, strict=False))
    drawn = draw(meters.Stack(parts), width)
    assert cell_len(drawn) == width
    total = max(sum(shares), 1.0)
    for name, share in parts:
        if [meters.fill(other) for other, _ in parts].count(meters.fill(name)) == 1:
            assert abs(drawn.count(meters.fill(name)) - share / total * width) <= 1.0 + 1e-9


def full() -> Moment:
    events = (Event(30.0, "metrics", "acc", step=1000, values={"accuracy": 0.912, "loss": None}),)
    energy = Entry(Quantity(1.3e5, "J"), "RAPL")
    return Moment(
        replace(going(), events=run().events + events),
        resources=used(gpus=tuple(gpu() for _ in range(10))),
        ledger=ledger(energy=energy, cost=Entry(unknown("USD"), "no price is given")),
        elapsed=100.0,
    )


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("name", ["train.py", *HOSTILE])
def test_every_screen_fits_and_no_text_acts_on_the_terminal(width, name):
    alarms = (Alarm(1.0, name, name), Alarm(2.0, name, name))
    moment = full()
    moment = moment._replace(
        run=replace(moment.run, script=name, arguments=(name,), plan=name, techniques={name: {name: name}},
                    events=(Event(1.0, name, name), Event(2.0, "metrics", name, values={name: 1.0})),
                    windows=tuple(replace(item, phases={name: 1.0}) for item in moment.run.windows)),
        resources=replace(used(gpus=(replace(gpu(), name=name, throttled=(name,)),)), alarms=alarms,
                          head=replace(HEAD, notes=(name,))),
        ledger=ledger(cost=Entry(Quantity(1.0, "USD"), name)),
    )  # fmt: skip
    for one in (moment, full()):
        told = live.text(one, width)
        assert all(cell_len(line) <= width for line in told.splitlines())
        assert all(char.isprintable() or char == "\n" for char in told)


def test_the_screen_says_what_a_person_wants_to_know():
    told = live.text(full(), 100)
    for wanted in ("running for 100 s", "step 1,200 of 5,000", "steps/s", "left (", "estimated", "24 % of 5,000 steps",
                   "accuracy 0.912", "loss unknown", "waiting for data 6 %", "75 % of 4 cores", "gpu 7",
                   "and 2 more accelerators", "1.86 GiB of 7.45 GiB", "36.1 Wh (measured: RAPL)",
                   "unknown (no price is given)", "Alarm starved", "applied"):  # fmt: skip
        assert wanted in told, wanted
    assert "gpu 8" not in told


def test_without_colour_no_escape_and_with_colour_the_same_words():
    assert "\x1b" not in live.text(full())
    file = io.StringIO()
    Console(file=file, width=100, force_terminal=True, color_system="truecolor").print(live.render(full()))
    assert "\x1b[" in file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert plain == live.text(full())


@pytest.mark.parametrize(("status", "code", "told"), [
    ("finished", 0, "finished with exit code 0"), ("failed", 1, "failed with exit code 1"),
    ("interrupted", 130, "interrupted"), ("unknown", None, "the log has no end"),
])  # fmt: skip
def test_how_it_ended(status, code, told):
    assert told in live.text(Moment(replace(going(), status=status, exit_code=code)))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_machine_the_alarms_and_the_books():
    page = html.render_run(run(), resources=full().resources, ledger=full().ledger)
    for wanted in ("What it used of its machine", "CPU utilisation, of 4 cores", "Accelerator utilisation, mean and",
                   "Host memory of the process tree", "limit 7.45 GiB", "Accelerator power", "starved",
                   "36.1 Wh", "no price is given", "Energy: RAPL"):  # fmt: skip
        assert wanted in page, wanted
    assert page.count('<svg class="chart"') == html.render_run(run()).count('<svg class="chart"') + 12
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_without_resources_is_as_before():
    assert "What it used" not in html.render_run(run())
    page = html.render_run(run(), ledger=ledger())
    assert "Nothing was recorded of the machine" in page and "not seen" in page


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_from_the_samples_acts_on_the_page(name):
    hostile = replace(used(gpus=(replace(gpu(), name=name),)), alarms=(Alarm(1.0, name, name),),
                      head=replace(HEAD, notes=(name,), energy=name))  # fmt: skip
    page = html.render_run(run(), resources=hostile, ledger=ledger(cost=Entry(unknown("USD"), name)))
    tags: list[tuple[str, list[tuple[str, str | None]]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, attrs))

    Tags().feed(page)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags for key, _ in attrs if key.startswith("on")]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", page)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.one_of(st.none(), st.floats(0, 1e12))), max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_samples_can_be_drawn(items):
    samples = tuple(Sample(at=at, cpu_seconds=value, memory=value, watts=value) for at, value in items)
    view = resource_views.resources_view(Resources(HEAD, samples), None)
    assert view is not None
    drawn = "".join(str(item["svg"]) for chart in view["charts"] for item in chart["figure"].drawings)
    assert "nan" not in drawn and "inf" not in drawn


def test_starts_follow_each_other_on_the_axis():
    found = resource_views.continued([sample(0.0), sample(10.0), sample(1.0), sample(5.0), sample(0.5)])
    assert [item.at for item in found] == [0.0, 10.0, 11.0, 15.0, 15.5]


def test_many_samples_are_drawn_as_means_with_their_extremes():
    points = [resource_views.Point(float(i), 100.0 if i == 777 else 1.0) for i in range(10_000)]
    found = resource_views.thinned(points, 100)
    assert len(found) == 100 and max(item.high for item in found) == 100.0
    total = sum(item.mean for item in found) * 100
    assert total == pytest.approx(sum(item.mean for item in points))
