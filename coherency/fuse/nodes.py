"""What the kernel knows of a tree: node ids, and how to reach the object behind each.

1. A node lives from the first reply that names it until the kernel has given back every look-up (FORGET). The kernel
   gives nothing back while a request about the node is under way, so whoever handles a request may use its nodes freely.
2. Node ids are never used twice.
3. Two names lead to the same node iff they are the same inode. An inode number alone does not say so, since numbers are
   used again; a node proves itself by a descriptor that pins its inode, or else by its file handle. Where it has neither
   (beyond the limit, on a file system without handles), number and type are believed. The exception, with
   ``moved_directories_are_new``: a directory that somebody else has moved to another parent gets a new node there, beside
   the old one for as long as the kernel has that. Under the old id the kernel would have to move its own dentry, which
   fails with ESTALE whenever a rename between directories is under way on this mount: always, if that is what the
   look-up is for (``__d_unalias`` in fs/dcache.c). Who relies on the kernel's lock of a directory (``daemon.changes``)
   cannot have this: each node has a lock of its own.
4. Descriptors are bounded: the first ``descriptor_limit`` nodes hold one (O_PATH), the others are opened for each use,
   by file handle where the file system has them, else along the names they were last seen under (and only if that
   leads to the same inode; otherwise ESTALE, upon which the kernel looks the path up again). Handles are the root's file
   system's; on others, mounted further down, names are the way. What is open is reached by its open file before its name.
5. After :meth:`NodeStore.rebase` (the tree was mounted anew) every node is reached by its names again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
from dataclasses import dataclass
from typing import Final

from coherency.fuse import syscalls
from coherency.fuse.abi import ROOT_ID
from coherency.ids import HostInode, NodeId

_O_NODE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_INODE: Final = HostInode(0)  # no file system has it
_MAX_DEPTH: Final = 4096  # components of a path; more cannot be: a cycle of names


def descriptor_budget() -> int:
    """Let this process have as many descriptors as the system allows, and return how many of them nodes may take.

    A quarter is left for open files, sockets and threads.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/proc/sys/fs/nr_open") as file:
        system = int(file.read())
    for limit in (system, hard):  # more than the hard limit needs CAP_SYS_RESOURCE
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            soft = limit
            break
    return soft * 3 // 4


class Node:
    """One inode that the kernel knows. ``ino`` is the number that guests see, ``key`` the (device, inode) underneath."""

    __slots__ = ("fd", "handle", "id", "ino", "is_directory", "key", "kind", "lent", "lookups", "name", "parent")

    def __init__(self, node_id: NodeId, ino: HostInode, key: tuple[int, int], mode: int) -> None:
        self.id, self.ino, self.key = node_id, ino, key
        self.kind = stat.S_IFMT(mode)
        self.is_directory = self.kind == stat.S_IFDIR
        self.fd = -1
        self.handle: bytes | None = None
        self.lent: list[int] = []  # descriptors of open files
        self.lookups = 0
        self.parent: Node | None = None
        self.name = b""

    def __repr__(self) -> str:
        return f"<node {self.id} inode {self.ino} {self.name!r}>"


class Borrowed:
    """``with store.open(node) as fd``: a descriptor for the length of the block, closed afterwards if it was opened for it."""

    __slots__ = ("_fd", "_temporary")

    def __init__(self, fd: int, temporary: bool) -> None:
        self._fd, self._temporary = fd, temporary

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *exc: object) -> None:
        if self._temporary:
            os.close(self._fd)


@dataclass(frozen=True)
class NodeStatistics:
    nodes: int
    descriptors: int


