"""`upshift explain` of devices: pages, hints, ambiguity and a person's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from upshift.cli.main import cli
from upshift.errors import UsageError
from upshift.hardware import catalog
from upshift.report import device_words


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project of a person without files of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["explain", *arguments])


def refused(*arguments: str) -> UsageError:
    found = explain(*arguments).exception
    assert isinstance(found, UsageError)
    return found


def test_a_device_is_shown_with_unit_source_date_and_price() -> None:
    shown = explain("h100").output
    for text in ("989 TFLOP/s", "3.35 TB/s", "80 GB", "450 GB/s", "700 W", "9.0", "H100-PCIe, H100-NVL"):
        assert text in shown
    assert "purchase price" in next(line for line in shown.splitlines() if line.startswith("unknown"))
    offer = next(line for line in shown.splitlines() if "aws p5.48xlarge" in line)
    assert "USD 55.04" in offer and "USD 6.88" in offer and "us-east-1" in offer
    assert "(2025-11-30)" in shown and "not measured" in shown


def test_every_figure_of_every_device_is_shown_with_a_source() -> None:
    for name, device in catalog.devices().items():
        lines = device_words.page(name, device, ())
        sources = {line.split()[0] for line in lines[lines.index("sources") + 1 :]}
        figures = {line.split()[-1] for line in lines[: lines.index("sources")] if line.endswith("]")}
        assert figures == sources, name
        shown = [line for line in lines[: lines.index("sources")] if line.endswith("]")]
        assert len(shown) == len(device.figures()) + bool(device.capability), name


def test_the_list_names_every_device() -> None:
    shown = explain().output.split("\ndevices\n", 1)[1]
    for name in catalog.devices():
        assert f"{name}," in shown or f"{name}\n" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_what_is_ambiguous_unknown_or_nearly_right_is_said() -> None:
    assert "could be 4 devices" in refused("A100").message
    assert "H200" in refused("H20O").remedy, "devices"
    assert "threads" in refused("thread").remedy, "techniques"
    assert "data_starved" in refused("data_starvd").remedy, "findings"
    unknown = refused("warp_drive")
    assert "no technique, finding or device" in unknown.message and "Known" in unknown.remedy


def test_a_persons_own_file_is_used_and_its_mistakes_are_named(here: Path) -> None:
    path = here / ".upshift" / "hardware.toml"
    path.parent.mkdir()
    path.write_text(
        '[devices.H100]\npower = 600\n[devices.Mine]\ntitle = "evil \\u001b[31m"\nmemory = 48e9\n'
        '[[offers]]\nprovider = "cellar"\ninstance = "node"\ndevice = "Mine"\nhour = 1234\ncurrency = "EUR"\n'
    )
    assert "600 W" in explain("H100").output and "as given in .upshift/hardware.toml" in explain("H100").output
    mine = explain("mine").output
    assert "EUR 1,234" in mine and "\x1b" not in mine and "bandwidth" in mine
    assert "Mine" in explain().output
    path.write_text("[devices.H100]\nbandwidth = 3350\n")
    wrong = refused("H100")
    assert "bandwidth 3350 B/s is no memory bandwidth" in wrong.message and "3.35e12" in wrong.remedy
    assert explain("bf16").exit_code == 0, "a technique's page needs no such file"


def test_a_price_of_skypilots_is_shown_and_an_unreadable_file_is_said(here: Path) -> None:
    folder = here / "home" / ".sky" / "catalogs" / "v8"
    for provider, text in (("lambda", "InstanceType,AcceleratorName,AcceleratorCount,Price,Region\nbox,H200,1,3.5,x\n"),
                           ("aws", "no,catalogue\n")):  # fmt: skip
        (folder / provider).mkdir(parents=True)
        (folder / provider / "vms.csv").write_text(text)
    done = explain("H200")
    assert "lambda box" in done.output and "SkyPilot's catalogue on this machine, v8/lambda" in done.output
    assert "aws/vms.csv was not read" in done.stderr


def test_many_offers_are_cut() -> None:
    offer = device_words.Offer("p", "i", "s", hour=1.0, device="X", count=1)
    lines = device_words.page("X", catalog.devices()["H100"], [offer] * 40)
    assert sum(line.startswith("  p i") for line in lines) == device_words.MOST_OFFERS
    assert any("28 more" in line for line in lines)
