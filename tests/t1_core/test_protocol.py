"""Framing and messages: what goes in comes out, and everything else is a `PeerError` that costs little memory."""

import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coherency import protocol
from coherency.errors import FrameError, MessageError, PeerError, ProtocolVersionError, UsageError
from coherency.events import Event, EventKind
from coherency.ids import HostInode
from coherency.protocol import (
    CATALOGUE,
    HEADER,
    MAX_FRAME_BYTES,
    MAX_PAYLOAD_BYTES,
    Goodbye,
    GuestReport,
    Hello,
    Message,
    Refusal,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    decode_payload,
    encode,
)
from coherency.protocol_events import MAX_EVENTS_PER_MESSAGE, Happened
from coherency.protocol_fields import MAX_ITEMS, Choice, Flag, Happenings, Kind, Path, Report, Text, Unsigned
from coherency.protocol_stream import Decoder
from coherency.rendezvous import check_share_name
from tests.control_messages import REPORT, frame, messages, packed

HELLO = Hello(name="guest-1", pid=4711, mode="access", former=0)


def fed(data: bytes, cuts: list[int]) -> tuple[list[Message], PeerError | None]:
    """What a decoder makes of `data` in pieces: the messages, and the error that ended them."""
    decoder, decoded = Decoder(), []
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    for start, end in pairwise(edges):
        try:
            decoded += decoder.feed(data[start:end])
        except PeerError as error:
            decoder.check()
            return decoded, error
        decoder.check()
    return decoded, None


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [entry.message for entry in CATALOGUE])
def test_every_message_comes_back(kind: type[Message]) -> None:
    @given(messages(kind))
    def comes_back(message: Message) -> None:
        decoder = Decoder()
        assert decoder.feed(encode(message)) == [message]
        assert decoder.at_boundary

    comes_back()


@given(st.lists(messages(), max_size=5))
def test_byte_by_byte(sent: list[Message]) -> None:
    data = b"".join(map(encode, sent))
    assert fed(data, list(range(len(data)))) == (sent, None)


@given(st.lists(messages(), max_size=8), st.lists(st.integers(0, 5000)))
def test_any_cuts(sent: list[Message], cuts: list[int]) -> None:
    assert fed(b"".join(map(encode, sent)), cuts) == (sent, None)


def test_the_bytes_of_a_hello_are_those_of_the_specification() -> None:
    """Frozen: a change of these bytes is another version of the protocol."""
    header, payload = "434f48311e000000e0c38daf", "980101a767756573742d31cd1267a661636365737300a6736f636b657400"
    assert encode(HELLO).hex() == header + payload


def test_a_longest_frame_is_taken_and_a_longer_one_is_not() -> None:
    decoder = Decoder()
    with pytest.raises(MessageError, match="begins with a type id"):
        decoder.feed(frame(msgpack.packb(b"x" * (MAX_PAYLOAD_BYTES - 3))))
    assert decoder.statistics().received_bytes == MAX_FRAME_BYTES

    with pytest.raises(FrameError, match="65525 bytes"):
        Decoder().feed(frame(msgpack.packb(b"x" * (MAX_PAYLOAD_BYTES - 2)))[:8])


# --- frames that are none ------------------------------------------------------------------------------------------

