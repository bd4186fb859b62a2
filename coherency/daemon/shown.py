"""Which inodes the export has ever shown to anybody: only what was shown can be cached, so nothing else needs a bump.

Rules:

1. Exact: no number is forgotten, and none is in the set that was not shown. Beyond ``max_blocks`` blocks of numbers every
   number counts as shown: more bumps than needed, never one too few.
2. An inode is marked before what is told of it is fetched: its attributes, and the name that leads to it. Whoever watches
   looks into the set *after* a change; so either it finds the number, or the fetch comes after the change.
3. Who finds a number marked does not know yet that it was before his fetch: another thread may have marked it in between.
   ``was_shown`` tells.
4. Looking needs no lock.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from coherency.ids import HostInode

_BLOCK_BITS: Final = 8
_IN_BLOCK: Final = (1 << _BLOCK_BITS) - 1
_RECENT: Final = 256
"""Marks that are remembered one by one. Who was overtaken by more fetches again."""
MAX_BLOCKS: Final = 1 << 19
"""About 90 MB, and at least as many inodes; a hundred million where numbers lie close together."""


class Shown:
    """A set of inode numbers that only grows. Thread-safe."""

    def __init__(self, *, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._blocks: dict[int, int] = {}
        self._everything_since: int | None = None
        self._lock = threading.Lock()
        self._recent: deque[HostInode] = deque(maxlen=_RECENT)
        self._begun = 0
        self.marks = 0
        """How many numbers are marked: what ``was_shown`` takes for an instant. ``_begun`` counts also one that is being marked."""

    def __contains__(self, ino: HostInode) -> bool:
        marked = self._blocks.get(ino >> _BLOCK_BITS, 0) >> (ino & _IN_BLOCK) & 1
        return bool(marked) or self._everything_since is not None

    def mark(self, ino: HostInode) -> None:
        """Somebody is about to be shown this inode."""
        self.was_shown(ino, self.marks)

    def was_shown(self, ino: HostInode, since: int) -> bool:
        """Whether it was marked when ``marks`` was ``since``; it is from now on."""
        if ino in self and self._begun == since:  # in this order: pairs with the stores below
            return True
        with self._lock:
            if self._everything_since is not None:
                return since >= self._everything_since
            if ino in self:
                overtaken = self.marks - since
                return overtaken <= _RECENT and ino not in list(self._recent)[len(self._recent) - overtaken :]
            self._begun += 1  # before the bit: who finds that sees that there is a new one
            self._recent.append(ino)
            block = ino >> _BLOCK_BITS
            if block in self._blocks or len(self._blocks) < self._max_blocks:
                self._blocks[block] = self._blocks.get(block, 0) | 1 << (ino & _IN_BLOCK)
            else:
                self._everything_since = self._begun
            self.marks = self._begun  # after the bit: who has read this has begun when it could be found
            return False

    def check(self) -> None:
        """The invariants; raises AssertionError."""
        with self._lock:
            assert len(self._blocks) <= self._max_blocks, "more blocks than allowed"
            marked = sum(block.bit_count() for block in self._blocks.values())
            assert marked + (self._everything_since is not None) == self.marks == self._begun, (marked, self.marks)
