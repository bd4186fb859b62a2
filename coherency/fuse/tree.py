"""What all operations over a directory share: its nodes, its open files, their locks, and the hooks that make more of a passthrough.

Two hooks:

* ``changing(request, *inodes, leaving=...)`` surrounds each system call that changes metadata. The inodes are all that
  the call touches and that exist before it; ``touch`` adds those that came into being, before anybody can find them.
  ``leaving`` are the names that the call takes away, or lets lead to something else.
* ``look_up``, ``attributes`` and the reading operations can be overridden by who has the answer already.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from coherency.fuse import abi, replies, syscalls
from coherency.fuse.abi import InitFlag
from coherency.fuse.codec import Request
from coherency.fuse.credentials import Credentials
from coherency.fuse.locks import Locks
from coherency.fuse.nodes import Borrowed, Node, NodeStore
from coherency.fuse.session import QuickOperation, Reply
from coherency.ids import HostInode, NodeId

_O_NODE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Leaving(NamedTuple):
    """A name that a change takes away. ``ino`` is what it leads to, if somebody who tracks changes has looked."""

    parent: Node
    name: bytes
    ino: HostInode | None
    is_directory: bool = False


@dataclass(frozen=True)
class KernelCache:
    """What the kernel of a mount may keep, and for how long. The default is nothing at all."""

    entry_ns: int = 0
    attr_ns: int = 0
    keep_pages: bool = False  # pages and listings survive an open
    readdirplus: bool = False
    writeback: bool = False


class Change(Protocol):
    """A change under way: ``with`` begins and ends it."""

    def __enter__(self) -> Change: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def touch(self, ino: HostInode) -> None:
        """The change made, or may have made, this inode too."""


class Unwatched:
    """A change that nobody needs to know of."""

    def __enter__(self) -> Unwatched:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def touch(self, ino: HostInode) -> None:
        pass


class OpenFile:
    """What a file handle of the kernel stands for."""

    __slots__ = ("fd", "flags", "listing", "lock_owners", "node", "opener", "other_fd", "position")

    def __init__(self, fd: int, flags: int, node: Node, opener: tuple[int, int] = (0, 0)) -> None:
        self.fd, self.flags, self.node = fd, flags, node
        self.opener = opener  # uid and gid
        self.other_fd = -1  # appends if ``fd`` does not, and the other way round; made when it is needed
        self.position = 0  # of a directory stream
        self.listing: list[bytes] | None = None  # a whole directory, if it was read at once
        self.lock_owners: set[int] = set()  # who has asked for fcntl locks through it

    def close(self) -> None:
        try:
            if self.fd >= 0:
                os.close(self.fd)
        finally:
            if self.other_fd >= 0:
                os.close(self.other_fd)


class Tree:
    """A directory served by descriptors and single names: nothing can lead out of it."""

    tracks_changes = False  # whether ``changing`` wants to know the inodes behind names that go away

    most_lock_waits = 32  # so many requests may wait for locks at a time: far fewer than the session has threads

    descriptors_pin = True  # see NodeStore
    moved_directories_are_new = False  # likewise

    def __init__(self, root: int, *, descriptor_limit: int, kernel_cache: KernelCache = KernelCache()) -> None:
        """``root``: an open directory, owned by this object from now on. ``descriptor_limit``: see ``nodes``."""
        self.nodes = NodeStore(
            root,
            descriptor_limit=descriptor_limit,
            descriptors_pin=self.descriptors_pin,
            moved_directories_are_new=self.moved_directories_are_new,
        )
        self.credentials = Credentials()
        self.kernel_cache = kernel_cache
        self.locks = Locks(self.most_lock_waits)
        self._files: dict[int, OpenFile] = {}
        self._open_counts: dict[NodeId, int] = {}  # how many of these are of that node
        self._counting = threading.Lock()
        self._next_fh = iter(range(1, 1 << 63)).__next__

    @property
    def quick_operations(self) -> Mapping[int, QuickOperation]:
        return {}

    @property
    def init_flags(self) -> InitFlag:
        flags = InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS
        if self.kernel_cache.readdirplus:
            flags |= InitFlag.DO_READDIRPLUS | InitFlag.READDIRPLUS_AUTO
        if self.kernel_cache.writeback:
            flags |= InitFlag.WRITEBACK_CACHE
        return flags

    def close(self) -> None:
        """Close every descriptor. Only when no operation runs any more."""
        self.locks.end()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self.nodes.close()

    # ---- hooks ----

    def changing(self, request: Request, *inodes: HostInode, leaving: tuple[Leaving, ...] = ()) -> Change:
        """Surrounds a system call that changes the metadata of ``inodes``, and takes the names ``leaving`` away."""
        return Unwatched()

    def look_up(self, parent: Node, at: int, name: bytes) -> tuple[Node, bytes]:
        """The node that ``name`` is in ``parent`` (open as ``at``), with one more look-up, and its ``struct fuse_attr``."""
        fd = os.open(name, _O_NODE, dir_fd=at)
        try:
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        node = self.nodes.adopt(fd, status, parent, name)
        return node, replies.encode_attr(status, node.ino)

    def made(self, fd: int) -> None:
        """``fd`` has just been made, and its attributes are about to be fetched."""

    def attributes(self, node: Node, fd: int) -> bytes:
        """The ``struct fuse_attr`` of ``node``, open as ``fd``."""
        return replies.encode_attr(os.fstat(fd), node.ino)

    def open_flags(self, node: Node) -> int:
        """FOPEN_* for a file that has just been opened."""
        return abi.FOPEN_KEEP_CACHE if self.kernel_cache.keep_pages else 0

    # ---- for all operations ----

    def entry(self, node: Node, attr: bytes) -> bytes:
        """``struct fuse_entry_out`` with the times that the kernel may believe it."""
        return replies.encode_entry(node.id, attr, self.kernel_cache.entry_ns, self.kernel_cache.attr_ns)

    def attr_out(self, attr: bytes) -> Reply:
        return (replies.encode_attr_out(attr, self.kernel_cache.attr_ns),)

    def add_file(self, file: OpenFile) -> int:
        fh = self._next_fh()
        self._files[fh] = file
        self._count(file.node, 1)
        if file.node.fd < 0 <= file.fd:
            self.nodes.lend(file.node, file.fd)
        return fh

    def remove_file(self, fh: int) -> None:
        """Forget it and close it; nothing happens if there is none."""
        file = self._files.pop(fh, None)
        if file is not None:
            self._count(file.node, -1)
            if file.node.lent:
                self.nodes.take_back(file.node, file.fd)
            file.close()

    def _count(self, node: Node, more: int) -> None:
        if node.kind != stat.S_IFREG:
            return
        with self._counting:
            count = self._open_counts.get(node.id, 0) + more
            if count:
                self._open_counts[node.id] = count
            else:
                del self._open_counts[node.id]

    def is_open(self, node: NodeId) -> bool:
        """Whether the kernel has it as an open file, or mapped. Not for directories."""
        return node in self._open_counts

    def open_node(self, node: Node, file: OpenFile | None) -> Borrowed:
        """A descriptor of the node; that of an open file of it, if there is one, since it may have no name any more."""
        if file is not None and file.fd >= 0:
            return Borrowed(file.fd, False)
        return self.nodes.open(node)

    def file(self, fh: int) -> OpenFile:
        try:
            return self._files[fh]
        except KeyError:
            raise OSError(errno.EBADF, f"unknown file handle {fh}") from None


def drop_set_ids(fd: int, bits: int = stat.S_ISUID | stat.S_ISGID) -> None:
    """What the kernel does to a file that somebody without CAP_FSETID writes to: set-uid goes, set-gid of an executable too."""
    mode = os.fstat(fd).st_mode
    if not mode & stat.S_IXGRP and bits & stat.S_ISUID:
        bits &= ~stat.S_ISGID
    if mode & bits:
        os.chmod(syscalls.proc_path(fd), stat.S_IMODE(mode & ~bits))
