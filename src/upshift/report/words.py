"""Numbers and sentences of the reports.

Unknown is a word here, never a zero: whatever is `None`, not finite or marked `unknown` prints as "unknown".
Text that came from outside (script names, error messages) passes `clean` before it is drawn anywhere.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import TypeGuard

from upshift import units
from upshift.records.plan import Setting
from upshift.records.quantity import Quantity
from upshift.records.trial import Pairing, Proof, UpdateCheck

UNKNOWN = "unknown"
NOT_APPLICABLE = "not applicable"

#: Longer texts are cut: no name or message needs more, and a page must stay readable.
MAX_TEXT = 20_000

_ANSI = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]P^_X]|[\x9d\x90\x9e\x9f\x98])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS, PM, APC, SOS
    r"|\x1b[ -/]*[0-~]"
)
_SPACES = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_JOINERS = "\u200c\u200d"

RUNG_WORDS = {
    "update": "the parameter updates agree",
    "trajectory": "the loss follows the untouched script",
    "metric": "the metric agrees",
    "bitwise": "identical bits",
}

NUMERICS_WORDS = {
    "bitwise": "the same bits",
    "rounding": "the same computation in another precision or order",
    "reseeds": "the same computation, another random stream",
    "changes_training": "another training",
}


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """One line that is safe to print: no escape sequences, control or direction-changing characters.

    Line breaks become spaces, other control characters and lone surrogates a replacement character; what is longer
    than `limit` characters ends in an ellipsis.
    """
    raw = str(text)[: 4 * max(limit, 1)]
    raw = _SPACES.sub(" ", _ANSI.sub("", raw))
    kept: list[str] = []
    for char in raw:
        if char.isascii() and char.isprintable():
            kept.append(char)
            continue
        category = unicodedata.category(char)
        if category in ("Cc", "Cs") or ord(char) & 0xFFFE == 0xFFFE:
            kept.append("\ufffd")
        elif category != "Cf" or char in _JOINERS:
            kept.append(char)
    result = "".join(kept)
    return result if len(result) <= limit else result[: max(limit - 1, 0)] + "…"


def finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a number that can be shown."""
    return value is not None and math.isfinite(value)


def three(value: float) -> float:
    """Rounded to three significant digits, so that 0.9996 s reads as 1 s and not as 1e+03 ms."""
    return float(f"{value:.3g}")


def duration(value: float | None) -> str:
    """Seconds as people read them: `12.3 ms`, `3 min 20 s`, `2.1 h`, `41 days`."""
    if not finite(value):
        return UNKNOWN
    if value < 0:
        return f"-{duration(-value)}"
    if 0 < value < 1e-7:
        return f"{value:.3g} s"
    if value < 119.5:
        return units.seconds(three(value))
    if value < 7200:
        return units.seconds(round(value))
    if value < 4 * 86400:
        return units.seconds(value)
    return f"{value / 86400:.3g} days"


def percent(value: float | None, *, signed: bool = False) -> str:
    """A fraction as percent: `12.3 %`, with the sign always there when `signed`."""
    if not finite(value):
        return UNKNOWN
    magnitude = abs(value)
    sign = "-" if value < 0 else ("+" if signed and value > 0 else "")
    if 0 < magnitude < 0.001:
        if magnitude < 1e-8:
            return f"{sign}{magnitude * 100:.0e} %"
        # One significant digit, written out: -0.000009 % reads better than -9e-06 %.
        return f"{sign}{magnitude * 100:.{-math.floor(math.log10(magnitude * 100))}f} %"
    if magnitude >= 1:
        scaled = min(magnitude * 100, 1e308)
        return f"{sign}{scaled:,.0f} %" if scaled < 1e9 else f"{sign}{scaled:.3g} %"
    return sign + units.percent(magnitude)


def ratio(value: float | None) -> str:
    """A speed-up: `1.87x`."""
    if not finite(value):
        return UNKNOWN
    if value != 0 and abs(value) < 0.1:
        return f"{value:.2g}x"
    return units.ratio(value) if abs(value) < 1000 else f"{value:.3g}x"


def number(value: float | None) -> str:
    """A plain number: whole ones with thousands separators, others with three significant digits."""
    if not finite(value):
        return UNKNOWN
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


_TIME = {"s", "sec", "second", "seconds", "s/step"}
_SHARE = {"fraction", "share", "1"}
_RATIO = {"x", "ratio", "times"}
_BYTES = {"B", "byte", "bytes"}
_SI = {"FLOP": "FLOP", "FLOPs": "FLOP", "flop": "FLOP", "FLOP/s": "FLOP/s", "B/s": "B/s", "bytes/s": "B/s", "J": "J"}


