"""The ledger, rule by rule: who is told, who is waited for, and until when.  Numbers in names are those of its rules."""

import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import pytest

from coherency.daemon import ledger as ledger_module
from coherency.daemon.ledger import Ledger, Round
from coherency.errors import MessageError
from coherency.ids import GrantKey, SlotIndex
from coherency.leases import attributes_key, keys_of, names_key

LEASE_NS = 1000
SLOT_COUNT = 8
A, B, C = (attributes_key(SlotIndex(slot)) for slot in range(3))
ANN, BOB, PAM = 0xA11, 0xB0B, 0xFA3  # Ann and Bob are strict, Pam is prompt


class Desk:
    """A ledger that is checked after each use, its clock, and which rounds were woken, in order."""

    def __init__(self, max_keys: int = 4) -> None:
        self.now_ns = 0
        self.ledger = Ledger(lease_ns=LEASE_NS, slot_count=SLOT_COUNT, max_keys=max_keys)
        self.woken: list[str] = []
        for guest in (ANN, BOB, PAM):
            self.ledger.join(guest, waits=guest != PAM, now_ns=0)

    def register(self, guest: int, *keys: int) -> None:
        self.ledger.register(guest, keys)
        self.ledger.check()

    def ack(self, guest: int, serial: int) -> None:
        self.ledger.ack(guest, serial)
        self.ledger.check()

    def recall(self, *keys: GrantKey, name: str = "") -> Round:
        woken = len(self.woken)
        round_ = self.ledger.recall(keys, lambda: self.woken.append(name), self.now_ns)
        assert len(self.woken) == woken
        self.ledger.check()
        return round_

    def recall_everything(self, name: str = "") -> Round:
        round_ = self.ledger.recall_everything(lambda: self.woken.append(name), self.now_ns)
        self.ledger.check()
        return round_

    def pass_time(self, to_ns: int) -> tuple[int, ...]:
        self.now_ns = to_ns
        evicted = self.ledger.evict_due(to_ns)
        self.ledger.check()
        return evicted

    def refuses(self, say: Callable[[], object], match: str) -> None:
        """It is a fault, and nothing has changed."""
        before = self.ledger.statistics()
        with pytest.raises(MessageError, match=match):
            say()
        self.ledger.check()
        assert self.ledger.statistics() == before


# --- 1: sharers ----------------------------------------------------------------------------------------------------


def test_rule_1_a_guest_leaves_the_sharers_when_the_recall_is_made() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    assert desk.recall(A).tell == ((ANN, 1, (A,)),)
    again = desk.recall(A)
    assert again.tell == ()
    assert again.pending  # for the first
    assert desk.ledger.statistics().registrations == 1


def test_rule_1_registered_again_it_is_a_sharer_and_still_owes() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.recall(A, name="first")
    desk.register(ANN, A)
    second = desk.recall(A, name="second")
    assert second.tell == ((ANN, 2, (A,)),)
    desk.ack(ANN, 1)
    assert desk.woken == ["first"]
    assert second.pending
    assert desk.ledger.is_held([A])  # by the second
    desk.ack(ANN, 2)
    assert desk.woken == ["first", "second"]
    assert not desk.ledger.is_held([A])


def test_rule_1_an_ack_does_not_touch_a_newer_registration() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.recall(A)
    desk.register(ANN, A)
    desk.ack(ANN, 1)
    assert desk.recall(A).tell == ((ANN, 2, (A,)),)


def test_rule_1_registering_twice_is_registering_once() -> None:
    desk = Desk()
    desk.register(ANN, A, A)
    desk.register(ANN, A)
    assert desk.ledger.statistics().registrations == 1
    assert desk.recall(A, A).tell == ((ANN, 1, (A,)),)


def test_rule_1_who_has_released_is_not_told() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.register(BOB, A)
    desk.ledger.release(ANN, (A, C))  # C was never registered, or recalled while this was under way
    desk.ledger.check()
    assert desk.recall(A, B).tell == ((BOB, 1, (A,)), (ANN, 1, (B,)))


def test_rule_1_releasing_pays_no_debts() -> None:
    desk = Desk()
    desk.register(ANN, A)
    round_ = desk.recall(A)
    desk.ledger.release(ANN, (A,))
    assert round_.pending
    assert desk.recall(A).pending


