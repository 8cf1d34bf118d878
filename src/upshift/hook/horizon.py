"""How many steps the whole script would make: from its arguments, its globals and its loader."""

from __future__ import annotations

import sys
from typing import Any

from upshift.hook.patch import Patches

_STEPS = ("max_iters", "max_steps", "total_steps", "num_steps", "train_steps", "n_steps", "num_iterations", "max_iter")
_EPOCHS = ("epochs", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs", "epoch_num", "nepochs", "niter")


class Horizon:
    """Listens to argparse, and reads the globals of `__main__`."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.patches = Patches()

    @classmethod
    def of_main(cls) -> Horizon:
        """From the command line and the globals of `__main__` alone; nothing is patched."""
        import argparse

        found = cls()
        words = sys.argv[1:]
        for value in list(vars(sys.modules["__main__"]).values()):
            if isinstance(value, argparse.Namespace):
                found.values.update(vars(value))
        for word, after in zip(words, [*words[1:], ""], strict=False):
            name, equals, text = word.partition("=")
            text = text if equals else after
            if name.startswith("--") and text.isdecimal():
                found.values[name[2:].replace("-", "_")] = int(text)
        return found

    def install(self) -> None:
        """Keep the namespaces that argparse returns."""
        import argparse

        original = argparse.ArgumentParser.parse_known_args
        horizon = self

        def parse_known_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(parser, *args, **kwargs)
            horizon.values.update(vars(found[0]))
            return found

        self.patches.set(argparse.ArgumentParser, "parse_known_args", parse_known_args)

    def _look(self, names: tuple[str, ...]) -> int | None:
        main = vars(sys.modules["__main__"])
        for source in (self.values, main):
            for name in names:
                for spelling in (name, name.upper()):
                    value = source.get(spelling)
                    if type(value) is int and value > 0:
                        return value
        return None

    def steps(self, batches_per_epoch: int | None, micro_batches: float) -> int | None:
        """Global steps of the whole script, or None where nothing says so."""
        direct = self._look(_STEPS)
        if direct is not None:
            return direct
        epochs = self._look(_EPOCHS)
        if epochs is None or not batches_per_epoch:
            return None
        return max(int(epochs * batches_per_epoch / max(micro_batches, 1.0)), 1)
