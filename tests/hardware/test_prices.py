"""Offers: the shipped table, a person's own, and SkyPilot's files as they were recorded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upshift.errors import UsageError
from upshift.hardware import catalog, prices, skypilot
from upshift.hardware.prices import Offer

# Lines of SkyPilot's catalogue, version 9, some changed or shortened to show one thing each.
AWS = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone
a1.2xlarge,,,8.0,16.0,,0.204,0.204000,us-east-1,use1-az2
g5.xlarge,A10G,1.0,4.0,16.0,"{'Gpus': [{'Name': 'A10G', 'Count': 1.0}]}",1.006,0.45,us-east-1,use1-az1
g5.xlarge,A10G,1.0,4.0,16.0,"{'Gpus': [{'Name': 'A10G', 'Count': 1.0}]}",1.006,0.41,us-east-1,use1-az2
g5.xlarge,A10G,1.0,4.0,16.0,"{'Gpus': [{'Name': 'A10G', 'Count': 1.0}]}",0.5,0.1,eu-west-1,euw1-az1
g6f.large,L4,0.125,2.0,8.0,,0.202,,us-east-1,use1-az1
p4d.24xlarge,A100,8.0,96.0,1152.0,,21.96,,us-east-1,use1-az1
zz.large,NEWCARD,1.0,2.0,8.0,,0.2,,us-east-1,use1-az1
"""
GCP = """InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
a2-highgpu-1g,12.0,85.0,,,,us-central1,us-central1-a,0.73948,0.38812
n1-standard-4,4.0,15.0,,,,us-central1,us-central1-a,0.19,0.06382
,,,A100,1.0,A100,us-central1,us-central1-a,2.9,1.1
,,,A100,1.0,A100,us-central1,us-central1-z,2.9,1.1
,,,T4,1.0,T4,us-central1,us-central1-a,0.35,
,,,tpu-v6e-8,1,tpu-v6e-8,us-central1,us-central1-a,21.6,4.74132
,,,tpu-v6e-4,1,tpu-v6e-4,us-central1,us-central1-b,700.0,700.0
,,,tpu-v4-8,1,tpu-v4-8,us-central1,us-central1-b,12.88,3.864
"""
LAMBDA = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
gpu_1x_h100_pcie,H100,1.0,26.0,200.0,3.29,us-east-1,,
gpu_1x_h100_sxm5,H100,1.0,26.0,225.0,4.29,europe-central-1,,
gpu_1x_h100_sxm5,H100,1.0,26.0,225.0,4.19,us-west-1,,
"""
VAST = "AcceleratorName,AcceleratorCount,InstanceType,Price,SpotPrice\nRTX4090,1,1x-RTX_4090,0.40,0.00\n"


def sky(folder: Path, **texts: str) -> Path:
    for provider, text in texts.items():
        path = folder / "v9" / provider / "vms.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def own(folder: Path, text: str) -> Path:
    path = folder / ".upshift" / "hardware.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_every_shipped_offer_has_source_date_region_and_a_plausible_price() -> None:
    found = prices.offers()
    assert {"aws", "gcp", "azure", "lambda"} <= {offer.provider for offer in found}
    for offer in found:
        assert " " in offer.source and re.fullmatch(r"(read )?20\d\d-\d\d-\d\d", offer.date), offer
        assert offer.region and offer.hour is not None and offer.currency == "USD"
        assert offer.spot is None or 0.05 * offer.hour < offer.spot < offer.hour
        assert (offer.device in catalog.devices() and offer.count >= 1) or (not offer.device and offer.count == 0)
        assert offer.per_device is None or 0.05 <= offer.per_device <= 20
    assert len({(offer.provider, offer.instance) for offer in found}) == len(found)


def test_offers_of_a_device_come_cheapest_first() -> None:
    each = [offer.per_device for offer in prices.for_device("H100", prices.offers())]
    assert len(each) > 3 and None not in each and each == sorted(each)
    assert prices.for_device("no such thing", prices.offers()) == ()


def test_skypilots_files_are_read_as_they_are(tmp_path: Path) -> None:
    folder = sky(tmp_path, aws=AWS, gcp=GCP, vast=VAST, **{"lambda": LAMBDA})
    (tmp_path / "v10x").mkdir()
    (tmp_path / "v3" / "aws").mkdir(parents=True)
    (tmp_path / "v3" / "aws" / "vms.csv").write_text(AWS.replace("1.006", "9.9"))
    found = {(offer.provider, offer.instance): offer for offer in skypilot.from_skypilot(folder)}

    g5 = found["aws", "g5.xlarge"]
    assert (g5.device, g5.count, g5.hour, g5.spot, g5.region) == ("A10G", 1, 1.006, 0.41, "us-east-1")
    assert g5.memory == 16 * 2**30 and g5.vcpus == 4 and "v9/aws" in g5.source
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", g5.date)
    assert found["aws", "p4d.24xlarge"].device == "A100-40GB" and found["aws", "p4d.24xlarge"].spot is None
    assert found["aws", "a1.2xlarge"].device == "" and found["aws", "a1.2xlarge"].count == 0
    assert found["aws", "a1.2xlarge"].spot is None, "a spot price as high as the other is none"
    assert ("aws", "g6f.large") not in found, "an eighth of a device is no cheap device"
    assert ("aws", "zz.large") not in found

    google = found["gcp", "a2-highgpu-1g"]
    assert google.device == "A100-40GB" and google.hour == pytest.approx(3.63948)
    assert google.spot == pytest.approx(1.48812) and google.vcpus == 12
    assert found["gcp", "n1-standard-4 + 1 T4"].hour == pytest.approx(0.54)
    assert found["gcp", "n1-standard-4 + 1 T4"].spot is None
    assert (found["gcp", "tpu-v6e-8"].device, found["gcp", "tpu-v6e-8"].count) == ("TPU-v6e", 8)
    assert (found["gcp", "tpu-v4-8"].device, found["gcp", "tpu-v4-8"].count) == ("TPU-v4", 4)
    assert ("gcp", "tpu-v6e-4") not in found, "700 stands for no price"

    assert found["lambda", "gpu_1x_h100_pcie"].device == "H100-PCIe"
    sxm = found["lambda", "gpu_1x_h100_sxm5"]
    assert (sxm.device, sxm.hour, sxm.region) == ("H100", 4.19, "us-west-1"), "the cheapest region"
    vast = found["vast", "1x-RTX_4090"]
    assert (vast.device, vast.spot, vast.memory, vast.vcpus, vast.region) == ("RTX-4090", None, None, None, "")


def test_another_region_may_be_asked_for(tmp_path: Path) -> None:
    (offer,) = [
        offer
        for offer in skypilot.from_skypilot(sky(tmp_path, aws=AWS), regions={"aws": "eu-west-1"})
        if offer.instance == "g5.xlarge"
    ]
    assert offer.hour == 0.5


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "Price\n1\n", "\x00\x01", "AcceleratorName,Price\n" + '"' + "x" * 200_000]
)
def test_a_file_of_another_form_is_said_and_left_out(tmp_path: Path, text: str) -> None:
    told: list[str] = []
    found = skypilot.from_skypilot(sky(tmp_path, aws=text, **{"lambda": LAMBDA}), say=told.append)
    assert {offer.provider for offer in found} == {"lambda"}
    assert len(told) == 1 and "aws/vms.csv was not read" in told[0]


def test_without_skypilot_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "v9").write_text("no folder")
    assert skypilot.from_skypilot(tmp_path) == skypilot.from_skypilot(tmp_path / "gone") == ()


@given(st.text(alphabet="v100,.\n\"'tpu-68AH \t-infa", max_size=200))
def test_no_content_of_a_row_is_a_crash_or_a_price_below_zero(text: str) -> None:
    header = "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region,AvailabilityZone"
    rows = [dict(zip(header.split(","), line.split(","), strict=False)) for line in text.split("\n")]
    full = [{**dict.fromkeys(header.split(","), ""), "vCPUs": "", "MemoryGiB": "", **row} for row in rows]
    for provider in ("gcp", "aws"):
        for offer in skypilot._sky_offers(provider, full, catalog.Source("x")):
            assert offer.hour is not None and offer.hour > 0 and (offer.count > 0) == bool(offer.device)


def test_own_offers_go_before_skypilots_and_those_before_the_table(tmp_path: Path) -> None:
    own(
        tmp_path,
        """
        [devices.Mine]
        memory = 48e9
        [[offers]]
        provider = "aws"
        instance = "g5.xlarge"
        device = "a10g"
        hour = 0.9
        [[offers]]
        provider = "cellar"
        instance = "node"
        device = "Mine"
        count = 4
        hour = 2
        currency = "EUR"
        """,
    )
    found = prices.known(tmp_path, {}, sky=sky(tmp_path / "sky", aws=AWS))
    chosen = {(offer.provider, offer.instance): offer for offer in found}
    assert len(chosen) == len(found)
    assert chosen["aws", "g5.xlarge"].hour == 0.9 and chosen["aws", "g5.xlarge"].device == "A10G"
    assert chosen["aws", "g5.xlarge"].source == "as given in .upshift/hardware.toml"
    assert chosen["aws", "p4d.24xlarge"].source.startswith("SkyPilot's")
    assert chosen["aws", "p5.48xlarge"].date == "2025-11-30"
    assert chosen["cellar", "node"] == Offer(
        "cellar", "node", "as given in .upshift/hardware.toml", device="Mine", count=4, hour=2.0, currency="EUR"
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'", "hour is missing in [[offers]] 1"),
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'\nhour = 0", "hour 0"),
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'\nhour = '2'", "hour is no number"),
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'\nhour = 1\nspott = 1", "unknown key 'spott'"),
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'\nhour = 1\nmemory = 64", "memory 64 B"),
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'\nhour = 1\ndevice = 'warp'", "'warp'"),
        ("[[offers]]\nprovider = 'x'\ninstance = 'y'\nhour = 1\ndevice = 'A100'", "could be 4 devices"),
        ("offers = 3", "offers is no list"),
        ("offers = [3]", "offers is no list"),
    ],
)
def test_a_wrong_offer_is_named(tmp_path: Path, lines: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        prices.offers([own(tmp_path, lines)])
    assert said in caught.value.message and ".upshift/hardware.toml" in caught.value.message
    assert caught.value.remedy


def test_neither_torch_nor_a_socket_is_needed() -> None:
    code = (
        "import socket, sys; socket.socket = None; from upshift.hardware import prices; from upshift.report import "
        "device_words; assert prices.known(); assert not {'torch', 'numpy', 'sky'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
