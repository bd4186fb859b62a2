"""The daemon's conversations, with bytes and times as arguments: no socket, no clock, no waiting."""


from dataclasses import replace

import pytest

from coherency.daemon.actions import Drop, Send
from coherency.daemon.deadlines import Deadlines
from coherency.daemon.peer_states import TRANSITIONS, Credentials, PeerEvent, PeerId, PeerState, next_state
from coherency.daemon.switchboard import Switchboard
from coherency.errors import MessageError
from coherency.ids import Epoch
from coherency.protocol import (
    CATALOGUE,
    Goodbye,
    GuestReport,
    Invalidated,
    InvalidateRequest,
    Message,
    Refusal,
    RefusalCode,
    Side,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from tests.control_messages import REPORT, frame, packed
from tests.switchboards import (
    FIRST_SESSION,
    HELLO,
    LIMITS,
    OWN_UID,
    OWNER,
    ROOT,
    STRANGER,
    WELCOME,
    Bench,
    make_leasing,
)

COUNTERS = Statistics(0, 1, 2, 3, 4, 5)


# --- guests --------------------------------------------------------------------------------------------------------


def test_a_guest_is_welcomed_with_an_id_of_its_own() -> None:
    bench = Bench()
    for expected_id in (1, 2):
        peer = bench.open()
        bench.send(peer, HELLO)
        (welcome,) = bench.take(peer)
        assert welcome == replace(WELCOME, guest_id=expected_id, session=FIRST_SESSION + expected_id - 1)
    bench.hang_up(PeerId(1))
    assert [guest.guest_id for guest in bench.board.guests()] == [2]
    bench.guest()
    assert [guest.guest_id for guest in bench.board.guests()] == [2, 3]


def test_only_a_welcome_brings_the_table() -> None:
    bench = Bench()
    peer = bench.board.opened(STRANGER, 0)
    bench.board.received(peer, encode(HELLO), 0)
    (send,) = bench.board.take_actions()
    assert isinstance(send, Send)
    assert send.joined == "guest 'g' peer 1 (pid 12, uid 1001), mode access, socket"
    assert send.with_table
    bench.board.received(peer, encode(StatusRequest()), 0)
    assert [(action.joined, action.with_table) for action in bench.board.take_actions() if isinstance(action, Send)] == [("", False)]


def test_a_guest_that_says_goodbye_leaves_in_order() -> None:
    bench = Bench()
    peer = bench.guest()
    bench.send(peer, Goodbye())
    assert bench.dropped[peer].orderly
    assert bench.take(peer) == []
    assert bench.board.guests() == ()
    assert bench.board.statistics().dropped == 0


def test_a_guest_that_just_hangs_up_does_not() -> None:
    bench = Bench()
    peer = bench.guest()
    bench.hang_up(peer)
    assert not bench.dropped[peer].orderly
    assert bench.dropped[peer].reason == "hung up without a goodbye"


def test_a_stream_that_ends_inside_a_frame_is_cut_off() -> None:
    bench = Bench()
    peer = bench.open()
    bench.raw(peer, encode(HELLO)[:-1])
    bench.hang_up(peer)
    assert bench.dropped[peer].reason == "hung up in the middle of a frame"
    assert not bench.dropped[peer].orderly


def test_a_welcome_that_cannot_be_sent_is_refused_before_there_are_guests() -> None:
    with pytest.raises(ValueError, match=r"Welcome\.share"):
        Switchboard(
            welcome=Welcome(0, 5, 9 * 10**9, 7, 8, 4096, 10**9, "", "/export"),
            status=lambda: REPORT,
            invalidate=lambda: Epoch(1),
            leasing=make_leasing(),
            own_uid=OWN_UID,
            limits=LIMITS,
        )


# --- who breaks the rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n", RefusalCode.FAULT),
        (frame(b"", length=1 << 20), RefusalCode.FAULT),
        (frame(b"\x91\x04", checksum=1), RefusalCode.FAULT),
        (packed([0x7F]), RefusalCode.FAULT),
        (packed([1, 2, "name"]), RefusalCode.VERSION),
        (packed([0x20, 9]), RefusalCode.VERSION),
        (encode(HELLO) * 2, RefusalCode.FAULT),
        (encode(COUNTERS), RefusalCode.FAULT),
        (encode(WELCOME), RefusalCode.FAULT),
    ],
)
def test_one_bad_peer_is_dropped_and_nobody_else_notices(data: bytes, code: RefusalCode) -> None:
    bench = Bench()
    good, bad = bench.guest("good"), bench.open()
    bench.raw(bad, data)
    refused = [message for message in bench.take(bad) if isinstance(message, Refusal)]
    assert [message.code for message in refused] == [code]
    assert list(bench.dropped) == [bad]
    assert bench.board.statistics().dropped == 1

    bench.send(good, StatusRequest())
    assert bench.take(good) == [StatisticsRequest(1)]


