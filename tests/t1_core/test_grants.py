"""The books of an agent, rule by rule."""

from __future__ import annotations

import pytest

from coherency.guest_agent import grants as grants_module
from coherency.guest_agent.grants import GrantedName, Grants, Revoked
from coherency.ids import Epoch, GrantKey, NodeId, SlotIndex
from coherency.leases import MAX_KEYS_PER_MESSAGE, attributes_key, names_key
from coherency.protocol import Register, Release

LEASE_NS = 1_000_000_000
EPOCH = Epoch(7)
SLOT, OTHER = SlotIndex(11), SlotIndex(12)
NODE, OTHER_NODE, DIRECTORY = NodeId(5), NodeId(6), NodeId(1)
NAME = GrantedName(DIRECTORY, b"name", NODE)
SESSION = 0x5E55


class Desk:
    """The books of a connected guest, with the daemon's end in the test's hands."""

    def __init__(self, **options: int) -> None:
        self.now_ns = 1_000
        self.sent: list[Register | Release] = []
        self.has_room = True
        self.grants = Grants(clock_ns=lambda: self.now_ns, **options)
        self.connect()

    def connect(self, session: int = SESSION) -> None:
        self.grants.begin(session, LEASE_NS, self.now_ns, self._send)

    def _send(self, message: Register | Release) -> bool:
        if self.has_room:
            self.sent.append(message)
        return self.has_room

    def register(self, *keys: GrantKey, confirm: bool = True, epoch: Epoch = EPOCH) -> int:
        """Returns the serial; 0 if nothing was sent."""
        before = len(self.sent)
        self.grants.register(keys, epoch)
        if len(self.sent) == before:
            return 0
        message = self.sent[-1]
        assert isinstance(message, Register)
        if confirm:
            assert self.grants.confirm(message.serial, epoch)
        return message.serial

    def attributes(self, slot: SlotIndex = SLOT, node: NodeId = NODE, epoch: Epoch = EPOCH) -> int:
        with self.grants.lock:
            return self.grants.grant_attributes(slot, node, epoch)

    def name(self, name: GrantedName = NAME, slot: SlotIndex = SLOT) -> int:
        with self.grants.lock:
            return self.grants.grant_name(slot, name, EPOCH)

    def registrations(self) -> list[tuple[GrantKey, ...]]:
        return [message.keys for message in self.sent if isinstance(message, Register)]

    def releases(self) -> list[tuple[GrantKey, ...]]:
        return [message.keys for message in self.sent if isinstance(message, Release)]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def whats(revoked: Revoked) -> list[object]:
    return [thing.what for thing in (*revoked.nodes, *revoked.names)]


BOTH = (attributes_key(SLOT), names_key(SLOT))

# --- 2: when a key is good for grants -----------------------------------------------------------------------------