DAMAGED: dict[str, bytes] = {
    "magic": frame(encode(HELLO)[HEADER.size :], magic=b"COH2"),
    "first byte": b"\0",
    "length": frame(encode(HELLO)[HEADER.size :], length=MAX_PAYLOAD_BYTES + 1),
    "endless": frame(b"", length=0xFFFFFFFF),
    "checksum": frame(encode(HELLO)[HEADER.size :], checksum=0),
    "shorter than it says": frame(encode(HELLO)[HEADER.size :], length=10) + encode(HELLO),
    "payload": encode(HELLO)[:-1] + b"\xff",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("before", [b"", encode(StatusRequest())], ids=["first", "second"])
def test_damaged_frames(damage: str, before: bytes) -> None:
    data = before + DAMAGED[damage]
    for cuts in ([], list(range(len(data)))):
        decoded, error = fed(data, cuts)
        assert type(error) is FrameError
        assert decoded == ([] if not (before and cuts) else [StatusRequest()])


def test_negative_control_the_same_frames_undamaged_are_taken() -> None:
    payload = encode(HELLO)[HEADER.size :]
    assert fed(frame(payload), []) == ([HELLO], None)


def test_damage_is_seen_at_the_first_byte_that_shows_it() -> None:
    decoder = Decoder()
    assert decoder.feed(b"CO") == []
    with pytest.raises(FrameError, match="magic"):
        decoder.feed(b"x")

    decoder = Decoder()
    assert decoder.feed(frame(b"", length=0xFFFFFFFF)[:7]) == []
    with pytest.raises(FrameError, match="4294967295"):
        decoder.feed(b"\xff")


def test_after_a_fault_nothing_is_decoded_any_more() -> None:
    decoder = Decoder()
    with pytest.raises(FrameError) as first:
        decoder.feed(b"xxxx")
    with pytest.raises(FrameError) as second:
        decoder.feed(encode(HELLO))
    assert second.value is first.value
    assert decoder.statistics().held_bytes == 0
    decoder.check()


def test_boundaries() -> None:
    decoder, data = Decoder(), encode(HELLO)
    at_boundary = [decoder.at_boundary]
    for piece in (data[:1], data[1:] + data[:-1], data[-1:]):
        decoder.feed(piece)
        at_boundary.append(decoder.at_boundary)
    assert at_boundary == [True, False, False, True]
    assert decoder.statistics().frames == 2


# --- payloads that are no message ----------------------------------------------------------------------------------

COUNTERS = [1, 2, 3, 4, 5]
EVENT = [1, 7, False, 1, b"name", 0, b"", 0]
NO_MESSAGES: dict[str, object] = {
    "nothing": [],
    "a map": {1: 2},
    "a number": 7,
    "text type id": ["Hello"],
    "true as type id": [True],
    "unknown type id": [0x7F],
    "keys that are no multiple of four bytes": [0x32, 1, bytes(7)],
    "more keys than one message may have": [0x32, 1, bytes(4 * 4097)],
    "keys as a list": [0x32, 1, [1, 2]],
    "negative type id": [-1],
    "huge type id": [2**64 - 1],
    "too few fields": [0x11, 1, *COUNTERS[1:]],
    "too many fields": [0x11, 1, *COUNTERS, 0],
    "field for none": [0x04, 1],
    "true as number": [0x10, True],
    "float as number": [0x10, 1.0],
    "text as number": [0x10, "1"],
    "nil as number": [0x10, None],
    "negative": [0x10, -1],
    "beyond 32 bits": [0x10, 2**32],
    "empty name": [0x01, 1, "", 1, "none", 0, "socket", 0],
    "long name": [0x01, 1, "n" * 65, 1, "none", 0, "socket", 0],
    "long name in bytes only": [0x01, 1, "é" * 33, 1, "none", 0, "socket", 0],
    "binary name": [0x01, 1, b"name", 1, "none", 0, "socket", 0],
    "line break in a name": [0x01, 1, "guest\ndropping peer 7", 1, "none", 0, "socket", 0],
    "terminal escape in a name": [0x01, 1, "\x1b[2J", 1, "none", 0, "socket", 0],
    "unknown mode": [0x01, 1, "name", 1, "writeback", 0, "socket", 0],
    "list as mode": [0x01, 1, "name", 1, ["none"], 0, "socket", 0],
    "unknown line": [0x01, 1, "name", 1, "none", 0, "pipe", 0],
    "list as name": [0x01, 1, ["name"], 1, "none", 0, "socket", 0],
    "nul in a path": [0x02, 1, 1, 5, 9, 1, 1, 1, 1, b"/a\0b", b"/e", 0],
    "empty path": [0x02, 1, 1, 5, 9, 1, 1, 1, 1, b"", b"/e", 0],
    "long path": [0x02, 1, 1, 5, 9, 1, 1, 1, 1, b"/" * 4096, b"/e", 0],
    "text as path": [0x02, 1, 1, 5, 9, 1, 1, 1, 1, "/a", b"/e", 0],
    "number as flag": [0x21, 1, "n", 1, "none", 0, 1, *COUNTERS, 0, 0, 0, 0, "socket"],
    "version as text": [0x20, "1"],
    "no version": [0x20],
    "events as text": [0x41, 0, "x"],
    "an event as a number": [0x41, 0, [1]],
    "an event with a field less": [0x41, 0, [EVENT[:-1]]],
    "an event of no kind": [0x41, 0, [[0, *EVENT[1:]]]],
    "an event of an unknown kind": [0x41, 0, [[6, *EVENT[1:]]]],
    "an event with a path for a name": [0x41, 0, [[*EVENT[:4], b"a/b", *EVENT[5:]]]],
    "an event with a zero byte in its name": [0x41, 0, [[*EVENT[:4], b"a\0", *EVENT[5:]]]],
    "an event with the name ..": [0x41, 0, [[*EVENT[:6], b"..", 0]]],
    "an event with a long name": [0x41, 0, [[*EVENT[:4], b"n" * 256, *EVENT[5:]]]],
    "an event with text for a name": [0x41, 0, [[*EVENT[:4], "name", *EVENT[5:]]]],
    "an event with a negative inode": [0x41, 0, [[1, -1, *EVENT[2:]]]],
    "an event with a number for a flag": [0x41, 0, [[1, 7, 0, *EVENT[3:]]]],
    "report as list": [0x22, [1]],
    "report with a missing key": [0x22, {"name": "x"}],
    "report with a list": [0x22, Report().dump(REPORT) | {"more": [1]}],
    "report with true": [0x22, Report().dump(REPORT) | {"more": True}],
    "report with long text": [0x22, Report().dump(REPORT) | {"more": "x" * 257}],
    "report with a wrong kind": [0x22, Report().dump(REPORT) | {"epoch": "3"}],
    "report with an empty key": [0x22, Report().dump(REPORT) | {"": 3}],
    "report with too many keys": [0x22, Report().dump(REPORT) | {f"key{number}": 1 for number in range(MAX_ITEMS)}],
}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_no_messages(name: str) -> None:
    with pytest.raises(MessageError):
        Decoder().feed(packed(NO_MESSAGES[name]))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",  # never used by msgpack
        b"\x95\x01",  # an array that ends too early
        b"\x91\x04\x00",  # something behind it
        b"\x92\x10\xd9\x02\xff\xfe",  # text that is no UTF-8
        b"\x92\x22\x81\x91\x01\x01",  # a list as a key
        b"\x92\x22\x81\xc4\x01\x61\x01",  # binary as a key
        b"\x92\x10\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x92\x10\xc7\x00\x05",  # an empty extension
        b"\x92\x10\xc7\x00\xff",  # an empty timestamp
        b"\xc7\x08\x01" + bytes(8),  # an extension
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # binary of as many
        b"\x91" * 60000,  # arrays in arrays
        b"\x81\xa1a" * 20000,  # maps in maps
    ],
    ids=lambda payload: payload[:8].hex(),
)
def test_no_msgpack(payload: bytes) -> None:
    with pytest.raises(MessageError):
        Decoder().feed(frame(payload))


