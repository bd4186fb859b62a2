"""What guests and daemon say to each other about grants, and what becomes of a guest that goes.  Pure.

Rules:

1. Guests in the modes `prompt` and `strict` are in the ledger; grants are no business of the others.
2. A message that names another session than that of its connection is of a past that is over: it is ignored.
3. A session is in the journal before its guest hears of it, and stays there until it has left the ledger.
4. A guest leaves the ledger when it says goodbye, when it says hello again and names its former session, or when its
   lease is over.  If its connection ends in another way it is lost: it stays until one of the latter two, since the
   end of an agent does not make a kernel forget.  Only one that holds nothing and owes nothing leaves at once.
5. Who names a former session must be of the same user as who had it.
6. A Renew from a guest that owes acks is answered as soon as those are there that it owed *then*, and counts from its own
   arrival; of several the last is answered.  So a guest that is recalled all the time keeps its lease, and one that never acks does not.
7. A guest that is being evicted is a sharer of nothing any more and does not become one; nor is its lease renewed.
8. A connection can leave several lost guests behind only if it is a serial line; `lost_on` tells how many, so that there is a limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from coherency.daemon.ledger import GuestBooks, Ledger, LedgerStatistics, Round
from coherency.daemon.peer_states import Peer, PeerId
from coherency.errors import MessageError
from coherency.ids import Epoch, GrantKey
from coherency.protocol import Ack, Confirm, Hello, Recall, Register, Release, Renew, Renewed

GRANTING_MODES: Final = ("prompt", "strict")
MAX_RENEWALS: Final = 16
MAX_LOST_ON_A_LINE: Final = 2
OfGrants = Register | Release | Ack | Renew


class Journal(Protocol):
    """What survives the daemon: which sessions may have left something in a kernel."""

    def add(self, session: int, uid: int) -> None:
        """The session may from now on.  Raises `OSError` if that cannot be written down."""

    def discard(self, session: int) -> None:
        """It may not any more.  Never raises: the next daemon only waits for nothing."""

    def account(self, session: int, uid: int) -> None:
        """A guest of this user says that the session is over; it may have been one of a predecessor of this daemon."""


class Evicted(NamedTuple):
    """A guest whose lease is over.  `peer` is its connection, None if it was lost before."""

    session: int
    peer: PeerId | None
    who: str


@dataclass(slots=True)
class _Renewal:
    """A Renew that is not answered yet: rule 6."""

    serial: int
    asked_at_ns: int
    owed: int
    """The last recall that the guest had been sent when it asked."""


@dataclass(slots=True)
class _Holder:
    """A guest in the ledger.  `peer`: its connection, None if it is lost."""

    who: str
    uid: int
    peer: PeerId | None
    came_by: PeerId
    """The connection, also when the guest is lost."""
    renewals: deque[_Renewal] = field(default_factory=deque)
    """Oldest first, `MAX_RENEWALS` at most: what comes beyond is forgotten."""
    leaves: bool = False
    """Rule 7."""


class Leasing:
    """All conversations about grants.  Called under one lock, with times that do not go back, but for `is_held`.

    `epoch` is the table's, `new_session` gives a random number that is not 0 and was never given before.
    """

    def __init__(
        self, ledger: Ledger, *, lease_ns: int, epoch: Callable[[], Epoch], new_session: Callable[[], int], journal: Journal
    ) -> None:
        self.lease_ns = lease_ns
        self.is_held = ledger.is_held
        self._ledger = ledger
        self._epoch = epoch
        self._new_session = new_session
        self._journal = journal
        self._holders: dict[int, _Holder] = {}
        self._others: set[int] = set()  # sessions of guests that grants are no business of

    # --- guests come and go ------------------------------------------------------------------------------------

    def end_former(self, hello: Hello, uid: int) -> PeerId | None:
        """The guest's former session is over (rule 5).  Returns its connection if that is still there: to be closed."""
        self._journal.account(hello.former, uid)
        holder = self._holders.get(hello.former)
        if holder is None or holder.uid != uid:
            return None
        if holder.peer is None:
            self._leave(hello.former)
        return holder.peer

    def begin(self, peer: Peer, hello: Hello, now_ns: int) -> None:
        """Give the peer a session.  Raises `OSError` if it cannot be written down: then it has none."""
        session = self._new_session()
        if hello.mode in GRANTING_MODES:
            self._journal.add(session, peer.credentials.uid)
            self._ledger.join(session, waits=hello.mode == "strict", now_ns=now_ns)
            self._holders[session] = _Holder(str(peer), peer.credentials.uid, peer.peer_id, peer.peer_id)
        else:
            self._others.add(session)
        peer.session = session

    def end(self, peer: Peer, *, goodbye: bool) -> None:
        """The peer's connection is over (rule 4)."""
        self._others.discard(peer.session)
        holder = self._holders.get(peer.session)
        if holder is None:
            return
        books = self._ledger.books(peer.session)
        if goodbye or not (books.keys or books.unacked):
            self._leave(peer.session)
        else:
            self._ledger.lose(peer.session)
            holder.peer = None

    def evict_due(self, now_ns: int) -> list[Evicted]:
        """The guests whose lease is over: they have left."""
        evicted = []
        for session in self._ledger.evict_due(now_ns):
            holder = self._holders.pop(session)
            self._journal.discard(session)
            evicted.append(Evicted(session, holder.peer, holder.who))
        return evicted

    @property
    def next_deadline_ns(self) -> int | None:
        """When `evict_due` must be called next at the latest."""
        return self._ledger.next_deadline_ns

    @property
    def lost(self) -> int:
        """How many guests are in the ledger without a connection."""
        return sum(holder.peer is None for holder in self._holders.values())

    def lost_on(self, peer: PeerId) -> int:
        """How many of them came by this connection, which is still there."""
        return sum(holder.peer is None and holder.came_by == peer for holder in self._holders.values())

    # --- messages ----------------------------------------------------------------------------------------------

    def answer(self, peer: Peer, message: OfGrants, now_ns: int) -> Confirm | Renewed | None:
        """What the guest gets for a message about grants.  `MessageError` for what is no business of it."""
        holder = self._holders.get(peer.session)
        if holder is None:
            raise MessageError(f"{type(message).__name__} is not for a guest in its mode")
        if message.session != peer.session or (holder.leaves and isinstance(message, Register | Renew)):
            return None
        if isinstance(message, Register):
            self._ledger.register(peer.session, message.keys)
            return Confirm(peer.session, message.serial, self._epoch())
        if isinstance(message, Release):
            self._ledger.release(peer.session, message.keys)
            return None
        if isinstance(message, Ack):
            self._ledger.ack(peer.session, message.serial)
        elif len(holder.renewals) < MAX_RENEWALS:
            holder.renewals.append(_Renewal(message.serial, now_ns, self._ledger.books(peer.session).recalls))
        renewed = None
        while holder.renewals:
            first = holder.renewals[0]
            if not self._ledger.renew(peer.session, first.asked_at_ns, owed=first.owed):
                break
            renewed = Renewed(peer.session, holder.renewals.popleft().serial)
        return renewed

    # --- changes -----------------------------------------------------------------------------------------------

    def recall(
        self, keys: Iterable[GrantKey] | None, wake: Callable[[], None], now_ns: int
    ) -> tuple[Round, list[tuple[PeerId, Recall]]]:
        """Recall keys, or everything (None): the round, and what is to be sent to whom.  See `Ledger.recall`."""
        ledger = self._ledger
        round_ = ledger.recall_everything(wake, now_ns) if keys is None else ledger.recall(keys, wake, now_ns)
        return round_, self._to_send(round_)

    def evict(self, session: int, wake: Callable[[], None], now_ns: int) -> tuple[Round, list[tuple[PeerId, Recall]]]:
        """Recall everything from a guest that is in the ledger, which gets nothing more from now on: rule 7."""
        self._holders[session].leaves = True
        self._holders[session].renewals.clear()
        round_ = self._ledger.recall_all_from(session, wake, now_ns)
        return round_, self._to_send(round_)

    def _to_send(self, round_: Round) -> list[tuple[PeerId, Recall]]:
        recalls = []
        for session, serial, its_keys in round_.tell:
            peer = self._holders[session].peer
            assert peer is not None, "nobody is told who is lost"
            recalls.append((peer, Recall(session, serial, its_keys)))
        return recalls

    def abandon(self, round_: Round) -> None:
        """Nobody waits for this round any more: see `Ledger.abandon`."""
        self._ledger.abandon(round_)

    def has(self, session: int) -> bool:
        """Whether a guest of this session is in the ledger.  May be asked without the lock."""
        return session in self._holders

    def knows(self, session: int) -> bool:
        """Whether there is a guest of this session, in whatever mode.  May be asked without the lock."""
        return session in self._holders or session in self._others

    def peer_of(self, session: int) -> PeerId | None:
        """The connection of a guest in the ledger."""
        holder = self._holders.get(session)
        return None if holder is None else holder.peer

    # --- inside and introspection ------------------------------------------------------------------------------

    def _leave(self, session: int) -> None:
        self._ledger.leave(session)
        del self._holders[session]
        self._journal.discard(session)

    def books(self, peer: Peer) -> GuestBooks | None:
        """What the ledger has of a guest, None if grants are no business of it."""
        return self._ledger.books(peer.session) if peer.session in self._holders else None

    def check(self) -> None:
        """Assert that the ledger and this know the same guests."""
        self._ledger.check()
        statistics = self._ledger.statistics()
        assert statistics.guests == len(self._holders), statistics
        assert statistics.lost == self.lost, statistics

    def statistics(self) -> LedgerStatistics:
        """Those of the ledger."""
        return self._ledger.statistics()
