"""Looks out for ranks that are gone or stand still, so that the others do not wait for ever.

Every rank writes a heartbeat to the store once a second: step, phase, collectives entered, and the one it waits in. A
second thread judges, and never waits for the store itself:

    a rank of this machine is gone            found within a second (its process is looked at)
    a rank of another machine is gone         its neighbours there tell through the store, or the connection breaks
    the store is gone                         its host (rank 0, or the launcher) ended
    waited in one collective for `timeout`    the ranks that are not in it stand still: they are named, with their last
                                              step and phase and, where they or the kernel answer, their stack

Then this process ends with exit code `LOST`, on which torchrun starts the ranks again. Where a rank is gone, the main
thread first has `GRACE` seconds to end by itself: gloo tells it that the connection broke. Time during which this
process was stopped itself (Ctrl-Z, a laptop's lid) does not count as waiting.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from upshift import units
from upshift.engine import stacks
from upshift.engine.group import LOST
from upshift.engine.peers import Beat, Peer, Progress, machine, process, state_of, within

BEAT = 1.0
LOOK = 0.25

#: Seconds without a new heartbeat after which a rank counts as silent, and a store as not answering.
SILENT = 5.0

#: Seconds for the main thread to end by itself when a rank is gone.
GRACE = 2.5

#: Seconds to wait for one operation of the store in a report, and for somebody else's report.
PATIENCE = 2.0
REPORT = 12.0

#: Stand-still ranks whose stacks are asked for.
STACKS = 3


@dataclass
class _Heard:
    beat: Beat
    at: float


class Watch:
    """The two threads of one rank. `lost` says who is gone once that is known."""

    def __init__(self, rank: int, peers: list[Peer], store: Any, timeout: float, say: Callable[[str], None]) -> None:
        """
        Args:
            peers: all ranks, this one included, in rank order.
            store: a connection that nobody else uses (operations on one connection wait for each other).
            timeout: seconds in one collective.
            say: is told what a person should read.
        """
        self.progress = Progress()
        self.limit = timeout
        self.lost = ""
        self._rank, self._peers, self._store, self.say = rank, peers, store, say
        host = peers[rank].host
        self._here = [peer for peer in peers if peer.host == host and peer.rank != rank]
        self._processes = {peer.rank: process(peer.pid) for peer in self._here}
        self._left: set[int] = set()
        self._heard: dict[int, _Heard] = {}
        self._listening = False
        self._talked = time.monotonic()
        self._unreachable = 0
        self._over = threading.Event()
        self._told = ""

    @classmethod
    def over(cls, rank: int, world: int, store: Any, timeout: float, say: Callable[[str], None]) -> Watch:
        """The watch of this process, once all ranks can reach the store."""
        own = Peer(rank, machine(), os.getpid(), stacks.answering())
        store.set(f"watch/peer/{rank}", msgspec.json.encode(own).decode())
        told = store.multi_get([f"watch/peer/{r}" for r in range(world)])
        peers = [msgspec.json.decode(text, type=Peer) for text in told]
        watch = cls(rank, peers, store.clone(), timeout, say)
        watch._beat(0)
        store.multi_get([f"watch/beat/{r}" for r in range(world)])
        return watch

    def start(self) -> None:
        """Begin to look."""
        self._talked = time.monotonic()
        for name, target in (("upshift-heartbeat", self._talk), ("upshift-watch", self._judge)):
            threading.Thread(target=target, name=name, daemon=True).start()

    def stop(self, *, on_purpose: bool = False) -> None:
        """Stop looking; `on_purpose`: the others must not take the end of this process for a loss."""
        if on_purpose:
            within(PATIENCE, lambda: self._store.set(f"watch/left/{self._rank}", "1"))
        self._over.set()
        stacks.no_longer(self._peers[self._rank].stack)

    def publish(self, text: str) -> None:
        """Tell all ranks that it is over, and why; the first text stays."""
        within(PATIENCE, lambda: self._store.compare_set("watch/over", "", text))

    # -- the thread that talks to the store ----------------------------------------------------------------------------

    def _talk(self) -> None:
        n = 0
        while not self._over.wait(BEAT):
            n += 1
            try:
                self._beat(n)
                self._told = self._told or self._over_text()
                if self._store.check([f"watch/ask/{self._rank}"]):
                    self._store.set(f"watch/stack/{self._rank}", stacks.of_main_thread())
                if self._listening:
                    self._listen()
            except Exception:
                # Whatever the store raises, it is not there; once may be chance.
                self._unreachable += 1
                continue
            self._talked, self._unreachable = time.monotonic(), 0

    def _over_text(self) -> str:
        return self._store.get("watch/over").decode() if self._store.check(["watch/over"]) else ""

    def _beat(self, n: int) -> None:
        now = self.progress
        beat = Beat(n, now.step or now.steps, now.phase, now.calls, now.name if now.waiting else "")
        self._store.set(f"watch/beat/{self._rank}", msgspec.json.encode(beat).decode())

    def _listen(self) -> None:
        told = self._store.multi_get([f"watch/beat/{peer.rank}" for peer in self._peers])
        now = time.monotonic()
        for peer, text in zip(self._peers, told, strict=True):
            beat = msgspec.json.decode(text, type=Beat)
            before = self._heard.get(peer.rank)
            if before is None or before.beat.n != beat.n:
                self._heard[peer.rank] = _Heard(beat, now)

    # -- the thread that judges ----------------------------------------------------------------------------------------

    def _judge(self) -> None:
        waited, calls = 0.0, -1
        tick = time.monotonic()
        while not self._over.wait(LOOK):
            now = time.monotonic()
            passed, tick = min(now - tick, 4 * LOOK), now
            if not self.progress.waiting or self.progress.calls != calls:
                waited, calls = 0.0, self.progress.calls
            else:
                waited += passed
            self._listening = waited > min(self.limit / 4, 10.0)
            gone = self._gone()
            if gone:
                self._end_soon(gone)
            elif waited > self.limit:
                head = f"rank {self._rank} waited {units.seconds(waited)} in {self.progress.name} (step {self._step()})"
                try:
                    self._end_now(self._report(head))
                except Exception as error:
                    # A report that fails must not keep this process.
                    self._end_now(f"{head}; who stands still could not be found out: {error}")

    def _gone(self) -> str:
        if self._told:
            return self._told
        gone = [peer for peer in self._here if self._state(peer) == "gone" and not self._has_left(peer.rank)]
        if gone:
            # It may have said why, a moment ago.
            self._told = within(PATIENCE, self._over_text) or ""
            ranks = _ranks([peer.rank for peer in gone])
            return (
                self._told
                or f"{ranks} {'is' if len(gone) == 1 else 'are'} gone (process {', '.join(str(p.pid) for p in gone)})"
            )
        if self._unreachable > 1:
            return "the store of the ranks is gone: rank 0 or the launcher ended"
        return ""

    def _has_left(self, rank: int) -> bool:
        if rank not in self._left and within(PATIENCE, lambda: self._store.check([f"watch/left/{rank}"])):
            self._left.add(rank)
        return rank in self._left

    def _state(self, peer: Peer) -> str:
        return state_of(self._processes[peer.rank])

    def _end_soon(self, text: str) -> None:
        # The ranks may be parting on purpose at this very moment.
        if self._over.wait(LOOK):
            return
        self.lost = text
        self.say(f"rank {self._rank}: {text}; this rank ends")
        if not self._told:
            self.publish(text)
        if not self._over.wait(GRACE):
            end()

    def _end_now(self, text: str) -> None:
        self.say(text)
        self.publish(text.splitlines()[0])
        end()

    # -- who stands still ----------------------------------------------------------------------------------------------

    def _report(self, head: str) -> str:
        """One rank reports in full, the others wait for it."""
        answers = time.monotonic() - self._talked < SILENT
        if answers and within(PATIENCE, lambda: self._store.add("watch/report", 1)) not in (1, None):
            until = time.monotonic() + REPORT
            while not self._told and time.monotonic() < until:
                time.sleep(LOOK)
            return f"{head}: {self._told or 'another rank reports'}"
        suspects = self._suspects(answers)
        lines = [f"{head}: {self._named(suspects, answers)}"]
        for peer in suspects[:STACKS]:
            stack = self._stack(peer)
            if stack:
                lines += [f"stack of rank {peer.rank}:", stack.rstrip()]
            else:
                lines.append(f"rank {peer.rank} does not answer, so its stack is unknown")
        return "\n".join(lines)

    def _suspects(self, answers: bool) -> list[Peer]:
        """Ranks that stand still: stopped, or silent; else those that are not in this collective."""
        stopped = [peer for peer in self._here if self._state(peer) == "stopped"]
        if stopped or not answers:
            return stopped
        now = time.monotonic()
        heard = [(peer, self._heard[peer.rank]) for peer in self._peers
                 if peer.rank != self._rank and peer.rank in self._heard]  # fmt: skip
        return [peer for peer, last in heard if now - last.at > SILENT] or [
            peer for peer, last in heard if not last.beat.waits_in or last.beat.calls < self.progress.calls
        ]

    def _named(self, suspects: list[Peer], answers: bool) -> str:
        if not suspects:
            if not answers:
                return "the store of the ranks does not answer: its host (rank 0, or the launcher) stands still"
            return "all ranks are in it, so the connection between them stands still"
        said = []
        for peer in suspects:
            heard = self._heard.get(peer.rank)
            where = f", last heard of at step {heard.beat.step} ({heard.beat.phase})" if heard is not None else ""
            if heard is not None and heard.beat.waits_in:
                where += f", waiting in {heard.beat.waits_in}"
            state = self._state(peer) if peer in self._here else ""
            said.append(f"rank {peer.rank} (process {peer.pid}{f', {state}' if state else ''}{where})")
        return f"{' and '.join(said)} {'stands' if len(said) == 1 else 'stand'} still"

    def _stack(self, peer: Peer) -> str:
        if peer in self._here and self._state(peer) == "stopped":
            return stacks.of_process(peer.pid, "")
        key = f"watch/stack/{peer.rank}"
        within(PATIENCE, lambda: self._store.set(f"watch/ask/{peer.rank}", "1"))
        until = time.monotonic() + 2 * BEAT
        while time.monotonic() < until:
            if within(PATIENCE, lambda: self._store.check([key])):
                found = within(PATIENCE, lambda: self._store.get(key))
                return found.decode() if found else ""
            time.sleep(LOOK / 2)
        return stacks.of_process(peer.pid, peer.stack) if peer in self._here else ""

    def _step(self) -> int:
        return self.progress.step or self.progress.steps


def on_stderr(text: str) -> None:
    """A line on stderr, past every lock: the main thread may hold that of the stream."""
    try:
        os.write(2, f"upshift: {text}\n".encode())
    except OSError:
        pass


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks)}"


def end() -> None:
    """End now. What was printed goes out, unless the main thread holds the stream."""
    within(0.5, lambda: (sys.stdout.flush(), sys.stderr.flush()))
    os._exit(LOST)
