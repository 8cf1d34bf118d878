"""compare(): run folders, folders of repeated seeds and runs of other trackers, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from upshift.api.stored import search_behind, taken_away
from upshift.errors import RecordError, UpshiftError, UsageError
from upshift.records.comparison import Comparison
from upshift.records.run import Run
from upshift.records.runfold import fold
from upshift.records.runlog import LOG

if TYPE_CHECKING:
    from upshift.hardware.rates import Rates
    from upshift.measure.comparing import Group
    from upshift.measure.perrun import Seen

#: Written by a launch beside the records of its processes.
LAUNCH = "launch.json"
#: Runs of one folder that are read.
MOST_RUNS = 1000

_REMEDY = "Name run folders, such as .upshift/runs/20260101-101500-4242, or folders that hold several."


@dataclass
class CompareOptions:
    """What `compare` is asked for; see `upshift compare --help`. `names`: one per approach, or none."""

    metric: str | None = None
    target: float | None = None
    price: str | None = None
    region: str | None = None
    pue: float | None = None
    names: Sequence[str] = ()
    fail_if: Sequence[str] = ()
    strict: bool = False


def compare(runs: Sequence[str | Path], options: CompareOptions | None = None) -> Comparison:
    """Compare approaches: each a run folder, or a folder of run folders that differ by their seed only.

    Args:
        runs: two paths or more; the first is what the others are compared with.

    Raises:
        UsageError: fewer than two, names that do not fit, a metric, rate or limit that cannot be used.
        RecordError: a path that holds no run that can be read.
    """
    from upshift.hardware.rates import rates
    from upshift.measure import comparing, gates

    options = options or CompareOptions()
    if len(runs) < 2:
        raise UsageError("a comparison needs two runs or more.", remedy="upshift compare RUN RUN [RUN ...]")
    limits = [gates.parse(text) for text in options.fail_if]
    names = _names([str(item) for item in runs], options.names)
    known = rates(price=options.price, region=options.region, pue=options.pue)
    notes: list[str] = []
    given = [read(str(path), name, known, notes) for path, name in zip(runs, names, strict=True)]
    found = comparing.compare(
        given, created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), metric=options.metric,
        target=options.target, notes=notes,
    )  # fmt: skip
    return msgspec.structs.replace(found, gates=gates.judge(found, limits, strict=options.strict))


def _names(paths: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """A name for each approach, all different: as wanted, else the end of its path, as much of it as tells them apart.

    Raises:
        UsageError: other names than approaches, or two alike.
    """
    if wanted:
        names = [name.strip() for name in wanted]
        if len(names) != len(paths) or len(set(names)) < len(names) or not all(names):
            raise UsageError(
                f"{len(paths)} runs are compared, and the names are {', '.join(map(repr, wanted))}.",
                remedy="Give one name for each, all different: --names baseline,planned",
            )
        return names
    parts = [Path(path).absolute().parts for path in paths]
    most = max(map(len, parts))
    names = next((tails for length in range(1, most + 1)
                  if len(set(tails := ["/".join(item[-length:]) for item in parts])) == len(paths)), [])  # fmt: skip
    # The same path twice is one approach beside itself.
    return names or [f"{Path(path).name} ({at})" for at, path in enumerate(paths, 1)]


def read(path: str, name: str, known: Rates, notes: list[str]) -> Group:
    """The approach at `path`; what had to be left out is added to `notes`.

    Raises:
        RecordError: nothing there that can be read.
    """
    from upshift.measure.comparing import Group

    folder = Path(path)
    if folder.name == LOG:
        folder = folder.parent
    own = _one(folder)
    if own is not None:
        return Group(name, (_seen(own, known),))
    elsewhere = _foreign(path)
    if elsewhere is not None:
        return Group(name, (elsewhere,))
    if not folder.is_dir():
        raise RecordError(f"there is no run at {path}.", remedy=_REMEDY)
    seen = []
    try:
        below = sorted(item for item in folder.iterdir() if item.is_dir())[:MOST_RUNS]
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}.", remedy=_REMEDY) from None
    for item in below:
        try:
            place = _one(item)
            found = _seen(place, known) if place is not None else _foreign(str(item))
        except UpshiftError as error:
            notes.append(f"{name}: {item.name} is left out: {error.message}")
            continue
        if found is not None:
            seen.append(found)
    if not seen:
        why = f" ({'; '.join(notes[:3])})" if notes else ""
        raise RecordError(f"{path} holds no run that can be read{why}.", remedy=_REMEDY)
    return Group(name, tuple(seen))


def _one(folder: Path) -> Path | None:
    """The folder of the one run that lies at `folder`: itself, or the first rank of a launch; None: no run."""
    ranks = sorted((item.parent for item in folder.glob(f"*/{LOG}")), key=_rank)
    if (folder / LOG).is_file():
        # A script that left the training to other processes has a log without steps.
        return ranks[0] if ranks and not fold(folder).steps else folder
    launched = (folder / LAUNCH).is_file() or all(item.name.startswith("rank") for item in ranks)
    return ranks[0] if ranks and launched else None


def _rank(folder: Path) -> tuple[int, str]:
    digits = folder.name.removeprefix("rank")
    return (int(digits) if digits.isascii() and digits.isdecimal() else 1 << 62), folder.name


def _seen(folder: Path, known: Rates) -> Seen:
    """A run with its books and metrics.

    Raises:
        RecordError: it cannot be read, or is from another version.
    """
    from upshift.measure import ledger, series
    from upshift.measure.perrun import Seen
    from upshift.records import resources

    _check_version(folder)
    run = fold(folder)
    if run.torn_lines and not run.windows and not run.events:
        raise RecordError(
            f"{folder}: {run.torn_lines:,} lines of its log cannot be read.",
            remedy="It may come from another version of upshift, or have been damaged.",
        )
    metrics = {**series.scalars(folder), **series.events(run)}
    used = resources.read(folder)
    books = ledger.ledger(run, used, known, search_behind(run.plan), spot=taken_away(known))
    return Seen(run, books, metrics, str(folder))


def _check_version(folder: Path) -> None:
    """A log that says which version it is of must be of this one."""
    try:
        with open(folder / LOG, "rb") as file:
            head = msgspec.json.decode(file.readline(1 << 20))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return  # fold() says what is wrong
    version = head.get("schema", 1) if isinstance(head, dict) else 1
    if version != Run.__struct_defaults__[-1]:
        raise RecordError(
            f"{folder} is a record of schema {version!r:.20}, and this is upshift with schema 1.",
            remedy="Compare it with the version of upshift that wrote it.",
        )


def _foreign(path: str) -> Seen | None:
    """A run of TensorBoard, Weights & Biases or MLflow; None where none lies there.

    Raises:
        RecordError, MissingExtraError: it cannot be read.
    """
    from upshift.measure import series
    from upshift.measure.perrun import Seen
    from upshift.sinks import foreign

    if not foreign.detect(path):
        return None
    run = foreign.read(path)
    return Seen(run, None, series.events(run), path)
