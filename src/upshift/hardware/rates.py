"""What turns time and energy into money and carbon: price, carbon intensity, PUE, watts of a core.

They come from options, then the environment (UPSHIFT_PRICE, UPSHIFT_REGION, UPSHIFT_PUE), then the table `[here]` of
`.upshift/hardware.toml` in this folder and of `~/.config/upshift/hardware.toml`. What nobody said is unknown: there is
no price, region or PUE by default. Nothing here asks the network.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from upshift.errors import UsageError
from upshift.hardware import carbon
from upshift.hardware.carbon import Intensity
from upshift.hardware.watts import Watts, stated
from upshift.hardware.watts import parse as parse_watts

FILE = "hardware.toml"

#: Larger than any such file of ours.
MAX_BYTES = 1 << 20

#: More than any machine costs an hour, in any currency.
MOST_PRICE = 1e6

#: Worse than any building; such a figure is a percentage or a slip.
MOST_PUE = 10.0

#: Oil shale, the dirtiest grid in the table, is near 1,300 g/kWh.
MOST_INTENSITY = 3000.0

KEYS = ("price", "per", "currency", "region", "intensity", "pue", "watts")

_SYMBOLS = {"$": "USD", "€": "EUR", "£": "GBP", "₹": "INR", "₩": "KRW"}
_PRICE = re.compile(
    r"(?P<before>[A-Za-z]{3}|[$€£₹₩])?\s*(?P<amount>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
    r"(?P<after>[A-Za-z]{3}|[$€£₹₩])?\s*(?P<device>/\s*(?:device|gpu|accelerator))?\s*"
    r"(?P<hour>/\s*(?:h|hr|hour)|(?:an|per)\s+hour)?\s*(?P<spot>spot)?",
    re.IGNORECASE | re.ASCII,
)

_PRICE_REMEDY = "Write an amount an hour: 2.5, 2.5/h, EUR 2.5/h, $2.5/gpu/h, or 0.9/h spot."


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Money an hour, for the whole machine or for each device. `given`: said by a person, not from a catalogue. `spot`:
    of a machine that may be taken away."""

    per_hour: float
    currency: str = "USD"
    per: Literal["machine", "device"] = "machine"
    source: str = ""
    given: bool = True
    spot: bool = False

    @property
    def what(self) -> str:
        """`EUR 2.5 an hour and device, as given by --price`."""
        device = " and device" if self.per == "device" else ""
        spot = ", spot" if self.spot else ""
        return f"{self.currency} {self.per_hour:g} an hour{device}{spot}{', ' + self.source if self.source else ''}"


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """None: not known. `pue`: energy of the building over energy of its machines (>= 1)."""

    price: Price | None = None
    intensity: Intensity | None = None
    pue: float | None = None
    pue_source: str = ""
    watts: Watts = msgspec.field(default_factory=stated)

    @property
    def currency(self) -> str:
        """That of the price, USD where there is none."""
        return self.price.currency if self.price is not None else "USD"


def parse_price(text: str, *, currency: str = "USD", where: str = "--price") -> Price:
    """`2.5`, `2.5/h`, `EUR 2.5/h`, `$2.5/gpu/h`, `0.9/h spot`.

    Args:
        currency: where the text names none.
        where: who said it, for messages and as the source.

    Raises:
        UsageError: not an amount an hour, negative, not finite or more than `MOST_PRICE`.
    """
    match = _PRICE.fullmatch(text.strip())
    if match is None or (match["before"] and match["after"]):
        raise UsageError(f"{where} {_short(text)} is no price.", remedy=_PRICE_REMEDY)
    amount = float(match["amount"].replace("_", ""))
    if not 0.0 <= amount <= MOST_PRICE:
        raise UsageError(f"{where} {_short(text)} is no price of a machine an hour.", remedy=_PRICE_REMEDY)
    named = match["before"] or match["after"]
    found = _SYMBOLS.get(named, named.upper()) if named else _currency(currency, where)
    per: Literal["machine", "device"] = "device" if match["device"] else "machine"
    return Price(amount, found, per, f"as given by {where}", spot=match["spot"] is not None)


def parse_pue(value: str | float, *, where: str = "--pue") -> float:
    """Power usage effectiveness: energy of the building over that of its machines (ISO/IEC 30134-2), 1 or more.

    Raises:
        UsageError: not a number from 1 to `MOST_PUE`.
    """
    found = _number(value)
    if not 1.0 <= found <= MOST_PUE:
        raise UsageError(
            f"{where} {_short(value)} is no PUE: a building takes 1 to {MOST_PUE:g} times what its machines take.",
            remedy="Write a number such as 1.2, or leave it out where it is not known.",
        )
    return found


def parse_region(value: str | float, *, where: str = "--region") -> Intensity:
    """A region of `carbon.find`, or a number: grams of CO2 equivalent per kilowatt-hour.

    Raises:
        UsageError: no such region, or a number that is no intensity.
    """
    grams = _number(value)
    if isinstance(value, str) and math.isnan(grams):
        return carbon.find(value)
    if not 0.0 <= grams <= MOST_INTENSITY:
        raise UsageError(
            f"{where} {_short(value)} is no carbon intensity.",
            remedy=f"Write grams per kWh (0 to {MOST_INTENSITY:g}), or a region such as FR.",
        )
    return Intensity(grams, "", f"as given by {where}")


