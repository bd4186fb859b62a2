"""What is mounted where, without asking a mount: a dead one would not answer. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import errno
import os
import re
from typing import Final, NamedTuple

from coherency.errors import MountError
from coherency.fuse import syscalls

FILE_SYSTEM_TYPE: Final = "fuse.coherency"
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    path: bytes
    kind: str
    device: int  # the minor number; of a FUSE mount, that of its connection


def mounts() -> list[Mount]:
    """All mounts that this process sees, the oldest first."""
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            before, _, after = line.partition(b" - ")
            fields = before.split(b" ")
            path = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
            found.append(Mount(path, os.fsdecode(after.split(b" ")[0]), int(fields[2].split(b":")[1])))
    return found


def mount_at(path: str | os.PathLike[str]) -> Mount | None:
    """The topmost mount at ``path`` (resolved up to its last component only), if it is a mount point."""
    parent, name = os.path.split(os.path.abspath(path))
    wanted = os.fsencode(os.path.join(os.path.realpath(parent), name))
    return next((mount for mount in reversed(mounts()) if mount.path == wanted), None)


def remove_dead_mount(path: str | os.PathLike[str]) -> bool:
    """Unmount what a killed agent left at ``path``. False if nothing of ours is mounted there.

    Raises :class:`MountError` if a mount of ours there is alive.
    """
    mount = mount_at(path)
    if mount is None or mount.kind != FILE_SYSTEM_TYPE:
        return False
    try:
        os.statvfs(path)  # the kernel answers a stat of a dead mount itself, for as long as it may believe what it has
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
    else:
        raise MountError(
            f"{os.fspath(path)} is a mount of ours already: choose another mount point, or unmount that one first"
        )
    syscalls.umount(os.fsdecode(mount.path), syscalls.MNT_DETACH)
    return True