def test_rule_1_names_and_attributes_of_a_slot_are_apart() -> None:
    desk = Desk()
    slot = SlotIndex(3)
    desk.register(ANN, attributes_key(slot))
    desk.register(BOB, names_key(slot))
    assert [tell.guest for tell in desk.recall(*keys_of([slot])).tell] == [ANN]
    assert [tell.guest for tell in desk.recall(*keys_of([slot], leaving=[slot])).tell] == [BOB]


# --- 2: serials ----------------------------------------------------------------------------------------------------


def test_rule_2_serials_are_per_guest_and_without_gaps() -> None:
    desk = Desk()
    for guest, keys in ((ANN, (A, B, C)), (BOB, (B, C)), (PAM, (C,))):
        desk.register(guest, *keys)
    tell = [(guest, serial) for key in (A, B, C) for guest, serial, _ in desk.recall(key).tell]
    assert tell == [(ANN, 1), (ANN, 2), (BOB, 1), (ANN, 3), (BOB, 2), (PAM, 1)]


def test_rule_2_one_change_of_several_keys_is_one_recall() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    assert desk.recall(B, C, A).tell == ((ANN, 1, (B, A)),)


def test_rule_2_an_ack_covers_all_before() -> None:
    desk = Desk()
    desk.register(ANN, A, B, C)
    for name, key in (("a", A), ("b", B), ("c", C)):
        desk.recall(key, name=name)
    desk.ack(ANN, 2)
    assert desk.woken == ["a", "b"]
    desk.ack(ANN, 2)
    desk.ack(ANN, 1)
    assert desk.woken == ["a", "b"]
    desk.ack(ANN, 3)
    assert desk.woken == ["a", "b", "c"]


# --- 3: rounds -----------------------------------------------------------------------------------------------------


def test_rule_3_a_round_waits_for_all_strict_sharers() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.register(BOB, B)
    round_ = desk.recall(A, B, name="both")
    desk.ack(BOB, 1)
    assert round_.owed == {ANN: 1}
    desk.ack(ANN, 1)
    assert round_.owed == {}
    assert desk.woken == ["both"]


def test_rule_3_an_overlapping_round_waits_for_what_the_other_has_sent() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.register(BOB, B, C)
    first = desk.recall(A, B, name="first")
    second = desk.recall(B, C, name="second")
    assert first.owed == {ANN: 1, BOB: 1}
    assert second.tell == ((BOB, 2, (C,)),)
    assert second.owed == {ANN: 1, BOB: 2}
    desk.ack(BOB, 2)
    assert desk.woken == []
    desk.ack(ANN, 1)
    assert desk.woken == ["first", "second"]


def test_rule_3_not_for_other_keys() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.recall(A)
    other = desk.recall(C, name="never")
    assert not other.pending
    desk.ack(ANN, 1)
    assert desk.woken == [""]


def test_rule_3_a_prompt_guest_is_told_and_not_waited_for() -> None:
    desk = Desk()
    desk.register(PAM, A)
    round_ = desk.recall(A)
    assert round_.tell == ((PAM, 1, (A,)),)
    assert not round_.pending
    assert not desk.recall(A).pending
    desk.register(ANN, A)
    desk.register(PAM, A)
    mixed = desk.recall(A)
    assert {tell.guest for tell in mixed.tell} == {ANN, PAM}
    assert mixed.owed == {ANN: 1}
    desk.ack(PAM, 2)
    assert mixed.pending


def test_rule_3_a_recall_of_everything_is_a_recall_of_each_key() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.register(PAM, C)
    desk.register(BOB, C)
    desk.recall(C, name="before")
    desk.register(PAM, C)
    everything = desk.recall_everything("everything")
    assert set(everything.tell) == {(ANN, 1, ()), (PAM, 2, ())}
    assert everything.owed == {ANN: 1, BOB: 1}
    assert desk.ledger.statistics().registrations == 0
    assert desk.ledger.is_held([C])
    after = desk.recall(A, name="after")
    assert after.tell == ()
    assert after.owed == {ANN: 1}
    assert desk.recall(C).owed == {ANN: 1, BOB: 1}
    desk.ack(ANN, 1)
    assert desk.woken == ["after"]
    assert not desk.ledger.is_held([A])
    desk.ack(BOB, 1)
    assert desk.woken[:3] == ["after", "before", "everything"]


