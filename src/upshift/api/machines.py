"""doctor() and selftest(): this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from upshift.api.target import Say
from upshift.hook.process import HookRunner

if TYPE_CHECKING:
    from upshift.hardware.health import Health
    from upshift.search.selftest import SelftestReport


def doctor(say: Say = lambda text: None, quick: bool = False) -> Health:
    """What of this machine stands in the way of training and of trials, in some seconds.

    Args:
        quick: leave out what takes most of them: the speed of the disk, the compiler's work, imports of what is built
            against torch.
    """
    from upshift.errors import NotIsolatedError
    from upshift.hardware.health import look
    from upshift.hook import isolate
    from upshift.techniques.allocator import find_library

    say("looking at this machine")
    rung, problem = "", ""
    try:
        rung = isolate.probe()
    except NotIsolatedError as error:
        problem = error.message
    found = {kind: str(path) for kind in ("tcmalloc", "jemalloc") if (path := find_library(kind, os.environ))}
    say("asking torch, the driver and the compiler")
    return look(rung, problem, found, quick=quick)


def selftest(seconds: float, say: Say = lambda text: None) -> SelftestReport:
    """Trials whose truth is known, for about `seconds`: how often upshift is wrong on this machine, and what it sees.

    Ends early, with what is known by then, on KeyboardInterrupt.
    """
    from upshift.search.selftest import Selftest

    return Selftest(HookRunner(), seconds, say).run()
