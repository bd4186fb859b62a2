"""The control protocol: bytes in, messages out.  Nothing here has ever seen a socket.

The normative text is `docs/spec/control.md`; a test compares its tables with the tables below.

Rules:

1. A frame is header and payload; it is looked at only when it is complete and its checksum is right.
2. Whatever bytes arrive, in whatever pieces, the outcome is messages or a `PeerError`, and the memory needed is bounded
   by one frame, one read and `MAX_ITEMS` objects per nesting level of msgpack.
3. A message that leaves `Decoder.feed` has the right number of fields, each of the right kind, length and range.
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

from coherency.errors import FrameError, MessageError, PeerError, ProtocolVersionError
from coherency.ids import GrantKey
from coherency.leases import MAX_KEYS_PER_MESSAGE
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

U32 = Annotated[int, Unsigned(32)]
U64 = Annotated[int, Unsigned(64)]
ModeField = Annotated[str, Choice(MODES)]
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


@dataclass(frozen=True, slots=True)
class Hello:
    """A guest introduces itself.  `pid` is its own idea of its process id: in a VM it is nobody's on the host.

    `former` is the session of its connection before this one, 0 if there was none.  Saying hello asserts that the
    guest's kernel has nothing any more of what was granted then.
    """

    name: ShortText
    pid: U32
    mode: ModeField
    former: U64
    protocol: U32 = field(default=PROTOCOL_VERSION, kw_only=True)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The daemon takes the guest in; the frame carries the table's read-only descriptor.

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
    Hello
    | Welcome
    | Refusal
    | Goodbye
    | StatisticsRequest
    | Statistics
    | StatusRequest
    | GuestReport
    | StatusReply
    | InvalidateRequest
    | Invalidated
    | Register
    | Confirm
    | Release
    | Recall
    | Ack
    | Renew
    | Renewed
    | Evicted
)


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
    Entry(0x30, Register, (Side.GUEST,), (Confirm,)),
    Entry(0x31, Confirm, (Side.DAEMON,)),
    Entry(0x32, Release, (Side.GUEST,)),
    Entry(0x33, Recall, (Side.DAEMON,), (Ack,)),
    Entry(0x34, Ack, (Side.GUEST,)),
    Entry(0x35, Renew, (Side.GUEST,), (Renewed,)),
    Entry(0x36, Renewed, (Side.DAEMON,)),
    Entry(0x37, Evicted, (Side.DAEMON,)),
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


class DecoderStatistics(NamedTuple):
    """`frames` and `received_bytes` since the start; `held_bytes` now."""

    frames: int
    received_bytes: int
    held_bytes: int


class Decoder:
    """Cuts one peer's stream into messages.  Not for several threads at once."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fault: PeerError | None = None
        self._frames = 0
        self._received_bytes = 0

    @property
    def at_boundary(self) -> bool:
        """True if no frame has been begun: a stream that ends elsewhere was cut off."""
        return not self._buffer

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by `data`, in their order.

        Raises `PeerError` as soon as the bytes cannot become messages any more, and from then on at every call: the
        stream has no later point that could be trusted.  Messages that came in the same call are lost with it.
        """
        if self._fault is not None:
            raise self._fault
        self._received_bytes += len(data)
        self._buffer += data
        messages = []
        try:
            while (payload := self._take_payload()) is not None:
                messages.append(decode_payload(payload))
                self._frames += 1
        except PeerError as fault:
            self._fault = fault
            self._buffer.clear()
            raise
        return messages

    def _take_payload(self) -> bytes | None:
        held = self._buffer
        if not MAGIC.startswith(held[: len(MAGIC)]):
            raise FrameError("a frame without the magic")
        if len(held) >= HEADER.size - 4:
            length_bytes = int.from_bytes(held[4:8], "little")
            if length_bytes > MAX_PAYLOAD_BYTES:
                raise FrameError(f"a payload of {length_bytes} bytes, at most {MAX_PAYLOAD_BYTES} are allowed")
            end = HEADER.size + length_bytes
            if len(held) >= end:
                checksum = int.from_bytes(held[8:12], "little")
                payload = bytes(held[HEADER.size : end])
                del held[:end]
                if zlib.crc32(payload) != checksum:
                    raise FrameError("a payload with another checksum than its header says")
                return payload
        return None

    def check(self) -> None:
        """Assert rule 2: between calls less than one frame is held, and nothing after a fault."""
        assert len(self._buffer) < MAX_FRAME_BYTES, self
        assert self._fault is None or not self._buffer, self
        assert self._frames * HEADER.size + len(self._buffer) <= self._received_bytes, self

    def statistics(self) -> DecoderStatistics:
        """A frozen copy of the counters."""
        return DecoderStatistics(self._frames, self._received_bytes, len(self._buffer))
