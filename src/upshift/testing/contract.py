"""The contract every technique owes, as reusable checks over the registry.

Each `check_*` function takes a technique and raises `AssertionError` with the reason where the contract is broken. They
run tiny models on the CPU through `sites.Stage`, as an adapter does. A third party parametrises over `names()` of its
own techniques:

    @pytest.mark.parametrize("check", contract.CHECKS)
    def test_contract(check):
        check(MyTechnique())

The oracles: a `bitwise` technique must give the very losses and parameters of plain training; `rounding` and `reseeds`
are compared with the same training in float64, dropout off, within what the lower precision explains.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upshift.records.codec import dumps
from upshift.records.measurement import (
    PHASES,
    Anatomy,
    LoaderFacts,
    Measurement,
    ModelFacts,
    OptimizerFacts,
    Phase,
    ScriptFacts,
)
from upshift.records.plan import Setting
from upshift.records.quantity import Quantity, unknown
from upshift.sites import (
    ModelSeen,
    NoEffect,
    Numerics,
    OptimizerSeen,
    ProcessEnv,
    ProcessStart,
    Stage,
    Technique,
    Verdict,
)
from upshift.sites.moments import SITES
from upshift.techniques import registry

if TYPE_CHECKING:
    import torch

STEPS = 5
MODELS = ("mlp", "conv", "attention")

#: Largest relative errors against float64 that a dtype explains in five steps: of a parameter's update, of the loss.
#: Seen: plain float32 3e-5 and 2e-7; bfloat16 products 0.1 (Adam divides small gradients by themselves) and 3e-4.
TOLERANCE = {"float32": (5e-4, 1e-5), "bfloat16": (0.25, 5e-3)}


# -- what there is -----------------------------------------------------------------------------------------------------


def present() -> tuple[str, ...]:
    """Registered techniques whose module exists."""
    result = []
    for name in registry.names():
        module = registry.BUILT_IN.get(name, "").partition(":")[0]
        if not module or importlib.util.find_spec(module) is not None:
            result.append(name)
    return tuple(result)


def unregistered() -> tuple[set[str], set[str]]:
    """Files of the folder that are not in the registry, and entries of the registry without a file."""
    folder = Path(registry.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
    entries = {target.partition(":")[0].rpartition(".")[2] for target in registry.BUILT_IN.values()}
    return files - entries, entries - files


def defaults(technique: Technique) -> dict[str, Setting]:
    """The settings of a plan that names the technique and nothing else."""
    return {key: spec.default for key, spec in technique.card.settings.items()}


# -- a measurement to judge --------------------------------------------------------------------------------------------


def _known(value: float, unit: str) -> Quantity:
    return Quantity(value=value, unit=unit, n=20)


def measurement(**facts: Any) -> Measurement:
    """A plausible measurement of a small training on a two-core CPU; `facts` replace fields of its `ScriptFacts`."""
    shares = {"data": 0.1, "forward": 0.3, "loss": 0.02, "backward": 0.4, "optimizer": 0.15, "other": 0.03}
    phases = tuple(
        Phase(name=name, seconds=_known(0.03 * shares.get(name, 0.0), "s"), share=_known(shares.get(name, 0.0), "1"))
        for name in PHASES
    )
    values: dict[str, Any] = {
        "models": (
            ModelFacts(
                name="Net",
                parameters=10_000,
                dtypes=("float32",),
                device="cpu",
                layers={"Conv2d": 2, "Linear": 2, "Dropout": 1},
                input_shapes=((8, 3, 8, 8),),
            ),
        ),
        "optimizers": (OptimizerFacts(name="AdamW", parameters=10_000, tensors=8, device="cpu", dtypes=("float32",)),),
        "loaders": (
            LoaderFacts(
                name="DataLoader", dataset="Data", training=True, workers=0, batch_size=8, samples=64, iterable=False
            ),
        ),
        "attention": True,
        "loss_seen": True,
        "threads": 2,
        "cores": 2,
        "main_guard": True,
    }
    values.update(facts)
    anatomy = Anatomy(
        step=_known(0.03, "s"),
        phases=phases,
        steps_seen=40,
        warmup_steps=5,
        warmup=_known(0.5, "s"),
        startup=_known(2.0, "s"),
        evaluation=unknown("s"),
        checkpointing=unknown("s"),
        micro_batches=_known(1, "1"),
        samples=_known(8, "1"),
    )
    return Measurement(
        script="train.py",
        arguments=(),
        created="2026-01-01T00:00:00Z",
        anatomy=anatomy,
        facts=ScriptFacts(**values),
    )


# -- a training to act on ----------------------------------------------------------------------------------------------


def build(kind: str, dtype: torch.dtype | None = None, dropout: float = 0.0) -> torch.nn.Module:
    """A tiny model: `mlp`, `conv` or `attention`.

    Parameters are drawn in float32 and then cast, so that all dtypes start alike. No parameter has a gradient of zero
    in exact arithmetic (as a bias before a normalisation has): Adam would blow its rounding up to a full step.
    """
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 48, bias=False)
            self.out = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """(batch, 12, 16) -> (batch, 4)."""
            q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(7)
    if kind == "mlp":
        net: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 4))
    elif kind == "conv":
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 9, 4),
        )
    elif kind == "attention":
        net = Attention()
    else:
        raise ValueError(f"no such model: {kind!r}")
    return net if dtype is None else net.to(dtype)


_SHAPES = {"mlp": (8, 16), "conv": (8, 3, 8, 8), "attention": (8, 12, 16)}


def batch(kind: str, step: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step; the same for every arm and dtype."""
    import torch

    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(_SHAPES[kind], generator=generator)
    y = torch.randint(0, 4, (8,), generator=generator)
    return (x if dtype is None else x.to(dtype)), y


