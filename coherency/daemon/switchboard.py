"""The daemon's conversations with all its peers: bytes and time in, actions out.  Pure; `server` owns the sockets.

Rules:

1. A peer does only what `TRANSITIONS` allows; whatever else it does, it alone is dropped, with a reason.
2. A peer that owes something has a deadline: the rest of a frame (`frame_ns`), an operator another question or the end
   (`opening_ns`).  A guest that owes nothing may be silent for ever.  So may who has connected and said nothing at all, as
   does QEMU before its guest speaks; but when there are too many, the one that has been silent longest makes room.
3. Counters are collected by `collecting`.  A guest sends them only when asked: a talkative one is dropped.
4. The guests' ids rise from 1 and are not used again by this daemon.
5. Messages about grants go to `leasing`.  A guest whose lease is over is told so and dropped; an operator's order is
   answered when nobody can have in its kernel what must be forgotten, which takes one lease at most: see `orders`.
6. A serial line outlives the guests on it.  Hello of another one ends the former as a hang-up would, without the
   connection: whatever that had been granted is waited for, unless Hello says that it is over.  A line that has left too many
   guests like that is closed: what they hold is bounded like what connections hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

from coherency.daemon.actions import Action, Drop, Note, Send
from coherency.daemon.collecting import Collector
from coherency.daemon.deadlines import Deadlines
from coherency.daemon.leasing import MAX_LOST_ON_A_LINE, Leasing, OfGrants
from coherency.daemon.ledger import Round
from coherency.daemon.orders import Leaver, Order, Orders
from coherency.daemon.peer_states import Credentials, GuestSnapshot, Peer, PeerEvent, PeerId, PeerState, next_state
from coherency.daemon.reports import guest_report
from coherency.daemon.subscribers import Subscribers
from coherency.errors import MessageError, PeerError, ProtocolVersionError
from coherency.ids import Epoch, GrantKey
from coherency.protocol import (
    Evicted,
    EvictReply,
    EvictRequest,
    Goodbye,
    Hello,
    Invalidated,
    InvalidateRequest,
    Message,
    Refusal,
    RefusalCode,
    Statistics,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.protocol_events import Subscribe
from coherency.protocol_fields import ReportValue


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of the control channel at the daemon; what happens beyond them stands in `docs/spec/control.md`."""

    peers: int = 1024
    opening_ns: int = 5_000_000_000
    frame_ns: int = 5_000_000_000
    statistics_ns: int = 500_000_000
    unsent_bytes: int = 1 << 20
    unsent_events_bytes: int = 1 << 18
    accept_pause_ns: int = 1_000_000_000


class SwitchboardStatistics(NamedTuple):
    """Connections now (`peers`, `guests`) and since the start: `opened`, `dropped` for a fault, `messages`, `runs`."""

    peers: int
    guests: int
    opened: int
    dropped: int
    messages: int
    runs: int


_GUEST: Final = (PeerState.GUEST, PeerState.GUEST_ASKING)
_ASKING: Final = (PeerState.GUEST_ASKING, PeerState.OPERATOR_ASKING)
_IN_A_HURRY: Final = (PeerState.OPERATOR,)
"""States in which the peer owes a message: rule 2."""

_OPENING: Final = "opening"
_FRAME: Final = "frame"


