"""`diagnose`: run the script as it is until enough has been seen, then report and never let it go on."""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from upshift import units
from upshift.hook.activations import StepObserver, resident
from upshift.hook.channel import Channel, ChannelClosed
from upshift.hook.controller import Controller, describe, exit_code, stand_still
from upshift.hook.events import DevicePhases, StreamEvent
from upshift.hook.horizon import Horizon
from upshift.hook.noise import LEAST, NoiseListener, steps_within
from upshift.hook.overhead import fault_seconds, watching_cost
from upshift.hook.recipe import Recipe
from upshift.hook.scriptfacts import Traits, script_facts
from upshift.hook.syncs import Syncs
from upshift.measure.anatomy import anatomy
from upshift.measure.flops import StepCounter
from upshift.measure.sampler import HostSampler
from upshift.measure.stats import mean_interval, narrow_enough
from upshift.measure.steps import StepRecord, loss_values, median_of, total_loss
from upshift.records import LineCost, Measurement, Quantity, ScriptFacts
from upshift.records.recipe import GradientNoise
from upshift.sites.runner import ChildSpec

#: The step whose FLOPs are counted (its time is left out): late enough for optimizer state to exist.
COUNTED = 3
MOST_STEPS = 5000
#: Part of the time that may go to the gradient noise, after the steps that are timed.
NOISE = 0.3