@dataclass
class Session:
    """A minimal adapter: raises the compute sites of one training, as the hook does for a script."""

    stage: Stage | None
    kind: str
    dtype: torch.dtype | None = None
    optimizer_name: str = "AdamW"

    def __post_init__(self) -> None:
        import torch

        if self.stage is not None:
            self.stage.raise_site(ProcessEnv(env={}))
            self.stage.raise_site(ProcessStart(device="cpu"))
        self.module = build(self.kind, self.dtype)
        arguments: dict[str, Any] = {"lr": 1e-3} if self.optimizer_name != "SGD" else {"lr": 1e-2, "momentum": 0.9}
        self.optimizer: Any = getattr(torch.optim, self.optimizer_name)(self.module.parameters(), **arguments)
        self.steps = 0
        self._seen: set[int] = set()

    def call(self, x: torch.Tensor) -> Any:
        """The model's output, through whatever acts around its call."""
        if self.stage is None:
            return self.module(x)
        if id(self.module) not in self._seen:
            self._seen.add(id(self.module))
            self.stage.raise_site(ModelSeen(module=self.module, args=(x,), training=self.module.training))
        call: Callable[..., Any] = self.module
        for _, applied in reversed(self.stage.forward_for(self.module)):
            call = _around(applied, call, self.module)
        return call(x)

    def step(self) -> float:
        """One training step; returns the loss."""
        import torch

        x, y = batch(self.kind, self.steps, self.dtype)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.call(x), y)
        torch.autograd.backward(loss)
        if self.stage is not None:
            if id(self.optimizer) not in self._seen:
                self._seen.add(id(self.optimizer))
                self.stage.raise_site(OptimizerSeen(optimizer=self.optimizer))
            for _, applied in self.stage.steps_for(self.optimizer):
                applied.before_step(self.optimizer)
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def parameters(self) -> dict[str, torch.Tensor]:
        """A copy of the model's state."""
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}


