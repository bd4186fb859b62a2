"""The daemon's conversations with all its peers: bytes and time in, actions out.  Pure; `server` owns the sockets.

Rules:

1. A peer does only what `TRANSITIONS` allows; whatever else it does, it alone is dropped, with a reason.
2. A peer that owes something has a deadline: a first message (`opening_ns`), the rest of a frame (`frame_ns`).  A guest
   that owes nothing may be silent for ever.
3. Nobody waits for a guest: counters are collected in runs, which end after `statistics_ns` at the latest, with the last
   known counters of those guests that did not answer.
4. A guest is asked for its counters only when it owes no answer, and sends them only when asked.  So a silent guest
   costs one unread frame, and a talkative one is dropped.
5. Every answer to a StatusRequest is of a run that began after the request came.  There is one run at a time; who asks
   meanwhile waits for the next.
6. The guests' ids rise from 1 and are not used again by this daemon.
7. Messages about grants go to `leasing`.  A guest whose lease is over is told so and dropped; an operator's new epoch is
   answered when nobody can have anything of the old one in its kernel, which takes one lease at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from coherency.daemon.actions import Action, Drop, Note, Send
from coherency.daemon.deadlines import Deadlines
from coherency.daemon.leasing import Leasing, OfGrants
from coherency.daemon.ledger import Round
from coherency.daemon.peer_states import Credentials, GuestSnapshot, Peer, PeerEvent, PeerId, PeerState, next_state
from coherency.daemon.reports import guest_report
from coherency.errors import MessageError, PeerError, ProtocolVersionError
from coherency.ids import Epoch, GrantKey
from coherency.protocol import (
    Evicted,
    Goodbye,
    Hello,
    Invalidated,
    InvalidateRequest,
    Message,
    Refusal,
    RefusalCode,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.protocol_fields import ReportValue


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of the control channel at the daemon; what happens beyond them stands in `docs/spec/control.md`."""

    peers: int = 1024
    opening_ns: int = 5_000_000_000
    frame_ns: int = 5_000_000_000
    statistics_ns: int = 500_000_000
    unsent_bytes: int = 1 << 20
    accept_pause_ns: int = 1_000_000_000


class SwitchboardStatistics(NamedTuple):
    """Connections now (`peers`, `guests`) and since the start: `opened`, `dropped` for a fault, `messages`, `runs`."""

    peers: int
    guests: int
    opened: int
    dropped: int
    messages: int
    runs: int


@dataclass(slots=True)
class _Run:
    """One collection of statistics: who asked, and which guests have not answered yet."""

    serial: int
    askers: list[PeerId]
    waiting: set[PeerId] = field(default_factory=set)
    answered: set[PeerId] = field(default_factory=set)


_GUEST: Final = (PeerState.GUEST, PeerState.GUEST_ASKING)
_ASKING: Final = (PeerState.GUEST_ASKING, PeerState.OPERATOR_ASKING)
_IN_A_HURRY: Final = (PeerState.OPENED, PeerState.OPERATOR)
"""States in which the peer owes a message: rule 2."""

