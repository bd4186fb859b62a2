"""Requests as the kernel writes them, built by the field names of its own header."""

from __future__ import annotations

from tests.fuse_header import header

UNIQUE, NODE, UID, GID, PID = 0x0102030405060708, 0x1112131415161718, 1001, 1002, 1003

# Which struct follows the header of a request; none for the others.
STRUCTS = {
    "FORGET": "forget_in", "BATCH_FORGET": "batch_forget_in", "GETATTR": "getattr_in", "STATX": "statx_in",
    "SETATTR": "setattr_in", "MKNOD": "mknod_in", "MKDIR": "mkdir_in", "RENAME": "rename_in", "RENAME2": "rename2_in",
    "LINK": "link_in", "OPEN": "open_in", "OPENDIR": "open_in", "CREATE": "create_in", "TMPFILE": "create_in",
    "READ": "read_in", "READDIR": "read_in", "READDIRPLUS": "read_in", "WRITE": "write_in", "FLUSH": "flush_in",
    "RELEASE": "release_in", "RELEASEDIR": "release_in", "FSYNC": "fsync_in", "FSYNCDIR": "fsync_in",
    "SETXATTR": "setxattr_in", "GETXATTR": "getxattr_in", "LISTXATTR": "getxattr_in", "INIT": "init_in",
    "ACCESS": "access_in", "INTERRUPT": "interrupt_in", "FALLOCATE": "fallocate_in", "LSEEK": "lseek_in",
    "GETLK": "lk_in", "SETLK": "lk_in", "SETLKW": "lk_in",
    "COPY_FILE_RANGE": "copy_file_range_in", "SYNCFS": "syncfs_in",
}  # fmt: skip


def body(kind: str, **fields: int) -> bytes:
    """The struct of a request of this kind."""
    return header().layouts[STRUCTS[kind]].pack(**fields) if kind in STRUCTS else b""


def message(
    kind: str | int, payload: bytes, *, unique: int = UNIQUE, node: int = NODE, uid: int = UID, gid: int = GID,
    pid: int = PID, extension: bytes = b"",
) -> bytes:  # fmt: skip
    """A whole request: kind by name (or a number), and what follows the header."""
    in_header = header().layouts["in_header"]
    rest = payload + extension
    opcode = kind if isinstance(kind, int) else header().numbers[f"FUSE_{kind}"]
    return (
        in_header.pack(
            len=in_header.size + len(rest), opcode=opcode, unique=unique, nodeid=node, uid=uid, gid=gid, pid=pid,
            total_extlen=len(extension) // 8,
        )
        + rest
    )  # fmt: skip


def request(
    kind: str, tail: bytes = b"", *, unique: int = UNIQUE, node: int = NODE, caller: tuple[int, int] = (UID, GID),
    pid: int = PID, **fields: int,
) -> bytes:  # fmt: skip
    """A whole request from the fields of its struct and what follows the struct. ``caller``: uid and gid."""
    return message(kind, body(kind, **fields) + tail, unique=unique, node=node, uid=caller[0], gid=caller[1], pid=pid)


def forget_one(node: int, lookups: int) -> bytes:
    return header().layouts["forget_one"].pack(nodeid=node, nlookup=lookups)
