"""The guest's file system in the modes ``strict`` and ``prompt``: mode ``access``, whose kernel may keep some of the answers.

1. Attributes are granted in replies to GETATTR and STATX, names in replies to LOOKUP; every other reply has no time. A reply
   that grants is put together when it is written, under the grant lock, and only if the user cache holds then, under the
   present versions, the very object that it says. Names that do not exist are never granted.
2. A key is registered before what it stands for is fetched, so that the Confirm is usually there when it is next asked for.
3. A change of the guest's own is forwarded after the kernel has forgotten what was granted of its inodes and names.
4. What a helper asks is answered as its job wants it, or truthfully, and never grants anything.
5. A rename moves what the kernel has of a name to the new name, with the time that the old one was granted for, and nobody
   would ever recall the new one. So a rename of a name that is granted is not forwarded: the name is dropped, and ESTALE makes
   the kernel begin anew (``retry_estale``), which looks the name up afresh. After that, and after each rename, the old name is
   not granted for a while, whatever it leads to: until the kernel has moved what it has. A name that was
   granted, recalled, and not looked up since is treated likewise: the kernel may have resolved it before it was recalled.
6. The kernel keeps ACLs, without any time, until it is told to forget the attributes. It may, if the attributes' key is good for
   grants; otherwise it is told before the reply is written, and a reply that comes after that is not kept (``__get_acl``).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Final

from coherency.fuse import replies
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node
from coherency.fuse.session import Deferred, Operation, Reply
from coherency.fuse.tree import Change, Leaving, Unwatched
from coherency.guest_agent.cache import UserCache
from coherency.guest_agent.filesystem import ACLS, CachingFileSystem
from coherency.guest_agent.grants import GrantedName, Grants
from coherency.guest_agent.recalls import Helpers, Recalls
from coherency.ids import HostInode, NodeId, SlotIndex
from coherency.leases import attributes_key, names_key

_RENAME_EXCHANGE: Final = 1 << 1
_MANY_ENTRIES: Final = 1024
"""A listing of more registers nothing: who lists such a directory mostly wants the names alone."""
_WHILE_RENAMED_NS: Final = 1 << 60
_UNTIL_RETRIED_NS: Final = 60_000_000_000
"""The kernel sends a RENAME again once only. Until it has looked the names up for that, which may have to wait for a daemon that
stands still, they must not be granted again."""
_HOLD_OFF_NS: Final = 1_000_000_000
"""Longer than the kernel takes from the answer to a RENAME to moving what it has."""


class GrantingFileSystem(CachingFileSystem):
    """See the module. It grants nothing before ``grant_by``."""

    def __init__(self, lower: int, cache: UserCache, grants: Grants, *, descriptor_limit: int) -> None:
        """``lower``: the open lower directory, owned by this object from now on."""
        super().__init__(lower, cache, descriptor_limit=descriptor_limit)
        self.grants = grants
        self._recalls: Recalls | None = None
        self._helpers: Helpers | None = None
        self._highest_granted = 0

    def grant_by(self, recalls: Recalls, helpers: Helpers) -> None:
        """From now on there is somebody who takes back what is granted."""
        self._helpers = helpers
        self._recalls = recalls

    def stop_granting(self) -> None:
        """From now on nothing is granted any more; what was can still be recalled."""
        with self.grants.lock:
            self._recalls = None

    @property
    def operations(self) -> Mapping[int, Operation]:
        operations = dict(super().operations)
        for opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.STATX):
            operations[opcode] = self._unless_helper(operations[opcode])
        return operations

    # ---- who asks ----

    def _unless_helper(self, operation: Operation) -> Operation:
        def answer(request: Request) -> Reply | Deferred:
            helpers = self._helpers
            if helpers is None or not helpers.is_helper(request.pid):
                return operation(request)
            number = helpers.lie(request)
            if number is not None:
                raise OSError(number, "said to a helper")
            reply = operation(request)
            return reply.without_grant() if isinstance(reply, _Grant) else reply

        return answer

    def _quick_lookup(self, parent_id: int, body: memoryview, pid: int) -> bytes | int | Deferred | None:
        if self._helpers is not None and self._helpers.is_helper(pid):
            return None
        return super()._quick_lookup(parent_id, body, pid)

    def _quick_getattr(self, node_id: int, body: memoryview, pid: int) -> bytes | int | Deferred | None:
        if self._helpers is not None and self._helpers.is_helper(pid):
            return None
        return super()._quick_getattr(node_id, body, pid)

    # ---- granting ----

    def about_to_fetch(self, *inodes: HostInode) -> None:
        if len(inodes) > _MANY_ENTRIES:
            return
        reader = self.cache.reader
        slots = dict.fromkeys(reader.slot_of(ino) for ino in inodes)
        self.grants.register([*map(attributes_key, slots), *map(names_key, slots)], reader.epoch)

    def answer_name(self, cache: UserCache, parent: Node, name: bytes, node: Node, attr: bytes) -> bytes | Deferred:
        return _NameGrant(self, cache, parent, name, node, attr)

    def answer_attributes(self, cache: UserCache, node: Node, attr: bytes) -> bytes | Deferred:
        return _AttributesGrant(self, cache, node, attr)

    def answer_statx(self, cache: UserCache, node: Node, mask: int, reply: Reply) -> Reply | Deferred:
        return _StatxGrant(self, cache, node, mask, reply)

    def time_of_name(self, cache: UserCache, parent: Node, name: bytes, node: Node, attr: bytes) -> int:
        """For how many ns the kernel may have it: with the grant lock held until the reply is written."""
        if cache is not self.cache or self._recalls is None:
            return 0
        if not self.holds_name(cache, parent, name, node) or not self.holds_attributes(cache, node, attr):
            return 0
        granted = GrantedName(parent.id, name, node.id)
        left_ns = self.grants.grant_name(cache.reader.slot_of(node.ino), granted, cache.reader.epoch)
        if left_ns:
            self._tell_keeper(max(parent.id, node.id))
        return left_ns

    def time_of_attributes(self, cache: UserCache, node: Node) -> int:
        """The same for attributes, which the caller has found to be valid."""
        if cache is not self.cache or self._recalls is None:
            return 0
        left_ns = self.grants.grant_attributes(cache.reader.slot_of(node.ino), node.id, cache.reader.epoch)
        if left_ns:
            self._tell_keeper(node.id)
        return left_ns

    def _tell_keeper(self, node: NodeId) -> None:
        if node > self._highest_granted and self._helpers is not None:
            self._helpers.granted_up_to(node)
            self._highest_granted = node

    def getxattr(self, request: Request) -> Reply:
        if request.body.name not in ACLS:
            return super().getxattr(request)
        try:
            return super().getxattr(request)
        finally:  # that there is none is kept, too
            self._let_keep_acl(self.nodes.get(request.node), request.body.name)

    def _let_keep_acl(self, node: Node, name: bytes) -> None:
        """Rule 6."""
        cache, recalls = self.cache, self._recalls
        with self.grants.lock:
            kept = self.holds_acl(cache, node, name) and self.time_of_attributes(cache, node) > 0
        if not kept and recalls is not None:
            recalls.forget_acl(node.id)

    def forget(self, request: Request) -> Reply:
        known = [self.nodes.find(node_id) for node_id, _ in request.body.forgotten]
        reply = super().forget(request)
        for node in known:
            if node is not None and self.nodes.find(node.id) is None:
                self.grants.forget(node.id, self.cache.reader.slot_of(node.ino))
        return reply

    # ---- echoes ----

    @contextlib.contextmanager
    def unassured(self, names: Sequence[tuple[NodeId, bytes]], given_up: Callable[[], bool]) -> Iterator[None]:
        self.grants.withhold(names)
        try:
            slots = {slot for name in names if (slot := self.grants.slot_of_name(*name)) is not None}
            if slots:
                recalls = self._recalls
                if recalls is None:
                    raise InterruptedError(errno.EINTR, "nothing is taken back any more")
                recalls.take_back((), slots, given_up)
            yield
        finally:
            self.grants.allow(names)

    # ---- changes ----

    def changing(self, request: Request, *inodes: HostInode, leaving: tuple[Leaving, ...] = ()) -> Change:
        recalls = self._recalls
        if recalls is None or recalls.danger == "no-self-recall":
            return Unwatched()
        slot_of = self.cache.reader.slot_of
        slots = {slot_of(ino) for ino in inodes}
        gone = set()
        for parent, name, ino, _ in leaving:
            slot = slot_of(ino) if ino is not None else self.grants.slot_of_name(parent.id, name)
            if slot is not None:  # else the kernel has not got the name
                gone.add(slot)
        return _OwnChange(recalls, slots | gone, gone, lambda: request.interrupted)

    def rename(self, request: Request) -> Reply:
        body = request.body
        names = [(request.node, body.name)]
        if body.flags & _RENAME_EXCHANGE:
            names.append((body.new_parent, body.new_name))
        granted = {slot for name in names if (slot := self.grants.slot_of_name(*name)) is not None}
        recalls = self._recalls
        refused = bool(granted) or not all(map(self.grants.may_be_moved, names))
        if refused and recalls is not None and recalls.danger != "no-self-recall":  # rule 5
            self.grants.hold_off(names, _UNTIL_RETRIED_NS)
            with _OwnChange(recalls, set(), granted, lambda: request.interrupted):
                raise OSError(errno.ESTALE, "a granted name is renamed: look it up again")
        self.grants.hold_off(names, _WHILE_RENAMED_NS)
        try:
            return super().rename(request)
        finally:
            self.grants.hold_off(names, _HOLD_OFF_NS)


class _Grant(Deferred):
    """A reply that lets the kernel keep something, if it may when it is written."""

    __slots__ = ()

    def without_grant(self) -> Reply:
        """The same reply for somebody who is not to cause anything to be kept."""
        raise NotImplementedError


class _NameGrant(_Grant):
    __slots__ = ("_attr", "_cache", "_fs", "_name", "_node", "_parent")

    def __init__(
        self, fs: GrantingFileSystem, cache: UserCache, parent: Node, name: bytes, node: Node, attr: bytes
    ) -> None:
        self._fs, self._cache, self._parent, self._name, self._node, self._attr = fs, cache, parent, name, node, attr

    def finish(self, send: Callable[[bytes], None]) -> None:
        fs, node, attr = self._fs, self._node, self._attr
        with fs.grants.lock:
            left_ns = fs.time_of_name(self._cache, self._parent, self._name, node, attr)
            fs.grants.looked_up((self._parent.id, self._name))
            send(replies.encode_entry(node.id, attr, left_ns, 0))

    def without_grant(self) -> Reply:
        return (self._fs.entry(self._node, self._attr),)


class _AttributesGrant(_Grant):
    __slots__ = ("_attr", "_cache", "_fs", "_node")

    def __init__(self, fs: GrantingFileSystem, cache: UserCache, node: Node, attr: bytes) -> None:
        self._fs, self._cache, self._node, self._attr = fs, cache, node, attr

    def finish(self, send: Callable[[bytes], None]) -> None:
        fs, cache, node, attr = self._fs, self._cache, self._node, self._attr
        with fs.grants.lock:
            left_ns = fs.time_of_attributes(cache, node) if fs.holds_attributes(cache, node, attr) else 0
            send(replies.encode_attr_out(attr, left_ns))

    def without_grant(self) -> Reply:
        return (replies.encode_attr_out(self._attr),)


class _StatxGrant(_Grant):
    __slots__ = ("_cache", "_fs", "_mask", "_node", "_reply")

    def __init__(self, fs: GrantingFileSystem, cache: UserCache, node: Node, mask: int, reply: Reply) -> None:
        self._fs, self._cache, self._node, self._mask, self._reply = fs, cache, node, mask, reply

    def finish(self, send: Callable[[bytes], None]) -> None:
        fs, cache, node, reply = self._fs, self._cache, self._node, self._reply
        with fs.grants.lock:
            left_ns = fs.time_of_attributes(cache, node) if fs.holds_statx(cache, node, self._mask, reply) else 0
            send(replies.retime_statx_out(reply[0], left_ns))

    def without_grant(self) -> Reply:
        return self._reply


class _OwnChange:
    """A change that this guest makes: begun when the kernel has forgotten what it touches."""

    __slots__ = ("_given_up", "_gone", "_recalls", "_slots")

    def __init__(
        self, recalls: Recalls, slots: set[SlotIndex], gone: set[SlotIndex], given_up: Callable[[], bool]
    ) -> None:
        self._recalls, self._slots, self._gone, self._given_up = recalls, slots, gone, given_up

    def __enter__(self) -> _OwnChange:
        grants, involved = self._recalls.grants, self._slots | self._gone
        grants.begin_change(involved)
        try:
            self._recalls.take_back(self._slots, self._gone, self._given_up)
        except BaseException:
            grants.end_change(involved)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recalls.grants.end_change(self._slots | self._gone)

    def touch(self, ino: HostInode) -> None:
        """What came into being is in nobody's kernel."""
