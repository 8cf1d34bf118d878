"""Put a hooked process together: the controller, its techniques, the watch."""

from __future__ import annotations

from types import ModuleType

from upshift.hook.controller import Controller
from upshift.hook.script import has_main_guard
from upshift.hook.watch import Watch
from upshift.sites import ProcessStart, Stage
from upshift.sites.runner import ChildSpec
from upshift.techniques import registry


def assemble(spec: ChildSpec, controller: Controller, outside: dict[str, str]) -> Watch:
    """A watch, not yet installed, that reports to `controller`.

    Args:
        outside: what came of techniques that only change the environment (name -> why no effect).
    """
    stage = Stage(registry.in_order(spec.plan), controller.say)
    stage.outside = outside
    watch = Watch(
        stage,
        controller.on_step,
        rescue=controller.rescue,
        on_loss=controller.on_loss,
        scratch=spec.scratch,
        main_guard=not spec.module and has_main_guard(spec.target),
        window=controller.window,
    )
    controller.attach(stage, watch)
    return watch


def torch_is_here(torch: ModuleType, controller: Controller) -> None:
    """Patch torch, which has just been imported, and let the techniques act."""
    controller.watch.install(torch)
    controller.stage.raise_site(ProcessStart())
    controller.torch_ready(torch)
