"""The parts of a job, built for this process: model, optimizer, schedule, data, techniques."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from upshift.engine.averages import Average
from upshift.engine.data import Batch, Data, Part, open_data
from upshift.engine.job import Job
from upshift.engine.lengths import Span
from upshift.engine.memory import is_out_of_memory
from upshift.engine.metrics import Metrics
from upshift.engine.order import spans
from upshift.engine.parameters import build_optimizer
from upshift.engine.preflight import preflight
from upshift.engine.randomness import seed_everything
from upshift.engine.schedules import bind
from upshift.engine.settings import Execution
from upshift.errors import UsageError
from upshift.sites import (
    BackwardSeen,
    LoaderArgs,
    LoaderReady,
    LossFunctionSeen,
    ModelSeen,
    OptimizerSeen,
    ProcessStart,
    Stage,
)
from upshift.techniques import registry

if TYPE_CHECKING:
    import torch

    from upshift.engine.group import Group


class Parts:
    """Everything that is built from a job, in one process."""

    def __init__(self, job: Job, settings: Execution, group: Group, say: Callable[[str, str, str], None],
                 outside: dict[str, str] | None = None) -> None:  # fmt: skip
        """
        Args:
            say: told what a technique did: kind, name, text.
            outside: what came of techniques that act on the environment only.

        Raises:
            UsageError: parts of the job do not fit together.
        """
        self.job, self.settings, self.group = job, settings, group
        self._tell = say
        self.stage = Stage(registry.in_order(settings.plan), say)
        self.stage.outside = dict(outside or {})
        self.stage.raise_site(ProcessStart(device=group.device.type))
        seed_everything(job.seed)
        self.model = _checked_model(job).to(group.device)
        if job.start:
            load_start(self.model, job.start)
        self.wrapped = group.wrap(self.model, settings.parallel)
        self.parameters = [item for item in self.model.parameters() if item.requires_grad]
        if not self.parameters:
            raise UsageError("the model has no parameter that is trained.", remedy="Check requires_grad.")
        self.optimizer: torch.optim.Optimizer = build_optimizer(job.optimizer, self.model, job.parameters)
        self.data = self._open(job.train_data, job.global_batch, shuffle=job.shuffle)
        self._evaluation: Data | None = None
        self.span = Span(self._steps(), job.global_batch, self.data.length)
        self.average = Average(self.model, job.average, self.span) if job.average is not None else None
        self.schedule = bind(job.schedule, self.optimizer, self.span)
        self.loss = self._loss()
        self._keys: tuple[str, ...] | None = None
        self.asked: Callable[[], bool] = lambda: False
        """Whether somebody asked to stop."""
        self.description = self._describe()
        if group.world > 1:
            digest = _digest([repr(item) for item in sorted(self.description.items())])
            preflight(group, digest=digest, parameters=sum(item.numel() for item in self.parameters))
            # Ranks draw different numbers from here on (dropout), one process those of an ordinary script.
            seed_everything(job.seed, group.rank + 1)

    # -- data ---------------------------------------------------------------------------------------------------

    def _say_data(self, text: str) -> None:
        self._tell("data", "", text)

    def _open(self, data: Any, batch: int, *, shuffle: bool, training: bool = True) -> Data:
        job, stage = self.job, self.stage
        group = self.group
        return open_data(
            data, seed=job.seed, global_batch=batch, micro_batch=self.settings.micro_batch if training else None,
            collate=job.collate, shuffle=shuffle, training=training, draws=job.draws,
            device=group.device if group.device.type != "cpu" else None, rank=group.rank, world=group.world,
            loader=self.settings.loader, agree=group.sum if group.world > 1 else None, say=self._say_data,
            on_args=lambda arguments: stage.raise_site(LoaderArgs(args=arguments, main_guard=True)),
            on_loader=lambda loader: stage.raise_site(LoaderReady(loader=loader)),
        )  # fmt: skip

    def _steps(self) -> int | None:
        if self.job.steps is not None:
            return self.job.steps
        return self.data.steps * (self.job.epochs or 0) if self.data.steps is not None else None

    def evaluation_parts(self) -> Iterator[Any]:
        """The evaluation data, each sample once over all ranks."""
        job = self.job
        if self._evaluation is None:
            size = job.eval_batch or min(job.global_batch, 1024)
            self._evaluation = self._open(job.eval_data, size, shuffle=False, training=False)
        for batch in self._evaluation.epoch(0, 0):
            for part in self.in_step(batch, self._evaluation.micro_batch):
                # Sharded weights are gathered in every forward pass: all ranks make as many.
                if part.n or self._sharded:
                    yield part

    @property
    def _sharded(self) -> bool:
        return self.group.world > 1 and self.settings.parallel == "fsdp2"

    def in_step(self, batch: Batch, micro_batch: int) -> list[Part]:
        """The parts of a batch; with sharded weights as many as the rank with the most has, by parts of weight 0."""
        parts = list(batch.parts)
        if self._sharded:
            world = self.group.world
            most = max(len(spans(batch.samples, world, rank, micro_batch)) for rank in range(world))
            parts += [parts[-1]._replace(weight=0.0, n=0)] * (most - len(parts))
        return parts

    # -- optimisation -------------------------------------------------------------------------------------------

    def new_metrics(self) -> Metrics:
        """Metrics at zero."""
        return Metrics(self.job.metrics, self.group)

    def _loss(self) -> Callable[[Any, Any], Any]:
        loss = self.job.loss
        if loss is None:
            return _own_loss
        import torch

        if loss is not torch.nn.functional.cross_entropy:
            return loss
        self.stage.raise_site(LossFunctionSeen(name="cross_entropy"))
        if not self.stage.losses_for("cross_entropy"):
            return loss

        def with_techniques(output: Any, target: Any) -> Any:
            arguments = {"input": output, "target": target}
            if torch.is_grad_enabled():
                for _, applied in self.stage.losses_for("cross_entropy"):
                    applied.before_loss(arguments)
            return loss(**arguments)

        return with_techniques

    # -- techniques ---------------------------------------------------------------------------------------------

    def model_seen(self, batch: Any) -> None:
        """The model is about to be called for the first time."""
        args, kwargs = self._arguments(batch)
        self.stage.raise_site(BackwardSeen(module=self.model, optimizer=self.optimizer, agree=self.group.sum))
        self.stage.raise_site(ModelSeen(module=self.model, args=args, kwargs=kwargs, training=True))

    def optimizer_seen(self) -> tuple[Callable[[Any], None], ...]:
        """The optimizer is about to make its first step; what acts before each of its steps."""
        self.stage.raise_site(OptimizerSeen(optimizer=self.optimizer))
        return tuple(self._safe_step(name, applied) for name, applied in self.stage.steps_for(self.optimizer))

    def _safe_step(self, name: str, applied: Any) -> Callable[[Any], None]:
        def before_step(optimizer: Any) -> None:
            if name not in self.stage.names:
                return
            try:
                applied.before_step(optimizer)
            except Exception as error:
                self.stage.remove(name, f"{type(error).__name__}: {error}")

        return before_step

    def without_techniques(self, reason: str) -> None:
        """Take all techniques off for good."""
        for name in self.stage.names:
            self.stage.remove(name, reason)

    def _come_off(self, names: tuple[str, ...], error: Exception) -> None:
        if self.asked():
            raise error  # who asked to stop may have ended the compiler; the technique is not to blame
        for name in names:
            self.stage.remove(name, f"{type(error).__name__}: {error}")

    def free_memory(self) -> None:
        """Give cached memory back before smaller micro-batches are tried."""
        import torch

        for item in self.parameters:
            item.grad = None
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- forward ------------------------------------------------------------------------------------------------

    def make_forward(self) -> Callable[[Any], tuple[Any, Any]]:
        """`forward(batch) -> (output, what the loss is computed against)`, techniques included."""
        call: Callable[..., Any] = self.wrapped
        around = self.stage.forward_for(self.model)
        if around:
            call = Rescued(self.wrapped, self.model, around, self._come_off)
        own = self.job.forward
        if own is not None:
            model = self.wrapped if call is self.wrapped else _Called(self.model, call)
            return lambda batch: (own(cast("torch.nn.Module", model), batch), batch)

        def forward(batch: Any) -> tuple[Any, Any]:
            if type(batch) in (tuple, list):
                if len(batch) == 2:
                    return call(batch[0]), batch[1]
                if len(batch) > 2:
                    return call(*batch[:-1]), batch[-1]
                return call(batch[0]), batch[0]
            args, kwargs = self._arguments(batch)
            return call(*args, **kwargs), batch

        return forward

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with."""
        if isinstance(batch, dict):
            if self._keys is None:
                self._keys = _keys(self.model, batch)
            return (), {key: batch[key] for key in self._keys}
        if isinstance(batch, (tuple, list)):
            return tuple(batch[:-1] if len(batch) > 1 else batch), {}
        return (batch,), {}

    # -- who it is ----------------------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with, so that a resumed run is the same training."""
        job = self.job
        shapes = [f"{name} {tuple(item.shape)} {item.dtype}" for name, item in self.model.named_parameters()]
        buffers = [f"{name} {tuple(item.shape)}" for name, item in self.model.named_buffers()]
        return {
            "seed": job.seed,
            "global_batch": job.global_batch,
            "shuffle": job.shuffle,
            "samples": self.data.length,
            "model": _digest([*shapes, *buffers]),
            "parameters": sum(item.numel() for item in self.model.parameters()),
            "optimizer": type(self.optimizer).__name__,
            "optimizer settings": _settings(self.optimizer),
            "loss": _name(job.loss),
            "schedule": _name(job.schedule),
            "clip": job.clip,
            "average": repr(job.average) if job.average is not None else "",
        }

    def close(self) -> None:
        """Undo what the techniques did, stop loader workers."""
        self.data.close()
        if self._evaluation is not None:
            self._evaluation.close()
        self.stage.close()


