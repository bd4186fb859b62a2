"""The export: the share as a FUSE mount in which every change of metadata is a change of the version table.

The bump matrix (``docs/spec/bump-matrix.md``) is the sum of what :class:`~coherency.fuse.passthrough.Passthrough` puts
into ``changing``. The kernel gets no cache time: a reader that has just compared versions must not be answered from
the host's own cache, which learns of a change only after the writer has got its reply.

A look-up of the introduction of a guest that is here, in the root, tells which process works for that guest; the error that
it gets tells the guest that it was heard (``docs/spec/control.md``, section 8).

If somebody watches what is changed past the export, he wants to know what was shown; see ``shown``.
"""

from __future__ import annotations

import errno
import os

from coherency.daemon.changes import Change, Changes
from coherency.daemon.origins import Origins
from coherency.daemon.shown import Shown
from coherency.fuse.abi import ROOT_ID
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Reply
from coherency.fuse.tree import Leaving
from coherency.ids import HostInode
from coherency.leases import introduced


class Export(Passthrough):
    """A passthrough over the share that announces what it changes."""

    tracks_changes = True
    most_lock_waits = 768  # of 1024 threads

    def __init__(
        self,
        share: int,
        changes: Changes,
        *,
        descriptor_limit: int,
        origins: Origins | None = None,
        shown: Shown | None = None,
    ) -> None:
        """``share``: the open directory, owned by the export from now on. ``origins``: None if nobody introduces itself;
        ``shown``: None if nobody watches.
        """
        super().__init__(share, descriptor_limit=descriptor_limit)
        self._changes, self._origins, self._shown = changes, origins, shown
        if shown is not None:
            shown.mark(self.nodes.root.ino)

    def changing(self, request: Request, *inodes: HostInode, leaving: tuple[Leaving, ...] = ()) -> Change:
        led_to = tuple(name.ino for name in leaving if name.ino is not None) if leaving else ()
        return self._changes.change(inodes, request, leaving=led_to)

    def lookup(self, request: Request) -> Reply | Deferred:
        if request.node == ROOT_ID and self._origins is not None:
            session = introduced(request.body.name)
            if session is not None and self._origins.introduce(session, request.pid):
                raise OSError(errno.EISCONN, "an introduction")
        return super().lookup(request)

    def look_up(self, parent: Node, at: int, name: bytes) -> tuple[Node, bytes]:
        """Again, if what was found was not marked before: rule 2 of ``shown``."""
        if self._shown is None:
            return super().look_up(parent, at, name)
        while True:
            began = self._shown.marks
            node, attr = super().look_up(parent, at, name)
            if self._shown.was_shown(node.ino, began):
                return node, attr
            self.nodes.forget(node.id, 1)

    def made(self, fd: int) -> None:
        if self._shown is not None:
            self._shown.mark(self.nodes.inode_number(os.fstat(fd)))
