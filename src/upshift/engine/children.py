"""Processes that end with the one that trains, where it ends without unwinding: loader workers and compilers.

Other children (a process that carries the record to a tracker, one that the person started) are left alone.
"""

from __future__ import annotations

import multiprocessing

#: Names of programs that torch starts to build kernels, and words in the command line of its pool of compilers.
COMPILERS = frozenset(
    ("c++", "g++", "gcc", "cc1plus", "collect2", "as", "ld", "clang", "clang++", "nvcc", "cicc", "ptxas", "ninja")
)
POOL = "compile_worker"


def end() -> None:
    """End them at once; what has ended already is passed over."""
    import psutil

    for worker in multiprocessing.active_children():
        if worker.daemon:
            # Python would end these itself, had the interpreter the time to.
            worker.kill()
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name() in COMPILERS or any(POOL in word for word in child.cmdline()):
                child.kill()
        except psutil.Error:
            continue
