"""What the process that echoes is told: one system call, and the answers to all requests that the kernel makes of it.

Rules:

1. Nothing is forwarded: while the process holds the lock of a directory nobody waits for the host. The one exception is
   SETATTR of a regular file, which holds the lock of that file alone: its answer is what is true on arrival (rule 4).
2. Names are answered as they were before: what was removed or renamed is there, what was made is not. So the kernel drops
   what it knew, makes, removes or moves what it was told, and asks again the next time, since every reply is good for no time.
3. What is removed or moved is the node that the kernel has of that inode, so that who watches the inode itself is told too.
   What is made, and what the kernel does not know, is a node that nothing leads to: the next look finds the true one. Nothing is
   unlinked as the true node that still has a name: the kernel counts links down, and would take the inode for removed.
4. No attributes of an inode that the kernel knows are told from memory: the guest may have extended a file meanwhile, and the
   kernel drops pages beyond the size that it is told, dirty ones too. GETATTR and LOOKUP are answered after a notification
   that makes the kernel discard the attributes in the answer (``fuse_change_attributes``). SETATTR, whose answer it takes in any case,
   cannot be overtaken by another change of this guest: the kernel holds the lock of the file.
5. UNLINK, RMDIR and RENAME succeed only if the process has looked up each of their names for this very job: the kernel then
   removes or moves what rule 3 says, and nothing else. When a job is over everything is refused.
6. ACLs are refused in a way that the kernel does not remember (EACCES; who echoes does not need them).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from coherency.fuse import abi, replies
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node, NodeStore
from coherency.fuse.session import Reply
from coherency.guest_agent import echo_process
from coherency.ids import NodeId

_MODE: Final = 9  # of the fields of abi.attr
_NLINK: Final = 10
_TYPE_BITS: Final = 0o170000


class Place(NamedTuple):
    """A name in a directory, and what the process is told of it: a node, or the type of one that nothing leads to, or nothing (0)."""

    parent: Node
    name: bytes
    shown: Node | int

    @property
    def key(self) -> tuple[NodeId, bytes]:
        return self.parent.id, self.name


class EchoJob:
    """One system call. ``thing``: the node that it links, or touches; ``kind``: the type of what it makes."""

    __slots__ = ("kind", "looked_up", "over", "places", "thing", "what")

    def __init__(self, what: int, *places: Place, thing: Node | None = None, kind: int = 0) -> None:
        """``what``: see ``echo_process``."""
        self.what, self.places, self.thing, self.kind = what, places, thing, kind
        self.looked_up: set[tuple[NodeId, bytes]] = set()
        self.over = False

    @property
    def takes_names(self) -> bool:
        """Whether it makes or takes away names, of which the kernel must not be sure then."""
        return self.what not in (echo_process.MODIFY, echo_process.SET_ATTRIBUTES)

    def encoded(self) -> bytes:
        """As the process takes it."""
        nodes = [place.parent.id for place in self.places] + ([self.thing.id] if self.thing else [])
        names = [place.name for place in self.places]
        nodes, names = [*nodes, NodeId(0)][:2], [*names, b"", b""][:2]
        return echo_process.job.pack(self.what, *nodes, *map(len, names)) + b"".join(names)


class EchoAnswers:
    """Answers requests of the process. Thread-safe."""

    def __init__(
        self, nodes: NodeStore, forget_attributes: Callable[[NodeId], object], attributes_now: Callable[[Node], bytes]
    ) -> None:
        """``forget_attributes``: see rule 4; ``attributes_now`` may ask the host."""
        self._nodes, self._forget_attributes, self._attributes_now = nodes, forget_attributes, attributes_now
        self._operations: Mapping[int, Callable[[EchoJob, Request], Reply]] = {
            Opcode.LOOKUP: self._lookup, Opcode.GETATTR: self._getattr, Opcode.GETXATTR: self._getxattr,
            Opcode.MKNOD: self._make, Opcode.MKDIR: self._make, Opcode.LINK: self._make,
            Opcode.UNLINK: self._remove, Opcode.RMDIR: self._remove, Opcode.RENAME: self._rename, Opcode.RENAME2: self._rename,
            Opcode.SETATTR: self._setattr, Opcode.SETXATTR: self._setxattr,
        }  # fmt: skip

    def answer(self, job: EchoJob | None, request: Request) -> Reply:
        """The reply, or the ``OSError`` that is one. ``job``: what the process does, if it has something to do."""
        operation = self._operations.get(request.opcode)
        if job is None or job.over or operation is None:
            raise OSError(errno.EIO, "not foreseen in an echo")
        return operation(job, request)

    def _lookup(self, job: EchoJob, request: Request) -> Reply:
        key = request.node, request.body.name
        for place in job.places:
            if place.key == key:
                job.looked_up.add(key)
                return self._entry(place.shown)
        raise OSError(errno.EIO, "another name than that of the echo")

    def _entry(self, shown: Node | int) -> Reply:
        if not shown:
            raise FileNotFoundError(errno.ENOENT, "not there before the echo")
        if isinstance(shown, Node):
            if self._nodes.remember(shown):
                self._forget_attributes(shown.id)
                return (replies.encode_entry(shown.id, replies.encode_unknown_attr(shown.kind)),)
            shown = shown.kind  # the kernel has forgotten it
        return self._nowhere(shown)

    def _nowhere(self, kind: int) -> Reply:
        return (replies.encode_entry(self._nodes.unreachable(kind).id, replies.encode_unknown_attr(kind)),)

    def _getattr(self, _job: EchoJob, request: Request) -> Reply:
        node = self._nodes.get(request.node)
        self._forget_attributes(node.id)
        return (replies.encode_attr_out(replies.encode_unknown_attr(node.kind)),)

    def _getxattr(self, _job: EchoJob, _request: Request) -> Reply:
        raise PermissionError(errno.EACCES, "rule 6")

    def _make(self, job: EchoJob, request: Request) -> Reply:
        self._require(job, (request.node, request.body.name))
        return self._nowhere(job.kind)

    def _remove(self, job: EchoJob, request: Request) -> Reply:
        self._require(job, (request.node, request.body.name))
        return ()

    def _rename(self, job: EchoJob, request: Request) -> Reply:
        body = request.body
        self._require(job, (request.node, body.name), (body.new_parent, body.new_name))
        old, new = job.places
        if isinstance(old.shown, Node):
            self._nodes.moved(old.shown.key, new.parent, new.name)
        return ()

    def _setattr(self, job: EchoJob, request: Request) -> Reply:
        node = self._thing(job, request)
        attr = self._attributes_now(node)
        if abi.attr.unpack(attr)[_MODE] & _TYPE_BITS != node.kind:
            raise OSError(errno.ESTALE, "another inode by now")
        return (replies.encode_attr_out(attr),)

    def _setxattr(self, job: EchoJob, request: Request) -> Reply:
        self._thing(job, request)
        return ()

    def _thing(self, job: EchoJob, request: Request) -> Node:
        if job.thing is None or job.thing.id != request.node:
            raise OSError(errno.ESTALE, "another node than that of the echo")
        return job.thing

    @staticmethod
    def _require(job: EchoJob, *keys: tuple[int, bytes]) -> None:
        """Rule 5."""
        if tuple(place.key for place in job.places) != keys or not job.looked_up.issuperset(keys):
            raise OSError(errno.EIO, "not what the echo is about")


def links(attr: bytes) -> int:
    """The link count of a ``struct fuse_attr``."""
    return int(abi.attr.unpack(attr)[_NLINK])
