"""Changes that somebody makes directly in the share, past the export: the kernel tells of them afterwards (fanotify).

1. What was read at once is one batch: the words of all inodes that it is about move, then what guests' kernels hold of
   them is recalled (``Changes.made_elsewhere``). Nobody is waited for, since the change is made already.
2. The daemon's own events are skipped: whatever goes through the export has been a change of the table already. When
   nothing else has come, the next look is a moment later: to wake up for each write of a guest would cost as much as the write.
3. Only inodes that were shown matter (``shown``): the file system may be large, and the share a small part of it.
4. A name may have been taken away from what is removed or renamed, and from a file that changes without a name being told: so
   the kernel tells of what a rename has replaced. So it does of a directory, but also of any other change of that; hence it is
   looked whether it is gone. A new owner takes names away, too (``export``). Which attribute has changed is not told, so the
   owner is compared with all that guests were told. Both when the words have moved.
5. What cannot be known is taken for a change of everything: events that did not fit into the queue, inodes that nobody can
   tell the number of, mounts that come and go below the share, and the end of this thread by a fault.
6. Programs in guests hear of a change when the caches are right: after the batch. If that ends where the kernel may be about to
   say more of the same change, they hear of it after a moment, and of what has come by then. Guests are told that they miss
   events if there are some of which nothing is known.
7. Whoever must know what had happened before (``catch_up``) deals with it himself, one at a time with the thread.

Named points, for tests: ``read`` (the kernel has told, nothing is looked at yet) and ``sorted`` (it is known what is
concerned, nothing is done yet).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from coherency.daemon.changes import Changes
from coherency.daemon.fanotify_events import (
    ATTRIB,
    CREATE,
    DELETE,
    DELETE_SELF,
    ONDIR,
    Q_OVERFLOW,
    RENAME,
    HostEvent,
    events_of_others,
)
from coherency.daemon.host_happened import Known, may_go_on, told_of
from coherency.daemon.owners import Owner, Owners
from coherency.daemon.shown import Shown
from coherency.daemon.watched import Watched
from coherency.events import Event
from coherency.fuse import syscalls
from coherency.ids import HostInode

log = logging.getLogger(__name__)

_OWN_PAUSE_S: Final = 0.002
_MOMENT_NS: Final = 5_000_000
"""Between two events of one change; longer only if whoever makes it is not let go on."""
_CATCH_UP_S: Final = 1.0
"""However much happens meanwhile."""
_OF_NAMES: Final = CREATE | DELETE | RENAME
_NOBODY: Final = HostInode(0)


class WatchStatistics(NamedTuple):
    """Counters since the start."""

    events: int
    """Of others, relevant or not."""
    overflows: int
    unknown: int
    """Events about inodes whose numbers nobody could tell."""


class _Unknown(Exception):
    """Nobody can tell which inode it is."""


class _Batch:
    """What one read was about."""

    def __init__(self) -> None:
        self.inodes: set[HostInode] = set()
        self.leaving: set[HostInode] = set()
        self.doubtful: dict[HostInode, HostEvent] = {}
        """What may have a new owner, or be gone."""
        self.everything = False
        self.happened: list[Known] = []
        """In its order, if somebody wants to be told."""


def _pass(point: str) -> None:
    """No test is watching."""


class Watcher:
    """Reads what happens on the file systems of a share, from ``start`` to ``close``."""

    def __init__(
        self,
        watched: Watched,
        changes: Changes,
        *,
        shown: Shown,
        owners: Owners,
        number_on: Callable[[int, int], HostInode | None],
        tell: Callable[[Sequence[Event], int], None] | None = None,
        wanted: Callable[[], bool] = lambda: True,
        reach: Callable[[str], None] = _pass,
    ) -> None:
        """``watched`` stays the caller's, and is closed after this. ``number_on``: see ``NodeStore.number_if_met``. ``tell`` is
        called by rule 6, if ``wanted()``, from the watcher's thread, with events and how many are missing at least; it must
        neither wait nor raise. ``reach``: see named points.
        """
        self._watched, self._changes, self._shown, self._number_on = watched, changes, shown, number_on
        self._owners = owners
        self._tell, self._wanted, self.reach = tell, wanted, reach
        self._own_pid = os.getpid()
        self._events = self._overflows = self._unknown = 0
        self.failed = False
        self._closing = False
        self._dealing = threading.Lock()  # rule 7
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """What has happened since ``watched`` was made is dealt with, and whatever happens from now on."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Also if it was never started."""
        self._closing = True
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._wakeup)

    def statistics(self) -> WatchStatistics:
        """A snapshot; the counters have one writer."""
        return WatchStatistics(self._events, self._overflows, self._unknown)

    def unwatched(self) -> dict[str, str]:
        """The mounts below the share that cannot be watched, and why."""
        return self._watched.unwatched

    def catch_up(self) -> None:
        """When this returns the words have moved for all that had happened before, and recalls are under way. From any thread.

        It gives up after a second: then more happens than can be dealt with.
        """
        deadline_ns = time.monotonic_ns() + int(_CATCH_UP_S * 1e9)
        if not self._dealing.acquire(timeout=_CATCH_UP_S):
            return
        try:
            with self._or_failed():
                while not self.failed and syscalls.wait_readable([self._watched.group.fd], 0) and time.monotonic_ns() < deadline_ns:
                    self._deal()
        finally:
            self._dealing.release()

    @contextlib.contextmanager
    def _or_failed(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # whatever it was, nothing that is cached may be believed
            self.failed = True
            log.critical("changes made directly in the share are not seen any more", exc_info=True)
            self._changes.made_anywhere()

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._or_failed(), open("/proc/self/mountinfo", "rb") as mountinfo:
            self._wait_and_deal(mountinfo.fileno())

    def _wait_and_deal(self, mountinfo: int) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        poll.register(self._watched.group.fd, select.POLLIN)
        poll.register(mountinfo, select.POLLPRI)  # is told as an error, too: proc_pid_mountinfo(5)
        self._look()  # at what was mounted before this descriptor was opened
        while not self._closing and not self.failed:
            happened = {fd for fd, _ in poll.poll()}
            if mountinfo in happened:
                self._look()
            if self._watched.group.fd in happened and not self.read_and_deal():
                time.sleep(_OWN_PAUSE_S)

    def _look(self) -> None:
        if self._watched.look():
            self._changes.made_anywhere()  # rule 5, after the mark

    def read_and_deal(self) -> bool:
        """Deal with what has happened, as far as a read tells it; returns whether somebody else has done anything.

        For the thread; in tests also without ``start``.
        """
        with self._dealing:
            return self._deal()

    def _deal(self) -> bool:
        before, missing = self._events, self._overflows + self._unknown
        telling = self._tell is not None and self._wanted()
        happened = self._read_and_deal(telling)
        if may_go_on(happened) and syscalls.wait_readable([self._watched.group.fd], _MOMENT_NS):
            happened += self._read_and_deal(telling)
        missing = self._overflows + self._unknown - missing
        if self._tell is not None and telling and (happened or missing):
            self._tell(list(told_of(happened)), missing)
        return self._events > before

    def _read_and_deal(self, telling: bool) -> list[Known]:
        """One batch; returns what is to be told of it."""
        buffer = self._watched.group.read()
        self.reach("read")
        batch = _Batch()
        for event in events_of_others(buffer, self._own_pid):
            self._events += 1
            if event.mask & Q_OVERFLOW:
                self._overflows += 1
                batch.everything = True
                continue
            try:
                self._sort(event, batch, telling)
            except _Unknown:
                self._unknown += 1
                batch.everything = True
        self.reach("sorted")
        if batch.everything:
            self._changes.made_anywhere()
        elif batch.inodes:
            self._changes.made_elsewhere(batch.inodes, self._leaving(batch))
        return batch.happened

    def _sort(self, event: HostEvent, batch: _Batch, telling: bool) -> None:
        mask, fsid = event.mask, event.fsid
        target = self._find(fsid, event.target)
        nameless = bool(mask & ATTRIB) and event.directory is None
        if target in self._shown:
            batch.inodes.add(target)
            if mask & (DELETE | DELETE_SELF | RENAME) or (nameless and not mask & ONDIR):  # rule 4
                batch.leaving.add(target)
            elif mask & ATTRIB:
                batch.doubtful[target] = event
        if not (mask & _OF_NAMES or telling):
            return
        parent = self._shown_directory(fsid, event.directory)
        new_parent = self._shown_directory(fsid, event.new_directory)
        if mask & _OF_NAMES:
            batch.inodes.update(each for each in (parent, new_parent) if each is not _NOBODY)
        if telling:
            shown = target in self._shown
            gone = shown and nameless and bool(mask & ONDIR) and self._owner(event) is None
            batch.happened.append(Known(event, target, parent, new_parent, shown, gone))

    def _leaving(self, batch: _Batch) -> Iterator[HostInode]:
        """Rule 4; to be asked for when the words have moved."""
        yield from batch.leaving
        for ino, event in batch.doubtful.items():
            owner = self._owner(event)
            if owner is None or self._owners.another_was_told(ino, owner):
                yield ino

    def _owner(self, event: HostEvent) -> Owner | None:
        return None if event.target is None else self._watched.owner(event.fsid, event.target)

    def _shown_directory(self, fsid: int, handle: bytes | None) -> HostInode:
        if handle is None:
            return _NOBODY
        found = self._find(fsid, handle)
        return found if found in self._shown else _NOBODY

    def _find(self, fsid: int, handle: bytes | None) -> HostInode:
        found = None if handle is None else self._watched.identity(fsid, handle)
        if found is None:
            raise _Unknown
        return self._number_on(*found) or _NOBODY