class NodeStore:
    """All nodes of one mount. Thread-safe; the lock is never held over a system call that may wait for a server."""

    def __init__(
        self, root: int, *, descriptor_limit: int, descriptors_pin: bool = True, moved_directories_are_new: bool = False
    ) -> None:
        """``root``: an open directory (not O_PATH), owned by the store from now on.

        ``descriptors_pin``: a descriptor keeps the inode number from being used again. Not so over a FUSE server that
        has more inodes than descriptors itself; then file handles are compared each time.
        ``moved_directories_are_new``: see rule 3.
        """
        self._lock = threading.Lock()
        self._limit, self._descriptors_pin = descriptor_limit, descriptors_pin
        self._moved_directories_are_new = moved_directories_are_new
        self._mount_fd = root
        status = os.fstat(root)
        self.root_device = status.st_dev
        self._extra_devices: dict[int, int] = {}
        self.root = Node(NodeId(ROOT_ID), HostInode(status.st_ino), (status.st_dev, status.st_ino), status.st_mode)
        self.root.fd = os.open(".", _O_NODE & ~os.O_NOFOLLOW, dir_fd=root)
        self.root.lookups = 1
        self._next_id = ROOT_ID + 1
        self._descriptors = 1
        self._nodes: dict[int, Node] = {ROOT_ID: self.root}
        self._by_key: dict[tuple[int, int], Node] = {self.root.key: self.root}

    @property
    def mount_fd(self) -> int:
        """The tree's root, open for reading."""
        return self._mount_fd

    def get(self, node_id: int) -> Node:
        """The node of a request. ESTALE if there is none (a bug of the kernel's or ours, or a hostile request)."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise OSError(errno.ESTALE, f"unknown node {node_id}") from None

    def find(self, node_id: int) -> Node | None:
        """Like :meth:`get`, for who has another way."""
        return self._nodes.get(node_id)

    def known(self, ino: HostInode) -> Node | None:
        """The node that the kernel has of an inode on the root's file system, the latest if there are several."""
        return self._by_key.get((self.root_device, ino))

    def inode_number(self, status: os.stat_result) -> HostInode:
        """The number under which guests see an inode.

        It is the inode's own on the root's file system. A guest sees one device for the whole tree, so on file systems
        mounted further down the number is told apart by its upper byte.
        """
        return self.number_on(status.st_dev, status.st_ino)

    def number_on(self, device: int, ino: int) -> HostInode:
        """The same for an inode number that was read from a directory on ``device``."""
        if device == self.root_device:
            return HostInode(ino)
        with self._lock:
            index = self._extra_devices.setdefault(device, len(self._extra_devices) + 1)
        return HostInode(ino ^ (index % 255 + 1) << 56)

    def number_if_met(self, device: int, ino: int) -> HostInode | None:
        """The same, or None if nothing on ``device`` was ever met: then guests have seen nothing of it."""
        return self.number_on(device, ino) if device == self.root_device or device in self._extra_devices else None

    def inode_of(self, fd: int) -> HostInode:
        """The number under which guests see what was just opened, as the kernel knows it: no server is asked.

        Only for a root without further file systems below it, such as an export.
        """
        return HostInode(syscalls.cached_inode(fd))

    def adopt(self, fd: int, status: os.stat_result, parent: Node, name: bytes) -> Node:
        """The node of what was just opened (O_PATH) as ``name`` in ``parent``, with one more look-up to give back.

        Takes ``fd`` over in any case, also when it raises.
        """
        key = (status.st_dev, status.st_ino)
        node = self._by_key.get(key)
        handle = None
        # A handle says nothing about its file system: only the root's can be opened again.
        if status.st_dev == self.root_device and (
            not self._descriptors_pin
            or (node is None and self._descriptors >= self._limit)
            or (node is not None and node.fd < 0)
        ):
            try:
                handle = syscalls.file_handle(fd)
            except OSError:
                os.close(fd)
                raise
        ino = self.inode_number(status)
        with self._lock:
            node = self._by_key.get(key)
            if (
                node is None
                or node.kind != stat.S_IFMT(status.st_mode)
                or (self._moved_directories_are_new and node.is_directory and node.parent is not parent)
                or not self._same(node, handle)
            ):
                node = Node(NodeId(self._next_id), ino, key, status.st_mode)
                self._next_id += 1
                self._nodes[node.id] = self._by_key[key] = node
            if node.fd < 0 and self._descriptors < self._limit:
                node.fd, fd = fd, -1
                self._descriptors += 1
            if node.handle is None:
                node.handle = handle
            node.lookups += 1
            node.parent, node.name = parent, name
        if fd >= 0:
            os.close(fd)
        return node

    def _same(self, node: Node, handle: bytes | None) -> bool:
        if node.fd >= 0 and self._descriptors_pin:
            return True
        return node.handle is None or handle is None or node.handle == handle

    def remember(self, node: Node) -> bool:
        """One more look-up of a node that the caller knows from before; false if the kernel has forgotten it meanwhile."""
        with self._lock:
            if self._nodes.get(node.id) is not node:
                return False
            node.lookups += 1
            return True

    def unreachable(self, mode: int) -> Node:
        """A new node, with one look-up to give back, for what nothing leads to any more: ESTALE for who opens it."""
        with self._lock:
            node = Node(NodeId(self._next_id), _NO_INODE, (self.root_device, _NO_INODE), mode)
            self._next_id += 1
            self._nodes[node.id] = node
            node.lookups = 1
        return node

    def pinned(self, ino: HostInode, parent: Node, name: bytes) -> Node | None:
        """The node with one more look-up, if it holds a descriptor of inode ``ino`` and was last seen as ``name`` in ``parent``.

        The number alone does not do: where something is mounted on a name, a listing tells the number of what is below.
        """
        with self._lock:
            node = self._by_key.get((self.root_device, ino))
            if node is None or node.fd < 0 or node.parent is not parent or node.name != name:
                return None
            node.lookups += 1
            return node

    def forget(self, node_id: int, count: int) -> None:
        """The kernel gives ``count`` look-ups back."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node is None or node is self.root:
                return
            node.lookups -= count
            if node.lookups > 0:
                return
            del self._nodes[node_id]
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]
            fd, node.fd = node.fd, -1
            if fd >= 0:
                self._descriptors -= 1
        if fd >= 0:
            os.close(fd)

    def moved(self, key: tuple[int, int], parent: Node, name: bytes) -> None:
        """What ``key`` is now called."""
        with self._lock:
            node = self._by_key.get(key)
            if node:
                node.parent, node.name = parent, name

    def lend(self, node: Node, fd: int) -> None:
        """``fd`` is an open file of the node: a way to it also when it has no name any more. Until ``take_back``."""
        with self._lock:
            node.lent.append(fd)

    def take_back(self, node: Node, fd: int) -> None:
        """``fd`` is about to be closed; nothing happens if it is not lent."""
        with self._lock:
            if fd in node.lent:
                node.lent.remove(fd)

    def open(self, node: Node) -> Borrowed:
        """A descriptor (O_PATH) of the node; ESTALE if it cannot be reached any more."""
        fd = node.fd
        return Borrowed(fd, False) if fd >= 0 else Borrowed(self._reach(node), True)

    def _reach(self, node: Node) -> int:
        """A new descriptor: directly, or down the names from the nearest node above that can be opened directly."""
        below: list[tuple[Node, bytes]] = []
        fd = self._open_directly(node)
        while fd < 0:
            parent = node.parent
            if parent is None or len(below) == _MAX_DEPTH:
                raise OSError(errno.ESTALE, f"{node} cannot be reached")
            below.append((node, node.name))
            node = parent
            fd = self._open_directly(node)
        for child, name in reversed(below):
            at = fd
            try:
                fd = os.open(name, _O_NODE, dir_fd=at)
            except (FileNotFoundError, NotADirectoryError):
                raise OSError(errno.ESTALE, f"{child} is not at its name any more") from None
            finally:
                os.close(at)
            try:
                if not self._is_open_as(child, fd):
                    raise OSError(errno.ESTALE, f"another inode is called like {child}")
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _is_open_as(self, node: Node, fd: int) -> bool:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != node.key or stat.S_IFMT(status.st_mode) != node.kind:
            return False
        # The handles of another FUSE server change while an inode stays the same; a disk's do not.
        return node.handle is None or not self._descriptors_pin or syscalls.file_handle(fd) == node.handle

    def _open_directly(self, node: Node) -> int:
        """A new descriptor without going by names, or -1."""
        with self._lock:  # a copy, since a node that no request is about may be forgotten meanwhile
            if node.fd >= 0:
                return os.dup(node.fd)
        if node.handle is not None:
            try:
                return syscalls.open_by_handle(self._mount_fd, node.handle, _O_NODE & ~os.O_NOFOLLOW)
            except OSError as error:
                if error.errno not in (errno.ESTALE, errno.EPERM):
                    raise
        with self._lock:
            return os.dup(node.lent[-1]) if node.lent else -1

    def rebase(self, root: int) -> list[int]:
        """The same tree, mounted anew and opened as ``root``: nodes are reached through it from now on.

        Takes ``root`` over in any case. Returns the abandoned descriptors: requests under way may still use them, close
        them when those are over.
        """
        try:
            status = os.fstat(root)
            new_root = os.open(".", _O_NODE & ~os.O_NOFOLLOW, dir_fd=root)
        except BaseException:
            os.close(root)
            raise
        with self._lock:
            if self._mount_fd < 0:  # closed meanwhile
                return [root, new_root]
            abandoned = [self._mount_fd]
            for node in self._nodes.values():
                if node.fd >= 0:
                    abandoned.append(node.fd)
                node.fd, node.handle, node.key = -1, None, (status.st_dev, node.key[1])
                node.lent.clear()
            self._mount_fd, self.root.fd, self._descriptors = root, new_root, 1
            self.root_device = status.st_dev
            self._by_key = {node.key: node for node in self._nodes.values()}
        return abandoned

    def close(self) -> None:
        """Close every descriptor; nothing can be reached afterwards. Safe to call twice."""
        with self._lock:
            fds = [node.fd for node in self._nodes.values() if node.fd >= 0]
            if self._mount_fd >= 0:
                fds.append(self._mount_fd)
            self._mount_fd = self.root.fd = -1
            self._nodes, self._by_key, self._descriptors = {ROOT_ID: self.root}, {}, 0
        for fd in fds:
            os.close(fd)

    def statistics(self) -> NodeStatistics:
        with self._lock:
            return NodeStatistics(len(self._nodes), self._descriptors)

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._lock:
            assert self._descriptors == sum(node.fd >= 0 for node in self._nodes.values()), "descriptor count"
            assert self._descriptors <= max(self._limit, 1), "descriptor limit"
            assert all(node.lookups > 0 for node in self._nodes.values()), "a node that nobody knows"
            assert all(self._nodes.get(node.id) is node for node in self._by_key.values()), "a key of a lost node"
