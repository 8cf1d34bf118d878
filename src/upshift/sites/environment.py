"""Variables put into the environment of a process to be started: what `process_env` techniques leave behind."""

from __future__ import annotations

from collections.abc import Mapping

from upshift.sites.protocol import BaseApplied


class EnvironmentApplied(BaseApplied):
    """Sets `values` in `env`; `close` takes back what nobody has changed since."""

    def __init__(self, env: dict[str, str], values: Mapping[str, str], note: str) -> None:
        self.note = note
        self._env = env
        self._values = dict(values)
        self._before = {name: env.get(name) for name in values}
        env.update(values)

    def close(self) -> None:
        """As it was before."""
        for name, old in self._before.items():
            if self._env.get(name) != self._values[name]:
                continue
            if old is None:
                del self._env[name]
            else:
                self._env[name] = old
        self._before = {}
