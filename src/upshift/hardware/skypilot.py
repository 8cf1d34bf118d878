"""SkyPilot's catalogue of machines and prices, where it lies on this machine.

SkyPilot (docs.skypilot.co) keeps it as CSV files under `~/.sky/catalogs/vN/PROVIDER/vms.csv` once it has been used.
They are read as they lie there: nothing of it is imported, nothing is fetched.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from upshift.hardware.catalog import devices, plain
from upshift.hardware.offer import LIMITS, Offer
from upshift.hardware.own import Source

#: Where an offer of a provider is taken from, unless another region is asked for; elsewhere the cheapest region.
REGIONS = {"aws": "us-east-1", "gcp": "us-central1", "azure": "eastus"}

#: Larger than any of SkyPilot's files.
MAX_BYTES = 64 << 20

#: SkyPilot's names that fit several devices, or none by its letters.
_SKY = {"a100": "A100-40GB", "v100": "V100-16GB", "trainium": "Trainium1", "tpuv5lite": "TPU-v5e"}

#: Cores in the numbers of TPU types such as `v4-8`: two a chip, but for these generations, which count chips.
_ONE_CORE = ("v5litepod", "v5lite", "v5e", "v6e")

#: Google lists a GPU and the machine that holds it apart: (GPU, number) -> machine.
_GOOGLE = {
    **{("A100", n): f"a2-highgpu-{n}g" for n in (1, 2, 4, 8)},
    **{("A100-80GB", n): f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
    **{("H100", n): f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
    **{("L4", n): f"g2-standard-{vcpus}" for n, vcpus in ((1, 4), (2, 24), (4, 48), (8, 96))},
    **{("T4", n): f"n1-standard-{vcpus}" for n, vcpus in ((1, 4), (2, 8), (4, 16))},
    **{("V100", n): f"n1-standard-{vcpus}" for n, vcpus in ((1, 8), (2, 16), (4, 32), (8, 64))},
}
#: Machines that cannot be had without their GPUs.
_GPU_HOSTS = ("a2-", "a3-", "a4-", "g2-", "g4-")

#: A price SkyPilot's TPU rows hold where there is none.
_PLACEHOLDER = 700.0


def from_skypilot(
    folder: Path | None = None,
    *,
    regions: Mapping[str, str] = REGIONS,
    say: Callable[[str], None] | None = None,
) -> tuple[Offer, ...]:
    """Offers of catalogued devices in SkyPilot's catalogue on this machine; empty where it is not there.

    Args:
        folder: that of the catalogues; None: `~/.sky/catalogs`. The newest version in it is read.
        regions: provider -> region; for any other provider each machine's cheapest region is taken.
        say: told which file could not be read, and why.
    """
    base = _newest(Path(os.path.expanduser("~/.sky/catalogs")) if folder is None else folder)
    found: list[Offer] = []
    for path in sorted(base.glob("*/vms.csv")) if base is not None else ():
        try:
            rows = [row for row in _rows(path) if (row["Region"] == regions.get(path.parent.name, row["Region"]))]
            day = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
        except (OSError, ValueError, OverflowError, csv.Error) as error:
            if say is not None:
                say(f"SkyPilot's {path.parent.name}/vms.csv was not read: {error}")
            continue
        where = Source(f"SkyPilot's catalogue on this machine, {path.parent.parent.name}/{path.parent.name}", day)
        found += _cheapest(_sky_offers(path.parent.name, rows, where))
    return tuple(found)


def _newest(folder: Path) -> Path | None:
    """The folder of the highest version, `v8` of `v5` and `v8`."""
    try:
        versions = [path for path in folder.iterdir() if re.fullmatch(r"v\d{1,6}", path.name) and path.is_dir()]
    except OSError:
        return None
    return max(versions, key=lambda path: int(path.name[1:]), default=None)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a file, with an empty text for every column it lacks."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError("it is larger than any such file")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file, restval="")
        if not {"Price", "AcceleratorName"} <= set(reader.fieldnames or ()):
            raise ValueError("it has no column Price or AcceleratorName")
        columns = ("InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB", "Price", "SpotPrice",
                   "Region", "AvailabilityZone")  # fmt: skip
        for row in reader:
            yield {name: (row.get(name) or "").strip() for name in columns}


def _sky_offers(provider: str, rows: Sequence[dict[str, str]], where: Source) -> Iterator[Offer]:
    hosts = {(row["InstanceType"], row["AvailabilityZone"]): row for row in rows if not row["AcceleratorName"]}
    for row in rows:
        instance, kind, price, spot = row["InstanceType"], row["AcceleratorName"], row["Price"], row["SpotPrice"]
        device, count = _named(kind, _figure(row["AcceleratorCount"]), instance)
        hour, cheap, host = _money(price), _money(spot), row
        if provider == "gcp" and kind.startswith("tpu"):
            instance = instance or kind
            hour, cheap = (None if item == _PLACEHOLDER else item for item in (hour, cheap))
        elif provider == "gcp" and kind and not instance:
            instance = _GOOGLE.get((kind, count), "")
            if (machine := hosts.get((instance, row["AvailabilityZone"]))) is None:
                continue
            hour, cheap, host = _sum(hour, _money(machine["Price"])), _sum(cheap, _money(machine["SpotPrice"])), machine
            instance = instance if not instance.startswith("n1-") else f"{instance} + {count} {kind}"
        if not instance or hour is None or (kind and not device):
            continue
        if not kind and provider == "gcp" and instance.startswith(_GPU_HOSTS):
            continue
        memory = _figure(host["MemoryGiB"])
        yield Offer(
            provider=provider,
            instance=instance,
            source=where.text,
            date=where.date,
            device=device,
            count=count if device else 0,
            vcpus=_figure(host["vCPUs"]),
            memory=memory * 2**30 if memory is not None else None,
            hour=hour,
            # Where there is no cheaper spot machine, files repeat the price on demand, or hold zero.
            spot=cheap if cheap is not None and cheap < hour else None,
            region=row["Region"],
        )


@cache
def _keys() -> dict[str, str]:
    """SkyPilot's names, without signs -> names of the catalogue."""
    found = {plain(name): key for key, device in devices().items() for name in (key, *device.aliases)}
    return {**found, **_SKY}