def _around(applied: Any, call: Callable[..., Any], module: torch.nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: applied.around(call, module, args, kwargs)


@dataclass
class Heard:
    """What the stage said."""

    said: list[tuple[str, str, str]]

    def __call__(self, kind: str, name: str, text: str) -> None:
        self.said.append((kind, name, text))

    def failures(self) -> list[tuple[str, str, str]]:
        """Techniques that raised, or could not be undone."""
        return [item for item in self.said if item[0] in ("failed", "off")]


@contextlib.contextmanager
def staged(technique: Technique, settings: dict[str, Setting] | None = None) -> Iterator[tuple[Stage, Heard]]:
    """A stage with this technique alone; closed at the end."""
    heard = Heard([])
    stage = Stage([(technique, {**defaults(technique), **(settings or {})})], heard)
    try:
        yield stage, heard
    finally:
        stage.close()
        broken = [item for item in heard.said if item[0] == "failed"]
        assert not broken, f"close failed: {broken}"


@contextlib.contextmanager
def _same_random() -> Iterator[None]:
    """Leave the global random streams as they were found."""
    import torch

    python, cpu = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)


def variants(technique: Technique) -> list[dict[str, Setting]]:
    """Settings worth testing: the defaults, each choice, and the candidates for a two-core CPU."""
    result: list[dict[str, Setting]] = [{}]
    for key, spec in technique.card.settings.items():
        result += [{key: choice} for choice in spec.choices if choice != spec.default]
        if isinstance(spec.default, bool):
            result.append({key: not spec.default})
    for item in technique.check(measurement()).candidates:
        if item not in result and item != defaults(technique):
            result.append(dict(item))
    return result


# -- global state ------------------------------------------------------------------------------------------------------


