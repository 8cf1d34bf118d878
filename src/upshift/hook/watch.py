"""Watch an unmodified script: see every step and its phases, and let techniques act.

What is patched, and why there:
    torch.autograd.backward         both entry points end here (`Tensor.backward` calls it); the loss is its argument
    torch.nn.Module.__call__        at class level, so that pickling and `type(model)` stay as they were
    DataLoader.__init__/__iter__, _BaseDataLoaderIter.__next__
    torch.optim.Optimizer.__init__  to know how many optimizers make one global step
    optimizer step hooks            torch's own; `optimizer.step` itself is left alone (schedulers wrap it)
    torch.save                      to tell checkpoints from training; techniques may act on what is written
    torch.nn.functional.cross_entropy  only for techniques that act on the loss function (`losses.py`)

Times are self-times: a phase does not contain a phase nested in it (a closure's backward inside `optimizer.step`).
No global module hooks, dispatch modes or profilers in the steady state.

Only root calls are looked at: `_busy` is set inside a root module, a backward pass (activation checkpointing calls
modules there) and a fetch of data. A root module without parameters (a criterion) has no phase of its own: between
the model's forward and backward its time is `loss`, elsewhere `other`.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import weakref
from typing import Any

from upshift.hook.books import Books
from upshift.hook.checkpoints import as_written, watch_safetensors
from upshift.hook.losses import watch_losses
from upshift.hook.peek import has_parameters, like, rows_of, running_steps, shapes_of, start_value
from upshift.sites import LoaderArgs, LoaderReady, LossFunctionSeen, ModelSeen, Moment, OptimizerSeen, ProcessStart


class Watch(Books):
    """The patches that write the books. One per process; inert in forked children and other threads."""

    __slots__ = ()

    # -- installing ---------------------------------------------------------------------------------------------

    def install(self, torch: Any) -> None:
        """Patch torch. Call when torch has just been imported and nothing of the script has used it."""
        self._generator = torch.default_generator
        self._patch_forward(torch)
        self._patch_backward(torch)
        self._patch_loader(torch)
        self._patch_optimizer(torch)
        self._patch_save(torch)
        if self.stage.listens(LossFunctionSeen.site):
            watch_losses(torch, self)
        if self.stage.listens("checkpoint"):
            watch_safetensors(self.stage, self.patches)
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
            if watch._asleep and watch._sleeps_on(module):
                watch._busy = True
                try:
                    return original(module, *args, **kwargs)
                finally:
                    watch._busy = False
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
                    watch.span_rows[id(module)] = watch.span_rows.get(id(module), 0.0) + rows_of(args, kwargs)
                else:
                    alone = took - watch.inner
                    watch.forward += alone
                    watch.accounted += alone
                    watch.forward_end = end
                    watch.gap_mark = watch.accounted
                    watch.calls += 1
                watch.inner = outer + took

        self.patches.set(torch.nn.Module, "__call__", like(original, __call__))

    def _sleeps_on(self, module: Any) -> bool:
        """Whether this root call is training, or a criterion; anything else wakes the books."""
        found = self._around.get(id(module))
        if found is not None and (
            not found[1] or (self._grad_enabled() and (module.training or id(module) in self._eval_trains))
        ):
            return True
        self._wake()
        return False

    def _call_criterion(self, original: Any, module: Any, args: Any, kwargs: Any) -> Any:
        """A root module without parameters: only evaluation must go on being evaluation while it runs."""
        try:
            return original(module, *args, **kwargs)
        finally:
            if self.span_start and (self.span_modules or not self._grad_enabled()):
                self.span_end = time.perf_counter()
                self._doubt = None

    def _first_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """A root module is called for the first time, or for the first time since a switch."""
        key = id(module)
        if self._is_tracing():
            return (), False  # what is recorded now is a graph, not a training
        trains = has_parameters(module)
        if trains and key not in self._alive:
            self._remember(module)
            self.models.append(weakref.ref(module))
            self.shapes[key] = shapes_of(args, kwargs)
            self._work_begins(time.perf_counter())
            self.stage.raise_site(ModelSeen(module=module, args=args, kwargs=kwargs, training=module.training))
        found = (self.stage.forward_for(module) if trains else (), trains)
        if not trains and key not in self._alive:
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
            if watch._asleep and not watch._busy and ident() == watch.thread:
                watch._busy = True
                try:
                    return original(tensors, *args, **kwargs)  # type: ignore[no-any-return]
                finally:
                    watch._busy = False
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
            value = start_value(tensors, tensor_type)
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

        self.patches.set(torch.autograd, "backward", like(original, backward))
        self.patches.set(torch.autograd, "grad", like(original_grad, grad))

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
            if watch._asleep:
                watch._wake()
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
            if watch._asleep:
                busy, watch._busy = watch._busy, True
                try:
                    return original_next(iterator)
                finally:
                    watch._busy = busy
            found = watch._iterators.get(id(iterator))
            key = found[0] if found is not None else 0
            start = now()
            outer, watch.inner = watch.inner, 0.0
            busy, watch._busy = watch._busy, True
            watch._in_data = True
            found_one = 0
            try:
                batch = original_next(iterator)
                found_one = 1
                return batch
            finally:
                # The end of an epoch takes time, too, but is no batch.
                watch._in_data = False
                watch._busy = busy
                watch._last_loader = key
                watch._data_done(start, outer, now(), key, grad_enabled(), found_one, 0)

        self.patches.set(loader_class, "__init__", like(original_init, __init__))
        self.patches.set(loader_class, "__iter__", like(original_iter, __iter__))
        self.patches.set(iterator_class, "__next__", like(original_next, __next__))

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
            if watch._asleep or ident() != watch.thread:
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
            if ident() != watch.thread:
                return
            key = id(optimizer)
            stack = watch._opt_stack
            if not stack:
                # Asleep, or woken inside this very step.
                if (watch._asleep or watch._woken) and watch._is_boundary(key):
                    (watch._step_counted if watch._asleep else watch._step_timed)(now())
                return
            end = now()
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
                watch._step_timed(end)

        self.patches.set(torch.optim.Optimizer, "__init__", like(original_init, __init__))
        self._handles.append(register_optimizer_step_pre_hook(before))
        self._handles.append(register_optimizer_step_post_hook(after))

    def _drop_left_behind(self) -> None:
        """Keep only steps that still run: one that raised has left its entry behind."""
        running = running_steps()
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
        self.may_sleep = False  # asleep, the two could not be told apart

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

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _patch_save(self, torch: Any) -> None:
        original = torch.save
        now, ident = time.perf_counter, threading.get_ident
        watch = self

        def save(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = as_written(watch.stage, "obj", args, kwargs)
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

        wrapper = like(original, save)
        self.patches.set(torch, "save", wrapper)
        # Under its own name too, so that it can still be pickled by reference.
        if getattr(torch.serialization, "save", None) is original:
            self.patches.set(torch.serialization, "save", wrapper)


def _wrap(applied: Any, call: Any, module: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return applied.around(call, module, args, kwargs)

    return wrapped
