"""The export: the share as a FUSE mount in which every change of metadata is a change of the version table.

The bump matrix (``docs/spec/bump-matrix.md``) is the sum of what :class:`~coherency.fuse.passthrough.Passthrough` puts
into ``changing``. The kernel gets no cache time: a reader that has just compared versions must not be answered from
the host's own cache, which learns of a change only after the writer has got its reply.

A look-up of the introduction of a guest that is here, in the root, tells which process works for that guest; the error that
it gets tells the guest that it was heard (``docs/spec/control.md``, section 8).
"""

from __future__ import annotations

import errno

from coherency.daemon.changes import Change, Changes
from coherency.daemon.origins import Origins
from coherency.fuse.abi import ROOT_ID
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Reply
from coherency.fuse.tree import Leaving
from coherency.ids import HostInode
from coherency.leases import introduced


class Export(Passthrough):
    """A passthrough over the share that announces what it changes."""

    tracks_changes = True
    most_lock_waits = 768  # of 1024 threads

    def __init__(self, share: int, changes: Changes, *, descriptor_limit: int, origins: Origins | None = None) -> None:
        """``share``: the open directory, owned by the export from now on. ``origins``: None if nobody introduces itself."""
        super().__init__(share, descriptor_limit=descriptor_limit)
        self._changes, self._origins = changes, origins

    def changing(self, request: Request, *inodes: HostInode, leaving: tuple[Leaving, ...] = ()) -> Change:
        led_to = tuple(name.ino for name in leaving if name.ino is not None) if leaving else ()
        return self._changes.change(inodes, request, leaving=led_to)

    def lookup(self, request: Request) -> Reply | Deferred:
        if request.node == ROOT_ID and self._origins is not None:
            session = introduced(request.body.name)
            if session is not None and self._origins.introduce(session, request.pid):
                raise OSError(errno.EISCONN, "an introduction")
        return super().lookup(request)
