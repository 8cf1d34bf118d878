"""What a script's own source speaks of: what falls outside the seconds watched may still be declared there.

Words decide, not meaning: it is read so that a rule can stay silent, never so that it speaks.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Bytes of source that are parsed at most; beyond it nothing is said.
LARGEST = 2**20

_TOPICS = {
    "validation": (
        "val valid validation validate validating test testing eval evals evaluate evaluation evaluator dev holdout "
        "heldout inference nograd"
    ),
    "schedule": "scheduler schedulers schedule schedules sched warmup anneal annealing cosine plateau onecycle",
    "stopping": "patience early earlystopping stopping stopper stop converged plateau",
    "reward": "reward rewards gym gymnasium advantage advantages episode episodes rollout rollouts",
    "seed": "seed seeds seeded seeding",
}
_WORDS = {topic: frozenset(words.split()) for topic, words in _TOPICS.items()}
#: Beside `lr` or `rate` in one name these words speak of a schedule.
_RATE = frozenset(
    ["decay", "adjust", "update", "set", "get", "lambda", "min", "max", "final", "end", "gamma", "step", "scale"]
)

_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def declared(files: Iterable[Path]) -> tuple[str, ...] | None:
    """Topics the sources speak of, sorted: `validation`, `schedule`, `stopping`, `reward`, `seed`.

    None where one of them cannot be read or parsed, where there are none, or where they are too large.
    """
    found: set[str] = set()
    size = 0
    for file in files:
        try:
            source = file.read_bytes()
            size += len(source)
            if size > LARGEST:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        for node in ast.walk(tree):
            for name in _names(node):
                found |= _topics(name)
    return tuple(sorted(found)) if size else None


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.alias):
        yield node.asname or node.name
    elif isinstance(node, (ast.arg, ast.keyword)):
        yield node.arg or ""
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        if isinstance(node.slice, ast.Constant) and node.slice.value == "lr":
            yield "set_lr"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_word(node.value):
        yield node.value


def _is_word(text: str) -> bool:
    """An option or a key, not a sentence."""
    return len(text) <= 40 and not any(map(str.isspace, text))


def _topics(name: str) -> set[str]:
    words = {word.lower() for word in _PARTS.findall(name)}
    if {"no", "grad"} <= words:
        words.add("nograd")
    found = {topic for topic, known in _WORDS.items() if words & known}
    if words & {"lr", "rate"} and words & _RATE:
        found.add("schedule")
    return found
