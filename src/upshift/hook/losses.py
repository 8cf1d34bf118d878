"""Lets techniques act on the loss function of the training: calls of `torch.nn.functional.cross_entropy`.

`nn.CrossEntropyLoss` ends in this function too. A call without gradients, or while the model is being evaluated, stays
as it is, so that what the script reports of an evaluation keeps its meaning. A model that is trained in evaluation mode
is known as such from its first backward pass on; until then its loss stays as it is.
Not seen: a call inside a region the script compiles or scripts, and a loss the script writes out itself.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from upshift.hook.peek import like
from upshift.sites import LossFunctionSeen

if TYPE_CHECKING:
    from upshift.hook.watch import Watch

NAME = "cross_entropy"


def watch_losses(torch: Any, watch: Watch) -> None:
    """Patch the loss function for the techniques on the stage of `watch`, which takes the patch out again."""
    original = getattr(torch.nn.functional, NAME)
    signature = inspect.signature(original)
    ident, grad_enabled, compiling = threading.get_ident, torch.is_grad_enabled, torch.compiler.is_compiling
    told = False

    def training() -> bool:
        if not grad_enabled() or watch.span_start:
            return False
        return not watch.thread_known or ident() == watch.thread

    def loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal told
        if compiling() or not training():
            return original(*args, **kwargs)
        try:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:
            return original(*args, **kwargs)
        if not told:
            told = True
            watch.stage.raise_site(LossFunctionSeen(name=NAME))
        for name, applied in watch.stage.losses_for(NAME):
            changed = dict(arguments)
            try:
                applied.before_loss(changed)
                arguments = changed
            except Exception as error:
                watch.rescue(None, (name,), error)
        return original(**arguments)

    wrapper = like(original, loss)
    # `torch.jit.script` reads the source of what it is given; this mark of its own leads it to the original.
    setattr(wrapper, "__script_if_tracing_wrapper", True)
    setattr(wrapper, "__original_fn", original)
    watch.patches.set(torch.nn.functional, NAME, wrapper)
