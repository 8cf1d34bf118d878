"""Rung 2: the kernel refuses writes outside a few directories, for this process and its children.

Source: the kernel's Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable

_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446  # one number on every architecture
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_WRITE_FILE = 1 << 1
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE = 0b1111111 << 6  # the seven kinds of directory entry, from character device to symbolic link
_REFER = 1 << 13  # since ABI 2: rename or link into another directory
_TRUNCATE = 1 << 14  # since ABI 3
_FOR_FILES = _WRITE_FILE | _TRUNCATE

_libc = ctypes.CDLL(None, use_errno=True)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def _syscall(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result


def abi() -> int:
    """The version of Landlock in the running kernel, 1 or more.

    Raises:
        OSError: the kernel has no Landlock (ENOSYS), it is switched off (EOPNOTSUPP), or a filter forbids it.
    """
    return _syscall(_SYS_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))


def restrict(writable: Iterable[str]) -> int:
    """Deny this thread, and all it starts, every write outside `writable`; not reversible.

    Creating, removing, renaming and (from ABI 3) truncating are denied too. Reading and running stay allowed.
    Changing modes, times or owners is beyond Landlock.

    Args:
        writable: existing directories or files.

    Returns:
        The ABI version used.

    Raises:
        OSError: Landlock is not available, or a path of `writable` cannot be opened.
    """
    version = abi()
    handled = _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE
    if version >= 2:
        handled |= _REFER
    if version >= 3:
        handled |= _TRUNCATE
    attributes = ctypes.c_uint64(handled)
    ruleset = _syscall(
        _SYS_CREATE_RULESET,
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
        ctypes.c_uint32(0),
    )
    try:
        for path in writable:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                rule = _PathBeneath(handled if folder else handled & _FOR_FILES, descriptor)
                _syscall(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
            finally:
                os.close(descriptor)
        if _libc.prctl(_PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(value) for value in (1, 0, 0, 0))) == -1:
            raise OSError(errno.EPERM, "Landlock: no_new_privs cannot be set")
        _syscall(_SYS_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return version
