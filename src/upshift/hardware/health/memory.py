"""Memory: how much may be used, swap, huge pages, shared memory, memory that may be locked."""

from __future__ import annotations

from pathlib import Path

from upshift.hardware.health.check import Check, State
from upshift.hardware.health.system import text_of
from upshift.units import binary

#: Bytes of shared memory that loader workers fill soon: what containers get by default.
LITTLE_SHARED = 64 * 2**20
#: Bytes in swap that mean more than a few idle pages.
MUCH_SWAPPED = 256 * 2**20
#: Bytes available below which hardly a training fits.
LITTLE_MEMORY = 2**30
#: Bytes of locked memory that InfiniBand needs to register buffers; drivers ask for no limit at all.
LITTLE_LOCKED = 2**30


def memory(limit: int, available: int, host: int) -> Check:
    """Bytes this process may use in all, bytes available now, bytes of the machine."""
    found = f"{binary(limit)} may be used, {binary(available)} of it are free now"
    if limit < host:
        found += f" (a limit of the control group; the machine has {binary(host)})"
    why = "When it is full the kernel ends the process, without a message from Python."
    if available < LITTLE_MEMORY:
        return Check("memory", "note", found, why, "ps aux --sort=-rss | head    (shows who has it)")
    return Check("memory", "ok", found, why)


def available(limit: int, host_available: int, root: Path = Path("/")) -> int:
    """Bytes that may still be taken: what the machine has, cut by what is left of the control group's `limit`.

    What the group holds as file cache counts as free: the kernel gives it back.
    """
    base = root / "sys/fs/cgroup"
    for used, stat, field in (
        (base / "memory.current", base / "memory.stat", "inactive_file"),
        (base / "memory/memory.usage_in_bytes", base / "memory/memory.stat", "total_inactive_file"),
    ):
        if text_of(used).isdecimal():
            cached = next((line.split()[1] for line in text_of(stat).splitlines() if line.startswith(f"{field} ")), "0")
            held = int(text_of(used)) - (int(cached) if cached.isdecimal() else 0)
            return max(0, min(host_available, limit - max(0, held)))
    return min(host_available, limit)


def swap(total: int, used: int) -> Check:
    """Bytes of swap, and bytes in it."""
    why = "A step that waits for swapped memory takes many times as long."
    if not total:
        return Check("swap", "ok", "none", why)
    found = f"{binary(used)} of {binary(total)} used"
    if used > MUCH_SWAPPED:
        return Check("swap", "note", found, why, "swapoff -a && swapon -a    (with that much memory free)")
    return Check("swap", "ok", found, why)


def huge_pages(root: Path = Path("/")) -> Check:
    """Transparent huge pages: `always`, `madvise` or `never`."""
    folder = root / "sys/kernel/mm/transparent_hugepage"
    why = "Pages of 2 MiB instead of 4 KiB save page faults and translations where tensors are large."
    choice = text_of(folder / "enabled")
    chosen = choice.partition("[")[2].partition("]")[0]
    if not chosen:
        return Check("huge pages", "unknown", "the system does not say", why)
    if chosen == "never":
        return Check("huge pages", "note", "off", why, f"echo madvise > {Path('/') / folder.relative_to(root)}/enabled")
    if chosen == "madvise":
        return Check("huge pages", "ok", "given to programs that ask for them (torch: THP_MEM_ALLOC_ENABLE=1)", why)
    return Check("huge pages", "ok", f"{chosen}", why)


def shared_memory(size: int | None, free: int | None = None) -> Check:
    """Bytes of /dev/shm and bytes free in it; None where there is none."""
    why = "Loader workers hand batches over through it; when it is full they die with a bus error."
    if size is None:
        return Check("shared memory", "note", "there is no /dev/shm", why)
    state: State = "wrong" if size <= LITTLE_SHARED else "note" if size < 2**30 else "ok"
    mend = "" if state == "ok" else "mount -o remount,size=2g /dev/shm    (docker: run --shm-size=2g)"
    found = f"{binary(size)} in /dev/shm"
    if free is not None:
        found += f", {binary(free)} free"
        if state == "ok" and free < LITTLE_SHARED:
            return Check("shared memory", "wrong", found, why, "rm /dev/shm/torch_*    (what dead workers left behind)")
    return Check("shared memory", state, found, why, mend)


def locked_memory(soft: int | None, infiniband: bool) -> Check:
    """Bytes this process may lock (None: no limit), on a machine with a GPU.

    CUDA's own pinned memory does not count; buffers registered for RDMA do.
    """
    why = "Transfers between machines over InfiniBand register (lock) their buffers; NCCL fails where it may not."
    if soft is None:
        return Check("locked memory", "ok", "no limit", why)
    found = f"at most {binary(soft)}"
    if infiniband and soft < LITTLE_LOCKED:
        return Check("locked memory", "wrong", f"{found}, on a machine with InfiniBand", why,
                     "ulimit -l unlimited    (docker: run --ulimit memlock=-1)")  # fmt: skip
    return Check("locked memory", "ok", f"{found}; there is no InfiniBand here that needs more", why)
