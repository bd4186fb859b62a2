"""Mounts seen by this process, read from the kernel's list.

A mount whose server is dead or stopped is only ever named here, never touched: a stat() of it fails or blocks.
"""

import ctypes
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    mountpoint: Path
    type: str
    """Type of the file system with its subtype, for instance `fuse.coherency`."""


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The mounts of a mountinfo file (proc(5)), in the order in which they were made."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(b" ")
        # Six fixed fields, then optional ones up to a lone dash.
        type_index = fields.index(b"-", 6) + 1
        mountpoint = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), fields[4])
        mounts.append(Mount(Path(os.fsdecode(mountpoint)), os.fsdecode(fields[type_index])))
    return mounts


def coherency_mounts_below(directories: Iterable[Path]) -> list[Mount]:
    """Mounts of this project that now lie in or on one of the directories, given by their real paths."""
    roots = tuple(directories)
    return [
        mount
        for mount in parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
        if "fuse.coherency" in mount.type and any(mount.mountpoint.is_relative_to(root) for root in roots)
    ]


def detach(mountpoint: Path) -> None:
    """Unmounts lazily: works at once, also when the server is dead or the mount is in use; OSError if refused."""
    if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))
