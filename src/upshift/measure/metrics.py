"""Finding a metric in what a script prints, logs or writes: `test accuracy: 97.3 %`, CSV, JSON lines.

Names are compared word by word, without regard to case or punctuation: `accuracy` finds `Test Accuracy`, `val_accuracy`
and `eval/accuracy`. Of several names that fit, those of an evaluation come before those of training.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from upshift.errors import UsageError

Mode = Literal["max", "min"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
#: A word of a name. Bounded, as every place in a longer one would be tried.
_REST = r"[\w@/.\-]{0,60}"
#: `name: 12.3`, `name=12.3`, `name 12.3`, `'name': 9829/10000`, `name: 98 %`, `| name | 12.3 |`; the name is at most
#: five words, and begins a word (not inside `5e-01`).
_PAIR = re.compile(
    rf"(?<![\w.])(?P<name>[A-Za-z]{_REST}(?:[ ][A-Za-z(]{_REST}){{0,4}})"
    r"['\"]?\s*(?:[:=|│┃]|->|is|of)?\s*['\"(\[$]?\s*"
    rf"(?P<value>{_NUMBER}|nan|inf|-inf)(?![\w.]*[A-Za-z])(?:\s*/\s*(?P<of>{_NUMBER}))?\s*(?P<percent>%)?"
)
_NO_NAME = " \t*=>#|-["
#: The place of a batch at the head of a line: `Test: [ 10/196]`, `Epoch: [0][ 10/196]`, `Step [100/600]`, `Batch 3/9`.
_PLACE = re.compile(
    r"(?:(?P<what>[A-Za-z]+|\])[:\s]*\[|\b(?:step|iter|iteration|batch|it)s?[:\s]+)\s*\d+\s*/\s*\d+", re.IGNORECASE
)
#: `Accuracy of the network on the 10000 test images: 55 %`: a sentence with a number in it.
_SENTENCE = re.compile(
    r"^\W*(?P<name>[A-Za-z][\w@/-]{0,60}(?: [A-Za-z][\w@/-]{0,60})?) (?:of|on|for|over) "
    rf"(?P<of>[^:=\d]{{0,60}}\d[\d,]*[^:=\d]{{0,60}})[:=]\s*(?P<value>{_NUMBER})\s*%?\s*$"
)
#: `f1` and `top5` are words of their own.
_WORD = re.compile(r"[a-z]+\d*|\d+")
EVALUATION = frozenset(("test", "val", "valid", "validation", "eval", "evaluation", "dev", "heldout", "holdout"))
TRAINING = frozenset(("train", "training", "batch", "running"))
FILLING = frozenset(("set", "epoch", "avg", "average", "mean", "final", "the", "overall", "top"))

#: Words by which a metric is known to be better when higher, or lower.
HIGHER = frozenset(
    ("accuracy", "acc", "top", "f1", "precision", "recall", "auc", "auroc", "map", "miou", "iou", "dice", "bleu")
    + ("rouge", "psnr", "ssim", "r2", "score", "reward", "return")
)
LOWER = frozenset(
    (
        "loss",
        "perplexity",
        "ppl",
        "error",
        "err",
        "mse",
        "mae",
        "rmse",
        "wer",
        "cer",
        "fid",
        "bpc",
        "bpb",
        "nll",
        "elbo",
    )
)


def words(name: str) -> tuple[str, ...]:
    """A name as comparable words: `Val_Acc@1` -> ("val", "acc", "1"); `valAccuracy` -> ("val", "accuracy")."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return tuple(_WORD.findall(apart.lower()))


def pairs(line: str) -> list[tuple[str, float]]:
    """Names and values in a line of text, in order. A fraction `a/b` counts as its value, a percentage as printed.

    Where a line opens with `Test set:` or `Train Epoch:`, its names are of that part of the data, and those that follow
    a name such as `val loss` are of its part, unless it has one of that name already. What a line says that opens with
    the place of a batch (`Test: [10/196]`) is `running`, and no result yet.
    """
    sentence = _SENTENCE.match(line)
    if sentence is not None and direction(sentence["name"]) is not None:
        of = [word for word in words(sentence["of"]) if word in EVALUATION | TRAINING]
        return [(" ".join([*of[:1], sentence["name"]]), float(sentence["value"]))]
    found: list[tuple[str, float]] = []
    opening = set(words(line[: len(line) - len(line.lstrip(_NO_NAME)) + 24].split(":")[0]))
    part = "test " if opening & EVALUATION else "train " if opening & TRAINING else ""
    places = {(place["what"] or "").lower() for place in _PLACE.finditer(line[:80])}
    running = bool(places - {"epoch", "epochs", "ep"}) and not opening & TRAINING
    seen: set[tuple[str, ...]] = set()
    for match in _PAIR.finditer(line[:2000]):
        value = float(match["value"])
        if match["of"] is not None:
            whole = float(match["of"])
            # `epoch 3/10` is a place, not a measure.
            if whole == 0 or words(match["name"])[-1:] in (("epoch",), ("step",), ("batch",), ("iter",)):
                continue
            value /= whole
        name = match["name"].strip()
        said = words(name)
        own = set(said) & (EVALUATION | TRAINING)
        if own:
            # An evaluation's own word, so that `val acc` goes with `val loss`.
            part = next((f"{word} " for word in said if word in EVALUATION), "train ")
        bare = (part, *(word for word in said if word not in own))
        full = name if own or bare in seen else part + name
        result = not running or (own & EVALUATION and not opening & EVALUATION)
        found.append((full if result else f"running {full}", value))
        seen.add(bare)
    return found


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a JSON object with their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield prefix, float(value)


