"""The control protocol: bytes in, messages out.  Nothing here has ever seen a socket.

The normative text is `docs/spec/control.md`; a test compares its tables with the tables below.

Rules:

1. A frame is header and payload; `protocol_stream` cuts streams into frames.
2. Whatever a payload holds, the outcome is a message or a `PeerError`, and the memory needed is bounded by `MAX_ITEMS`
   objects per nesting level of msgpack.
3. A message that leaves `decode_payload` has the right number of fields, each of the right kind, length and range.
   Nobody behind it checks again.
4. The first field of every message that may open a connection, and of `Welcome`, is the protocol version, in every
   version of the protocol; it is judged before the others.
5. A type id belongs to one message for ever.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from typing import Annotated, Any, Final, NamedTuple, get_args, get_type_hints

import msgpack

from coherency.errors import MessageError, ProtocolVersionError
from coherency.ids import GrantKey
from coherency.leases import MAX_KEYS_PER_MESSAGE
from coherency.protocol_events import Happened, Subscribe
from coherency.protocol_fields import MAX_ITEMS, Choice, Flag, Keys, Kind, Path, Report, ReportValue, Text, Unsigned

PROTOCOL_VERSION: Final = 1

# --- frames --------------------------------------------------------------------------------------------------------

MAGIC: Final = b"COH1"
HEADER: Final = struct.Struct("<4sII")
"""Magic, length of the payload in bytes, CRC-32 (as in zlib) of the payload; little-endian."""
MAX_FRAME_BYTES: Final = 65536
MAX_PAYLOAD_BYTES: Final = MAX_FRAME_BYTES - HEADER.size

# --- messages ------------------------------------------------------------------------------------------------------

MODES: Final = ("none", "auto", "always", "access", "prompt", "strict")
"""What a guest may say about its cache: design section 5."""

LINES: Final = ("socket", "serial")
"""How a guest is connected: by a socket of its own, or by a serial line that outlives it (virtio-serial in a VM)."""

U32 = Annotated[int, Unsigned(32)]
U64 = Annotated[int, Unsigned(64)]
ModeField = Annotated[str, Choice(MODES)]
LineField = Annotated[str, Choice(LINES)]
PathField = Annotated[str, Path()]
SHORT_TEXT_BYTES: Final = 64
ShortText = Annotated[str, Text(1, SHORT_TEXT_BYTES)]
KeysField = Annotated[tuple[GrantKey, ...], Keys(MAX_KEYS_PER_MESSAGE)]


class RefusalCode(IntEnum):
    """Why the daemon says no."""

    VERSION = 1
    FULL = 2
    PERMISSION = 3
    FAULT = 4
    LATE = 5
    INTERNAL = 6
    UNKNOWN = 7


@dataclass(frozen=True, slots=True)
class Hello:
    """A guest introduces itself.  `pid` is its own idea of its process id: in a VM it is nobody's on the host.

    `former` is the session of its connection before this one, 0 if there was none.  Saying hello asserts that the
    guest's kernel has nothing any more of what was granted then.  `nonce` comes back in the Welcome.
    """

    name: ShortText
    pid: U32
    mode: ModeField
    former: U64
    line: LineField = "socket"
    nonce: U64 = 0
    protocol: U32 = field(default=PROTOCOL_VERSION, kw_only=True)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The daemon takes the guest in; the frame carries the table's read-only descriptor, except on a serial line.

    `session` is random and never 0.  `lease_ns` is how long the guest may grant, counted from the sending of its Hello
    and of each Renew that is answered.
    """

    guest_id: U32
    session: U64
    lease_ns: U64
    table_id_high: U64
    table_id_low: U64
    table_bytes: U64
    trust_ns: U64
    share: PathField
    export: PathField
    nonce: U64 = 0
    protocol: U32 = field(default=PROTOCOL_VERSION, kw_only=True)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The daemon says no and closes the connection."""

    code: U32
    text: Annotated[str, Text(1, 256)]


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The peer leaves in good order."""


@dataclass(frozen=True, slots=True)
class StatisticsRequest:
    """The daemon asks a guest for its counters."""

    serial: U32


