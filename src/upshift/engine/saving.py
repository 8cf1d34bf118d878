"""When and what a training saves, and how it comes back.

Saved is at boundaries between two updates only. The interval follows from what saving costs and how often the machine
is taken away (`upshift.checkpoint.interval`); a person may set it in seconds or steps. Without a run folder one state
is kept in memory, so that a training can still go back from a loss that is not finite.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upshift.checkpoint.interval import Pace
from upshift.checkpoint.opened import held
from upshift.checkpoint.saver import Saver
from upshift.engine.note import Note
from upshift.engine.plainstate import load_model_state, load_optimizer_state, model_state, optimizer_state
from upshift.engine.randomness import random_state, seed_everything, set_random_state
from upshift.engine.recover import Recovery
from upshift.engine.sharding import like, put_back, taken_apart
from upshift.errors import CheckpointError, ResumeError
from upshift.units import seconds as in_words

if TYPE_CHECKING:
    from pathlib import Path

    from upshift.checkpoint.opened import Opened
    from upshift.checkpoint.shards import Shard
    from upshift.checkpoint.store import Store
    from upshift.engine.parts import Parts
    from upshift.engine.training import Training

#: The first checkpoint is made after this many seconds; its cost sets the interval.
FIRST = 10.0

#: A best state is saved at once where the job asks for the best one (a target, early stopping); elsewhere when this
#: many times the cost of saving has passed since the last checkpoint.
BEST_AFTER = 30.0


class Saving:
    """The checkpoints of one training."""

    def __init__(self, parts: Parts, store: Store | None) -> None:
        settings = parts.settings
        self.parts, self.settings, self.store = parts, settings, store
        self.every = settings.save_steps or 0 if store is not None else 0
        """Updates between two saves, where a person has set them; else 0."""
        self._pace = Pace(settings.interruption_seconds, first=FIRST)
        self._told = False
        self._at = time.monotonic()
        self._saved_step = -1
        self._best = self._evaluated = self._left = False
        self._stall = 0.0
        self._keeps_best = parts.job.stop_early is not None or parts.job.target is not None
        self._memory: tuple[Any, dict[str, Shard]] | None = None
        self._saver = Saver(store) if store is not None else None
        self._own = ("random", "data") if parts.data.kind == "stream" else ("random",)
        """What each rank saves for itself."""

    # -- saving -------------------------------------------------------------------------------------------------

    def begin(self, t: Training) -> None:
        """Before the first update: a state to go back to. On disk where there is a folder, so that a run that is
        stopped in its first step has begun all the same."""
        if self._saved_step < 0:
            self.save(t, wait=True)
            if self.store is not None:
                # Another training, asked for: what the folder held is set aside, not resumed the next time.
                self.store.go_back(t.progress.step)
        self._at = time.monotonic()

    def evaluated(self, best: bool) -> None:
        """There are new results; `best`: this state is to be kept whatever comes."""
        self._evaluated, self._best = True, self._best or best

    def due(self, step: int) -> bool:
        """Whether the state after `step` updates is to be saved."""
        if step == self._saved_step or self.store is None:
            return False
        if self._best and (self._keeps_best or time.monotonic() - self._at > BEST_AFTER * self._stall):
            return True
        if self.settings.save_steps is not None:
            return step % self.settings.save_steps == 0
        if self.settings.save_seconds is not None:
            return time.monotonic() - self._at > self.settings.save_seconds
        return self._pace.due()

    def last(self, t: Training) -> None:
        """The last state of this process, on disk when this returns."""
        if (t.progress.step != self._saved_step or self._evaluated) and not self._left:
            self.save(t, wait=True)
        elif self._saver is not None:
            self._saver.wait()

    def save(self, t: Training, *, wait: bool = False) -> None:
        """Save now; `wait` until it is on disk. What cannot be written is told, and training goes on."""
        began = time.perf_counter()
        step = t.progress.step
        tree, shards = self._gathered(t)
        if self._saver is None:
            kept = {name: replace(item, tensor=owned(item.tensor)) for name, item in shards.items()}
            self._memory = owned(tree), kept
        else:
            if self.parts.group.rank and isinstance(tree, dict):
                # What is the same on all ranks is written once; a rank may have its own stream.
                tree = {name: tree[name] for name in self._own if name in tree}
            self._saver.save(step, tree, shards=shards, facts=self._facts(t), best=self._best, wait=wait)
        self._saved_step, self._best, self._evaluated = step, False, False
        stall = self._stall = time.perf_counter() - began
        t.recorder.saved(stall)
        self._at = time.monotonic()
        if not wait:
            # One that was waited for, as before the first update, says nothing of what the others cost.
            self._pace.saved(stall, self._saver.write_seconds if self._saver is not None else 0.0)
            self._tell_pace(t, stall)

    # -- in the middle of an update (`boundary`) ----------------------------------------------------------------

    @property
    def write_seconds(self) -> float:
        """Seconds that the last save took to be durable, as far as that is known."""
        return self._saver.write_seconds if self._saver is not None else self._stall

    def holds(self, step: int, seconds: float = 0.0) -> bool:
        """Whether all that belongs to the boundary after `step` updates is durable; waits `seconds` for its write."""
        if self.store is None or step != self._saved_step or self._evaluated:
            return False
        if self._saver is None:
            return True
        self._saver.wait(seconds)
        return not self._saver.busy and self._saver.error is None

    def note(self, t: Training) -> Note:
        """What would be saved now, for later; nothing large is copied."""
        return Note(t.progress.step, self._gather(t), self._facts(t), self.parts.model.parameters())

    def write(self, note: Note, seconds: float, originals: dict[int, Any]) -> bool:
        """Save a note of the last boundary, from any thread while the loop stands still; whether it is durable now.

        Not where the forward pass under way has changed what only an update should. `originals`: see `Note.tree`.
        """
        saver, store = self._saver, self.store
        if saver is None or store is None or self.parts.group.world > 1:
            return False
        until = time.monotonic() + seconds
        saver.wait(seconds)
        if saver.busy or note.changed:
            return False
        saver.save(note.step, note.tree(originals), facts=note.facts, best=self._best)
        torn = note.changed
        saver.wait(until - time.monotonic())
        if saver.busy or saver.error is not None:
            return False
        if torn:
            store.go_back(note.step - 1)
            return False
        self._saved_step, self._best, self._evaluated = note.step, False, False
        return True

    def leave_it(self) -> None:
        """Nothing more is saved of this step: its state is not known."""
        self._left = True

    def _tell_pace(self, t: Training, stall: float) -> None:
        if self._told or self.store is None or self.every or self.settings.save_seconds is not None:
            return
        self._told = True
        every, between = in_words(self._pace.seconds), in_words(self.settings.interruption_seconds)
        t.say(
            "checkpoints",
            f"saving holds training up for {in_words(stall)}: every {every} from here on (Young/Daly; one interruption "
            f"in {between} assumed)",
        )

    def _facts(self, t: Training) -> dict[str, Any]:
        progress = t.progress
        return {
            "step": progress.step, "samples": progress.samples, "epoch": progress.epoch, "world": t.group.world,
            "job": t.description, "metrics": t.results.last, "plan": sorted(self.settings.plan),
            "left_out": [list(item) for item in t.recovery.left_out], "suspicious": t.spikes.suspicious,
        }  # fmt: skip

    def _gathered(self, t: Training) -> tuple[Any, dict[str, Shard]]:
        """`_gather`, with the shards of this rank apart; in place of a state that cannot be saved the reason, which the
        other ranks must hear of."""
        try:
            return taken_apart(self._gather(t))
        except CheckpointError as error:
            if self._saver is None:
                raise
            return error, {}

    def _gather(self, t: Training) -> dict[str, Any]:
        """All that a resumed run needs, as this rank holds it: live tensors, sharded ones as DTensor."""
        parts, progress = self.parts, t.progress
        tree: dict[str, Any] = {"random": random_state()}
        # Also the empty ones among them: the order tells which part of a technique a state belongs to.
        techniques = {name: items for name, items in parts.stage.states().items() if any(items)}
        return tree | {
            "model": model_state(parts.wrapped),
            "optimizer": optimizer_state(parts.wrapped, parts.optimizer),
            "schedule": getattr(parts.schedule, "state_dict", dict)(),
            "average": parts.average.state_dict() if parts.average is not None else {},
            "data": parts.data.state_dict(),
            "techniques": techniques,
            "progress": {
                "step": progress.step, "epoch": progress.epoch, "cursor": progress.cursor,
                "samples": progress.samples, "seconds": t.seconds, "evaluated": progress.evaluated,
                "done": progress.done, "micro_batch": parts.data.micro_batch,
            },
            "results": t.results.state_dict(),
            "recovery": {"tries": t.recovery.tries, "since": t.recovery.since,
                         "left_out": [list(item) for item in t.recovery.left_out]},
            "spikes": t.spikes.state_dict(),
        }  # fmt: skip

    # -- coming back --------------------------------------------------------------------------------------------

    def resume(self, t: Training) -> None:
        """Go on where the newest good checkpoint ends; nothing happens where there is none.

        Raises:
            ResumeError: it is a checkpoint of another training, and says in what they differ.
        """
        if self.store is None or self.settings.resume == "never":
            return
        checkpoint = self.store.newest()
        if checkpoint is None:
            return
        with self.store.opened(checkpoint) as found:
            if self.settings.resume == "force":
                load_model_state(self.parts.wrapped, found.lazily(0)["model"])
                t.say("resume", f"only the weights of step {found.facts['step']:,} were loaded, as asked")
                return
            self._same_training(found.facts.get("job", {}), t.description, checkpoint.path)
            self._restore(t, self._tree(found), int(found.facts.get("world", 1)))
        self._saved_step = t.progress.step
        t.say("resume", f"goes on from step {t.progress.step:,} ({checkpoint.path.name})")

    def rewind(self, t: Training) -> None:
        """Back to the last good state, in the middle of a run; it is kept as the one before the trouble."""
        if self._saver is not None:
            self._saver.wait()
        if self.store is None:
            if self._memory is None:
                raise CheckpointError("there is no state to go back to.", remedy="Start the run anew.")
            tree, shards = self._memory
            self._restore(t, put_back(owned(tree), shards), t.group.world)
            return
        checkpoint = self.store.newest()
        while checkpoint is not None and checkpoint.facts.get("suspicious"):
            # Saved because the run was stopped there, between the beginning of a spike and its being told.
            self.store.go_back(checkpoint.step - 1)
            checkpoint = self.store.newest()
        if checkpoint is None:
            raise CheckpointError("no checkpoint is left to go back to.", remedy="Look into the quarantine folder.")
        self.store.go_back(checkpoint.step)
        self.store.keep_before_spike(checkpoint)
        with self.store.opened(checkpoint) as found:
            self._restore(t, self._tree(found), int(found.facts.get("world", 1)))
        self._saved_step = t.progress.step

    def _tree(self, found: Opened) -> dict[str, Any]:
        """What rank 0 saved, with what this rank has for itself; tensors are read when they are needed."""
        rank = self.parts.group.rank
        tree: dict[str, Any] = found.lazily(0)
        if 0 < rank < found.manifest.world:
            own = found.lazily(rank)
            tree.update({name: own[name] for name in self._own if name in own})
        return tree

    def _same_training(self, then: dict[str, Any], now: dict[str, Any], path: Path) -> None:
        differ = [f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if key in then and then[key] != now[key]]
        if differ:
            raise ResumeError(
                f"{path.name} is a checkpoint of another training: {'; '.join(differ)}.",
                remedy="Put it back as it was, name another --out, or load only the weights: --resume force.",
            )

    def _restore(self, t: Training, tree: dict[str, Any], world: int) -> None:
        parts = self.parts
        load_model_state(parts.wrapped, tree["model"])
        load_optimizer_state(parts.wrapped, parts.optimizer, tree["optimizer"])
        average = tree["average"]
        tree = {key: held(value) for key, value in tree.items() if key not in ("model", "optimizer", "average")}
        if parts.schedule is not None and tree["schedule"]:
            getattr(parts.schedule, "load_state_dict", lambda state: None)(tree["schedule"])
        if parts.average is not None:
            own = parts.average.state_dict()["means"]
            means = {name: like(value, own.get(name)) for name, value in average.get("means", {}).items()}
            parts.average.load_state_dict({**average, "means": means})
        parts.data.load_state_dict(tree["data"])
        parts.stage.load_states(tree["techniques"])
        found = tree["progress"]
        progress = t.progress
        progress.step, progress.epoch, progress.cursor = found["step"], found["epoch"], found["cursor"]
        progress.samples, progress.seconds = found["samples"], found["seconds"]
        progress.evaluated, progress.done = found["evaluated"], found["done"]
        parts.data.micro_batch = min(parts.data.micro_batch, found["micro_batch"])
        t.results.load_state_dict(tree["results"])
        kept = tree["recovery"]
        t.recovery = Recovery(kept["tries"], [(a, b) for a, b in kept["left_out"]], kept["since"])
        t.spikes.load_state_dict(tree.get("spikes", {}))
        if world == parts.group.world:
            set_random_state(tree["random"])
        else:
            # The order of samples is the same for any number of ranks; random streams of ranks are not.
            seed_everything(parts.job.seed + progress.step + 1, parts.group.rank + 1)
            t.say("resume", f"{world} processes then, {parts.group.world} now: the order of samples goes on exactly, "
                            "dropout draws other numbers")  # fmt: skip

    def close(self) -> None:
        """Wait for what is being written."""
        if self._saver is not None:
            self._saver.wait()


def owned(tree: Any) -> Any:
    """A copy of a state that shares no memory with the training."""
    import torch

    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: owned(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(owned(value) for value in tree)
    return tree