def test_another_version_is_told_from_nonsense_whatever_its_other_fields() -> None:
    for items in ([0x01, 2], [0x01, 2, {"caps": [1]}], [0x20, 0], [0x23, 7, 7], [0x02, 2, "x"]):
        with pytest.raises(ProtocolVersionError, match=f"version {items[1]}, we speak 1"):
            Decoder().feed(packed(items))


def test_errors_say_where_they_are_and_fit_into_a_refusal() -> None:
    for name, items in NO_MESSAGES.items():
        with pytest.raises(MessageError) as caught:
            Decoder().feed(packed(items))
        encode(Refusal(protocol.RefusalCode.FAULT, str(caught.value)))
        if "mode" in name:
            assert str(caught.value).startswith("Hello.mode: ")


# --- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises((PeerError, ValueError)):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# 500 arrays in each other, each announcing as many elements as the bytes that follow could hold.
NESTED_ANNOUNCEMENTS = b"\xdc\xf0\x00" * 500 + b"\x01" * 62000
MANY_ITEMS = b"\xdc\xf0\x00" + b"\x90" * 61440


@pytest.mark.parametrize(
    "payload",
    [NESTED_ANNOUNCEMENTS, MANY_ITEMS, b"\x91" * 65000, b"\xdd\xff\xff\xff\xff" * 10000, b"\x81\xa1a" * 20000],
    ids=["announcements", "items", "depth", "endless", "maps"],
)
def test_hostile_containers_need_little_memory(payload: bytes) -> None:
    assert peak_bytes(lambda: Decoder().feed(frame(payload))) < 2_000_000


