"""The export: the share as a FUSE mount in which every change of metadata is a change of the version table.

The bump matrix (``docs/spec/bump-matrix.md``) is the sum of what :class:`~coherency.fuse.passthrough.Passthrough` puts
into ``changing``. The kernel gets no cache time: a reader that has just compared versions must not be answered from
the host's own cache, which learns of a change only after the writer has got its reply.

A change of owner takes names away, as it were: whether its caller owns an object, a kernel decides by the owner that it
was told last, and it asks for attributes before only if it looks the name up.

A look-up of the introduction of a guest that is here, in the root, tells which process works for that guest; the error that
it gets tells the guest that it was heard (``docs/spec/control.md``, section 8).

If somebody watches what is changed past the export, he wants to know what was shown, and as whose; see ``shown``, ``owners``.

If somebody wants to know what happens in the share, it is told when a change has ended: the words are even, and all guests have
forgotten what it made wrong. Nothing is told of a change that failed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import TracebackType
from typing import Final

from coherency.daemon.changes import Changes
from coherency.daemon.events import Events
from coherency.daemon.happened import Thing, happened
from coherency.daemon.origins import Origins
from coherency.daemon.owners import Owners
from coherency.daemon.shown import Shown
from coherency.fuse import replies
from coherency.fuse.abi import ROOT_ID, Opcode, SetattrValid
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import Deferred, Reply
from coherency.fuse.tree import Change, Leaving
from coherency.ids import HostInode
from coherency.leases import introduced

_OWNER: Final = SetattrValid.UID | SetattrValid.GID


def _nothing_to_notice() -> None:
    """Nobody watches."""


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
        owners: Owners | None = None,
        events: Events | None = None,
    ) -> None:
        """``share``: the open directory, owned by the export from now on. ``origins``: None if nobody introduces itself;
        ``shown``, ``owners``: None if nobody watches; ``events``: None if nobody is told.
        """
        super().__init__(share, descriptor_limit=descriptor_limit)
        self._changes, self._origins, self._shown, self._events = changes, origins, shown, events
        self._owners = owners
        self.catch_up: Callable[[], None] = _nothing_to_notice
        """See ``Watcher``, if there is one."""
        if shown is not None:
            shown.mark(self.nodes.root.ino)

    def changing(self, request: Request, *inodes: HostInode, leaving: tuple[Leaving, ...] = ()) -> Change:
        led_to = tuple(name.ino for name in leaving if name.ino is not None) if leaving else ()
        if request.opcode == Opcode.SETATTR and request.body.valid & _OWNER:
            led_to = inodes
        change = self._changes.change(inodes, request, leaving=led_to)
        if self._events is None or not self._events.wanted:
            return change
        return _Told(self, change, request, inodes, leaving)

    def tell(
        self, request: Request, inodes: tuple[HostInode, ...], leaving: tuple[Leaving, ...], made: list[HostInode]
    ) -> None:
        """The change is over, and has been made."""
        if self._events is None:
            return
        if leaving:
            things = tuple(Thing(each.ino or HostInode(0), each.is_directory) for each in leaving)
        elif request.opcode == Opcode.LINK:
            things = (Thing(inodes[1], is_directory=False),)
        elif made:
            things = (Thing(made[0], request.opcode == Opcode.MKDIR),)
        else:
            things = (self._thing(request),)
        origin = None if self._origins is None else self._origins.session_of(request.pid)
        self._events.tell(*happened(request, inodes, things), origin=origin)

    def _thing(self, request: Request) -> Thing:
        node = self.nodes.find(request.body.node_out if request.opcode == Opcode.COPY_FILE_RANGE else request.node)
        if node is None:  # it cannot be: a request about it is under way
            return Thing(HostInode(0), is_directory=False)
        parent = node.parent
        if parent is None or not node.name:
            return Thing(node.ino, node.is_directory)
        return Thing(node.ino, node.is_directory, parent.ino, node.name)

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

    def entry(self, node: Node, attr: bytes) -> bytes:
        self._tell_owner(node, replies.owner_of(attr))
        return super().entry(node, attr)

    def attributes(self, node: Node, fd: int) -> bytes:
        attr = super().attributes(node, fd)
        self._tell_owner(node, replies.owner_of(attr))
        return attr

    def statx(self, request: Request) -> Reply | Deferred:
        reply = super().statx(request)
        assert not isinstance(reply, Deferred)
        self._tell_owner(self.nodes.get(request.node), replies.owner_in_statx_out(reply[0]))
        return reply

    def locked(self, node: Node) -> None:
        """What its former owner has written directly in the share is noticed before the lock is answered."""
        self.catch_up()

    def _tell_owner(self, node: Node, owner: tuple[int, int]) -> None:
        if self._owners is not None:
            self._owners.tell(node.ino, owner)


class _Told:
    """A change that is told when it is over, if it was made."""

    __slots__ = ("_change", "_export", "_inodes", "_leaving", "_made", "_request")

    def __init__(
        self, export: Export, change: Change, request: Request, inodes: tuple[HostInode, ...], leaving: tuple[Leaving, ...]
    ) -> None:
        self._export, self._change, self._request = export, change, request
        self._inodes, self._leaving = inodes, leaving
        self._made: list[HostInode] = []

    def __enter__(self) -> Change:
        self._change.__enter__()
        return self

    def touch(self, ino: HostInode) -> None:
        self._change.touch(ino)
        self._made.append(ino)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._change.__exit__(kind, error, trace)
        if kind is None:
            self._export.tell(self._request, self._inodes, self._leaving, self._made)
