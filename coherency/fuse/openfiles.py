"""Operations on open files and directories.

1. CREATE never opens what exists: the permission to open it has not been checked. ESTALE makes the kernel look again.
2. Only regular files and directories are ever opened; what a device or a FIFO does is up to the kernel of the caller.
3. A change is ended whatever happens: also when the system call fails, and when only a part of it succeeded.
4. What is only appended to does not go through the page cache of the caller's kernel, which would make two requests of a write
   that crosses the border of a page, and let somebody else's come in between. Such a file cannot be mapped anyway.
5. Whether a write appends is as fcntl(2) has left it, which each WRITE tells. Pages of mmap go where they belong in any case.
6. Pages are written as whoever has opened the file, since their requests tell nobody; and they are written all, or else it
   is an error: of a part the kernel would not tell anybody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from typing import Final

from coherency.fuse import abi, codec, replies, syscalls
from coherency.fuse.codec import Request
from coherency.fuse.locks import Piece
from coherency.fuse.nodes import Node
from coherency.fuse.session import Reply
from coherency.fuse.tree import Change, OpenFile, Tree, drop_set_ids

# O_DIRECT would ask for aligned buffers; the rest means something at the first open only, or not to a server.
_O_DROPPED: Final = os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_NOFOLLOW | os.O_DIRECT | os.O_DIRECTORY
_NO_ENTRY: Final = bytes(abi.entry_out.size + abi.attr.size)
_LOCK_KINDS: Final = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
_opening_other: Final = threading.Lock()  # several threads write pages of one file


class FileOperations(Tree):
    """Everything that has a file handle."""

    def _lower_flags(self, flags: int) -> int:
        flags = flags & ~_O_DROPPED | os.O_CLOEXEC
        if self.kernel_cache.writeback:  # the kernel reads around what it writes, and knows the end of the file itself
            flags &= ~os.O_APPEND
            if flags & os.O_ACCMODE == os.O_WRONLY:
                flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return flags

    def open(self, request: Request) -> Reply:
        body: codec.Open = request.body
        node = self.nodes.get(request.node)
        if node.kind != stat.S_IFREG:
            raise OSError(errno.ENXIO, "only regular files are opened here")
        flags = self._lower_flags(body.flags)
        with self.nodes.open(node) as at:
            if flags & os.O_TRUNC:
                with self.changing(request, node.ino):
                    if body.open_flags & abi.OPEN_KILL_SUIDGID:
                        drop_set_ids(at)
                    fd = os.open(syscalls.proc_path(at), flags)
            else:
                fd = os.open(syscalls.proc_path(at), flags)
        return (self._opened(request, fd, flags, node),)

    def _opened(self, request: Request, fd: int, flags: int, node: Node) -> bytes:
        how = self.open_flags(node)
        if flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY | os.O_APPEND:
            how |= abi.FOPEN_DIRECT_IO  # rule 4
        return replies.encode_open(self.add_file(OpenFile(fd, flags, node, (request.uid, request.gid))), how)

    def create(self, request: Request) -> Reply:
        body: codec.Create = request.body
        parent = self.nodes.get(request.node)
        flags = self._lower_flags(body.flags) & ~os.O_TRUNC
        with self.nodes.open(parent) as at, self.changing(request, parent.ino) as change:
            self.credentials.become(request.uid, request.gid, body.umask)
            try:
                fd = os.open(body.name, flags | os.O_CREAT | os.O_EXCL, stat.S_IMODE(body.mode), dir_fd=at)
            except FileExistsError:
                if body.flags & os.O_EXCL:
                    raise
                raise OSError(errno.ESTALE, "the name exists by now: look again") from None
            return self._created(request, fd, flags, parent, body.name, change)

    def tmpfile(self, request: Request) -> Reply:
        body: codec.Create = request.body
        parent = self.nodes.get(request.node)
        flags = self._lower_flags(body.flags)
        with self.nodes.open(parent) as at, self.changing(request, parent.ino) as change:
            self.credentials.become(request.uid, request.gid, body.umask)
            exclusive = body.flags & os.O_EXCL  # it may never get a name
            fd = os.open(syscalls.proc_path(at), flags | os.O_TMPFILE | exclusive, stat.S_IMODE(body.mode))
            return self._created(request, fd, flags, parent, b"", change)

    def _created(
        self, request: Request, fd: int, flags: int, parent: Node, name: bytes, change: Change
    ) -> Reply:
        try:
            self.made(fd)
            status = os.fstat(fd)
            change.touch(self.nodes.inode_number(status))  # before anything can fail: it is there
            node = self.nodes.adopt(
                os.open(syscalls.proc_path(fd), os.O_PATH | os.O_CLOEXEC), status, parent, name
            )  # fmt: skip
        except BaseException:
            os.close(fd)
            raise
        entry = self.entry(node, replies.encode_attr(status, node.ino))
        return entry, self._opened(request, fd, flags, node)

    def read(self, request: Request) -> Reply:
        body: codec.Read = request.body
        return (os.pread(self.file(body.fh).fd, body.size, body.offset),)

    def write(self, request: Request) -> Reply:
        body: codec.Write = request.body
        file, pages = self.file(body.fh), bool(body.write_flags & abi.WRITE_CACHE)
        self.credentials.become(*(file.opener if pages else (request.uid, request.gid)))  # some space is kept for root
        with self.changing(request, file.node.ino):
            if body.write_flags & abi.WRITE_KILL_SUIDGID:
                drop_set_ids(file.fd)
            if pages:
                fd = self._writer(file, appends=False)
                count = 0
                while count < len(body.data):  # rule 6
                    count += os.pwrite(fd, body.data[count:], body.offset + count)
            else:
                fd = self._writer(file, appends=bool(body.flags & os.O_APPEND) and not self.kernel_cache.writeback)
                count = os.pwrite(fd, body.data, body.offset)
        return (replies.encode_written(count),)

    def _writer(self, file: OpenFile, *, appends: bool) -> int:
        """Rule 5."""
        if appends == bool(file.flags & os.O_APPEND):
            return file.fd
        with _opening_other:
            if file.other_fd < 0:
                flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if appends else 0)
                file.other_fd = os.open(syscalls.proc_path(file.fd), flags)
            return file.other_fd

    def _drop_set_ids_for(self, request: Request, file: OpenFile) -> None:
        """For changes of data whose requests do not tell, as WRITE does, whether the caller may keep set-id bits."""
        self.credentials.become(request.uid, request.gid)  # a server below decides by the uid, too
        if request.uid != 0:
            drop_set_ids(file.fd)

    def flush(self, request: Request) -> Reply:
        body: codec.Flush = request.body
        file = self.file(body.fh)
        try:
            os.close(os.dup(file.fd))  # what close() would report, it reports
        finally:
            self.locks.flushed(file, body.fh, body.lock_owner)
        return ()

    def release(self, request: Request) -> Reply:
        fh: int = request.body.fh
        file = self._files.get(fh)
        if file is not None:
            self.locks.released(file, fh)
        try:
            self.remove_file(fh)
        finally:
            self.locks.closed(fh)
        return ()

    def fsync(self, request: Request) -> Reply:
        body: codec.Fsync = request.body
        fd = self.file(body.fh).fd
        if body.data_only:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return ()

    def fallocate(self, request: Request) -> Reply:
        body: codec.Fallocate = request.body
        file = self.file(body.fh)
        with self.changing(request, file.node.ino):
            self._drop_set_ids_for(request, file)
            syscalls.fallocate(file.fd, body.mode, body.offset, body.length)
        return ()

    def lseek(self, request: Request) -> Reply:
        body: codec.Lseek = request.body
        return (replies.encode_offset(os.lseek(self.file(body.fh).fd, body.offset, body.whence)),)

    def copy_file_range(self, request: Request) -> Reply:
        body: codec.CopyFileRange = request.body
        source, target = self.file(body.fh_in), self.file(body.fh_out)
        length = min(body.length, 1 << 30)  # the reply has 32 bits
        with self.changing(request, target.node.ino):
            self._drop_set_ids_for(request, target)
            count = os.copy_file_range(source.fd, target.fd, length, body.offset_in, body.offset_out)
        return (replies.encode_written(count),)

    # ---- locks ----

    def getlk(self, request: Request) -> Reply:
        body: codec.Lock = request.body
        found = self.locks.find(self.file(body.fh), body.owner, _piece(body))
        if found is None:
            return (replies.encode_lock(body.start, body.end, fcntl.F_UNLCK, 0),)
        return (replies.encode_lock(found.start, found.end, found.kind, found.pid),)

    def setlk(self, request: Request) -> Reply:
        return self._set_lock(request, wait=False)

    def setlkw(self, request: Request) -> Reply:
        return self._set_lock(request, wait=True)

    def _set_lock(self, request: Request, *, wait: bool) -> Reply:
        body: codec.Lock = request.body
        file, wanted = self.file(body.fh), _piece(body)
        if body.flags & abi.LK_FLOCK:
            self.locks.flock(request, file, wanted.kind, wait=wait)
        else:
            self.locks.set(request, file, body.owner, wanted, wait=wait)
        if wanted.kind != fcntl.F_UNLCK:
            self.locked(file.node)
        return ()

    def locked(self, node: Node) -> None:
        """Somebody has got a lock, and is about to be told: a hook."""

    # ---- directories ----

    def opendir(self, request: Request) -> Reply:
        node = self.nodes.get(request.node)
        with self.nodes.open(node) as at:
            fd = os.open(syscalls.proc_path(at), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        flags = abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR if self.kernel_cache.keep_pages else 0
        return (replies.encode_open(self.add_file(OpenFile(fd, os.O_RDONLY, node)), flags),)

    def _entries(self, body: codec.Read, size_bytes: int) -> list[replies.DirectoryEntry]:
        directory = self.file(body.fh)
        offset = body.offset - (1 << 64) if body.offset >> 63 else body.offset
        if offset != directory.position:
            os.lseek(directory.fd, offset, os.SEEK_SET)
        entries = replies.parse_dirents(syscalls.getdents(directory.fd, size_bytes))
        device = directory.node.key[0]
        if device != self.nodes.root_device:
            entries = [entry._replace(ino=self.nodes.number_on(device, entry.ino)) for entry in entries]
        directory.position = entries[-1].offset if entries else offset
        return entries

    def readdir(self, request: Request) -> Reply:
        body: codec.Read = request.body
        entries = self._entries(body, replies.dirents_that_fit(body.size))
        return (b"".join([replies.encode_dirent(entry) for entry in entries]),)

    def readdirplus(self, request: Request) -> Reply:
        body: codec.Read = request.body
        pieces: list[bytes] = []
        directory = self.file(body.fh)
        for entry in self._entries(body, replies.dirents_that_fit_plus(body.size)):
            head = _NO_ENTRY
            if entry.name not in (b".", b".."):
                try:
                    node, attr = self.look_up(directory.node, directory.fd, entry.name)
                    head = self.entry(node, attr)
                except OSError:
                    pass  # gone, or not to be reached: the name alone, as the directory has it
            pieces += head, replies.encode_dirent(entry)
        return (b"".join(pieces),)

    def fsyncdir(self, request: Request) -> Reply:
        return self.fsync(request)

    def releasedir(self, request: Request) -> Reply:
        return self.release(request)


def _piece(body: codec.Lock) -> Piece:
    if body.kind not in _LOCK_KINDS or not body.start <= body.end <= syscalls.OFFSET_MAX:
        raise OSError(errno.EINVAL, f"no lock: {body}")
    return Piece(body.start, body.end, body.kind, body.fh, body.pid)
