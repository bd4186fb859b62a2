"""What operators order, and who must have forgotten before they are answered.  Pure.

Rules:

1. An order is done when no round that it began is pending any more: all acks are there, or the leases are over.
2. The end of a round only notes that, since it may come in the middle of anything; `take_done` is for a quiet moment.
3. Who is evicted is dropped when the order is done, not before: until then its kernel may have something, and only over
   its connection can it say that it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from coherency.daemon.ledger import Round
from coherency.daemon.peer_states import PeerId
from coherency.protocol import EvictReply, Invalidated


class Leaver(NamedTuple):
    """A guest that is evicted: its connection, and the session, since a serial line may carry another one by then."""

    peer: PeerId
    session: int


@dataclass(eq=False, slots=True)
class Order:
    """`answer` is due to the operator `peer` when it is done, and `leavers` are to be dropped."""

    peer: PeerId
    answer: Invalidated | EvictReply
    leavers: tuple[Leaver, ...] = ()
    waits_for: int = 0
    """Rounds that are pending."""


class Orders:
    """All orders that are not answered yet.  Called under the switchboard's lock."""

    def __init__(self) -> None:
        self._done: list[Order] = []

    def begin(self, order: Order, recalls: Iterable[Callable[[Callable[[], None]], Round]]) -> None:
        """Begin the rounds of an order: each of `recalls` makes one, which calls what it is given when it is over."""
        for recall in recalls:
            if recall(lambda: self._one_less(order)).pending:
                order.waits_for += 1
        if not order.waits_for:
            self._done.append(order)

    def _one_less(self, order: Order) -> None:
        order.waits_for -= 1
        if not order.waits_for:
            self._done.append(order)

    def take_done(self) -> list[Order]:
        """The orders that have been done since the last call, each once."""
        done, self._done = self._done, []
        return done
