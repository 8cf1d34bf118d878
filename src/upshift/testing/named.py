"""The test module that `upshift.testing.plugin` collects: the techniques named by `--upshift-technique`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from upshift.sites import Technique
from upshift.techniques import registry
from upshift.testing.suite import TechniqueContract


class TestNamed(TechniqueContract):
    """The contract of the techniques named on the command line."""

    def techniques(self, config: pytest.Config) -> Sequence[Technique]:
        """Those of the option."""
        return [registry.get(name) for name in config.getoption("--upshift-technique")]
