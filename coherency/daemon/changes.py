"""A change of metadata: begin, apply, end.

1. The words of every inode that a change touches are odd from before the system call until after it. Whoever samples
   in between caches nothing.
2. An inode that the change brings into being is touched after the system call, and before anybody can look it up: the
   kernel of the export holds the parent's lock until the reply. What an agent remembers of a former inode with the
   same number is of no use from then on.
3. A change that fails is ended like any other; words only grow.
4. Until ``hold_until_ns`` nothing is changed: a predecessor was killed, and agents that have not noticed yet may trust
   its table for so long (``docs/spec/table.md``, trust). A caller on the export that is interrupted while waiting gets EINTR.

Named points, for tests that stop a change there: ``begun`` (words are odd, nothing applied) and ``applied`` (not ended).
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Final

from coherency.fuse.codec import Request
from coherency.ids import HostInode, SlotIndex
from coherency.shm_table import TableWriter

_SECOND_NS: Final = 1_000_000_000


def _pass(point: str) -> None:
    """No test is watching."""


class Changes:
    """All changes of one share. Thread-safe; changes of different inodes do not wait for each other, nor do changes of one."""

    def __init__(
        self,
        table: TableWriter,
        *,
        hold_until_ns: int = 0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        reach: Callable[[str], None] = _pass,
        live_dangerously: bool = False,
    ) -> None:
        """``live_dangerously``: no word is ever bumped, for demonstrations and negative controls. ``reach``: see named points."""
        self.table, self.reach = table, reach
        self._clock_ns, self._hold_until_ns = clock_ns, hold_until_ns
        self.bumps = not live_dangerously

    def change(self, inodes: tuple[HostInode, ...], request: Request | None = None) -> Change:
        """``with changes.change(inodes, request) as change``: apply it inside, nothing else."""
        return Change(self, inodes, request)

    def wait_until_allowed(self, request: Request | None) -> None:
        """Rule 4. ``InterruptedError`` if the caller gives up."""
        if not self._hold_until_ns:
            return
        given_up = threading.Event()
        if request is not None:
            request.on_interrupt = given_up.set
            if request.interrupted:
                given_up.set()
        while (left_ns := self._hold_until_ns - self._clock_ns()) > 0:
            if given_up.wait(left_ns / _SECOND_NS):
                raise InterruptedError(errno.EINTR, "interrupted while changes are held")
        self._hold_until_ns = 0


class Change:
    """One change under way; see :meth:`Changes.change`."""

    __slots__ = ("_changes", "_inodes", "_request", "_slots", "_touched")

    def __init__(self, changes: Changes, inodes: tuple[HostInode, ...], request: Request | None) -> None:
        self._changes, self._inodes, self._request = changes, inodes, request
        self._slots: tuple[SlotIndex, ...] = ()
        self._touched: list[tuple[SlotIndex, ...]] = []

    def __enter__(self) -> Change:
        changes = self._changes
        changes.wait_until_allowed(self._request)
        if changes.bumps:
            self._slots = changes.table.slots_of(self._inodes)
            changes.table.begin(self._slots)
        try:
            changes.reach("begun")
        except BaseException:
            self._end()
            raise
        return self

    def touch(self, ino: HostInode) -> None:
        """The system call made, or reached, this inode too (rule 2)."""
        if self._changes.bumps:
            slots = self._changes.table.slots_of((ino,))
            self._changes.table.begin(slots)
            self._touched.append(slots)

    def __exit__(self, *exc: object) -> None:
        try:
            self._changes.reach("applied")
        finally:
            self._end()

    def _end(self) -> None:
        if self._changes.bumps:
            self._changes.table.end(self._slots)
            for slots in self._touched:
                self._changes.table.end(slots)
