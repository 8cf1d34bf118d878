"""Every registered technique against the contract; and contract checks against techniques that break it."""

from __future__ import annotations

import pytest
import torch

from upshift.sites import Card, ModelSeen, NoEffect, Numerics, ProcessStart, Verdict
from upshift.sites.protocol import BaseApplied, SettingSpec
from upshift.techniques import registry
from upshift.testing import contract

NAMES = contract.present()


def cases():
    for name in NAMES:
        technique = registry.get(name)
        for settings in contract.variants(technique):
            label = "-".join([name, *(f"{key}={value}" for key, value in settings.items())])
            yield pytest.param(name, settings, id=label, marks=[pytest.mark.slow] if technique.card.one_off else [])


def test_every_file_of_the_folder_is_registered_and_every_entry_has_a_file():
    assert contract.unregistered() == (set(), set())


@pytest.mark.parametrize("name", NAMES)
def test_name_on_the_card_is_the_key_in_the_registry(name):
    assert registry.get(name).card.name == name


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, check):
    check(registry.get(name))


@pytest.mark.parametrize("check", contract.TRAINING_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "settings"), cases())
def test_training_contract(name, settings, check):
    check(registry.get(name), settings)


def test_cards_are_read_without_torch():
    import subprocess
    import sys

    code = (
        "import sys\nfrom upshift.techniques import registry\n"
        f"for name in {NAMES!r}: registry.get(name).card\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- the checks can fail ----------------------------------------------------------------------------------------------


class Bad:
    """A technique that does nothing wrong; each test below breaks one thing."""

    card = Card(
        name="bad",
        summary="x",
        source="y",
        sites=("process_start", "model_created", "optimizer_created"),
        numerics=Numerics.BITWISE,
        switchable="live",
        targets=("forward",),
    )

    def numerics(self, settings, facts):
        return self.card.numerics

    def check(self, seen):
        return Verdict(applies=True, reason="always")

    def at(self, moment, settings):
        return None


def test_a_harmless_technique_passes():
    for check in (*contract.CHECKS, *contract.TRAINING_CHECKS):
        check(Bad())


def test_wrong_default_is_found():
    class Wrong(Bad):
        card = Card(
            name="bad", summary="x", source="y", sites=("model_created",), numerics=Numerics.BITWISE,
            switchable="live", targets=("forward",), settings={"kind": SettingSpec("c", "doc", choices=("a", "b"))},
        )  # fmt: skip

    with pytest.raises(AssertionError, match="default of kind"):
        contract.check_card(Wrong())


def test_impure_check_is_found():
    class Impure(Bad):
        calls = 0

        def check(self, seen):
            Impure.calls += 1
            return Verdict(applies=True, reason=str(Impure.calls))

    with pytest.raises(AssertionError, match="deterministic"):
        contract.check_pure(Impure())


class Nothing(BaseApplied):
    def switch(self, on):
        pass


def test_flag_left_behind_is_found():
    class Leaves(Bad):
        def at(self, moment, settings):
            if isinstance(moment, ProcessStart):
                torch.set_float32_matmul_precision("medium")
                return Nothing()
            return None

    try:
        with pytest.raises(AssertionError, match="matmul"):
            contract.check_restores(Leaves())
    finally:
        torch.set_float32_matmul_precision("highest")


def test_instance_level_forward_is_found():
    class Patches(Bad):
        def at(self, moment, settings):
            if isinstance(moment, ModelSeen):
                forward = moment.module.forward
                moment.module.forward = lambda *args: forward(*args)
                return Nothing()
            return None

    with pytest.raises(AssertionError, match="attributes"):
        contract.check_restores(Patches())
    with pytest.raises(AttributeError, match="pickle"):
        contract.check_saving(Patches())


class Scaled(Nothing):
    def __init__(self, factor):
        self.factor = factor

    def around(self, call, module, args, kwargs):
        return call(*args, **kwargs) * self.factor


@pytest.mark.parametrize("numerics", [Numerics.BITWISE, Numerics.ROUNDING])
def test_changed_training_is_found(numerics):
    class Changes(Bad):
        card = Card(
            name="bad", summary="x", source="y", sites=("model_created",), numerics=numerics,
            switchable="live", targets=("forward",),
        )  # fmt: skip

        def at(self, moment, settings):
            return Scaled(1.01) if isinstance(moment, ModelSeen) else None

    with pytest.raises(AssertionError):
        contract.check_oracle(Changes())


def test_switch_that_does_not_switch_is_found():
    class Sticky(Bad):
        def at(self, moment, settings):
            if isinstance(moment, ModelSeen):
                moment.module.register_forward_hook(lambda module, args, output: output * 1.01)
                return Nothing()
            return None

    with pytest.raises(AssertionError, match="not the plain one"):
        contract.check_switching(Sticky())


def test_conflict_with_the_unknown_is_found():
    class Refers(Bad):
        card = Card(
            name="bad", summary="x", source="y", sites=("model_created",), numerics=Numerics.BITWISE,
            switchable="live", targets=("forward",), conflicts=("nobody",),
        )  # fmt: skip

    with pytest.raises(AssertionError, match="nobody"):
        contract.check_relations(Refers())


def test_no_effect_is_told():
    said = []
    from upshift.sites import Stage

    class Idle(Bad):
        def at(self, moment, settings):
            return NoEffect("nothing to do here") if isinstance(moment, ModelSeen) else None

    stage = Stage([(Idle(), {})], lambda *item: said.append(item))
    stage.raise_site(ModelSeen(module=torch.nn.Linear(1, 1)))
    assert stage.effects() == {"bad": "nothing to do here"} and not said