def test_rule_3_a_recall_of_everything_when_nobody_has_anything() -> None:
    round_ = Desk().recall_everything()
    assert (round_.tell, round_.pending) == ((), False)


# --- 4: how a wait ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["ack", "leave", "lease"])
def test_rule_4_a_wait_ends_with(end: str) -> None:
    desk = Desk()
    desk.register(ANN, A)
    round_ = desk.recall(A, name="it")
    assert round_.until_ns == LEASE_NS
    match end:
        case "ack":
            desk.ack(ANN, 1)
        case "leave":
            desk.ledger.leave(ANN)
        case "lease":
            assert desk.pass_time(LEASE_NS - 1) == ()
            assert round_.pending
            assert desk.pass_time(LEASE_NS) == (ANN, BOB, PAM)
    assert not round_.pending
    assert desk.woken == ["it"]
    desk.ledger.check()


def test_rule_4_a_guest_that_leaves_ends_all_waits_for_it_and_no_others() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.register(BOB, B)
    desk.recall(A, name="a")
    both = desk.recall(B, name="both")
    desk.ledger.leave(ANN)
    assert desk.woken == ["a"]
    assert both.owed == {BOB: 1}
    desk.ack(BOB, 1)
    assert desk.woken == ["a", "both"]


def test_rule_4_no_round_waits_longer_than_one_lease() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.register(BOB, A)
    desk.pass_time(300)
    assert desk.ledger.renew(BOB, 300)
    desk.pass_time(700)
    assert desk.ledger.renew(ANN, 700)
    round_ = desk.recall(A, name="it")
    assert round_.until_ns == 700 + LEASE_NS
    assert desk.pass_time(1300) == (PAM, BOB)
    assert round_.owed == {ANN: 1}
    assert desk.pass_time(round_.until_ns) == (ANN,)
    assert desk.woken == ["it"]


def test_rule_4_a_round_that_waits_for_nobody_ends_now() -> None:
    desk = Desk()
    desk.pass_time(7)
    assert desk.recall(A).until_ns == 7


def test_whoever_gives_up_is_not_woken_and_leaves_the_debts() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.register(BOB, A)
    given_up, patient = desk.recall(A, name="given up"), desk.recall(A, name="patient")
    desk.ledger.abandon(given_up)
    desk.ledger.check()
    assert not given_up.pending
    assert desk.ledger.statistics().waiting == 1
    assert not desk.ledger.renew(ANN, 1)
    later = desk.recall(A, name="later")
    assert later.owed == {ANN: 1, BOB: 1}
    desk.ack(ANN, 1)
    desk.ack(BOB, 1)
    assert not patient.pending
    assert desk.woken == ["patient", "later"]
    desk.ledger.abandon(given_up)
    desk.ledger.abandon(patient)
    desk.ledger.check()
    assert desk.ledger.statistics().waiting == 0


def test_a_wake_finds_the_books_in_order() -> None:
    desk = Desk()
    desk.register(ANN, A)
    seen = []

    def wake() -> None:
        desk.ledger.check()
        seen.append(desk.ledger.is_held([A]))

    for _ in range(2):
        desk.ledger.recall([A], wake, 0)
    desk.ack(ANN, 1)
    desk.register(BOB, A)
    desk.ledger.recall([A], wake, 0)
    desk.pass_time(LEASE_NS)
    assert seen == [False] * 3


# --- 5 and 6: leases -----------------------------------------------------------------------------------------------


def test_rule_5_who_renews_and_owes_nothing_stays_for_ever() -> None:
    desk = Desk()
    desk.register(ANN, A)
    for turn in range(1, 100):
        desk.pass_time(turn * (LEASE_NS - 1))
        assert desk.ledger.renew(ANN, desk.now_ns)
        assert desk.ledger.next_deadline_ns is not None
    assert desk.recall(A).tell == ((ANN, 1, (A,)),)


