"""The promises that a training shows: what is restored, kept and saved, and that the numbers are right.

The oracles: a `bitwise` technique must give the very losses and parameters of plain training; `rounding` and `reseeds`
are compared with the same training in float64, dropout off, within what the precision on the card explains. What
`changes_training` has no such reference: it must be the same each time, and finite.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from upshift.records.measurement import ScriptFacts
from upshift.records.plan import Setting
from upshift.sites import Numerics, Stage, Technique
from upshift.testing.seen import defaults
from upshift.testing.state import group_settings, module_state, snapshot
from upshift.testing.tiny import MODELS, Heard, Session, same_random, staged

if TYPE_CHECKING:
    import torch

STEPS = 5

#: Largest relative errors against float64 that a dtype explains in five steps: of a parameter's update, of the loss.
#: Seen: plain float32 3e-5 and 2e-7; bfloat16 products 0.1 (Adam divides small gradients by themselves) and 3e-4.
TOLERANCE = {"float32": (5e-4, 1e-5), "bfloat16": (0.25, 5e-3)}


def check_restores(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """After `close` (also a second one) global flags, classes, param groups and modules are as before."""
    import torch

    if technique.card.one_off:  # torch patches classes of its own at its first compilation, for good
        with same_random():
            torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    for kind in MODELS:
        with same_random():
            Session(None, kind).step()  # torch itself wraps `step` of an optimizer class at its first instance
            world = snapshot()
            heard = Heard([])
            stage = Stage([(technique, {**defaults(technique), **(settings or {})})], heard)
            plain = Session(None, kind)
            modules, groups = module_state(plain.module), group_settings(plain.optimizer)
            session = Session(stage, kind)
            names = list(session.module.state_dict())
            keys = list(session.optimizer.state_dict()["param_groups"][0])
            for _ in range(2):
                session.step()
            assert list(session.module.state_dict()) == names, "keys of state_dict changed while applied"
            assert list(session.optimizer.state_dict()["param_groups"][0]) == keys, "the optimizer's keys changed"
            applied = [item for items in stage._applied.values() for item in items]
            stage.close()
            for item in applied:
                item.close()
            assert not [item for item in heard.said if item[0] == "failed"], heard.said
            after = module_state(session.module)
            for part in ("attributes", "hooks", "compiled", "classes"):
                assert after[part] == modules[part], f"{part} of the module were not restored"
            for name, (_, stride, dtype) in modules["parameters"].items():
                assert after["parameters"][name][1:] == (stride, dtype), f"layout or dtype of {name} was not restored"
            assert group_settings(session.optimizer) == groups, "param_groups were not restored"
            now = snapshot()
            assert now == world, f"global state was not restored: {[key for key in now if now[key] != world[key]]}"


def check_identity(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """Parameters keep their identity, so that optimizers, schedulers and averages built before go on working."""
    for kind in MODELS:
        with same_random(), staged(technique, settings) as (stage, _):
            session = Session(stage, kind)
            before = {name: id(item) for name, item in session.module.named_parameters()}
            session.step()
            now = {name: id(item) for name, item in session.module.named_parameters()}
            assert now == before, f"parameters were replaced: {[key for key in now if now[key] != before.get(key)]}"


def check_saving(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """While applied, the model can be pickled and copied, and its checkpoint loads in plain torch."""
    import torch

    for kind in MODELS:
        with same_random(), staged(technique, settings) as (stage, _):
            session = Session(stage, kind)
            session.step()
            expected = session.parameters()
            file = io.BytesIO()
            torch.save({"model": session.module.state_dict(), "optimizer": session.optimizer.state_dict()}, file)
            twin = copy.deepcopy(session.module)
            if kind != "attention":  # whose class is local to a function
                again = pickle.loads(pickle.dumps(session.module))  # noqa: S301
                _assert_equal(again.state_dict(), expected)
            _assert_equal(twin.state_dict(), expected)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        plain = Session(None, kind)
        plain.module.load_state_dict(saved["model"], strict=True)
        plain.optimizer.load_state_dict(saved["optimizer"])
        _assert_equal(plain.module.state_dict(), expected)
        kept = group_settings(Session(None, kind).optimizer)
        assert group_settings(plain.optimizer) == kept, "the checkpoint carries its settings"
        plain.step()


def _assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    import torch

    assert list(found) == list(expected), "keys differ"
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs"


def check_oracle(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """Bitwise: losses and final parameters of plain training. Another training: the same twice, and finite.

    Otherwise: close to the same training in float64.
    """
    import torch

    chosen = {**defaults(technique), **(settings or {})}
    numerics = technique.numerics(chosen, ScriptFacts())
    if numerics is Numerics.CHANGES_TRAINING:
        _assert_repeatable(technique, settings)
        return
    for kind in MODELS:
        for optimizer in ("AdamW", "SGD"):
            with same_random():
                losses, found = _trained(technique, settings, kind, optimizer)
                plain = Session(None, kind, optimizer_name=optimizer)
                start = plain.parameters()
                plain_losses = [plain.step() for _ in range(STEPS)]
                if numerics is Numerics.BITWISE:
                    assert losses == plain_losses, f"{kind}: losses differ: {losses} and {plain_losses}"
                    _assert_equal(found, plain.parameters())
                    continue
                exact = Session(None, kind, dtype=torch.float64, optimizer_name=optimizer)
                exact_losses = [exact.step() for _ in range(STEPS)]
                bfloat16 = technique.card.precision == "bfloat16"
                allowed, of_loss = TOLERANCE["bfloat16" if bfloat16 else "float32"]
                for ours, reference in zip(losses, exact_losses, strict=True):
                    assert abs(ours - reference) <= of_loss * abs(reference), f"{kind}: {ours} is not {reference}"
                for name, reference_end in exact.module.named_parameters():
                    moved = reference_end.detach() - start[name].double()
                    error = (found[name].double() - start[name].double() - moved).norm() / moved.norm()
                    assert float(error) <= allowed, f"{kind}/{optimizer}: update of {name} is off by {float(error):.3g}"


def _trained(
    technique: Technique, settings: dict[str, Setting] | None, kind: str, optimizer: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final parameters of a training with the technique."""
    with staged(technique, settings) as (stage, heard):
        session = Session(stage, kind, optimizer_name=optimizer)
        losses = [session.step() for _ in range(STEPS)]
        assert not heard.failures(), heard.said
        return losses, session.parameters()


