"""As whose the export has shown inodes: a new owner matters to who was told of another one. Pure.

Rules:

1. Exact up to its bounds. Beyond ``MAX_OWNERS`` owners, and beyond those of ``Shown``, everything counts as told of another:
   more names recalled than needed, never one too few.
2. What is told is noted before the reply that tells it. Who compares, after the words of an inode have moved, therefore finds
   every owner that a kernel can have been granted under the former words.
"""

from __future__ import annotations

import threading
from typing import Final

from coherency.daemon.shown import Shown
from coherency.ids import HostInode

Owner = tuple[int, int]
"""User and group."""
MAX_OWNERS: Final = 64
"""Each costs who compares a look."""
_NUMBER_BITS: Final = 64


class Owners:
    """Which owners were ever told of which inode. Thread-safe."""

    def __init__(self, *, max_owners: int = MAX_OWNERS) -> None:
        self._max_owners = max_owners
        self._places: dict[Owner, int] = {}
        self._too_many = False
        self._told = Shown()
        self._lock = threading.Lock()

    def tell(self, ino: HostInode, owner: Owner) -> None:
        """Somebody is about to be told that the inode belongs to ``owner``."""
        place = self._places.get(owner)
        if place is None:
            with self._lock:
                if len(self._places) >= self._max_owners:
                    self._too_many = True
                    return
                place = self._places.setdefault(owner, len(self._places))
        if (number := _number(place, ino)) not in self._told:
            self._told.mark(number)

    def another_was_told(self, ino: HostInode, owner: Owner) -> bool:
        """Whether anybody may have been told that the inode belongs to somebody else than ``owner``."""
        return self._too_many or any(
            _number(place, ino) in self._told for told, place in list(self._places.items()) if told != owner
        )


def _number(place: int, ino: HostInode) -> HostInode:
    """Inodes of several owners in one set: above the number stands whose it is."""
    return HostInode(place << _NUMBER_BITS | ino)
