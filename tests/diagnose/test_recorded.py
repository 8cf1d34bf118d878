"""The first finding on recorded measurements of scripts whose bottleneck is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from upshift.diagnose import diagnose
from upshift.records import Measurement

RECORDED = [json.loads(line) for line in (Path(__file__).parent / "recorded.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_the_first_finding_names_the_bottleneck(case: dict[str, Any]) -> None:
    findings = [
        item for item in diagnose(msgspec.convert(case["measurement"], Measurement)) if item.gain.known
    ]  # findings about what is learnt predict no gain
    if case["accepted"]:
        assert findings and findings[0].rule in case["accepted"], [item.rule for item in findings]
    else:
        assert not [item.rule for item in findings if item.severity == "major"]
