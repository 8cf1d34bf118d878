"""Trials whose truth is known: something is planted in one arm by an argument of the script, not by a technique.

The search is the real one: it is handed a plan and a runner. The plan names `planted`, and `Planting` stands before the
real runner and turns that entry into arguments for the script, so that no technique has to pretend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from upshift.measure.updates import Precision
from upshift.records import Pairing
from upshift.records.plan import Setting
from upshift.search.confirm import confirm
from upshift.search.duel import ArmFailed, ArmPlan, Duel, Ended
from upshift.search.selftest.result import Truth
from upshift.sites import Numerics
from upshift.sites.runner import Child, ChildSpec, Runner

#: The entry of a plan whose settings become arguments.
PLANTED = "planted"

TINY = Path(__file__).parent / "scripts" / "tiny.py"

#: Steps both arms have made before they are compared.
WARM = 12

#: Phases a plan may act on where nothing is known of it.
ANYWHERE = frozenset(("data", "forward", "backward", "optimizer", "other"))


def tiny(*arguments: str, seed: int = 0) -> ChildSpec:
    """The built-in script with these arguments."""
    return ChildSpec(mode="arm", target=str(TINY), arguments=arguments, seed=seed)


def planted(**settings: Setting) -> ArmPlan:
    """A plan that only adds `--key value` to the arguments of the script."""
    return {PLANTED: dict(settings)}


class Planting:
    """A Runner that hands what is planted to the script, and the rest of the plan to another runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def start(self, spec: ChildSpec, *, name: str = "") -> Child:
        """Start a child whose arguments end with what is planted: there the last one wins."""
        plan = dict(spec.plan)
        more: list[str] = []
        for key, value in plan.pop(PLANTED, {}).items():
            more += [f"--{key.replace('_', '-')}", str(value)]
        spec = msgspec.structs.replace(spec, plan=plan, arguments=(*spec.arguments, *more))
        return self._runner.start(spec, name=name)


class Twins:
    """Two processes of one script that differ in nothing, decided upon again and again."""

    def __init__(self, make: Callable[[], Duel]) -> None:
        self._make = make
        self._duel: Duel | None = None

    def decide(self, seconds: float, *, early: bool = True) -> tuple[str, Pairing | None]:
        """One decision of its own, in at most so many seconds; whatever is not `no change` is an error.

        Args:
            early: decide as soon as possible, as screening does; otherwise look once, as confirmation does.

        Raises:
            ArmFailed, Ended: see `Duel`.
        """
        if self._duel is None:
            self._duel = self._make()
            self._duel.start({})
            self._duel.start({})
            self._duel.level(WARM)
        return self._duel.fight(seconds, decide=early)

    def renew(self) -> None:
        """A fresh candidate process: two processes may differ for good, by where their memory happens to lie."""
        if self._duel is not None:
            self._duel.replace(1, {})
            self._duel.go(self._duel.arms[1], WARM)

    def close(self) -> None:
        """End both processes."""
        if self._duel is not None:
            self._duel.close()
            self._duel = None


def truth(name: str, runner: Runner, spec: ChildSpec, plan: ArmPlan, seconds: float, *,
          numerics: Numerics, precision: Precision = "float32", has_dropout: bool = False, seed: int = 0
          ) -> Truth:  # fmt: skip
    """Put a plan whose truth is known through the real confirmation; a trial that cannot be made says why.

    Args:
        numerics, precision: what the plan claims to do to the numbers.
    """
    try:
        found = confirm(
            lambda: Duel(Planting(runner), spec, timeout=300.0, patience=600.0, seed=seed),
            plan,
            seconds,
            numerics=numerics,
            precision=precision,
            live={},
            has_dropout=has_dropout,
            steps_per_epoch=None,
            fills=False,
            targets=ANYWHERE,
            say=lambda text: None,
        )
    except (ArmFailed, Ended) as error:
        return Truth(name=name, kept=False, shown=False, decision="", reason="", seconds=seconds, failure=str(error))
    return Truth(
        name=name,
        kept=found.decision == "faster" and found.proof.passed,
        shown=found.proof.passed,
        decision=found.decision,
        reason=found.proof.reason,
        seconds=seconds,
        rung=found.proof.rung,
        steps=found.proof.steps,
        pairing=found.pairing,
    )
