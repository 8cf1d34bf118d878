"""Experiment trackers as sinks: they tail the record of a run from a process beside it, so none can hold training up.

    tensorboard[:DIR]   wandb[:PROJECT]   mlflow[:URI]   prometheus[:FILE]

A tracker's package is imported, and its server spoken to, by the first `poll`, in the thread that calls it.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from upshift.errors import MissingExtraError, UsageError
from upshift.sinks.following import Follow, Tracker

#: Tracker -> the packages it needs, and the extra that brings them.
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard",), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
    "prometheus": ((), ""),
}
#: MLflow without a server keeps its runs in a database.
_FOR_DATABASES = ("sqlalchemy", "alembic")


class Sink(Protocol):
    """Something that follows a run. Both calls may raise or take long: each sink has a thread of its own."""

    name: str
    opened: bool
    """Whether the tracker has been imported and its run begun: from then on no call takes long."""

    def poll(self) -> None:
        """Take in what is new."""

    def close(self) -> None:
        """The run is over: take in the rest."""


def check(specs: Sequence[str]) -> list[str]:
    """The same trackers with whole paths, each once, so that they hold in another process; before training starts.

    Nothing is imported and nothing is written.

    Raises:
        UsageError: an unknown tracker, or a place that cannot be written.
        MissingExtraError: the tracker's package is not installed.
    """
    found: dict[str, None] = {}
    for spec in specs:
        name, argument = _parts(spec)
        argument = _placed(name, argument)
        packages, extra = NEEDS[name]
        if name == "mlflow" and argument.startswith("sqlite:"):
            packages += _FOR_DATABASES
        missing = [package for package in packages if not installed(package)]
        if missing:
            raise MissingExtraError(
                f"the tracker {name} needs the package {missing[0]!r}, which is not installed in this environment.",
                remedy=f"pip install 'upshift[{extra}]'",
            )
        found[f"{name}:{argument}" if argument else name] = None
    return list(found)


def installed(package: str) -> bool:
    """Whether there is such a package. A folder of the name, as W&B leaves one, is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def open_sinks(specs: Sequence[str], folder: Path) -> list[Sink]:
    """A sink for each tracker, following the record in `folder`. Opens and imports nothing yet.

    Raises:
        UsageError: an unknown tracker.
    """
    return [_sink(name, argument, folder) for name, argument in map(_parts, specs)]


def _sink(name: str, argument: str, folder: Path) -> Sink:
    if name == "prometheus":
        from upshift.sinks.prometheus import Prometheus

        return Prometheus(Path(argument) if argument else folder / "upshift.prom", folder)
    return Follow(name, _tracker(name, argument, folder), folder)


def _tracker(name: str, argument: str, folder: Path) -> Tracker:
    if name == "tensorboard":
        from upshift.sinks.tensorboard import TensorBoard

        return TensorBoard(Path(argument) / folder.name if argument else folder / "tensorboard")
    if name == "wandb":
        from upshift.sinks.weights_biases import WeightsBiases

        return WeightsBiases(argument)
    from upshift.sinks.mlflow_store import MlflowStore

    return MlflowStore(argument)


def _parts(spec: str) -> tuple[str, str]:
    name, _, argument = spec.partition(":")
    if name not in NEEDS:
        close = difflib.get_close_matches(name, NEEDS, 1)
        raise UsageError(
            f"there is no tracker {name!r}.",
            remedy=f"Did you mean {close[0]}?" if close else f"Trackers are {', '.join(NEEDS)}.",
        )
    return name, argument


def _placed(name: str, argument: str) -> str:
    if name == "mlflow":
        return mlflow_place(argument)
    if not argument or name == "wandb":
        return argument
    path = Path(argument).expanduser().absolute()
    if name == "tensorboard":
        _must_hold_files(path, "tensorboard")
    elif path.is_dir():
        raise UsageError(f"{argument} is a folder.", remedy="Name a file: prometheus:DIR/upshift.prom.")
    else:
        if path.suffix != ".prom":
            raise UsageError(
                f"{path.name} does not end in .prom, so no collector would read it.",
                remedy="Name a file such as upshift.prom in the folder of the textfile collector.",
            )
        _must_hold_files(path.parent, "prometheus")
    return str(path)


def mlflow_place(argument: str) -> str:
    """The tracking URI that is meant, with whole paths.

    Without an argument: MLFLOW_TRACKING_URI, else what MLflow itself takes: the folder `mlruns` if it has runs, else
    the database `mlflow.db`. In a folder without runs a database is made: MLflow makes no new stores of the old kind.
    """
    uri = argument or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        uri = "mlruns" if _has_runs(Path("mlruns")) else "sqlite:///mlflow.db"
    scheme, slashes, rest = uri.partition(":///")
    if slashes and scheme == "sqlite":
        path = Path(rest).expanduser().absolute()
        _must_hold_files(path.parent, "mlflow")
        return f"sqlite:///{path}"
    if slashes and scheme == "file":
        return uri
    if ":" in uri or uri == "databricks":
        return uri
    path = Path(uri).expanduser().absolute()
    _must_hold_files(path, "mlflow")
    return path.as_uri() if _has_runs(path) else f"sqlite:///{path / 'mlflow.db'}"


def _has_runs(folder: Path) -> bool:
    return next(folder.glob("*/meta.yaml"), None) is not None


def _must_hold_files(folder: Path, name: str) -> None:
    """Whether a folder, or the nearest that is there above it, can be written."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{name} cannot write below {place}.", remedy=f"Name another place: {name}:PLACE.")