class _Called:
    """The model, called through the techniques, for a job that calls it itself."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self.__dict__.update(_model=model, _call=call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)


class Rescued:
    """Calls of a model through techniques; when one raises they come off, and the call is made once more without."""

    def __init__(self, plain: Callable[..., Any], model: Any, around: Sequence[tuple[str, Any]],
                 come_off: Callable[[tuple[str, ...], Exception], None]) -> None:  # fmt: skip
        import torch

        self._plain, self._come_off = plain, come_off
        self._names = tuple(name for name, _ in around)
        self._generator = torch.default_generator
        self._call: Callable[..., Any] | None = plain
        for _, applied in reversed(around):
            self._call = _around(applied, self._call, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return self._plain(*args, **kwargs)
        # So that dropout draws in the second attempt what it would have drawn in the first (CPU only).
        random = self._generator.get_state()
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._call = None
            self._come_off(self._names, error)
            self._generator.set_state(random)
            return self._plain(*args, **kwargs)


def _around(applied: Any, call: Any, model: Any) -> Callable[..., Any]:
    around = applied.around
    return lambda *args, **kwargs: around(call, model, args, kwargs)


def _own_loss(output: Any, batch: Any) -> Any:
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None:
        raise UsageError(
            f"the job has no loss, and the output of the model ({type(output).__name__}) has none either.",
            remedy="Give the job a loss: loss=F.cross_entropy.",
        )
    return found


def _checked_model(job: Job) -> torch.nn.Module:
    import torch

    model = job.model()
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"model() returned a {type(model).__name__}, not a torch.nn.Module.",
            remedy="Hand over the function that builds the model.",
        )
    return model


def load_start(model: torch.nn.Module, source: str) -> None:
    """Start from these weights.

    Raises:
        UsageError: they do not fit the model.
    """
    from pathlib import Path

    from upshift.checkpoint.foreign import load_weights

    weights = load_weights(Path(source))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"the weights in {source} do not fit the model: {error}", remedy="Check start=.") from None


def _keys(model: Any, batch: dict[str, Any]) -> tuple[str, ...]:
    """The keys of a batch that the model takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return tuple(batch)
    found = tuple(key for key in batch if key in parameters)
    if not found:
        raise UsageError(
            f"none of the keys of a batch ({', '.join(map(str, batch))}) is an argument of the model's forward "
            f"({', '.join(parameters)}).",
            remedy="Give the job a forward: forward=lambda model, batch: model(batch['x']).",
        )
    return found


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _settings(optimizer: Any) -> str:
    plain = {
        key: value for key, value in optimizer.defaults.items() if isinstance(value, (bool, int, float, str, tuple))
    }
    # How a step is computed is a matter of execution.
    return repr({key: plain[key] for key in sorted(plain) if key not in ("fused", "foreach", "capturable")})


def _name(value: Any) -> str:
    if value is None:
        return ""
    name = getattr(value, "__qualname__", "")
    return f"{getattr(value, '__module__', '')}.{name}" if name else repr(value)[:200]