class DiagnoseController(Controller):
    """Watches until the step time is known well enough, a limit, or the script's end."""

    def __init__(self, spec: ChildSpec, channel: Channel) -> None:
        self.spec = spec
        self.channel = channel
        self.limit = float(spec.options.get("seconds", 20.0))
        self.least_steps = int(spec.options.get("least_steps", 20))
        self.most_steps = int(spec.options.get("most_steps", MOST_STEPS))
        self.trace_file = str(spec.options.get("trace", ""))
        self.torch: Any = None
        self.records: list[StepRecord] = []
        self.alive: list[Any] = []
        self.losses: list[float] = []
        self.left_out: set[int] = set()
        self.counter: StepCounter | None = None
        self.count: Any = None
        self.work: StepObserver | None = None
        self.resident: int | None = None
        self.sampler: HostSampler | None = None
        self.syncs: Syncs | None = None
        self.events: DevicePhases | None = None
        self.faults: list[int] = []
        self.horizon = Horizon()
        self.horizon.install()
        self.recipe = Recipe()
        self.listener: NoiseListener | None = None
        self.noise: GradientNoise | None = None
        self.traits = Traits()
        self.first_step: float | None = None
        self.told = 0.0
        self.done = False
        self.profile: Any = None

    # -- what the script does ------------------------------------------------------------------------------------

    def torch_ready(self, torch: ModuleType) -> None:
        """Listen for what techniques must know."""
        self.torch = torch
        self.resident = resident()
        self.traits.listen(torch)
        self.recipe.install(torch)

    # -- steps ---------------------------------------------------------------------------------------------------

    def on_step(self, record: StepRecord) -> None:
        """Keep the step; count one; stop when enough has been seen."""
        if self.done:
            # Something swallowed the end of the watching (a thread): nothing of the script may go on.
            self._hold()
        now = time.perf_counter()
        if self.listener is not None:
            self._keep_alive()
            if self.listener.step_ended():
                self._end("enough seen")
            return
        self.records.append(record)
        self._keep_alive()
        if self.events is not None:
            self.events.after_step()
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        values = loss_values(record)
        loss = total_loss(values)
        if loss is not None:
            self.losses.append(loss)
        self.recipe.on_step(self.watch, record)
        if self.first_step is None:
            self.first_step = now
            self._start_sampler()
            if not self._compiled():  # compiled code would be compiled anew
                self.recipe.listen(self.torch)
        if self.counter is not None:
            self.left_out.add(record.number)
            self.count = self.counter.stop()
            self.counter = None
        elif record.number + 1 == COUNTED and not self._compiled():
            self.counter = StepCounter()
            try:
                self.counter.start()
            except Exception:
                self.counter = None
        self._see_work(record)
        self._trace(record)
        if now - self.told > 0.25:
            self.told = now
            self._tell({"kind": "progress", "steps": len(self.records), "seconds": now - self.first_step})
        elapsed = now - self.first_step
        enough = self._enough(elapsed)
        if (enough or self._last_chance(elapsed)) and self.noise is None and self._listen(elapsed):
            return
        if enough:
            self._end("enough seen")

    def _see_work(self, record: StepRecord) -> None:
        """Two steps operation by operation, where an estimate wants them; their time is left out."""
        if self.work is not None:
            if self.work.running:
                self.left_out.add(record.number)
                self.work.step_ended()
        elif self.spec.options.get("work") and record.number >= COUNTED + (4 if self.trace_file else 0):
            models = [found for item in self.watch.models if (found := item()) is not None]
            optimizers = [found for item in self.watch.optimizers if (found := item()) is not None]
            shapes = [self.watch.shapes.get(id(module), ()) for module in models]
            batch = next((sizes[0] for shape in shapes for sizes in shape[:1] if sizes), None)
            self.work = StepObserver(models, optimizers, batch, process_base=self.resident)
            if not self._compiled():
                self.work.start()

    def _keep_alive(self) -> None:
        """Hold what trains until the next step: facts are read at the end, when a `main()` has left its own behind."""
        watch = self.watch
        self.alive.clear()
        references = (*watch.models, *watch.optimizers, *watch.loaders)
        self.alive.extend(found for reference in references if (found := reference()) is not None)

    def _compiled(self) -> bool:
        dynamo = sys.modules.get("torch._dynamo")
        return dynamo is not None and bool(getattr(dynamo.utils, "counters", {}).get("stats"))

    def _start_sampler(self) -> None:
        folder = str(Path(self.spec.target).resolve().parent) if not self.spec.module else str(Path.cwd())
        prefixes = tuple({sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parent.parent)})

        def is_user_file(name: str) -> bool:
            if not name or name.startswith("<") or "site-packages" in name:
                return False
            return name.startswith(folder) or not name.startswith(prefixes)

        self.sampler = HostSampler(self.watch.thread, is_user_file, hz=100)
        self.sampler.start()
        device = self._device()
        if device is not None:
            self.syncs = Syncs(self.watch, is_user_file)
            self.syncs.install(self.torch)
            if device.type == "cuda":
                self.events = DevicePhases(self.watch, lambda: StreamEvent(self.torch, device))
                self.events.install(self.torch)

    def _device(self) -> Any:
        """The accelerator a model lies on, or None (asked of its parameters: asking the driver could upset forks)."""
        for reference in self.watch.models:
            module = reference()
            parameter = next(iter(module.parameters()), None) if module is not None else None
            if parameter is not None and parameter.device.type != "cpu":
                return parameter.device
        return None

    def _enough(self, elapsed: float) -> bool:
        n = len(self.records)
        if n >= self.most_steps or elapsed >= self.limit:
            return True
        if n < self.least_steps or elapsed < 2.0 or n % 5:
            return False
        found = anatomy(self.records, startup=None, left_out=frozenset(self.left_out))
        # An interval can only be trusted from enough independent stretches.
        return elapsed >= min(6.0, self.limit) and narrow_enough(found.step, 0.02)

    def _last_chance(self, elapsed: float) -> bool:
        """Whether the rest of the time is what the gradient noise needs."""
        n = len(self.records)
        if n < self.least_steps or elapsed < (1.0 - NOISE) * self.limit:
            return False
        return steps_within(self.limit - elapsed, elapsed / n) > 0

    def _listen(self, elapsed: float) -> bool:
        """Go on to the gradient noise, if it can be heard; what times the steps is done then. Asked once."""
        if "most_steps" in self.spec.options:
            self.noise = GradientNoise(why="no more steps than those timed were wanted")
            return False
        seconds, step = min(NOISE * self.limit, max(self.limit - elapsed, 0.0)), elapsed / len(self.records)
        steps = steps_within(seconds, step)
        if not steps:
            room = units.seconds(NOISE * self.limit)
            text = f"{LEAST} more steps of {units.seconds(step)} do not fit into {room}; a longer --seconds makes room"
            self.noise = GradientNoise(why=text)
            return False
        training = self._training_loader()
        try:
            epoch = None if training is None else len(training) / max(self._batches_per_step(), 1e-9)
        except (TypeError, NotImplementedError):
            epoch = None
        listener = NoiseListener(self.watch, self.torch, steps=steps, seconds=seconds, epoch=epoch)
        if why := listener.obstacle():
            self.noise = GradientNoise(why=why)
            return False
        for instrument in (self.syncs, self.events):
            if instrument is not None:
                instrument.close()
        if self.sampler is not None:
            self.sampler.stop()
        listener.begin()
        self.listener = listener
        return True

    def _trace(self, record: StepRecord) -> None:
        """A capped profiler trace of three steps, on request only."""
        if not self.trace_file:
            return
        if record.number == COUNTED + 1:
            self.profile = self.torch.profiler.profile(record_shapes=True)
            self.profile.__enter__()
        elif self.profile is not None and record.number == COUNTED + 4:
            self.profile.__exit__(None, None, None)
            self.profile.export_chrome_trace(str(Path(self.spec.record) / "trace.json"))
            self.profile = None
        if self.profile is not None or record.number == COUNTED + 4:
            self.left_out.add(record.number)

    def finish(self, error: BaseException | None) -> None:
        """The script ended by itself: report what was seen up to there."""
        if self.listener is not None and not self.done:
            self._end("enough seen", hold=False)  # enough had been seen before; how it ends without updates is nothing
        elif not self.done:
            self._end(describe(error), code=exit_code(error), hold=False)

    # -- the report ----------------------------------------------------------------------------------------------

    def _end(self, how: str, code: int | None = None, hold: bool = True) -> None:
        self.done = True
        _flush()
        if self.sampler is not None:
            self.sampler.stop()
        if self.listener is not None:
            self.noise = self.listener.found()
            self.listener.close()
        message: dict[str, Any] = {"kind": "diagnosis", "how": how, "code": code, "steps": len(self.records)}
        if self.records and self.torch is not None:
            message["measurement"] = msgspec.to_builtins(self.measurement())
            message["count"] = None if self.count is None else msgspec.to_builtins(self.count)
            message["files"] = [str(file) for file in self._files()]
        else:
            message["torch"] = self.torch is not None
            message["backward"] = self.watch.loss_seen
        self._tell(message)
        if hold:
            self._hold()

    def _folder(self) -> Path:
        """Where the script's own sources lie."""
        return Path.cwd() if self.spec.module else Path(self.spec.target).resolve().parent

    def _files(self) -> list[Path]:
        """The script and the modules beside it that it imported: what a plan depends on. Relative to their folder."""
        folder = self._folder()
        found = set()
        for module in list(sys.modules.values()):
            name = getattr(module, "__file__", None)
            if isinstance(name, str) and name.endswith(".py"):
                path = Path(name)
                if path.is_relative_to(folder) and "site-packages" not in path.parts and path.exists():
                    found.add(path.relative_to(folder))
        return sorted(found)[:500]

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self.channel.send(message)
        except ChannelClosed:
            os._exit(0)  # nobody is there to end this process

    def _hold(self) -> None:
        """Wait to be killed; nothing of the script is unwound, so nothing of it can save over anything."""
        stand_still()

    def measurement(self) -> Measurement:
        """Everything seen, as a record."""
        watch = self.watch
        training = self._training_loader()
        facts = self._facts(training)
        startup = None if watch.first_work is None else watch.first_work - watch.born
        found = anatomy(
            self.records,
            startup=startup,
            batch_size=getattr(training, "batch_size", None),
            on_device=facts.device != "cpu",
            left_out=frozenset(self.left_out),
        )
        sampler = self.sampler
        lines = tuple(_per_step(line, found.step.value) for line in sampler.lines()) if sampler is not None else ()
        share = watching_cost(watch, self.torch, self.records) if found.step.value else None
        overhead = None
        if share is not None and found.step.value:
            sampling = sampler.cpu_share() if sampler is not None else 0.0
            overhead = Quantity(value=share / found.step.value + sampling, unit="fraction", basis="estimated")
        return Measurement(
            script=self.spec.target,
            arguments=self.spec.arguments,
            created=time.strftime("%Y-%m-%d %H:%M:%S"),
            anatomy=found,
            facts=facts,
            lines=lines,
            syncs=self.syncs.lines(max(len(self.records) - 1, 1), found.step.or_else(0.0)) if self.syncs else (),
            device_phases=self.events.seconds(found.warmup_steps) if self.events else {},
            syncs_note="not applicable on CPU" if facts.device == "cpu" else "host time blocked in calls that wait",
            overhead=overhead,
            notes=self._notes(),
            work=None if self.work is None else self.work.found(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.syncs is not None:
            notes.append(
                "phases are host times: kernels run behind them, so waiting shows in device syncs; device times come "
                "from events; none of this was ever run on CUDA"
            )
        if self.watch.grad_only and not self.watch.loss_seen:
            notes.append("the script uses torch.autograd.grad only: its loss is not seen, so nothing can be proven")
        if len(self.watch.optimizers) > 1:
            notes.append(f"{len(self.watch.optimizers)} optimizers make one global step")
        if self.noise is not None and self.noise.why:
            notes.append(f"the noise of the gradient is not known: {self.noise.why}")
        return tuple(notes)

    def _training_loader(self) -> Any:
        best, most = None, -1.0
        for reference in self.watch.loaders:
            loader = reference()
            if loader is not None and not self.watch.evaluation_only(loader):
                batches = self.watch.waited(loader)[1]
                if batches > most:
                    best, most = loader, batches
        return best

    def _facts(self, training: Any) -> ScriptFacts:
        watch = self.watch
        per_epoch = None
        try:
            per_epoch = len(training) if training is not None else None
        except TypeError:
            pass
        found = script_facts(watch, self.traits, self.torch, "" if self.spec.module else self.spec.target)
        return msgspec.structs.replace(
            found,
            losses=tuple(self.losses[:200]),
            page_faults=self._page_faults(),
            fault_seconds=fault_seconds(),
            steps_total=self.horizon.steps(per_epoch, self._batches_per_step()),
            recipe=msgspec.structs.replace(
                self.recipe.facts(watch, self.records, self.losses, [self._folder() / file for file in self._files()]),
                noise=self.noise,
            ),
        )

    def _batches_per_step(self) -> float:
        return mean_interval([float(r.batches) for r in self.records[-50:]]).or_else(1.0)

    def _page_faults(self) -> float | None:
        """Median over the later half of the steps; the first ones fault in what is then kept."""
        later = self.faults[len(self.faults) // 2 :]
        steps = [b - a for a, b in itertools.pairwise(later)]
        return median_of([float(value) for value in steps]) if len(steps) >= 3 else None


def _per_step(line: LineCost, step: float | None) -> LineCost:
    """The sampler's seconds are in total; shown are seconds of a step."""
    share = line.share
    if step is None or share.value is None:
        return line
    seconds = Quantity(
        value=share.value * step,
        unit="s",
        low=None if share.low is None else share.low * step,
        high=None if share.high is None else share.high * step,
        n=share.n,
    )
    return msgspec.structs.replace(line, seconds=seconds)


def _flush() -> None:
    """What the script has printed must be seen although it never ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
