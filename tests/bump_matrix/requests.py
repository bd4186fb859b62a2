"""Each row of the bump matrix as one FUSE request on the ground."""

import errno
import os
import stat
from collections.abc import Callable, Mapping
from typing import NamedTuple

from coherency.fuse import abi, codec
from coherency.fuse.abi import Opcode, SetattrValid
from coherency.fuse.codec import Request
from coherency.ids import HostInode
from tests.bump_matrix.desk import Desk, node_in
from tests.bump_matrix.ground import FILE_BYTES, GROUP, USER, acl

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10


class Step(NamedTuple):
    """A request that is ready, and who is who."""

    request: Request
    roles: Mapping[str, str | HostInode]
    """For each role of the document but `new inode`: the path of an inode that exists before, or its number."""
    appears: str | None = None
    """Where the new inode is, if the reply does not tell."""
    error: int = 0
    """errno that belongs to the row."""


def setattr_body(
    valid: int,
    *,
    fh: int = 0,
    size: int = 0,
    atime: tuple[int, int] = (0, 0),
    mtime: tuple[int, int] = (0, 0),
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
) -> codec.Setattr:
    return codec.Setattr(valid, fh, size, atime, mtime, mode, uid, gid)


def create(desk: Desk, path: str, name: bytes, flags: int = os.O_RDWR) -> Request:
    return desk.request(Opcode.CREATE, path, codec.Create(name, flags | os.O_CREAT, stat.S_IFREG | 0o644, 0o022, 0))


def rename(desk: Desk, old: str, new: str, flags: int | None = None) -> Request:
    """RENAME, or RENAME2 with `flags`."""
    parent, name = os.path.split(old)
    new_parent, new_name = os.path.split(new)
    body = codec.Rename(desk.node(new_parent or "."), flags or 0, name.encode(), new_name.encode())
    return desk.request(Opcode.RENAME if flags is None else Opcode.RENAME2, parent or ".", body)


def link(desk: Desk, path: str, new_parent: str, name: bytes) -> Request:
    return desk.request(Opcode.LINK, new_parent, codec.Link(desk.node(path), name))


def write(
    desk: Desk, path: str, offset: int, data: bytes, *, flags: int = os.O_WRONLY, write_flags: int = 0
) -> Request:
    fh = desk.open(path, flags)
    return desk.request(Opcode.WRITE, path, codec.Write(fh, offset, write_flags, memoryview(data), flags))


def fallocate(desk: Desk, path: str, mode: int, offset: int, length: int, *, uid: int = 0) -> Request:
    return desk.request(Opcode.FALLOCATE, path, codec.Fallocate(desk.open(path), offset, length, mode), uid=uid)


def setxattr(desk: Desk, path: str, name: bytes, value: bytes, *, flags: int = 0, kill: bool = False) -> Request:
    extra = abi.SETXATTR_ACL_KILL_SGID if kill else 0
    return desk.request(Opcode.SETXATTR, path, codec.Setxattr(name, value, flags, extra))


def tmpfile(desk: Desk) -> Request:
    return desk.request(Opcode.TMPFILE, "dir", codec.Create(b"", os.O_RDWR, stat.S_IFREG | 0o600, 0, 0))


def _link_tmpfile(desk: Desk) -> Step:
    made = desk.ask(tmpfile(desk))
    body = codec.Link(node_in(made.reply), b"new")
    return Step(desk.request(Opcode.LINK, ".", body), {"parent": ".", "target": made.new_inode})


def _setattr_partial(desk: Desk) -> Step:
    body = setattr_body(SetattrValid.MODE | SetattrValid.SIZE, mode=0o700, size=1)
    return Step(desk.request(Opcode.SETATTR, "dir", body), {"inode": "dir"}, error=errno.EINVAL)


def _removexattr_acl(desk: Desk) -> Step:
    os.setxattr(desk.root / "file", "system.posix_acl_access", acl(USER, mask=6))
    request = desk.request(Opcode.REMOVEXATTR, "file", codec.Name(b"system.posix_acl_access"))
    return Step(request, {"inode": "file"})


