"""The system calls of fanotify(7), as far as a whole file system is watched with names and identities.

The queue keeps the kernel's own limit, ``fs.fanotify.max_queued_events``: what does not fit any more is announced by one
event (``Q_OVERFLOW``), and nothing waits.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from coherency.daemon.fanotify_events import ATTRIB, CLOSE_WRITE, CREATE, DELETE, DELETE_SELF, MODIFY, ONDIR, RENAME
from coherency.fuse.syscalls import AT_FDCWD, proc_path

BUFFER_BYTES: Final = 65536
"""What one read takes at most. It has fewer than 1300 events, and these have fewer keys than a RECALL may name."""

_FAN_CLOEXEC: Final = 0x1
_FAN_NONBLOCK: Final = 0x2
_FAN_REPORT_DFID_NAME_TARGET: Final = 0x200 | 0x400 | 0x800 | 0x1000
_FAN_MARK_ADD: Final = 0x1
_FAN_MARK_FILESYSTEM: Final = 0x100
_OF_FILE_SYSTEM: Final = "fanotify sdev:"
_MINOR_BITS: Final = 20
_EVENTS: Final = ATTRIB | MODIFY | CLOSE_WRITE | CREATE | DELETE | RENAME | DELETE_SELF | ONDIR
"""CLOSE_WRITE stands for what has no event of its own: pages of a mapping, and asynchronous writes."""

_libc = ctypes.CDLL(None, use_errno=True)
_init = _libc.fanotify_init
_init.argtypes, _init.restype = (ctypes.c_uint, ctypes.c_uint), ctypes.c_int
_mark = _libc.fanotify_mark
_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)
_mark.restype = ctypes.c_int


class Group:
    """A queue of events. ``OSError`` from the constructor if the kernel has nothing of the kind, or too many already."""

    def __init__(self) -> None:
        self.fd = _check(_init(_FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_REPORT_DFID_NAME_TARGET, os.O_RDONLY | os.O_CLOEXEC))

    def watch(self, fd: int) -> None:
        """From now on the queue gets the events of the whole file system that ``fd`` (O_PATH is enough) is on.

        Once more does not matter.
        """
        _check(_mark(self.fd, _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM, _EVENTS, AT_FDCWD, proc_path(fd)))

    def watched(self) -> frozenset[tuple[int, int]]:
        """The devices, as major and minor number, of the file systems that are watched. One that is unmounted for good is no longer."""
        with open(f"/proc/self/fdinfo/{self.fd}") as lines:  # proc_pid_fdinfo(5)
            devices = [int(line[len(_OF_FILE_SYSTEM) :].split()[0], 16) for line in lines if line.startswith(_OF_FILE_SYSTEM)]
        return frozenset((device >> _MINOR_BITS, device & (1 << _MINOR_BITS) - 1) for device in devices)

    def read(self) -> bytes:
        """What has happened, for ``events_of_others``; empty if nothing has."""
        try:
            return os.read(self.fd, BUFFER_BYTES)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self.fd)


def why_not(error: OSError, kind: str) -> str:
    """What it means for an operator that ``Group`` or ``watch`` failed on a file system of type ``kind``."""
    number = error.errno or errno.EIO
    kind = kind[:_LONGEST_KIND] if kind.isprintable() else "unknown"
    return _REASONS.get(number, "{error}").format(kind=kind, error=os.strerror(number))


_LONGEST_KIND: Final = 32
"""The type of a FUSE file system is up to its server."""
_NO_HANDLES: Final = (
    "a file system of type {kind} does not tell what is changed in it (an overlay does if it is mounted with nfs_export=on)"
)
_REASONS: Final = {
    errno.EPERM: "to watch a whole file system takes CAP_SYS_ADMIN in the first user namespace",
    errno.EINVAL: "Linux 5.17 or later is needed",
    errno.ENOSYS: "this kernel has no fanotify",
    errno.EXDEV: "of {kind} only the topmost subvolume can be watched",
    errno.ENODEV: _NO_HANDLES,
    errno.EOPNOTSUPP: _NO_HANDLES,
    errno.EEXIST: "another file system here has the same id",
    errno.EMFILE: "too many fanotify groups (fs.fanotify.max_user_groups)",
    errno.ENOSPC: "too many fanotify marks (fs.fanotify.max_user_marks)",
}


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
