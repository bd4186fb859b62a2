"""Bytes to requests: the reading half of the FUSE protocol, without a descriptor in sight. ``replies`` is the other.

1. ``decode`` takes one message as the kernel wrote it and returns a :class:`Request`, or raises
   :class:`~coherency.errors.FuseProtocolError` if the bytes cannot be one. It does not keep the buffer, except for the
   data of a WRITE, which is a view of it: use it before the buffer is read into again.
2. A name that leaves this module is one path component: not empty, not ``.`` or ``..``, no ``/``, no zero byte.
3. Sizes are bytes; a time is (seconds, nanoseconds).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from coherency.errors import FuseProtocolError
from coherency.fuse import abi
from coherency.fuse.abi import Opcode
from coherency.ids import NodeId


class Init(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int


class Name(NamedTuple):
    """LOOKUP, UNLINK, RMDIR: one path component. REMOVEXATTR: the name of an attribute."""

    name: bytes


class Empty(NamedTuple):
    """READLINK, STATFS, DESTROY: nothing beyond the header."""


class Forget(NamedTuple):
    """FORGET and BATCH_FORGET: how many look-ups of which node the kernel gives back."""

    forgotten: tuple[tuple[NodeId, int], ...]


class Getattr(NamedTuple):
    flags: int
    fh: int


class Statx(NamedTuple):
    flags: int
    fh: int
    sx_flags: int
    sx_mask: int


class Setattr(NamedTuple):
    valid: int
    fh: int
    size: int
    atime: tuple[int, int]
    mtime: tuple[int, int]
    mode: int
    uid: int
    gid: int


class Symlink(NamedTuple):
    name: bytes
    target: bytes


class Mknod(NamedTuple):
    name: bytes
    mode: int
    rdev: int
    umask: int


class Mkdir(NamedTuple):
    name: bytes
    mode: int
    umask: int


class Rename(NamedTuple):
    """RENAME and RENAME2."""

    new_parent: NodeId
    flags: int
    name: bytes
    new_name: bytes


class Link(NamedTuple):
    target: NodeId
    name: bytes


class Open(NamedTuple):
    """OPEN and OPENDIR."""

    flags: int
    open_flags: int


class Create(NamedTuple):
    """CREATE and TMPFILE (whose name means nothing)."""

    name: bytes
    flags: int
    mode: int
    umask: int
    open_flags: int


class Read(NamedTuple):
    """READ, READDIR and READDIRPLUS."""

    fh: int
    offset: int
    size: int


class Write(NamedTuple):
    fh: int
    offset: int
    write_flags: int
    data: memoryview
    flags: int = 0  # those of open(2), as fcntl(2) has left them


class Handle(NamedTuple):
    """RELEASE, RELEASEDIR."""

    fh: int


class Flush(NamedTuple):
    fh: int
    lock_owner: int


class Lock(NamedTuple):
    """GETLK, SETLK, SETLKW: bytes ``start`` to ``end``, both included, and F_RDLCK, F_WRLCK or F_UNLCK."""

    fh: int
    owner: int
    start: int
    end: int
    kind: int
    pid: int
    flags: int


class Fsync(NamedTuple):
    fh: int
    data_only: bool


class Setxattr(NamedTuple):
    name: bytes
    value: bytes
    flags: int
    setxattr_flags: int


class Getxattr(NamedTuple):
    """GETXATTR, and LISTXATTR with an empty name; size 0 asks for the size only."""

    name: bytes
    size: int


class Access(NamedTuple):
    mask: int


class Interrupt(NamedTuple):
    unique: int


class Fallocate(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


class Lseek(NamedTuple):
    fh: int
    offset: int
    whence: int


class CopyFileRange(NamedTuple):
    fh_in: int
    offset_in: int
    node_out: NodeId
    fh_out: int
    offset_out: int
    length: int


class Request:
    """One request of the kernel: who asks (``uid``, ``gid``, ``pid`` is a thread id), about which ``node``, and what (``body``).

    ``interrupted`` becomes true when the caller wants to give up; ``on_interrupt``, if set, is called then, once, from another thread.
    """

    __slots__ = ("body", "gid", "interrupted", "node", "on_interrupt", "opcode", "pid", "uid", "unique")

    def __init__(self, unique: int, opcode: int, node: NodeId, uid: int, gid: int, pid: int, body: Any) -> None:
        self.unique, self.opcode, self.node, self.uid, self.gid, self.pid = unique, opcode, node, uid, gid, pid
        self.body = body
        self.interrupted = False
        self.on_interrupt: Callable[[], None] | None = None

    def interrupt(self) -> None:
        """The caller wants to give up."""
        self.interrupted = True
        if self.on_interrupt:
            self.on_interrupt()

    def __repr__(self) -> str:
        return f"<{self.opcode} unique={self.unique} node={self.node} {self.body!r}>"


def _component(name: bytes) -> bytes:
    if not name or name in (b".", b"..") or b"/" in name:
        raise FuseProtocolError(f"not a name: {name!r}")
    return name


def _strings(view: memoryview, offset: int, count: int) -> list[bytes]:
    parts = bytes(view[offset:]).split(b"\0", count)
    if len(parts) <= count:
        raise FuseProtocolError("a string is not terminated")
    return parts[:count]


def _name(view: memoryview, offset: int = 0) -> bytes:
    return _component(_strings(view, offset, 1)[0])


def _lookup(view: memoryview) -> Name:
    """The most frequent request by far."""
    text = bytes(view)
    end = text.find(0)
    if end < 0:
        raise FuseProtocolError("a string is not terminated")
    return Name(_component(text[:end]))


def _init(view: memoryview) -> Init:
    major, minor, readahead, flags = abi.init_in.unpack_from(view)
    if flags & abi.InitFlag.INIT_EXT:
        flags |= abi.init_in_ext.unpack_from(view)[4] << 32
    return Init(major, minor, readahead, flags)


def _batch_forget(view: memoryview) -> Forget:
    count = abi.batch_forget_in.unpack_from(view)[0]
    end = abi.batch_forget_in.size + count * abi.forget_one.size
    if end > len(view):
        raise FuseProtocolError(f"BATCH_FORGET of {count} nodes in {len(view)} bytes")
    return Forget(tuple(abi.forget_one.iter_unpack(view[abi.batch_forget_in.size : end])))


def _setattr(view: memoryview) -> Setattr:
    valid, _, fh, size, _, atime, mtime, _, atime_n, mtime_n, _, mode, _, uid, gid, _ = abi.setattr_in.unpack_from(view)
    return Setattr(valid, fh, size, (_signed(atime), atime_n), (_signed(mtime), mtime_n), mode, uid, gid)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _getattr(view: memoryview) -> Getattr:
    flags, _, fh = abi.getattr_in.unpack_from(view)
    return Getattr(flags, fh)


def _statx(view: memoryview) -> Statx:
    flags, _, fh, sx_flags, sx_mask = abi.statx_in.unpack_from(view)
    return Statx(flags, fh, sx_flags, sx_mask)


def _symlink(view: memoryview) -> Symlink:
    name, target = _strings(view, 0, 2)
    return Symlink(_component(name), target)


def _mknod(view: memoryview) -> Mknod:
    mode, rdev, umask, _ = abi.mknod_in.unpack_from(view)
    return Mknod(_name(view, abi.mknod_in.size), mode, rdev, umask)


def _rename(view: memoryview) -> Rename:
    (new_parent,) = abi.rename_in.unpack_from(view)
    old, new = _strings(view, abi.rename_in.size, 2)
    return Rename(new_parent, 0, _component(old), _component(new))


def _rename2(view: memoryview) -> Rename:
    new_parent, flags, _ = abi.rename2_in.unpack_from(view)
    old, new = _strings(view, abi.rename2_in.size, 2)
    return Rename(new_parent, flags, _component(old), _component(new))


def _read(view: memoryview) -> Read:
    fh, offset, size, *_ = abi.read_in.unpack_from(view)
    return Read(fh, offset, size)


def _write(view: memoryview) -> Write:
    fh, offset, size, write_flags, _, flags, _ = abi.write_in.unpack_from(view)
    data = view[abi.write_in.size : abi.write_in.size + size]
    if len(data) != size:
        raise FuseProtocolError(f"WRITE of {size} bytes with {len(data)}")
    return Write(fh, offset, write_flags, data, flags)


def _lock(view: memoryview) -> Lock:
    return Lock(*abi.lk_in.unpack_from(view)[:7])


def _fsync(view: memoryview) -> Fsync:
    fh, flags, _ = abi.fsync_in.unpack_from(view)
    return Fsync(fh, bool(flags & abi.FSYNC_FDATASYNC))


def _setxattr_in(layout: Any) -> Callable[[memoryview], Setxattr]:
    def decode_setxattr(view: memoryview) -> Setxattr:
        size, flags, *extra = layout.unpack_from(view)
        (name,) = _strings(view, layout.size, 1)
        start = layout.size + len(name) + 1
        value = bytes(view[start : start + size])
        if len(value) != size:
            raise FuseProtocolError(f"SETXATTR of {size} bytes with {len(value)}")
        return Setxattr(name, value, flags, extra[0] if extra else 0)

    return decode_setxattr


def _getxattr(view: memoryview) -> Getxattr:
    size, _ = abi.getxattr_in.unpack_from(view)
    return Getxattr(_strings(view, abi.getxattr_in.size, 1)[0], size)


def _listxattr(view: memoryview) -> Getxattr:
    size, _ = abi.getxattr_in.unpack_from(view)
    return Getxattr(b"", size)


def _fallocate(view: memoryview) -> Fallocate:
    fh, offset, length, mode, _ = abi.fallocate_in.unpack_from(view)
    return Fallocate(fh, offset, length, mode)


def _lseek(view: memoryview) -> Lseek:
    fh, offset, whence, _ = abi.lseek_in.unpack_from(view)
    return Lseek(fh, _signed(offset), whence)  # unlike other offsets, the kernel has not checked this one


def _copy_file_range(view: memoryview) -> CopyFileRange:
    return CopyFileRange(*abi.copy_file_range_in.unpack_from(view)[:6])


_EMPTY: Final = Empty()
_BODIES: Final[dict[int, Callable[[memoryview], Any]]] = {  # by the numbers, not the members: see decode
    Opcode.LOOKUP: _lookup,
    Opcode.BATCH_FORGET: _batch_forget,
    Opcode.GETATTR: _getattr,
    Opcode.STATX: _statx,
    Opcode.SETATTR: _setattr,
    Opcode.READLINK: lambda view: _EMPTY,
    Opcode.SYMLINK: _symlink,
    Opcode.MKNOD: _mknod,
    Opcode.MKDIR: lambda view: Mkdir(_name(view, abi.mkdir_in.size), *abi.mkdir_in.unpack_from(view)),
    Opcode.UNLINK: _lookup,
    Opcode.RMDIR: _lookup,
    Opcode.RENAME: _rename,
    Opcode.RENAME2: _rename2,
    Opcode.LINK: lambda view: Link(abi.link_in.unpack_from(view)[0], _name(view, abi.link_in.size)),
    Opcode.OPEN: lambda view: Open(*abi.open_in.unpack_from(view)),
    Opcode.CREATE: lambda view: Create(_name(view, abi.create_in.size), *abi.create_in.unpack_from(view)),
    Opcode.TMPFILE: lambda view: Create(b"", *abi.create_in.unpack_from(view)),
    Opcode.READ: _read,
    Opcode.WRITE: _write,
    Opcode.FLUSH: lambda view: Flush(*abi.flush_in.unpack_from(view)[::3]),
    Opcode.RELEASE: lambda view: Handle(abi.release_in.unpack_from(view)[0]),
    Opcode.FSYNC: _fsync,
    Opcode.FSYNCDIR: _fsync,
    Opcode.STATFS: lambda view: _EMPTY,
    Opcode.SETXATTR: _setxattr_in(abi.setxattr_in_compat),
    Opcode.GETXATTR: _getxattr,
    Opcode.LISTXATTR: _listxattr,
    Opcode.REMOVEXATTR: lambda view: Name(_strings(view, 0, 1)[0]),
    Opcode.INIT: _init,
    Opcode.OPENDIR: lambda view: Open(*abi.open_in.unpack_from(view)),
    Opcode.READDIR: _read,
    Opcode.READDIRPLUS: _read,
    Opcode.RELEASEDIR: lambda view: Handle(abi.release_in.unpack_from(view)[0]),
    Opcode.GETLK: _lock,
    Opcode.SETLK: _lock,
    Opcode.SETLKW: _lock,
    Opcode.ACCESS: lambda view: Access(abi.access_in.unpack_from(view)[0]),
    Opcode.INTERRUPT: lambda view: Interrupt(abi.interrupt_in.unpack_from(view)[0]),
    Opcode.FALLOCATE: _fallocate,
    Opcode.LSEEK: _lseek,
    Opcode.COPY_FILE_RANGE: _copy_file_range,
    Opcode.SYNCFS: lambda view: _EMPTY,
    Opcode.DESTROY: lambda view: _EMPTY,
}
_EXTENDED_SETXATTR: Final = _setxattr_in(abi.setxattr_in)
_HEADER_SIZE: Final = abi.in_header.size
_unpack_header: Final = abi.in_header.unpack_from
# Members of an enumeration take longer to look up than all the rest of decoding.
_FORGET: Final = int(Opcode.FORGET)
_SETXATTR: Final = int(Opcode.SETXATTR)


def decode(message: memoryview, *, setxattr_ext: bool = False) -> Request:
    """One message of the kernel as a request; an operation that the project does not know has ``body`` None.

    ``setxattr_ext``: FUSE_SETXATTR_EXT was agreed on. Raises :class:`FuseProtocolError`; its message is for the log, the
    kernel is answered with EINVAL if the header could be read.
    """
    try:
        length, opcode, unique, node, uid, gid, pid, extensions, _ = _unpack_header(message)
        end = length - 8 * extensions
        if length != len(message) or end < _HEADER_SIZE:
            raise FuseProtocolError(f"header says {length} bytes ({extensions * 8} of extensions), got {len(message)}")
        view = message[_HEADER_SIZE:end]
        if opcode == _FORGET:
            body: Any = Forget(((node, abi.forget_in.unpack_from(view)[0]),))
        elif opcode == _SETXATTR and setxattr_ext:
            body = _EXTENDED_SETXATTR(view)
        else:
            decoder = _BODIES.get(opcode)
            body = decoder(view) if decoder else None
    except struct.error as error:
        raise FuseProtocolError(f"truncated message of {len(message)} bytes: {error}") from error
    return Request(unique, opcode, node, uid, gid, pid, body)


def unique_of(message: memoryview) -> int | None:
    """Which request a message that could not be decoded was, if its header is there."""
    return int(abi.in_header.unpack_from(message)[2]) if len(message) >= _HEADER_SIZE else None