def test_negative_control_without_limits_they_need_much() -> None:
    assert peak_bytes(lambda: msgpack.unpackb(NESTED_ANNOUNCEMENTS)) > 20_000_000


def test_a_decoder_holds_less_than_a_frame_however_much_it_is_fed() -> None:
    decoder, data = Decoder(), encode(Refusal(1, "x" * 256)) * 1000
    for start in range(0, len(data), 65536):
        decoder.feed(data[start : start + 65536])
        assert decoder.statistics().held_bytes < len(data) // 1000
    assert decoder.statistics() == (1000, len(data), 0, 0)


# --- what we send --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        StatisticsRequest(-1),
        StatisticsRequest(2**32),
        StatisticsRequest(True),
        Statistics(1, 2**64, 0, 0, 0, 0),
        Hello(name="", pid=1, mode="none", former=0),
        Hello(name="a\tb", pid=1, mode="none", former=0),
        Hello(name="a", pid=1, mode="sometimes", former=0),
        Refusal(1, ""),
        StatusReply({}),
        StatusReply({**REPORT, "share": ""}),
        StatusReply({**REPORT, "share": "a\0b"}),
        StatusReply({**REPORT, "share": "\ud800"}),
        GuestReport(1, "n", 1, "none", -1, True, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    ],
    ids=repr,
)
def test_what_no_peer_would_take_is_not_sent(message: Message) -> None:
    with pytest.raises(ValueError, match=rf"^{type(message).__name__}\.\w+: "):
        encode(message)


NUMBER = HostInode(2**64 - 1)


def test_no_legal_message_is_too_long_for_a_frame() -> None:
    most = {"name": "n" * 64, "share": "s" * 4095, "export": "e" * 4095}
    longest = Event(EventKind.RENAMED, NUMBER, True, NUMBER, b"n" * 255, NUMBER, b"m" * 255, NUMBER)
    assert len(encode(Happened(2**64 - 1, (longest,) * MAX_EVENTS_PER_MESSAGE))) < MAX_FRAME_BYTES
    report = {**REPORT, **most} | {f"{number:064}": "x" * 256 for number in range(MAX_ITEMS - len(REPORT))}
    assert len(encode(StatusReply(report))) < MAX_FRAME_BYTES


def test_a_path_is_any_bytes() -> None:
    share = b"/srv/\xff\xfe\n".decode("utf-8", "surrogateescape")
    (message,) = Decoder().feed(encode(StatusReply({**REPORT, "share": share})))
    assert isinstance(message, StatusReply)
    assert message.report["share"] == share


def test_an_empty_message_is_one_byte_in_an_array() -> None:
    assert encode(Goodbye())[HEADER.size :] == b"\x91\x04"
    assert decode_payload(b"\x91\x04") == Goodbye()


def test_kinds_have_a_notation() -> None:
    kinds: list[Kind] = [Unsigned(32), Flag(), Text(1, 2), Path(), Choice(("a", "b")), Report(), Happenings(9)]
    notations = ["u32", "flag", "text 1..2", "path", "one of a, b", "report", "events 0..9"]
    assert [kind.notation for kind in kinds] == notations


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A-b_c.d", "0", "-", "_", "x" * 64])
def test_share_names(name: str) -> None:
    assert check_share_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/", "a b", "a\n", "ä", "x" * 65, "a\0"])
def test_no_share_names(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        check_share_name(name)