def _copy_file_range(target: str, uid: int) -> Callable[[Desk], Step]:
    def make(desk: Desk) -> Step:
        body = codec.CopyFileRange(desk.open("file", os.O_RDONLY), 0, desk.node(target), desk.open(target), 0, 4096)
        return Step(desk.request(Opcode.COPY_FILE_RANGE, "file", body, uid=uid), {"file written to": target})

    return make


def _inode(path: str, make: Callable[[Desk], Request]) -> Callable[[Desk], Step]:
    return lambda desk: Step(make(desk), {"inode": path})


def _file(path: str, make: Callable[[Desk], Request]) -> Callable[[Desk], Step]:
    return lambda desk: Step(make(desk), {"file": path})


def _setattr(path: str, body: codec.Setattr) -> Callable[[Desk], Step]:
    return _inode(path, lambda desk: desk.request(Opcode.SETATTR, path, body))


_RENAMED: dict[str, str | HostInode] = {"old parent": ".", "new parent": "into", "child": "file"}
_V = SetattrValid

STEPS: dict[str, Callable[[Desk], Step]] = {
    "create": lambda desk: Step(create(desk, "dir", b"new"), {"parent": "dir"}),
    "create-existing": lambda desk: Step(create(desk, "dir", b"inner"), {"parent": "dir"}, error=errno.ESTALE),
    "mknod": lambda desk: Step(
        desk.request(Opcode.MKNOD, "dir", codec.Mknod(b"new", stat.S_IFIFO | 0o600, 0, 0)), {"parent": "dir"}
    ),
    "mkdir": lambda desk: Step(desk.request(Opcode.MKDIR, "dir", codec.Mkdir(b"new", 0o755, 0)), {"parent": "dir"}),
    "symlink": lambda desk: Step(
        desk.request(Opcode.SYMLINK, "dir", codec.Symlink(b"new", b"inner")), {"parent": "dir"}
    ),
    "tmpfile": lambda desk: Step(tmpfile(desk), {"parent": "dir"}),
    "link": lambda desk: Step(link(desk, "file", "into", b"new"), {"parent": "into", "target": "file"}),
    "link-tmpfile": _link_tmpfile,
    "unlink": lambda desk: Step(
        desk.request(Opcode.UNLINK, ".", codec.Name(b"file")), {"parent": ".", "child": "file"}
    ),
    "unlink-linked": lambda desk: Step(
        desk.request(Opcode.UNLINK, ".", codec.Name(b"linked")), {"parent": ".", "child": "linked"}
    ),
    "rmdir": lambda desk: Step(
        desk.request(Opcode.RMDIR, ".", codec.Name(b"empty")), {"parent": ".", "child": "empty"}
    ),
    "rename": lambda desk: Step(rename(desk, "file", "new"), _RENAMED | {"new parent": "."}),
    "rename-parents": lambda desk: Step(rename(desk, "file", "into/new"), _RENAMED),
    "rename-directory": lambda desk: Step(rename(desk, "dir", "into/new"), _RENAMED | {"child": "dir"}),
    "rename-over": lambda desk: Step(rename(desk, "file", "into/taken"), _RENAMED | {"replaced": "into/taken"}),
    "rename-over-linked": lambda desk: Step(
        rename(desk, "file", "into/linked"), _RENAMED | {"replaced": "into/linked"}
    ),
    "rename-over-directory": lambda desk: Step(
        rename(desk, "dir", "into/sub"), _RENAMED | {"child": "dir", "replaced": "into/sub"}
    ),
    "rename-noreplace": lambda desk: Step(rename(desk, "file", "into/new", NOREPLACE), _RENAMED),
    "rename-exchange": lambda desk: Step(
        rename(desk, "file", "into/taken", EXCHANGE), _RENAMED | {"exchanged": "into/taken"}
    ),
    "rename-exchange-directory": lambda desk: Step(
        rename(desk, "file", "into/sub", EXCHANGE), _RENAMED | {"exchanged": "into/sub"}
    ),
    "rename-whiteout": lambda desk: Step(rename(desk, "file", "into/new", WHITEOUT), _RENAMED, appears="file"),
    "rename-whiteout-over": lambda desk: Step(
        rename(desk, "file", "into/taken", WHITEOUT), _RENAMED | {"replaced": "into/taken"}, appears="file"
    ),
    "setattr-mode": _setattr("file", setattr_body(_V.MODE, mode=stat.S_IFREG | 0o600)),
    "setattr-owner": _setattr("setid", setattr_body(_V.UID, uid=USER + 1)),
    "setattr-group": _setattr("file", setattr_body(_V.GID, gid=GROUP)),
    "setattr-size": _setattr("file", setattr_body(_V.SIZE, size=100)),
    "setattr-size-handle": _inode(
        "file",
        lambda desk: desk.request(
            Opcode.SETATTR, "file", setattr_body(_V.SIZE | _V.FH, size=FILE_BYTES + 1, fh=desk.open("file"))
        ),
    ),
    "setattr-times": _setattr("file", setattr_body(_V.ATIME | _V.MTIME, atime=(-5, 5), mtime=(1 << 33, 7))),
    "setattr-now": _setattr("file", setattr_body(_V.ATIME | _V.MTIME | _V.ATIME_NOW | _V.MTIME_NOW)),
    "setattr-kill": _setattr("setid", setattr_body(_V.SIZE | _V.KILL_SUIDGID, size=1)),
    "setattr-directory": _setattr("dir", setattr_body(_V.MODE, mode=stat.S_IFDIR | 0o700)),
    "setattr-symlink": _setattr("link", setattr_body(_V.UID | _V.GID | _V.MTIME, uid=USER, gid=GROUP, mtime=(7, 7))),
    "setattr-partial": _setattr_partial,
    "setxattr": _inode("file", lambda desk: setxattr(desk, "file", b"user.colour", b"blue")),
    "removexattr": _inode("file", lambda desk: desk.request(Opcode.REMOVEXATTR, "file", codec.Name(b"user.colour"))),
    "setxattr-acl": _inode("file", lambda desk: setxattr(desk, "file", b"system.posix_acl_access", acl(USER, mask=6))),
    "setxattr-acl-kill": _inode(
        "setid", lambda desk: setxattr(desk, "setid", b"system.posix_acl_access", acl(USER, mask=7), kill=True)
    ),
    "setxattr-acl-default": _inode(
        "dir", lambda desk: setxattr(desk, "dir", b"system.posix_acl_default", acl(USER, mask=6))
    ),
    "removexattr-acl": _removexattr_acl,
    "open-trunc": _file(
        "file", lambda desk: desk.request(Opcode.OPEN, "file", codec.Open(os.O_WRONLY | os.O_TRUNC, 0))
    ),
    "open-trunc-kill": _file(
        "setid",
        lambda desk: desk.request(Opcode.OPEN, "setid", codec.Open(os.O_WRONLY | os.O_TRUNC, abi.OPEN_KILL_SUIDGID)),
    ),
    "write": _file("file", lambda desk: write(desk, "file", 10, b"inside")),
    "write-append": _file(
        "file", lambda desk: write(desk, "file", FILE_BYTES, b"more", flags=os.O_WRONLY | os.O_APPEND)
    ),
    "write-kill": _file("setid", lambda desk: write(desk, "setid", 0, b"x", write_flags=abi.WRITE_KILL_SUIDGID)),
    "write-capabilities": _file("capped", lambda desk: write(desk, "capped", 0, b"x")),
    "write-mmap": _file(
        "file",
        lambda desk: write(desk, "file", 4096, bytes(4096), flags=os.O_RDWR | os.O_APPEND, write_flags=abi.WRITE_CACHE),
    ),
    "fallocate": _file("file", lambda desk: fallocate(desk, "file", 0, 0, 2 * FILE_BYTES)),
    "fallocate-keep-size": _file("file", lambda desk: fallocate(desk, "file", KEEP_SIZE, 0, 2 * FILE_BYTES)),
    "fallocate-punch-hole": _file(
        "file", lambda desk: fallocate(desk, "file", PUNCH_HOLE | KEEP_SIZE, 0, FILE_BYTES // 2)
    ),
    "fallocate-zero-range": _file("file", lambda desk: fallocate(desk, "file", ZERO_RANGE, 0, 2 * FILE_BYTES)),
    "fallocate-kill": _file("setid", lambda desk: fallocate(desk, "setid", 0, 0, FILE_BYTES, uid=USER)),
    "copy-file-range": _copy_file_range("other", 0),
    "copy-file-range-kill": _copy_file_range("setid", USER),
}
