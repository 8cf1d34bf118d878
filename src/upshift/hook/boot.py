"""The start of a hooked process: isolate, wait for torch, patch it, run the script as `__main__`."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from upshift.errors import UpshiftError, UsageError
from upshift.hook import script, seeding
from upshift.hook.assemble import assemble, torch_is_here
from upshift.hook.channel import VARIABLE, Channel
from upshift.hook.controller import Controller
from upshift.hook.imports import AfterImport
from upshift.hook.script import clean_excepthook, run_module, run_script
from upshift.sites.runner import ChildSpec

if TYPE_CHECKING:
    from upshift.hook.offspring import Offspring

#: Environment variable with what came of techniques that only change the environment (JSON: name -> why no effect).
OUTSIDE = "UPSHIFT_OUTSIDE"


def _controller(spec: ChildSpec, channel: Channel | None) -> Controller:
    if spec.mode == "run" and spec.options.get("tune"):
        from upshift.hook.tuning import TuningController

        return TuningController(spec)
    if spec.mode == "run":
        from upshift.hook.guarded import RunController

        return RunController(spec)
    if channel is None:
        raise UpshiftError("a trial needs a parent to report to.")
    if spec.mode == "diagnose":
        from upshift.hook.observe import DiagnoseController

        return DiagnoseController(spec, channel)
    from upshift.hook.trial import TrialController

    return TrialController(spec, channel)


def _die_with_parent() -> None:
    """A killed parent must leave no child behind (prctl(2), PR_SET_PDEATHSIG; Linux only)."""
    try:
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    except (OSError, AttributeError):
        pass


def _isolate(spec: ChildSpec, channel: Channel) -> None:
    from upshift.hook.isolate import enter
    from upshift.hook.isolate.trackers import refuse_remote_writes, switch_off_trackers

    scratch = Path(spec.scratch) / "files"
    scratch.mkdir(parents=True, exist_ok=True)
    forced = spec.options.get("isolation")
    isolation = enter(scratch, keep=[Path(spec.record)], rung=forced if isinstance(forced, str) else None)
    switch_off_trackers(Path(spec.scratch) / "trackers")
    refuse_remote_writes(allow=bool(spec.options.get("allow_remote_writes")))
    channel.send({"kind": "isolation", "rung": isolation.rung, "detail": isolation.detail})


def _collect(spec: ChildSpec, imports: AfterImport, controller: Controller) -> Callable[[], None]:
    """What the script logs goes to the record; a whole run under verification also gets other seeds, and a copy of the
    files it writes. Returns what ends it."""
    if spec.options.get("seed_shift"):
        seeding.shift(int(spec.options["seed_shift"]), imports)
    if spec.mode != "run":
        return lambda: None
    from upshift.hook.scalars import Scalars, into_file

    if not spec.options.get("collect"):
        Scalars(controller.logged).install(imports)
        return lambda: None
    from upshift.hook.written import Written

    Scalars(into_file(Path(spec.record))).install(imports)
    written = Written(Path(spec.record))
    written.install()
    return written.close


def start(spec: ChildSpec, channel: Channel | None) -> None:
    """Run the target of `spec`. Returns or raises as the script does.

    The controller hears of the end when the interpreter has joined the script's threads and run its exit handlers:
    a script may train in a thread that outlives its main part.

    Raises:
        UsageError: there is nothing to run.
    """
    controller = _controller(spec, channel)
    watch = assemble(spec, controller, json.loads(os.environ.pop(OUTSIDE, "{}")))
    imports = AfterImport()

    @functools.cache
    def offspring() -> Offspring:
        from upshift.hook.offspring import Offspring

        return Offspring(spec, watch)

    def torch_ready(torch: ModuleType) -> None:
        if os.getpid() != watch.pid:
            # The script forked before it imported torch: this process speaks for itself.
            if spec.mode == "run":
                offspring().born(torch)
            return
        if spec.seed is not None:
            torch.manual_seed(spec.seed)
        torch_is_here(torch, controller)
        if spec.mode == "run":
            offspring().forked(torch)

    if spec.mode == "run":
        imports.on("multiprocessing.spawn", lambda spawn: offspring().spawned(spawn))
    if spec.seed is not None:
        seeding.seed(spec.seed, imports)
    imports.on("torch", torch_ready)
    collected = _collect(spec, imports, controller)
    ending: list[BaseException] = []

    def finish() -> None:
        if os.getpid() == watch.pid:
            controller.finish(ending[0] if ending else None)
            collected()
            watch.stage.close()
            watch.close()

    # Registered first, so it runs last.
    atexit.register(finish)
    try:
        if spec.module:
            run_module(spec.target, spec.arguments)
        else:
            run_script(spec.target, spec.arguments)
    except BaseException as raised:
        ending.append(raised)
        clean_excepthook()
        raise


def main(loaded: frozenset[str] = frozenset()) -> None:
    """Entry of the child process; `sys.argv[1]` is the file with the ChildSpec.

    Args:
        loaded: names of the modules loaded before any of ours.
    """
    script.LOADED_AT_START = loaded
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ChildSpec)
    sys.argv[1:] = []
    channel: Channel | None = None
    descriptor = os.environ.pop(VARIABLE, "")
    if descriptor:
        _die_with_parent()
        connection = socket.socket(fileno=int(descriptor))
        connection.set_inheritable(False)
        channel = Channel(connection)
    if spec.isolate and channel is not None:
        try:
            _isolate(spec, channel)
        except UpshiftError as error:
            _refuse(error, channel)
    try:
        start(spec, channel)
    except UsageError as error:
        _refuse(error, channel)


def _refuse(error: UpshiftError, channel: Channel | None) -> NoReturn:
    """Say why nothing ran: to the parent, or on stderr where this process has taken its place."""
    if channel is not None:
        channel.send({"kind": "refused", "text": error.message, "remedy": error.remedy, "code": error.exit_code})
    else:
        print(f"upshift: {error.message}\n         {error.remedy}", file=sys.stderr)
    sys.exit(error.exit_code)


def spec_bytes(spec: ChildSpec) -> bytes:
    """A spec as it travels to the child."""
    return msgspec.json.encode(spec)


__all__: list[Any] = ["main", "spec_bytes", "start"]
