"""The life of a connection as the daemon sees it: states and transitions as data, and what is known of each peer.

The code runs this table, `docs/spec/control.md` shows it, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple, NewType

from coherency.errors import MessageError
from coherency.protocol import (
    LINES,
    Ack,
    EvictRequest,
    Goodbye,
    Hello,
    InvalidateRequest,
    Message,
    Register,
    Release,
    Renew,
    Statistics,
    StatusRequest,
)
from coherency.protocol_events import Subscribe
from coherency.protocol_stream import Decoder


class PeerState(Enum):
    """What the daemon knows a connection to be."""

    OPENED = "opened"
    GUEST = "guest"
    GUEST_ASKING = "guest asking"
    OPERATOR = "operator"
    OPERATOR_ASKING = "operator asking"
    OPERATOR_INVALIDATING = "operator invalidating"
    OPERATOR_EVICTING = "operator evicting"
    CLOSED = "closed"


class PeerEvent(Enum):
    """What can happen to a connection besides a message."""

    ANSWERED = "answered"
    END = "end of stream"
    FAULT = "fault"
    DEADLINE = "deadline"
    LINE_HELLO = "Hello on a serial line"
    LINE_GOODBYE = "Goodbye on a serial line"


_OF_A_SESSION: Final = (Register, Release, Ack, Renew, Subscribe)
_GUESTS: Final = (PeerState.GUEST, PeerState.GUEST_ASKING)
_OPEN_STATES: Final = tuple(state for state in PeerState if state is not PeerState.CLOSED)

TRANSITIONS: Final[Mapping[tuple[PeerState, type[Message] | PeerEvent], PeerState]] = {
    (PeerState.OPENED, Hello): PeerState.GUEST,
    (PeerState.OPENED, StatusRequest): PeerState.OPERATOR_ASKING,
    (PeerState.OPENED, InvalidateRequest): PeerState.OPERATOR_INVALIDATING,
    (PeerState.OPENED, EvictRequest): PeerState.OPERATOR_EVICTING,
    (PeerState.GUEST, Statistics): PeerState.GUEST,
    (PeerState.GUEST, StatusRequest): PeerState.GUEST_ASKING,
    (PeerState.GUEST_ASKING, Statistics): PeerState.GUEST_ASKING,
    (PeerState.GUEST_ASKING, PeerEvent.ANSWERED): PeerState.GUEST,
    (PeerState.OPERATOR, StatusRequest): PeerState.OPERATOR_ASKING,
    (PeerState.OPERATOR, InvalidateRequest): PeerState.OPERATOR_INVALIDATING,
    (PeerState.OPERATOR, EvictRequest): PeerState.OPERATOR_EVICTING,
    (PeerState.OPERATOR_ASKING, PeerEvent.ANSWERED): PeerState.OPERATOR,
    (PeerState.OPERATOR_INVALIDATING, PeerEvent.ANSWERED): PeerState.OPERATOR,
    (PeerState.OPERATOR_EVICTING, PeerEvent.ANSWERED): PeerState.OPERATOR,
    **{(PeerState.GUEST, message): PeerState.GUEST for message in _OF_A_SESSION},
    **{(PeerState.GUEST_ASKING, message): PeerState.GUEST_ASKING for message in _OF_A_SESSION},
    **{(state, PeerEvent.LINE_HELLO): PeerState.GUEST for state in _GUESTS},
    **{(state, PeerEvent.LINE_GOODBYE): PeerState.OPENED for state in _GUESTS},
    **{(state, Goodbye): PeerState.CLOSED for state in _OPEN_STATES},
    **{(state, PeerEvent.END): PeerState.CLOSED for state in _OPEN_STATES},
    **{(state, PeerEvent.FAULT): PeerState.CLOSED for state in _OPEN_STATES},
    **{(state, PeerEvent.DEADLINE): PeerState.CLOSED for state in _OPEN_STATES},
}


def next_state(state: PeerState, happened: type[Message] | PeerEvent) -> PeerState:
    """The state after a message or an event.  Raises `MessageError` for what the state has no line for."""
    follower = TRANSITIONS.get((state, happened))
    if follower is None:
        what = happened.value if isinstance(happened, PeerEvent) else happened.__name__
        raise MessageError(f"{what} does not belong into the state '{state.value}'")
    return follower


PeerId = NewType("PeerId", int)
"""Number of a connection, from 1, never used again."""


class Credentials(NamedTuple):
    """What the kernel says about the process that connected."""

    pid: int
    uid: int


class GuestSnapshot(NamedTuple):
    """A guest as it was at one moment.  `pid` and `mode` are what it said itself; `statistics` what it sent last."""

    guest_id: int
    name: str
    pid: int
    mode: str
    credentials: Credentials
    connected_at_ns: int
    statistics: Statistics | None
    line: str = LINES[0]


@dataclass(slots=True)
class Peer:
    """A connection that the daemon has.

    `snapshot`: what a guest is known to be, None for others; `session`: a guest's, 0 for others; `owed_serial`: the
    request for statistics that it has not answered; `is_serial_line`: agents use it one after the other.
    """

    peer_id: PeerId
    credentials: Credentials
    state: PeerState = PeerState.OPENED
    decoder: Decoder = field(default_factory=Decoder)
    snapshot: GuestSnapshot | None = None
    session: int = 0
    owed_serial: int | None = None
    is_serial_line: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether it has never sent anything."""
        return not self.decoder.statistics().received_bytes

    def happened(self, message: Message) -> type[Message] | PeerEvent:
        """What this message is for `TRANSITIONS`: a serial line outlives the guests on it."""
        if self.is_serial_line and self.snapshot is not None:
            if isinstance(message, Hello):
                return PeerEvent.LINE_HELLO
            if isinstance(message, Goodbye):
                return PeerEvent.LINE_GOODBYE
        return type(message)

    def __str__(self) -> str:
        title = f"guest '{self.snapshot.name}' " if self.snapshot else ""
        return f"{title}peer {self.peer_id} (pid {self.credentials.pid}, uid {self.credentials.uid})"
