"""What the kernel writes into a fanotify descriptor: bytes in, events out. Pure. Sources: fanotify(7), fanotify_init(2).

The group reports, of each event, the file handle of what it happened to, and for a directory entry the handle of the
directory and the name. Handles are in the form of `struct file_handle`, as open_by_handle_at(2) takes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

ATTRIB: Final = 0x4
MODIFY: Final = 0x2
CLOSE_WRITE: Final = 0x8
CREATE: Final = 0x100
DELETE: Final = 0x200
DELETE_SELF: Final = 0x400
Q_OVERFLOW: Final = 0x4000
RENAME: Final = 0x1000_0000
ONDIR: Final = 0x4000_0000

_VERSION: Final = 3
_FID: Final = 1
_OLD_PLACE: Final = (2, 10)
"""FAN_EVENT_INFO_TYPE_DFID_NAME, and _OLD_DFID_NAME of a rename."""
_NEW_PLACE: Final = 12
_ITSELF: Final = b"."
_metadata = struct.Struct("=IBBHQii")
_record = struct.Struct("=BBHQIi")  # struct fanotify_event_info_header, then fsid, then the head of a handle
_handle_head = struct.Struct("=Ii")
_FSID_AT: Final = 4
_HANDLE_AT: Final = 12
HANDLE_HEAD_BYTES: Final = _handle_head.size


class HostEvent(NamedTuple):
    """Something that happened on a file system that is watched, or several things in a row that the kernel made one event.

    ``target``: the handle of what it happened to. ``directory`` and ``name``: where that is, if the event is about a name or
    the kernel knows; None and empty otherwise. Of a rename the old place, and the new one in ``new_directory`` and ``new_name``.
    ``pid``: the process that did it.
    """

    mask: int
    fsid: int
    target: bytes | None
    directory: bytes | None = None
    name: bytes = b""
    new_directory: bytes | None = None
    new_name: bytes = b""
    pid: int = 0


def events_of_others(buffer: bytes, own_pid: int) -> Iterator[HostEvent]:
    """The events in what was read, oldest first, without those of ``own_pid``.

    ``ValueError`` if the kernel speaks another version of this.
    """
    position, total = 0, len(buffer)
    while position < total:
        length, version, _, head, mask, _, pid = _metadata.unpack_from(buffer, position)
        if version != _VERSION or length < head:
            raise ValueError(f"fanotify events of version {version}, not {_VERSION}")
        if pid != own_pid or mask & Q_OVERFLOW:
            yield _with_places(buffer, position + head, position + length, mask, pid)
        position += length


def _with_places(buffer: bytes, position: int, end: int, mask: int, pid: int) -> HostEvent:
    fsid = 0
    target = directory = new_directory = None
    name = new_name = b""
    while position < end:
        kind, _, length, fsid, handle_bytes, _ = _record.unpack_from(buffer, position)
        name_at = position + _record.size + handle_bytes
        handle = buffer[position + _HANDLE_AT : name_at]
        if kind == _FID:
            target = handle
        elif kind in _OLD_PLACE:
            directory, name = handle, buffer[name_at : position + length].split(b"\0", 1)[0]
        elif kind == _NEW_PLACE:
            new_directory, new_name = handle, buffer[name_at : position + length].split(b"\0", 1)[0]
        position += length
    if name == _ITSELF:  # so a directory is told of that is no entry of the event
        target, directory, name = directory, None, b""
    return HostEvent(mask, fsid, target, directory, name, new_directory, new_name, pid)


# --- the inode number in a handle -----------------------------------------------------------------------------------


class Numbered(NamedTuple):
    """What a handle of a known kind says. ``tree`` is the subvolume (btrfs), 0 elsewhere."""

    ino: int
    tree: int = 0


_BTRFS: Final = (0x4D, 20)  # FILEID_BTRFS_WITHOUT_PARENT
_BTRFS_FIRST_INO: Final = 256
_btrfs_handle = struct.Struct("=QQI")  # inode subvolume generation
_NUMBERS: Final = {
    (0x01, 8): struct.Struct("=8xI"),  # FILEID_INO32_GEN: ext4 and most others
    (0x01, 12): struct.Struct("=12xQ"),  # tmpfs: generation first
    (0x81, 12): struct.Struct("=8xQ"),  # FILEID_INO64_GEN: xfs
    _BTRFS: struct.Struct("=8xQQ"),
}
"""By type and length. Other file systems use the same types for other things: see ``can_be_read``."""


def numbered(handle: bytes) -> Numbered | None:
    """The inode number in a handle, which may be that of an inode that is gone; None if it is of no known kind."""
    size, kind = _handle_head.unpack_from(handle)
    numbers = _NUMBERS.get((kind, size))
    return None if numbers is None else Numbered(*numbers.unpack_from(handle))


def subvolume_root(tree: int) -> bytes:
    """The handle of the root of a subvolume (btrfs); Linux 6.2 and later open it without its generation."""
    return _handle_head.pack(_BTRFS[1], _BTRFS[0]) + _btrfs_handle.pack(_BTRFS_FIRST_INO, tree, 0)


def can_be_read(handle: bytes, ino: int) -> bool:
    """Whether the handles of this file system are what they look like, judged by one whose inode number is known."""
    found = numbered(handle)
    return found is not None and found.ino == ino
