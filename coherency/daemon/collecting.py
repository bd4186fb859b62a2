"""Collects the counters of all guests, in runs.  Pure: the switchboard's part that answers a StatusRequest.

Rules:

1. Nobody waits for a guest: a run ends after `statistics_ns` at the latest, with the last known counters of those guests
   that did not answer.
2. A guest is asked for its counters only when it owes no answer.  So a silent guest costs one unread frame.
3. Every answer to a StatusRequest is of a run that began after the request came.  There is one run at a time; who asks
   meanwhile waits for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coherency.daemon.peer_states import Peer, PeerId
from coherency.errors import MessageError
from coherency.protocol import Statistics, StatisticsRequest


@dataclass(slots=True)
class _Run:
    """One collection of statistics: who asked, and which guests have not answered yet."""

    serial: int
    deadline_ns: int
    askers: list[PeerId]
    waiting: set[PeerId] = field(default_factory=set)
    answered: set[PeerId] = field(default_factory=set)


class Collector:
    """`guests` are the switchboard's own, always of this moment.

    `ask` sends a request to a guest; `answer` is called with who asked and which guests answered, when a run is over.
    """

    def __init__(
        self,
        guests: Mapping[PeerId, Peer],
        *,
        statistics_ns: int,
        ask: Callable[[PeerId, StatisticsRequest], None],
        answer: Callable[[list[PeerId], set[PeerId], int], None],
    ) -> None:
        self._guests = guests
        self._statistics_ns = statistics_ns
        self._ask_guest = ask
        self._answer = answer
        self._run: _Run | None = None
        self._next_askers: list[PeerId] = []
        self.runs = 0

    @property
    def deadline_ns(self) -> int | None:
        """When `tick` must be called next at the latest."""
        return None if self._run is None else self._run.deadline_ns

    def request(self, asker: PeerId, now_ns: int) -> None:
        """Somebody wants a status."""
        self._next_askers.append(asker)
        self._start(now_ns)

    def counted(self, peer: Peer, statistics: Statistics, now_ns: int) -> None:
        """A guest has answered.  `MessageError` if it was not asked."""
        if statistics.serial != peer.owed_serial:
            raise MessageError("sent statistics that nobody asked for")
        peer.owed_serial = None
        assert peer.snapshot is not None
        peer.snapshot = peer.snapshot._replace(statistics=statistics)
        run = self._run
        if run is None or peer.peer_id not in run.waiting:
            return
        if statistics.serial == run.serial:
            run.answered.add(peer.peer_id)
            self._leave(peer.peer_id, now_ns)
        else:
            self._ask(peer, run.serial)

    def part(self, peer_id: PeerId, now_ns: int) -> None:
        """This peer neither waits for an answer nor gives one any more."""
        if peer_id in self._next_askers:
            self._next_askers.remove(peer_id)
        if self._run is not None:
            if peer_id in self._run.askers:
                self._run.askers.remove(peer_id)
            self._leave(peer_id, now_ns)

    def tick(self, now_ns: int) -> None:
        """End the run if its time is over."""
        if self._run is not None and self._run.deadline_ns <= now_ns:
            self._finish(now_ns)

    def end(self) -> None:
        """Forget everything."""
        self._run, self._next_askers = None, []

    def _start(self, now_ns: int) -> None:
        if self._run is not None or not self._next_askers:
            return
        self.runs += 1
        # 32 bits of it suffice: a serial only tells this run from the earlier one whose answer is still owed.
        serial, deadline_ns = self.runs & 0xFFFFFFFF, now_ns + self._statistics_ns
        self._run = _Run(serial, deadline_ns, self._next_askers, set(self._guests))
        self._next_askers = []
        for peer in self._guests.values():
            self._ask(peer, serial)
        self._finish_if_complete(now_ns)

    def _ask(self, peer: Peer, serial: int) -> None:
        if peer.owed_serial is None:
            peer.owed_serial = serial
            self._ask_guest(peer.peer_id, StatisticsRequest(serial))

    def _leave(self, peer_id: PeerId, now_ns: int) -> None:
        if self._run is not None:
            self._run.waiting.discard(peer_id)
            self._finish_if_complete(now_ns)

    def _finish_if_complete(self, now_ns: int) -> None:
        if self._run is not None and not self._run.waiting:
            self._finish(now_ns)

    def _finish(self, now_ns: int) -> None:
        run, self._run = self._run, None
        assert run is not None
        self._answer(run.askers, run.answered, now_ns)
        self._start(now_ns)

    def check(self) -> None:
        """Assert the rules between two calls."""
        assert self._run is not None or not self._next_askers, self._next_askers
        asking = self.asking()
        assert len(asking) == len(set(asking)), asking
        if self._run:
            assert all(self._guests[peer_id].owed_serial is not None for peer_id in self._run.waiting)
            assert not self._run.waiting & self._run.answered

    def asking(self) -> list[PeerId]:
        """Who waits for a status."""
        return [*(self._run.askers if self._run else []), *self._next_askers]
