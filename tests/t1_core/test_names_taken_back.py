"""Which names a kernel may rename: not those that it may have resolved by a grant which has been taken back."""

from collections.abc import Iterator

import pytest

from coherency.guest_agent.grants import LAPSE_LEASES, GrantedName, Grants, Revoked
from coherency.ids import Epoch, NodeId, SlotIndex
from coherency.leases import names_key
from coherency.protocol import Register, Release

SLOT, OTHER_SLOT, EPOCH, LEASE_NS = SlotIndex(5), SlotIndex(6), Epoch(3), 10**9
NAME = GrantedName(NodeId(1), b"name", NodeId(7))
REPLACED = GrantedName(NodeId(1), b"name", NodeId(8))


class Agent:
    """Books with everything that they need."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.grants = Grants(clock_ns=lambda: self.now_ns)
        self.grants.begin(1, LEASE_NS, 0, self._send)
        self._sent: list[Register] = []

    def _send(self, message: Register | Release) -> bool:
        if isinstance(message, Register):
            self._sent.append(message)
        return True

    def grant(self, name: GrantedName = NAME, slot: SlotIndex = SLOT) -> None:
        self.grants.register([names_key(slot)], EPOCH)
        for message in self._sent:
            self.grants.confirm(message.serial, EPOCH)
        with self.grants.lock:
            assert self.grants.grant_name(slot, name, EPOCH)

    def look_up(self) -> None:
        with self.grants.lock:
            self.grants.looked_up(NAME[:2])

    def revoke(self, slot: SlotIndex = SLOT) -> Revoked:
        return self.grants.revoke([names_key(slot)])

    @property
    def may_move(self) -> bool:
        return self.grants.may_be_moved(NAME[:2])


@pytest.fixture
def agent() -> Iterator[Agent]:
    agent = Agent()
    yield agent
    agent.grants.check()


def test_who_was_never_granted_anything_may(agent: Agent) -> None:
    assert agent.may_move
    agent.revoke()
    assert agent.may_move


def test_not_between_the_recall_and_the_next_look(agent: Agent) -> None:
    agent.grant()
    agent.grants.dropped(agent.revoke().names)
    assert not agent.may_move
    agent.look_up()
    assert agent.may_move


def test_another_recall_of_the_same_grant_says_nothing_new(agent: Agent) -> None:
    """While the first one is being carried out. Else the kernel, which tries again only once, would be refused twice."""
    agent.grant()
    agent.revoke()
    agent.look_up()
    agent.revoke()
    assert agent.may_move


def test_each_grant_that_is_taken_back_counts(agent: Agent) -> None:
    agent.grant()
    agent.revoke()
    agent.look_up()
    agent.grant(REPLACED, OTHER_SLOT)
    assert agent.may_move, "it is granted: that is another question"
    agent.revoke(OTHER_SLOT)
    assert not agent.may_move


def test_everything_that_is_taken_back_counts(agent: Agent) -> None:
    agent.grant()
    agent.grants.revoke_everything()
    assert not agent.may_move


def test_after_its_time_no_grant_is_left(agent: Agent) -> None:
    agent.grant()
    agent.grants.dropped(agent.revoke().names)
    agent.now_ns = LAPSE_LEASES * LEASE_NS
    assert agent.may_move
    agent.grants.idle()
    assert not agent.grants._taken_back