def value_text(value: float | None, unit: str) -> str:
    """A value in the form its unit asks for."""
    if not finite(value):
        return UNKNOWN
    if unit in _TIME:
        return duration(value)
    if unit in _SHARE:
        return percent(value)
    if unit in _RATIO:
        return ratio(value)
    if unit in _BYTES:
        return units.binary(three(value))
    if unit in _SI:
        return units.si(three(value), _SI[unit]).strip()
    return f"{number(value)} {clean(unit, 40)}".strip()


def interval_text(quantity: Quantity) -> str:
    """The interval as `± 0.4` in the unit of the value, or `(11.9 ms to 13.4 ms)`; empty where there is none."""
    value, low, high = quantity.value, quantity.low, quantity.high
    if not (finite(value) and finite(low) and finite(high)) or low > high or (low == high == value):
        return ""
    spread = f"({value_text(low, quantity.unit)} to {value_text(high, quantity.unit)})"
    half = high / 2 - low / 2
    lopsided = abs((value - low) - (high - value)) > 0.5 * half
    if lopsided or half <= 0:
        return spread
    head = value_text(value, quantity.unit).partition(" ")[0].rstrip("x").replace(",", "")
    try:
        shown = float(head)
    except ValueError:
        return spread
    long = quantity.unit in _TIME and abs(value) >= 119.5
    if shown == 0 or value == 0 or long or "e" in head:
        return spread
    half_shown = half * (shown / value)
    decimals = len(head.partition(".")[2])
    text = f"{half_shown:.{decimals}f}"
    if float(text) == 0:
        text = f"{half_shown:.1g}"
    return spread if len(text) > 9 else f"± {text}"


def known(quantity: Quantity | None) -> bool:
    """Whether there is a value that may be shown as a number."""
    return quantity is not None and quantity.basis != "unknown" and finite(quantity.value)


def quantity_text(quantity: Quantity | None, *, n: bool = True, unit: str = "") -> str:
    """A quantity in one line: `12.3 ms ± 0.4 (n 120)`, `46.2 % (estimated)`, `unknown`.

    Args:
        quantity: what to say; None reads as unknown.
        n: whether the number of observations is added.
        unit: read the value in this unit whatever the record names it (`fraction` for shares, `x` for ratios).
    """
    if quantity is None or not known(quantity):
        return UNKNOWN
    if unit:
        quantity = Quantity(
            quantity.value, unit, quantity.low, quantity.high, quantity.n, quantity.basis, quantity.level
        )
    parts = [value_text(quantity.value, quantity.unit), interval_text(quantity)]
    if n and quantity.n > 0:
        parts.append(f"(n {quantity.n:,})")
    if quantity.basis == "estimated":
        parts.append("(estimated)")
    return " ".join(part for part in parts if part)


def basis_text(quantity: Quantity | None) -> str:
    """`measured`, `estimated` or `unknown`."""
    return quantity.basis if quantity is not None and known(quantity) else UNKNOWN


def applies(quantity: Quantity | None, note: str) -> bool:
    """Whether an absent value is unknown, and not one that its note calls not applicable."""
    return known(quantity) or not note.lower().startswith(NOT_APPLICABLE)


def noted_text(quantity: Quantity | None, note: str, *, n: bool = True, unit: str = "") -> str:
    """A quantity that has a note: `not applicable` where the note says so, else as `quantity_text`."""
    return quantity_text(quantity, n=n, unit=unit) if applies(quantity, note) else NOT_APPLICABLE


def settings_text(settings: dict[str, Setting]) -> str:
    """`workers=2, prefetch=4`; empty for defaults."""
    return ", ".join(f"{clean(key, 60)}={_setting(value)}" for key, value in settings.items())


def _setting(value: Setting) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return clean(f"{value:g}" if isinstance(value, float) else value, 80)


def arm_text(arm: dict[str, dict[str, Setting]]) -> str:
    """An arm in words: `loader (workers=2) + fused`, or `stock` for the untouched script."""
    if not arm:
        return "stock"
    named = ((clean(name, 80), settings_text(settings)) for name, settings in arm.items())
    return " + ".join(f"{name} ({settings})" if settings else name for name, settings in named)


def names_text(arm: dict[str, dict[str, Setting]]) -> str:
    """The techniques of an arm without their settings."""
    return " + ".join(clean(name, 80) for name in arm) or "stock"


def lines(text: str, most: int = 200) -> list[str]:
    """The lines of a longer text, each clean; blank ones are left out."""
    return [clean(line) for line in text.splitlines()[:most] if line.strip()]


def command_text(script: str, arguments: tuple[str, ...] = ()) -> str:
    """The script and its arguments as typed."""
    quoted = (f"'{argument}'" if (not argument or " " in argument) else argument for argument in arguments)
    return clean(" ".join((script, *quoted)), 400)


def place_text(file: str, line: int) -> str:
    """A line of a script, long paths cut to their last two parts: `…/demo/train.py:88`."""
    parts = clean(file, 4000).split("/")
    shown = "…/" + "/".join(parts[-2:]) if file.startswith("/") and len(parts) > 3 else "/".join(parts)
    return f"{clean(shown, 200)}:{line}"