def test_what_comes_behind_a_fault_is_not_looked_at() -> None:
    bench = Bench()
    peer = bench.open(ROOT)
    bench.send(peer, COUNTERS, InvalidateRequest())
    bench.send(peer, InvalidateRequest())
    assert bench.epoch == 1


def test_negative_control_without_the_fault_it_is() -> None:
    bench = Bench()
    bench.send(bench.open(ROOT), InvalidateRequest())
    assert bench.epoch == 2


DAEMONS = [entry.message for entry in CATALOGUE if Side.DAEMON in entry.senders]


@pytest.mark.parametrize("state", PeerState)
@pytest.mark.parametrize("message", DAEMONS)
def test_no_peer_may_send_what_is_the_daemons(message: type[Message], state: PeerState) -> None:
    with pytest.raises(MessageError, match="does not belong into the state"):
        next_state(state, message)


def test_nothing_leads_out_of_closed() -> None:
    assert not any(state is PeerState.CLOSED for state, _ in TRANSITIONS)


def test_every_open_state_can_end_in_every_way() -> None:
    for state in set(PeerState) - {PeerState.CLOSED}:
        for event in (PeerEvent.END, PeerEvent.FAULT, PeerEvent.DEADLINE):
            assert next_state(state, event) is PeerState.CLOSED


def test_too_many_connections() -> None:
    bench = Bench()
    for _ in range(LIMITS.peers):
        bench.guest()
    late = bench.open()
    assert bench.refusal(late) is RefusalCode.FULL
    bench.hang_up(PeerId(1))
    bench.guest()


def test_who_has_been_silent_longest_makes_room() -> None:
    bench = Bench()
    guests = [bench.guest() for _ in range(LIMITS.peers - 2)]
    speaker, silent = bench.open(), bench.open()
    bench.raw(speaker, encode(HELLO)[:1])
    late = bench.open()
    assert bench.refusal(silent) is RefusalCode.FULL
    later = bench.open()
    assert bench.refusal(late) is RefusalCode.FULL
    assert set(bench.dropped) == {silent, late}
    bench.send(later, HELLO)
    assert bench.dropped.keys().isdisjoint([*guests, speaker, later])


# --- deadlines -----------------------------------------------------------------------------------------------------


def test_who_says_nothing_may_do_so_for_ever() -> None:
    """As QEMU does before its guest speaks."""
    bench = Bench()
    bench.open()
    assert bench.board.next_deadline_ns is None
    bench.pass_time(10**18)
    assert not bench.dropped


def test_a_guest_may_be_silent_for_ever() -> None:
    bench = Bench()
    bench.guest()
    assert bench.board.next_deadline_ns is None
    bench.pass_time(10**18)
    assert not bench.dropped


def test_an_operator_may_not() -> None:
    bench = Bench()
    peer = bench.open(ROOT)
    bench.send(peer, InvalidateRequest())
    bench.pass_time(900)
    bench.send(peer, StatusRequest())
    bench.pass_time(1899)
    assert not bench.dropped
    bench.pass_time(1900)
    assert peer in bench.dropped


def test_half_a_frame_runs_out_even_if_it_grows() -> None:
    bench = Bench()
    peer, data = bench.guest(), encode(StatusRequest())
    for step, byte in enumerate(data[:10]):
        bench.raw(peer, bytes([byte]))
        bench.pass_time(step * 50 + 49)
    assert peer not in bench.dropped
    bench.pass_time(500)
    assert bench.refusal(peer) is RefusalCode.LATE
    assert bench.dropped[peer].reason.startswith("began a frame and did not finish it")


def test_a_frame_that_is_complete_has_no_deadline_any_more() -> None:
    bench = Bench()
    peer, data = bench.guest(), encode(StatusRequest())
    bench.raw(peer, data[:5])
    bench.raw(peer, data[5:])
    bench.pass_time(10**9)
    assert not bench.dropped


def test_each_frame_has_its_own_time() -> None:
    """A stream that is always in the middle of some frame is not slow."""
    bench = Bench()
    peer, data = bench.open(ROOT), encode(InvalidateRequest())
    bench.raw(peer, data[:5])
    for turn in range(1, 20):
        bench.pass_time(turn * 400)
        bench.raw(peer, data[5:] + data[:5])
    assert not bench.dropped
    assert bench.epoch == 20


def test_deadlines() -> None:
    deadlines: Deadlines[str] = Deadlines()
    assert deadlines.next_ns is None
    for key, at_ns in [("a", 30), ("b", 10), ("c", 20), ("b", 40), ("d", 20)]:
        deadlines.set(key, at_ns)
        deadlines.check()
    deadlines.clear("d")
    deadlines.clear("never set")
    assert deadlines.statistics() == (3, 20)
    assert (len(deadlines), deadlines["b"]) == (3, 40)
    assert deadlines.pop_due(19) is None
    assert [deadlines.pop_due(40) for _ in range(4)] == ["c", "a", "b", None]
    assert "b" not in deadlines
    deadlines.check()


