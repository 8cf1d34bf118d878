"""What a script logs to TensorBoard or Weights & Biases, told to us too."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from upshift.hook.imports import AfterImport

#: In the folder of the record.
FILE = "scalars.jsonl"

Tell = Callable[[dict[str, float]], None]


def into_file(folder: Path) -> Tell:
    """A function that appends what it is told to `FILE`, a line a call."""

    def tell(values: dict[str, float]) -> None:
        try:
            with open(folder / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError:
            pass

    return tell


class Scalars:
    """Tells every scalar that is logged in this process. The script's own logging goes on."""

    def __init__(self, tell: Tell) -> None:
        self._pid = os.getpid()
        self._tell = tell

    def install(self, imports: AfterImport) -> None:
        """Wait for the loggers to be imported."""
        imports.on("torch.utils.tensorboard.writer", self._tensorboard)
        imports.on("tensorboardX.writer", self._tensorboard)
        imports.on("wandb", self._wandb)

    def write(self, values: dict[str, Any]) -> None:
        """Tell the numbers among `values`."""
        found: dict[str, float] = {}
        for name, value in values.items():
            try:
                found[str(name)] = float(value)
            except (TypeError, ValueError, RuntimeError):
                continue
        if found and os.getpid() == self._pid:
            self._tell(found)

    def _tensorboard(self, module: ModuleType) -> None:
        writer: Any = getattr(module, "SummaryWriter", None)
        if writer is None:
            return
        one, several = writer.add_scalar, writer.add_scalars

        @functools.wraps(one)
        def add_scalar(this: Any, tag: str, scalar_value: Any, *args: Any, **kwargs: Any) -> Any:
            self.write({tag: scalar_value})
            return one(this, tag, scalar_value, *args, **kwargs)

        @functools.wraps(several)
        def add_scalars(this: Any, main_tag: str, tag_scalar_dict: Any, *args: Any, **kwargs: Any) -> Any:
            self.write({f"{main_tag}/{tag}": value for tag, value in dict(tag_scalar_dict).items()})
            return several(this, main_tag, tag_scalar_dict, *args, **kwargs)

        writer.add_scalar, writer.add_scalars = add_scalar, add_scalars

    def _wandb(self, module: ModuleType) -> None:
        init: Any = getattr(module, "init", None)
        if not callable(init):
            return

        def logging(log: Any) -> Any:
            @functools.wraps(log)
            def both(data: Any, *args: Any, **kwargs: Any) -> Any:
                if isinstance(data, dict):
                    self.write(data)
                return log(data, *args, **kwargs)

            return both

        @functools.wraps(init)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            run = init(*args, **kwargs)
            # A run that is switched off has methods of its own, and `wandb.log` is bound anew by every init.
            log = getattr(run, "log", None)
            if callable(log):
                run.log = logging(log)
                module.log = run.log  # type: ignore[attr-defined]
            return run

        module.init = replacement  # type: ignore[attr-defined]
