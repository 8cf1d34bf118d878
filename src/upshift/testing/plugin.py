"""A pytest plugin that runs the contract suite on registered techniques, without a test module.

    pytest -p upshift.testing.plugin --upshift-technique calm_gc

It is loaded by `-p` only: an entry point `pytest11` would be imported by every pytest run in every environment that has
upshift, and most of those test something else.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The names of the techniques."""
    parser.getgroup("upshift").addoption(
        "--upshift-technique",
        action="append",
        default=[],
        metavar="NAME",
        help="run upshift's contract suite on this registered technique (may be repeated)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the suite; beside it only what was named on the command line.

    Raises:
        pytest.UsageError: there is no such technique, or it cannot be loaded.
    """
    names = config.getoption("--upshift-technique")
    if not names:
        return
    from upshift.errors import UpshiftError
    from upshift.techniques import registry

    try:
        for name in names:
            registry.get(name)
    except UpshiftError as error:
        raise pytest.UsageError(str(error)) from None
    module = str(Path(__file__).with_name("named.py"))
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [module]
    elif module not in config.args:
        config.args.append(module)
