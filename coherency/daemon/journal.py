"""The sessions whose guests may have something in their kernels, written down for the next daemon.

Rules:

1. The file is replaced as a whole, so that whoever reads it finds all of one state.  It need not survive the machine.
2. It holds the sessions of this daemon and those of its predecessors that are not over, each with its guest's user and
   the lease that was promised: the daemon that reads it counts that from its own start.
3. There is no file while there are no sessions.
4. What cannot be read is taken for a session that nobody will account for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from coherency.daemon.holds import Hold
from coherency.leases import LONGEST_LEASE_NS

_log = logging.getLogger(__name__)

_HEAD: Final = "coherency sessions 1"
_NEW: Final = ".new"
_MODE: Final = 0o600
_UNREADABLE: Final = 0
"""What stands for a session that no guest can name."""


class Entry(NamedTuple):
    """A session: the user of its guest, and for how long a daemon that finds it must wait for it."""

    uid: int
    lease_ns: int


class JournalStatistics(NamedTuple):
    """Sessions of this daemon, and those of its predecessors that are not over, as far as was looked."""

    own: int
    former: int


class SessionJournal:
    """The journal at `path`.  Thread-safe, but one process has it.

    `hold`: until when changes wait because of what predecessors have left.
    """

    def __init__(
        self, path: Path, *, lease_ns: int, held_until_ns: int = 0, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """`held_until_ns`: changes are held so long in any case, see `Hold`.  Raises `OSError`."""
        self._path = path
        self._new_path = path.with_name(path.name + _NEW)
        self._lease_ns = lease_ns
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._entries = _read(path)
        now_ns = clock_ns()
        self._former_until_ns = {session: now_ns + entry.lease_ns for session, entry in self._entries.items()}
        self.hold = Hold(held_until_ns, self._former_until_ns)

    def add(self, session: int, uid: int) -> None:
        """See `leasing.Journal`."""
        with self._lock:
            self._entries[session] = Entry(uid, self._lease_ns)
            try:
                self._write()
            except OSError:
                del self._entries[session]
                raise

    def discard(self, session: int) -> None:
        """See `leasing.Journal`."""
        with self._lock:
            if self._entries.pop(session, None) is None:
                return
            try:
                self._write()
            except OSError as error:
                _log.warning("the list of guests in %s could not be shortened: %s", self._path, error)

    def account(self, session: int, uid: int) -> None:
        """See `leasing.Journal`."""
        entry = self._entries.get(session)
        if entry is not None and entry.uid == uid and session in self._former_until_ns and session != _UNREADABLE:
            self.discard(session)
            self.hold.account(session)

    def check(self) -> None:
        """Assert that the file holds what it should, unless writing it has failed."""
        with self._lock:
            now_ns = self._clock_ns()
            written = _read(self._path)
            assert written.items() <= self._entries.items(), written
            assert all(self._former_until_ns.get(each, 0) <= now_ns for each in self._entries.keys() - written.keys()), written

    def statistics(self) -> JournalStatistics:
        """A frozen copy."""
        with self._lock:
            former = len(self._entries.keys() & self._former_until_ns.keys())
            return JournalStatistics(len(self._entries) - former, former)

    def _write(self) -> None:
        now_ns = self._clock_ns()
        for session in [each for each, until_ns in self._former_until_ns.items() if until_ns <= now_ns]:
            self._entries.pop(session, None)
        if not self._entries:
            self._path.unlink(missing_ok=True)
            return
        lines = [_HEAD]
        lines += [f"{session:016x} {entry.uid} {entry.lease_ns}" for session, entry in self._entries.items()]
        with open(os.open(self._new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE), "w") as file:
            file.write("\n".join([*lines, ""]))
        self._new_path.rename(self._path)


def remove_journal(path: Path) -> None:
    """Nothing in it matters any more."""
    for each in (path, path.with_name(path.name + _NEW)):
        each.unlink(missing_ok=True)


def _read(path: Path) -> dict[int, Entry]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        text = ""
    try:
        head, *lines = text.splitlines()
        if head != _HEAD:
            raise ValueError(head)
        entries = {}
        for line in lines:
            session, uid, lease_ns = line.split()
            entries[int(session, 16)] = Entry(int(uid), int(lease_ns))
    except ValueError:
        _log.warning("%s is no list of guests: changes are held as long as any lease may last", path)
        return {_UNREADABLE: Entry(0, LONGEST_LEASE_NS)}
    return entries
