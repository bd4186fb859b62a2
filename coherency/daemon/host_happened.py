"""What guests are told of that which somebody has done past the export: pure. ``happened`` is its counterpart for the export.

1. In directories that somebody was shown it is what can be seen from there; of what has no directory it is told if the inode
   itself was shown.
2. Of a number of links that has changed the kernel tells by an event without a name: before that of the name which was made or
   removed, which says as much; and after that of a rename, of what this has replaced. So the former is not told, and the latter
   is part of the rename, if that is told as one. An event of a directory itself is one of this kind if the directory is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from coherency.daemon.fanotify_events import ATTRIB, CREATE, DELETE, DELETE_SELF, MODIFY, ONDIR, RENAME, HostEvent
from coherency.events import Event, EventKind
from coherency.ids import HostInode

_KINDS: Final = (
    (CREATE, EventKind.CREATED),
    (MODIFY, EventKind.MODIFIED),
    (ATTRIB, EventKind.ATTRIBUTES),
    (DELETE, EventKind.REMOVED),
)


class Known(NamedTuple):
    """An event, and the inodes that it is about; ``parent`` and ``new_parent`` are 0 if nobody was shown them."""

    event: HostEvent
    target: HostInode
    parent: HostInode
    new_parent: HostInode
    shown: bool
    """Whether anybody was shown ``target``."""
    gone: bool = False
    """Of a directory whose attributes have changed: whether there is none any more."""


def may_go_on(happened: Sequence[Known]) -> bool:
    """Whether what the last one says may be told otherwise on account of the next, by rule 2."""
    return bool(happened) and (bool(happened[-1].event.mask & RENAME) or _is_of_links(happened[-1]))


def told_of(happened: Sequence[Known]) -> Iterator[Event]:
    """What is told of all that has been read, in its order."""
    for index, each in enumerate(happened):
        before = happened[index - 1] if index else None
        after = happened[index + 1] if index + 1 < len(happened) else None
        if _is_of_links(each) and ((after and _says_it(after, each)) or (before and _has_replaced(before, each))):
            continue
        yield from _told_of(each, after.target if after and _has_replaced(each, after) else HostInode(0))


def _is_of_links(known: Known) -> bool:
    mask = known.event.mask
    return bool(mask & ATTRIB) and known.event.directory is None and (known.gone or not mask & ONDIR)


def _says_it(named: Known, links: Known) -> bool:
    return bool(named.event.mask & (CREATE | DELETE)) and named.target == links.target


def _has_replaced(renamed: Known, links: Known) -> bool:
    return (
        bool(renamed.event.mask & RENAME and renamed.parent and renamed.new_parent)
        and renamed.event.mask & ONDIR == links.event.mask & ONDIR
        and _is_of_links(links)
        and renamed.event.pid == links.event.pid
        and renamed.target != links.target
    )


def _told_of(known: Known, replaced: HostInode) -> Iterator[Event]:
    event, target, parent, new_parent, shown, _ = known
    is_directory = bool(event.mask & ONDIR)
    if event.mask & RENAME:
        if parent and new_parent:
            yield Event(EventKind.RENAMED, target, is_directory, parent, event.name, new_parent, event.new_name, replaced)
        elif parent:
            yield Event(EventKind.REMOVED, target, is_directory, parent, event.name)
        elif new_parent:
            yield Event(EventKind.CREATED, target, is_directory, new_parent, event.new_name)
    elif parent or (event.directory is None and shown and not event.mask & DELETE_SELF):
        for bit, kind in _KINDS:
            if event.mask & bit:
                yield Event(kind, target, is_directory, parent, event.name)
