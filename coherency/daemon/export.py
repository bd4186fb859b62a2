"""The export: the share as a FUSE mount in which every change of metadata is a change of the version table.

The bump matrix (``docs/spec/bump-matrix.md``) is the sum of what :class:`~coherency.fuse.passthrough.Passthrough` puts
into ``changing``. The kernel gets no cache time: a reader that has just compared versions must not be answered from
the host's own cache, which learns of a change only after the writer has got its reply.
"""

from __future__ import annotations

from coherency.daemon.changes import Change, Changes
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.tree import Leaving
from coherency.ids import HostInode


class Export(Passthrough):
    """A passthrough over the share that announces what it changes."""

    tracks_changes = True

    def __init__(self, share: int, changes: Changes, *, descriptor_limit: int) -> None:
        """``share``: the open directory, owned by the export from now on."""
        super().__init__(share, descriptor_limit=descriptor_limit)
        self._changes = changes

    def changing(self, request: Request, *inodes: HostInode, leaving: tuple[Leaving, ...] = ()) -> Change:
        return self._changes.change(inodes, request)
