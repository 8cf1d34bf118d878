"""Records on disk: load(), the latest run, the report behind a plan."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from upshift.errors import RecordError
from upshift.records import Plan, Run, TuneReport, codec, planfile
from upshift.records.planfile import slug
from upshift.records.runfold import fold
from upshift.records.runlog import LOG

if TYPE_CHECKING:
    from upshift.hardware.rates import Rates
    from upshift.measure.lost import Spot


def latest_run(runs: Path = Path(".upshift/runs")) -> Path:
    """The newest run folder.

    Raises:
        RecordError: there is none.
    """
    found = [path.parent for pattern in (f"*/{LOG}", f"*/*/{LOG}") for path in runs.glob(pattern)]
    if not found:
        raise RecordError(f"there is no run in {runs}.", remedy="Start one with upshift run train.py.")
    newest = max(path.relative_to(runs).parts[0] for path in found)
    # Of a launch, its first rank.
    return min(path for path in found if path.relative_to(runs).parts[0] == newest)


def load(path: Path) -> Run | TuneReport | dict[str, Plan]:
    """Whatever record lies at `path`: a run folder, a plan, or a tune report.

    Raises:
        RecordError, PlanError: it is none of these.
    """
    if path.is_dir():
        ranks = sorted(item.parent.name for item in path.glob(f"*/{LOG}"))
        if ranks and not (path / LOG).exists():
            raise RecordError(f"{path} holds several runs.", remedy=f"Name one of them: {', '.join(ranks)}.")
        return fold(path)
    if not path.exists():
        raise RecordError(f"there is no record {path}.", remedy="Name a run folder, a plan or a report.")
    if path.suffix == ".toml":
        return planfile.read(path)
    if path.name == LOG:
        return fold(path.parent)
    return codec.read(path, TuneReport)


def report_behind(plan_file: Path) -> TuneReport | None:
    """The report a plan was written with, where it is still there."""
    name = plan_file.name.removesuffix(".upshift.toml")
    for candidate in (slug(str(plan_file.parent / name)), slug(name)):
        file = Path(".upshift") / "reports" / f"{candidate}.json"
        if file.exists():
            return codec.read(file, TuneReport)
    return None


def taken_away(rates: Rates) -> Spot | None:
    """What is to be expected of a machine that is paid as a spot machine; None for any other."""
    from upshift.checkpoint.interval import INTERRUPTED_EVERY
    from upshift.measure.lost import Spot

    return Spot(INTERRUPTED_EVERY) if rates.price is not None and rates.price.spot else None


@cache
def search_behind(plan_file: str) -> TuneReport | None:
    """The search that a run's plan came from, where its report is still there and can be read."""
    try:
        return report_behind(Path(plan_file)) if plan_file else None
    except RecordError:
        return None
