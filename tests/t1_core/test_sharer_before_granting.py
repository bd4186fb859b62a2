"""Recalls that come while the mount is being made: what they are about must be registered again before it is granted."""

from typing import Any, cast

import pytest

from coherency.guest_agent.channel import Channel
from coherency.guest_agent.grants import Grants
from coherency.guest_agent.sharer import Sharer
from coherency.ids import Epoch, GrantKey, NodeId, SlotIndex
from coherency.leases import attributes_key
from coherency.protocol import Ack, Confirm, Message, Recall, Register, Welcome

SESSION, EPOCH, SLOT, NODE = 7, Epoch(3), SlotIndex(5), NodeId(11)
LEASE_NS = 10**10


class Sent:
    """A channel that takes everything."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def offer(self, message: Message) -> bool:
        self.messages.append(message)
        return True

    def send(self, message: Message) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("keys", [(attributes_key(SLOT),), ()])
def test_what_was_recalled_before_anything_was_granted_is_not_granted(keys: tuple[GrantKey, ...]) -> None:
    grants, sent = Grants(clock_ns=lambda: 0), Sent()
    sharer = Sharer(grants, clock_ns=lambda: 0)
    sharer.joined(Welcome(1, SESSION, LEASE_NS, 1, 2, 4096, 10**9, "/share", "/export"), 0, cast(Channel, sent))

    def register() -> None:
        grants.register([attributes_key(SLOT)], EPOCH)
        assert isinstance(sent.messages[-1], Register)
        assert sharer.handle(Confirm(SESSION, sent.messages[-1].serial, EPOCH)) is None

    def grant() -> int:
        with grants.lock:
            return grants.grant_attributes(SLOT, NODE, EPOCH)

    register()
    assert sharer.handle(Recall(SESSION, 1, keys)) is None
    assert sent.messages[-1] == Ack(SESSION, 1)
    assert grant() == 0, "the daemon would tell nobody of the next change"
    register()
    assert grant() > 0
