"""What each of several test processes that run at a time has for itself, so that they do not meet: mounts, POSIX shared memory.

Not for themselves: processor, limits of the kernel, its caches. Tests that change one of these are marked ``alone``.
"""

import ctypes
import os
from typing import Final

import pytest

from coherency.fuse import syscalls

_CLONE_NEWNS: Final = 0x00020000
_MS_REC: Final = 1 << 14
_MS_PRIVATE: Final = 1 << 18


def is_worker(config: pytest.Config) -> bool:
    """Of pytest-xdist, one of several."""
    return hasattr(config, "workerinput")


def have_own_mounts() -> None:
    """A mount namespace for the calling thread, which runs the tests, and what it starts. Without root there are no mounts anyway."""
    if os.geteuid() != 0:
        return
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    syscalls.mount("none", "/", "none", _MS_REC | _MS_PRIVATE, "")
    syscalls.mount("own", "/dev/shm", "tmpfs", 0, "mode=1777")
