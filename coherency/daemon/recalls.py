"""What a change does before it is applied: it recalls what its inodes and names have in the kernels of guests.

Rules:

1. `revoke` is called when the words are odd.  When it returns, no kernel of a strict guest has anything of the keys, and
   nothing can be granted of them before the words are even; prompt guests have been told.
2. What nobody holds costs no lock and no system call, and sends nothing.
3. The thread that makes the change sends the recalls itself.  It waits for acks and for nothing else: not for a peer to
   read, not for the control server's loop.  A guest that does not ack is waited for until its lease is over.
4. A wait ends early if whoever asked for the change is killed meanwhile, or if the daemon gives up its waits because it is
   told to end at once.  The change is not made then.  Another signal does not end it: programs do not expect EINTR of
   calls that change files.
5. `announce` is for a change that is made already.  It tells whom `revoke` would tell, and leaves the rest to them: who owes
   the ack is waited for by later changes of the same keys.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Final, NamedTuple, Protocol

from coherency.daemon.ledger import Round
from coherency.daemon.origins import is_dying
from coherency.daemon.server import ControlServer
from coherency.fuse.codec import Request
from coherency.ids import GrantKey
from coherency.leases import MAX_KEYS_PER_MESSAGE

_SECOND_NS: Final = 1_000_000_000
_LOOK_AGAIN_NS: Final = 20_000_000


def _nobody_waits() -> None:
    """What a round wakes when everybody has acked."""


class RecallStatistics(NamedTuple):
    """Changes that wait for acks now, that have waited, and for how long: all together, and the longest."""

    waiting: int
    waits: int
    waited_ns: int
    longest_wait_ns: int


class Originator(Protocol):
    """Tells which guest a thread works for."""

    def session_of(self, thread_id: int) -> int | None:
        """The session; None if it is not known to be a guest."""


class Recalls:
    """The recalls of all changes of one share.  Thread-safe."""

    def __init__(
        self, server: ControlServer, origins: Originator, *, is_dying: Callable[[int], bool] = is_dying
    ) -> None:
        """`is_dying` tells of a thread that was interrupted whether it is killed."""
        self._server = server
        self._origins = origins
        self._is_dying = is_dying
        self._lock = threading.Lock()
        self._waiting: set[threading.Event] = set()
        self._given_up = False
        self._waits = self._waited_ns = self._longest_wait_ns = 0

    def revoke(self, keys: Iterable[GrantKey], request: Request | None) -> None:
        """Rule 1.  `InterruptedError` by rule 4: nobody may make the change."""
        if self._server.is_held(keys):
            origin = None if request is None else self._origins.session_of(request.pid)
            over = threading.Event()
            round_ = self._server.recall(keys, over.set, origin=origin)
            if round_.pending:
                self._wait(round_, over, request)

    def announce(self, keys: Collection[GrantKey] | None) -> None:
        """Rule 5.  `keys`: None for all, which is also what more keys than a message may name become."""
        if keys is not None and len(keys) > MAX_KEYS_PER_MESSAGE:
            keys = None
        if keys is None or self._server.is_held(keys):
            self._server.abandon(self._server.recall(keys, _nobody_waits))

    def give_up(self) -> None:
        """End all waits, also those that would begin later."""
        with self._lock:
            self._given_up = True
            for event in self._waiting:
                event.set()

    def _wait(self, round_: Round, over: threading.Event, request: Request | None) -> None:
        began_ns = time.monotonic_ns()
        with self._lock:
            self._waiting.add(over)
        try:
            if request is not None:
                request.on_interrupt = over.set
            while round_.pending:
                interrupted = request is not None and request.interrupted
                if self._given_up or (interrupted and request is not None and self._is_dying(request.pid)):
                    self._server.abandon(round_)
                    raise InterruptedError(errno.EINTR, "killed while guests are told")
                # The kernel tells of the first signal only, so from then on it is looked whether another one kills.
                patience_ns = _LOOK_AGAIN_NS if interrupted else max(_LOOK_AGAIN_NS, round_.until_ns - time.monotonic_ns())
                over.wait(patience_ns / _SECOND_NS)
                over.clear()
                if time.monotonic_ns() >= round_.until_ns:
                    self._server.evict_due()
        finally:
            waited_ns = time.monotonic_ns() - began_ns
            with self._lock:
                self._waiting.discard(over)
                self._waits += 1
                self._waited_ns += waited_ns
                self._longest_wait_ns = max(self._longest_wait_ns, waited_ns)

    def statistics(self) -> RecallStatistics:
        """A frozen copy."""
        with self._lock:
            return RecallStatistics(len(self._waiting), self._waits, self._waited_ns, self._longest_wait_ns)

    def check(self) -> None:
        """Assert that the counters agree."""
        waiting, waits, waited_ns, longest_ns = self.statistics()
        assert waiting >= 0 <= longest_ns <= waited_ns <= waits * longest_ns, self.statistics()
