"""What a name stands for, what a call tells of it, and whether the two agree.

A call seldom tells everything: ``exists`` tells that the name leads somewhere, a listing only that it is there. Each is a
:class:`Look`, and :func:`agrees` says what may have been there for somebody who saw that.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Final, NamedTuple


class Entry(NamedTuple):
    """What a name stands for; None in its place: there is no such name."""

    mode: int  # type and permissions, as in st_mode
    ino: int | None = None  # None: nobody knows, since its maker was told an error
    target: str | None = None  # of a symlink; it leads nowhere
    inside: int | None = None  # of a directory that moves with what is in it: that file's inode number

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


# There is something, and nobody knows what.
UNKNOWN: Final = Entry(-1)


class Look(NamedTuple):
    """What a call told of a name."""

    kind: str
    ino: int | None = None
    mode: int | None = None  # None: not told, or not fixed
    target: str | None = None


MISSING: Final = Look("missing")  # no such name
PRESENT: Final = Look("present")  # there is one
NOWHERE: Final = Look("nowhere")  # no such name, or a symlink: those of the simulator dangle
SOMEWHERE: Final = Look("somewhere")  # a name that is no symlink
NO_LINK: Final = Look("no link")  # likewise, told by readlink


def entry_look(ino: int, mode: int | None) -> Look:
    """By ``lstat``."""
    return Look("entry", ino, mode)


def followed_look(ino: int, mode: int | None) -> Look:
    """By ``stat``."""
    return Look("followed", ino, mode)


def target_look(target: str) -> Look:
    """By ``readlink``."""
    return Look("target", target=target)


def _same(look: Look, entry: Entry) -> bool:
    return entry.ino in (None, look.ino) and look.mode in (None, entry.mode)


_AGREES: Final[dict[str, Callable[[Look, Entry | None], bool]]] = {
    "missing": lambda look, entry: entry is None,
    "present": lambda look, entry: entry is not None,
    "entry": lambda look, entry: entry is not None and _same(look, entry),
    "nowhere": lambda look, entry: entry is None or entry.is_link,
    "somewhere": lambda look, entry: entry is not None and not entry.is_link,
    "followed": lambda look, entry: entry is not None and not entry.is_link and _same(look, entry),
    "no link": lambda look, entry: entry is not None and not entry.is_link,
    "target": lambda look, entry: entry is not None and entry.target == look.target,
}


def agrees(look: Look, entry: Entry | None) -> bool:
    """Whether who saw this may have looked at that."""
    return look != MISSING if entry is UNKNOWN else _AGREES[look.kind](look, entry)
