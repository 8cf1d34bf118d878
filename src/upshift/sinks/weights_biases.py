"""Weights & Biases, offline unless there is a key for its server: https://docs.wandb.ai/

Console, code, git and machine figures of this process are not those of the training, so W&B is told to leave them.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from upshift._optional import require
from upshift.sinks.feed import Began
from upshift.sinks.following import Closing, Note, Point
from upshift.sinks.texts import about

PROJECT = "upshift"

#: The step and the time of a row; charts have the step as their axis.
STEP = "step"

#: Those that a version does not know are left out.
_SETTINGS = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}

_HOST = "https://api.wandb.ai"


class WeightsBiases:
    """Writes one W&B run. A second training in the same run folder makes a new one of the same group."""

    def __init__(self, project: str = "") -> None:
        self._project = project
        self._run: Any = None
        self._wandb: Any = None

    def begin(self, began: Began, folder: Path) -> None:
        """Start the run; never asks for a key.

        Raises:
            MissingExtraError: no wandb here.
        """
        self._wandb = wandb = require("wandb", extra="wandb", why="the tracker wandb")
        told = about(began, folder)
        known = getattr(wandb.Settings, "model_fields", _SETTINGS)
        settings = wandb.Settings(**{name: value for name, value in _SETTINGS.items() if name in known})
        # All is said here: what the environment says is meant for W&B calls of the training itself.
        self._run = wandb.init(
            project=self._project or os.environ.get("WANDB_PROJECT") or PROJECT,
            id=secrets.token_hex(4),
            name=folder.name,
            group=folder.name,
            dir=str(folder),
            config={"upshift": told},
            tags=[name[:64] for name in began.techniques] or None,
            mode=mode(),
            resume="never",
            reinit="create_new",
            settings=settings,
        )
        self._run.define_metric("*", step_metric=STEP)

    def add(self, points: Sequence[Point], notes: Sequence[Note]) -> None:
        """A row for each moment; notes are the value `event` of a row."""
        for point in points:
            self._run.log({**point.values, STEP: point.step, "_timestamp": point.wall})
        for note in notes:
            self._run.log({"event": f"{note.kind}: {note.text}"[:2000], STEP: note.step, "_timestamp": note.wall})

    def end(self, closing: Closing) -> None:
        """Report as a page, checkpoints as paths, exit code."""
        try:
            if closing.checkpoints:
                self._run.summary["checkpoints"] = [str(path) for path in closing.checkpoints]
            if closing.report is not None:
                page = self._wandb.Html(closing.report.read_text("utf-8"), inject=False)
                self._run.log({"report": page, STEP: closing.step, "_timestamp": closing.wall})
        finally:
            code = closing.ended.code if closing.ended else None
            self._run.finish(exit_code=1 if code is None else code)


def mode() -> str:
    """`online` where there is a key and nothing says otherwise; else `offline`, or `disabled`."""
    told = os.environ.get("WANDB_MODE", "").lower()
    if told == "disabled":
        return told
    if told in ("offline", "dryrun"):
        return "offline"
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _HOST).hostname
    try:
        kept = netrc.netrc(os.environ.get("NETRC")).authenticators(host or "")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return bool(kept and kept[2])
