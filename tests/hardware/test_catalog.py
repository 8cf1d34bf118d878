"""The shipped catalogue (sources, ranges), finding by name, and a person's own file."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.errors import UsageError
from upshift.hardware import catalog, own
from upshift.report import device_words

SHIPPED = catalog.devices()
EACH = pytest.mark.parametrize("name", list(SHIPPED))

DATE = re.compile(r"(read )?20\d\d(-\d\d){0,2}")


def write(folder: Path, text: str, name: str = ".upshift") -> Path:
    path = folder / name / "hardware.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@EACH
def test_every_figure_has_a_source_and_a_date(name: str) -> None:
    device = SHIPPED[name]
    assert device.title and device.figures()
    for figure in [*device.figures(), *(["capability"] if device.capability else [])]:
        source = device.source_of(figure)
        # A key that is not in [sources] would stand here as its own text.
        assert " " in source.text and DATE.fullmatch(source.date), (figure, source)


@EACH
def test_figures_are_plausible_and_dense(name: str) -> None:
    device = SHIPPED[name]
    peaks = device.peaks()
    order = [peaks[item] for item in ("float32", "tf32", "bfloat16") if item in peaks]
    assert order == sorted(order), "a narrower type is not slower"
    if "bfloat16" in peaks:
        for narrow in ("float8", "int8"):
            # Dense: twice the rate of 16 bits at most, but for the chips that have a unit of its own for it.
            assert peaks["bfloat16"] <= peaks.get(narrow, peaks["bfloat16"]) <= 4.1 * peaks["bfloat16"]
    if "float64" in peaks and "float32" in peaks:
        assert peaks["float64"] <= 1.02 * peaks["float32"]
    if device.kind != "cpu" and device.memory and device.bandwidth:
        assert 0.01 < device.memory / device.bandwidth < 0.1, "seconds to read the memory once"
        fast = max(peaks.values())
        assert 10 < fast / device.bandwidth < 1200, "operations for each byte"
    if device.power:
        assert 50 <= device.power <= 1500
    if device.capability:
        assert re.fullmatch(r"\d{1,2}\.\d", device.capability)


def test_names_and_aliases_are_unlike() -> None:
    names = [catalog.plain(item) for name, device in SHIPPED.items() for item in (name, *device.aliases)]
    assert len(names) == len(set(names)) and all(names)
    assert all(device.kind in catalog.KINDS for device in SHIPPED.values())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD EPYC 9654 96-Core Processor", "EPYC-9654"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Xeon-8480+"),
    ],
)
def test_devices_are_found_by_the_drivers_name(name: str, key: str) -> None:
    found = catalog.find(name)
    assert found is not None and found[0] == key
    assert catalog.pick(name, SHIPPED)[0] == key


@pytest.mark.parametrize(
    "name",
    ["", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD EPYC", "Tesla T40",
     "NVIDIA H200 MIG 1g.18gb", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 3060", "AMD Instinct MI250X"],
)  # fmt: skip
def test_an_unknown_device_is_not_guessed(name: str) -> None:
    assert catalog.find(name) is None


@pytest.mark.parametrize("written", ["h100", "H 100", "H100-SXM", "nvidia h100 sxm5, 80 gb"])
def test_a_person_may_write_a_name_freely(written: str) -> None:
    assert catalog.pick(written, SHIPPED)[0] == "H100"


def test_an_ambiguous_name_lists_what_it_could_be() -> None:
    with pytest.raises(UsageError, match="'A100' could be 4 devices: A100-40GB, A100-80GB") as caught:
        catalog.pick("A100", SHIPPED)
    assert "Name one" in caught.value.remedy


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="no device") as caught:
        catalog.pick("H10O", SHIPPED)
    assert "H100" in caught.value.remedy
    with pytest.raises(UsageError) as other:
        catalog.pick("\x1b[31m" + "x" * 500, SHIPPED)
    assert len(other.value.message) < 150


@given(st.text(max_size=40))
def test_any_text_is_one_device_or_a_clear_error(written: str) -> None:
    try:
        key, device = catalog.pick(written, SHIPPED)
    except UsageError as error:
        assert error.remedy
    else:
        assert SHIPPED[key] == device


def test_own_files_override_single_figures_and_add_devices(tmp_path: Path) -> None:
    project = write(
        tmp_path,
        """
        [devices.h100]
        power = 650
        source = "our meter"
        date = "2026-03"
        [devices.Mine]
        match = ["Card 9"]
        bfloat16 = 100e12
        memory = 48e9
        """,
    )
    person = write(
        tmp_path,
        """
        [sources.shop]
        text = "the shop's bill"
        date = "2025"
        [devices.H100-SXM]
        power = 1
        price = 27000
        from = { price = "shop" }
        [devices.Yours]
        memory = 1e9
        [here]
        price = 2
        """,
        "upshift",
    )
    known = catalog.devices([project, person])
    h100, shipped = known["H100"], SHIPPED["H100"]
    assert h100.power == 650 and h100.price == 27000, "the project's file goes first, and the other one is used, too"
    assert (h100.source_of("power").text, h100.source_of("power").date) == ("our meter", "2026-03")
    assert (h100.source_of("price").text, h100.source_of("price").date) == ("the shop's bill", "2025")
    assert h100.bandwidth == shipped.bandwidth and h100.source_of("bandwidth") == shipped.source_of("bandwidth")
    assert known["Mine"].source == "as given in .upshift/hardware.toml" and known["Mine"].price is None
    assert known["Yours"].source == "as given in ~/.config/upshift/hardware.toml"
    found = catalog.find("NVIDIA Card 9", known)
    assert found is not None and found[0] == "Mine"
    assert catalog.devices() == SHIPPED, "what is shipped stays as it is"


@pytest.mark.parametrize(
    ("line", "said", "remedy"),
    [
        ("bandwidth = 3350", "bandwidth 3350 B/s is no memory bandwidth", "3.35e12"),
        ("bandwidth = 3.35", "bandwidth 3.35 B/s is no memory bandwidth", "3.35e12"),
        ("memory = 80", "memory 80 B is no size of a memory", "8e10"),
        ("memory = 81559", "memory 81559 B", "8.55208e10"),
        ("bfloat16 = 989", "bfloat16 989 FLOP/s is no peak", "9.89e14"),
        ("int8 = 1979", "int8 1979 OP/s is no peak", "1.979e15"),
        ("power = 700000", "power 700000 W", "power = 700"),
        ("power = 0", "power 0 W", "From 0.5 to 100000 W"),
        ("power = -5", "power -5 W", "possible"),
        ("power = nan", "power nan W", "possible"),
        ("memory = inf", "memory inf B", "possible"),
        ("memory = 1" + "0" * 400, "memory inf B", "possible"),
        ("memory = true", "memory is no number", "plain number"),
        ('memory = "80 GB"', "memory is no number", "plain number of B"),
        ("price = false", "price is no number", "plain number"),
        ("bandwith = 1e12", "unknown key 'bandwith'", "bandwidth"),
        ('kind = "toaster"', "kind 'toaster'", "gpu"),
        ("match = 3", "match is no list", "match ="),
        ("title = 3", "title is no text", "quotes"),
        ("from = 3", "from is no table", "from ="),
        ('from = { power = "x" }', "from names 'power'", "Remove"),
    ],
)
def test_a_wrong_figure_is_refused_with_file_key_and_what_to_write(
    tmp_path: Path, line: str, said: str, remedy: str
) -> None:
    path = write(tmp_path, f"[devices.X]\n{line}\n")
    with pytest.raises(UsageError) as caught:
        catalog.devices([path])
    assert said in caught.value.message and "[devices.X] of .upshift/hardware.toml" in caught.value.message
    assert remedy in caught.value.remedy
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["devices = 3", "[devices]\nX = 3", "[[devices]]\nx = 1", "[device.X]\nmemory = 1e9", "[sources]\nx = 1",
     "[sources.x]\ntext = 1", "[devices.'+-']\nmemory = 1e9", "memory = ", "\x00", "[here"],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=re.escape(".upshift/hardware.toml")) as caught:
        catalog.devices([path])
    assert caught.value.remedy


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ".upshift" / "hardware.toml"
    folder.mkdir(parents=True)
    (tmp_path / "large.toml").write_bytes(b"#" * (own.MAX_BYTES + 1))
    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff'")
    for path in (folder, tmp_path / "large.toml", tmp_path / "bytes.toml", tmp_path / "gone.toml"):
        with pytest.raises(UsageError, match=path.name):
            catalog.devices([path])


@given(st.sampled_from(list(catalog.FIGURES)), st.floats() | st.integers())
def test_a_number_is_kept_as_it_is_or_refused(figure: str, value: float) -> None:
    low, high, _ = catalog.LIMITS[figure]
    try:
        found = own.number(figure, value, catalog.LIMITS[figure], catalog.FIGURES[figure], "a file")
    except UsageError as error:
        assert not low <= value <= high and error.remedy
    else:
        assert low <= found <= high and math.isclose(found, value)


def test_own_files_are_looked_for_in_the_project_and_in_the_configuration(tmp_path: Path) -> None:
    home, config = tmp_path / "home", tmp_path / "config"
    assert catalog.own_files(tmp_path, {"HOME": str(home)}) == ()
    project = write(tmp_path, "")
    at_home = write(home / ".config", "", "upshift")
    configured = write(config, "", "upshift")
    assert catalog.own_files(tmp_path, {"HOME": str(home)}) == (project, at_home)
    assert catalog.own_files(tmp_path, {"HOME": str(home), "XDG_CONFIG_HOME": str(config)}) == (project, configured)
    assert catalog.own_files(tmp_path, {}) == (project,)


def test_the_documentation_shows_the_table_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    table = page.split("device_words.markdown -->", 1)[1].split("<!-- end of table -->", 1)[0]
    assert table.strip().splitlines() == device_words.markdown(SHIPPED)


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    path = write(tmp_path, page.split("```text\n", 1)[1].split("```", 1)[0])
    known = catalog.devices([path])
    assert known["H100"].power == 650 and known["H100"].currency == "EUR" and known["Workhorse"].bfloat16 == 160e12
