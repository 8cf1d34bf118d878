"""Watch an unmodified script: see every step and its phases, and let techniques act.

What is patched, and why there:
    torch.autograd.backward         both entry points end here (`Tensor.backward` calls it); the loss is its argument
    torch.nn.Module.__call__        at class level, so that pickling and `type(model)` stay as they were
    DataLoader.__init__/__iter__, _BaseDataLoaderIter.__next__
    torch.optim.Optimizer.__init__  to know how many optimizers make one global step
    optimizer step hooks            torch's own; `optimizer.step` itself is left alone (schedulers wrap it)
    torch.save                      to tell checkpoints from training

Times are self-times: a phase does not contain a phase nested in it (a closure's backward inside `optimizer.step`).
No global module hooks, dispatch modes or profilers in the steady state.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from upshift.hook.patch import Patches
from upshift.measure.steps import StepRecord
from upshift.sites import LoaderArgs, LoaderReady, ModelSeen, Moment, OptimizerSeen, ProcessStart, Stage

#: An optimizer that did not step while another stepped this often no longer belongs to the global step.
FORGET_AFTER = 16

Rescue = Callable[[Any, tuple[str, ...], Exception], None]


class Watch:
    """The state machine behind the patches. One per process; inert in forked children and other threads."""

    def __init__(
        self,
        stage: Stage,
        on_step: Callable[[StepRecord], None],
        *,
        rescue: Rescue,
        on_loss: Callable[[Any], bool] | None = None,
        scratch: str = "",
        main_guard: bool = False,
    ) -> None:
        """
        Args:
            stage: the techniques.
            on_step: called at the end of every global step; its own time is in no step.
            rescue: called when a technique raised around a forward call; returns to let the original path go on,
                or raises.
            on_loss: called with the scalar a backward call starts from; True means: skip this update.
        """
        self.stage = stage
        self.on_step = on_step
        self.rescue = rescue
        self.on_loss = on_loss
        self.scratch = scratch
        self.main_guard = main_guard
        self.patches = Patches()
        self.pid = os.getpid()
        self.thread = threading.main_thread().ident or 0
        self.thread_known = False
        self.born = time.perf_counter()
        self.first_work: float | None = None
        self.index = 0
        self.last = self.born
        self.create_graph = False
        self.grad_only = False
        self.loss_seen = False
        self.models: list[weakref.ref[Any]] = []
        self.shapes: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.loaders: list[weakref.ref[Any]] = []
        self.waits: dict[int, list[float]] = {}
        self.optimizers: list[weakref.ref[Any]] = []
        self.closures: set[int] = set()
        self.events = 0
        self._handles: list[Any] = []
        self._around: dict[int, tuple[tuple[tuple[str, Any], ...], bool]] = {}
        self._guards: dict[int, tuple[tuple[str, Any], ...]] = {}
        self._alive: dict[int, Any] = {}
        self._active: dict[int, int] = {}
        self._stepped: set[int] = set()
        self._iterators: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._evaluation_loaders: set[int] = set()
        self._last_loader = 0
        self._opt_stack: list[tuple[float, float]] = []
        self._depth = 0
        self._in_data = False
        self._in_backward = False
        self._skip = False
        self._eval_trains = False
        self._reset()

    def _reset(self) -> None:
        """Start a new step."""
        self.data = self.h2d = self.forward = self.loss = self.backward = self.optimizer = self.sync = 0.0
        self.nograd = self.checkpoint = 0.0
        self.nograd_calls = self.batches = self.calls = self.epochs = 0
        self.losses: list[Any] = []
        self.inner = 0.0
        self.accounted = 0.0
        self.forward_end = 0.0
        self.gap_mark = 0.0
        self.span_start = 0.0
        self.span_end = 0.0
        self.span_with_grad = False

    # -- installing ---------------------------------------------------------------------------------------------

    def install(self, torch: ModuleType) -> None:
        """Patch torch. Call when torch has just been imported and nothing of the script has used it."""
        self._patch_forward(torch)
        self._patch_backward(torch)
        self._patch_loader(torch)
        self._patch_optimizer(torch)
        self._patch_save(torch)
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        """Take every patch out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.patches.close()

    def refresh(self) -> None:
        """Read anew what acts on which module and optimizer (after a switch or a removal)."""
        self._around.clear()
        self._guards.clear()

    def past_moments(self) -> list[Moment]:
        """The moments a technique added now would have seen, for what is still alive."""
        moments: list[Moment] = [ProcessStart()]
        for model in self.models:
            if (module := model()) is not None:
                moments.append(ModelSeen(module=module, training=module.training))
        for reference in self.optimizers:
            if (optimizer := reference()) is not None:
                moments.append(OptimizerSeen(optimizer=optimizer))
        return moments

    def evaluation_only(self, loader: Any) -> bool:
        """Whether this loader's batches were only ever used without gradients."""
        return id(loader) in self._evaluation_loaders or self.waits.get(id(loader), [0.0, 0.0])[1] == 0

    # -- forward ------------------------------------------------------------------------------------------------

    def _patch_forward(self, torch: Any) -> None:
        original = torch.nn.Module.__call__
        now, ident, grad_enabled = time.perf_counter, threading.get_ident, torch.is_grad_enabled
        compiling = torch.compiler.is_compiling
        watch = self

        def __call__(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            if watch._depth or ident() != watch.thread or compiling():
                return original(module, *args, **kwargs)
            watch._depth = 1
            found = watch._around.get(id(module))
            if found is None:
                found = watch._first_call(module, args, kwargs)
            around, trains = found
            start = now()
            outer, watch.inner = watch.inner, 0.0
            gradients = grad_enabled()
            if trains:
                if gradients and (module.training or watch._eval_trains):
                    if watch.span_start:
                        watch._close_span()
                    watch._evaluation_loaders.discard(watch._last_loader)
                else:
                    watch._open_span(start, gradients)
            try:
                if around:
                    return watch._call_around(original, around, module, args, kwargs)
                return original(module, *args, **kwargs)
            finally:
                watch._depth = 0
                end = now()
                took = end - start
                alone = took - watch.inner
                watch.inner = outer + took
                watch.events += 1
                if watch.span_start:
                    watch.span_end = end
                    watch.nograd_calls += 1
                    watch.accounted += alone
                else:
                    watch.forward += alone
                    watch.accounted += alone
                    watch.forward_end = end
                    watch.gap_mark = watch.accounted
                    watch.calls += 1

        self.patches.set(torch.nn.Module, "__call__", __call__)

    def _work_begins(self, now: float) -> None:
        """Start-up ends with the first batch fetched or the first model called."""
        if self.first_work is None:
            self.first_work = self.last = now

    def _open_span(self, start: float, gradients: bool) -> None:
        if not self.span_start:
            self.span_start = start
        self.span_with_grad = gradients
        if self._last_loader:
            self._evaluation_loaders.add(self._last_loader)

    def _close_span(self) -> None:
        self.nograd += self.span_end - self.span_start
        self.span_start = 0.0

    def _first_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """A root module is called for the first time, or for the first time since a switch."""
        key = id(module)
        has_parameters = next(iter(module.parameters()), None) is not None
        if has_parameters and key not in self._alive:
            self._remember(module)
            self.models.append(weakref.ref(module))
            self.shapes[key] = tuple(
                tuple(int(size) for size in item.shape)
                for item in (*args, *kwargs.values())
                if hasattr(item, "shape") and hasattr(item, "dtype")
            )
            self._work_begins(time.perf_counter())
            self.stage.raise_site(ModelSeen(module=module, args=args, kwargs=kwargs, training=module.training))
        found = (self.stage.forward_for(module) if has_parameters else (), has_parameters)
        if not has_parameters and key not in self._alive:
            self._remember(module)
        self._around[key] = found
        return found

    def _remember(self, owner: Any) -> None:
        key = id(owner)

        def forget(_: Any, key: int = key, watch: Watch = self) -> None:
            for table in (watch._alive, watch._around, watch._guards, watch._active, watch.shapes):
                table.pop(key, None)
            watch._stepped.discard(key)

        self._alive[key] = weakref.ref(owner, forget)

    def _call_around(self, original: Any, around: Any, module: Any, args: Any, kwargs: Any) -> Any:
        def call(*a: Any, **k: Any) -> Any:
            return original(module, *a, **k)

        for _, applied in reversed(around):
            call = _wrap(applied, call, module)
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.rescue(module, tuple(name for name, _ in around), error)
            return original(module, *args, **kwargs)

    # -- backward -----------------------------------------------------------------------------------------------

    def _patch_backward(self, torch: Any) -> None:
        original = torch.autograd.backward
        original_grad = torch.autograd.grad
        now, ident = time.perf_counter, threading.get_ident
        watch = self
        tensor_type = torch.Tensor

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if ident() != watch.thread:
                if watch.thread_known or os.getpid() != watch.pid:
                    return original(tensors, *args, **kwargs)  # type: ignore[no-any-return]
                watch.thread = ident()
            watch.thread_known = True
            if watch._in_backward:
                return original(tensors, *args, **kwargs)  # type: ignore[no-any-return]
            start = now()
            if watch.span_start:
                # A backward right after a forward in eval mode: this script trains in eval mode.
                watch._eval_trains = watch._eval_trains or watch.span_with_grad
                watch._close_span()
            if watch.forward_end:
                gap = start - watch.forward_end - (watch.accounted - watch.gap_mark)
                watch.loss += gap
                watch.accounted += gap
                watch.forward_end = 0.0
            first = tensors if isinstance(tensors, tensor_type) else (tensors[0] if len(tensors) else None)
            if first is not None and first.numel() == 1:
                value = first if first.device.type == "cpu" else first.detach()
                watch.losses.append(value)
                watch.loss_seen = True
                if watch.on_loss is not None and watch.on_loss(value):
                    watch._skip = True
            if kwargs.get("create_graph") or (len(args) > 2 and args[2]):
                watch.create_graph = True
            outer, watch.inner = watch.inner, 0.0
            watch._in_backward = True
            try:
                return original(tensors, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                watch._in_backward = False
                took = now() - start
                alone = took - watch.inner
                watch.backward += alone
                watch.accounted += alone
                watch.inner = outer + took
                watch.events += 1

        def grad(*args: Any, **kwargs: Any) -> Any:
            if ident() != watch.thread or watch._in_backward:
                return original_grad(*args, **kwargs)
            watch.grad_only = True
            if kwargs.get("create_graph"):
                watch.create_graph = True
            start = now()
            outer, watch.inner = watch.inner, 0.0
            watch._in_backward = True
            try:
                return original_grad(*args, **kwargs)
            finally:
                watch._in_backward = False
                took = now() - start
                watch.backward += took - watch.inner
                watch.accounted += took - watch.inner
                watch.inner = outer + took

        backward.__wrapped__ = original  # type: ignore[attr-defined]
        grad.__wrapped__ = original_grad  # type: ignore[attr-defined]
        self.patches.set(torch.autograd, "backward", backward)
        self.patches.set(torch.autograd, "grad", grad)

    # -- data ---------------------------------------------------------------------------------------------------

    def _patch_loader(self, torch: Any) -> None:
        loader_class = torch.utils.data.DataLoader
        iterator_class = torch.utils.data.dataloader._BaseDataLoaderIter
        original_init, original_iter = loader_class.__init__, loader_class.__iter__
        original_next = iterator_class.__next__
        signature = inspect.signature(original_init)
        now, ident, grad_enabled = time.perf_counter, threading.get_ident, torch.is_grad_enabled
        watch = self

        def __init__(loader: Any, *args: Any, **kwargs: Any) -> None:
            try:
                bound = dict(signature.bind(loader, *args, **kwargs).arguments)
            except TypeError:
                return original_init(loader, *args, **kwargs)  # type: ignore[no-any-return]
            bound.pop("self", None)
            if ident() == watch.thread:
                watch.stage.raise_site(
                    LoaderArgs(args=bound, subclass=type(loader) is not loader_class, main_guard=watch.main_guard)
                )
            return original_init(loader, **bound)  # type: ignore[no-any-return]

        def __iter__(loader: Any) -> Any:
            if ident() != watch.thread:
                return original_iter(loader)
            start = now()
            watch._work_begins(start)
            key = id(loader)
            if key not in watch._alive:
                watch._remember(loader)
                watch.loaders.append(weakref.ref(loader))
                watch.stage.raise_site(LoaderReady(loader=loader, scratch=watch.scratch))
            outer, watch.inner = watch.inner, 0.0
            try:
                iterator = original_iter(loader)
                watch._iterators[iterator] = key
                return iterator
            finally:
                watch._data_done(start, outer, now(), key, grad_enabled(), epoch=True)

        def __next__(iterator: Any) -> Any:
            if watch._in_data or ident() != watch.thread:
                return original_next(iterator)
            key = watch._iterators.get(iterator, 0)
            start = now()
            outer, watch.inner = watch.inner, 0.0
            watch._in_data = True
            try:
                return original_next(iterator)
            finally:
                watch._in_data = False
                watch._last_loader = key
                watch.events += 1
                watch._data_done(start, outer, now(), key, grad_enabled(), batch=True)

        __init__.__wrapped__ = original_init  # type: ignore[attr-defined]
        self.patches.set(loader_class, "__init__", __init__)
        self.patches.set(loader_class, "__iter__", __iter__)
        self.patches.set(iterator_class, "__next__", __next__)

    def _data_done(
        self, start: float, outer: float, end: float, key: int, grad: bool, *, batch: bool = False, epoch: bool = False
    ) -> None:
        took = end - start
        alone = took - self.inner
        self.inner = outer + took
        self.accounted += alone
        if not grad or key in self._evaluation_loaders:
            if not self.span_start:
                self.span_start = start
            self.span_end = end
            return
        if self.span_start:
            self._close_span()
        self.data += alone
        self.batches += batch
        self.epochs += epoch
        wait = self.waits.get(key)
        if wait is None:
            wait = self.waits[key] = [0.0, 0.0]
        wait[0] += alone
        wait[1] += batch

    # -- optimizer ----------------------------------------------------------------------------------------------

    def _patch_optimizer(self, torch: Any) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        original_init = torch.optim.Optimizer.__init__
        now, ident = time.perf_counter, threading.get_ident
        watch = self

        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            original_init(optimizer, *args, **kwargs)
            if id(optimizer) not in watch._alive:
                watch._remember(optimizer)
                watch._active[id(optimizer)] = 0

        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            if ident() != watch.thread:
                return
            start = now()
            if len(watch._opt_stack) > 4:  # a step that raised left its entry behind
                watch._opt_stack.clear()
            key = id(optimizer)
            guards = watch._guards.get(key)
            if guards is None:
                guards = watch._first_step(optimizer, args, kwargs)
            for _, applied in guards:
                applied.before_step(optimizer)
            if watch._skip:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            watch._opt_stack.append((start, watch.inner))
            watch.inner = 0.0

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            if ident() != watch.thread or not watch._opt_stack:
                return
            end = now()
            start, outer = watch._opt_stack.pop()
            took = end - start
            alone = took - watch.inner
            watch.optimizer += alone
            watch.accounted += alone
            watch.inner = outer + took
            watch.events += 1
            if not watch._opt_stack and watch._is_boundary(id(optimizer)):
                watch._boundary(end)

        __init__.__wrapped__ = original_init  # type: ignore[attr-defined]
        self.patches.set(torch.optim.Optimizer, "__init__", __init__)
        self._handles.append(register_optimizer_step_pre_hook(before))
        self._handles.append(register_optimizer_step_post_hook(after))

    def _first_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        key = id(optimizer)
        known = any(ref() is optimizer for ref in self.optimizers)
        if not known:
            if key not in self._alive:
                self._remember(optimizer)
            self.optimizers.append(weakref.ref(optimizer))
            if len(args) > 1 or kwargs.get("closure") is not None:
                self.closures.add(key)
            self.stage.raise_site(OptimizerSeen(optimizer=optimizer))
        guards = self._guards[key] = self.stage.steps_for(optimizer)
        return guards

    def _is_boundary(self, key: int) -> bool:
        """Whether this optimizer step ends a global step: every optimizer in use has stepped since the last."""
        active = self._active
        active[key] = 0
        if len(active) == 1:
            return True
        self._stepped.add(key)
        for other in list(active):
            if other not in self._stepped:
                active[other] += 1
                if active[other] > FORGET_AFTER:
                    del active[other]
        if not self._stepped.issuperset(active):
            return False
        self._stepped.clear()
        return True

    def _boundary(self, end: float) -> None:
        if self.span_start:
            self._close_span()
        record = StepRecord(
            self.index,
            end - self.born,
            end - self.last,
            self.data,
            self.h2d,
            self.forward,
            self.loss,
            self.backward,
            self.optimizer,
            self.sync,
            self.nograd,
            self.nograd_calls,
            self.checkpoint,
            self.batches,
            self.epochs,
            self.calls,
            tuple(self.losses),
        )
        self.index += 1
        self._skip = False
        self._reset()
        try:
            self.on_step(record)
        finally:
            self.last = time.perf_counter()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _patch_save(self, torch: Any) -> None:
        original = torch.save
        now, ident = time.perf_counter, threading.get_ident
        watch = self

        def save(*args: Any, **kwargs: Any) -> Any:
            if ident() != watch.thread or watch.span_start:
                return original(*args, **kwargs)
            start = now()
            try:
                return original(*args, **kwargs)
            finally:
                took = now() - start
                watch.checkpoint += took
                watch.accounted += took
                watch.inner += took

        save.__wrapped__ = original  # type: ignore[attr-defined]
        self.patches.set(torch, "save", save)


def _wrap(applied: Any, call: Any, module: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return applied.around(call, module, args, kwargs)

    return wrapped
