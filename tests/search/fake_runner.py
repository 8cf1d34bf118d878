"""A Runner without processes: arms with known step times, losses and updates, under slow drift."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy

from upshift.measure.paired import Sequential
from upshift.sites.runner import ChildSpec


@dataclass
class World:
    """What the techniques really do. `factor` multiplies the step time; `loss` adds a lag (fraction)."""

    folder: Path
    step: float = 0.1
    factor: dict[str, float] = field(default_factory=dict)
    fails: set[str] = field(default_factory=set)
    no_effect: set[str] = field(default_factory=set)
    lag: dict[str, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    noise: float = 0.02
    drift: float = 0.3
    length: int = 100_000
    other_start: bool = False
    epoch_cost: dict[str, float] = field(default_factory=dict)
    steps_per_epoch: int = 0
    clock: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(1))
    started: list[ChildSpec] = field(default_factory=list)
    interrupt_after: int = 10**9
    killed: int = 0
    memory: tuple[int, int] = (1, 1000)
    holds: dict[str, int] = field(default_factory=dict)
    """Technique -> bytes an arm with it holds."""

    def seconds(self, names: tuple[str, ...]) -> float:
        """One step of an arm: drift is common, noise is its own."""
        base = self.step * math.prod(self.factor.get(name, 1.0) for name in names)
        value = base * (1 + self.drift * math.sin(self.clock / 7.0)) * math.exp(self.random.gauss(0, self.noise))
        self.clock += value
        return value

    def loss(self, index: int, names: tuple[str, ...]) -> float:
        """A power law with mini-batch noise that both arms share; a lag shifts it along the steps."""
        lag = sum(self.lag.get(name, 0.0) for name in names)
        noise = random.Random(index).gauss(0, 0.02)
        own = sum(self.rounding.get(name, 0.0) for name in names) * self.random.gauss(0, 1)
        return 4.0 * ((index + 10) / (1 + lag)) ** -0.3 + noise + own


class FakeChild:
    """Answers like a hooked process."""

    def __init__(self, world: World, spec: ChildSpec, name: str) -> None:
        self.world, self.spec, self.name = world, spec, name
        self.record = world.folder / f"child-{len(world.started)}"
        self.record.mkdir()
        self.plan = dict(spec.plan)
        self.steps = 0
        self.dead = False
        self.queue: deque[dict[str, Any]] = deque()
        self.queue.append({"kind": "isolation", "rung": "overlay", "detail": "fake"})
        for technique in self.plan:
            self._apply(technique)
        self.queue.append({"kind": "ready", "step": self._steps(1), "startup": 1.0})

    def _apply(self, technique: str) -> None:
        if technique in self.world.fails:
            self.queue.append({"kind": "note", "what": "off", "technique": technique, "text": "RuntimeError: boom"})

    def _effects(self) -> dict[str, str]:
        return {name: "nothing to do" if name in self.world.no_effect else "" for name in self.plan}

    def _steps(self, n: int) -> dict[str, Any]:
        names = tuple(self.plan)
        first, self.steps = self.steps, self.steps + n
        seconds, data, epochs = [], [], []
        for index in range(first, first + n):
            starts = bool(self.world.steps_per_epoch) and index % self.world.steps_per_epoch == 0
            extra = sum(self.world.epoch_cost.get(name, 0.0) for name in names) if starts else 0.0
            seconds.append(self.world.seconds(names) + extra)
            data.append(0.001 + extra)
            epochs.append(int(starts))
            if self.spec.options.get("updates") and index + 1 in (1, 2, 3, 10, 11):
                self._update(index + 1, names)
        return {
            "seconds": seconds, "data": data, "optimizer": [0.0] * n, "epochs": epochs, "first": first, "optimizers": 1,
            "problems": {},
            "effects": self._effects(),
            "resident": max((self.world.holds.get(name, 0) for name in names), default=0),
            "backwards": [1] * n,
            "losses": [[self.world.loss(i, names)] for i in range(first, first + n)],
        }  # fmt: skip

    def _update(self, step: int, names: tuple[str, ...]) -> None:
        generator = numpy.random.default_rng(step)
        update = generator.normal(size=4000).astype("float32") * 0.01
        size = math.prod(self.world.scale.get(name, 1.0) for name in names)
        error = sum(self.world.rounding.get(name, 0.0) for name in names)
        own = numpy.random.default_rng(self.world.random.randrange(2**31)).normal(size=4000).astype("float32")
        values = {"w": update * size + error * 0.01 * own}
        if step == 1:
            other = self.world.other_start and len(self.world.started) % 2
            values["start:w"] = generator.normal(size=4000).astype("float32") + (1.0 if other else 0.0)
        numpy.savez(self.record / f"update-{step}.npz", **values)

    def send(self, message: dict[str, Any]) -> None:
        world, kind = self.world, message["kind"]
        world.interrupt_after -= 1
        if world.interrupt_after <= 0:
            raise KeyboardInterrupt
        if kind == "go":
            n = int(message["steps"])
            if self.steps + n > world.length:
                self.queue.append({"kind": "ended", "how": "ended by itself", "code": 0, "steps": world.length})
            else:
                self.queue.append({"kind": "steps", **self._steps(n)})
        elif kind == "plan":
            if message["settings"] is None:
                self.plan.pop(message["name"], None)
            else:
                self.plan[message["name"]] = message["settings"]
                self._apply(message["name"])
            acted = [n for n in self.plan if n not in world.fails | world.no_effect]
            self.queue.append({"kind": "done", "acted": acted, "effects": self._effects()})
        elif kind == "compare" and world.length - self.steps < 24:
            self.queue.append({"kind": "ended", "how": "ended by itself", "code": 0, "steps": world.length})
        elif kind == "compare":
            self.queue.append(self._compare(message))
        elif kind == "state":
            self.queue.append({"kind": "state", "problem": "a simulation has no state"})
        elif kind == "digest":
            exact = all(not world.rounding.get(name) and not world.lag.get(name) for name in self.plan)
            self.queue.append({"kind": "digest", "sha256": "same" if exact else str(world.random.random())})

    def _compare(self, message: dict[str, Any]) -> dict[str, Any]:
        world, budget = self.world, float(message["seconds"])
        sequential, spent = Sequential(budget), 0.0
        while sequential.decision == "go on" and not sequential.time_is_up(spent):
            order = (0, 1, 1, 0) if world.random.random() < 0.5 else (1, 0, 0, 1)
            sums = [0.0, 0.0]
            for arm in order:
                value = world.seconds(tuple(message["b" if arm else "a"]))
                sums[arm] += value
                spent += value
            sequential.add(math.log(sums[0] / sums[1]), spent)
        decision = sequential.finish()
        found = sequential.pairing((world.step, world.step))
        return {"kind": "compared", "decision": decision, "pairing": found and msgspec.to_builtins(found)}

    def receive(self, timeout: float) -> dict[str, Any] | None:
        return self.queue.popleft() if self.queue else None

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        return self.world.memory

    def output(self) -> str:
        return "Traceback ...\nRuntimeError: boom"

    def kill(self) -> None:
        if not self.dead:
            self.dead = True
            self.world.killed += 1


@dataclass
class FakeRunner:
    """Starts fake children; budgets count the world's clock."""

    world: World

    def start(self, spec: ChildSpec, *, name: str = "") -> FakeChild:
        self.world.started.append(spec)
        return FakeChild(self.world, spec, name)