@dataclass(frozen=True, slots=True)
class Statistics:
    """A guest's counters since it started.  `serial` is that of the request."""

    serial: U32
    hits: U64
    misses: U64
    refreshes: U64
    lower_requests: U64
    entries: U64


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Somebody asks how the daemon and its guests are."""

    protocol: U32 = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class GuestReport:
    """One guest in the answer to a StatusRequest.  The counters up to `entries` are the last known ones unless `answered`."""

    guest_id: U32
    name: ShortText
    pid: U32
    mode: ModeField
    connected_for_ns: U64
    answered: Annotated[bool, Flag()]
    hits: U64
    misses: U64
    refreshes: U64
    lower_requests: U64
    entries: U64
    keys: U64
    recalls: U64
    unacked: U64
    lease_left_ns: U64
    line: LineField = "socket"


@dataclass(frozen=True, slots=True)
class StatusReply:
    """The daemon's own part of the answer to a StatusRequest, and its end."""

    report: Annotated[dict[str, ReportValue], Report()]


@dataclass(frozen=True, slots=True)
class InvalidateRequest:
    """The operator wants everything distrusted."""

    protocol: U32 = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Invalidated:
    """It is: nothing cached before this epoch validates any more."""

    epoch: U64


@dataclass(frozen=True, slots=True)
class EvictRequest:
    """The operator wants a guest to go: all of this name, or the one with this id."""

    guest: ShortText
    protocol: U32 = field(default=PROTOCOL_VERSION, kw_only=True)


@dataclass(frozen=True, slots=True)
class EvictReply:
    """They have gone, and their kernels have nothing any more of what was granted."""

    guests: U32


@dataclass(frozen=True, slots=True)
class Register:
    """A guest wants to be told before what these keys stand for changes.  `serial` rises and never repeats in a session."""

    session: U64
    serial: U64
    keys: KeysField


@dataclass(frozen=True, slots=True)
class Confirm:
    """It will be: from the keys of this registration a guest may grant, in this epoch, until they are recalled."""

    session: U64
    serial: U64
    epoch: U64


@dataclass(frozen=True, slots=True)
class Release:
    """The guest's kernel has nothing any more of what these keys stand for, and it need not be told."""

    session: U64
    keys: KeysField


@dataclass(frozen=True, slots=True)
class Recall:
    """Forget what these keys stand for, grant no more of it until it is registered again, and say so.  No keys: all.

    `serial` counts the recalls of this guest from 1.
    """

    session: U64
    serial: U64
    keys: KeysField


@dataclass(frozen=True, slots=True)
class Ack:
    """The guest has done so for all recalls up to this one."""

    session: U64
    serial: U64


@dataclass(frozen=True, slots=True)
class Renew:
    """The guest is alive.  `serial` rises with each."""

    session: U64
    serial: U64


@dataclass(frozen=True, slots=True)
class Renewed:
    """The lease has begun anew when that Renew was sent.  A guest that owes an Ack does not get it."""

    session: U64
    serial: U64


@dataclass(frozen=True, slots=True)
class Evicted:
    """The guest's lease is over: it must forget everything before it says hello again.  The daemon hangs up."""

    session: U64


Message = (
    Hello | Welcome | Refusal | Goodbye | StatisticsRequest | Statistics
    | StatusRequest | GuestReport | StatusReply | InvalidateRequest | Invalidated | EvictRequest | EvictReply
    | Register | Confirm | Release | Recall | Ack | Renew | Renewed | Evicted
    | Subscribe | Happened
)  # fmt: skip


class Side(Enum):
    """Who sends a message."""

    DAEMON = "daemon"
    GUEST = "guest"
    OPERATOR = "operator"


class Entry(NamedTuple):
    """One line of the catalogue.  `replies`: what may answer it; `descriptors`: how many go with the frame."""

    type_id: int
    message: type[Message]
    senders: tuple[Side, ...]
    replies: tuple[type[Message], ...] = ()
    descriptors: int = 0


