"""What guests and daemon say to each other about grants: sessions, recalls, leases, and guests that go."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from coherency.daemon.actions import Send
from coherency.daemon.ledger import Round
from coherency.daemon.peer_states import PeerId
from coherency.errors import MessageError
from coherency.ids import GrantKey
from coherency.protocol import (
    Ack,
    Confirm,
    Evicted,
    Goodbye,
    GuestReport,
    Hello,
    Invalidated,
    InvalidateRequest,
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
from coherency.protocol_stream import Decoder
from tests.switchboards import FIRST_SESSION, LEASE_NS, LIMITS, OWNER, ROOT, SLOT_COUNT, STRANGER, WELCOME, Bench, Guest

A, B, C = GrantKey(2), GrantKey(5), GrantKey(8)


class Change:
    """A recall of some keys, or of everything."""

    def __init__(self, bench: Bench, *keys: GrantKey, everything: bool = False) -> None:
        self.over = False
        self.round: Round = bench.board.recall(None if everything else keys, self._wake, bench.now_ns)
        bench.act()

    def _wake(self) -> None:
        assert not self.over
        self.over = True

    @property
    def waits(self) -> bool:
        assert self.over == (not self.round.pending) or not self.over  # `wake` is not called if nothing was owed
        return self.round.pending


# --- sessions and registrations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "access", "prompt", "strict"])
def test_every_guest_has_a_session_of_its_own(mode: str) -> None:
    bench = Bench()
    for number in range(2):
        peer = bench.open()
        bench.send(peer, Hello(name="g", pid=1, mode=mode, former=0))
        assert bench.take(peer) == [replace(WELCOME, guest_id=number + 1, session=FIRST_SESSION + number)]


def test_a_registration_is_confirmed_with_its_serial_and_the_epoch_of_that_moment() -> None:
    bench = Bench()
    guest = Guest(bench)
    bench.epoch = 7
    assert guest.say(Register(guest.session, 3, (A, B)), Register(guest.session, 9, ())) == [
        Confirm(guest.session, 3, 7),
        Confirm(guest.session, 9, 7),
    ]


def test_a_strict_sharer_is_told_and_waited_for() -> None:
    bench = Bench()
    guest, other = Guest(bench), Guest(bench)
    guest.register(A, B)
    other.register(C)
    change = Change(bench, A)
    assert guest.take() == [Recall(guest.session, 1, (A,))]
    assert change.waits
    guest.ack(1)
    assert change.over
    assert other.take() == []


def test_a_prompt_sharer_is_told_and_not_waited_for() -> None:
    bench = Bench()
    guest = Guest(bench, "prompt")
    guest.register(A)
    assert not Change(bench, A).waits
    assert guest.take() == [Recall(guest.session, 1, (A,))]


def test_what_nobody_has_is_told_to_nobody() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A, B)
    assert guest.say(Release(guest.session, (B,))) == []
    assert not bench.leasing.is_held((B, C))
    assert not Change(bench, B, C).waits
    assert guest.take() == []
    assert bench.leasing.is_held((B, A))  # the negative control
    assert Change(bench, B, A).waits


# --- who breaks the rules ------------------------------------------------------------------------------------------


OF_GRANTS: list[Callable[[int], Message]] = [
    lambda session: Register(session, 1, (A,)),
    lambda session: Release(session, (A,)),
    lambda session: Ack(session, 1),
    lambda session: Renew(session, 1),
]


@pytest.mark.parametrize("message", OF_GRANTS)
@pytest.mark.parametrize("mode", ["none", "auto", "always", "access"])
def test_grants_are_no_business_of_a_guest_in_another_mode(mode: str, message: Callable[[int], Message]) -> None:
    bench = Bench()
    guest = Guest(bench, mode)
    guest.say(message(guest.session))
    assert bench.dropped[guest.peer].reason.endswith("is not for a guest in its mode")
    assert not bench.leasing.is_held((A,))


@pytest.mark.parametrize("message", OF_GRANTS)
def test_nor_of_who_is_no_guest(message: Callable[[int], Message]) -> None:
    bench = Bench()
    peer = bench.open(ROOT)
    bench.send(peer, message(FIRST_SESSION))
    assert bench.refusal(peer) is RefusalCode.FAULT


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Register(FIRST_SESSION, 1, (GrantKey(2 * SLOT_COUNT),)), "beyond the table's"),
        (Register(FIRST_SESSION, 1, (A, GrantKey(2**32 - 1))), "beyond the table's"),
        (Release(FIRST_SESSION, (GrantKey(2 * SLOT_COUNT),)), "beyond the table's"),
        (Register(FIRST_SESSION, 1, tuple(map(GrantKey, range(5)))), "more than 4 keys"),
        (Ack(FIRST_SESSION, 1), "acks recall 1 of 0"),
        (Ack(FIRST_SESSION, 0), "acks recall 0 of 0"),
    ],
)
def test_who_breaks_the_rules_is_dropped_and_nobody_else_notices(message: Message, reason: str) -> None:
    bench = Bench(max_keys=4)
    bad, good = Guest(bench), Guest(bench)
    good.register(A)
    (refusal,) = bad.say(message)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.text
    assert Change(bench, A).waits
    assert good.take() == [Recall(good.session, 1, (A,))]


def test_registering_the_same_again_is_no_fault() -> None:
    bench = Bench(max_keys=4)
    guest = Guest(bench)
    for _ in range(3):
        guest.register(*map(GrantKey, range(4)))
    assert not bench.dropped


@pytest.mark.parametrize("message", OF_GRANTS)
def test_messages_of_a_foreign_session_are_ignored(message: Callable[[int], Message]) -> None:
    bench = Bench()
    guest, other = Guest(bench), Guest(bench)
    other.register(A)
    change = Change(bench, A)
    assert guest.say(message(other.session)) == []
    assert guest.say(message(0)) == []
    assert not bench.dropped
    assert change.waits
    assert [bench.leasing.statistics().registrations, bench.leasing.statistics().unacked] == [0, 1]


# --- leases --------------------------------------------------------------------------------------------------------


def test_who_says_nothing_is_evicted_at_the_end_of_its_lease() -> None:
    bench = Bench()
    silent, other = Guest(bench), Guest(bench)
    silent.register(A)
    bench.pass_time(LEASE_NS // 2)
    assert other.renew()
    change = Change(bench, A)
    silent.take()
    bench.pass_time(LEASE_NS - 1)
    assert change.waits
    bench.pass_time(LEASE_NS)
    assert change.over
    assert silent.take() == [Evicted(silent.session)]
    drop = bench.dropped[silent.peer]
    assert (drop.reason, drop.orderly) == ("its lease of 1e-05 s is over", False)
    assert other.peer not in bench.dropped
    assert not Change(bench, A).waits  # it delays once


def test_who_renews_stays() -> None:
    bench = Bench()
    guest = Guest(bench)
    for turn in range(1, 20):
        bench.pass_time(turn * (LEASE_NS - 1))
        assert guest.renew()
    assert not bench.dropped


def test_who_owes_an_ack_is_not_renewed() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    change = Change(bench, A)
    guest.take()
    for turn in range(1, 10):
        bench.pass_time(turn * LEASE_NS // 10)
        assert not guest.renew()
    bench.pass_time(LEASE_NS)
    assert change.over
    assert guest.take() == [Evicted(guest.session)]


def test_a_renewal_is_answered_when_what_was_owed_is_acked_and_counts_from_its_arrival() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A, B)
    Change(bench, A)
    bench.pass_time(1000)
    assert guest.say(Renew(guest.session, 5)) == [Recall(guest.session, 1, (A,))]
    bench.pass_time(2000)
    later = Change(bench, B)
    assert guest.take() == [Recall(guest.session, 2, (B,))]
    assert guest.say(Ack(guest.session, 1)) == [Renewed(guest.session, 5)]
    bench.pass_time(1000 + LEASE_NS - 1)
    assert later.waits
    bench.pass_time(1000 + LEASE_NS)
    assert later.over
    assert guest.take() == [Evicted(guest.session)]


def test_a_guest_that_is_recalled_all_the_time_keeps_its_lease() -> None:
    """It owes something at each moment, and acks all of it, one recall late."""
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    Change(bench, A)
    renewed: list[Message] = []
    for serial in range(1, 50):
        guest.say(Register(guest.session, serial, (A,)))
        Change(bench, A)
        guest.say(Renew(guest.session, serial))
        bench.pass_time(serial * LEASE_NS // 5)
        renewed += guest.say(Ack(guest.session, serial))
        assert bench.leasing.statistics().unacked == 1
    assert not bench.dropped
    assert renewed == [Renewed(guest.session, serial) for serial in range(1, 49)]


def test_who_never_acks_may_ask_as_often_as_it_likes() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    Change(bench, A)
    guest.say(*(Renew(guest.session, serial) for serial in range(1000)))
    bench.pass_time(LEASE_NS)
    assert guest.peer in bench.dropped


def test_of_several_renewals_that_wait_the_last_counts() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    Change(bench, A)
    guest.take()
    for serial in (1, 2):
        bench.pass_time(serial * 1000)
        assert guest.say(Renew(guest.session, serial)) == []
    assert guest.say(Ack(guest.session, 1)) == [Renewed(guest.session, 2)]
    bench.pass_time(2000 + LEASE_NS - 1)
    assert not bench.dropped


def test_the_end_of_a_lease_is_a_deadline() -> None:
    bench = Bench()
    assert bench.board.next_deadline_ns is None
    Guest(bench)
    assert bench.board.next_deadline_ns == LEASE_NS


# --- who goes, and who comes back ----------------------------------------------------------------------------------


def test_goodbye_ends_the_wait() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A, B)
    change = Change(bench, A)
    guest.say(Goodbye())
    assert change.over
    assert not bench.leasing.is_held((A, B))


@pytest.mark.parametrize("end", ["hangs up", "breaks the rules", "does not read"])
def test_another_end_does_not(end: str) -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A, B)
    before = Change(bench, A)
    match end:
        case "hangs up":
            bench.hang_up(guest.peer)
        case "breaks the rules":
            bench.raw(guest.peer, b"nonsense")
        case "does not read":
            bench.board.lost(guest.peer, "does not read", bench.now_ns)
            bench.act()
    after = Change(bench, B)
    bench.pass_time(LEASE_NS - 1)
    assert before.waits
    assert after.waits
    bench.pass_time(LEASE_NS)
    assert before.over
    assert after.over
    assert [note.what for note in bench.notes] == ["its lease of 1e-05 s is over"]


def test_who_has_nothing_and_owes_nothing_is_not_waited_for() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    Change(bench, A)
    guest.take()
    guest.ack(1)
    bench.hang_up(guest.peer)
    assert bench.leasing.statistics().guests == 0
    assert bench.journal.sessions == {}


def test_who_comes_back_is_not_waited_for_any_more() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    bench.hang_up(guest.peer)
    change = Change(bench, A)
    Guest(bench)
    assert change.waits  # that was another one
    back = Guest(bench, "access", former=guest.session)
    assert change.over
    assert back.session != guest.session
    assert bench.journal.accounted == [(0, STRANGER.uid)] * 2 + [(guest.session, STRANGER.uid)]


def test_it_must_be_of_the_same_user() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    bench.hang_up(guest.peer)
    change = Change(bench, A)
    Guest(bench, former=guest.session, uid=STRANGER.uid + 1)
    assert change.waits
    Guest(bench, former=guest.session)
    assert change.over


def test_who_comes_back_before_its_end_was_noticed_has_one_connection() -> None:
    bench = Bench()
    guest, other = Guest(bench), Guest(bench)
    guest.register(A)
    change = Change(bench, A)
    Guest(bench, former=guest.session)
    assert change.over
    assert (bench.dropped[guest.peer].reason, bench.dropped[guest.peer].orderly) == ("has come again", True)
    assert other.peer not in bench.dropped


def test_nobody_takes_the_connection_of_another_user() -> None:
    bench = Bench()
    guest = Guest(bench)
    Guest(bench, former=guest.session, uid=STRANGER.uid + 1)
    assert not bench.dropped


def test_lost_guests_count_as_connections() -> None:
    """Or else who comes and goes could fill the books."""
    bench = Bench()
    for _ in range(LIMITS.peers):
        guest = Guest(bench)
        guest.register(A)
        bench.hang_up(guest.peer)
    assert bench.refusal(bench.open()) is RefusalCode.FULL
    bench.pass_time(LEASE_NS)
    Guest(bench)


def test_when_the_server_has_hung_up_everybody_is_lost() -> None:
    bench = Bench()
    guest, idle = Guest(bench), Guest(bench)
    guest.register(A)
    change = Change(bench, A)
    bench.board.end()
    assert change.waits
    assert not bench.leasing.has(idle.session)
    bench.pass_time(LEASE_NS)
    assert change.over


# --- the journal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "written"), [("strict", True), ("prompt", True), ("access", False), ("none", False)])
def test_a_session_is_in_the_journal_before_its_guest_hears_of_it(mode: str, written: bool) -> None:
    bench = Bench()
    peer = bench.board.opened(OWNER, 0)
    bench.board.received(peer, encode(Hello(name="g", pid=1, mode=mode, former=0)), 0)
    assert bench.journal.sessions == ({FIRST_SESSION: OWNER.uid} if written else {})
    (send,) = bench.board.take_actions()
    assert isinstance(send, Send)
    assert isinstance(Decoder().feed(send.frame)[0], Welcome)


@pytest.mark.parametrize("end", ["goodbye", "evicted", "back"])
def test_it_stays_there_until_the_guest_has_left(end: str) -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    if end != "goodbye":
        bench.hang_up(guest.peer)
        assert guest.session in bench.journal.sessions
    match end:
        case "goodbye":
            guest.say(Goodbye())
        case "evicted":
            bench.pass_time(LEASE_NS)
        case "back":
            Guest(bench, former=guest.session)
    assert guest.session not in bench.journal.sessions


def test_a_guest_that_cannot_be_written_down_is_refused() -> None:
    bench = Bench()
    good = Guest(bench)
    bench.journal.full = True
    peer = bench.open()
    bench.send(peer, Hello(name="g", pid=1, mode="strict", former=0))
    assert bench.refusal(peer) is RefusalCode.INTERNAL
    assert isinstance(bench.dropped[peer].error, OSError)
    good.register(A)
    Guest(bench, "access")


# --- invalidate ----------------------------------------------------------------------------------------------------


def ask_to_invalidate(bench: Bench) -> PeerId:
    peer = bench.open(ROOT)
    bench.send(peer, InvalidateRequest())
    return peer


def test_an_invalidation_is_answered_when_all_have_forgotten_everything() -> None:
    bench = Bench()
    one, two, prompt, idle = Guest(bench), Guest(bench), Guest(bench, "prompt"), Guest(bench)
    one.register(A)
    two.register(A, B)
    prompt.register(C)
    operator = ask_to_invalidate(bench)
    assert [guest.take() for guest in (one, two, prompt, idle)] == [
        [Recall(one.session, 1, ())],
        [Recall(two.session, 1, ())],
        [Recall(prompt.session, 1, ())],
        [],
    ]
    one.ack(1)
    assert bench.take(operator) == []
    two.ack(1)
    assert bench.take(operator) == [Invalidated(2)]
    bench.send(operator, InvalidateRequest())
    assert bench.take(operator) == [Invalidated(3)]


def test_it_takes_one_lease_at_most_and_the_operator_is_not_late_meanwhile() -> None:
    bench = Bench()
    silent = Guest(bench)
    silent.register(A)
    operator = ask_to_invalidate(bench)
    bench.pass_time(LEASE_NS - 1)
    assert LIMITS.opening_ns < LEASE_NS
    assert bench.take(operator) == []
    bench.pass_time(LEASE_NS)
    assert bench.take(operator) == [Invalidated(2)]
    bench.pass_time(LEASE_NS + LIMITS.opening_ns)
    assert bench.refusal(operator) is RefusalCode.LATE


@pytest.mark.parametrize("how", ["hangs up", "asks again"])
def test_an_operator_that_does_not_wait_is_not_answered(how: str) -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    operator = ask_to_invalidate(bench)
    if how == "hangs up":
        bench.hang_up(operator)
    else:
        bench.send(operator, InvalidateRequest())
        assert bench.refusal(operator) is RefusalCode.FAULT
    guest.say(Ack(guest.session, 1))
    assert bench.take(operator) == []


def test_two_operators_are_both_answered() -> None:
    bench = Bench()
    guest = Guest(bench)
    guest.register(A)
    first, second = ask_to_invalidate(bench), ask_to_invalidate(bench)
    guest.say(Ack(guest.session, 1))
    assert [bench.take(first), bench.take(second)] == [[Invalidated(2)], [Invalidated(3)]]


# --- status --------------------------------------------------------------------------------------------------------


def test_the_status_tells_what_a_guest_holds_and_owes() -> None:
    bench = Bench()
    strict, access = Guest(bench), Guest(bench, "access")
    strict.register(A, B, C)
    Change(bench, A)
    bench.pass_time(300)
    asker = bench.open()
    bench.send(asker, StatusRequest())
    for guest in (strict, access):
        request = guest.take()[-1]
        assert isinstance(request, StatisticsRequest)
        guest.say(Statistics(request.serial, 0, 0, 0, 0, 0))
    *reports, reply = bench.take(asker)
    assert isinstance(reply, StatusReply)
    known = [
        (report.keys, report.recalls, report.unacked, report.lease_left_ns)
        for report in reports
        if isinstance(report, GuestReport)
    ]
    assert known == [(2, 1, 1, LEASE_NS - 300), (0, 0, 0, 0)]


def test_messages_of_who_has_left_the_books_cannot_come() -> None:
    """The ledger refuses them; the switchboard has dropped the peer by then."""
    bench = Bench()
    guest = Guest(bench)
    bench.pass_time(LEASE_NS)
    guest.say(Register(guest.session, 1, (A,)))
    assert not bench.leasing.is_held((A,))
    with pytest.raises(MessageError):
        bench.leasing._ledger.register(guest.session, (A,))
