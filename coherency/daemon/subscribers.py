"""Which guests want to be told what happens, and what each is told.  Pure.

Rules:

1. A guest is not told of what it has done itself: its own kernel knows.
2. Events are told in the order in which they come here.  They are the last that a guest gets: what would be more than
   `unsent_bytes` for a guest that does not read is not told but counted, and the count is told before the next event.
   Nobody is dropped on account of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from coherency.daemon.peer_states import PeerId
from coherency.events import Event
from coherency.protocol import encode
from coherency.protocol_events import MAX_EVENTS_PER_MESSAGE, Happened


class SubscriberStatistics(NamedTuple):
    """Guests that want events now; events told and lost since the start, counted for each guest."""

    subscribers: int
    told: int
    lost: int


@dataclass(slots=True)
class _Subscriber:
    """`lost`: events that it could not be told since the last that it was."""

    session: int
    lost: int = 0


class Subscribers:
    """All of them, by connection.  Called under one lock, but for its truth: whether there is any."""

    def __init__(self, unsent_bytes: int) -> None:
        self._unsent_bytes = unsent_bytes
        self._all: dict[PeerId, _Subscriber] = {}
        self._told = self._lost = 0

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, peer: PeerId, session: int) -> None:
        """The guest wants events from now on.  Nothing happens if it does already."""
        self._all.setdefault(peer, _Subscriber(session))

    def discard(self, peer: PeerId) -> None:
        """It does not any more, or never did."""
        self._all.pop(peer, None)

    def clear(self) -> None:
        """Nobody does."""
        self._all.clear()

    def tell(
        self, events: Iterable[Event], origin: int | None, unsent: Callable[[PeerId], int], *, lost: int = 0
    ) -> Iterator[tuple[PeerId, bytes]]:
        """The frames that are to be sent, each before the next is asked for.

        `origin`: the session of the guest whose doing it was; `unsent`: what lies there for a guest, in bytes; `lost`: events
        that nobody can be told, since the daemon does not know them itself.
        """
        for subscriber in self._all.values():
            subscriber.lost += lost
            self._lost += lost
        pending = tuple(events)
        for start in range(0, len(pending), MAX_EVENTS_PER_MESSAGE):
            some = pending[start : start + MAX_EVENTS_PER_MESSAGE]
            usual = encode(Happened(0, some))
            for peer, subscriber in list(self._all.items()):
                if subscriber.session == origin:
                    continue
                if unsent(peer) + len(usual) > self._unsent_bytes:
                    subscriber.lost += len(some)
                    self._lost += len(some)
                    continue
                lost, subscriber.lost = subscriber.lost, 0
                self._told += len(some)
                yield peer, encode(Happened(lost, some)) if lost else usual

    def check(self) -> None:
        """Assert that the counters agree."""
        assert sum(subscriber.lost for subscriber in self._all.values()) <= self._lost, self.statistics()

    def statistics(self) -> SubscriberStatistics:
        """A frozen copy."""
        return SubscriberStatistics(len(self._all), self._told, self._lost)
