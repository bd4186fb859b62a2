"""Events as the kernel writes them into a fanotify descriptor, made by hand: fanotify(7)."""

import struct

FID, PLACE, OLD_PLACE, NEW_PLACE = 1, 2, 10, 12
OTHER_PID = 4711
FSID = 0x1122334455667788


def ino32(ino: int) -> bytes:
    """The handle of an inode on ext4."""
    return struct.pack("=IiII", 8, 1, ino, 99)


def event(mask: int, *records: bytes, pid: int = OTHER_PID, version: int = 3) -> bytes:
    body = b"".join(records)
    return struct.pack("=IBBHQii", 24 + len(body), version, 0, 24, mask, -1, pid) + body


def record(kind: int, handle: bytes, name: bytes | None = None, *, fsid: int = FSID) -> bytes:
    body = struct.pack("=Q", fsid) + handle + (b"" if name is None else name + b"\0")
    body += bytes(-len(body) % 4)
    return struct.pack("=BBH", kind, 0, 4 + len(body)) + body


def of_name(mask: int, target: int, directory: int, name: bytes, *, pid: int = OTHER_PID) -> bytes:
    """Of what is called ``name``."""
    return event(mask, record(PLACE, ino32(directory), name), record(FID, ino32(target)), pid=pid)


def of_inode(mask: int, target: int, *, pid: int = OTHER_PID) -> bytes:
    """Without a name."""
    return event(mask, record(FID, ino32(target)), pid=pid)


def of_rename(mask: int, target: int, old: tuple[int, bytes], new: tuple[int, bytes], *, pid: int = OTHER_PID) -> bytes:
    places = record(OLD_PLACE, ino32(old[0]), old[1]), record(NEW_PLACE, ino32(new[0]), new[1])
    return event(mask, *places, record(FID, ino32(target)), pid=pid)
