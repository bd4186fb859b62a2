"""Whose threads make the requests of the export: for which guest each works, and whether it dies.

The guest is a hint: see `docs/decisions/0004-release-instead-of-origin.md`.

Rules:

1. A guest introduces the process that works for it by a look-up, in the root of the export, of a name made of its session.
   All threads of that process are that guest.
2. A guess may be wrong: thread ids are used again, and who knows a session may introduce itself.  Nothing rests on it.
3. Bounded: `_MAX_THREADS` threads are remembered, and as many processes as there are live sessions.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

_MAX_THREADS: Final = 4096


class OriginStatistics(NamedTuple):
    """Processes that were introduced, and threads that are remembered, whosever they are."""

    processes: int
    threads: int


class Origins:
    """Which thread works for which guest.  Thread-safe.

    `is_session` tells whether a session is one of a guest that is here.
    """

    def __init__(self, is_session: Callable[[int], bool], *, process_of: Callable[[int], int | None] | None = None) -> None:
        self._is_session = is_session
        self._process_of = process_of or process_of_thread
        self._lock = threading.Lock()
        self._processes: dict[int, int] = {}
        self._threads: dict[int, int | None] = {}

    def introduce(self, session: int, thread_id: int) -> bool:
        """Take the thread's process for that guest from now on.  False if there is no such guest."""
        if not self._is_session(session):
            return False
        process = self._process_of(thread_id)
        with self._lock:
            self._processes = {pid: each for pid, each in self._processes.items() if self._is_session(each)}
            self._threads.clear()
            if process is not None:
                self._processes[process] = session
        return True

    def session_of(self, thread_id: int) -> int | None:
        """The session of the guest for which the thread works, None if it is not known to be one's."""
        if not self._processes:
            return None
        try:
            return self._threads[thread_id]
        except KeyError:
            pass
        process = self._process_of(thread_id)
        with self._lock:
            if len(self._threads) >= _MAX_THREADS:
                self._threads.clear()
            session = self._threads[thread_id] = None if process is None else self._processes.get(process)
        return session


    def check(self) -> None:
        """Assert rule 3, as far as it can be seen from here."""
        with self._lock:
            assert len(self._threads) <= _MAX_THREADS, self.statistics()
            assert set(self._threads.values()) <= {*self._processes.values(), None}, self.statistics()

    def statistics(self) -> OriginStatistics:
        """A frozen copy."""
        return OriginStatistics(len(self._processes), len(self._threads))


def process_of_thread(thread_id: int) -> int | None:
    """The process of a thread of this machine; None if there is none, or it cannot be seen from here (0 in a request)."""
    process = _status_of(thread_id).get("Tgid")
    return None if process is None else int(process)


def is_dying(thread_id: int) -> bool:
    """Whether the thread has got a signal that ends it: the kernel lets it wait for its system call nevertheless."""
    status = _status_of(thread_id)
    if not status:
        return False
    pending, shared, blocked, ignored, caught = (
        int(status[field], 16) for field in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
    )
    return bool(pending & _bit(signal.SIGKILL) or (pending | shared) & ~(blocked | ignored | caught | _HARMLESS))


def _bit(number: signal.Signals) -> int:
    return 1 << number - 1


_HARMLESS: Final = sum(
    map(
        _bit,
        (
            signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
            signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
        ),
    )
)  # fmt: skip
"""What does not end a process that does not ask for these signals: signal(7)."""


def _status_of(thread_id: int) -> dict[str, str]:
    """See proc_pid_status(5); nothing if there is no such thread."""
    try:
        text = Path(f"/proc/{thread_id}/status").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {field: value.strip() for field, _, value in lines}
