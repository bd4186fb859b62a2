"""What a request of the export has brought about, in the words of `events`.  Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

from coherency.events import Event, EventKind
from coherency.fuse.abi import Opcode, SetattrValid
from coherency.fuse.codec import Request
from coherency.ids import HostInode

_RENAME_EXCHANGE: Final = 1 << 1
_BOTH_TIMES: Final = SetattrValid.ATIME | SetattrValid.MTIME
_MAKES: Final = (Opcode.CREATE, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK)
_REMOVES: Final = (Opcode.UNLINK, Opcode.RMDIR)
_RENAMES: Final = (Opcode.RENAME, Opcode.RENAME2)
_MODIFIES: Final = (Opcode.OPEN, Opcode.WRITE, Opcode.FALLOCATE, Opcode.COPY_FILE_RANGE)
_ATTRIBUTES: Final = (Opcode.SETXATTR, Opcode.REMOVEXATTR)


class Thing(NamedTuple):
    """An inode, and where it was last seen: the parent is 0, and the name empty, if it is nowhere."""

    ino: HostInode
    is_directory: bool
    parent: HostInode = HostInode(0)
    name: bytes = b""


def happened(request: Request, directories: tuple[HostInode, ...], things: tuple[Thing, ...]) -> tuple[Event, ...]:
    """What is to be told of a request that has succeeded; nothing of one that programs that watch are told nothing of.

    `directories`: that of each name in the request. `things`: what was made, linked, removed, renamed or changed; of a rename
    also what had the new name before, if there was something.
    """
    opcode, body, thing = request.opcode, request.body, things[0]
    if opcode in _MAKES:
        return (_at(EventKind.CREATED, thing, directories[0], body.name),)
    if opcode in _REMOVES:
        return (_at(EventKind.REMOVED, thing, directories[0], body.name),)
    if opcode in _RENAMES:
        return _renamed(body.flags, (directories[0], body.name), (directories[1], body.new_name), things)
    if opcode in _MODIFIES:
        return (_to(EventKind.MODIFIED, thing),)
    if opcode in _ATTRIBUTES:
        return (_to(EventKind.ATTRIBUTES, thing),)
    if opcode == Opcode.SETATTR:
        return tuple(_to(kind, thing) for kind in _kinds_of_setattr(body.valid))
    return ()


def _at(kind: EventKind, thing: Thing, parent: HostInode, name: bytes) -> Event:
    return Event(kind, thing.ino, thing.is_directory, parent, name)


def _to(kind: EventKind, thing: Thing) -> Event:
    return Event(kind, *thing)


def _renamed(
    flags: int, old: tuple[HostInode, bytes], new: tuple[HostInode, bytes], things: tuple[Thing, ...]
) -> tuple[Event, ...]:
    moved, others = things[0], things[1:]
    if flags & _RENAME_EXCHANGE:
        return (
            Event(EventKind.RENAMED, moved.ino, moved.is_directory, *old, *new),
            Event(EventKind.RENAMED, others[0].ino, others[0].is_directory, *new, *old),
        )
    replaced = others[0].ino if others else HostInode(0)
    if replaced == moved.ino:
        return ()  # two names of one file: such a rename does nothing
    return (Event(EventKind.RENAMED, moved.ino, moved.is_directory, *old, *new, replaced),)


def _kinds_of_setattr(valid: int) -> tuple[EventKind, ...]:
    """See `fsnotify_change` in the kernel: a change of the access time alone is a kind of reading."""
    attributes = valid & (SetattrValid.MODE | SetattrValid.UID | SetattrValid.GID) or valid & _BOTH_TIMES == _BOTH_TIMES
    modified = valid & SetattrValid.SIZE or valid & _BOTH_TIMES == SetattrValid.MTIME
    return (EventKind.MODIFIED,) * bool(modified) + (EventKind.ATTRIBUTES,) * bool(attributes)
