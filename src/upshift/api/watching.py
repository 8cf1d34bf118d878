"""watch(): a run looked at again and again while it goes on, and the books of a run.

Only what is new is read at each look, so that a run of days costs no more than one of minutes. Looking changes nothing:
the run does not know.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from upshift.api.stored import latest_run, search_behind, taken_away
from upshift.errors import RecordError
from upshift.records import resources
from upshift.records.ledger import Ledger
from upshift.records.resources import MOST_ALARMS, MOST_SAMPLES, Alarm, Head, Resources, Sample
from upshift.records.run import Run
from upshift.records.runfold import Incremental, View
from upshift.records.runlog import LOG
from upshift.records.tail import Tail
from upshift.report.current import Moment

if TYPE_CHECKING:
    from upshift.hardware.rates import Rates

#: Seconds of reading in one look; a longer log is read on in the next ones, and its end is shown meanwhile.
LOOK = 0.3

#: A run whose process is not to be found, here or any more, is taken to go on for so long after its last line.
PATIENCE = 15.0

#: Of the samples, as many of the last are kept unthinned.
RECENT_SAMPLES = 200


def find(run: Path | None, runs: Path = Path(".upshift/runs")) -> Path:
    """The folder of the run to watch: `run`, or the newest one in `runs`. Of a launch, its first rank.

    Raises:
        RecordError: there is none.
    """
    if run is None:
        return latest_run(runs)
    folder = run.parent if run.name == LOG else run
    if (folder / LOG).is_file():
        return folder
    ranks = sorted(folder.glob(f"*/{LOG}")) if folder.is_dir() else []
    if ranks:
        return ranks[0].parent
    why = "is no folder of a run" if folder.exists() else "does not exist"
    raise RecordError(f"{run} {why}.", remedy="Name a folder below .upshift/runs, or none for the newest run.")


class Sampled:
    """The fold of `resources.jsonl` as it grows; see `upshift.records.resources.read`."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder / resources.FILE)
        self._generation = 0
        self._begin()

    def _begin(self) -> None:
        self.head: Head | None = None
        self.samples: list[Sample] = []
        self.recent: list[Sample] = []
        self.alarms: list[Alarm] = []
        self.overhead: float | None = None
        self.torn = 0
        self._stride = 1
        self._seen = 0

    def advance(self, seconds: float) -> bool:
        """Read what is new for about `seconds`; whether all of it was read. A file that is not there is no mistake."""
        until = time.monotonic() + seconds
        while True:
            try:
                lines = self._tail.read()
            except OSError:
                return True
            if self._tail.generation != self._generation:
                self._generation = self._tail.generation
                self._begin()
            for line in lines:
                self._line(line)
            if self._tail.offset >= self._tail.size:
                return True
            if time.monotonic() >= until:
                return False

    def _line(self, line: bytes) -> None:
        try:
            item = msgspec.json.decode(line)
            kind = item.pop("kind")
            if kind == "sample":
                self._sample(msgspec.convert(item, Sample))
            elif kind == "head":
                self.head = msgspec.convert(item, Head)
            elif kind == "alarm":
                # The newest are the ones to be seen.
                self.alarms = [*self.alarms[-MOST_ALARMS + 1 :], msgspec.convert(item, Alarm)]
            elif kind == "end":
                self.overhead = float(item["overhead_seconds"])
            elif not isinstance(kind, str):
                self.torn += 1
        except (msgspec.DecodeError, RecursionError, AttributeError, KeyError, TypeError, ValueError):
            self.torn += 1

    def _sample(self, sample: Sample) -> None:
        self._seen += 1
        self.recent.append(sample)
        if len(self.recent) <= RECENT_SAMPLES:
            return
        # What leaves the recent ones joins the thinned.
        oldest = self.recent.pop(0)
        if (self._seen - RECENT_SAMPLES) % self._stride == 0:
            self.samples.append(oldest)
        if len(self.samples) > 2 * MOST_SAMPLES:
            self.samples, self._stride = self.samples[1::2], 2 * self._stride

    def resources(self) -> Resources | None:
        """What has been read; None where nothing was recorded."""
        if self.head is None and not self.recent:
            return None
        samples = (*self.samples, *self.recent)
        return Resources(self.head or Head(), samples, tuple(self.alarms), self.overhead, self.torn)