@dataclass(frozen=True)
class Metric:
    """What to look for. `target` in the metric's own unit; `pattern` replaces the search by name."""

    name: str
    mode: Mode
    target: float | None = None
    pattern: re.Pattern[str] | None = None

    @staticmethod
    def parse(text: str, target: float | None = None, regex: str | None = None) -> Metric:
        """`accuracy:max`, `val_loss:min`; the direction may be left out where the name tells it.

        Raises:
            UsageError: no direction, or a regular expression that does not compile or has no group.
        """
        name, _, mode = text.rpartition(":") if ":" in text else (text, "", "")
        if not mode:
            mode = direction(name) or ""
        if mode not in ("max", "min") or not words(name):
            raise UsageError(
                f"{text!r} does not say which way is better.", remedy="Write NAME:max or NAME:min, as in accuracy:max."
            )
        pattern = None
        if regex:
            try:
                pattern = re.compile(regex)
            except re.error as error:
                raise UsageError(f"the regular expression {regex!r} is wrong: {error}.") from None
            if pattern.groups < 1:
                raise UsageError(
                    f"{regex!r} has no group.", remedy=r"Put the number in brackets: 'Accuracy: ([\d.]+)'."
                )
        return Metric(name, "max" if mode == "max" else "min", target, pattern)

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`, or as good."""
        return a >= b if self.mode == "max" else a <= b

    def fits(self, name: str) -> bool:
        """Whether `name` has every word of this metric's."""
        return set(words(self.name)) <= set(words(name))

    def rank(self, name: str) -> int:
        """Of several names that fit, those with the lowest rank are meant: evaluation 0, plain 1, on the way through an
        evaluation 2, training 3, others 4."""
        extra = {word for word in words(name) if not word.isdecimal()} - set(words(self.name))
        if extra - EVALUATION - TRAINING - FILLING:
            return 4
        if extra & TRAINING:
            return 2 if extra & EVALUATION else 3
        return 0 if extra & EVALUATION else 1


def direction(name: str) -> Mode | None:
    """The direction a name tells by itself: `val_acc` -> max, `test loss` -> min."""
    found = set(words(name))
    found |= {word.rstrip("0123456789") for word in found}
    if found & LOWER:
        return "min"
    return "max" if found & HIGHER else None


class Reader:
    """Collects one metric from the files a run writes, while it writes them."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.names: dict[str, int] = {}
        """Every name seen with a number -> how often."""
        self._series: dict[str, list[tuple[float, float]]] = {}
        self._headers: dict[str, list[str]] = {}
        self._rest: dict[str, str] = {}

    def feed(self, source: str, text: str, at: float) -> None:
        """Take in what `source` (a file name) has grown by; `at` is seconds since the run began."""
        lines = (self._rest.pop(source, "") + text).split("\n")
        self._rest[source] = lines.pop()[-100_000:]
        for line in lines:
            for name, value in self._values(source, line.strip()):
                self._note(name, value, at)

    def end(self, at: float) -> None:
        """The run has ended: last lines need no line break."""
        for source in list(self._rest):
            self.feed(source, "\n", at)

    def _values(self, source: str, line: str) -> Iterable[tuple[str, float]]:
        pattern = self.metric.pattern
        if pattern is not None:
            return [(self.metric.name, float(found)) for match in pattern.finditer(line)
                    if (found := _number(match[1])) is not None]  # fmt: skip
        if line.startswith("{") and line.endswith("}"):
            try:
                return list(flat(json.loads(line)))
            except ValueError:
                return pairs(line)
        if source.endswith(".csv"):
            return self._row(source, line)
        return pairs(line)

    def _row(self, source: str, line: str) -> Iterable[tuple[str, float]]:
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error:
            return []
        header = self._headers.get(source)
        if not cells:
            return []
        if header is None or all(_number(cell) is None for cell in cells if cell):
            self._headers[source] = cells
            return []
        return [(name, value) for name, cell in zip(header, cells, strict=False)
                if (value := _number(cell)) is not None]  # fmt: skip

    def _note(self, name: str, value: float, at: float) -> None:
        if len(self.names) < 1000 or name in self.names:
            self.names[name] = self.names.get(name, 0) + 1
        if self.metric.pattern is not None or self.metric.fits(name):
            self._series.setdefault(" ".join(words(name)), []).append((at, value))

    def series(self) -> list[tuple[float, float]]:
        """(seconds, value) of the metric, in order.

        Raises:
            UsageError: it was not found, or several names fit equally well.
        """
        if not self._series:
            told = ", ".join(repr(name) for name in sorted(self.names, key=lambda name: -self.names[name])[:8])
            raise UsageError(
                f"the metric {self.metric.name!r} was not found in what the script prints or writes.",
                remedy=f"Numbers were seen under {told or 'no name'}; --metric-regex finds others.",
            )
        best = min(map(self.metric.rank, self._series))
        fitting = [name for name in self._series if self.metric.rank(name) == best]
        if len(fitting) > 1:
            raise UsageError(
                f"several numbers are called {self.metric.name!r}: {', '.join(map(repr, fitting))}.",
                remedy="Name one of them in full.",
            )
        return self._series[fitting[0]]


def suggestions(names: Iterable[str]) -> list[str]:
    """Names that look like a metric of an evaluation, as `--metric` takes them: `test accuracy:max`."""
    found = []
    for name in names:
        way = direction(name)
        if way is not None and set(words(name)) & EVALUATION:
            found.append(f"{name}:{way}")
    return list(dict.fromkeys(found))


def _number(text: str) -> float | None:
    try:
        return float(text.strip().rstrip("%"))
    except ValueError:
        return None
