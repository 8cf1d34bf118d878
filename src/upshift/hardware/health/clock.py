"""The clock of the machine: is the time of day plausible, do files agree with it, is it kept right?"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from pathlib import Path

from upshift.hardware.health.check import Check
from upshift.units import seconds as in_words

#: Seconds by which a file's time may differ from the clock: file systems round it, up to 2 s.
FILE_SECONDS = 3.0
#: A clock this far behind files that are there already is wrong: time zones are no excuse, all is in UTC.
BEHIND_SECONDS = 86400.0
#: No machine that runs this is older: 2026-01-01 UTC.
EARLIEST = 1767225600.0

WHY = "Certificates, caches and the times in records rest on it; between machines logs must agree."
SET = "timedatectl set-ntp true"


def clock(now: float, newest: float, skew: float | None, synchronised: bool | None, folder: str = "") -> Check:
    """The clock against what is known of the time.

    Args:
        now: seconds since 1970 by the clock; newest: the latest time of a file that was there before;
        skew: seconds by which a file written now differs from the clock, None where none could be written in `folder`;
        synchronised: whether the kernel's clock is kept right by NTP or the like; None: it does not say.
    """
    kept = {True: "kept by NTP or the like", False: "not kept by NTP", None: "who keeps it is not known"}[synchronised]
    found = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(now))} UTC, {kept}"
    late = max(newest, EARLIEST) - now
    if late > BEHIND_SECONDS:
        return Check("clock", "wrong", f"{found}; {in_words(late)} behind files of this installation", WHY, SET)
    if skew is not None and abs(skew) > FILE_SECONDS:
        return Check("clock", "note", f"{found}; files in {folder} get a time {in_words(abs(skew))} "
                     f"{'ahead of' if skew > 0 else 'behind'} it", "The file server has another time: what asks "
                     "whether a file is newer (caches, builds) goes wrong.", SET)  # fmt: skip
    if synchronised is False:
        return Check("clock", "note", found, WHY, SET)
    return Check("clock", "ok", found, WHY)


def file_skew(folder: Path) -> float | None:
    """Seconds by which the time of a file written now lies after (or before: negative) the clock; None: unwritable."""
    try:
        before = time.time()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".upshift-clock-") as file:
            file.write(b"0")
            file.flush()
            seen = os.stat(file.name).st_mtime
        after = time.time()
    except OSError:
        return None
    return min(seen - before, 0.0) if seen < before else max(seen - after, 0.0)


def synchronised() -> bool | None:
    """Whether the kernel calls its clock synchronised (adjtimex(2), read only); None where it cannot be asked."""
    if sys.platform != "linux":
        return None
    try:
        # `struct timex` is 208 bytes; all zero asks without setting anything. 5 is TIME_ERROR: not synchronised.
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != 5


def look(folder: Path) -> Check:
    """The clock of this machine, with files in `folder`."""
    newest = os.stat(__file__).st_mtime
    return clock(time.time(), newest, file_skew(folder), synchronised(), str(folder))
