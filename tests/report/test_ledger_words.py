"""The books in words: units, money, and that unknown is a word."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.records.ledger import Entry, Ledger
from upshift.records.quantity import Quantity, estimated, unknown
from upshift.report import ledger_words as lw


def books(**more: Entry | None) -> Ledger:
    nothing = Entry(unknown("s"), "not seen")
    fields = dict.fromkeys(lw.LABELS, nothing) | {"tuning": None, "cost_to_target": None} | more
    return Ledger(run="r", currency="EUR", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("joules", "text"),
    [(None, "unknown"), (math.nan, "unknown"), (0.0, "0 J"), (12.3, "12.3 J"), (3600.0, "1 Wh"), (90_000.0, "25 Wh"),
     (1_512_000.0, "0.42 kWh"), (3.6e9, "1 MWh"), (7.2e9, "2 MWh")],
)  # fmt: skip
def test_energy(joules, text):
    assert lw.energy_text(joules) == text


@pytest.mark.parametrize(
    ("grams", "text"),
    [(None, "unknown"), (0.0, "0 g CO2e"), (0.25, "0.25 g CO2e"), (31.4, "31.4 g CO2e"), (999.9, "1 kg CO2e"),
     (1234.0, "1.23 kg CO2e"), (2e6, "2 t CO2e")],
)  # fmt: skip
def test_carbon(grams, text):
    assert lw.carbon_text(grams) == text


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [(None, "USD", "unknown"), (0.0, "USD", "$0"), (0.12, "USD", "$0.12"), (0.1, "EUR", "€0.10"),
     (2.0, "CHF", "CHF 2.00"),
     (0.0031, "USD", "$0.0031"), (0.999, "USD", "$1.00"), (1234.5, "GBP", "£1,234.50"), (math.inf, "USD", "unknown")],
)  # fmt: skip
def test_money(amount, currency, text):
    assert lw.money_text(amount, currency) == text


@given(st.floats(1e-6, 1e12), st.floats(1.1, 10))
def test_the_shown_amount_is_the_amount(value, factor):
    """Read back, it differs by less than one part in twenty; a larger amount never reads smaller."""
    shown = float(lw.money_text(value, "USD").lstrip("$").replace(",", ""))
    assert shown == pytest.approx(value, rel=0.06)
    assert float(lw.money_text(value * factor, "USD").lstrip("$").replace(",", "")) >= shown


def test_a_row_says_value_range_basis_and_method():
    entry = Entry(estimated(1_512_000.0, "J", 1_080_000.0, 3_024_000.0), "energy is estimated from CPU time")
    assert lw.entry_text("energy", entry) == "0.42 kWh, 0.3 kWh to 0.84 kWh (estimated: from CPU time)"
    assert dict(lw.rows(books(energy=entry)))["energy"].startswith("0.42 kWh")


def test_one_end_alone_is_told_as_such():
    entry = Entry(Quantity(40.0, "J", 10.0, None, basis="estimated"), "scaled")
    assert lw.entry_text("energy", entry) == "40 J, at least 10 J (estimated: scaled)"


def test_unknown_is_a_word_with_its_reason():
    rows = dict(lw.rows(books()))
    assert rows["cost"] == "unknown (not seen)" and "cost of tuning" not in rows and "cost to target" not in rows
    assert not any("0" in text for text in rows.values())
    assert lw.short_text(books()) == "energy unknown, carbon unknown, cost unknown"


def test_currency_of_the_books():
    cost = Entry(Quantity(2.5, "EUR"), "wall time x EUR 2.5 an hour")
    assert dict(lw.rows(books(cost=cost)))["cost"] == "€2.50 (measured: wall time x EUR 2.5 an hour)"
    assert lw.short_text(books(cost=cost)).endswith("cost €2.50 (measured)")


def test_text_from_outside_is_cleaned():
    entry = Entry(Quantity(1.0, "J"), "by \x1b[31mred\x1b[0m\nmeter")
    assert lw.entry_text("energy", entry) == "1 J (measured: by red meter)"
    assert "\x1b" not in lw.money_text(1.0, "\x1b[31mX")


def test_every_entry_of_a_ledger_has_a_label():
    assert set(lw.LABELS) == set(Ledger.__struct_fields__) - {"run", "currency", "schema"}
