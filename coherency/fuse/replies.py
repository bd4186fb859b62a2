"""Replies and notifications to bytes: the writing half of the FUSE protocol, without a descriptor in sight.

Every function returns the payload behind ``struct fuse_out_header``, except :func:`reply_header` itself. Timeouts say for
how long the kernel may believe a name or attributes: nanoseconds, and :data:`FOREVER_NS` stands for no end.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from coherency.fuse import abi
from coherency.ids import HostInode, NodeId

FOREVER_NS: Final = (1 << 62) - 1
_SECOND_NS: Final = 1_000_000_000
_U64: Final = (1 << 64) - 1
_NO_TIME: Final = bytes(abi.attr_out.size)
_pack_header: Final = abi.out_header.pack
_pack_entry: Final = abi.entry_out.pack
_HEADER_SIZE: Final = abi.out_header.size
_owner = struct.Struct("=II")
_OWNER_IN_ATTR: Final = 68
_OWNER_IN_STATX: Final = 20


def reply_header(unique: int, payload_bytes: int, error: int = 0) -> bytes:
    """``error`` is a positive errno, or for notifications (unique 0) minus the notification's code."""
    return _pack_header(_HEADER_SIZE + payload_bytes, -error, unique)


def encode_attr(status: os.stat_result, ino: HostInode) -> bytes:
    """``struct fuse_attr`` from what ``os.stat`` told, under the inode number that guests shall see."""
    atime_s, atime_ns = divmod(status.st_atime_ns, _SECOND_NS)
    mtime_s, mtime_ns = divmod(status.st_mtime_ns, _SECOND_NS)
    ctime_s, ctime_ns = divmod(status.st_ctime_ns, _SECOND_NS)
    device = status.st_rdev
    return abi.attr.pack(
        ino, status.st_size, status.st_blocks, atime_s & _U64, mtime_s & _U64, ctime_s & _U64, atime_ns, mtime_ns, ctime_ns,
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid, _encode_device(device) if device else 0,
        status.st_blksize, 0,
    )  # fmt: skip


def owner_of(attr: bytes) -> tuple[int, int]:
    """User and group in a ``struct fuse_attr``."""
    uid, gid = _owner.unpack_from(attr, _OWNER_IN_ATTR)
    return uid, gid


def owner_in_statx_out(reply: bytes) -> tuple[int, int]:
    """The same in a ``struct fuse_statx_out``."""
    uid, gid = _owner.unpack_from(reply, abi.statx_out.size + _OWNER_IN_STATX)
    return uid, gid


def _encode_device(device: int) -> int:
    """The kernel's ``new_encode_dev``: 32 bits of major and minor."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_device(encoded: int) -> int:
    """The inverse, as ``os.mknod`` takes it."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))


def encode_entry(node: NodeId, attr: bytes, entry_ns: int = 0, attr_ns: int = 0) -> bytes:
    """``struct fuse_entry_out``: a name is ``node``; for how long the kernel may believe the name and the attributes."""
    if not entry_ns and not attr_ns:
        return _pack_entry(node, 0, 0, 0, 0, 0) + attr
    entry_s, entry_rest = divmod(entry_ns, _SECOND_NS)
    attr_s, attr_rest = divmod(attr_ns, _SECOND_NS)
    return _pack_entry(node, 0, entry_s, attr_s, entry_rest, attr_rest) + attr


def encode_unknown_attr(mode: int) -> bytes:
    """``struct fuse_attr`` of what is gone before anybody could look at it: its type, which is all that the kernel needs to go on."""
    return abi.attr.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 0, 0)


def encode_attr_out(attr: bytes, attr_ns: int = 0) -> bytes:
    if not attr_ns:
        return _NO_TIME + attr
    seconds, rest = divmod(attr_ns, _SECOND_NS)
    return abi.attr_out.pack(seconds, rest, 0) + attr


def encode_statx_out(statx: bytes, ino: HostInode, attr_ns: int = 0) -> bytes:
    """``struct fuse_statx_out`` around the kernel's own ``struct statx``, with the inode number that guests shall see."""
    seconds, rest = divmod(attr_ns, _SECOND_NS)
    return abi.statx_out.pack(seconds, rest, 0) + statx[:32] + ino.to_bytes(8, "little") + statx[40:144] + bytes(112)


def retime_statx_out(reply: bytes, attr_ns: int) -> bytes:
    """A ``struct fuse_statx_out`` again, with another time."""
    return abi.statx_out.pack(*divmod(attr_ns, _SECOND_NS), 0) + reply[abi.statx_out.size :]


def encode_init_out(
    minor: int, max_readahead: int, flags: int, *, max_write_bytes: int, max_pages: int, max_background: int
) -> bytes:
    return abi.init_out.pack(
        abi.KERNEL_VERSION, minor, max_readahead, flags & 0xFFFFFFFF, max_background, max_background * 3 // 4,
        max_write_bytes, 1, max_pages, 0, flags >> 32,
    )  # fmt: skip


def encode_open(fh: int, open_flags: int = 0) -> bytes:
    return abi.open_out.pack(fh, open_flags, 0)


def encode_written(count: int) -> bytes:
    return abi.write_out.pack(count, 0)


def encode_xattr_size(size: int) -> bytes:
    return abi.getxattr_out.pack(size, 0)


def encode_offset(offset: int) -> bytes:
    return abi.lseek_out.pack(offset)


def encode_lock(start: int, end: int, kind: int, pid: int) -> bytes:
    """``struct fuse_lk_out``: what stands in the way of a lock; F_UNLCK if nothing does."""
    return abi.lk_out.pack(start, end, kind, pid)


def encode_statfs(status: os.statvfs_result) -> bytes:
    return abi.statfs_out.pack(
        status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree,
        status.f_bsize, status.f_namemax, status.f_frsize,
    )  # fmt: skip


class DirectoryEntry(NamedTuple):
    ino: int
    offset: int  # where the entry after this one begins
    kind: int  # DT_*
    name: bytes


def parse_dirents(records: bytes) -> list[DirectoryEntry]:
    """The ``struct linux_dirent64`` records that getdents64(2) returned."""
    entries, position, unpack, head = [], 0, abi.linux_dirent64.unpack_from, abi.linux_dirent64.size
    while position < len(records):
        ino, offset, length, kind = unpack(records, position)
        start = position + head
        entries.append(DirectoryEntry(ino, offset, kind, records[start : records.index(0, start)]))
        position += length
    return entries


def dirents_that_fit(reply_bytes: int) -> int:
    """How many bytes of getdents64 records always fit, converted, into a READDIR reply (a one-letter name grows from 24 to 32)."""
    return reply_bytes * 3 // 4


def dirents_that_fit_plus(reply_bytes: int) -> int:
    """The same for READDIRPLUS (a one-letter name grows from 24 to 160); room for the longest name at least."""
    return max(reply_bytes * 24 // 160, 280)


def encode_dirent(entry: DirectoryEntry) -> bytes:
    length = len(entry.name)
    return abi.dirent.pack(entry.ino, entry.offset & _U64, length, entry.kind) + entry.name + bytes(-length % 8)


# ---- notifications ----


def encode_inval_inode(node: NodeId, offset: int, length: int) -> bytes:
    """``offset`` -1: attributes only; (0, 0): all pages too."""
    return abi.notify_inval_inode_out.pack(node, offset, length)


def encode_inval_entry(parent: NodeId, name: bytes, *, expire_only: bool) -> bytes:
    return abi.notify_inval_entry_out.pack(parent, len(name), abi.EXPIRE_ONLY if expire_only else 0) + name + b"\0"
