"""What checkpoints survive, counted: kills at every I/O call, power losses, damage, kill -9, two owners.

    python benchmarks/engine/crash_states.py [--all] [--states 2000] [--damage 1000] [--kills 200] [--pairs 100]

Without --all a tenth of each. Prints a table, and every problem; the exit code is 1 when there is one. Forks; POSIX
only. What is counted, and how a power loss is modelled, stands in src/upshift/testing/crashes.py and disks.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no thread may hold a lock

from upshift.testing import crashes


def main() -> int:
    """Run the counts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the full counts (some minutes)")
    parser.add_argument("--states", type=int, default=2000, help="crash states after a power loss")
    parser.add_argument("--damage", type=int, default=1000, help="truncations, and flipped bits, in each file")
    parser.add_argument("--kills", type=int, default=200, help="kill -9 of a process that saves without pause")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of processes that want one folder")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    given = parser.parse_args()
    share = 1 if given.all else 10

    def few(n: int) -> int:
        return max(n // share, 1)

    counts: list[Callable[[Path], crashes.Counts]] = [
        lambda root: crashes.kill_at_each_call(root, recovery_every=share),
        lambda root: crashes.power_losses(root, states=few(given.states)),
        lambda root: crashes.damage(root, each=few(given.damage)),
        lambda root: crashes.random_kills(root, kills=few(given.kills)),
        lambda root: crashes.two_owners(root, pairs=few(given.pairs)),
    ]
    bad = 0
    print(f"{platform.platform()}, Python {platform.python_version()}")
    print(f"{'fault':<32} {'tried':>7} {'problems':>9} {'seconds':>8}  note")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for number, count in enumerate(counts):
            root = Path(folder) / str(number)
            root.mkdir()
            found = count(root)
            bad += len(found.problems)
            print(
                f"{found.name:<32} {found.tried:>7,} {len(found.problems):>9} {found.seconds:>8.1f}  {found.note}",
                flush=True,
            )
            for problem in found.problems[:10]:
                print(f"    {problem}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
