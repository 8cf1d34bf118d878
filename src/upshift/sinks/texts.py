"""What a run is, as names and short texts: parameters and tags of a tracker."""

from __future__ import annotations

import json
from pathlib import Path

from upshift.report.words import clean
from upshift.sinks.feed import Began

#: Longer texts are cut; trackers refuse what is much longer.
MOST = 2000


def about(began: Began, folder: Path) -> dict[str, str]:
    """Script, arguments, plan and techniques with their settings, machine. Values are one line each."""
    found = {
        "run": folder.name,
        "folder": str(folder),
        "script": began.script,
        "arguments": " ".join(began.arguments),
        "started": began.started,
        "plan": began.plan or "none",
    }
    for name, settings in began.techniques.items():
        found[f"technique/{name}"] = json.dumps(settings, sort_keys=True)
    for name, value in began.environment.items():
        found[f"machine/{name}"] = value
    return {clean(name, 200): clean(value, MOST) for name, value in found.items()}
