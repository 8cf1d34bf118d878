"""Prices, regions, PUE: what is read, who goes before whom, and what is refused in words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.errors import UsageError
from upshift.hardware import carbon
from upshift.hardware.rates import MOST_PRICE, MOST_PUE, parse_price, parse_pue, parse_region, rates
from upshift.hardware.watts import stated

TABLE = tomllib.loads(files("upshift.hardware").joinpath("carbon.toml").read_text(encoding="utf-8"))


# -- price ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.9/h spot", "USD 0.9 spot", "$0.9/gpu/h SPOT", "0.9 spot"])
def test_a_machine_that_may_be_taken_away_is_said_to_be_one(text):
    found = parse_price(text)
    assert (found.per_hour, found.currency, found.spot) == (0.9, "USD", True) and "spot" in found.what
    assert not parse_price("0.9/h").spot and "spot" not in parse_price("0.9/h").what


@pytest.mark.parametrize(
    ("text", "amount", "currency", "per"),
    [
        ("2.5", 2.5, "USD", "machine"),
        (" 2.5/h ", 2.5, "USD", "machine"),
        ("EUR 2.5/h", 2.5, "EUR", "machine"),
        ("2.5 eur / hour", 2.5, "EUR", "machine"),
        ("$2.5", 2.5, "USD", "machine"),
        ("€.5/gpu/h", 0.5, "EUR", "device"),
        ("£3 per hour", 3.0, "GBP", "machine"),
        ("1e3/device", 1000.0, "USD", "device"),
        ("0", 0.0, "USD", "machine"),
    ],
)
def test_prices_as_people_write_them(text, amount, currency, per):
    found = parse_price(text)
    assert (found.per_hour, found.currency, found.per, found.given) == (amount, currency, per, True)
    assert "--price" in found.what and currency in found.what


@pytest.mark.parametrize(
    "text",
    ["-1", "-0.01/h", "nan", "inf", "1e400", "1e7", "2,5", "1.234,50", "2.5/month", "2.5/day", "EUR 2 USD", "", " ",
     "$", "two", "２", "2.5/h/h", "0x10", "1;rm", "\x1b[31m2", "9" * 400],
)  # fmt: skip
def test_what_is_no_price(text):
    with pytest.raises(UsageError) as error:
        parse_price(text)
    assert "EUR 2.5/h" in error.value.remedy and len(error.value.message) < 200 and "\x1b" not in error.value.message


@given(st.decimals(0, int(MOST_PRICE), places=4, allow_nan=False), st.sampled_from(["USD", "EUR", "CHF", "JPY"]))
def test_every_plain_amount_is_read_exactly(amount, currency):
    found = parse_price(f"{currency} {amount:f}/h")
    assert found.per_hour == float(Fraction(amount)) and found.currency == currency


@given(st.text(max_size=30))
def test_any_text_is_a_price_or_refused(text):
    try:
        found = parse_price(text)
    except UsageError as error:
        assert error.remedy
    else:
        assert 0.0 <= found.per_hour <= MOST_PRICE and len(found.currency) == 3


# -- PUE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.99, -1, 0, math.nan, math.inf, 120, "12 %", "", "1,2", MOST_PUE + 0.1])
def test_what_is_no_pue(value):
    with pytest.raises(UsageError, match="PUE") as error:
        parse_pue(value)
    assert "1.2" in error.value.remedy


def test_pue():
    assert [parse_pue(value) for value in (1, "1.0", "1.58", MOST_PUE)] == [1.0, 1.0, 1.58, MOST_PUE]


# -- carbon --------------------------------------------------------------------------------------------------------


def test_the_table_names_sources_and_its_codes_are_those_of_iso_3166():
    """Against the lists of the system, where it has them."""
    zones = TABLE["ember"]["zones"]
    assert len(zones) >= 200 and all(table["source"] and table["read"] for table in TABLE.values())
    assert all(10 < grams < 1400 and 2020 <= year <= 2026 for _, _, year, grams in zones.values())
    assert len({three for three, *_ in zones.values() if three}) == sum(bool(three) for three, *_ in zones.values())
    listed = Path("/usr/share/iso-codes/json/iso_3166-1.json")
    if listed.exists():
        real = {item["alpha_3"]: item["alpha_2"] for item in json.loads(listed.read_text())["3166-1"]}
        told = {three: two for two, (three, *_) in zones.items() if three and three != "XKX"}
        assert told == {three: real[three] for three in told}


def test_every_cloud_region_lies_in_a_country_of_the_table_and_has_one_meaning():
    for name in ("aws", "azure"):
        assert {country for country, _ in TABLE[name]["regions"].values()} <= set(TABLE["ember"]["zones"])
    names = [key for table in ("google", "aws", "azure") for key in TABLE[table]["regions"]]
    assert len(names) == len(set(names)) > 100


def test_every_region_is_found_by_its_own_name():
    for region in carbon.regions():
        assert carbon.find(region) == carbon.find(region.lower()) and carbon.find(region).source


@pytest.mark.parametrize(
    ("written", "grams", "place"),
    [("FR", 44.18, "France"), ("fra", 44.18, "France"), (" France ", 44.18, "France"), ("UK", 215.79, "United Kingdom"),
     ("world", 472.94, "world average"), ("us-west1", 79.23, "us-west1 (Oregon)"), ("NO", 30.75, "Norway")],
)  # fmt: skip
def test_regions_as_people_write_them(written, grams, place):
    found = carbon.find(written)
    assert (found.grams, found.place) == (grams, place)
    assert f"{grams:g} g/kWh" in found.what and found.source in found.what and str(found.year) in found.what


def test_a_cloud_without_figures_gets_its_country_and_says_so():
    found = carbon.find("us-east-1")
    assert found.grams == carbon.find("US").grams and "average of the country" in found.what
    assert carbon.find("us-east1").grams != found.grams  # another cloud, with figures of its own


@pytest.mark.parametrize(("written", "near"), [("Frnace", "FR (France)"), ("us-est-1", "us-east-1"), ("usa1", "US")])
def test_a_region_that_is_not_there_names_its_neighbours(written, near):
    with pytest.raises(UsageError, match="region") as error:
        carbon.find(written)
    assert near in error.value.remedy


@given(st.text(max_size=40))
def test_any_text_is_a_region_or_refused(text):
    try:
        found = parse_region(text)
    except UsageError as error:
        assert error.remedy and len(error.message) < 200
    else:
        assert math.isfinite(found.grams)


def test_grams_may_be_stated():
    assert parse_region("56.5").grams == 56.5 and "as given by --region" in parse_region(56.5).what
    for bad in (-1, math.inf, "1e9", -0.1):
        with pytest.raises(UsageError, match="intensity"):
            parse_region(bad)


# -- who says it ---------------------------------------------------------------------------------------------------


def file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hardware.toml").write_text(text)
    return folder


def test_nothing_said_is_nothing_known(tmp_path):
    found = rates(folder=tmp_path, environ={})
    assert (found.price, found.intensity, found.pue, found.currency) == (None, None, None, "USD")
    assert found.watts == stated()


def test_option_before_environment_before_project_before_home(tmp_path):
    home, project = tmp_path / "home", tmp_path / "project"
    environ = {"HOME": str(home)}
    file(home / ".config" / "upshift", '[here]\nprice = 1\nregion = "FR"\npue = 1.1\ncurrency = "eur"\nwatts = "1:2"')
    found = rates(folder=project, environ=environ)
    assert (found.price.per_hour, found.currency, found.pue, found.watts.busy) == (1.0, "EUR", 1.1, 2.0)
    assert "~/.config/upshift/hardware.toml" in found.price.source and str(home) not in found.price.source
    file(project / ".upshift", '[here]\nprice = "2/gpu/h"\nintensity = 20\n[devices.mine]\nanything = true')
    found = rates(folder=project, environ=environ)
    assert (found.price.per_hour, found.price.per, found.intensity.grams, found.pue) == (2.0, "device", 20.0, 1.1)
    assert found.intensity.what == "20 g/kWh (as given by intensity in .upshift/hardware.toml)"
    environ |= {"UPSHIFT_PRICE": "3", "UPSHIFT_REGION": "DE", "UPSHIFT_PUE": "1.3"}
    found = rates(folder=project, environ=environ)
    assert (found.price.per_hour, found.intensity.place, found.pue) == (3.0, "Germany", 1.3)
    assert found.price.source == "as given by UPSHIFT_PRICE" and found.price.per == "machine"
    found = rates("4 USD", "world", 1.4, "3:4", folder=project, environ=environ)
    assert (found.price.per_hour, found.intensity.year, found.pue) == (4.0, 2024, 1.4)
    assert (found.currency, found.watts.idle, found.pue_source) == ("USD", 3.0, "as given by --pue")


def test_an_empty_variable_says_nothing(tmp_path):
    environ = {"UPSHIFT_PRICE": " ", "UPSHIFT_REGION": "", "HOME": "", "XDG_CONFIG_HOME": "relative"}
    assert rates(folder=tmp_path, environ=environ).price is None


def test_the_variable_for_configuration_is_followed(tmp_path):
    file(tmp_path / "x" / "upshift", "[here]\nprice = 7")
    assert rates(folder=tmp_path, environ={"XDG_CONFIG_HOME": str(tmp_path / "x")}).price.per_hour == 7.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("here = 3", "no table"),
        ("[here]\nprise = 3", "unknown key"),
        ("[here]\nprice = -1", "price"),
        ("[here]\nprice = nan", "price"),
        ("[here]\nprice = true", "neither"),
        ("[here]\nprice = [1]", "neither"),
        ('[here]\nprice = "2,5"', "price"),
        ('[here]\ncurrency = "euros"', "currency"),
        ("[here]\npue = 0.5", "PUE"),
        ('[here]\npue = "high"', "PUE"),
        ('[here]\nregion = "nowhere at all"', "region"),
        ('[here]\nregion = "FR"\nintensity = 5', "one of them"),
        ('[here]\nintensity = "FR"', "number"),
        ("[here]\nintensity = -5", "intensity"),
        ('[here]\nwatts = "5"', "watts"),
        ('[here]\nper = "month"', "per"),
        ("[here\n", "TOML"),
        ("[here]\nprice = 1\nprice = 2", "TOML"),
        ("x = " + "[" * 5000, "TOML"),
    ],
)
def test_a_bad_file_is_told_in_words(tmp_path, text, said):
    file(tmp_path / ".upshift", text)
    with pytest.raises(UsageError) as error:
        rates("1", "FR", 1.0, folder=tmp_path, environ={})
    assert said in str(error.value) and error.value.remedy and "Traceback" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe[here]", b"\0" * 100, b"[here]\n" + b"#" * (1 << 20)])
def test_a_file_that_is_no_text_or_too_long(tmp_path, content):
    file(tmp_path / ".upshift", "")
    (tmp_path / ".upshift" / "hardware.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.upshift/hardware\.toml"):
        rates(folder=tmp_path, environ={})


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / ".upshift" / "hardware.toml").mkdir(parents=True)
    with pytest.raises(UsageError, match="cannot be read"):
        rates(folder=tmp_path, environ={})


def test_it_reads_without_torch_or_the_network():
    code = (
        "import socket, sys; socket.socket = None\n"
        "from upshift.hardware.rates import rates\n"
        "assert rates('2.5', 'FR', environ={}).intensity.grams\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
