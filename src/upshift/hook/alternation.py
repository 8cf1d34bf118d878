"""ABBA blocks of two sets of live techniques inside one process, until decided or out of time."""

from __future__ import annotations

import math
import random
import time

from upshift.measure.paired import Sequential
from upshift.measure.steps import median_of
from upshift.records.trial import Pairing

#: Steps that warm an arm up may last so long beyond the time allowed (seconds).
PATIENCE = 30.0


class Alternation:
    """Says which techniques are on in the next step, takes in its time, and decides."""

    def __init__(
        self,
        reference: tuple[str, ...],
        candidate: tuple[str, ...],
        seconds: float,
        *,
        block: int = 1,
        settle: int = 1,
        seed: int = 0,
        level: float = 0.99,
    ) -> None:
        """
        Args:
            reference, candidate: techniques that are on in each arm.
            seconds: when to stop at the latest.
            block: steps of a block.
            settle: steps by which each arm is warmed up first.
            level: one-sided level of each bound.
        """
        self.reference = reference
        self.candidate = candidate
        self.began = time.perf_counter()
        self.deadline = self.began + seconds
        self.steps = max(block, 1)
        self.random = random.Random(seed)
        self.sequential = Sequential(seconds, level=level)
        self.order: list[int] = []
        self.block: list[float] = []
        self.quad: list[tuple[int, float]] = []
        self.quads: list[float] = []
        self.times: tuple[list[float], list[float]] = ([], [])
        # Both arms are warmed up first: primitives are built and caches filled on the first steps of an arm.
        self.warm = [0] * settle + [1] * settle
        self.current = 0
        self.skip = False

    def next_arm(self) -> tuple[str, ...]:
        """The techniques of the step to come."""
        if self.warm:
            self.current = self.warm.pop(0)
            self.skip = True
        elif not self.block:
            self.skip = False
            if not self.order:
                self.order = [0, 1, 1, 0] if self.random.random() < 0.5 else [1, 0, 0, 1]
            self.current = self.order.pop(0)
        return self.candidate if self.current else self.reference

    def time_left(self) -> bool:
        """Whether more quads may follow."""
        return time.perf_counter() < self.deadline

    def block_ends(self) -> bool:
        """Whether the step under way is the last of its block."""
        return len(self.block) + 1 >= self.steps

    def add(self, seconds: float) -> bool:
        """Take in a step. Returns whether the comparison has ended."""
        if self.skip:
            return time.perf_counter() > self.deadline + PATIENCE
        self.block.append(seconds)
        if len(self.block) < self.steps:
            return False
        mean = math.fsum(self.block) / len(self.block)
        self.times[self.current].append(mean)
        self.quad.append((self.current, mean))
        self.block = []
        if len(self.quad) == 4:
            a = math.fsum(value for arm, value in self.quad if arm == 0)
            b = math.fsum(value for arm, value in self.quad if arm == 1)
            if a > 0 and b > 0:
                self.quads.append(math.log(a / b))
                self.sequential.add(self.quads[-1], time.perf_counter() - self.began)
            self.quad = []
            if self.sequential.decision != "go on":
                return True
        # Between quads only, so that the evidence stays balanced.
        return not self.quad and self.sequential.time_is_up(time.perf_counter() - self.began)

    def result(self) -> tuple[str, Pairing | None]:
        """The decision, and the speed-up with its bounds (None: too few quads)."""
        decision = self.sequential.finish()
        return decision, self.sequential.pairing((median_of(self.times[0]), median_of(self.times[1])))
