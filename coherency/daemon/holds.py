"""Changes are held while guests may believe what a killed predecessor has told them.

Rules:

1. The predecessor's table is trusted for a while by who has not noticed: until then nothing is changed, in any case.
2. Kernels may have what was granted under the predecessor's leases.  Nothing is changed until each session in its journal
   is over: its guest has said hello again and named it, or its lease has ended.
3. A hold only becomes shorter.  When it is over it stays over.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from coherency.fuse.codec import Request

_SECOND_NS: Final = 1_000_000_000


class HoldStatistics(NamedTuple):
    """How long it may still take, and how many former guests are waited for."""

    left_ns: int
    guests: int


class Hold:
    """Until when changes are held.  Thread-safe.  All times are of the clock that is handed to the methods."""

    def __init__(self, until_ns: int = 0, sessions: Mapping[int, int] | None = None) -> None:
        """`until_ns`: by rule 1; `sessions`: by rule 2, until when each is waited for."""
        self._until_ns = until_ns
        self._sessions = dict(sessions or {})
        self._given_up = False
        self._changed = threading.Condition()

    def account(self, session: int) -> None:
        """This session is over."""
        with self._changed:
            if self._sessions.pop(session, None) is not None:
                self._changed.notify_all()

    def give_up(self) -> None:
        """Nobody waits any longer, but nothing may be changed either: the daemon ends."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def left_ns(self, now_ns: int) -> int:
        """How long it takes at most, 0 if it is over."""
        with self._changed:
            return self._left_ns(now_ns)

    def wait(self, request: Request | None, clock_ns: Callable[[], int]) -> None:
        """Until it is over.  `InterruptedError` if whoever asked for the change gives up, or the daemon ends."""
        with self._changed:
            if request is not None:
                request.on_interrupt = self._look_again
            while left_ns := self._left_ns(clock_ns()):
                if self._given_up or (request is not None and request.interrupted):
                    raise InterruptedError(errno.EINTR, "interrupted while changes are held")
                self._changed.wait(left_ns / _SECOND_NS)

    def _look_again(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _left_ns(self, now_ns: int) -> int:
        return max(0, max([self._until_ns, *self._sessions.values()]) - now_ns)

    def statistics(self, now_ns: int) -> HoldStatistics:
        """A frozen copy."""
        with self._changed:
            waited_for = sum(until_ns > now_ns for until_ns in self._sessions.values())
            return HoldStatistics(self._left_ns(now_ns), waited_for)
