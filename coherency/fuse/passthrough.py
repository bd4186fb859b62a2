"""Every FUSE operation over a directory. The kernel's share of caching is an argument; see ``tree`` for the hooks.

1. A name is resolved and changed by the same descriptor of its parent. Between looking at what a name is and changing
   it, the kernel of this mount holds the parent's lock, so no other request of this mount changes it in between.
2. A change is ended whatever happens: also when the system call fails, and when only a part of it succeeded.
3. What has been made is made, even if somebody else has renamed or removed it before we could look at it: the caller is told of
   success, and gets a node that nothing leads to. The kernel keeps names for no time then, so it looks again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from typing import Final

from coherency.fuse import abi, codec, replies, syscalls
from coherency.fuse.abi import Opcode, SetattrValid
from coherency.fuse.codec import Request
from coherency.fuse.credentials import permits
from coherency.fuse.nodes import Node
from coherency.fuse.openfiles import FileOperations
from coherency.fuse.session import NO_REPLY, Deferred, Operation, Reply
from coherency.fuse.tree import Leaving, OpenFile, drop_set_ids

_RENAME_EXCHANGE: Final = 1 << 1
_RENAME_WHITEOUT: Final = 1 << 2
_OMIT: Final = (0, syscalls.UTIME_OMIT)
_NOW: Final = (0, syscalls.UTIME_NOW)
_TRUSTED: Final = b"trusted."
_ACL_ACCESS: Final = b"system.posix_acl_access"


class Passthrough(FileOperations):
    """A file system that is the directory ``root``: complete by itself, or the base of one that knows more."""

    @property
    def operations(self) -> Mapping[int, Operation]:
        return {opcode: getattr(self, name) for opcode, name in _METHODS.items()}

    # ---- names ----

    def lookup(self, request: Request) -> Reply | Deferred:
        parent = self.nodes.get(request.node)
        with self.nodes.open(parent) as at:
            return (self.entry(*self.look_up(parent, at, request.body.name)),)

    def forget(self, request: Request) -> Reply:
        for node_id, count in request.body.forgotten:
            self.nodes.forget(node_id, count)
        return NO_REPLY

    def _make(self, request: Request, umask: int, name: bytes, kind: int, create: Callable[[int], None]) -> Reply:
        parent = self.nodes.get(request.node)
        with self.nodes.open(parent) as at, self.changing(request, parent.ino) as change:
            self.credentials.become(request.uid, request.gid, umask)
            create(at)
            if self.tracks_changes:  # before anything can fail: it is there
                change.touch(self.nodes.inode_number(os.stat(name, dir_fd=at, follow_symlinks=False)))
            found = self._look_up_made(parent, at, name, kind)
        if found is None:
            return (replies.encode_entry(self.nodes.unreachable(kind).id, replies.encode_unknown_attr(kind), 0, 0),)
        return (self.entry(*found),)

    def _look_up_made(self, parent: Node, at: int, name: bytes, kind: int) -> tuple[Node, bytes] | None:
        """None: it is not there any more (rule 3)."""
        try:
            node, attr = self.look_up(parent, at, name)
        except FileNotFoundError:
            return None
        if node.kind != kind:
            self.nodes.forget(node.id, 1)
            return None
        return node, attr

    def mknod(self, request: Request) -> Reply:
        body: codec.Mknod = request.body
        device = replies.decode_device(body.rdev)
        return self._make(
            request, body.umask, body.name, stat.S_IFMT(body.mode) or stat.S_IFREG,
            lambda at: os.mknod(body.name, body.mode, device, dir_fd=at),
        )  # fmt: skip

    def mkdir(self, request: Request) -> Reply:
        body: codec.Mkdir = request.body
        return self._make(
            request, body.umask, body.name, stat.S_IFDIR, lambda at: os.mkdir(body.name, body.mode, dir_fd=at)
        )  # fmt: skip

    def symlink(self, request: Request) -> Reply:
        body: codec.Symlink = request.body
        return self._make(
            request, 0, body.name, stat.S_IFLNK, lambda at: os.symlink(body.target, body.name, dir_fd=at)
        )  # fmt: skip

    def link(self, request: Request) -> Reply:
        body: codec.Link = request.body
        parent, target = self.nodes.get(request.node), self.nodes.get(body.target)
        with (
            self.nodes.open(parent) as at,
            self.nodes.open(target) as fd,
            self.changing(request, parent.ino, target.ino) as change,
        ):
            os.link(syscalls.proc_path(fd), body.name, dst_dir_fd=at, follow_symlinks=True)
            found = self._look_up_made(parent, at, body.name, target.kind)
            if found is None:
                self.nodes.remember(target)  # the request is about it, so it is there
                found = target, self.attributes(target, fd)
            change.touch(found[0].ino)
        return (self.entry(*found),)

    def unlink(self, request: Request) -> Reply:
        return self._remove(request, lambda name, at: os.unlink(name, dir_fd=at))

    def rmdir(self, request: Request) -> Reply:
        return self._remove(request, lambda name, at: os.rmdir(name, dir_fd=at))

    def _remove(self, request: Request, remove: Callable[[bytes, int], None]) -> Reply:
        parent, name = self.nodes.get(request.node), request.body.name
        with self.nodes.open(parent) as at:
            touched, ino = [parent.ino], None
            if self.tracks_changes:
                ino = self.nodes.inode_number(os.stat(name, dir_fd=at, follow_symlinks=False))
                touched.append(ino)
            with self.changing(request, *touched, leaving=(Leaving(parent, name, ino, request.opcode == Opcode.RMDIR),)):
                remove(name, at)
        return ()

    def rename(self, request: Request) -> Reply:
        body: codec.Rename = request.body
        parent, new_parent = self.nodes.get(request.node), self.nodes.get(body.new_parent)
        with self.nodes.open(parent) as at, self.nodes.open(new_parent) as new_at:
            moved = os.stat(body.name, dir_fd=at, follow_symlinks=False)
            touched = [parent.ino, new_parent.ino, self.nodes.inode_number(moved)]
            leaving = [Leaving(parent, body.name, touched[-1], stat.S_ISDIR(moved.st_mode))]
            try:
                replaced = os.stat(body.new_name, dir_fd=new_at, follow_symlinks=False)
                touched.append(self.nodes.inode_number(replaced))
                leaving.append(Leaving(new_parent, body.new_name, touched[-1], stat.S_ISDIR(replaced.st_mode)))
            except FileNotFoundError:
                replaced = None
            with self.changing(request, *touched, leaving=tuple(leaving)) as change:
                if body.flags & _RENAME_WHITEOUT:  # which the file system makes where the name was
                    self.credentials.become(request.uid, request.gid, 0)
                syscalls.renameat2(at, body.name, new_at, body.new_name, body.flags)
                if body.flags & _RENAME_WHITEOUT:
                    change.touch(self.nodes.inode_number(os.stat(body.name, dir_fd=at, follow_symlinks=False)))
            self.nodes.moved((moved.st_dev, moved.st_ino), new_parent, body.new_name)
            if replaced and body.flags & _RENAME_EXCHANGE:
                self.nodes.moved((replaced.st_dev, replaced.st_ino), parent, body.name)
        return ()

    # ---- attributes ----

    def getattr(self, request: Request) -> Reply | Deferred:
        body: codec.Getattr = request.body
        node = self.nodes.get(request.node)
        file = self._files.get(body.fh) if body.flags & abi.GETATTR_FH else None
        with self.open_node(node, file) as fd:
            return self.attr_out(self.attributes(node, fd))

    def statx(self, request: Request) -> Reply | Deferred:
        body: codec.Statx = request.body
        node = self.nodes.get(request.node)
        file = self._files.get(body.fh) if body.flags & abi.GETATTR_FH else None
        with self.open_node(node, file) as fd:
            answer = syscalls.statx(fd, body.sx_mask, body.sx_flags & syscalls.AT_STATX_SYNC_TYPE)
        return (replies.encode_statx_out(answer, node.ino, self.kernel_cache.attr_ns),)

    def setattr(self, request: Request) -> Reply:
        body: codec.Setattr = request.body
        node = self.nodes.get(request.node)
        file = self._files.get(body.fh) if body.valid & SetattrValid.FH else None
        with self.open_node(node, file) as fd:
            with self.changing(request, node.ino):
                self._apply(body, node, fd, file)
            return self.attr_out(self.attributes(node, fd))

    def _apply(self, body: codec.Setattr, node: Node, fd: int, file: OpenFile | None) -> None:
        valid = body.valid
        if valid & SetattrValid.MODE:
            os.chmod(syscalls.proc_path(fd), stat.S_IMODE(body.mode))
        elif valid & SetattrValid.KILL_SUIDGID:
            drop_set_ids(fd)
        if valid & (SetattrValid.UID | SetattrValid.GID):
            syscalls.chown(
                fd, body.uid if valid & SetattrValid.UID else -1, body.gid if valid & SetattrValid.GID else -1
            )  # fmt: skip
        if valid & SetattrValid.SIZE:
            if node.kind != stat.S_IFREG:
                raise OSError(errno.EINVAL, "only regular files have a size to set")
            if file is not None and file.flags & os.O_ACCMODE != os.O_RDONLY:
                os.ftruncate(file.fd, body.size)
            else:
                os.truncate(syscalls.proc_path(fd), body.size)
        if valid & (SetattrValid.ATIME | SetattrValid.MTIME):
            syscalls.utimens(
                fd,
                _OMIT if not valid & SetattrValid.ATIME else _NOW if valid & SetattrValid.ATIME_NOW else body.atime,
                _OMIT if not valid & SetattrValid.MTIME else _NOW if valid & SetattrValid.MTIME_NOW else body.mtime,
            )

    def readlink(self, request: Request) -> Reply:
        with self.nodes.open(self.nodes.get(request.node)) as fd:
            return (os.readlink(b"", dir_fd=fd),)

    def access(self, request: Request) -> Reply:
        with self.nodes.open(self.nodes.get(request.node)) as fd:
            status = os.fstat(fd)
        owner, caller = (status.st_uid, status.st_gid), (request.uid, request.gid)
        if not permits(status.st_mode, owner, caller, request.body.mask):
            raise PermissionError(errno.EACCES, "denied by the mode bits")
        return ()

    # ---- extended attributes ----

    def setxattr(self, request: Request) -> Reply:
        body: codec.Setxattr = request.body
        node = self.nodes.get(request.node)
        with self.nodes.open(node) as fd, self.changing(request, node.ino):
            os.setxattr(syscalls.proc_path(fd), body.name, body.value, body.flags)
            if body.name == _ACL_ACCESS and body.setxattr_flags & abi.SETXATTR_ACL_KILL_SGID:
                drop_set_ids(fd, stat.S_ISGID)
        return ()

    def removexattr(self, request: Request) -> Reply:
        node = self.nodes.get(request.node)
        with self.nodes.open(node) as fd, self.changing(request, node.ino):
            os.removexattr(syscalls.proc_path(fd), request.body.name)
        return ()

    def getxattr(self, request: Request) -> Reply:
        body: codec.Getxattr = request.body
        with self.nodes.open(self.nodes.get(request.node)) as fd:
            return sized(os.getxattr(syscalls.proc_path(fd), body.name), body.size)

    def listxattr(self, request: Request) -> Reply:
        self.credentials.become(request.uid, request.gid)  # a server below decides by the uid, too
        with self.nodes.open(self.nodes.get(request.node)) as fd:
            names = os.listxattr(syscalls.proc_path(fd))
        listed = b"".join(os.fsencode(name) + b"\0" for name in names)
        return sized(visible(listed, request.uid), request.body.size)

    def statfs(self, request: Request) -> Reply:
        with self.nodes.open(self.nodes.get(request.node)) as fd:
            return (replies.encode_statfs(os.fstatvfs(fd)),)

    def syncfs(self, request: Request) -> Reply:
        syscalls.syncfs(self.nodes.mount_fd)
        return ()

    def destroy(self, request: Request) -> Reply:
        return ()


_METHODS: Final[dict[int, str]] = {
    int(opcode): opcode.name.lower() for opcode in Opcode if opcode not in (Opcode.INIT, Opcode.INTERRUPT)
} | {int(Opcode.BATCH_FORGET): "forget", int(Opcode.RENAME2): "rename"}


def visible(names: bytes, uid: int) -> bytes:
    """Those names of a LISTXATTR reply that are for everybody: ``trusted.`` is for CAP_SYS_ADMIN, which we know of root only."""
    if uid == 0 or _TRUSTED not in names:
        return names
    return b"".join(name + b"\0" for name in names.split(b"\0")[:-1] if not name.startswith(_TRUSTED))


def sized(value: bytes, size: int) -> Reply:
    """What GETXATTR and LISTXATTR answer to somebody who has room for ``size`` bytes (0: asks how many there are)."""
    if not size:
        return (replies.encode_xattr_size(len(value)),)
    if len(value) > size:
        raise OSError(errno.ERANGE, f"{len(value)} bytes do not fit into {size}")
    return (value,)
