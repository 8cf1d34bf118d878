"""The books of a run in words: rows for the terminal and the page, each with how its figure is known.

Energy is told in Wh and kWh, carbon in g, kg and t of CO2 equivalent, money in its currency.
"""

from __future__ import annotations

import re

from upshift import units
from upshift.records.ledger import Entry, Ledger
from upshift.records.quantity import Quantity
from upshift.report import words

_JOULES_PER_WH = 3600.0
_SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£"}

#: How a meter begins its sentence: what follows is shown behind the basis, which would be said twice.
_AGAIN = re.compile(r"^(?:(?:on this machine )?energy is )?(?:measured|estimated)(?:: | (?=from |by ))")

#: Fields of `Ledger` with their labels, in the order they are shown.
LABELS = {
    "seconds": "time",
    "device_hours": "device hours",
    "cpu_hours": "CPU hours",
    "energy": "energy",
    "carbon": "carbon",
    "cost": "cost",
    "cost_per_epoch": "cost per epoch",
    "cost_to_target": "cost to target",
    "tuning": "cost of tuning",
    "lost": "work lost",
    "memory": "peak memory",
    "gpu_memory": "peak GPU memory",
    "cpu_utilisation": "CPU utilisation",
    "gpu_utilisation": "GPU utilisation",
}

#: What a short summary names.
SHORT = ("energy", "carbon", "cost")


def energy_text(joules: float | None) -> str:
    """`0.42 kWh`, `31.4 Wh`; below 1 Wh in joules."""
    if not words.finite(joules):
        return words.UNKNOWN
    hours = words.three(joules / _JOULES_PER_WH)
    for factor, unit, least in ((1e6, "MWh", 1e6), (1e3, "kWh", 1e2), (1.0, "Wh", 1.0)):
        if abs(hours) >= least:
            return f"{words.number(words.three(hours / factor))} {unit}"
    return units.si(words.three(joules), "J")


def carbon_text(grams: float | None) -> str:
    """`31 g CO2e`, `1.2 kg CO2e`, `3.4 t CO2e`."""
    if not words.finite(grams):
        return words.UNKNOWN
    grams = words.three(grams)
    for factor, unit in ((1e6, "t"), (1e3, "kg"), (1.0, "g")):
        if abs(grams) >= factor:
            return f"{words.number(words.three(grams / factor))} {unit} CO2e"
    return f"{words.three(grams):g} g CO2e"


def money_text(amount: float | None, currency: str = "USD") -> str:
    """`$0.12`, `€1,234.50`, `CHF 0.0031`: cents from 1 on, two significant digits below."""
    if not words.finite(amount):
        return words.UNKNOWN
    sign, size = "-" if amount < 0 else "", abs(amount)
    if size >= 1e9:
        text = f"{size:.3g}"
    elif size >= 0.995 or size == 0:
        text = f"{size:,.2f}" if size else "0"
    else:
        # Written out: 0.0031 reads better than 3.1e-03.
        text = f"{size:.2g}" if size < 1e-4 else f"{float(f'{size:.2g}'):.6f}".rstrip("0")
        text = text.ljust(4, "0") if "e" not in text else text
    name = words.clean(currency, 10)
    return f"{sign}{_SYMBOLS[name]}{text}" if name in _SYMBOLS else f"{sign}{name} {text}".strip()


def amount_text(field: str, quantity: Quantity | None, currency: str = "USD") -> str:
    """The value of a field of `Ledger` without its interval; `unknown` where it is not known."""
    if quantity is None or not words.known(quantity):
        return words.UNKNOWN
    return _said(field, quantity.value, currency)


def _said(field: str, value: float | None, currency: str) -> str:
    if field == "energy":
        return energy_text(value)
    if field == "carbon":
        return carbon_text(value)
    if field in ("cost", "cost_per_epoch", "cost_to_target", "tuning"):
        return money_text(value, currency)
    if field in ("device_hours", "cpu_hours"):
        return words.duration(value * 3600.0) if words.finite(value) and value < 0.1 else f"{words.number(value)} h"
    if field in ("seconds", "lost"):
        return words.duration(value)
    unit = "1" if field.endswith("utilisation") else "B"
    return words.value_text(value, unit)


def interval_text(field: str, quantity: Quantity | None, currency: str = "USD") -> str:
    """`0.18 kWh to 0.84 kWh`; empty where there is none. One end alone: `at least 0.18 kWh`."""
    if quantity is None or not words.known(quantity):
        return ""
    low, high = quantity.low, quantity.high
    if words.finite(low) and words.finite(high) and low < high:
        return f"{_said(field, low, currency)} to {_said(field, high, currency)}"
    if words.finite(low) and not words.finite(high):
        return f"at least {_said(field, low, currency)}"
    return ""


def entry_text(field: str, entry: Entry | None, currency: str = "USD") -> str:
    """A figure with its interval, its basis and how it is known.

    `420 Wh, 180 Wh to 840 Wh (estimated: CPU time and wall time ...)`, `unknown (no price is given)`.
    """
    if entry is None:
        return words.NOT_APPLICABLE
    figure, how = parts(field, entry, currency)
    return f"{figure} ({how})" if how else figure


def parts(field: str, entry: Entry, currency: str = "USD", most: int = 1000) -> tuple[str, str]:
    """A figure with its interval, and its basis and how it is known in at most `most` characters or so."""
    how = words.clean(_AGAIN.sub("", words.clean(entry.how, 1000), count=1), most)
    if not words.known(entry.value):
        return words.UNKNOWN, how
    found = [amount_text(field, entry.value, currency), interval_text(field, entry.value, currency)]
    basis = words.basis_text(entry.value)
    return ", ".join(part for part in found if part), f"{basis}: {how}" if how else basis


def entries(ledger: Ledger) -> tuple[tuple[str, Entry], ...]:
    """The entries of a ledger by field, in the order they are shown; those that do not apply are left out."""
    found = ((field, getattr(ledger, field)) for field in LABELS)
    return tuple((field, entry) for field, entry in found if entry is not None)


def rows(ledger: Ledger) -> tuple[tuple[str, str], ...]:
    """(label, text) of every entry, unknown ones with the reason."""
    return tuple((LABELS[field], entry_text(field, entry, ledger.currency)) for field, entry in entries(ledger))


def short_text(ledger: Ledger) -> str:
    """Energy, carbon and cost in a line: `energy 420 Wh (estimated), carbon unknown, cost $0.12 (measured)`."""
    parts = []
    for field in SHORT:
        quantity = getattr(ledger, field).value
        basis = f" ({words.basis_text(quantity)})" if words.known(quantity) else ""
        parts.append(f"{LABELS[field]} {amount_text(field, quantity, ledger.currency)}{basis}")
    return ", ".join(parts)
