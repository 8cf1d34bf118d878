"""Which numbers of a printed line are metrics: not those that say when or how fast, and not the loss of a step.

A line is taken apart as `metrics.pairs` does it. Only names and values come out, never text, and nothing whose name
speaks of a password or a person. What a number is for is told by its name:

    known direction (`accuracy`, `val_loss`)  a metric
    another name (`reward of 5`, `distance`)  a metric once it has come again: what is printed once may be anything
    `lr`, `step`, `time`, `memory`, `speed`   never
    a loss in the middle of training          the loss of a step, which the record has already
"""

from __future__ import annotations

import json
import re

from upshift.measure.metrics import EVALUATION, FILLING, TRAINING, direction, flat, pairs, words

#: Characters of a line that are looked at, and of a name that are kept.
MOST_LINE, MOST_NAME = 400, 60
#: Words of a name whose direction is not known; a longer one is a sentence.
MOST_WORDS = 3

#: Colours and movements of the cursor (ECMA-48).
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
#: The head of a progress bar, as tqdm draws it; what follows is what the script has added.
_BAR = re.compile(r"^.*\d%\|.*?(?:it/s|s/it)")

#: Names that say when, how much or how fast.
_NOT = frozenset(
    ("epoch", "epochs", "step", "steps", "iter", "iters", "iteration", "iterations", "batch", "batches", "bs", "lr")
    + ("rate", "time", "times", "seconds", "sec", "secs", "s", "ms", "us", "min", "mins", "minutes", "hours", "elapsed")
    + ("eta", "remaining", "left", "duration", "speed", "fps", "throughput", "samples", "sample", "tokens", "images")
    + ("memory", "mem", "mb", "gb", "mib", "gib", "kb", "bytes", "seed", "params", "parameters", "size", "workers")
    + ("device", "version", "num", "port", "pid", "rank", "gpu", "cpu", "cuda", "code", "line", "episode", "file")
    + ("saved", "saving", "checkpoint", "loaded", "loading", "total", "count", "index", "id", "v", "e", "x", "n")
    + ("progress", "dataloader", "mfu", "decay", "momentum", "warmup", "world", "node", "year", "date", "info")
)  # fmt: skip
_PRIVATE = frozenset(
    ("key", "keys", "token", "secret", "password", "passwd", "passphrase", "pwd", "pin", "credential", "credentials")
    + ("auth", "login", "user", "username", "account", "card", "phone", "mail", "email", "ssn", "iban", "address")
)  # fmt: skip


def metrics_in(line: str, *, evaluated: bool = False, losses_known: bool = True) -> dict[str, float]:
    """Metrics in a line: name, as lower-case words, -> value; the last of each name.

    Args:
        evaluated: the script has evaluated since its last update, so that a loss in this line may be of that.
        losses_known: the loss of every step is recorded by other means.
    """
    line = _BAR.sub("", _ESCAPES.sub("", line)[:MOST_LINE]).strip()
    return {name: value for name, value in map(_plainly, _numbers(line))
            if _is_metric(name, evaluated=evaluated, losses_known=losses_known)}  # fmt: skip


def _numbers(line: str) -> list[tuple[str, float]]:
    if line.startswith("{") and line.endswith("}"):
        try:
            return list(flat(json.loads(line)))
        except (ValueError, RecursionError, OverflowError):
            pass
    return pairs(line)


def _plainly(pair: tuple[str, float]) -> tuple[str, float]:
    return " ".join(words(pair[0])), pair[1]


def _is_metric(name: str, *, evaluated: bool, losses_known: bool) -> bool:
    said = name.split()
    found = set(said)
    if not said or len(name) > MOST_NAME or said[-1] in _NOT or found & _PRIVATE:
        return False
    if direction(name) is None:
        # What is left of `Training: 50 %` is no name.
        left = {word for word in found - EVALUATION - TRAINING - FILLING if not word.isdecimal()}
        return bool(left) and len(said) <= MOST_WORDS and not found & _NOT
    return not is_step_loss(name) or evaluated or not losses_known


def is_step_loss(name: str) -> bool:
    """Whether a name is that of the loss of training, as far as it tells: `loss`, `train loss`, `loss_g`."""
    found = set(words(name))
    return "loss" in found and not found & EVALUATION
