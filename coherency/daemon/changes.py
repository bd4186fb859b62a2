"""A change of metadata: begin, revoke, apply, end.

1. The words of every inode that a change touches are odd from before the system call until after it. Whoever samples
   in between caches nothing.
2. When the words are odd, and before the system call, guests are told to forget what the change makes wrong, and it is
   waited for (``recalls``). In any other order an answer could be old: ``docs/model/``.
3. An inode that the change brings into being is touched after the system call, and before anybody can look it up: the
   kernel of the export holds the parent's lock until the reply. What an agent remembers of a former inode with the
   same number is of no use from then on. Nobody is told of it: no kernel can have anything of it.
4. A change that fails is ended like any other; words only grow.
5. While changes are held nothing is begun (``holds``). A caller on the export that is interrupted meanwhile, or is killed
   while guests are waited for, gets EINTR, and nothing is applied.

6. A change that somebody has made past the export is noticed when it is made. Then the words move first, and guests are
   told after that; nobody is waited for, and nothing is odd in between. What is fetched from then on is of the new state,
   and what was granted before was registered before, so whoever may hold the old state is told (``docs/concurrency.md``).

Named points, for tests that stop a change there: ``begun`` (words are odd, nothing applied), ``recalled`` (guests have
forgotten, nothing applied) and ``applied`` (not ended); of one made past the export, ``touched`` (nobody is told yet).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from coherency.daemon.holds import Hold
from coherency.fuse.codec import Request
from coherency.ids import GrantKey, HostInode, SlotIndex
from coherency.leases import keys_of
from coherency.shm_table import TableWriter


def _pass(point: str) -> None:
    """No test is watching."""


class Revoker(Protocol):
    """Makes guests forget."""

    def revoke(self, keys: Iterable[GrantKey], request: Request | None) -> None:
        """Returns when they have, as far as they are waited for. ``InterruptedError`` if the caller gives up."""

    def announce(self, keys: Collection[GrantKey] | None) -> None:
        """Tells them that what the keys (None: all) stand for has changed, and waits for nobody."""


class Changes:
    """All changes of one share. Thread-safe; changes of different inodes do not wait for each other, nor do changes of one."""

    def __init__(
        self,
        table: TableWriter,
        *,
        recalls: Revoker | None = None,
        hold: Hold | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        reach: Callable[[str], None] = _pass,
        bumps: bool = True,
    ) -> None:
        """``recalls``: None if no guest is ever told; not ``bumps``: no word ever moves: for demonstrations and negative
        controls. ``reach``: see named points.
        """
        self.table, self.recalls, self.reach, self.bumps = table, recalls, reach, bumps
        self._clock_ns, self._hold = clock_ns, hold

    def change(
        self, inodes: tuple[HostInode, ...], request: Request | None = None, *, leaving: tuple[HostInode, ...] = ()
    ) -> Change:
        """``with changes.change(inodes, request) as change``: apply it inside, nothing else.

        ``leaving``: those of the inodes that names lead to which it takes away.
        """
        return Change(self, inodes, request, leaving)

    def made_elsewhere(self, inodes: Iterable[HostInode], leaving: Iterable[HostInode] = ()) -> None:
        """Rule 6: somebody has changed these inodes, and may have taken names away that lead to those of ``leaving``.

        ``leaving`` is not looked at before the words have moved.
        """
        slots = self.table.slots_of(inodes)
        if self.bumps:
            self.table.begin(slots)
            self.table.end(slots)
        self.reach("touched")
        if self.recalls is not None:
            self.recalls.announce(keys_of(slots, self.table.slots_of(leaving)))

    def made_anywhere(self) -> None:
        """Rule 6, if nobody knows what was changed."""
        if self.bumps:
            self.table.advance_epoch()
        self.reach("touched")
        if self.recalls is not None:
            self.recalls.announce(None)

    def wait_until_allowed(self, request: Request | None) -> None:
        """Rule 5. ``InterruptedError`` if the caller gives up."""
        if self._hold is not None:
            self._hold.wait(request, self._clock_ns)
            self._hold = None


class Change:
    """One change under way; see :meth:`Changes.change`."""

    __slots__ = ("_changes", "_inodes", "_leaving", "_request", "_slots", "_touched")

    def __init__(
        self, changes: Changes, inodes: tuple[HostInode, ...], request: Request | None, leaving: tuple[HostInode, ...]
    ) -> None:
        self._changes, self._inodes, self._request, self._leaving = changes, inodes, request, leaving
        self._slots: tuple[SlotIndex, ...] = ()
        self._touched: list[tuple[SlotIndex, ...]] = []

    def __enter__(self) -> Change:
        changes = self._changes
        changes.wait_until_allowed(self._request)
        slots = changes.table.slots_of(self._inodes)
        if changes.bumps:
            changes.table.begin(slots)
            self._slots = slots
        try:
            changes.reach("begun")
            if changes.recalls is not None:
                keys = keys_of(slots, changes.table.slots_of(self._leaving))
                changes.recalls.revoke(keys, self._request)
            changes.reach("recalled")
        except BaseException:
            self._end()
            raise
        return self

    def touch(self, ino: HostInode) -> None:
        """The system call made, or reached, this inode too (rule 3)."""
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