# --- status --------------------------------------------------------------------------------------------------------


def answer(bench: Bench, peer: PeerId, **changes: int) -> None:
    """Answer the last request for statistics."""
    (request,) = bench.take(peer)
    assert isinstance(request, StatisticsRequest)
    counters = {"hits": 1, "misses": 2, "refreshes": 3, "lower_requests": 4, "entries": 5} | changes
    bench.send(peer, Statistics(serial=request.serial, **counters))


def reports(bench: Bench, peer: PeerId) -> dict[str, tuple[bool, int]]:
    """Of each guest in a complete answer, whether it answered, and its hits."""
    *guests, last = bench.take(peer)
    assert isinstance(last, StatusReply)
    assert last.report.items() >= REPORT.items()
    return {guest.name: (guest.answered, guest.hits) for guest in guests if isinstance(guest, GuestReport)}


def test_status_without_guests_is_answered_at_once() -> None:
    bench = Bench()
    peer = bench.open()
    bench.send(peer, StatusRequest())
    assert reports(bench, peer) == {}


def test_status_waits_for_all_guests_and_no_longer() -> None:
    bench = Bench()
    one, two, asker = bench.guest("one"), bench.guest("two"), bench.open()
    bench.send(asker, StatusRequest())
    answer(bench, one, hits=11)
    assert bench.take(asker) == []
    answer(bench, two, hits=22)
    assert reports(bench, asker) == {"one": (True, 11), "two": (True, 22)}
    assert bench.board.guests()[0].statistics == Statistics(1, 11, 2, 3, 4, 5)


def test_a_guest_that_does_not_answer_holds_nobody_up() -> None:
    bench = Bench()
    quick, dead, asker = bench.guest("quick"), bench.guest("dead"), bench.open()
    bench.send(asker, StatusRequest())
    answer(bench, quick)
    bench.pass_time(99)
    assert bench.take(asker) == []
    bench.pass_time(100)
    assert reports(bench, asker) == {"quick": (True, 1), "dead": (False, 0)}
    assert dead not in bench.dropped


def test_a_silent_guest_is_asked_once_until_it_answers() -> None:
    bench = Bench()
    silent, asker = bench.guest("silent"), bench.open()
    for turn in range(1, 5):
        bench.send(asker, StatusRequest())
        bench.pass_time(turn * 100)
        assert reports(bench, asker) == {"silent": (False, 0)}
    assert bench.got[silent] == [StatisticsRequest(1)]

    bench.send(asker, StatusRequest())
    answer(bench, silent, hits=5)  # of the first request: not of this run, so it is asked again
    assert bench.take(asker) == []
    answer(bench, silent, hits=6)
    assert reports(bench, asker) == {"silent": (True, 6)}


def test_a_late_answer_is_remembered() -> None:
    bench = Bench()
    late, asker = bench.guest("late"), bench.open()
    bench.send(asker, StatusRequest())
    bench.pass_time(100)
    assert reports(bench, asker) == {"late": (False, 0)}
    answer(bench, late, hits=9)
    bench.send(asker, StatusRequest())
    bench.pass_time(200)
    assert reports(bench, asker) == {"late": (False, 9)}


def test_who_asks_during_a_run_gets_the_next() -> None:
    bench = Bench()
    guest, first, second = bench.guest(), bench.open(), bench.open()
    bench.send(first, StatusRequest())
    bench.send(second, StatusRequest())
    answer(bench, guest, hits=1)
    assert reports(bench, first) == {"g": (True, 1)}
    assert bench.take(second) == []
    answer(bench, guest, hits=2)
    assert reports(bench, second) == {"g": (True, 2)}


def test_a_guest_may_ask_for_the_status_itself() -> None:
    bench = Bench()
    guest = bench.guest()
    bench.send(guest, StatusRequest())
    answer(bench, guest)
    assert reports(bench, guest) == {"g": (True, 1)}
    bench.send(guest, StatusRequest())
    answer(bench, guest)
    assert reports(bench, guest) == {"g": (True, 1)}


def test_a_guest_that_leaves_is_not_waited_for() -> None:
    bench = Bench()
    leaving, asker = bench.guest(), bench.open()
    bench.send(asker, StatusRequest())
    bench.hang_up(leaving)
    assert reports(bench, asker) == {}


def test_a_guest_that_comes_during_a_run_is_reported_and_not_waited_for() -> None:
    bench = Bench()
    old, asker = bench.guest("old"), bench.open()
    bench.send(asker, StatusRequest())
    bench.guest("new")
    answer(bench, old)
    assert reports(bench, asker) == {"old": (True, 1), "new": (False, 0)}