_OPENING: Final = "opening"
_FRAME: Final = "frame"
_RUN_DEADLINE: Final = (PeerId(0), "run")


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
        self._run: _Run | None = None
        self._next_askers: list[PeerId] = []
        self._recalled: list[tuple[PeerId, Epoch]] = []
        self._opened = self._welcomed = self._dropped = self._messages = self._runs = 0

    # --- what the server calls ---------------------------------------------------------------------------------

    def take_actions(self) -> list[Action]:
        """What is to be done, each action once."""
        actions, self._actions = self._actions, []
        return actions

    @property
    def next_deadline_ns(self) -> int | None:
        """When `tick` must be called next at the latest."""
        due = [at_ns for at_ns in (self._deadlines.next_ns, self._leasing.next_deadline_ns) if at_ns is not None]
        return min(due, default=None)

    def opened(self, credentials: Credentials, now_ns: int) -> PeerId:
        """Somebody has connected."""
        self._opened += 1
        peer = Peer(PeerId(self._opened), credentials)
        self._peers[peer.peer_id] = peer
        if len(self._peers) + self._leasing.lost > self._limits.peers:
            self._drop(peer, "too many connections", now_ns, code=RefusalCode.FULL)
        else:
            self._deadlines.set((peer.peer_id, _OPENING), now_ns + self._limits.opening_ns)
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
            self._answer_invalidations(now_ns)

    def lost(self, peer_id: PeerId, reason: str, now_ns: int) -> None:
        """The connection is of no use any more, by `reason`."""
        if peer := self._peers.get(peer_id):
            self._drop(peer, reason, now_ns)

    def tick(self, now_ns: int) -> None:
        """Act on every deadline that is not after `now_ns`."""
        while due := self._deadlines.pop_due(now_ns):
            peer_id, what = due
            if due == _RUN_DEADLINE:
                self._finish_run(now_ns)
                continue
            reason = "began a frame and did not finish it" if what == _FRAME else "sent no request"
            limit_ns = self._limits.frame_ns if what == _FRAME else self._limits.opening_ns
            text = f"{reason} within {limit_ns / 1e9:g} s"
            self._drop(self._peers[peer_id], text, now_ns, event=PeerEvent.DEADLINE, code=RefusalCode.LATE)
        for session, connection, who in self._leasing.evict_due(now_ns):
            reason = f"its lease of {self._leasing.lease_ns / 1e9:g} s is over"
            if connection is None:
                self._actions.append(Note(who, reason))
            else:
                farewell = encode(Evicted(session))
                self._drop(self._peers[connection], reason, now_ns, event=PeerEvent.DEADLINE, farewell=farewell)
        self._answer_invalidations(now_ns)

    def recall(self, keys: Iterable[GrantKey] | None, wake: Callable[[], None], now_ns: int) -> Round:
        """Recall keys, or everything (None), from all who have them: see `Ledger.recall`."""
        round_, recalls = self._leasing.recall(keys, wake, now_ns)
        for peer_id, recall in recalls:
            self._actions.append(Send(peer_id, encode(recall)))
        return round_

    def end(self) -> None:
        """Forget everybody: the server has hung up.  Who has grants is lost, and waited for as before."""
        for peer in self._guests.values():
            self._leasing.end(peer, goodbye=False)
        self._peers.clear()
        self._guests.clear()
        self._actions.clear()
        self._run, self._next_askers = None, []
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
        follower = next_state(peer.state, type(message))
        if isinstance(message, Goodbye):
            self._drop(peer, "said goodbye", now_ns, event=PeerEvent.END, orderly=True)
            return
        self._enter(peer, follower, now_ns)
        if isinstance(message, Hello):
            self._take_in(peer, message, now_ns)
        elif isinstance(message, Statistics):
            self._counted(peer, message, now_ns)
        elif isinstance(message, StatusRequest):
            self._next_askers.append(peer.peer_id)
            self._start_run(now_ns)
        elif isinstance(message, InvalidateRequest):
            self._invalidate_for(peer, now_ns)
        elif isinstance(message, OfGrants) and (answer := self._leasing.answer(peer, message, now_ns)):
            self._actions.append(Send(peer.peer_id, encode(answer)))

    def _take_in(self, peer: Peer, hello: Hello, now_ns: int) -> None:
        former = self._leasing.end_former(hello, peer.credentials.uid)
        if former is not None:
            self._drop(self._peers[former], "has come again", now_ns, event=PeerEvent.END, orderly=True)
        self._welcomed += 1
        peer.snapshot = GuestSnapshot(
            self._welcomed, hello.name, hello.pid, hello.mode, peer.credentials, now_ns, statistics=None
        )
        self._guests[peer.peer_id] = peer
        try:
            self._leasing.begin(peer, hello, now_ns)
        except OSError as error:
            self._fail(peer, error, now_ns)
            return
        welcome = replace(self._welcome, guest_id=self._welcomed, session=peer.session)
        self._actions.append(Send(peer.peer_id, encode(welcome), joined=f"{peer}, mode {hello.mode}"))

    def _invalidate_for(self, peer: Peer, now_ns: int) -> None:
        if peer.credentials.uid not in (0, self._own_uid):
            reason = "may not invalidate: only root and the daemon's own user may"
            self._drop(peer, reason, now_ns, code=RefusalCode.PERMISSION)
            return
        try:
            epoch = self._invalidate()
        except Exception as error:  # noqa: BLE001 - it costs the asker its answer, and nobody else anything
            self._fail(peer, error, now_ns)
            return
        done = (peer.peer_id, epoch)
        if not self.recall(None, lambda: self._recalled.append(done), now_ns).pending:
            self._recalled.append(done)
            self._answer_invalidations(now_ns)

    def _answer_invalidations(self, now_ns: int) -> None:
        """Tell those for whom it is done.  The end of a round only notes it, since it may come in the middle of anything."""
        while self._recalled:
            peer_id, epoch = self._recalled.pop(0)
            if peer := self._peers.get(peer_id):
                self._enter(peer, next_state(peer.state, PeerEvent.ANSWERED), now_ns)
                self._actions.append(Send(peer_id, encode(Invalidated(epoch))))

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
        self._guests.pop(peer.peer_id, None)
        self._leasing.end(peer, goodbye=orderly)
        farewell = encode(Refusal(code, reason)) if code else farewell
        was_guest = peer.snapshot is not None
        self._actions.append(Drop(peer.peer_id, str(peer), reason, orderly, was_guest, farewell, error))
        if peer.peer_id in self._next_askers:
            self._next_askers.remove(peer.peer_id)
        if self._run is not None:
            if peer.peer_id in self._run.askers:
                self._run.askers.remove(peer.peer_id)
            self._leave_run(peer.peer_id, now_ns)

    # --- collecting statistics ---------------------------------------------------------------------------------

    def _start_run(self, now_ns: int) -> None:
        if self._run is not None or not self._next_askers:
            return
        self._runs += 1
        # 32 bits of it suffice: a serial only tells this run from the earlier one whose answer is still owed.
        self._run = _Run(self._runs & 0xFFFFFFFF, self._next_askers, set(self._guests))
        self._next_askers = []
        self._deadlines.set(_RUN_DEADLINE, now_ns + self._limits.statistics_ns)
        for peer in self._guests.values():
            self._ask(peer, self._run.serial)
        self._finish_run_if_complete(now_ns)

    def _ask(self, peer: Peer, serial: int) -> None:
        if peer.owed_serial is None:
            peer.owed_serial = serial
            self._actions.append(Send(peer.peer_id, encode(StatisticsRequest(serial))))

    def _counted(self, peer: Peer, statistics: Statistics, now_ns: int) -> None:
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
            self._leave_run(peer.peer_id, now_ns)
        else:
            self._ask(peer, run.serial)

    def _leave_run(self, peer_id: PeerId, now_ns: int) -> None:
        if self._run is not None:
            self._run.waiting.discard(peer_id)
            self._finish_run_if_complete(now_ns)

    def _finish_run_if_complete(self, now_ns: int) -> None:
        if self._run is not None and not self._run.waiting:
            self._finish_run(now_ns)

    def _finish_run(self, now_ns: int) -> None:
        run, self._run = self._run, None
        self._deadlines.clear(_RUN_DEADLINE)
        if run is None:
            return
        try:
            frames = b"".join(map(encode, self._status_messages(run.answered, now_ns)))
        except Exception as error:  # noqa: BLE001 - it costs the askers their answer, and nobody else anything
            for peer_id in run.askers:
                self._fail(self._peers[peer_id], error, now_ns)
        else:
            for peer_id in run.askers:
                self._enter(self._peers[peer_id], next_state(self._peers[peer_id].state, PeerEvent.ANSWERED), now_ns)
                self._actions.append(Send(peer_id, frames))
        self._start_run(now_ns)

    def _status_messages(self, answered: set[PeerId], now_ns: int) -> Iterator[Message]:
        for peer_id, peer in self._guests.items():
            yield guest_report(peer, self._leasing.books(peer), answered=peer_id in answered, now_ns=now_ns)
        yield StatusReply({**self._status(), "peers_dropped": self._dropped})

    # --- introspection -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the rules between two calls; only from the thread that makes the calls."""
        self._deadlines.check()
        self._leasing.check()
        run_askers = self._run.askers if self._run else []
        asking = [*run_askers, *self._next_askers]
        assert len(asking) == len(set(asking)), asking
        assert (_RUN_DEADLINE in self._deadlines) == (self._run is not None)
        assert self._run is not None or not self._next_askers, self._next_askers
        for peer_id, peer in self._peers.items():
            peer.decoder.check()
            assert peer.state is not PeerState.CLOSED, peer
            assert (peer.state in _ASKING) == (peer_id in asking), peer
            assert (peer.state in _IN_A_HURRY) == ((peer_id, _OPENING) in self._deadlines), peer
            assert (not peer.decoder.at_boundary) == ((peer_id, _FRAME) in self._deadlines), peer
            assert (peer.state in _GUEST) == (peer.snapshot is not None) == (peer_id in self._guests), peer
        if self._run:
            assert all(self._guests[peer_id].owed_serial is not None for peer_id in self._run.waiting)
            assert not self._run.waiting & self._run.answered

    def statistics(self) -> SwitchboardStatistics:
        """A frozen copy of the counters."""
        return SwitchboardStatistics(
            len(self._peers), len(self._guests), self._opened, self._dropped, self._messages, self._runs
        )