def when_text(stamp: str) -> str:
    """An ISO 8601 time as people read it: `2026-11-21 12:01 UTC`; anything else as it is."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(Z|\+00:00)", stamp)
    return f"{match[1]} {match[2]} UTC" if match else clean(stamp, 60)


def bounds_text(pairing: Pairing) -> str:
    """`99 % bounds 1.39x to 1.47x, 52 quads`: each bound is one-sided."""
    quads = f", {pairing.quads:,} quad{'' if pairing.quads == 1 else 's'}" if pairing.quads > 0 else ""
    return f"{percent(pairing.level)} bounds {ratio(pairing.low)} to {ratio(pairing.high)}{quads}"


def smallest_text(pairing: Pairing | None) -> str:
    """The smallest gain the pairing could have told from noise: `1.2 %`."""
    return percent(pairing.smallest) if pairing is not None else UNKNOWN


def direction(pairing: Pairing | None) -> str:
    """`faster` or `slower` where the bounds exclude 1, `no change` where they do not, `unknown` without figures."""
    if pairing is None or not (finite(pairing.ratio) and finite(pairing.low) and finite(pairing.high)):
        return UNKNOWN
    if 1 < pairing.low <= pairing.ratio:
        return "faster"
    if pairing.ratio <= pairing.high < 1:
        return "slower"
    return "no change"


def speedup_text(pairing: Pairing | None) -> str:
    """What a pairing says of speed, with its bounds; a ratio whose bounds contain 1 is no change.

    `1.43x faster (99 % bounds 1.39x to 1.47x, 52 quads)`.
    """
    way = direction(pairing)
    if pairing is None or way == UNKNOWN:
        return "speed-up unknown"
    if way == "no change":
        text = f"no change told from noise: {ratio(pairing.ratio)} ({bounds_text(pairing)})"
        return f"{text}, smallest gain it could tell {smallest_text(pairing)}" if finite(pairing.smallest) else text
    if way == "slower":
        return f"slower: {ratio(pairing.ratio)} ({bounds_text(pairing)})"
    return f"{ratio(pairing.ratio)} {way} ({bounds_text(pairing)})"


def lag_text(proof: Proof) -> str:
    """The lag with its upper bound: `lag +0.12 %, at most +0.53 %`."""
    if not finite(proof.lag) and not finite(proof.lag_high):
        return "lag unknown"
    text = f"lag {percent(proof.lag, signed=True)}"
    return f"{text}, at most {percent(proof.lag_high, signed=True)}" if finite(proof.lag_high) else text


def rung_name(proof: Proof | None) -> str:
    """The rung reached in a word; a proof that did not pass shows nothing, whatever rung it stopped at."""
    if proof is None:
        return "not checked"
    return proof.rung if proof.passed and proof.rung != "none" else "not shown"


def rung_text(proof: Proof | None) -> str:
    """The rung reached and what it means: `trajectory: the loss follows the untouched script`."""
    name = rung_name(proof)
    return f"{name}: {RUNG_WORDS[name]}" if name in RUNG_WORDS else name


def proof_text(proof: Proof | None) -> str:
    """What was shown about the result, in one sentence with the fineness of the evidence."""
    if proof is None:
        return "the result was not checked"
    shown = rung_name(proof) != "not shown"
    parts = [rung_text(proof) if shown else f"not shown ({clean(proof.reason, 400) or 'no reason recorded'})"]
    if proof.bitwise is True:
        parts.append(f"bits identical over {proof.steps:,} steps" if proof.steps > 0 else "bits identical")
    elif proof.bitwise is False:
        parts.append("bits differ")
    if finite(proof.lag) or finite(proof.lag_high):
        parts.append(f"{lag_text(proof)} over {proof.steps:,} steps" if proof.steps > 0 else lag_text(proof))
    if finite(proof.smallest_lag):
        parts.append(f"smallest lag it could have shown {percent(proof.smallest_lag)}")
    if proof.updates:
        passed = sum(check.passed for check in proof.updates)
        parts.append(f"updates alike in {passed} of {len(proof.updates)} steps checked")
    if proof.weaker:
        parts.append(f"weaker than usual: {clean(proof.weaker, 300)}")
    return "; ".join(parts)


def update_text(check: UpdateCheck) -> str:
    """Rung 1 at one step: `step 10: cosine 0.99987, norm ratio 1.0002, relative error 0.3 % (noise 41 %)`."""
    cosine = f"{check.cosine:.6g}" if finite(check.cosine) else UNKNOWN
    norm = f"{check.norm_ratio:.6g}" if finite(check.norm_ratio) else UNKNOWN
    return (
        f"step {check.step:,}: cosine {cosine}, norm ratio {norm}, relative error {percent(check.relative_error)}"
        f" (mini-batch noise {percent(check.noise)})"
    )