@pytest.mark.parametrize("leaves", ["first", "second", "both"])
def test_askers_that_leave_are_not_answered(leaves: str) -> None:
    bench = Bench()
    guest, first, second = bench.guest(), bench.open(), bench.open()
    bench.send(first, StatusRequest())
    bench.send(second, StatusRequest())
    for peer in {"first": [first], "second": [second], "both": [first, second]}[leaves]:
        bench.hang_up(peer)
    answer(bench, guest)
    if leaves == "first":
        answer(bench, guest)
    assert (StatusReply in map(type, bench.got[first])) == (leaves == "second")
    assert (StatusReply in map(type, bench.got[second])) == (leaves == "first")


def test_nobody_asks_again_before_the_answer() -> None:
    bench = Bench()
    bench.guest()
    asker = bench.open()
    bench.send(asker, StatusRequest(), StatusRequest())
    assert bench.refusal(asker) is RefusalCode.FAULT


@pytest.mark.parametrize("serial", [0, 2, 2**32 - 1])
def test_statistics_that_nobody_asked_for_are_a_fault(serial: int) -> None:
    bench = Bench()
    guest, asker = bench.guest(), bench.open()
    bench.send(asker, StatusRequest())
    assert bench.take(guest) == [StatisticsRequest(1)]
    bench.send(guest, Statistics(serial, 0, 0, 0, 0, 0))
    assert bench.refusal(guest) is RefusalCode.FAULT
    assert reports(bench, asker) == {}


def test_the_same_answer_twice_is_a_fault() -> None:
    bench = Bench()
    guest, asker = bench.guest(), bench.open()
    bench.send(asker, StatusRequest())
    bench.send(guest, Statistics(1, 0, 0, 0, 0, 0), Statistics(1, 0, 0, 0, 0, 0))
    assert guest in bench.dropped


def test_a_report_that_fails_costs_only_the_askers_their_answer() -> None:
    bench = Bench()
    guest, asker = bench.guest(), bench.open()
    bench.report = {}
    bench.send(asker, StatusRequest())
    answer(bench, guest)
    assert bench.refusal(asker) is RefusalCode.INTERNAL
    assert isinstance(bench.dropped[asker].error, ValueError)

    bench.report = REPORT
    bench.send(guest, StatusRequest())
    answer(bench, guest)
    assert reports(bench, guest) == {"g": (True, 1)}


def test_the_report_tells_how_many_were_dropped() -> None:
    bench = Bench()
    bench.raw(bench.open(), b"nonsense")
    asker = bench.open()
    bench.send(asker, StatusRequest())
    (reply,) = bench.take(asker)
    assert isinstance(reply, StatusReply)
    assert reply.report == {**REPORT, "peers_dropped": 1}


# --- invalidate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credentials", [ROOT, OWNER])
def test_root_and_the_daemons_user_may_invalidate(credentials: Credentials) -> None:
    bench = Bench()
    peer = bench.open(credentials)
    bench.send(peer, InvalidateRequest())
    assert bench.take(peer) == [Invalidated(2)]


def test_others_may_not() -> None:
    bench = Bench()
    peer = bench.open(STRANGER)
    bench.send(peer, InvalidateRequest())
    assert bench.refusal(peer) is RefusalCode.PERMISSION
    assert bench.epoch == 1


def test_a_guest_may_not_whoever_it_is() -> None:
    bench = Bench()
    peer = bench.open(ROOT)
    bench.send(peer, HELLO, InvalidateRequest())
    assert peer in bench.dropped
    assert bench.epoch == 1


def test_an_invalidation_that_fails_costs_only_the_asker_its_answer() -> None:
    bench = Bench()
    bench.epoch = 0
    peer = bench.open(ROOT)
    bench.send(peer, InvalidateRequest())
    assert bench.refusal(peer) is RefusalCode.INTERNAL
    assert isinstance(bench.dropped[peer].error, OSError)


# --- the end -------------------------------------------------------------------------------------------------------


def test_lost_peers_are_gone_and_unknown_ones_do_not_matter() -> None:
    bench = Bench()
    peer = bench.guest()
    bench.board.lost(peer, "does not read", 5)
    bench.board.lost(peer, "does not read", 5)
    bench.board.received(peer, b"xxx", 5)
    (drop,) = bench.board.take_actions()
    assert isinstance(drop, Drop)
    assert (drop.reason, drop.orderly, drop.was_guest, drop.farewell) == ("does not read", False, True, b"")


def test_the_end_forgets_everybody() -> None:
    bench = Bench()
    bench.guest()
    bench.open()
    bench.send(bench.open(), StatusRequest())
    bench.board.end()
    bench.board.check()
    assert bench.board.statistics()[:2] == (0, 0)
    assert bench.board.next_deadline_ns is None
