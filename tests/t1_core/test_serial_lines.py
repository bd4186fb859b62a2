"""Serial lines: agents that use one connection one after the other, and are cut off anywhere in what they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coherency.daemon.actions import Send
from coherency.daemon.leasing import MAX_LOST_ON_A_LINE
from coherency.daemon.peer_states import PeerId
from coherency.errors import FrameError, MessageError
from coherency.events import Event, EventKind
from coherency.ids import GrantKey, HostInode
from coherency.protocol import (
    HEADER,
    MAGIC,
    Ack,
    Confirm,
    Evicted,
    EvictReply,
    EvictRequest,
    Goodbye,
    GuestReport,
    Hello,
    Message,
    Recall,
    Refusal,
    RefusalCode,
    Register,
    Release,
    Renew,
    Renewed,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.protocol_events import MAX_EVENTS_PER_MESSAGE, Happened
from coherency.protocol_stream import MAX_FALSE_STARTS, MAX_SKIPPED_BYTES, MAX_STARTS, Decoder
from tests.control_messages import frame, messages
from tests.switchboards import FIRST_SESSION, LEASE_NS, LIMITS, OWNER, STRANGER, Bench, Guest

RENEW = Renew(7, 1)
KEYS = (GrantKey(2), GrantKey(5))


def hello(mode: str = "access", *, former: int = 0, nonce: int = 1, line: str = "serial") -> Hello:
    return Hello("vm", 1, mode, former, line, nonce)


# --- the decoder -------------------------------------------------------------------------------------------------------


def hunting() -> Decoder:
    decoder = Decoder()
    decoder.hunt()
    return decoder


def heard(decoder: Decoder, data: bytes, step: int = 1) -> list[Message]:
    found = []
    for start in range(0, len(data), step):
        found += decoder.feed(data[start : start + step])
        decoder.check()
    return found


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("kept", [1, 3, 4, 8, 11, HEADER.size, HEADER.size + 3, len(encode(RENEW)) - 1])
def test_a_frame_that_was_cut_off_holds_up_nothing(kept: int, step: int) -> None:
    decoder = hunting()
    assert heard(decoder, encode(RENEW)[:kept] + encode(hello()), step) == [hello()]
    assert decoder.at_boundary
    assert decoder.statistics().skipped_bytes == kept


def test_negative_control_without_hunting_it_does() -> None:
    with pytest.raises(FrameError):
        heard(Decoder(), encode(RENEW)[:-1] + encode(hello()))
    long = encode(Register(7, 1, tuple(map(GrantKey, range(2000)))))
    assert heard(Decoder(), long[:5000] + encode(hello())) == []  # it still waits for the rest of the frame


def test_a_long_frame_that_was_cut_off_holds_up_nothing_either() -> None:
    long = encode(Register(7, 1, tuple(map(GrantKey, range(2000)))))
    assert heard(hunting(), long[:5000] + encode(hello()), 1000) == [hello()]


@given(st.lists(messages(), min_size=1, max_size=3), st.lists(messages(), max_size=3), st.data())
def test_whatever_was_cut_off_wherever(before: list[Message], after: list[Message], data: st.DataObject) -> None:
    """All whole frames come through, in their order, however the stream is cut into pieces."""
    last = encode(before[-1])
    kept = data.draw(st.integers(0, len(last) - 1))
    stream = b"".join(map(encode, before[:-1])) + last[:kept] + b"".join(map(encode, after))
    whole = [*before[:-1], *after]
    for step in (1, 13, len(stream) + 1):
        decoder = hunting()
        assert heard(decoder, stream, step) == whole
        assert decoder.statistics().skipped_bytes == (kept if after else decoder.statistics().skipped_bytes)


@given(st.binary(max_size=300), messages())
def test_garbage_before_a_frame_is_skipped(garbage: bytes, message: Message) -> None:
    decoder = hunting()
    found = heard(decoder, garbage + encode(message), 9)
    assert found[-1:] == [message]


def test_a_damaged_frame_is_skipped_and_the_next_one_is_heard() -> None:
    damaged = bytearray(encode(RENEW))
    damaged[-1] ^= 1
    assert heard(hunting(), bytes(damaged) + encode(hello())) == [hello()]


def test_garbage_has_an_end() -> None:
    decoder = hunting()
    with pytest.raises(FrameError, match=f"more than {MAX_SKIPPED_BYTES} bytes without a sound frame"):
        heard(decoder, bytes(MAX_SKIPPED_BYTES + 1), 4096)
    decoder.check()


@pytest.mark.parametrize(("payload_bytes", "most"), [(0, MAX_FALSE_STARTS), (60_000, MAX_STARTS)])
def test_what_looks_like_frames_has_an_end(payload_bytes: int, most: int) -> None:
    """Complete, each of them costs a checksum over as much as it says that it holds; until then, a look at each read."""
    false_start = HEADER.pack(MAGIC, payload_bytes, 1)
    decoder = hunting()
    assert heard(decoder, false_start * most, 1000) == []
    with pytest.raises(FrameError, match=f"more than {most} beginnings"):
        decoder.feed(false_start)
    decoder.check()


@pytest.mark.parametrize("step", [1, 13, 4096])
@pytest.mark.parametrize("name", [b"COH1" * 60, b"COH1"])
def test_names_that_look_like_frames_are_nobodys_end(name: bytes, step: int) -> None:
    """Others choose them. After a name of a new file there are two NULs where the length of a frame would have its upper bytes."""
    event = Event(EventKind.CREATED, HostInode(1 << 40), False, HostInode(1 << 41), name, HostInode(0), b"", HostInode(0))
    happened = Happened(0, (event,) * MAX_EVENTS_PER_MESSAGE)
    decoder = hunting()
    stream = encode(happened)
    assert heard(decoder, stream * 2 + stream[:-1] + encode(RENEW), step) == [happened, happened, RENEW]


def test_a_sound_frame_makes_up_for_what_was_before() -> None:
    decoder, garbage = hunting(), bytes(MAX_SKIPPED_BYTES - 10)
    for _ in range(3):
        assert heard(decoder, garbage + encode(RENEW), 60_000) == [RENEW]


def test_a_sound_frame_that_is_no_message_is_a_fault_as_anywhere() -> None:
    with pytest.raises(MessageError):
        hunting().feed(frame(b"\x91\x7f"))


# --- the switchboard ---------------------------------------------------------------------------------------------------


def on_a_line(bench: Bench, mode: str = "strict") -> tuple[PeerId, int]:
    """A guest on a line, and its session."""
    guest = Guest(bench, mode, line="serial", name="vm")
    return guest.peer, guest.session


def welcomed(bench: Bench, peer: PeerId) -> Welcome:
    (welcome,) = bench.take(peer)
    assert isinstance(welcome, Welcome)
    return welcome


def test_no_descriptor_goes_down_a_line() -> None:
    bench = Bench()
    peer = bench.board.opened(STRANGER, 0)
    bench.board.received(peer, encode(hello()), 0)
    (send,) = [action for action in bench.board.take_actions() if isinstance(action, Send)]
    assert not send.with_table
    assert send.joined.endswith("mode access, serial")


def test_the_next_agent_on_a_line_is_welcome_though_the_first_was_cut_off() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.raw(peer, encode(Register(session, 1, KEYS))[:-3])
    bench.send(peer, hello("strict", nonce=2))
    welcome = welcomed(bench, peer)
    assert (welcome.nonce, welcome.session) == (2, FIRST_SESSION + 1)
    assert [guest.guest_id for guest in bench.board.guests()] == [2]
    assert not bench.dropped


def test_negative_control_on_a_socket_of_its_own_it_is_a_fault() -> None:
    bench = Bench()
    peer = bench.open()
    for _ in range(2):
        bench.send(peer, hello("strict", line="socket"))
    assert [type(message) for message in bench.take(peer)] == [Welcome, Refusal]
    assert peer in bench.dropped
    peer = bench.guest(mode="strict")
    bench.raw(peer, encode(RENEW)[:-1] + encode(hello("strict", line="socket")))
    assert bench.refusal(peer) is RefusalCode.FAULT


def test_what_the_former_agent_had_been_granted_is_waited_for() -> None:
    """Its successor does not know whether its kernel has forgotten: the machine may have no keeper left."""
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS), hello("strict", nonce=2))
    assert bench.leasing.lost == 1
    round_ = bench.board.recall(KEYS, lambda: None, bench.now_ns)
    assert round_.pending
    bench.pass_time(LEASE_NS)
    assert round_.owed == {}
    assert [note.what for note in bench.notes] == ["gave way to another agent on its line", f"its lease of {LEASE_NS / 1e9:g} s is over"]


def test_unless_hello_says_that_it_has() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS), hello("strict", former=session, nonce=2))
    assert bench.leasing.lost == 0
    assert not bench.board.recall(KEYS, lambda: None, bench.now_ns).pending
    assert peer not in bench.dropped, "the connection is the new guest's"


def test_goodbye_leaves_the_line_open_for_the_next_agent() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS), Goodbye())
    assert not bench.board.guests()
    assert bench.leasing.lost == 0
    bench.pass_time(10 * LEASE_NS)
    bench.take(peer)
    bench.raw(peer, encode(RENEW)[:9] + encode(hello(nonce=3)))
    assert welcomed(bench, peer).nonce == 3
    assert not bench.dropped


def test_the_new_guest_is_not_asked_what_the_former_one_owed() -> None:
    bench = Bench()
    peer, _ = on_a_line(bench)
    asker = bench.open()
    bench.send(asker, StatusRequest())
    assert [type(message) for message in bench.take(peer)] == [StatisticsRequest]
    bench.send(peer, hello(nonce=2))
    assert [type(message) for message in bench.take(asker)] == [StatusReply], "nobody else is waited for"
    bench.take(peer)
    bench.send(asker, StatusRequest())
    (request,) = bench.take(peer)
    assert isinstance(request, StatisticsRequest)
    bench.send(peer, Statistics(request.serial, 1, 2, 3, 4, 5))
    report, _ = bench.take(asker)
    assert isinstance(report, GuestReport)
    assert (report.answered, report.line, report.guest_id) == (True, "serial", 2)


def test_who_asked_on_a_line_and_died_is_not_answered() -> None:
    bench = Bench()
    other = bench.guest("other")
    peer, _ = on_a_line(bench)
    bench.send(peer, StatusRequest(), hello(nonce=2))
    assert [type(message) for message in bench.take(peer)] == [StatisticsRequest, Welcome]
    bench.take(other)
    bench.pass_time(LIMITS.statistics_ns)
    assert bench.take(peer) == []


def test_what_dead_agents_leave_behind_on_a_line_has_an_end() -> None:
    """Or one machine could fill the books, which connections of others are counted with, over one connection of its own."""
    bench = Bench()
    peer = bench.open()
    for nonce in range(MAX_LOST_ON_A_LINE + 1):
        bench.send(peer, hello("strict", nonce=nonce))
        bench.send(peer, Register(welcomed(bench, peer).session, 1, KEYS))
        bench.take(peer)
    bench.send(peer, hello("strict", nonce=9))
    assert bench.refusal(peer) is RefusalCode.FULL
    assert bench.leasing.lost == MAX_LOST_ON_A_LINE + 1
    bench.pass_time(LEASE_NS)
    assert bench.leasing.lost == 0


def test_agents_that_say_goodbye_or_come_again_may_do_so_for_ever() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    for nonce in range(3 * MAX_LOST_ON_A_LINE):
        bench.send(peer, Register(session, 1, KEYS), hello("strict", former=session, nonce=nonce))
        bench.take(peer)
        session = FIRST_SESSION + nonce + 1
    assert peer not in bench.dropped
    assert bench.leasing.lost == 0


def test_a_line_stays_one() -> None:
    bench = Bench()
    peer, _ = on_a_line(bench)
    bench.send(peer, hello(line="socket"))
    assert bench.refusal(peer) is RefusalCode.FAULT


# --- evictions ---------------------------------------------------------------------------------------------------------


def evict(bench: Bench, guest: str) -> PeerId:
    operator = bench.open(OWNER)
    bench.send(operator, EvictRequest(guest))
    return operator


def test_an_evicted_guest_goes_when_it_has_forgotten() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS))
    bench.take(peer)
    operator = evict(bench, "vm")
    assert bench.take(peer) == [Recall(session, 1, ())]
    bench.send(peer, Register(session, 2, KEYS), Renew(session, 1))
    assert bench.take(peer) == [], "nothing more is granted, and the lease is not renewed"
    assert bench.take(operator) == []
    bench.send(peer, Ack(session, 1))
    assert bench.take(peer) == [Evicted(session)]
    assert bench.take(operator) == [EvictReply(1)]
    assert bench.dropped[peer].orderly
    assert bench.leasing.lost == 0
    assert bench.journal.sessions == {}


def test_negative_control_without_the_eviction_both_are_answered() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS), Renew(session, 1))
    assert [type(message) for message in bench.take(peer)] == [Confirm, Renewed]


def test_a_guest_that_does_not_answer_is_evicted_at_the_end_of_its_lease_and_not_before() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS))
    operator = evict(bench, "vm")
    bench.pass_time(LEASE_NS - 1)
    assert bench.take(operator) == []
    round_ = bench.board.recall(KEYS, lambda: None, bench.now_ns)
    assert round_.pending, "its kernel may still answer"
    bench.pass_time(LEASE_NS)
    assert round_.owed == {}
    assert bench.take(operator) == [EvictReply(1)]
    assert bench.take(peer)[-1] == Evicted(session)


def test_all_guests_of_a_name_or_the_one_with_an_id() -> None:
    bench = Bench()
    a, b, c = bench.guest("a"), bench.guest("b"), bench.guest("a")
    assert bench.take(evict(bench, "a")) == [EvictReply(2)]
    assert bench.take(evict(bench, "2")) == [EvictReply(1)]
    assert set(bench.dropped) == {a, b, c}
    operator = evict(bench, "a")
    assert bench.refusal(operator) is RefusalCode.UNKNOWN


def test_a_name_comes_before_an_id() -> None:
    bench = Bench()
    first, called_one = bench.guest("x"), bench.guest("1")
    assert bench.take(evict(bench, "1")) == [EvictReply(1)]
    assert called_one in bench.dropped
    assert first not in bench.dropped


def test_a_stranger_may_evict_nobody() -> None:
    bench = Bench()
    bench.guest("a")
    peer = bench.open(STRANGER)
    bench.send(peer, EvictRequest("a"))
    assert bench.refusal(peer) is RefusalCode.PERMISSION
    assert len(bench.board.guests()) == 1


def test_another_agent_on_the_line_is_not_the_one_to_be_evicted() -> None:
    bench = Bench()
    peer, session = on_a_line(bench)
    bench.send(peer, Register(session, 1, KEYS))
    operator = evict(bench, "vm")
    bench.send(peer, hello("strict", former=session, nonce=2))
    assert bench.take(operator) == [EvictReply(1)]
    assert peer not in bench.dropped
    assert len(bench.board.guests()) == 1


def test_a_prompt_guest_is_told_and_goes_at_once() -> None:
    bench = Bench()
    peer, session = on_a_line(bench, "prompt")
    bench.send(peer, Register(session, 1, KEYS), Release(session, KEYS[:1]))
    bench.take(peer)
    operator = evict(bench, "vm")
    assert bench.take(peer) == [Recall(session, 1, ()), Evicted(session)]
    assert bench.take(operator) == [EvictReply(1)]
    assert bench.leasing.lost == 0
