"""The guest's file system in mode ``access``: a passthrough that answers from the user cache while versions agree.

The kernel of the guest keeps nothing (timeouts 0) and asks on each access; whoever is asked compares words in shared
memory, and goes to the lower directory only for what is stale. Attributes, names (also those that do not exist),
listings, symlink targets and xattrs are cached. Each fetch samples the inode's word first; for a name that is the word
of its directory, and the child's own word for the child's attributes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from coherency.fuse import abi, codec, replies, syscalls
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node
from coherency.fuse.passthrough import Passthrough, sized, visible
from coherency.fuse.session import Deferred, Operation, QuickOperation, Reply
from coherency.fuse.tree import OpenFile
from coherency.guest_agent.cache import UserCache
from coherency.guest_agent.pages import Pages
from coherency.ids import HostInode, NodeId
from coherency.shm_table import Stamp

_O_NODE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_LOCK_WAITS: Final = 128
"""Half of the threads of a guest's mount."""
_LISTING_BYTES: Final = 1 << 18
_XATTR_SIZE_MAX: Final = 65536
_ABSENT: Final = object()
ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")

# What the cache's keys begin with; the inode number follows, then a name where there are several.
_ATTRIBUTES, _NAME, _LISTING, _TARGET, _XATTR, _XATTRS, _STATX, _PAGES, _PAGES_OF_LOCKED = range(9)


class Listing(NamedTuple):
    """A whole directory."""

    records: list[bytes]  # as READDIR returns them; the offset of each is its place in the list
    inodes: dict[bytes, HostInode]
    stamp: Stamp | None


