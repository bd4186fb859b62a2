"""Who may have what in its kernel, who owes an ack, and until when anybody waits for it.  Pure; the time is an argument.

A guest registers keys (see `coherency.leases`); from then on it is a *sharer* of each.  A change recalls the keys that it
touches: it makes a `Round`, sends what the round has to tell, and waits until nothing is owed to the round any more.

Rules:

1. A guest leaves the sharers of a key when the recall is made, not when it acks.  It may register the key again at
   once: then it is a sharer again, and still owes the ack of the recall before.
2. A guest's recalls are numbered from 1 without gaps; an ack covers all recalls up to its number.
3. A round waits for every strict guest that was a sharer of one of its keys, and for every strict guest that has not
   acked an earlier recall of one of its keys, whichever round sent that.  Nobody waits for a prompt guest: it is only
   told.  A recall of everything is a recall of each key.
4. A wait ends with the ack, with the guest's leaving, or with the end of its lease; so no round waits longer than
   `Round.until_ns`, which is one lease from its beginning at most.
5. A guest that owes an ack is not renewed, whether it is waited for or not.  A guest that owes nothing and renews in
   time keeps its lease for ever.
6. A guest whose lease is over has left: nothing of it remains.  Whatever it says later is a fault; it must say hello.
7. A lost guest cannot be told, but may have everything in its kernel that it had.  Rounds wait for it as for one that
   does not answer, until it leaves or its lease is over.
8. A guest that breaks a rule gets a `MessageError`, and nothing has changed.  It holds `max_keys` keys at most.
9. What nobody has costs nobody anything: a key without sharers and without an unacked recall is not in the books.  A
   recall costs as much as the sharers of its keys, however many guests and keys there are besides.
10. `is_held` needs no lock.  It may find a key held that has just been let go, never the reverse: a recall writes down
    what is owed before it strikes out the sharers, and `is_held` reads in the other order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from sortedcontainers import SortedDict

from coherency.daemon.deadlines import Deadlines
from coherency.errors import MessageError
from coherency.ids import GrantKey
from coherency.leases import MAX_KEYS_PER_GUEST


class Tell(NamedTuple):
    """A RECALL to be sent: to `guest`, with `serial`, of `keys`; no keys are all keys."""

    guest: int
    serial: int
    keys: tuple[GrantKey, ...]


@dataclass(eq=False, slots=True)
class Round:
    """What one change recalls: whom to tell, and who is waited for.  Only the ledger changes it, under its caller's lock."""

    tell: tuple[Tell, ...]
    """To be sent under the same lock, so that each guest gets its serials in order.  Lost guests are not among them."""
    until_ns: int
    """When the last wait is over at the latest, if `Ledger.evict_due` is called in time.  Later, but still within one lease
    from the round's beginning, if a renewal comes through that was asked for before it."""
    owed: dict[int, int]
    """Of each guest that is still waited for, the serial that it must ack."""
    wake: Callable[[], None]

    @property
    def pending(self) -> bool:
        """Whether anybody is waited for.  May be read without the lock."""
        return bool(self.owed)


class GuestBooks(NamedTuple):
    """What the books say of one guest."""

    keys: int
    """Keys that it is a sharer of."""
    recalls: int
    """Recalls that were made to it."""
    unacked: int
    """Those of them that it has not acked."""
    lease_until_ns: int


class LedgerStatistics(NamedTuple):
    """The books at one instant, and counters since the beginning."""

    guests: int
    lost: int
    """Those of the guests whose connection is gone, and whose lease is not over."""
    keys: int
    """Keys that are in the books: registered, or recalled and not acked by somebody who is waited for."""
    registrations: int
    """Keys that guests have registered, counted once for every guest."""
    unacked: int
    """Recalls that are not acked."""
    waiting: int
    """Rounds that are pending."""
    rounds: int
    """Rounds made."""
    waits: int
    """Those of them that had to wait."""
    recalls: int
    """Recalls made, by all rounds together."""
    evictions: int


@dataclass(eq=False, slots=True)
class _Guest:
    """One session.  `seat` is a single bit, of this guest's alone while it is here."""

    number: int
    waits: bool
    seat: int
    keys: set[GrantKey] = field(default_factory=set)
    sent: int = 0
    acked: int = 0
    lost: bool = False
    debts: deque[tuple[int, tuple[GrantKey, ...]]] = field(default_factory=deque)
    """The unacked recalls, oldest first; kept only if the guest is waited for."""
    rounds: Any = field(default_factory=SortedDict)
    """Watermarks: which rounds wait for each serial."""