def rates(
    price: str | None = None,
    region: str | None = None,
    pue: float | str | None = None,
    watts: str | None = None,
    *,
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Rates:
    """What is known here, the first of option, environment and file that says it.

    Args:
        price, region, pue, watts: as written with `--price`, `--region`, `--pue`, `--watts`; None: not given.
        folder: where `.upshift/` lies; None: the working directory.
        environ: None: that of this process.

    Raises:
        UsageError: something that cannot be read or is absurd, and who said it. Both files are looked through wholly:
            a mistake is told even where an option goes before it.
    """
    environ = os.environ if environ is None else environ
    said: dict[str, tuple[Any, str]] = {}
    options: dict[str, Any] = {"price": price, "region": region, "pue": pue, "watts": watts}
    for key, value in options.items():
        if value is not None:
            said[key] = (value, f"--{key}")
    for key in ("price", "region", "pue"):
        name = f"UPSHIFT_{key.upper()}"
        if environ.get(name, "").strip():
            said.setdefault(key, (environ[name], name))
    for path in _files(Path() if folder is None else folder, environ):
        here = _here(path)
        # What a price is for belongs to it; a currency holds for any price that names none.
        if "price" in said:
            here.pop("per", None)
        for key, value in here.items():
            # A region and an intensity answer one question.
            said.setdefault("region" if key == "intensity" else key, (value, f"{key} in {_shown(path)}"))
    return _rates(said)


def _rates(said: dict[str, tuple[Any, str]]) -> Rates:
    price, intensity, pue, pue_source, watts = None, None, None, "", stated()
    currency, per = said.get("currency", ("USD", ""))[0], said.get("per", ("", ""))[0]
    if "price" in said:
        value, where = said["price"]
        price = parse_price(str(value), currency=str(currency), where=where)
        if per == "device":
            price = msgspec.structs.replace(price, per="device")
    if "region" in said:
        value, where = said["region"]
        intensity = parse_region(value, where=where)
    if "pue" in said:
        value, where = said["pue"]
        pue, pue_source = parse_pue(value, where=where), f"as given by {where}"
    if "watts" in said:
        value, where = said["watts"]
        found = parse_watts(str(value))
        watts = msgspec.structs.replace(found, source=f"as given by {where}")
    return Rates(price, intensity, pue, pue_source, watts)


def _files(folder: Path, environ: Mapping[str, str]) -> list[Path]:
    """The project's file, then the person's."""
    places = [folder / ".upshift" / FILE]
    home = environ.get("XDG_CONFIG_HOME", "")
    if Path(home).is_absolute():
        places.append(Path(home) / "upshift" / FILE)
    elif environ.get("HOME", ""):
        places.append(Path(environ["HOME"]) / ".config" / "upshift" / FILE)
    return places


def _here(path: Path) -> dict[str, Any]:
    """The table `[here]` of a file; empty where there is no file or no such table. Other tables are not looked at."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{_shown(path)} cannot be read: {error.strerror}.", remedy="Check the file.") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError("it is larger than any such file")
        found = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{_shown(path)} is not TOML: {_short(error, quoted=False)}.", remedy="Mend it.") from None
    here = found.get("here", {})
    if not isinstance(here, dict):
        raise UsageError(f"{_shown(path)}: here is no table.", remedy="Write [here] and lines such as price = 2.5.")
    for key, value in here.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(KEYS)}."
            raise UsageError(f"{_shown(path)}: [here] has an unknown key {_short(key)}.", remedy=hint)
        _check(path, key, value)
    if "region" in here and "intensity" in here:
        raise UsageError(f"{_shown(path)}: [here] has a region and an intensity.", remedy="Keep one of them.")
    return dict(here)


def _check(path: Path, key: str, value: Any) -> None:
    where = f"{key} in {_shown(path)}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number and not isinstance(value, str):
        raise UsageError(f"{where} is neither text nor a number.", remedy="Correct that line.")
    if key == "price":
        parse_price(str(value), where=where)
    elif key == "pue":
        parse_pue(value, where=where)
    elif key == "currency":
        _currency(str(value), where)
    elif key == "per" and value not in ("machine", "device"):
        raise UsageError(f"{where} is {_short(value)}.", remedy='Write "machine" or "device".')
    elif key == "watts":
        parse_watts(str(value))
    elif key == "intensity" and not number:
        raise UsageError(f"{where} is no number.", remedy="Write grams of CO2 per kWh: intensity = 56.")
    elif key in ("region", "intensity"):
        parse_region(value, where=where)


def _currency(text: str, where: str) -> str:
    """`EUR` from `eur` or `€`."""
    found = _SYMBOLS.get(text.strip(), text.strip().upper())
    if not re.fullmatch(r"[A-Z]{3}", found):
        raise UsageError(f"{where}: {_short(text)} is no currency.", remedy="Write its three letters: USD, EUR.")
    return found


def _number(value: str | float) -> float:
    """The number; NaN where there is none."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _shown(path: Path) -> str:
    """The file as people know it, without the way to it."""
    return f".upshift/{FILE}" if path.parent.name == ".upshift" else f"~/.config/upshift/{FILE}"


def _short(value: object, *, quoted: bool = True) -> str:
    text = " ".join(str(value).split())
    text = text if len(text) <= 80 else text[:79] + "…"
    return repr(text) if quoted else text
