"""Carbon intensity of the electricity at a place, with source and year. A yearly average of a grid, from `carbon.toml`.

Nothing here asks the network, and no place is guessed: without a region the intensity is unknown.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib.resources import files

import msgspec

from upshift.errors import UsageError


class Intensity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Grams of CO2 equivalent per kilowatt-hour. `year` 0: not said by the source."""

    grams: float
    place: str
    """For people: `France`, `us-central1 (Iowa)`."""
    source: str
    year: int = 0
    note: str = ""
    """What this figure leaves out, empty where there is nothing to add."""

    @property
    def what(self) -> str:
        """The figure with its place, year and source: `44.18 g/kWh (France, 2024: Ember, ...)`."""
        place = f"{self.place}, {self.year}" if self.year else self.place
        text = f"{self.grams:g} g/kWh ({place}: {self.source})" if place else f"{self.grams:g} g/kWh ({self.source})"
        return f"{text}; {self.note}" if self.note else text


class _Zones(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    read: str
    zones: dict[str, tuple[str, str, int, float]]


class _Own(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    read: str
    year: int
    regions: dict[str, tuple[str, float]]


class _Placed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    read: str
    regions: dict[str, tuple[str, str]]


class _Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ember: _Zones
    google: _Own
    aws: _Placed
    azure: _Placed


_COUNTRY = "the average of the country; the grid at that place may differ much"

#: What people write for a zone whose key is another.
_ALSO = {"uk": "GB", "world average": "WORLD", "european union": "EU", "great britain": "GB", "el": "GR"}


@cache
def _all() -> tuple[dict[str, Intensity], dict[str, str]]:
    """Every intensity by the key people are shown, and that key by everything they may write, in lower case."""
    text = files("upshift.hardware").joinpath("carbon.toml").read_text(encoding="utf-8")
    found = msgspec.convert(tomllib.loads(text), _Tables)
    zones = {
        key: Intensity(grams, name, found.ember.source, year)
        for key, (_, name, year, grams) in found.ember.zones.items()
    }
    clouds = {
        key: Intensity(grams, f"{key} ({place})", found.google.source, found.google.year)
        for key, (place, grams) in found.google.regions.items()
    }
    for table in (found.aws, found.azure):
        for key, (country, place) in table.regions.items():
            zone = zones[country]
            clouds[key] = Intensity(zone.grams, f"{zone.place}, for {key} ({place})", zone.source, zone.year, _COUNTRY)
    written = {key.lower(): key for key in (*zones, *clouds)}
    for key, (three, name, _, _) in found.ember.zones.items():
        written.setdefault(name.lower(), key)
        if three:
            written[three.lower()] = key
    return zones | clouds, written | _ALSO


def regions() -> tuple[str, ...]:
    """Every region there is a figure for: ISO 3166 codes, WORLD, EU and continents, then regions of clouds."""
    return tuple(_all()[0])


def find(region: str) -> Intensity:
    """The intensity at `region`: a country (`FR`, `FRA`, `France`), `world`, `EU`, or a cloud's region (`us-east-1`).

    Source: `Intensity.source` of what is found (Ember; Google for its own regions).

    Raises:
        UsageError: no such region; it names the nearest ones.
    """
    known, written = _all()
    # A caseless comparison that does not depend on the locale.
    word = " ".join(region.split()).lower()
    key = written.get(word)
    if key is not None:
        return known[key]
    near: list[str] = []
    for match in difflib.get_close_matches(word, written, n=6, cutoff=0.6):
        found = written[match]
        named = found if found.lower() == match else f"{found} ({known[found].place})"
        if named not in near:
            near.append(named)
    hint = f"Near it: {', '.join(near[:3])}. " if near else ""
    shown = word if len(word) <= 60 else word[:59] + "…"
    raise UsageError(
        f"there is no carbon intensity for the region {shown!r}.",
        remedy=f"{hint}Write a country by its ISO code (FR), WORLD, a cloud's region (us-east-1), "
        "or grams per kWh as a number.",
    )
