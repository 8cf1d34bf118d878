"""The contract suite for pytest: a class to subclass, with a test for every promise and every setting worth testing.

    from my_package.calm_gc import CalmGc
    from upshift.testing.suite import TechniqueContract

    class TestCalmGc(TechniqueContract):
        technique = CalmGc

Nothing has to be loaded for it. `upshift.testing.plugin` runs the same tests without a test module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from upshift.records.plan import Setting
from upshift.sites import Card, Technique
from upshift.testing import contract


class TechniqueContract:
    """Every promise of a technique as a test. Subclasses say which: `technique` is its class."""

    technique: ClassVar[Callable[[], Technique]]

    def techniques(self, config: pytest.Config) -> Sequence[Technique]:
        """What is under test; read once, when the tests are collected."""
        return (type(self).technique(),)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per technique, check and setting."""
        found = self.techniques(metafunc.config)
        if "settings" in metafunc.fixturenames:
            cases = [
                pytest.param(item, settings, id="-".join([_name(item), *(f"{k}={v}" for k, v in settings.items())]))
                for item in found
                for settings in _variants(item)
            ]
            metafunc.parametrize(("subject", "settings"), cases)
        else:
            metafunc.parametrize("subject", found, ids=_name)
        if "check" in metafunc.fixturenames:
            checks = contract.TRAINING_CHECKS if "settings" in metafunc.fixturenames else contract.CHECKS
            metafunc.parametrize("check", checks, ids=lambda check: check.__name__.removeprefix("check_"))

    def test_registered(self, subject: Technique) -> None:
        """upshift finds it by the name on its card."""
        _hold(contract.check_registered, subject)

    def test_promise(self, subject: Technique, check: Callable[[Technique], None]) -> None:
        """A promise that needs no training."""
        _hold(check, subject)

    def test_training(
        self,
        subject: Technique,
        settings: dict[str, Setting],
        check: Callable[[Technique, dict[str, Setting] | None], None],
    ) -> None:
        """A promise that a training shows."""
        _hold(check, subject, settings)


def _name(technique: Technique) -> str:
    card = getattr(technique, "card", None)
    return card.name if isinstance(card, Card) else type(technique).__name__


def _variants(technique: Technique) -> list[dict[str, Setting]]:
    try:
        return contract.variants(technique)
    except Exception:
        return [{}]  # what is wrong with the card or with `check` is for the tests to say, not for the collection


def _hold(check: Callable[..., None], technique: Technique, *arguments: Any) -> None:
    """Say a broken promise in words. A technique that raises keeps its traceback."""
    broken = ""
    try:
        check(technique, *arguments)
    except AssertionError as error:
        broken = f"{_name(technique)} breaks a promise: {error}"
    if broken:  # outside of `except`: the words, without the traceback they came with
        promise = (check.__doc__ or check.__name__).partition("\n")[0]
        pytest.fail(f"{broken}\n\nThe promise: {promise}", pytrace=False)
