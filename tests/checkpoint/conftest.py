"""A folder in memory for tests that sync thousands of times: what is tested is the order of calls, not the disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder on a memory filesystem where there is one, else `tmp_path`."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="upshift-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
