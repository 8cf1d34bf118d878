"""What techniques must know of a script to say whether they apply, read off a watched process."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from upshift.hook.patch import Patches
from upshift.measure.facts import loader_facts, model_facts, optimizer_facts, process_facts
from upshift.records import Quantity, ScriptFacts

if TYPE_CHECKING:
    from upshift.hook.watch import Watch


class Traits:
    """Listens to what the script asks of torch itself: autocast, a gradient scaler, attention, seeds."""

    def __init__(self) -> None:
        self.patches = Patches()
        self.seen = {"autocast": False, "scaler": False, "attention": False, "seeded": False}

    def listen(self, torch: ModuleType) -> None:
        """From now on."""
        seen, patches = self.seen, self.patches
        autocast = torch.amp.autocast_mode.autocast
        enter = autocast.__enter__

        def __enter__(context: Any) -> Any:
            if getattr(context, "_enabled", False):
                seen["autocast"] = True
            return enter(context)

        patches.set(autocast, "__enter__", __enter__)
        scaler = torch.amp.GradScaler
        scale = scaler.scale

        def scale_seen(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this.is_enabled():
                seen["scaler"] = True
            return scale(this, *args, **kwargs)

        patches.set(scaler, "scale", scale_seen)
        attention = torch.nn.functional.scaled_dot_product_attention

        def attention_seen(*args: Any, **kwargs: Any) -> Any:
            seen["attention"] = True
            return attention(*args, **kwargs)

        patches.set(torch.nn.functional, "scaled_dot_product_attention", attention_seen)
        seed = torch.manual_seed

        def manual_seed(value: int) -> Any:
            seen["seeded"] = True
            return seed(value)

        patches.set(torch, "manual_seed", manual_seed)

    def close(self) -> None:
        """Take the patches out."""
        self.patches.close()


def script_facts(watch: Watch, traits: Traits, torch: Any, script: str) -> ScriptFacts:
    """Models, optimizers, loaders and the process, as seen so far.

    Args:
        script: file of the script; empty for a module.
    """
    models = []
    for reference in watch.models:
        module = reference()
        if module is not None:
            found = model_facts(module)
            models.append(msgspec.structs.replace(found, input_shapes=watch.shapes.get(id(module), ())))
    optimizers = []
    for reference in watch.optimizers:
        optimizer = reference()
        if optimizer is not None:
            closure = id(optimizer) in watch.closures
            optimizers.append(msgspec.structs.replace(optimizer_facts(optimizer), closure=closure))
    loaders = []
    for reference in watch.loaders:
        loader = reference()
        if loader is None:
            continue
        wait, batches = watch.waited(loader)
        facts = loader_facts(loader, not watch.evaluation_only(loader))
        if batches:
            seconds = Quantity(value=wait / batches, unit="s", n=int(batches))
            facts = msgspec.structs.replace(facts, wait=seconds)
        loaders.append(facts)
    return ScriptFacts(
        models=tuple(models),
        optimizers=tuple(optimizers),
        loaders=tuple(loaders),
        device=next((model.device for model in models if model.device != "cpu"), "cpu"),
        autocast=traits.seen["autocast"],
        grad_scaler=traits.seen["scaler"],
        create_graph=watch.create_graph,
        attention=traits.seen["attention"],
        loss_seen=watch.loss_seen,
        seeded=traits.seen["seeded"],
        distributed=_distributed(torch),
        **process_facts(script),
    )


def _distributed(torch: Any) -> bool:
    try:
        return bool(torch.distributed.is_available() and torch.distributed.is_initialized())
    except AttributeError:
        return False