def snapshot() -> dict[str, Any]:
    """Global state of torch that a technique could leave changed."""
    import torch
    from torch.backends import cuda, cudnn

    flags: Any = cuda
    small = torch.full((4,), 1e-20) * torch.full((4,), 1e-20)
    wide = torch.full((1 << 18,), 1e-20)
    return {
        "threads": torch.get_num_threads(),
        "denormal": (bool((small != 0).all()), int(torch.count_nonzero((wide * wide).view(torch.int32)))),
        "sdp": (
            flags.flash_sdp_enabled(),
            flags.math_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
            flags.cudnn_sdp_enabled(),
        ),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "default dtype": torch.get_default_dtype(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "grad": torch.is_grad_enabled(),
        "classes": {
            cls.__qualname__: {name: id(value) for name, value in vars(cls).items() if not name.startswith("__abc")}
            for cls in (torch.nn.Module, torch.Tensor, torch.utils.data.DataLoader, torch.optim.AdamW)
        },
    }


def _module_state(module: torch.nn.Module) -> dict[str, Any]:
    """Identity, layout and attributes of everything in a module."""
    return {
        "parameters": {name: (id(item), item.stride(), item.dtype) for name, item in module.named_parameters()},
        "buffers": {name: (id(item), item.dtype) for name, item in module.named_buffers()},
        "attributes": {
            name: sorted(key for key in vars(item) if key != "_compiled_call_impl")
            for name, item in module.named_modules()
        },
        "hooks": {
            name: sum(len(value) for key, value in vars(item).items() if key.endswith("_hooks"))
            for name, item in module.named_modules()
        },
        "compiled": [name for name, item in module.named_modules() if getattr(item, "_compiled_call_impl", None)],
        "classes": {name: type(item).__qualname__ for name, item in module.named_modules()},
    }


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


# -- the checks --------------------------------------------------------------------------------------------------------


def check_card(technique: Technique) -> None:
    """The card is complete, and its settings' defaults obey their own rules."""
    card = technique.card
    assert card.name and card.summary and card.source, f"{card.name}: name, summary and source are owed"
    assert card.sites and set(card.sites) <= set(SITES), f"unknown sites: {set(card.sites) - set(SITES)}"
    assert set(card.targets) <= set(PHASES), f"unknown phases: {set(card.targets) - set(PHASES)}"
    assert card.targets and card.tested_on, "the phases it acts on and the devices it ran on are owed"
    assert isinstance(card.numerics, Numerics)
    for key, spec in card.settings.items():
        assert spec.doc, f"setting {key} has no description"
        assert not spec.problem(spec.default), f"default of {key}: {spec.problem(spec.default)}"
        assert spec.problem(object()), f"setting {key} accepts anything"
        if spec.choices:
            wrong = "no such choice" if isinstance(spec.default, str) else -12345
            assert spec.problem(wrong), f"setting {key} accepts what is not among its choices"
    assert isinstance(technique.numerics(defaults(technique), measurement().facts), Numerics)
    assert not set(card.after) & set(card.conflicts), "a technique cannot come after one it excludes"


def check_relations(technique: Technique) -> None:
    """`after` and `conflicts` name known techniques; the order of the registry obeys `after`."""
    card, known = technique.card, registry.names()
    for other in (*card.after, *card.conflicts):
        assert other in known, f"{card.name} refers to {other}, which is not registered"
        assert other != card.name, f"{card.name} refers to itself"
    if card.name in known:
        for other in card.after:
            assert known.index(other) < known.index(card.name), f"{card.name} must be applied after {other}"


def check_pure(technique: Technique) -> None:
    """`check` reads the measurement, changes nothing, answers the same twice, and proposes only valid settings."""
    for facts in _WORLDS:
        seen = measurement(**facts)
        before, world = dumps(seen), snapshot()
        first, second = technique.check(seen), technique.check(seen)
        assert isinstance(first, Verdict) and first == second, "check is not deterministic"
        assert dumps(seen) == before, "check changed the measurement"
        assert snapshot() == world, "check changed global state"
        assert first.reason, "a verdict gives its reason"
        assert first.gain is None or first.gain > 0, "a predicted speed-up is positive"
        assert first.gain is None or first.rests_on, "a predicted gain says what it rests on"
        for item in first.candidates:
            for key, value in item.items():
                assert key in technique.card.settings, f"candidate sets {key}, which the card does not have"
                problem = technique.card.settings[key].problem(value)
                assert not problem, f"candidate {key}={value!r}: {problem}"


_WORLDS: tuple[dict[str, Any], ...] = (
    {},
    {"models": (), "optimizers": (), "loaders": ()},
    {"device": "cuda:0", "attention": False},
    {"autocast": True, "grad_scaler": True, "create_graph": True, "distributed": True},
    {"threads": 0, "cores": 0},
    {"bf16_native": False, "flush_denormal": True, "allocator": "tcmalloc"},
)


def check_nothing_seen(technique: Technique) -> None:
    """Where no model, optimizer or loader was seen, nothing that acts on one applies."""
    acts_on = set(technique.card.sites) - {"process_env", "process_start"}
    if not acts_on or "process_start" in technique.card.sites:
        return
    verdict = technique.check(measurement(models=(), optimizers=(), loaders=(), attention=False))
    assert not verdict.applies, f"applies to a script without anything to act on: {verdict.reason}"


def check_restores(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """After `close` (also a second one) global flags, classes, param groups and modules are as before."""
    import torch

    if technique.card.one_off:  # torch patches classes of its own at its first compilation, for good
        with _same_random():
            torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    for kind in MODELS:
        with _same_random():
            Session(None, kind).step()  # torch itself wraps `step` of an optimizer class at its first instance
            world = snapshot()
            heard = Heard([])
            stage = Stage([(technique, {**defaults(technique), **(settings or {})})], heard)
            plain = Session(None, kind)
            modules, groups = _module_state(plain.module), _groups(plain.optimizer)
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
            after = _module_state(session.module)
            for part in ("attributes", "hooks", "compiled", "classes"):
                assert after[part] == modules[part], f"{part} of the module were not restored"
            for name, (_, stride, dtype) in modules["parameters"].items():
                assert after["parameters"][name][1:] == (stride, dtype), f"layout or dtype of {name} was not restored"
            assert _groups(session.optimizer) == groups, "param_groups were not restored"
            now = snapshot()
            assert now == world, f"global state was not restored: {[key for key in now if now[key] != world[key]]}"


def check_identity(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """Parameters keep their identity, so that optimizers, schedulers and averages built before go on working."""
    for kind in MODELS:
        with _same_random(), staged(technique, settings) as (stage, _):
            session = Session(stage, kind)
            before = {name: id(item) for name, item in session.module.named_parameters()}
            session.step()
            assert {name: id(item) for name, item in session.module.named_parameters()} == before


def check_saving(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """While applied, the model can be pickled and copied, and its checkpoint loads in plain torch."""
    import torch

    for kind in MODELS:
        with _same_random(), staged(technique, settings) as (stage, _):
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
        assert _groups(plain.optimizer) == _groups(Session(None, kind).optimizer), "the checkpoint carries its settings"
        plain.step()


def _assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    import torch

    assert list(found) == list(expected), "keys differ"
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs"


def check_oracle(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """Bitwise: losses and final parameters of plain training. Otherwise: close to the same training in float64."""
    import torch

    chosen = {**defaults(technique), **(settings or {})}
    for kind in MODELS:
        for optimizer in ("AdamW", "SGD"):
            with _same_random():
                plain = Session(None, kind, optimizer_name=optimizer)
                start = plain.parameters()
                plain_losses = [plain.step() for _ in range(STEPS)]
                with staged(technique, settings) as (stage, heard):
                    session = Session(stage, kind, optimizer_name=optimizer)
                    losses = [session.step() for _ in range(STEPS)]
                    assert not heard.failures(), heard.said
                    found = session.parameters()
                if technique.numerics(chosen, ScriptFacts()) is Numerics.BITWISE:
                    assert losses == plain_losses, f"{kind}: losses differ: {losses} and {plain_losses}"
                    _assert_equal(found, plain.parameters())
                    continue
                exact = Session(None, kind, dtype=torch.float64, optimizer_name=optimizer)
                exact_losses = [exact.step() for _ in range(STEPS)]
                allowed, of_loss = TOLERANCE["bfloat16" if technique.card.name == "bf16" else "float32"]
                for ours, reference in zip(losses, exact_losses, strict=True):
                    assert abs(ours - reference) <= of_loss * abs(reference), f"{kind}: {ours} is not {reference}"
                for name, reference_end in exact.module.named_parameters():
                    moved = reference_end.detach() - start[name].double()
                    error = (found[name].double() - start[name].double() - moved).norm() / moved.norm()
                    assert float(error) <= allowed, f"{kind}/{optimizer}: update of {name} is off by {float(error):.3g}"


def check_switching(technique: Technique, settings: dict[str, Setting] | None = None) -> None:
    """A live technique that is switched off leaves the plain path, bit for bit; others refuse to be switched."""
    import torch

    if technique.card.switchable != "live":
        return
    for kind in MODELS:
        with _same_random(), staged(technique, settings) as (stage, heard):
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


def check_says_nothing_done(technique: Technique) -> None:
    """Applied a second time to the same object, or to an empty one, it either acts or says why not; it never raises."""
    import torch

    with _same_random(), staged(technique) as (stage, heard):
        empty = torch.nn.Identity()
        stage.raise_site(ProcessEnv(env={}))
        stage.raise_site(ProcessStart())
        stage.raise_site(ModelSeen(module=empty, args=(torch.ones(2),)))
        assert not heard.failures(), heard.said
        for name, reason in stage.effects().items():
            acted = name in stage.acted
            assert acted or reason, f"{name} neither acted nor gave a reason"
        if "model_created" in technique.card.sites and "process_start" not in technique.card.sites:
            outcome = technique.at(ModelSeen(module=empty, args=(torch.ones(2),)), defaults(technique))
            assert outcome is None or isinstance(outcome, NoEffect), "acts on a module without parameters"


CHECKS: tuple[Callable[[Technique], None], ...] = (
    check_card,
    check_relations,
    check_pure,
    check_nothing_seen,
    check_says_nothing_done,
)

#: Checks that train, for each of `variants`.
TRAINING_CHECKS: tuple[Callable[[Technique, dict[str, Setting] | None], None], ...] = (
    check_restores,
    check_identity,
    check_saving,
    check_oracle,
    check_switching,
)