def test_a_confirmed_key_grants_until_the_end_of_the_lease(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.now_ns += 300
    assert desk.attributes() == desk.name() == LEASE_NS - 300
    desk.grants.check()


def test_nothing_is_granted_before_the_confirm(desk: Desk) -> None:
    serial = desk.register(*BOTH, confirm=False)
    assert desk.attributes() == desk.name() == 0
    assert desk.grants.confirm(serial, EPOCH)
    assert desk.attributes() > 0


def test_the_first_question_registers_and_the_next_is_granted(desk: Desk) -> None:
    assert desk.attributes() == 0
    assert desk.registrations() == [(attributes_key(SLOT),)]
    assert desk.attributes() == 0
    assert len(desk.registrations()) == 1, "not again"
    assert desk.grants.confirm(1, EPOCH)
    assert desk.attributes() > 0


def test_the_one_key_is_not_good_for_the_other(desk: Desk) -> None:
    desk.register(attributes_key(SLOT))
    assert desk.attributes() > 0
    assert desk.name() == 0
    assert desk.attributes(OTHER, OTHER_NODE) == 0


def test_a_confirm_counts_for_keys_that_wait_for_that_very_serial(desk: Desk) -> None:
    early = desk.register(*BOTH, confirm=False)
    desk.grants.revoke([attributes_key(SLOT)])
    late = desk.register(attributes_key(SLOT), confirm=False)
    assert desk.grants.confirm(early, EPOCH)
    assert desk.attributes() == 0, "it was revoked after that Register"
    assert desk.name() > 0
    assert desk.grants.confirm(late, EPOCH)
    assert desk.attributes() > 0


def test_the_epoch_must_be_the_present_one(desk: Desk) -> None:
    desk.register(*BOTH)
    assert desk.attributes(epoch=Epoch(EPOCH + 1)) == 0
    assert desk.registrations()[-1] == (attributes_key(SLOT),), "asked for anew"
    assert desk.grants.confirm(2, EPOCH + 1)
    assert desk.attributes(epoch=Epoch(EPOCH + 1)) > 0


def test_no_lease_no_grant_and_no_registration(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.now_ns += LEASE_NS
    assert desk.attributes() == desk.name() == 0
    assert desk.register(attributes_key(OTHER)) == 0


def test_too_little_of_the_lease_is_none(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.now_ns += LEASE_NS - grants_module.SHORTEST_GRANT_NS + 1
    assert desk.attributes() == 0


def test_a_renewal_counts_from_its_sending_and_never_shortens(desk: Desk) -> None:
    desk.register(*BOTH)
    sent_ns = desk.now_ns + 500
    desk.now_ns = sent_ns + 300
    desk.grants.renew(sent_ns)
    assert desk.attributes() == LEASE_NS - 300
    desk.grants.renew(sent_ns - 400)
    assert desk.attributes() == LEASE_NS - 300


def test_an_unknown_confirm_is_told(desk: Desk) -> None:
    assert not desk.grants.confirm(1, EPOCH)
    serial = desk.register(*BOTH)
    assert desk.grants.confirm(serial, EPOCH), "said twice"
    assert not desk.grants.confirm(serial + 1, EPOCH)
    assert not desk.grants.confirm(0, EPOCH)


def test_of_an_earlier_connection_nothing_counts(desk: Desk) -> None:
    serial = desk.register(*BOTH, confirm=False)
    desk.grants.end()
    assert desk.attributes() == 0
    desk.connect(SESSION + 1)
    assert desk.grants.confirm(serial, EPOCH)
    assert desk.attributes() == desk.name() == 0
    assert desk.sent[-1].session == SESSION + 1
    assert all(serial < message.serial for message in desk.sent[1:] if isinstance(message, Register)), "never repeated"
    desk.grants.check()


# --- 3: revoking --------------------------------------------------------------------------------------------------


def test_revoking_finds_what_was_granted_and_ends_it(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.attributes()
    desk.attributes(node=OTHER_NODE)  # several nodes of one slot
    desk.name()
    revoked = desk.grants.revoke(BOTH)
    assert whats(revoked) == [NODE, OTHER_NODE, NAME]
    assert revoked.registered == BOTH
    assert desk.attributes() == desk.name() == 0
    desk.grants.check()


def test_revoking_one_slot_leaves_the_other(desk: Desk) -> None:
    desk.register(*BOTH, attributes_key(OTHER))
    desk.grants.revoke(BOTH)
    assert desk.attributes(OTHER, OTHER_NODE) > 0


def test_what_the_kernel_still_has_is_found_by_who_revokes_again(desk: Desk) -> None:
    """An own change has not dropped the name yet when the recall of another comes: that must not believe it gone."""
    desk.register(*BOTH)
    desk.name()
    first = desk.grants.revoke(BOTH)
    again = desk.grants.revoke(BOTH)
    assert whats(first) == whats(again) == [NAME]
    assert again.registered == ()
    desk.grants.dropped(first.names)
    assert whats(desk.grants.revoke(BOTH)) == []
    desk.grants.check()


def test_what_was_granted_anew_meanwhile_stays_in_the_books(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.name()
    revoked = desk.grants.revoke(BOTH)
    desk.register(*BOTH)
    assert desk.name() > 0
    desk.grants.dropped(revoked.names)
    assert whats(desk.grants.revoke(BOTH)) == [NAME]


def test_revoking_everything_also_ends_registrations_under_way(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.attributes()
    under_way = desk.register(attributes_key(OTHER), confirm=False)
    assert whats(desk.grants.revoke_everything()) == [NODE]
    assert desk.grants.confirm(under_way, EPOCH)
    assert desk.attributes(OTHER, OTHER_NODE) == 0
    desk.grants.check()


def test_the_end_of_the_connection_keeps_the_books(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.attributes()
    desk.name()
    desk.grants.end()
    revoked = desk.grants.revoke_everything()
    assert whats(revoked) == [NODE, NAME]
    desk.grants.dropped((*revoked.nodes, *revoked.names))
    assert desk.grants.statistics()[:4] == (0, 0, 0, 0)


def test_lapses_is_after_every_grant(desk: Desk) -> None:
    desk.register(*BOTH)
    ends_ns = desk.now_ns + desk.attributes()
    assert desk.grants.lapses_ns >= ends_ns
    desk.grants.end()
    assert desk.grants.lapses_ns >= ends_ns


# --- 4: changes of the guest's own ---------------------------------------------------------------------------------


def test_while_the_guest_changes_it_nothing_of_a_slot_is_registered(desk: Desk) -> None:
    desk.grants.begin_change([SLOT])
    desk.grants.begin_change([SLOT])
    assert desk.register(*BOTH) == 0
    assert desk.attributes() == 0
    assert desk.register(attributes_key(OTHER)) > 0
    desk.grants.end_change([SLOT])
    assert desk.register(*BOTH) == 0
    desk.grants.check()
    desk.grants.end_change([SLOT])
    assert desk.register(*BOTH) > 0


def test_a_name_that_is_withheld_is_not_granted_until_it_is_allowed_as_often(desk: Desk) -> None:
    desk.register(names_key(SLOT))
    desk.grants.withhold([NAME[:2]])
    desk.grants.withhold([NAME[:2]])
    desk.grants.allow([NAME[:2]])
    assert desk.name() == 0
    assert desk.name(NAME._replace(name=b"another")) > 0
    desk.grants.check()
    desk.grants.allow([NAME[:2]])
    assert desk.name() > 0


def test_a_name_that_is_held_off_is_not_granted_whatever_it_leads_to(desk: Desk) -> None:
    desk.register(*BOTH, names_key(OTHER))
    desk.grants.hold_off([NAME[:2]], 100)
    assert desk.name() == desk.name(NAME._replace(child=OTHER_NODE), OTHER) == 0
    assert desk.name(NAME._replace(name=b"another name of it")) > 0
    desk.now_ns += 100
    assert desk.name() > 0


def test_the_slot_of_a_granted_name_is_known(desk: Desk) -> None:
    desk.register(*BOTH)
    assert desk.grants.slot_of_name(DIRECTORY, b"name") is None
    desk.name()
    assert desk.grants.slot_of_name(DIRECTORY, b"name") == SLOT
    desk.grants.dropped(desk.grants.revoke(BOTH).names)
    assert desk.grants.slot_of_name(DIRECTORY, b"name") is None


def test_it_is_known_as_long_as_any_node_of_the_slot_is_granted_under_it(desk: Desk) -> None:
    """A directory that was moved and moved back is another node of the same slot."""
    desk.register(*BOTH)
    desk.name()
    desk.name(NAME._replace(child=OTHER_NODE))
    desk.grants.forget(NODE, SLOT)
    assert desk.grants.slot_of_name(DIRECTORY, b"name") == SLOT
    desk.grants.check()
    desk.grants.forget(OTHER_NODE, SLOT)
    assert desk.grants.slot_of_name(DIRECTORY, b"name") is None


# --- 5: the order of what is sent ---------------------------------------------------------------------------------


def test_what_was_registered_anew_is_not_released(desk: Desk) -> None:
    desk.register(*BOTH)
    revoked = desk.grants.revoke(BOTH)
    desk.register(names_key(SLOT))
    desk.grants.release(revoked.registered)
    assert desk.releases() == [(attributes_key(SLOT),)]


def test_a_release_that_finds_no_room_follows_unless_it_is_registered_again(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.has_room = False
    desk.grants.release(desk.grants.revoke(BOTH).registered)
    desk.has_room = True
    desk.register(attributes_key(SLOT))
    desk.grants.idle()
    assert desk.releases() == [(names_key(SLOT),)]


def test_a_register_that_finds_no_room_is_not_waited_for(desk: Desk) -> None:
    desk.has_room = False
    assert desk.register(*BOTH) == 0
    desk.has_room = True
    assert desk.register(*BOTH) > 0
    assert desk.attributes() > 0


def test_many_keys_are_released_in_messages_that_hold_them(desk: Desk) -> None:
    keys = [attributes_key(SlotIndex(slot)) for slot in range(MAX_KEYS_PER_MESSAGE + 1)]
    desk.register(*keys[:MAX_KEYS_PER_MESSAGE])
    desk.register(*keys[MAX_KEYS_PER_MESSAGE:])
    desk.grants.release(desk.grants.revoke(keys).registered)
    assert sorted(map(len, desk.releases())) == [1, MAX_KEYS_PER_MESSAGE]


# --- 6: bounds ----------------------------------------------------------------------------------------------------


def test_beyond_the_limit_nothing_is_registered() -> None:
    desk = Desk(max_keys=3)
    desk.register(*BOTH)
    assert desk.register(attributes_key(OTHER), names_key(OTHER)) == 0
    assert desk.register(attributes_key(OTHER)) > 0
    assert desk.name(GrantedName(DIRECTORY, b"other", OTHER_NODE), OTHER) == 0
    desk.grants.check()


def test_so_many_registers_may_be_under_way(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_module, "MAX_UNCONFIRMED", 1)
    first = desk.register(attributes_key(SLOT), confirm=False)
    assert desk.register(attributes_key(OTHER)) == 0
    desk.grants.confirm(first, EPOCH)
    assert desk.register(attributes_key(OTHER)) > 0


def test_what_was_not_used_for_long_is_idle(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.attributes()
    desk.now_ns += LEASE_NS // 2
    desk.grants.renew(desk.now_ns)
    assert desk.name() > 0
    desk.now_ns += grants_module.LAPSE_LEASES * LEASE_NS - LEASE_NS // 2
    assert desk.grants.idle() == [attributes_key(SLOT)]
    desk.now_ns += LEASE_NS // 2
    assert desk.grants.idle() == list(BOTH)
    assert whats(desk.grants.revoke(desk.grants.idle())) == [NODE, NAME]


def test_a_forgotten_node_is_struck_out(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.attributes()
    desk.attributes(node=OTHER_NODE)
    desk.name()
    desk.grants.forget(NODE, SLOT)
    assert whats(desk.grants.revoke(BOTH)) == [OTHER_NODE]
    desk.grants.forget(NODE, OTHER)  # was never in the books
    desk.grants.check()


def test_statistics(desk: Desk) -> None:
    desk.register(*BOTH)
    desk.register(attributes_key(OTHER), confirm=False)
    desk.attributes()
    desk.attributes()
    desk.name()
    assert desk.grants.statistics() == (3, 2, 1, 1, 2, 1)
