"""Run a script and write down when its optimizer has stepped: `python paced.py STAMPS script.py ARGS`.

STAMPS gets one double a step: seconds of the machine's monotonic clock.
"""

from __future__ import annotations

import os
import runpy
import struct
import sys
import time


def main() -> None:
    """Stamp every step of the script named on the command line."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    stamps = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def stamp(*_: object) -> None:
        os.write(stamps, struct.pack("d", time.monotonic()))

    register_optimizer_step_post_hook(stamp)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
