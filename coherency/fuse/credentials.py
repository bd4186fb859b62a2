"""Who a serving thread is when it creates something: the uid, gid and umask of the caller.

Ids and umask belong to one thread here, and stay as they are until a request needs others: only what creates objects
depends on them, and what a server below decides by the caller's uid. The thread keeps its capabilities: the kernel of
the FUSE mount has checked the caller's permissions, with all its groups, which are not known here.
"""

from __future__ import annotations

import os
import threading

from coherency.fuse import syscalls


class Credentials(threading.local):
    """Per thread; made once per mount, used from every serving thread."""

    _umask = -1
    _ids = (-1, -1)  # unknown: a thread begins with those of the thread that started it

    def become(self, uid: int, gid: int, umask: int | None = None) -> None:
        """What the calling thread creates from now on belongs to ``uid`` and ``gid``, with ``umask`` applied (None: any)."""
        if self._umask < 0:
            syscalls.private_umask_and_cwd()
            syscalls.keep_capabilities_across_setfsuid()
            self._umask = os.umask(0)
            os.umask(self._umask)
        if umask is not None and umask != self._umask:
            os.umask(umask)
            self._umask = umask
        if (uid, gid) != self._ids:
            self._ids = (-1, -1)  # should only one of the two be set
            syscalls.set_fs_ids(uid, gid)
            self._ids = (uid, gid)


def permits(mode: int, owner: tuple[int, int], caller: tuple[int, int], mask: int) -> bool:
    """Whether mode bits let ``caller`` (uid, gid; other groups are unknown) do ``mask`` (R_OK, W_OK, X_OK): access(2)."""
    uid, gid = caller
    if uid == 0:
        return not mask & os.X_OK or (mode & 0o170000) == 0o040000 or bool(mode & 0o111)
    shift = 6 if uid == owner[0] else 3 if gid == owner[1] else 0
    return mode >> shift & mask & 7 == mask & 7