def _named(kind: str, count: float | None, instance: str) -> tuple[str, int]:
    """The catalogue's name of an accelerator and how many there are; an empty name where it is not catalogued."""
    if tpu := re.fullmatch(r"tpu-(v\w+)-(\d{1,6})", kind):
        number = int(tpu[2]) if tpu[1] in _ONE_CORE else int(tpu[2]) // 2
        return _keys().get(plain(f"tpu {tpu[1]}"), "") if number else "", number
    name, machine = _keys().get(plain(kind), ""), instance.lower()
    if not count or count != int(count):  # a slice of a device is another device
        return "", 0
    # Azure's NC machines hold the cards for PCIe slots, its ND machines those for boards.
    if name == "H100" and ("nvl" in machine or machine.startswith("standard_nc")):
        name = "H100-NVL"
    elif name == "H100" and "pcie" in machine:
        name = "H100-PCIe"
    elif name.startswith("A100-") and ("pcie" in machine or machine.startswith("standard_nc")):
        name = f"{name}-PCIe"
    return name, int(count)


def _cheapest(found: Iterable[Offer]) -> list[Offer]:
    """One offer of each machine: the cheapest of its zones and regions, with the cheapest spot price there."""
    best: dict[str, Offer] = {}
    for offer in found:
        last = best.get(offer.instance)
        if last is None or (offer.hour or 0, offer.spot or math.inf) < (last.hour or 0, last.spot or math.inf):
            best[offer.instance] = offer
    return list(best.values())


def _figure(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _money(cell: str) -> float | None:
    value = _figure(cell)
    return value if value is not None and value <= LIMITS["hour"][1] else None


def _sum(one: float | None, other: float | None) -> float | None:
    return one + other if one is not None and other is not None else None