class Watching:
    """One run, looked at as often as wanted."""

    def __init__(self, folder: Path, rates: Rates | None = None) -> None:
        """
        Args:
            folder: of the run.
            rates: price, region and PUE for its books; None: those this machine knows of.

        Raises:
            UsageError: the rates of this machine cannot be read.
        """
        self.folder = folder
        self._rates = _known(rates)
        self._log = Incremental(folder)
        self._sampled = Sampled(folder)
        self.complete = False
        """Whether all that is written has been read."""

    def look(self, seconds: float = LOOK) -> Moment:
        """What is known now, after at most about `seconds` of reading.

        Raises:
            RecordError: there is no run (any more).
        """
        self.complete = self._log.advance(seconds)
        view = self._log.view() if self.complete else self._log.glimpse()
        sampled = self._sampled.advance(seconds)
        self.complete = self.complete and sampled
        return self._moment(view, time.time())

    def _moment(self, view: View, now: float) -> Moment:
        silent = None if view.heard is None else max(now - view.heard, 0.0)
        used = self._sampled.resources()
        return Moment(
            run=view.run,
            recent=view.recent,
            events=view.events,
            metrics=view.metrics,
            resources=used,
            ledger=ledger_of(view.run, used, self._rates),
            elapsed=_elapsed(view, now, silent),
            silent=silent,
            share=view.share,
        )


def over(moment: Moment) -> bool:
    """Whether nothing more is to come: the log has its end, or its process is gone and it has fallen silent."""
    if moment.share < 1 or moment.run.status == "running":
        return False
    return moment.run.status != "unknown" or moment.silent is None or moment.silent >= PATIENCE


def watch(folder: Path, *, every: float = 1.0, rates: Rates | None = None) -> Iterator[Moment]:
    """What is known of a run, again and again, until it is over; the last one is final.

    Args:
        folder: of the run; see `find`.
        every: seconds between two looks.
        rates: price, region and PUE; None: those this machine knows of.

    Raises:
        RecordError: there is no run in `folder` (any more).
    """
    watching = Watching(folder, rates)
    patience = 0.0
    while True:
        began = time.monotonic()
        # The first look is short: something is to be seen at once.
        moment, patience = watching.look(patience), LOOK
        yield moment
        if over(moment):
            return
        if watching.complete:
            time.sleep(max(every - (time.monotonic() - began), 0.01))


def once(folder: Path, rates: Rates | None = None) -> Moment:
    """What is known of a run now, with all of its record read.

    Raises:
        RecordError: there is no run in `folder`.
    """
    return Watching(folder, rates).look(float("inf"))


def ledger_of(run: Run, used: Resources | None, rates: Rates | None = None) -> Ledger:
    """The books of a run: what it used, what that cost, and how each figure is known.

    Args:
        run: its record.
        used: its resources; None: none were recorded.
        rates: price, region and PUE; None: those this machine knows of.

    Raises:
        UsageError: the rates of this machine cannot be read.
    """
    from upshift.measure.ledger import ledger

    known = _known(rates)
    return ledger(run, used, known, search_behind(run.plan), spot=taken_away(known))


def books(folder: Path, run: Run) -> tuple[Resources | None, Ledger]:
    """What is recorded of the resources of a run, and its books with the rates of this machine.

    Raises:
        UsageError: the rates of this machine cannot be read.
    """
    used = resources.read(folder)
    return used, ledger_of(run, used)


def _known(rates: Rates | None) -> Rates:
    if rates is not None:
        return rates
    from upshift.hardware.rates import rates as known

    return known()


def _elapsed(view: View, now: float, silent: float | None) -> float | None:
    """Seconds since the run began, as long as it runs; else until its end or its last line."""
    run = view.run
    if run.status != "running":
        return run.seconds
    if view.clock is not None:
        return max(now - view.clock, run.seconds or 0.0)
    return run.seconds + silent if run.seconds is not None and silent is not None else None