@pytest.mark.parametrize("guest", [ANN, PAM])
def test_rule_5_who_owes_an_ack_is_not_renewed(guest: int) -> None:
    desk = Desk()
    desk.register(guest, A, B)
    desk.recall(A)
    desk.recall(B)
    desk.pass_time(500)
    assert not desk.ledger.renew(guest, 500)
    desk.ack(guest, 1)
    assert not desk.ledger.renew(guest, 500)
    desk.ack(guest, 2)
    assert desk.ledger.renew(guest, 500)
    assert guest not in desk.pass_time(LEASE_NS)
    assert desk.pass_time(500 + LEASE_NS) == (guest,)


def test_rule_5_what_was_recalled_after_the_guest_asked_does_not_count() -> None:
    """Or else a guest that is recalled all the time would never be renewed."""
    desk = Desk()
    desk.register(ANN, A, B)
    desk.recall(A)
    asked_at_ns, owed = 300, desk.ledger.books(ANN).recalls
    desk.pass_time(400)
    late = desk.recall(B)
    assert not desk.ledger.renew(ANN, asked_at_ns, owed=owed)
    desk.ack(ANN, 1)
    assert desk.ledger.renew(ANN, asked_at_ns, owed=owed)
    assert ANN not in desk.pass_time(LEASE_NS)
    assert late.pending
    assert desk.pass_time(asked_at_ns + LEASE_NS) == (ANN,)  # no longer than one lease from the beginning of `late`
    assert not late.pending


def test_rule_5_a_renewal_that_comes_late_shortens_nothing() -> None:
    desk = Desk()
    assert desk.ledger.renew(ANN, 500)
    assert desk.ledger.renew(ANN, 300, owed=0)
    assert ANN not in desk.pass_time(300 + LEASE_NS)


def test_books_of_one_guest() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.recall(A)
    assert desk.ledger.books(ANN) == (1, 1, 1, LEASE_NS)
    desk.refuses(lambda: desk.ledger.books(ANN + 1), "none or over")


def test_rule_5_of_everything_too() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.recall_everything()
    assert not desk.ledger.renew(ANN, 1)
    assert desk.ledger.renew(BOB, 1)  # had nothing, owes nothing


def test_rule_6_leases_end_in_order_and_at_their_time() -> None:
    desk = Desk()
    desk.ledger.renew(BOB, 10)
    desk.ledger.renew(ANN, 20)
    ends = []
    while (next_ns := desk.ledger.next_deadline_ns) is not None:
        assert desk.pass_time(next_ns - 1) == ()
        ends.append((next_ns, desk.pass_time(next_ns)))
    assert ends == [(LEASE_NS, (PAM,)), (LEASE_NS + 10, (BOB,)), (LEASE_NS + 20, (ANN,))]
    assert desk.ledger.statistics().evictions == 3


def test_rule_6_several_leases_end_at_once() -> None:
    desk = Desk()
    desk.ledger.renew(ANN, 20)
    assert desk.pass_time(2 * LEASE_NS) == (BOB, PAM, ANN)


def test_rule_6_nothing_remains_of_an_evicted_guest() -> None:
    desk = Desk()
    for guest in (ANN, BOB, PAM):
        desk.register(guest, A, B)
    desk.recall(A)
    desk.recall_everything()
    desk.register(ANN, C)
    desk.pass_time(LEASE_NS)
    figures = desk.ledger.statistics()
    assert (figures.guests, figures.keys, figures.registrations, figures.unacked, figures.waiting) == (0, 0, 0, 0, 0)
    assert not desk.ledger.is_held([A, B, C])


@pytest.mark.parametrize("guest", [ANN, 12345])
def test_rule_6_who_is_unknown_is_at_fault_whatever_it_says(guest: int) -> None:
    desk = Desk()
    desk.ledger.leave(ANN)
    for say in (
        lambda: desk.ledger.register(guest, (A,)),
        lambda: desk.ledger.release(guest, (A,)),
        lambda: desk.ledger.ack(guest, 1),
        lambda: desk.ledger.renew(guest, 0),
    ):
        desk.refuses(say, f"session {guest:#x}, which is none or over")
    desk.ledger.lose(guest)  # that its connection ends, too, is news to nobody
    desk.ledger.leave(guest)
    desk.ledger.check()