def _assert_repeatable(technique: Technique, settings: dict[str, Setting] | None) -> None:
    for kind in MODELS:
        with same_random():
            losses, found = _trained(technique, settings, kind, "AdamW")
            again, parameters = _trained(technique, settings, kind, "AdamW")
        assert all(map(math.isfinite, losses)), f"{kind}: losses are not finite: {losses}"
        assert again == losses, f"{kind}: losses differ from one run to the next: {losses} and {again}"
        _assert_equal(parameters, found)


def check_switching(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """A live technique that is switched off leaves the plain path, bit for bit; others refuse to be switched."""
    import torch

    if technique.card.switchable != "live":
        return
    for kind in MODELS:
        with same_random(), staged(technique, settings) as (stage, heard):
            session = Session(stage, kind)
            for on in (True, False, True):
                stage.switch([technique.card.name] if on else [])
                session.step()
            stage.switch([])
            plain = Session(None, kind)
            plain.module.load_state_dict(session.module.state_dict())
            plain.optimizer.load_state_dict(copy.deepcopy(session.optimizer.state_dict()))
            plain.steps = session.steps
            for _ in range(2):
                assert session.step() == plain.step(), f"{kind}: the path after switching off is not the plain one"
            for name, value in plain.module.state_dict().items():
                assert torch.equal(session.module.state_dict()[name], value), f"{kind}: {name} differs after switching"
            stage.switch([technique.card.name])
            session.step()
            assert not heard.failures(), heard.said


#: Checks that train, for each of `variants`.
TRAINING_CHECKS: tuple[Callable[[Technique, dict[str, Setting] | None], None], ...] = (
    check_restores,
    check_identity,
    check_saving,
    check_oracle,
    check_switching,
)
