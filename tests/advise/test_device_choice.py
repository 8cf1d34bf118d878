"""Does it fit, what helps, what it costs, how many for a budget: arithmetic by hand, and what is unknown stays so."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched_trainings import GIB, HERE, MIB, gpu, offer, q, seen, work

from upshift.advise import assessing, choice, devices, memory
from upshift.advise.assessing import Wanted, assess
from upshift.advise.remedies import remedies
from upshift.errors import UsageError
from upshift.hardware import catalog
from upshift.hardware.offer import Offer
from upshift.records import Quantity, unknown
from upshift.records.quantity import estimated
from upshift.records.stepwork import Moment
from upshift.techniques import registry

STEPS = estimated(36_000.0, "steps")


def on(device: Any, offers: Any = (), **wanted: Any) -> Any:
    return assess(seen(), HERE, device, Wanted(steps=STEPS, **wanted), offers)


def test_it_fits_or_it_does_not() -> None:
    assert on(gpu()).fits is True
    assert on(gpu(memory=2 * GIB)).fits is False
    assert on(gpu(memory=None)).fits is None
    assert "memory of Card is unknown" in " ".join(on(gpu(memory=None)).notes)


def test_the_machine_at_hand_is_what_was_measured() -> None:
    found = on(HERE)
    assert found.step.value == pytest.approx(0.1) and not found.order_of_magnitude
    assert found.total.value == pytest.approx(3600 + 5)
    # 20 W idle, 100 W at full load: 76 W at the assumed load.
    assert found.energy.value == pytest.approx(3605 * 76)
    assert found.energy.low == pytest.approx((found.total.low or 0) * 20)
    assert found.energy.high == pytest.approx((found.total.high or 0) * 100)


def test_what_is_not_known_of_a_device_is_unknown() -> None:
    found = on(gpu(bandwidth=None, watts=None, purchase=20_000.0))
    for quantity in (found.step, found.total, found.energy, found.carbon):
        assert quantity.value is None and quantity.basis == "unknown"
    assert found.fits is True and found.break_even is None
    assert "bandwidth of Card is not known" in " ".join(found.notes)
    without = assess(seen(), HERE, HERE, Wanted())
    assert without.step.value and without.total.value is None and without.energy.value is None


def test_carbon_needs_a_grid() -> None:
    assert on(HERE).carbon.value is None
    found = on(HERE, grams=400.0)
    assert found.carbon.value == pytest.approx(3605 * 76 / 3.6e6 * 400)
    assert on(HERE, grams=400.0, pue=1.5).carbon.value == pytest.approx(1.5 * (found.carbon.value or 0))


def test_cost_is_a_share_of_the_machine() -> None:
    found = on(HERE, (offer(8.0, count=4),))
    assert found.costs[0].on_demand.value == pytest.approx(3605 / 3600 * 8 / 4)
    assert found.costs[0].spot.value is None


def test_a_spot_machine_loses_work() -> None:
    total = Quantity(value=100 * 3600.0, unit="s")
    found = assessing.cost(offer(2.0, spot=1.0), total, seen())
    assert found.interruptions.value == pytest.approx(25)
    assert found.lost.or_else(0) > 25 * assessing.REPLACED
    assert found.spot.value == pytest.approx((total.or_else(0) + found.lost.or_else(0)) / 3600)
    assert "assumed" in found.note


def test_break_even_by_hand() -> None:
    # 10,000 for a card of 300 W; 2 an hour to rent. At 210 W (30 % of the way is idle) and 0.2 a kWh.
    found = assessing.break_even(gpu(purchase=10_000.0), [offer(16.0, count=8), offer(9.0)])
    watts = Fraction(45) + Fraction(7, 10) * (300 - 45)
    expected = 10_000 / (2 - Fraction(2, 10) * watts / 1000)
    assert found is not None and found.value == pytest.approx(float(expected))
    assert assessing.break_even(gpu(), [offer()]) is None
    assert assessing.break_even(gpu(purchase=1.0), []) is None
    never = assessing.break_even(gpu(purchase=10_000.0), [offer(0.01)])
    assert never is not None and never.value is None


# -- what makes it fit -----------------------------------------------------------------------------------------------


def ways(limit: float, **changes: Any) -> Any:
    fields = {"batch": None, "precision": memory.AS_IS, "bf16": True, **changes}
    return remedies(work(), seen().facts, limit, **fields)


def test_remedies_are_techniques_of_the_registry_and_fit() -> None:
    known = {item.card.name for item in registry.all_techniques()}
    found = ways(2.5 * GIB)
    assert found
    for way in found:
        assert set(way.techniques) <= known
        assert way.memory.or_else(1e99) <= memory.HEADROOM * 2.5 * GIB
        assert way.techniques or (way.batch and way.batch < 32)


def test_no_remedy_where_even_the_parameters_are_too_many() -> None:
    assert ways(300 * MIB) == ()


def test_moving_things_to_the_host_is_for_accelerators() -> None:
    found = ways(1.95 * GIB, accelerator=False)
    assert found and all("offload" not in name for way in found for name in way.techniques)


def test_the_state_of_an_optimizer_is_all_there_while_it_steps() -> None:
    # Everything else is gone then, so putting the state away cannot bring the peak below it.
    heavy = work(moments=(Moment(100 * MIB, 0.0, "optimizer"), Moment(0.0, 50 * MIB, "forward")))
    for way in remedies(heavy, seen().facts, 4 * GIB, batch=None, precision=memory.AS_IS, bf16=False):
        assert way.memory.or_else(0) >= 1300 * MIB


# -- how many --------------------------------------------------------------------------------------------------------


def picked(budget: float | None, deadline: float | None, offers: Any, device: Any = HERE) -> Any:
    found = on(device, offers)
    return choice.choose(choice.options(found, offers, STEPS, seen()), budget, deadline)


def test_one_is_enough() -> None:
    (found,) = picked(3.0, 2 * 3600.0, [offer(2.0)])
    assert found.within and found.count == 1
    assert found.money.value == pytest.approx(2 * 3605 / 3600)


def test_a_deadline_takes_more_of_them() -> None:
    offers = [offer(2.0 * n, count=n, instance=f"{n}x") for n in (1, 2, 4)]
    found = picked(None, 1000.0, offers)
    assert [item.count for item in found] == [4]
    assert found[0].seconds.value == pytest.approx(900 + 5)
    assert "speed is not known" in found[0].note


def test_links_between_devices_take_time() -> None:
    linked = on(gpu(interconnect=400 * MIB, kind="cpu"), [offer(8.0, count=2)])
    free = on(gpu(kind="cpu"), [offer(8.0, count=2)])
    for_two = [choice.total_of(item, 2, STEPS, unknown("s"), 400 * MIB).or_else(0) for item in (linked, free)]
    # 2 (2 - 1) / 2 of 400 MiB over 400 MiB/s: a second more in each of half the steps.
    assert for_two[0] - for_two[1] == pytest.approx(18_000)


def test_an_impossible_budget_names_the_nearest() -> None:
    offers = [offer(2.0), offer(1.0, instance="cheap"), offer(8.0, count=8, instance="large")]
    (found,) = picked(0.0001, None, offers)
    assert not found.within and found.instance == "Cloud cheap"
    (found,) = picked(None, 1.0, offers)
    assert not found.within and found.count == 8


def test_a_price_nobody_knows_is_within_no_budget() -> None:
    (found,) = picked(1e9, None, [])
    assert not found.within and found.money.value is None
    assert picked(None, 1e9, [])[0].within


def test_nothing_to_choose_from() -> None:
    assert picked(1.0, 1.0, [offer()], gpu(memory=1e6)) == ()
    unknown_steps = assess(seen(), HERE, HERE, Wanted(), [offer()])
    assert choice.choose(choice.options(unknown_steps, [offer()], unknown("steps"), seen()), 1.0, 1.0) == ()


@given(st.floats(0.01, 1e5), st.floats(1, 1e7))
def test_what_is_within_is_within(budget: float, deadline: float) -> None:
    offers = [offer(2.0 * n, count=n, spot=0.7 * n, instance=f"{n}x") for n in (1, 4, 8)]
    found = picked(budget, deadline, offers)
    assert found
    for item in found:
        inside = item.money.or_else(1e99) <= budget and item.seconds.or_else(1e99) <= deadline
        assert inside == item.within
    money = [item.money.or_else(1e99) for item in found]
    assert money == sorted(money)


# -- devices ---------------------------------------------------------------------------------------------------------


def test_every_device_of_the_catalogue_can_be_estimated_for() -> None:
    for figures in devices.chosen((), catalog.devices()):
        found = on(figures, (offer(),))
        for quantity in (found.memory, found.step, found.total, found.energy):
            assert quantity.value is None or quantity.value > 0
        assert (found.step.value is None) == any("step is unknown" in note for note in found.notes)


def test_names_of_devices() -> None:
    known = catalog.devices()
    assert [item.name for item in devices.chosen(("h100", "L4", "l4"), known)] == ["H100", "L4"]
    with pytest.raises(UsageError, match="no device"):
        devices.chosen(("Voodoo 3000",), known)
    with pytest.raises(UsageError) as error:
        devices.chosen(("L4OS",), known)
    assert "L40S" in error.value.remedy


def test_offers_without_a_price_are_left_out() -> None:
    sold = Offer("Cloud", "g6", "test", device="L4", count=1, hour=0.8)
    dear = Offer("Other", "g6", "test", device="L4", count=2, hour=1.8)
    free = Offer("Cloud", "g0", "test", device="L4", count=1)
    host = Offer("Cloud", "cpu", "test", hour=0.1)
    assert [item.hour for item in devices.offers([dear, free, sold, host])["L4"]] == [0.8, 1.8]
    assert set(devices.offers([free, host])) == set()


def test_products_and_sums_of_intervals() -> None:
    left, right = estimated(2.0, "s", 1.0, 3.0), estimated(10.0, "steps", 10.0, 20.0)
    assert assessing.times(left, right, "s") == estimated(20.0, "s", 10.0, 60.0)
    assert assessing.times(unknown("s"), right, "s").value is None
    assert assessing.plus(left, q(1.0)) == estimated(3.0, "s", 2.0, 4.0)