class Switchboard:
    """All conversations.  Called under one lock; `guests` and `statistics` need none.

    Every call may leave actions, to be taken by `take_actions` and carried out in order before the next call.

    `welcome` is the template of all Welcomes; `status` gives the daemon's part of a report (see `REPORT_KEYS`) and
    `invalidate` the new epoch; both must not wait for anything, and what they raise costs only the asker its answer.
    Raises `ValueError` if `welcome` cannot be sent.
    """

    def __init__(
        self,
        *,
        welcome: Welcome,
        status: Callable[[], Mapping[str, ReportValue]],
        invalidate: Callable[[], Epoch],
        leasing: Leasing,
        own_uid: int,
        limits: Limits,
    ) -> None:
        encode(welcome)  # raises ValueError now instead of failing the first guest
        self._welcome = welcome
        self._status = status
        self._invalidate = invalidate
        self._leasing = leasing
        self._own_uid = own_uid
        self._limits = limits
        self._actions: list[Action] = []
        self._deadlines: Deadlines[tuple[PeerId, str]] = Deadlines()
        self._peers: dict[PeerId, Peer] = {}
        self._guests: dict[PeerId, Peer] = {}
        self._collector = Collector(
            self._guests, statistics_ns=limits.statistics_ns, ask=self._send, answer=self._answer_status
        )
        self._orders = Orders()
        self.subscribers = Subscribers(limits.unsent_events_bytes)
        self._opened = self._welcomed = self._dropped = self._messages = 0

    # --- what the server calls ---------------------------------------------------------------------------------

    def take_actions(self) -> list[Action]:
        """What is to be done, each action once."""
        actions, self._actions = self._actions, []
        return actions

    @property
    def next_deadline_ns(self) -> int | None:
        """When `tick` must be called next at the latest."""
        due = (self._deadlines.next_ns, self._leasing.next_deadline_ns, self._collector.deadline_ns)
        return min((at_ns for at_ns in due if at_ns is not None), default=None)

    def opened(self, credentials: Credentials, now_ns: int) -> PeerId:
        """Somebody has connected."""
        self._opened += 1
        peer = Peer(PeerId(self._opened), credentials)
        self._peers[peer.peer_id] = peer
        if len(self._peers) + self._leasing.lost > self._limits.peers:
            silent = next(each for each in self._peers.values() if each is peer or each.is_silent)
            self._drop(silent, "too many connections", now_ns, code=RefusalCode.FULL, orderly=silent is not peer)
        return peer.peer_id

    def received(self, peer_id: PeerId, data: bytes, now_ns: int) -> None:
        """`data` came from this peer; no data is the end of its stream."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        try:
            if not data:
                self._ended(peer, now_ns)
                return
            messages = peer.decoder.feed(data)
            self._watch_frame(peer, bool(messages), now_ns)
            for message in messages:
                self._messages += 1
                self._handle(peer, message, now_ns)
                if peer.state is PeerState.CLOSED:
                    return
        except PeerError as error:
            code = RefusalCode.VERSION if isinstance(error, ProtocolVersionError) else RefusalCode.FAULT
            self._drop(peer, str(error), now_ns, code=code)
        finally:
            self._answer_orders(now_ns)

    def lost(self, peer_id: PeerId, reason: str, now_ns: int) -> None:
        """The connection is of no use any more, by `reason`."""
        if peer := self._peers.get(peer_id):
            self._drop(peer, reason, now_ns)

    def tick(self, now_ns: int) -> None:
        """Act on every deadline that is not after `now_ns`."""
        while due := self._deadlines.pop_due(now_ns):
            peer_id, what = due
            reason = "began a frame and did not finish it" if what == _FRAME else "sent no request"
            limit_ns = self._limits.frame_ns if what == _FRAME else self._limits.opening_ns
            text = f"{reason} within {limit_ns / 1e9:g} s"
            self._drop(self._peers[peer_id], text, now_ns, event=PeerEvent.DEADLINE, code=RefusalCode.LATE)
        self._collector.tick(now_ns)
        for session, connection, who in self._leasing.evict_due(now_ns):
            reason = f"its lease of {self._leasing.lease_ns / 1e9:g} s is over"
            if connection is None:
                self._actions.append(Note(who, reason))
            else:
                farewell = encode(Evicted(session))
                self._drop(self._peers[connection], reason, now_ns, event=PeerEvent.DEADLINE, farewell=farewell)
        self._answer_orders(now_ns)

    def recall(self, keys: Iterable[GrantKey] | None, wake: Callable[[], None], now_ns: int) -> Round:
        """Recall keys, or everything (None), from all who have them: see `Ledger.recall`."""
        round_, recalls = self._leasing.recall(keys, wake, now_ns)
        for peer_id, recall in recalls:
            self._send(peer_id, recall)
        return round_

    def end(self) -> None:
        """Forget everybody: the server has hung up.  Who has grants is lost, and waited for as before."""
        for peer in self._guests.values():
            self._leasing.end(peer, goodbye=False)
        self._peers.clear()
        self._guests.clear()
        self.subscribers.clear()
        self._actions.clear()
        self._collector.end()
        self._deadlines = Deadlines()

    def guests(self) -> tuple[GuestSnapshot, ...]:
        """The guests of this moment, by id."""
        # list() of a dict's values is one step for other threads; each snapshot is immutable.
        return tuple(peer.snapshot for peer in list(self._guests.values()) if peer.snapshot)

    # --- one peer ----------------------------------------------------------------------------------------------

    def _ended(self, peer: Peer, now_ns: int) -> None:
        if not peer.decoder.at_boundary:
            self._drop(peer, "hung up in the middle of a frame", now_ns)
        elif peer.snapshot:
            self._drop(peer, "hung up without a goodbye", now_ns, event=PeerEvent.END)
        else:
            self._drop(peer, "hung up", now_ns, event=PeerEvent.END, orderly=True)

    def _watch_frame(self, peer: Peer, completed_any: bool, now_ns: int) -> None:
        key = (peer.peer_id, _FRAME)
        if peer.decoder.at_boundary:
            self._deadlines.clear(key)
        elif completed_any or key not in self._deadlines:
            # A frame's time runs from its own first byte, however little of it comes at a time.
            self._deadlines.set(key, now_ns + self._limits.frame_ns)

    def _enter(self, peer: Peer, state: PeerState, now_ns: int) -> None:
        peer.state = state
        key = (peer.peer_id, _OPENING)
        if state in _IN_A_HURRY:
            self._deadlines.set(key, now_ns + self._limits.opening_ns)
        else:
            self._deadlines.clear(key)

    def _handle(self, peer: Peer, message: Message, now_ns: int) -> None:
        happened = peer.happened(message)
        follower = next_state(peer.state, happened)
        if happened is Goodbye:
            self._drop(peer, "said goodbye", now_ns, event=PeerEvent.END, orderly=True)
            return
        self._enter(peer, follower, now_ns)
        if happened in (PeerEvent.LINE_GOODBYE, PeerEvent.LINE_HELLO):
            self._leave_line(peer, now_ns, goodbye=happened is PeerEvent.LINE_GOODBYE)
        if isinstance(message, Hello):
            self._take_in(peer, message, now_ns)
        elif isinstance(message, Statistics):
            self._collector.counted(peer, message, now_ns)
        elif isinstance(message, StatusRequest):
            self._collector.request(peer.peer_id, now_ns)
        elif isinstance(message, InvalidateRequest | EvictRequest):
            self._obey(peer, message, now_ns)
        elif isinstance(message, Subscribe):
            self._subscribe(peer, message, now_ns)
        elif isinstance(message, OfGrants) and (answer := self._leasing.answer(peer, message, now_ns)):
            self._send(peer.peer_id, answer)

    def _take_in(self, peer: Peer, hello: Hello, now_ns: int) -> None:
        is_serial_line = hello.line == "serial"
        if peer.is_serial_line and not is_serial_line:
            raise MessageError("says hello as from a socket of its own, on a serial line")
        if is_serial_line:
            peer.is_serial_line = True
            peer.decoder.hunt()
        former = self._leasing.end_former(hello, peer.credentials.uid)
        if former is not None:
            self._drop(self._peers[former], "has come again", now_ns, event=PeerEvent.END, orderly=True)
        if (lost := self._leasing.lost_on(peer.peer_id)) > MAX_LOST_ON_A_LINE:
            reason = f"{lost} agents before it on its line have died within one lease: wait until their leases are over"
            self._drop(peer, reason, now_ns, code=RefusalCode.FULL)
            return
        self._welcomed += 1
        peer.snapshot = GuestSnapshot(
            self._welcomed, hello.name, hello.pid, hello.mode, peer.credentials, now_ns, statistics=None, line=hello.line
        )
        self._guests[peer.peer_id] = peer
        try:
            self._leasing.begin(peer, hello, now_ns)
        except OSError as error:
            self._fail(peer, error, now_ns)
            return
        welcome = replace(self._welcome, guest_id=self._welcomed, session=peer.session, nonce=hello.nonce)
        joined = f"{peer}, mode {hello.mode}, {hello.line}"
        self._actions.append(Send(peer.peer_id, encode(welcome), joined=joined, with_table=not is_serial_line))

    def _leave_line(self, peer: Peer, now_ns: int, *, goodbye: bool) -> None:
        """Rule 6: the guest is none any more, the connection stays."""
        self._actions.append(Note(str(peer), "said goodbye" if goodbye else "gave way to another agent on its line"))
        self._part(peer, now_ns, goodbye=goodbye)
        peer.snapshot, peer.session, peer.owed_serial = None, 0, None

    def _may(self, peer: Peer, what: str, now_ns: int) -> bool:
        if peer.credentials.uid in (0, self._own_uid):
            return True
        reason = f"may not {what}: only root and the daemon's own user may"
        self._drop(peer, reason, now_ns, code=RefusalCode.PERMISSION)
        return False

    def _subscribe(self, peer: Peer, message: Subscribe, now_ns: int) -> None:
        if self._may(peer, "subscribe", now_ns) and message.session == peer.session:
            self.subscribers.add(peer.peer_id, peer.session)

    def _obey(self, peer: Peer, request: InvalidateRequest | EvictRequest, now_ns: int) -> None:
        if not self._may(peer, "invalidate" if isinstance(request, InvalidateRequest) else "evict", now_ns):
            return
        if isinstance(request, EvictRequest):
            self._evict_for(peer, request.guest, now_ns)
        else:
            self._invalidate_for(peer, now_ns)
        self._answer_orders(now_ns)

    def _invalidate_for(self, peer: Peer, now_ns: int) -> None:
        try:
            epoch = self._invalidate()
        except Exception as error:  # noqa: BLE001 - it costs the asker its answer, and nobody else anything
            self._fail(peer, error, now_ns)
            return
        self._orders.begin(Order(peer.peer_id, Invalidated(epoch)), [lambda wake: self.recall(None, wake, now_ns)])

    def _evict_for(self, peer: Peer, guest: str, now_ns: int) -> None:
        guests = [(each, each.snapshot) for each in self._guests.values() if each.snapshot]
        found = [each for each, snapshot in guests if snapshot.name == guest]
        found = found or [each for each, snapshot in guests if str(snapshot.guest_id) == guest]
        if not found:
            self._drop(peer, f"asked for a guest that is not here: '{guest}'", now_ns, code=RefusalCode.UNKNOWN, orderly=True)
            return
        leavers = tuple(Leaver(each.peer_id, each.session) for each in found)
        granted = [each.session for each in found if self._leasing.has(each.session)]
        order = Order(peer.peer_id, EvictReply(len(found)), leavers)
        self._orders.begin(order, [partial(self._evict, session, now_ns) for session in granted])

    def _evict(self, session: int, now_ns: int, wake: Callable[[], None]) -> Round:
        round_, recalls = self._leasing.evict(session, wake, now_ns)
        for peer_id, recall in recalls:
            self._send(peer_id, recall)
        return round_

    def _answer_orders(self, now_ns: int) -> None:
        """Tell the operators whose orders are done, and send away who was evicted."""
        for order in self._orders.take_done():
            for peer_id, session in order.leavers:
                leaver = self._peers.get(peer_id)
                if leaver is not None and leaver.session == session:
                    farewell = encode(Evicted(session))
                    self._drop(leaver, "evicted by an operator", now_ns, event=PeerEvent.DEADLINE, orderly=True, farewell=farewell)
            if peer := self._peers.get(order.peer):
                self._enter(peer, next_state(peer.state, PeerEvent.ANSWERED), now_ns)
                self._send(peer.peer_id, order.answer)

    def _fail(self, peer: Peer, error: Exception, now_ns: int) -> None:
        self._drop(peer, "could not be answered", now_ns, code=RefusalCode.INTERNAL, error=error)

    def _drop(
        self,
        peer: Peer,
        reason: str,
        now_ns: int,
        *,
        event: PeerEvent = PeerEvent.FAULT,
        orderly: bool = False,
        code: RefusalCode | None = None,
        farewell: bytes = b"",
        error: Exception | None = None,
    ) -> None:
        self._enter(peer, next_state(peer.state, event), now_ns)
        self._dropped += not orderly
        self._deadlines.clear((peer.peer_id, _FRAME))
        del self._peers[peer.peer_id]
        self._part(peer, now_ns, goodbye=orderly)
        farewell = encode(Refusal(code, reason)) if code else farewell
        was_guest = peer.snapshot is not None
        self._actions.append(Drop(peer.peer_id, str(peer), reason, orderly, was_guest, farewell, error))

    def _part(self, peer: Peer, now_ns: int, *, goodbye: bool) -> None:
        """Whatever it was, it is not any more, and nobody waits for its answers."""
        self._guests.pop(peer.peer_id, None)
        self.subscribers.discard(peer.peer_id)
        self._leasing.end(peer, goodbye=goodbye)
        self._collector.part(peer.peer_id, now_ns)

    # --- answers -----------------------------------------------------------------------------------------------

    def _send(self, peer_id: PeerId, message: Message) -> None:
        self._actions.append(Send(peer_id, encode(message)))

    def _answer_status(self, askers: list[PeerId], answered: set[PeerId], now_ns: int) -> None:
        try:
            frames = b"".join(map(encode, self._status_messages(answered, now_ns)))
        except Exception as error:  # noqa: BLE001 - it costs the askers their answer, and nobody else anything
            for peer_id in askers:
                self._fail(self._peers[peer_id], error, now_ns)
        else:
            for peer_id in askers:
                self._enter(self._peers[peer_id], next_state(self._peers[peer_id].state, PeerEvent.ANSWERED), now_ns)
                self._actions.append(Send(peer_id, frames))

    def _status_messages(self, answered: set[PeerId], now_ns: int) -> Iterator[Message]:
        for peer_id, peer in self._guests.items():
            yield guest_report(peer, self._leasing.books(peer), answered=peer_id in answered, now_ns=now_ns)
        yield StatusReply({**self._status(), "peers_dropped": self._dropped})

    # --- introspection -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the rules between two calls; only from the thread that makes the calls."""
        self._deadlines.check()
        self._leasing.check()
        self._collector.check()
        asking = self._collector.asking()
        for peer_id, peer in self._peers.items():
            peer.decoder.check()
            assert peer.state is not PeerState.CLOSED, peer
            assert (peer.state in _ASKING) == (peer_id in asking), peer
            assert (peer.state in _IN_A_HURRY) == ((peer_id, _OPENING) in self._deadlines), peer
            assert (not peer.decoder.at_boundary) == ((peer_id, _FRAME) in self._deadlines), peer
            assert (peer.state in _GUEST) == (peer.snapshot is not None) == (peer_id in self._guests), peer

    def statistics(self) -> SwitchboardStatistics:
        """A frozen copy of the counters."""
        return SwitchboardStatistics(
            len(self._peers), len(self._guests), self._opened, self._dropped, self._messages, self._collector.runs
        )
