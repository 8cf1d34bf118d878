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

Only root calls are looked at: `_busy` is set inside a root module, a backward pass (activation checkpointing calls
modules there) and a fetch of data. A root module without parameters (a criterion) has no phase of its own: between
the model's forward and backward its time is `loss`, elsewhere `other`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upshift.hook.patch import Patches
from upshift.measure.steps import StepRecord
from upshift.sites import LoaderArgs, LoaderReady, ModelSeen, Moment, OptimizerSeen, ProcessStart, Stage

#: An optimizer that did not step while another stepped this often no longer belongs to the global step.
FORGET_AFTER = 16

Rescue = Callable[[Any, tuple[str, ...], Exception], None]


@dataclass(slots=True)
class _Doubt:
    """Batches of a loader that has been used for evaluation, fetched with gradients on: for what, is seen later."""

    loader: int
    span_end: float
    """End of the evaluation before."""
    seconds: float = 0.0
    batches: int = 0
    epochs: int = 0


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
        window: float = 0.0,
    ) -> None:
        """
        Args:
            stage: the techniques.
            on_step: called at the end of every global step; its own time is in no step.
            window: with more than 0, `on_step` is called after so many seconds only, with the sums of the steps
                since; what is left at the end comes with `flush`.
            rescue: called when a technique raised around a forward call or before an optimizer step; returns to let
                the original path go on, or raises.
            on_loss: called with the scalar a backward call starts from (a float on the CPU, a detached tensor
                elsewhere); True means: skip this update.
        """
        self.stage = stage
        self.on_step = on_step
        self.rescue = rescue
        self.on_loss = on_loss
        self.scratch = scratch
        self.main_guard = main_guard
        self.window = window
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
        self._handles: list[Any] = []
        self._around: dict[int, tuple[tuple[tuple[str, Any], ...], bool]] = {}
        self._guards: dict[int, tuple[tuple[str, Any], ...]] = {}
        self._alive: dict[int, Any] = {}
        self._active: dict[int, int] = {}
        self._stepped: set[int] = set()
        self._iterators: dict[int, tuple[int, Any, Any]] = {}
        self._evaluation_loaders: set[int] = set()
        self._last_loader = 0
        self._until = self._last_boundary = 0.0
        self._fetch: tuple[int, float, float] | None = None
        self._doubt: _Doubt | None = None
        self._loader_numbers: dict[int, int] = {}
        self._opt_stack: list[tuple[int, float, float]] = []
        self._withheld: list[tuple[Any, Any]] = []
        self._busy = False
        self._in_data = False
        self._in_backward = False
        self._skip = False
        self._eval_trains: set[int] = set()
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
        self.span_modules: set[int] = set()
        self.steps = 0

    # -- installing ---------------------------------------------------------------------------------------------

    def install(self, torch: Any) -> None:
        """Patch torch. Call when torch has just been imported and nothing of the script has used it."""
        self._generator = torch.default_generator
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
        return self._loader_numbers.get(id(loader)) in self._evaluation_loaders or self.waited(loader)[1] == 0

    def waited(self, loader: Any) -> tuple[float, float]:
        """Seconds that training waited for this loader, and for how many batches."""
        seconds, batches = self.waits.get(self._loader_numbers.get(id(loader), 0), (0.0, 0.0))
        return seconds, batches

    # -- forward ------------------------------------------------------------------------------------------------

    def _patch_forward(self, torch: Any) -> None:
        original = torch.nn.Module.__call__
        now, ident, grad_enabled = time.perf_counter, threading.get_ident, torch.is_grad_enabled
        compiling = torch.compiler.is_compiling
        watch = self
        self._grad_enabled = grad_enabled
        self._is_tracing = torch.jit.is_tracing

        def __call__(module: Any, /, *args: Any, **kwargs: Any) -> Any:
            if watch._busy:
                return original(module, *args, **kwargs)
            if compiling() or ident() != watch.thread:
                return original(module, *args, **kwargs)
            found = watch._around.get(id(module))
            if found is None:
                found = watch._first_call(module, args, kwargs)
            around, trains = found
            if not trains:
                if watch.span_start:
                    return watch._call_criterion(original, module, args, kwargs)
                return original(module, *args, **kwargs)
            watch._busy = True
            start = now()
            outer, watch.inner = watch.inner, 0.0
            if grad_enabled() and (module.training or id(module) in watch._eval_trains):
                if watch.span_start:
                    watch._leave_span()
                if watch._last_loader:
                    watch._evaluation_loaders.discard(watch._last_loader)
                    watch._last_loader = 0
                    watch._fetch = None
            else:
                watch._open_span(start, module)
            try:
                if around:
                    return watch._call_around(original, around, module, args, kwargs)
                return original(module, *args, **kwargs)
            finally:
                watch._busy = False
                end = now()
                took = end - start
                if watch.span_start:
                    watch.span_end = end
                    watch.nograd_calls += 1
                else:
                    alone = took - watch.inner
                    watch.forward += alone
                    watch.accounted += alone
                    watch.forward_end = end
                    watch.gap_mark = watch.accounted
                    watch.calls += 1
                watch.inner = outer + took

        self.patches.set(torch.nn.Module, "__call__", _like(original, __call__))

    def _call_criterion(self, original: Any, module: Any, args: Any, kwargs: Any) -> Any:
        """A root module without parameters: only evaluation must go on being evaluation while it runs."""
        try:
            return original(module, *args, **kwargs)
        finally:
            if self.span_start and (self.span_modules or not self._grad_enabled()):
                self.span_end = time.perf_counter()
                self._doubt = None

    def _work_begins(self, now: float) -> None:
        """Start-up ends with the first batch fetched, model called, backward pass or step."""
        if self.first_work is None:
            self.first_work = self.last = now

    def _open_span(self, start: float, module: Any) -> None:
        """Work without gradients, or in evaluation mode, begins or goes on."""
        gradients = self._grad_enabled()
        fetch, self._fetch, self._doubt = self._fetch, None, None
        if fetch is not None:
            # The batch was fetched for this, not for training; a loader met so for the first time was taken for
            # the training loader. Without gradients it may still be a teacher's, before the student's forward.
            self._evaluation_loaders.add(fetch[0])
            if gradients and not self.span_start:
                self._count_data(fetch[0], -fetch[2], -1)
                start = fetch[1]
        if not self.span_start:
            self.span_start = start
        if gradients:
            self.span_modules.add(id(module))

    def _leave_span(self) -> None:
        """Training goes on. A batch fetched since the last evaluated one was fetched for training."""
        doubt = self._doubt
        if doubt is None:
            self._close_span()
            return
        self._doubt = None
        self.span_end = doubt.span_end
        self._close_span()
        self.epochs += doubt.epochs
        self._count_data(doubt.loader, doubt.seconds, doubt.batches)

    def _close_span(self) -> None:
        took = self.span_end - self.span_start
        self.nograd += took
        self.accounted += took
        self.span_start = 0.0
        self.span_modules.clear()

    def _first_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """A root module is called for the first time, or for the first time since a switch."""
        key = id(module)
        if self._is_tracing():
            return (), False  # what is recorded now is a graph, not a training
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
            tables = (watch._alive, watch._around, watch._guards, watch._active, watch.shapes, watch._loader_numbers)
            for table in tables:
                table.pop(key, None)
            for names in (watch._stepped, watch._eval_trains, watch.closures):
                names.discard(key)

        self._alive[key] = weakref.ref(owner, forget)

    def _call_around(self, original: Any, around: Any, module: Any, args: Any, kwargs: Any) -> Any:
        def call(*a: Any, **k: Any) -> Any:
            return original(module, *a, **k)

        for _, applied in reversed(around):
            call = _wrap(applied, call, module)
        if self._is_tracing():
            return original(module, *args, **kwargs)
        # So that dropout draws in the second attempt what it would have drawn in the first (CPU only).
        random = self._generator.get_state()
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.rescue(module, tuple(name for name, _ in around), error)
            self._generator.set_state(random)
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
            if watch.span_start or watch.first_work is None:
                watch._before_backward(start)
            if watch.forward_end:
                gap = start - watch.forward_end - (watch.accounted - watch.gap_mark)
                watch.loss += gap
                watch.accounted += gap
                watch.inner += gap
                watch.forward_end = 0.0
            value = _start_value(tensors, tensor_type)
            if value is not None:
                watch.losses.append(value)
                watch.loss_seen = True
                if watch.on_loss is not None and watch.on_loss(value):
                    watch._skip = True
            if kwargs.get("create_graph") or (len(args) > 2 and args[2]):
                watch.create_graph = True
            outer, watch.inner = watch.inner, 0.0
            busy, watch._busy = watch._busy, True
            watch._in_backward = True
            try:
                return original(tensors, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                watch._in_backward = False
                watch._busy = busy
                took = now() - start
                alone = took - watch.inner
                watch.backward += alone
                watch.accounted += alone
                watch.inner = outer + took

        def grad(*args: Any, **kwargs: Any) -> Any:
            if ident() != watch.thread or watch._in_backward:
                return original_grad(*args, **kwargs)
            watch.grad_only = True
            if kwargs.get("create_graph"):
                watch.create_graph = True
            start = now()
            outer, watch.inner = watch.inner, 0.0
            busy, watch._busy = watch._busy, True
            watch._in_backward = True
            try:
                return original_grad(*args, **kwargs)
            finally:
                watch._in_backward = False
                watch._busy = busy
                took = now() - start
                watch.backward += took - watch.inner
                watch.accounted += took - watch.inner
                watch.inner = outer + took

        self.patches.set(torch.autograd, "backward", _like(original, backward))
        self.patches.set(torch.autograd, "grad", _like(original_grad, grad))

    def _before_backward(self, start: float) -> None:
        """A backward pass ends evaluation."""
        self._work_begins(start)
        if self.span_start:
            # A backward right after a forward in eval mode: these modules are trained in eval mode.
            self._eval_trains |= self.span_modules
            self._leave_span()

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
            key = watch._loader_numbers.get(id(loader), 0)
            if not key:
                key = watch._number_loader(loader)
                watch.stage.raise_site(LoaderReady(loader=loader, scratch=watch.scratch))
            outer, watch.inner = watch.inner, 0.0
            busy, watch._busy = watch._busy, True
            try:
                iterator = original_iter(loader)
                # The loader of a `for` loop may have no other owner; one that owns its iterator is not kept by it.
                kept = None if getattr(loader, "persistent_workers", False) else loader
                watch._keep_iterator(iterator, key, kept)
                return iterator
            finally:
                watch._busy = busy
                watch._data_done(start, outer, now(), key, grad_enabled(), 0, 1)

        def __next__(iterator: Any) -> Any:
            if watch._in_data or ident() != watch.thread:
                return original_next(iterator)
            found = watch._iterators.get(id(iterator))
            key = found[0] if found is not None else 0
            start = now()
            outer, watch.inner = watch.inner, 0.0
            busy, watch._busy = watch._busy, True
            watch._in_data = True
            try:
                return original_next(iterator)
            finally:
                watch._in_data = False
                watch._busy = busy
                watch._last_loader = key
                watch._data_done(start, outer, now(), key, grad_enabled(), 1, 0)

        self.patches.set(loader_class, "__init__", _like(original_init, __init__))
        self.patches.set(loader_class, "__iter__", _like(original_iter, __iter__))
        self.patches.set(iterator_class, "__next__", _like(original_next, __next__))

    def _number_loader(self, loader: Any) -> int:
        """A number for what is known of this loader; its iterators may outlive it."""
        if id(loader) not in self._alive:
            self._remember(loader)
        self.loaders.append(weakref.ref(loader))
        number = self._loader_numbers[id(loader)] = len(self.loaders)
        return number

    def _keep_iterator(self, iterator: Any, number: int, loader: Any) -> None:
        key = id(iterator)

        def forget(_: Any, table: dict[int, Any] = self._iterators) -> None:
            table.pop(key, None)

        self._iterators[key] = (number, loader, weakref.ref(iterator, forget))

    def _data_done(self, start: float, outer: float, end: float, key: int, grad: bool, batch: int, epoch: int) -> None:
        took = end - start
        alone = took - self.inner
        self.inner = outer + took
        if not grad or key in self._evaluation_loaders:
            if not self.span_start:
                self.span_start = self.span_end = start
            if grad:
                doubt = self._doubt = self._doubt or _Doubt(key, self.span_end)
                doubt.seconds += alone
                doubt.batches += batch
                doubt.epochs += epoch
            self.span_end = end
            return
        if self.span_start:
            self._leave_span()
        self.epochs += epoch
        self._count_data(key, alone, batch)
        self._fetch = (key, start, alone) if batch else None

    def _count_data(self, key: int, seconds: float, batches: int) -> None:
        self.accounted += seconds
        self.data += seconds
        self.batches += batches
        wait = self.waits.get(key)
        if wait is None:
            wait = self.waits[key] = [0.0, 0.0]
        wait[0] += seconds
        wait[1] += batches

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
            if watch.span_start:
                watch._leave_span()
            key = id(optimizer)
            if watch._opt_stack:
                watch._drop_left_behind()
            guards = watch._guards.get(key)
            if guards is None:
                watch._work_begins(start)
                guards = watch._first_step(optimizer, args, kwargs)
            for name, applied in guards:
                try:
                    applied.before_step(optimizer)
                except Exception as error:
                    watch.rescue(optimizer, (name,), error)
            if watch._skip:
                watch._withhold(optimizer)
            watch._opt_stack.append((key, start, watch.inner))
            watch.inner = 0.0

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            stack = watch._opt_stack
            if not stack or ident() != watch.thread:
                return
            end = now()
            key = id(optimizer)
            if stack[-1][0] != key:
                return
            _, start, outer = stack.pop()
            took = end - start
            alone = took - watch.inner
            watch.optimizer += alone
            watch.accounted += alone
            watch.inner = outer + took
            if watch._withheld:
                watch._give_back()
            if stack:
                watch._inside(key)
            elif watch._is_boundary(key):
                watch.index += 1
                watch.steps += 1
                watch._skip = False
                watch._last_boundary = end
                if end >= watch._until:
                    watch._boundary(end)

        self.patches.set(torch.optim.Optimizer, "__init__", _like(original_init, __init__))
        self._handles.append(register_optimizer_step_pre_hook(before))
        self._handles.append(register_optimizer_step_post_hook(after))

    def _drop_left_behind(self) -> None:
        """Keep only steps that still run: one that raised has left its entry behind."""
        running = _running_steps()
        kept = []
        for entry in self._opt_stack:
            if entry[0] in running:
                running.remove(entry[0])
                kept.append(entry)
        self._opt_stack = kept

    def _inside(self, key: int) -> None:
        """This optimizer stepped inside the step of another (a wrapper): it ends no step of its own."""
        self._active.pop(key, None)
        self._stepped.discard(key)

    def _withhold(self, optimizer: Any) -> None:
        """Without gradients a step changes nothing; they are given back after it, since scripts may log them."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None

    def _give_back(self) -> None:
        for parameter, gradient in self._withheld:
            if parameter.grad is None:
                parameter.grad = gradient
        self._withheld.clear()

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
            if self._stepped:
                self._stepped.clear()
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

    def flush(self) -> None:
        """Hand over the steps of a window under way."""
        if self.steps:
            self._boundary(self._last_boundary)

    def _boundary(self, end: float) -> None:
        if self.span_start:
            self._leave_span()
        record = StepRecord(
            self.index - 1,
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
            self.steps,
        )
        self._until = end + self.window
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

        wrapper = _like(original, save)
        self.patches.set(torch, "save", wrapper)
        # Under its own name too, so that it can still be pickled by reference.
        if getattr(torch.serialization, "save", None) is original:
            self.patches.set(torch.serialization, "save", wrapper)


def _like(original: Any, wrapper: Any) -> Any:
    """Name, signature and documentation of what is wrapped."""
    return functools.update_wrapper(wrapper, original)


def _start_value(tensors: Any, tensor_type: Any) -> Any:
    """The scalar a backward call starts from: a float on the CPU, a detached tensor elsewhere; None if there is none.

    Several scalars count as their sum, which is what is differentiated.
    """
    if isinstance(tensors, tensor_type):
        try:
            value = tensors.item() if tensors.is_cpu else _scalar(tensors)
        except (RuntimeError, TypeError, NotImplementedError):
            return None
        return value if type(value) is float or tensors.is_cpu is False else None
    if not isinstance(tensors, (tuple, list)) or not tensors:
        return None
    values = [_start_value(item, tensor_type) if isinstance(item, tensor_type) else None for item in tensors]
    return None if any(value is None for value in values) else sum(values)


def _scalar(tensor: Any) -> Any:
    """A scalar on a device, without a graph; None if it is none."""
    return tensor.detach() if tensor.numel() == 1 and tensor.is_floating_point() else None


def _running_steps() -> list[int]:
    """Ids of the optimizers whose `step` is under way above the one about to begin, read off the call stack."""
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename.endswith("optimizer.py"):
            arguments = frame.f_locals.get("args")
            if isinstance(arguments, tuple) and arguments:
                found.append(id(arguments[0]))
        frame = frame.f_back
    return found[1:]


def _wrap(applied: Any, call: Any, module: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return applied.around(call, module, args, kwargs)

    return wrapped