def test_rule_6_a_session_begins_once() -> None:
    desk = Desk()
    with pytest.raises(ValueError, match="session 0xa11 is already there"):
        desk.ledger.join(ANN, waits=False, now_ns=0)
    desk.ledger.check()


def test_rule_6_a_session_after_another_owes_nothing_of_it() -> None:
    desk = Desk()
    desk.register(ANN, A)
    desk.recall(A, name="it")
    desk.ledger.leave(ANN)
    desk.ledger.join(ANN + 1, waits=True, now_ns=5)
    assert desk.woken == ["it"]
    assert not desk.recall(A).pending
    assert desk.ledger.renew(ANN + 1, 6)
    desk.register(ANN + 1, A)
    assert desk.recall(A).tell == ((ANN + 1, 1, (A,)),)


# --- 7: lost guests ------------------------------------------------------------------------------------------------


def test_rule_7_a_lost_guest_is_waited_for_and_not_told() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.ledger.lose(ANN)
    desk.ledger.lose(ANN)
    assert desk.ledger.statistics().lost == 1
    assert desk.ledger.is_held([A])
    first, second = desk.recall(A), desk.recall(A)
    assert (first.tell, first.owed) == (second.tell, second.owed) == ((), {ANN: 1})
    assert not desk.ledger.renew(ANN, 1)
    assert ANN in desk.pass_time(LEASE_NS)
    assert desk.woken == ["", ""]


def test_rule_7_it_registers_nothing() -> None:
    desk = Desk()
    desk.ledger.lose(ANN)
    desk.refuses(lambda: desk.ledger.register(ANN, (A,)), "connection that is lost")


def test_rule_7_saying_hello_again_ends_the_wait() -> None:
    desk = Desk()
    desk.register(ANN, A)
    before = desk.recall(A, name="before")
    desk.ledger.lose(ANN)
    during = desk.recall_everything("during")
    assert before.pending
    assert during.pending
    desk.ledger.leave(ANN)  # which HELLO with its former session means
    desk.ledger.join(ANN + 1, waits=True, now_ns=1)
    assert desk.woken == ["before", "during"]


def test_rule_7_nobody_waits_for_a_lost_prompt_guest() -> None:
    desk = Desk()
    desk.register(PAM, A)
    desk.ledger.lose(PAM)
    round_ = desk.recall(A)
    assert (round_.tell, round_.pending) == ((), False)


# --- 8: hostile guests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(2 * SLOT_COUNT,), (A, 2**32 - 1), (-1, A), (A, -(2**63))])
def test_rule_8_keys_that_the_table_does_not_have(keys: Collection[int]) -> None:
    desk = Desk()
    desk.register(ANN, B)
    desk.refuses(lambda: desk.ledger.register(ANN, keys), "names a key beyond the table's 16")
    desk.refuses(lambda: desk.ledger.release(ANN, keys), "names a key beyond the table's 16")


def test_rule_8_the_last_key_and_none_at_all_are_right() -> None:
    desk = Desk()
    last = names_key(SlotIndex(SLOT_COUNT - 1))
    desk.register(ANN, last)
    desk.register(ANN)
    assert desk.recall(last).tell == ((ANN, 1, (last,)),)


def test_rule_8_a_guest_holds_so_many_keys_and_no_more() -> None:
    desk = Desk(max_keys=2)
    desk.register(ANN, A, B)
    desk.register(ANN, B, A)
    desk.refuses(lambda: desk.ledger.register(ANN, (A, C)), "registers more than 2 keys")
    desk.recall(A)  # unacked, but not registered any more
    desk.register(ANN, C)
    desk.refuses(lambda: desk.ledger.register(ANN, (A,)), "registers more than 2 keys")
    desk.ledger.release(ANN, (B,))
    desk.register(ANN, A)
    desk.register(BOB, A, B)  # each has its own bound


@pytest.mark.parametrize("serial", [0, 2, 2**64 - 1])
def test_rule_8_an_ack_of_what_was_never_sent(serial: int) -> None:
    desk = Desk()
    desk.register(ANN, A)
    round_ = desk.recall(A)
    desk.register(BOB, A)
    desk.recall(A)
    desk.refuses(lambda: desk.ledger.ack(ANN, serial), f"acks recall {serial} of 1")
    assert round_.pending