class Ledger:
    """The books of one daemon.  Guests are known by their session's number; times are the caller's clock, in nanoseconds.

    All methods but `is_held` are called under one lock of the caller's, with times that do not go back.  `lease_ns` is
    the daemon's own count, margin included; `slot_count` that of the table.  A `wake` is called under the same lock,
    exactly once, and never before the `recall` that was given it has returned; it must neither wait nor raise.

    The messages of a connection that is gone must not be handed over: a guest that the ledger does not know is at fault.
    """

    def __init__(self, *, lease_ns: int, slot_count: int, max_keys: int = MAX_KEYS_PER_GUEST) -> None:
        self._lease_ns = lease_ns
        self._key_count = slot_count * 2
        self._max_keys = max_keys
        self._guests: dict[int, _Guest] = {}
        self._leases: Deadlines[int] = Deadlines()
        self._seats: dict[int, _Guest] = {}
        self._taken = 0  # all seats
        # The seats of each key's sharers, one bit each: a few guests cost a key no memory but that of its number.
        self._sharers: dict[GrantKey, int] = {}
        # Of each key whose recall is not acked, the guests that are waited for, and the last such recall of each.
        self._owed: dict[GrantKey, dict[int, int]] = {}
        # The guests that are waited for and have not acked a recall of everything, and its serial.
        self._sweeps: dict[int, int] = {}
        self._waiting = self._rounds = self._waits = self._recalls = self._evictions = 0

    # --- what guests do ----------------------------------------------------------------------------------------

    def join(self, guest: int, *, waits: bool, now_ns: int) -> None:
        """A session begins, with a lease from now on.  `waits`: its mode is strict, changes wait for its acks.

        `ValueError` if there is such a guest already.
        """
        if guest in self._guests:
            raise ValueError(f"session {guest:#x} is already there")
        seat = ~self._taken & (self._taken + 1)  # the lowest that is free
        self._taken |= seat
        self._guests[guest] = self._seats[seat] = _Guest(guest, waits, seat)
        self._leases.set(guest, now_ns + self._lease_ns)

    def register(self, guest: int, keys: Collection[int]) -> None:
        """The guest is a sharer of these keys, as it may be already.

        `MessageError`: unknown or lost guest, a key that the table does not have, more keys than a guest may hold.
        """
        sharer = self._known(guest)
        if sharer.lost:
            raise MessageError("registers keys over a connection that is lost")
        more = self._checked(keys) - sharer.keys
        if len(sharer.keys) + len(more) > self._max_keys:
            raise MessageError(f"registers more than {self._max_keys} keys")
        sharer.keys |= more
        for key in more:
            self._sharers[key] = self._sharers.get(key, 0) | sharer.seat

    def release(self, guest: int, keys: Collection[int]) -> None:
        """The guest is no sharer of these keys any more, if it was.  What it owes, it owes.

        `MessageError`: unknown guest, a key that the table does not have.
        """
        sharer = self._known(guest)
        self._strike(sharer, self._checked(keys) & sharer.keys)

    def renew(self, guest: int, now_ns: int, *, owed: int | None = None) -> bool:
        """The guest's lease counts from now, if it owes no ack and is not lost; returns whether that is so.

        One that owed an ack may be renewed as soon as it has acked: the later instant is the safe one, since the agent
        counts from the sending of its request.  A lease that is over and was not noticed yet may be renewed, too: the
        books still have all that the guest had.  `MessageError`: unknown guest.

        `owed`: only the acks up to this recall matter, the last that had been made when the guest asked.  `now_ns` is
        that instant then, and so a round that began later still waits no longer than one lease from its beginning.
        """
        peer = self._known(guest)
        owed = peer.sent if owed is None else owed
        if peer.lost or peer.acked < owed:
            return False
        self._leases.set(guest, max(now_ns + self._lease_ns, self._leases[guest]))
        return True

    def ack(self, guest: int, serial: int) -> None:
        """The guest has dropped what its recalls up to `serial` were about.  Once more does not matter.

        `MessageError`: unknown guest, a serial that it was never sent.
        """
        debtor = self._known(guest)
        if not 1 <= serial <= debtor.sent:
            raise MessageError(f"acks recall {serial} of {debtor.sent}")
        if serial > debtor.acked:
            self._settle(debtor, serial)

    def lose(self, guest: int) -> None:
        """The guest's connection is gone, and nobody knows what became of its kernel (rule 7)."""
        if (peer := self._guests.get(guest)) is not None:
            peer.lost = True

    def leave(self, guest: int) -> None:
        """The guest's kernel has nothing any more: it said so, or its lease is over.  It is forgotten."""
        peer = self._guests.pop(guest, None)
        if peer is None:
            return
        self._strike(peer, set(peer.keys))
        self._leases.clear(guest)
        self._taken ^= peer.seat
        del self._seats[peer.seat]
        self._settle(peer, peer.sent)

    def evict_due(self, now_ns: int) -> tuple[int, ...]:
        """The guests whose lease is over at `now_ns`, lost ones included: they have left when this returns."""
        evicted = []
        while (guest := self._leases.pop_due(now_ns)) is not None:
            self.leave(guest)
            evicted.append(guest)
        self._evictions += len(evicted)
        return tuple(evicted)

    @property
    def next_deadline_ns(self) -> int | None:
        """When `evict_due` must be called next at the latest."""
        return self._leases.next_ns

    # --- what changes do ---------------------------------------------------------------------------------------

    def is_held(self, keys: Iterable[GrantKey]) -> bool:
        """Whether a recall of these keys would have somebody to tell or to wait for.  Needs no lock (rule 10).

        What is registered after this call began may be missed: whoever asks has made the words odd before, so that
        nothing can be granted under such a registration until the change is over.
        """
        sharers, owed = self._sharers, self._owed
        for key in keys:
            if key in sharers or key in owed:
                return True
        return bool(self._sweeps)

    def recall(self, keys: Iterable[GrantKey], wake: Callable[[], None], now_ns: int) -> Round:
        """Recall the keys of one change.  `wake` is called once when nothing is owed any more, if anything is now.

        If the round is not `pending`, nothing is owed already, and `wake` is not called.
        """
        keys = tuple(dict.fromkeys(keys))
        owed = dict(self._sweeps) if keys else {}
        told: dict[_Guest, list[GrantKey]] = {}
        for key in keys:
            for guest, serial in self._owed.get(key, {}).items():
                owed[guest] = max(serial, owed.get(guest, 0))
            for sharer in self._seated(self._sharers.get(key, 0)):
                told.setdefault(sharer, []).append(key)
        tell: list[Tell] = []
        for sharer, its_keys in told.items():
            recalled = self._tell(sharer, tuple(its_keys), tell)
            if sharer.waits:
                owed[sharer.number] = recalled
                for key in its_keys:
                    self._owed.setdefault(key, {})[sharer.number] = recalled
            sharer.keys.difference_update(its_keys)
        for key in keys:
            self._sharers.pop(key, None)  # after `_owed` was written: pairs with the loads in `is_held`
        return self._begin(tell, owed, wake, now_ns)

    def recall_everything(self, wake: Callable[[], None], now_ns: int) -> Round:
        """Recall all keys from all who hold any, and wait for all that is owed.  Otherwise like `recall`."""
        owed: dict[int, int] = {}
        tell: list[Tell] = []
        for guest in self._guests.values():
            self._sweep(guest, tell, owed)
            guest.keys = set()
        self._sharers.clear()  # after `_sweeps` was written: pairs with the loads in `is_held`
        return self._begin(tell, owed, wake, now_ns)

    def recall_all_from(self, guest: int, wake: Callable[[], None], now_ns: int) -> Round:
        """Recall all keys from one guest, and wait for all that it owes.  `MessageError`: unknown guest."""
        sharer = self._known(guest)
        owed: dict[int, int] = {}
        tell: list[Tell] = []
        self._sweep(sharer, tell, owed)
        self._strike(sharer, set(sharer.keys))  # after `_sweeps` was written, likewise
        return self._begin(tell, owed, wake, now_ns)

    def _sweep(self, guest: _Guest, tell: list[Tell], owed: dict[int, int]) -> None:
        """Tell it to forget all that it has, if it has anything; its keys are the caller's business."""
        if guest.keys:
            swept = self._tell(guest, (), tell)
            if guest.waits:
                self._sweeps[guest.number] = swept
        if guest.waits and guest.acked < guest.sent:
            owed[guest.number] = guest.sent

    def abandon(self, round_: Round) -> None:
        """Whoever waited for this round has given up: its `wake` is not called any more.

        The guests that were told still owe their acks, and later rounds on these keys wait for them.
        """
        self._waiting -= round_.pending
        for guest, serial in round_.owed.items():
            rounds = self._guests[guest].rounds
            rounds[serial].remove(round_)
            if not rounds[serial]:
                del rounds[serial]
        round_.owed.clear()

    # --- inside ------------------------------------------------------------------------------------------------

    def _known(self, guest: int) -> _Guest:
        peer = self._guests.get(guest)
        if peer is None:
            raise MessageError(f"speaks for session {guest:#x}, which is none or over")
        return peer

    def _checked(self, keys: Collection[int]) -> set[GrantKey]:
        if keys and not 0 <= min(keys) <= max(keys) < self._key_count:
            raise MessageError(f"names a key beyond the table's {self._key_count}")
        return cast("set[GrantKey]", set(keys))

    def _seated(self, seats: int) -> Iterator[_Guest]:
        while seats:
            seat = seats & -seats
            yield self._seats[seat]
            seats ^= seat

    def _strike(self, sharer: _Guest, keys: set[GrantKey]) -> None:
        """It is no sharer of these keys, all of which it has registered, any more."""
        sharer.keys -= keys
        for key in keys:
            if others := self._sharers[key] ^ sharer.seat:
                self._sharers[key] = others
            else:
                del self._sharers[key]

    def _tell(self, sharer: _Guest, keys: tuple[GrantKey, ...], tell: list[Tell]) -> int:
        """Make one recall; returns its serial."""
        self._recalls += 1
        sharer.sent += 1
        if sharer.waits:
            sharer.debts.append((sharer.sent, keys))
        if not sharer.lost:
            tell.append(Tell(sharer.number, sharer.sent, keys))
        return sharer.sent

    def _begin(self, tell: list[Tell], owed: dict[int, int], wake: Callable[[], None], now_ns: int) -> Round:
        until_ns = max([now_ns, *(self._leases[guest] for guest in owed)])
        round_ = Round(tuple(tell), until_ns, owed, wake)
        for guest, serial in owed.items():
            self._guests[guest].rounds.setdefault(serial, []).append(round_)
        self._rounds += 1
        self._waits += round_.pending
        self._waiting += round_.pending
        return round_

    def _settle(self, debtor: _Guest, serial: int) -> None:
        """Nothing is owed any more for its recalls up to this serial.  The last step wakes: all is in order by then."""
        debtor.acked = serial
        while debtor.debts and debtor.debts[0][0] <= serial:
            paid, keys = debtor.debts.popleft()
            for key in keys:
                owed = self._owed[key]
                if owed[debtor.number] == paid:
                    del owed[debtor.number]
                if not owed:
                    del self._owed[key]
        if self._sweeps.get(debtor.number, serial + 1) <= serial:
            del self._sweeps[debtor.number]
        over: list[Round] = []
        while debtor.rounds and debtor.rounds.peekitem(0)[0] <= serial:
            for round_ in debtor.rounds.popitem(0)[1]:
                del round_.owed[debtor.number]
                if not round_.pending:
                    over.append(round_)
        self._waiting -= len(over)
        for round_ in over:
            round_.wake()

    def check(self) -> None:
        """Assert that all views of the books agree."""
        self._leases.check()
        held: dict[GrantKey, int] = {}
        owed: dict[GrantKey, dict[int, int]] = {}
        rounds: dict[Round, dict[int, int]] = {}
        for number, guest in self._guests.items():
            assert guest.number == number in self._leases, number
            assert self._seats[guest.seat] is guest, number
            assert guest.seat.bit_count() == 1, number
            assert 0 <= guest.acked <= guest.sent, number
            assert len(guest.keys) <= self._max_keys, number
            serials = [serial for serial, _ in guest.debts]
            assert serials == list(range(guest.acked + 1, guest.sent + 1) if guest.waits else ()), number
            assert set(guest.rounds) <= set(serials), number
            assert number not in self._sweeps or self._sweeps[number] in serials, number
            for key in guest.keys:
                held[key] = held.get(key, 0) | guest.seat
            for serial, keys in guest.debts:
                for key in keys:
                    owed.setdefault(key, {})[number] = serial
            for serial, waiting in guest.rounds.items():
                assert waiting, number
                for round_ in waiting:
                    rounds.setdefault(round_, {})[number] = serial
        assert len(self._seats) == len(self._guests) == len(self._leases), self.statistics()
        assert sum(self._seats) == self._taken
        assert held == self._sharers
        assert owed == self._owed
        assert set(self._sweeps) <= set(self._guests)
        assert all(round_.owed == serials for round_, serials in rounds.items())
        assert len(rounds) == self._waiting

    def books(self, guest: int) -> GuestBooks:
        """A frozen copy of what there is of one guest.  `MessageError`: unknown guest."""
        peer = self._known(guest)
        return GuestBooks(len(peer.keys), peer.sent, peer.sent - peer.acked, self._leases[guest])

    def statistics(self) -> LedgerStatistics:
        """A frozen copy."""
        guests = self._guests.values()
        return LedgerStatistics(
            guests=len(guests),
            lost=sum(guest.lost for guest in guests),
            keys=len(self._sharers) + sum(key not in self._sharers for key in self._owed),
            registrations=sum(len(guest.keys) for guest in guests),
            unacked=sum(guest.sent - guest.acked for guest in guests),
            waiting=self._waiting,
            rounds=self._rounds,
            waits=self._waits,
            recalls=self._recalls,
            evictions=self._evictions,
        )