class CachingFileSystem(Passthrough):
    """See the module. ``cache`` may be exchanged at any time: an operation uses the one that it began with."""

    most_lock_waits = MOST_LOCK_WAITS
    descriptors_pin = False
    moved_directories_are_new = True

    def __init__(self, lower: int, cache: UserCache, *, descriptor_limit: int) -> None:
        """``lower``: the open lower directory, owned by this object from now on."""
        super().__init__(lower, descriptor_limit=descriptor_limit)
        self.cache = cache
        self.pages = Pages()
        self.answered_here = 0  # requests that needed nothing of the lower directory; counted like cache.Counters

    @property
    def operations(self) -> Mapping[int, Operation]:
        return {opcode: _unless_interrupted(operation) for opcode, operation in super().operations.items()}

    # ---- from memory, without further ado: what these do not know goes the ordinary way ----

    @property
    def quick_operations(self) -> Mapping[int, QuickOperation]:
        return {int(Opcode.LOOKUP): self._quick_lookup, int(Opcode.GETATTR): self._quick_getattr}

    def _quick_lookup(self, parent_id: int, body: memoryview, _pid: int) -> bytes | int | Deferred | None:
        parent = self.nodes.find(parent_id)
        if parent is None:
            return None
        cache, name = self.cache, bytes(body[:-1])
        node = cache.hit((_NAME, parent.ino, name))
        if node is None:
            return None
        if node is _ABSENT:
            self.answered_here += 1
            return errno.ENOENT
        attr = cache.hit((_ATTRIBUTES, node.ino))
        if attr is None or not self.nodes.remember(node):
            return None
        self.answered_here += 1
        return self.answer_name(cache, parent, name, node, attr)

    def _quick_getattr(self, node_id: int, _body: memoryview, _pid: int) -> bytes | int | Deferred | None:
        node, cache = self.nodes.find(node_id), self.cache
        if node is None:
            return None
        attr = cache.hit((_ATTRIBUTES, node.ino))
        if attr is None:
            return None
        self.answered_here += 1
        return self.answer_attributes(cache, node, attr)

    # ---- what becomes of an answer: hooks for who lets the kernel keep some ----

    def answer_name(self, cache: UserCache, parent: Node, name: bytes, node: Node, attr: bytes) -> bytes | Deferred:
        """The reply that ``name`` is ``node``, with its attributes, which came from ``cache`` or are in it now if they may be."""
        return self.entry(node, attr)

    def answer_attributes(self, cache: UserCache, node: Node, attr: bytes) -> bytes | Deferred:
        """The reply to GETATTR."""
        return replies.encode_attr_out(attr)

    def answer_statx(self, cache: UserCache, node: Node, mask: int, reply: Reply) -> Reply | Deferred:
        """The reply to STATX, which asked for ``mask``."""
        return reply

    def about_to_fetch(self, *inodes: HostInode) -> None:
        """The attributes of these inodes are fetched next, or may be soon: they have just been listed."""

    def unassured(
        self, names: Sequence[tuple[NodeId, bytes]], given_up: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """Inside, the kernel asks for each of these names, given with its directory's node, before it uses it.

        `InterruptedError` once ``given_up()``, if that cannot be brought about.
        """
        return contextlib.nullcontext()

    @staticmethod
    def holds_name(cache: UserCache, parent: Node, name: bytes, node: Node) -> bool:
        """Whether the cache knows now that ``name`` is this node."""
        return cache.peek((_NAME, parent.ino, name)) is node

    @staticmethod
    def holds_attributes(cache: UserCache, node: Node, attr: bytes) -> bool:
        """Whether the cache knows now that these are the attributes: the very object that it gave, or was given."""
        return cache.peek((_ATTRIBUTES, node.ino)) is attr

    @staticmethod
    def holds_statx(cache: UserCache, node: Node, mask: int, reply: Reply) -> bool:
        """The same for a reply to STATX."""
        return cache.peek((_STATX, node.ino, mask)) is reply

    @staticmethod
    def holds_acl(cache: UserCache, node: Node, name: bytes) -> bool:
        """Whether the cache knows now what the ACL of that name is."""
        return cache.peek((_XATTR, node.ino, name)) is not None

    # ---- names and attributes ----

    def lookup(self, request: Request) -> Reply | Deferred:
        cache, name = self.cache, request.body.name
        parent = self.nodes.get(request.node)
        node = cache.get((_NAME, parent.ino, name))
        if node is _ABSENT:
            self.answered_here += 1
            raise FileNotFoundError(errno.ENOENT, "known not to exist")
        if node is not None and not self.nodes.remember(node):
            node = None
        if node is None:
            node = self._from_listing(cache, parent, name)
        if node is not None:
            attr: bytes | None = cache.get((_ATTRIBUTES, node.ino))
            if attr is not None:
                self.answered_here += 1
                return _reply(self.answer_name(cache, parent, name, node, attr))
            try:
                with self.nodes.open(node) as fd:
                    return _reply(self.answer_name(cache, parent, name, node, self.attributes(node, fd)))
            except OSError:  # the daemon has lost the inode that we had under this number: look the name up
                self.nodes.forget(node.id, 1)
        with self.nodes.open(parent) as at:
            node, attr = self.look_up(parent, at, name)
        return _reply(self.answer_name(cache, parent, name, node, attr))

    def _from_listing(self, cache: UserCache, parent: Node, name: bytes) -> Node | None:
        """The node of a name that a valid listing of the parent tells, with one more look-up, if we have it.

        A change in a directory makes all its names doubtful; one listing settles those that are there, with a single trip.
        """
        listing: Listing | None = cache.peek((_LISTING, parent.ino))
        if listing is None:
            return None
        ino = listing.inodes.get(name)
        if ino is None:  # not listed is not absent: think of case-insensitive directories and hidden snapshots
            return None
        node = self.nodes.pinned(ino, parent, name)
        if node is not None:
            cache.put((_NAME, parent.ino, name), node, listing.stamp)
        return node

    def look_up(self, parent: Node, at: int, name: bytes) -> tuple[Node, bytes]:
        cache = self.cache
        key = (_NAME, parent.ino, name)
        name_stamp = cache.sample(parent.ino)
        try:
            fd = os.open(name, _O_NODE, dir_fd=at)
        except FileNotFoundError:
            cache.put(key, _ABSENT, name_stamp)
            raise
        try:
            ino = self.nodes.inode_of(fd)
            self.about_to_fetch(ino)
            stamp = cache.sample(ino)
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        node = self.nodes.adopt(fd, status, parent, name)
        attr = replies.encode_attr(status, node.ino)
        cache.put((_ATTRIBUTES, node.ino), attr, stamp)
        cache.put(key, node, name_stamp)
        return node, attr

    def create(self, request: Request) -> Reply:
        try:
            return super().create(request)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.EEXIST):
                # Somebody made it behind the export, where no version moves. The kernel looks again: not in our memory.
                self.cache.discard((_NAME, self.nodes.get(request.node).ino, request.body.name))
            raise

    def attributes(self, node: Node, fd: int) -> bytes:
        cache = self.cache
        self.about_to_fetch(node.ino)
        stamp = cache.sample(node.ino)
        attr = super().attributes(node, fd)
        cache.put((_ATTRIBUTES, node.ino), attr, stamp)
        return attr

    def attributes_now(self, node: Node) -> bytes:
        """What its ``struct fuse_attr`` is now, for others than the kernel."""
        attr: bytes | None = self.cache.peek((_ATTRIBUTES, node.ino))
        if attr is None:
            with self.nodes.open(node) as fd:
                attr = self.attributes(node, fd)
        return attr

    def find_name(self, parent: Node, name: bytes) -> Node:
        """The node that a name is now, with one more look-up to give back, for others than the kernel."""
        node: Node | None = self.cache.peek((_NAME, parent.ino, name))
        if node is _ABSENT:
            raise FileNotFoundError(errno.ENOENT, "known not to exist")
        if node is not None and self.nodes.remember(node):
            return node
        with self.nodes.open(parent) as at:
            return self.look_up(parent, at, name)[0]

    def getattr(self, request: Request) -> Reply | Deferred:
        body: codec.Getattr = request.body
        cache, node = self.cache, self.nodes.get(request.node)
        attr = cache.get((_ATTRIBUTES, node.ino))
        if attr is not None:
            self.answered_here += 1  # another thread has just fetched it
        else:
            file = self._files.get(body.fh) if body.flags & abi.GETATTR_FH else None
            with self.open_node(node, file) as fd:
                attr = self.attributes(node, fd)
        return _reply(self.answer_attributes(cache, node, attr))

    def statx(self, request: Request) -> Reply | Deferred:
        body: codec.Statx = request.body
        cache, node = self.cache, self.nodes.get(request.node)
        self.about_to_fetch(node.ino)
        reply = self._cached((_STATX, node.ino, body.sx_mask), node, super().statx, request)
        return self.answer_statx(cache, node, body.sx_mask, reply)

    def readlink(self, request: Request) -> Reply:
        node = self.nodes.get(request.node)
        return self._cached((_TARGET, node.ino), node, super().readlink, request)

    def _cached(self, key: tuple[Any, ...], node: Node, fetch: Any, request: Request) -> Reply:
        cache = self.cache
        reply: Reply | None = cache.get(key)
        if reply is not None:
            self.answered_here += 1
            return reply
        stamp = cache.sample(node.ino)
        reply = fetch(request)
        cache.put(key, reply, stamp)
        return reply

    # ---- extended attributes ----

    def getxattr(self, request: Request) -> Reply:
        body: codec.Getxattr = request.body
        fetch = self._fetch_acl if body.name in ACLS else super().getxattr
        return sized(self._xattr((_XATTR, self.nodes.get(request.node).ino, body.name), fetch, request), body.size)

    def _fetch_acl(self, request: Request) -> Reply:
        # The kernel keeps ACLs of the lower mount, and drops an old one only after the reply to who changed it, or when
        # it fetches attributes.
        with self.nodes.open(self.nodes.get(request.node)) as fd:
            os.fstat(fd)
        return super().getxattr(request)

    def listxattr(self, request: Request) -> Reply:
        names = self._xattr((_XATTRS, self.nodes.get(request.node).ino), super().listxattr, request)
        return sized(visible(names, request.uid), request.body.size)

    def _xattr(self, key: tuple[Any, ...], fetch: Any, request: Request) -> bytes:
        cache = self.cache
        value: Any = cache.get(key)
        if value is None:
            stamp = cache.sample(key[1])
            # With the greatest size, so that the answer serves those who only ask how big it is, too; as root, who sees all names.
            everything = codec.Getxattr(request.body.name, _XATTR_SIZE_MAX)
            whole = Request(request.unique, request.opcode, request.node, 0, 0, request.pid, everything)
            try:
                value = fetch(whole)[0]
            except OSError as error:
                if error.errno != errno.ENODATA:
                    raise
                value = _ABSENT
            cache.put(key, value, stamp, units=1 if value is _ABSENT else 1 + len(value) // 256)
        else:
            self.answered_here += 1
        if value is _ABSENT:
            raise OSError(errno.ENODATA, "known not to be set")
        return bytes(value)

    # ---- directories ----

    def opendir(self, request: Request) -> Reply:
        # The kernel has checked the permission; the lower directory is opened when something must be fetched.
        self.answered_here += 1
        return (replies.encode_open(self.add_file(OpenFile(-1, os.O_RDONLY, self.nodes.get(request.node)))),)

    def readdir(self, request: Request) -> Reply:
        body: codec.Read = request.body
        directory = self.file(body.fh)
        if body.offset == 0 or directory.listing is None:
            directory.listing = self._listing(directory.node).records
        else:
            self.answered_here += 1
        room, pieces = body.size, []
        for entry in directory.listing[body.offset :]:
            room -= len(entry)
            if room < 0:
                break
            pieces.append(entry)
        return (b"".join(pieces),)

    def _listing(self, node: Node) -> Listing:
        cache = self.cache
        listing: Listing | None = cache.get((_LISTING, node.ino))
        if listing is not None:
            self.answered_here += 1
            return listing
        stamp = cache.sample(node.ino)
        records: list[bytes] = []
        inodes: dict[bytes, HostInode] = {}
        with self.nodes.open(node) as at:
            fd = os.open(syscalls.proc_path(at), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while entries := replies.parse_dirents(syscalls.getdents(fd, _LISTING_BYTES)):
                for entry in entries:
                    records.append(replies.encode_dirent(entry._replace(offset=len(records) + 1)))
                    inodes[entry.name] = HostInode(entry.ino)
        finally:
            os.close(fd)
        self.about_to_fetch(*inodes.values())
        listing = Listing(records, inodes, stamp)
        cache.put((_LISTING, node.ino), listing, stamp, units=1 + len(records))
        return listing

    def releasedir(self, request: Request) -> Reply:
        self.answered_here += 1
        return super().releasedir(request)

    def fsyncdir(self, request: Request) -> Reply:
        with self.nodes.open(self.nodes.get(request.node)) as at:
            fd = os.open(syscalls.proc_path(at), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return ()

    # ---- files ----

    def locked(self, node: Node) -> None:
        cache, key = self.cache, (_PAGES_OF_LOCKED, node.ino)
        if not cache.peek(key):
            stamp = cache.sample(node.ino)
            self.pages.drop(node.id)
            cache.put(key, True, stamp)  # not earlier: another one may get a shared lock meanwhile

    def open_flags(self, node: Node) -> int:
        """Pages that were read since the last open survive this one iff nothing has changed since then."""
        cache, key = self.cache, (_PAGES, node.ino)
        if cache.peek(key):
            return abi.FOPEN_KEEP_CACHE
        cache.put(key, True, cache.sample(node.ino))
        return 0


def _reply(answer: bytes | Deferred) -> Reply | Deferred:
    return answer if isinstance(answer, Deferred) else (answer,)


def _unless_interrupted(operation: Operation) -> Operation:
    """Begins anew after an EINTR that is about this process, not about the caller: it was stopped, and goes on.

    The daemon says EINTR instead of making a change, never after it: so nothing is done twice.
    """

    def begin_anew(request: Request) -> Reply | Deferred:
        while True:
            try:
                return operation(request)
            except InterruptedError:
                if request.interrupted:
                    raise

    return begin_anew