def test_rule_8_no_guest_acks_for_another() -> None:
    desk = Desk()
    desk.register(ANN, A)
    round_ = desk.recall(A)
    desk.refuses(lambda: desk.ledger.ack(BOB, 1), "acks recall 1 of 0")
    assert round_.pending


# --- 9 and 10: what it costs ---------------------------------------------------------------------------------------


def lines_of(do: Callable[[], object]) -> int:
    """How many lines of the ledger are run by this: a cost that does not depend on the machine."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_globals.get("__name__") == ledger_module.__name__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(before)
    return count


def crowd(guests: int, keys_each: int, *, shared: int = 0) -> Ledger:
    """So many guests, each with keys of its own; key 0 is shared by so many of them, and key 1 by nobody."""
    ledger = Ledger(lease_ns=LEASE_NS, slot_count=1 << 16)
    for guest in range(1, guests + 1):
        ledger.join(guest, waits=True, now_ns=0)
        ledger.register(guest, range(2 + guest * keys_each, 2 + (guest + 1) * keys_each))
        if guest <= shared:
            ledger.register(guest, (0,))
    return ledger


CROWDS = [(1, 1), (1, 1000), (200, 1), (200, 100)]
HOT, COLD = GrantKey(0), GrantKey(1)


def wake_nobody() -> None:
    pass


def test_rule_9_what_nobody_has_costs_the_same_in_any_crowd() -> None:
    def costs(ledger: Ledger) -> tuple[int, int]:
        return lines_of(lambda: ledger.is_held((COLD,))), lines_of(lambda: ledger.recall((COLD,), wake_nobody, 0))

    assert len({costs(crowd(*size)) for size in CROWDS}) == 1


def test_rule_9_a_recall_costs_what_its_sharers_cost() -> None:
    def cost(shared: int, guests: int, keys_each: int) -> int:
        ledger = crowd(guests, keys_each, shared=shared)
        return lines_of(lambda: ledger.recall((HOT,), wake_nobody, 0))

    assert cost(2, 2, 1) == cost(2, 200, 1) == cost(2, 200, 100)
    assert cost(20, 20, 1) - cost(10, 20, 1) == cost(200, 200, 1) - cost(190, 200, 1)


def test_rule_9_an_ack_costs_what_it_pays_for() -> None:
    def cost(guests: int, keys_each: int) -> int:
        ledger = crowd(guests, keys_each, shared=1)
        ledger.recall((HOT,), wake_nobody, 0)
        return lines_of(lambda: ledger.ack(1, 1))

    assert len({cost(*size) for size in CROWDS}) == 1


def test_negative_control_lines_do_show_what_grows() -> None:
    assert lines_of(crowd(200, 1).statistics) > 10 * lines_of(crowd(2, 1).statistics)


def test_rule_9_what_nobody_has_any_more_is_not_in_the_books() -> None:
    desk = Desk()
    assert not desk.ledger.is_held([A])
    desk.register(ANN, A, B)
    desk.register(PAM, A)
    assert desk.ledger.is_held([C, A])
    desk.recall(A)
    assert desk.ledger.is_held([A])
    desk.ack(ANN, 1)
    assert not desk.ledger.is_held([A])
    desk.ledger.release(ANN, (B,))
    assert not desk.ledger.is_held([A, B, C])
    assert desk.ledger.statistics().keys == 0


def test_rule_9_a_thousand_guests_may_share() -> None:
    ledger = crowd(1000, 1, shared=1000)
    round_ = ledger.recall((HOT,), wake_nobody, 0)
    assert [tell.guest for tell in round_.tell] == list(range(1, 1001))
    for guest in range(1, 1001):
        assert round_.pending
        ledger.ack(guest, 1)
    assert not round_.pending
    ledger.check()


def test_statistics() -> None:
    desk = Desk()
    desk.register(ANN, A, B)
    desk.register(PAM, A)
    desk.recall(A)
    desk.recall(C)
    desk.ledger.lose(BOB)
    assert desk.ledger.statistics()._asdict() == {
        "guests": 3, "lost": 1, "keys": 2, "registrations": 1, "unacked": 2, "waiting": 1,
        "rounds": 2, "waits": 1, "recalls": 2, "evictions": 0,
    }  # fmt: skip
