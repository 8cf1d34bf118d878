"""MLflow runs in a database or a folder, read without MLflow: it would migrate, or add to, what it opens.

Tables: `mlflow/store/tracking/dbmodels/models.py`. Folders: `EXPERIMENT/RUN/{meta.yaml,metrics,params,tags}`, where a
file of `metrics` has lines `milliseconds value step`; `mlflow/store/tracking/file_store.py`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from upshift.errors import RecordError
from upshift.records.run import Run
from upshift.sinks.foreign.series import Found, Status, to_run

_MAGIC = b"SQLite format 3\x00"

#: As numbers in `meta.yaml` and as words in the database.
_STATUS: dict[str, Status] = {
    "FINISHED": "finished", "3": "finished", "FAILED": "failed", "4": "failed", "KILLED": "interrupted",
    "5": "interrupted",
}  # fmt: skip
_MOST_NAMED = 5


def split(path: Path | str) -> tuple[Path, str]:
    """`PLACE#RUN` -> (place, run), of a path or an URI."""
    place, _, run = str(path).partition("#")
    if isinstance(path, Path) and path.exists():
        place, run = str(path), ""
    if place.startswith("sqlite:///"):
        return Path(place.removeprefix("sqlite:///")), run
    if place.startswith("file:"):
        return Path(unquote(urlsplit(place).path)), run
    return Path(place), run


def is_store(place: Path) -> bool:
    """Whether an MLflow database, a folder of runs, or one of its runs lies there."""
    if place.is_file():
        with open(place, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    patterns = ("meta.yaml", "*/meta.yaml", "*/*/meta.yaml")
    return any(next(place.glob(pattern), None) is not None for pattern in patterns)


def read(path: Path | str) -> Run:
    """The run named after `#` (its id or name), or the only one there is.

    Raises:
        RecordError: no such run, several of which none is named, or a database that is not MLflow's.
    """
    place, wanted = split(path)
    return to_run(_from_database(place, wanted) if place.is_file() else _from_folder(place, wanted))


def _chosen(place: Path, runs: dict[str, str], wanted: str) -> str:
    """The id of the run meant; `runs` are ids and names."""
    fitting = [run for run, name in runs.items() if not wanted or wanted in (run, name)]
    if len(fitting) == 1:
        return fitting[0]
    some = ", ".join(f"{run} ({runs[run]})" if runs[run] else run for run in list(fitting or runs)[:_MOST_NAMED])
    raise RecordError(
        f"{place} holds {len(fitting)} runs{f' called {wanted}' if wanted else ''}.",
        remedy=f"Write {place}#RUN with one of them: {some}." if some else "Name another store.",
    )


def _from_database(file: Path, wanted: str) -> Found:
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)) as base:
            base.text_factory = lambda raw: raw.decode("utf-8", "replace")
            names = dict(base.execute("SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active'").fetchall())
            run = _chosen(file, {str(key): str(name or "") for key, name in names.items()}, wanted)
            began, ended, status, source = base.execute(
                "SELECT start_time, end_time, status, source_name FROM runs WHERE run_uuid = ?", (run,)
            ).fetchone()
            tags = dict(base.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,)).fetchall())
            found = _started(run, str(names[run] or ""), began, ended, str(status))
            found.script = str(tags.get("mlflow.source.name") or source or found.id)
            rows = base.execute(
                "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp, step",
                (run,),
            )
            for key, step, milliseconds, value, is_nan in rows:
                _add(found, str(key), step, milliseconds, float("nan") if is_nan else value)
            return found
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{file} cannot be read as a database of MLflow: {error}.", remedy="Name another file."
        ) from None


def _from_folder(place: Path, wanted: str) -> Found:
    if (place / "metrics").is_dir() or (place / "params").is_dir():
        folder = place
    else:
        folders = {item.parent.name: item.parent for item in sorted(place.glob("**/meta.yaml")) if _is_run(item.parent)}
        named = {key: _meta(item).get("run_name", "") for key, item in folders.items()}
        folder = folders[_chosen(place, named, wanted)]
    meta = _meta(folder)
    found = _started(
        folder.name, meta.get("run_name", ""), meta.get("start_time"), meta.get("end_time"), meta.get("status", "")
    )
    source = folder / "tags" / "mlflow.source.name"
    found.script = source.read_text("utf-8", "replace").strip() if source.is_file() else found.id
    for file in sorted((folder / "metrics").rglob("*")):
        if file.is_file():
            name = file.relative_to(folder / "metrics").as_posix()
            for line in _lines(file):
                parts = line.split()
                if len(parts) in (2, 3):
                    _add(found, name, parts[2] if len(parts) == 3 else 0, parts[0], parts[1])
                elif parts:
                    found.torn += 1
    return found


def _is_run(folder: Path) -> bool:
    return "run_id" in _meta(folder) or (folder / "metrics").is_dir()


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            while line := opened.readline(1 << 16):
                yield line
    except OSError as error:
        raise RecordError(f"{file} cannot be read: {error.strerror}.", remedy="Name another run.") from None


def _meta(folder: Path) -> dict[str, str]:
    """`meta.yaml` is flat: a name and a plain value a line."""
    found = {}
    for line in _lines(folder / "meta.yaml") if (folder / "meta.yaml").is_file() else ():
        name, colon, value = line.partition(":")
        if colon and value.strip() not in ("null", "''"):
            found[name.strip()] = value.strip().strip("'\"")
    return found


def _started(run: str, name: str, began: object, ended: object, status: str) -> Found:
    found = Found(source="MLflow", id=name or run, script="", status=_STATUS.get(status, "unknown"))
    found.began, found.ended = _seconds(began), _seconds(ended)
    return found


def _seconds(milliseconds: object) -> float | None:
    try:
        seconds = float(str(milliseconds)) / 1000
    except ValueError:
        return None
    return seconds if 0 < seconds < 4e9 else None


def _add(found: Found, name: str, step: object, milliseconds: object, value: object) -> None:
    try:
        found.add(name, int(str(step)), _seconds(milliseconds) or 0.0, float(str(value)))
    except ValueError:
        found.torn += 1
