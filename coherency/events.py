"""What happened in the share, as it is told to guests whose programs watch files: pure, between daemon and agents.

An event is told after the change that it is about, when every cache that the change made wrong has been dealt with. Nothing
rests on it but what programs that watch are shown: it may come late, and may be lost when too many come at once.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from coherency.ids import HostInode


class EventKind(IntEnum):
    """What kind of change it was; see inotify(7) for what a program that watches makes of it."""

    CREATED = 1  # a name came into being: of a new inode, or a hard link
    REMOVED = 2
    RENAMED = 3
    MODIFIED = 4  # data, or size
    ATTRIBUTES = 5  # mode, owner, times, xattrs, link count


class Event(NamedTuple):
    """One change. Names are single components; ``b""`` with parent 0 where the change was made through a descriptor.

    ``ino``: what it happened to, 0 if that is not known. ``parent``, ``name``: the directory and the name there (of a rename: the
    old ones). ``new_parent``, ``new_name``, ``replaced``: of a rename only; the latter is what had the new name before, 0 if that
    was nothing, or is not known.
    """

    kind: EventKind
    ino: HostInode
    is_directory: bool
    parent: HostInode = HostInode(0)
    name: bytes = b""
    new_parent: HostInode = HostInode(0)
    new_name: bytes = b""
    replaced: HostInode = HostInode(0)
