"""Alarms on made-up runs: each speaks where it should, and nothing speaks where all is well or only noisy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upshift.diagnose.alarms import RULES, alarms
from upshift.diagnose.slopes import rising, theil_sen
from upshift.measure.gpus import REASONS
from upshift.records.resources import Alarm, GpuSample, Head, Sample
from upshift.records.run import Window

GIB = 2.0**30
HEAD = Head(
    pid=1, cores=4.0, memory_limit=16 * GIB, shm_size=64 * 2**20, clock_most=4e9, energy="", energy_basis="unknown"
)
GPU = GpuSample(
    name="Test 9000 (0)", utilisation=0.95, memory=4 * GIB, memory_total=8 * GIB, temperature=60.0, clock=1.9e9,
    clock_most=2e9,
)  # fmt: skip


def healthy(at: float) -> Sample:
    """A busy, well fed training at `at` seconds."""
    return Sample(
        at=at, cpu_seconds=3.5 * at, machine_cpu_seconds=3.7 * at, memory=4 * GIB, memory_available=11 * GIB,
        read=1e6 * at, written=1e5 * at, sent=0.0, received=0.0, swapped=0.0, shm=2**20, disk_free=100 * GIB,
        processes=3, threads=12, load=4.2, clock=3e9, temperature=60.0, watts=50.0, joules=50.0 * at, throttled=0.0,
        gpus=(GPU,),
    )  # fmt: skip


def run(seconds: float = 600.0, period: float = 1.0, **fields: Callable[[float], Any]) -> list[Sample]:
    """A healthy run but for these fields, each a function of time."""
    times = [period * number for number in range(1, int(seconds / period) + 1)]
    return [msgspec.structs.replace(healthy(t), **{name: value(t) for name, value in fields.items()}) for t in times]


def window(at: float, data: float = 0.02, **fields: Any) -> Window:
    return Window(
        first=int(at), n=1, at=at, seconds=1.0,
        phases={"data": data, "forward": 0.3, "backward": 0.6 - data, "optimizer": 0.05, "sync": 0.0}, **fields,
    )  # fmt: skip


def names(found: list[Alarm]) -> list[str]:
    return [alarm.name for alarm in found]


def only(samples: list[Sample], windows: list[Window] | None = None, head: Head = HEAD) -> Alarm:
    found = alarms(samples, head, windows or [])
    assert len(found) == 1, found
    assert found[0].at == samples[-1].at
    return found[0]


def test_a_healthy_run_raises_nothing_from_beginning_to_end():
    samples, windows = run(900.0), [window(float(at)) for at in range(900)]
    assert all(not alarms(samples[:n], HEAD, windows[:n]) for n in range(0, 901, 50))


# -- accelerators ------------------------------------------------------------------------------------------------------


def gpu(**fields: Any) -> Callable[[float], tuple[GpuSample, ...]]:
    return lambda at: (msgspec.structs.replace(GPU, **fields),)


def test_a_starved_accelerator_is_told_with_what_it_waits_for():
    windows = [window(float(at), data=0.55) for at in range(300)]
    alarm = only(run(300.0, gpus=gpu(utilisation=0.3)), windows)
    assert alarm.name == "starved_accelerator"
    assert "30 %" in alarm.text and "55 %" in alarm.text and "waiting for data" in alarm.text
    saving = [window(float(at), checkpoint=1.0) for at in range(300)]
    assert "writing checkpoints" in only(run(300.0, gpus=gpu(utilisation=0.3)), saving).text


def test_an_idle_accelerator_without_a_cause_in_the_anatomy_is_left_to_others():
    samples = run(300.0, gpus=gpu(utilisation=0.3))
    evaluating = [window(float(at), evaluation=50.0) for at in range(300)]
    assert not alarms(samples, HEAD, evaluating)
    assert not alarms(samples, HEAD, [])
    busy = [window(float(at), data=0.55) for at in range(300)]
    assert not alarms(run(300.0), HEAD, busy), "a loader that waits behind a busy accelerator costs nothing"
    assert not alarms(samples[:100], HEAD, busy[:100]), "the run has only begun"


@pytest.mark.parametrize("bit", [0x20, 0x40, 0x8, 0x80])
def test_throttling_names_its_reason(bit):
    alarm = only(run(120.0, gpus=gpu(throttled=(REASONS[bit],), clock=1.1e9, temperature=88.0)))
    assert alarm.name == "throttling" and REASONS[bit] in alarm.text
    assert "1.1 GHz of 2 GHz" in alarm.text and "88 degrees" in alarm.text


def test_a_power_limit_counts_where_the_clock_suffers():
    limited = (REASONS[0x4],)
    assert not alarms(run(120.0, gpus=gpu(throttled=limited, clock=1.8e9)), HEAD)
    assert only(run(120.0, gpus=gpu(throttled=limited, clock=1.2e9))).name == "throttling"


def test_heat_for_a_moment_is_no_alarm():
    hot = msgspec.structs.replace(GPU, throttled=(REASONS[0x20],))
    assert not alarms(run(200.0, gpus=lambda at: (hot if at % 10 < 2 else GPU,)), HEAD)


def test_a_busy_accelerator_with_a_clock_somebody_pinned():
    for throttled in ((), (REASONS[0x2],)):
        alarm = only(run(200.0, gpus=gpu(clock=1e9, throttled=throttled)))
        assert alarm.name == "low_clock" and "1 GHz of 2 GHz" in alarm.text
    assert not alarms(run(200.0, gpus=gpu(clock=1e9, utilisation=0.6)), HEAD), "an idle one may save power"


def test_a_busy_processor_that_runs_slowly():
    assert only(run(200.0, clock=lambda at: 1.2e9)).name == "low_clock"
    assert not alarms(run(200.0, clock=lambda at: 1.2e9, cpu_seconds=lambda at: at), HEAD), "idle cores save power"
    assert not alarms(run(200.0, clock=lambda at: 2.2e9), HEAD), "wide vectors on all cores"


# -- memory ------------------------------------------------------------------------------------------------------------


def leak(rate: float, noise: float, seed: int) -> dict[str, Callable[[float], float]]:
    rng = random.Random(seed)
    return {
        "memory": lambda at: 4 * GIB + rate * at + rng.gauss(0.0, noise),
        "memory_available": lambda at: 11 * GIB - rate * at,
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_told_with_the_time_that_is_left(seed):
    rate = 4e6
    samples = run(900.0, **leak(rate, 40e6, seed))
    alarm = only(samples)
    assert alarm.name == "memory_grows" and "out of memory in about" in alarm.text
    left = (samples[-1].memory_available or 0.0) / rate
    minutes = float(alarm.text.split("about ")[1].split(" min")[0])
    assert minutes * 60.0 == pytest.approx(left, rel=0.1)


def test_a_leak_is_told_from_the_first_five_minutes_on_and_not_before():
    samples = run(900.0, **leak(4e6, 10e6, 1))
    assert not alarms(samples[:290], HEAD) and alarms(samples[:320], HEAD)


def ar(rng: random.Random, n: int, phi: float) -> list[float]:
    values, value = [], 0.0
    for _ in range(n):
        value = phi * value + rng.gauss(0.0, 1.0)
        values.append(value)
    return values


SHAPES: dict[str, Callable[[random.Random, int], list[float]]] = {
    "white noise": lambda rng, n: [rng.gauss(0.0, 1.0) for _ in range(n)],
    "slow noise": lambda rng, n: ar(rng, n, 0.98),
    "sawtooth": lambda rng, n: [(at % rng.choice((97, 180))) + rng.gauss(0.0, 3.0) for at in range(n)],
    "a ramp that ends": lambda rng, n: [min(at, 0.6 * n) + rng.gauss(0.0, 1.0) for at in range(n)],
    "one step": lambda rng, n: [(100.0 if at > n / 2 else 0.0) + rng.gauss(0.0, 1.0) for at in range(n)],
    "falls": lambda rng, n: [-at + rng.gauss(0.0, 5.0) for at in range(n)],
    "constant": lambda rng, n: [5.0] * n,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_steps_and_ramps_that_end_are_no_trend(shape):
    for seed in range(40):
        values = SHAPES[shape](random.Random(seed), 300)
        assert rising([(float(at), value) for at, value in enumerate(values)]) is None, seed


def test_random_walks_are_rarely_called_a_trend():
    """The hardest noise: half of all random walks have a 'significant' slope."""
    called = 0
    for seed in range(300):
        walk = ar(random.Random(seed), 300, 1.0)
        called += rising([(float(at), value) for at, value in enumerate(walk)]) is not None
    assert called <= 0.05 * 300, called


def test_the_bounds_hold_the_slope_as_often_as_they_say():
    missed = 0
    for seed in range(200):
        rng = random.Random(seed)
        found = theil_sen([(float(at), 2.0 * at + rng.gauss(0.0, 20.0)) for at in range(40)])
        assert found is not None and found.low <= found.value <= found.high
        missed += not found.low <= 2.0 <= found.high
    assert missed < 7, "2 are expected of 200 at 99 %; 7 or more come by chance once in 200 times"


@pytest.mark.extra
def test_the_slope_and_its_bounds_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(3)
    points = [(float(at), 2.0 * at + rng.gauss(0.0, 20.0)) for at in range(50)]
    found = theil_sen(points)
    slope, _, low, high = stats.theilslopes([v for _, v in points], [t for t, _ in points], 0.99)
    assert found is not None and found.value == pytest.approx(slope)
    assert found.low == pytest.approx(low, rel=0.02) and found.high == pytest.approx(high, rel=0.02)


def test_growth_far_from_the_limit_is_no_alarm():
    assert not alarms(run(900.0, **leak(2e4, 1e3, 1)), HEAD)


def test_the_memory_of_an_accelerator_grows():
    samples = run(900.0, gpus=lambda at: (msgspec.structs.replace(GPU, memory=4 * GIB + 3e6 * at),))
    alarm = only(samples)
    assert alarm.name == "gpu_memory_grows" and "Test 9000 (0)" in alarm.text


def test_little_memory_left_swapping_and_a_full_shm():
    assert only(run(60.0, memory_available=lambda at: 0.2 * GIB)).name == "memory_low"
    assert only(run(100.0, swapped=lambda at: 3e6 * at)).name == "swapping"
    assert not alarms(run(100.0, swapped=lambda at: min(at, 20.0) * 1e6), HEAD), "moved out once and left there"
    alarm = only(run(60.0, shm=lambda at: 60.0 * 2**20))
    assert alarm.name == "shm_full" and "--shm-size" in alarm.text


# -- disk --------------------------------------------------------------------------------------------------------------


def test_room_for_the_next_checkpoints():
    saves = [window(at, checkpoint=0.5) if at % 100 == 50 else window(at) for at in map(float, range(400))]
    done = lambda at: max((at + 50.0) // 100.0, 0.0)  # noqa: E731
    samples = run(400.0, disk_free=lambda at: 13 * GIB - 2 * GIB * done(at), written=lambda at: 2 * GIB * done(at))
    alarm = only(samples, saves)
    assert alarm.name == "disk_full" and "room for 2 more checkpoints" in alarm.text and "2 GiB each" in alarm.text
    assert "3 min 20 s" in alarm.text
    roomy = run(400.0, disk_free=lambda at: 99 * GIB - 2 * GIB * done(at), written=lambda at: 2 * GIB * done(at))
    assert not alarms(roomy, HEAD, saves)


def test_old_checkpoints_go_but_the_next_one_does_not_fit():
    saves = [window(at, checkpoint=0.5) if at % 100 == 50 else window(at) for at in map(float, range(400))]
    samples = run(400.0, disk_free=lambda at: 1.5 * GIB, written=lambda at: 2 * GIB * ((at + 50.0) // 100.0))
    assert "a checkpoint takes about 2 GiB" in only(samples, saves).text


def test_a_disk_that_fills_without_checkpoints():
    assert only(run(600.0, disk_free=lambda at: 20 * GIB - 1e7 * at)).name == "disk_full"
    assert not alarms(run(600.0, disk_free=lambda at: 2000 * GIB - 1e7 * at), HEAD)


# -- processor ---------------------------------------------------------------------------------------------------------


def test_a_quota_that_holds_the_run_up():
    alarm = only(run(120.0, throttled=lambda at: 1.5 * at))
    assert alarm.name == "held_up" and "4 cores" in alarm.text and "90 s" in alarm.text
    assert not alarms(run(120.0, throttled=lambda at: 0.01 * at), HEAD)


def test_threads_that_wait_for_cores():
    many = {"threads": lambda at: 40, "load": lambda at: 20.0, "cpu_seconds": lambda at: 3.9 * at,
            "machine_cpu_seconds": lambda at: 3.9 * at}  # fmt: skip
    alarm = only(run(200.0, **many))
    assert alarm.name == "too_many_threads" and "40 threads on 4 cores" in alarm.text
    assert not alarms(run(200.0, **{**many, "load": lambda at: 5.0}), HEAD), "threads that sleep cost nothing"
    crowd = {**many, "machine_cpu_seconds": lambda at: 18.0 * at}
    assert not alarms(run(200.0, **crowd), HEAD), "others wait for a core, on a machine with many"


# -- anything ----------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.none(), st.floats(0.0, 1e18), st.just(0.0))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_whatever_is_unknown_or_odd_nothing_raises_and_texts_are_plain(data):
    fields = [field.name for field in msgspec.structs.fields(Sample) if field.name not in ("at", "gpus")]
    odd = data.draw(st.dictionaries(st.sampled_from(fields), NUMBERS, max_size=6))
    of_gpu = st.sampled_from(["utilisation", "memory", "memory_total", "clock", "clock_most"])
    device = data.draw(st.dictionaries(of_gpu, NUMBERS))
    period = data.draw(st.sampled_from([1.0, 30.0]))
    samples = run(300.0 * period, period, **{name: (lambda at, v=value: v) for name, value in odd.items()})
    counts = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    lengths = data.draw(st.lists(st.floats(0.0, 9.0), min_size=1, max_size=4))
    device_now = msgspec.structs.replace(GPU, **device)
    samples = [
        msgspec.structs.replace(sample, gpus=(device_now,) * counts[place % len(counts)])
        for place, sample in enumerate(samples)
    ]
    head = msgspec.structs.replace(HEAD, cores=data.draw(NUMBERS), memory_limit=data.draw(NUMBERS))
    windows = [
        Window(first=0, n=1, at=sample.at, seconds=lengths[place % len(lengths)])
        for place, sample in enumerate(samples)
    ]
    found = alarms(samples, head, windows)
    assert len(set(names(found))) == len(found) and set(names(found)) <= set(RULES)
    for alarm in found:
        assert alarm.text == alarm.text.strip() and "None" not in alarm.text and "nan" not in alarm.text
        assert math.isfinite(alarm.at)