_EITHER = (Side.GUEST, Side.OPERATOR)
CATALOGUE: Final = (
    Entry(0x01, Hello, (Side.GUEST,), (Welcome, Refusal)),
    Entry(0x02, Welcome, (Side.DAEMON,), descriptors=1),
    Entry(0x03, Refusal, (Side.DAEMON,)),
    Entry(0x04, Goodbye, _EITHER),
    Entry(0x10, StatisticsRequest, (Side.DAEMON,), (Statistics,)),
    Entry(0x11, Statistics, (Side.GUEST,)),
    Entry(0x20, StatusRequest, _EITHER, (GuestReport, StatusReply, Refusal)),
    Entry(0x21, GuestReport, (Side.DAEMON,)),
    Entry(0x22, StatusReply, (Side.DAEMON,)),
    Entry(0x23, InvalidateRequest, (Side.OPERATOR,), (Invalidated, Refusal)),
    Entry(0x24, Invalidated, (Side.DAEMON,)),
    Entry(0x25, EvictRequest, (Side.OPERATOR,), (EvictReply, Refusal)),
    Entry(0x26, EvictReply, (Side.DAEMON,)),
    Entry(0x30, Register, (Side.GUEST,), (Confirm,)),
    Entry(0x31, Confirm, (Side.DAEMON,)),
    Entry(0x32, Release, (Side.GUEST,)),
    Entry(0x33, Recall, (Side.DAEMON,), (Ack,)),
    Entry(0x34, Ack, (Side.GUEST,)),
    Entry(0x35, Renew, (Side.GUEST,), (Renewed,)),
    Entry(0x36, Renewed, (Side.DAEMON,)),
    Entry(0x37, Evicted, (Side.DAEMON,)),
    Entry(0x40, Subscribe, (Side.GUEST,)),
    Entry(0x41, Happened, (Side.DAEMON,)),
)


class _Layout(NamedTuple):
    type_id: int
    message: type[Message]
    wire: tuple[tuple[str, Kind], ...]

    @property
    def versioned(self) -> bool:
        return self.wire[:1] != () and self.wire[0][0] == "protocol"


def wire_fields(message: type[Message]) -> tuple[tuple[str, Kind], ...]:
    """The fields of a message as they follow each other on the wire (rule 4: `protocol` first), each with its kind."""
    hints = get_type_hints(message, include_extras=True)
    ordered = sorted((each.name for each in fields(message)), key=lambda name: name != "protocol")
    return tuple((name, get_args(hints[name])[1]) for name in ordered)


_LAYOUTS: Final = {each.message: _Layout(each.type_id, each.message, wire_fields(each.message)) for each in CATALOGUE}
_LAYOUT_OF_ID: Final = {layout.type_id: layout for layout in _LAYOUTS.values()}


def encode(message: Message) -> bytes:
    """One frame.  Raises `ValueError` if a field is out of its range: the sender's own mistake."""
    layout = _LAYOUTS[type(message)]
    payload: list[object] = [layout.type_id]
    for name, kind in layout.wire:
        try:
            payload.append(kind.dump(getattr(message, name)))
        except ValueError as error:
            raise ValueError(f"{layout.message.__name__}.{name}: {error}") from None
    packed: bytes = msgpack.packb(payload)
    if len(packed) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{layout.message.__name__}: {len(packed)} bytes are too long for a frame")
    return HEADER.pack(MAGIC, len(packed), zlib.crc32(packed)) + packed


def decode_payload(payload: bytes) -> Message:
    """The message in a sound frame.  Raises `MessageError`, or `ProtocolVersionError` by rule 4."""
    try:
        # The limits are those of rule 2: msgpack allocates what an array's head announces before it reads the elements.
        items = msgpack.unpackb(payload, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise MessageError(f"the payload is no msgpack that we take: {type(error).__name__}") from None
    if type(items) is not list or not items or type(items[0]) is not int:
        raise MessageError("the payload is no array that begins with a type id")
    layout = _LAYOUT_OF_ID.get(items[0])
    if layout is None:
        raise MessageError(f"unknown type id {items[0]}")
    values, title = items[1:], layout.message.__name__
    if values and type(values[0]) is int and layout.versioned and values[0] != PROTOCOL_VERSION:
        raise ProtocolVersionError(f"{title}: the peer speaks version {values[0]}, we speak {PROTOCOL_VERSION}")
    if len(values) != len(layout.wire):
        raise MessageError(f"{title}: {len(values)} fields instead of {len(layout.wire)}")
    arguments = {}
    for (name, kind), value in zip(layout.wire, values, strict=True):
        try:
            arguments[name] = kind.load(value)
        except ValueError as error:
            raise MessageError(f"{title}.{name}: {error}") from None
    build: Any = layout.message
    message: Message = build(**arguments)
    return message
