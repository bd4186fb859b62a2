"""Who is told what, with frames as bytes."""

import pytest

from coherency.daemon.peer_states import PeerId
from coherency.daemon.subscribers import Subscribers
from coherency.events import Event, EventKind
from coherency.ids import HostInode
from coherency.protocol import Message
from coherency.protocol_events import MAX_EVENTS_PER_MESSAGE, Happened, Subscribe
from coherency.protocol_stream import Decoder
from tests.switchboards import FIRST_SESSION, OWNER, STRANGER, Bench

ONE, TWO = PeerId(1), PeerId(2)


def event(number: int, name: bytes = b"name") -> Event:
    return Event(EventKind.CREATED, HostInode(number), False, HostInode(1), name)


class Guests:
    """What each has been sent and has not read."""

    def __init__(self, unsent_bytes: int = 1 << 20) -> None:
        self.subscribers = Subscribers(unsent_bytes)
        self.unread = {ONE: b"", TWO: b""}

    def tell(self, *events: Event, origin: int | None = None) -> None:
        for peer, frame in self.subscribers.tell(events, origin, lambda peer: len(self.unread[peer])):
            self.unread[peer] += frame
        self.subscribers.check()

    def read(self, peer: PeerId) -> list[Message]:
        data, self.unread[peer] = self.unread[peer], b""
        return Decoder().feed(data)


def test_who_does_not_want_to_know_is_not_told() -> None:
    guests = Guests()
    assert not guests.subscribers
    guests.subscribers.add(ONE, 11)
    assert guests.subscribers
    guests.tell(event(1))
    assert guests.read(ONE) == [Happened(0, (event(1),))]
    assert guests.read(TWO) == []
    guests.subscribers.discard(ONE)
    guests.subscribers.discard(TWO)
    guests.tell(event(2))
    assert guests.read(ONE) == []


def test_who_did_it_is_not_told() -> None:
    guests = Guests()
    guests.subscribers.add(ONE, 11)
    guests.subscribers.add(TWO, 12)
    guests.tell(event(1), origin=11)
    assert (guests.read(ONE), guests.read(TWO)) == ([], [Happened(0, (event(1),))])


def test_many_at_once_come_in_order_in_messages_that_can_be_sent() -> None:
    guests = Guests()
    guests.subscribers.add(ONE, 11)
    many = [event(number, bytes([number % 200 + 50]) * 255) for number in range(2 * MAX_EVENTS_PER_MESSAGE + 1)]
    guests.tell(*many)
    messages = guests.read(ONE)
    assert len(messages) == 3
    assert [each for message in messages if isinstance(message, Happened) for each in message.events] == many


def test_who_does_not_read_loses_events_and_hears_how_many() -> None:
    guests = Guests(unsent_bytes=500)
    guests.subscribers.add(ONE, 11)
    for number in range(100):
        guests.tell(event(number))
        assert len(guests.unread[ONE]) <= 500
    first = guests.read(ONE)
    guests.tell(event(100))
    assert guests.read(ONE) == [Happened(100 - len(first), (event(100),))]
    guests.tell(event(101))
    assert guests.read(ONE) == [Happened(0, (event(101),))]
    assert guests.subscribers.statistics() == (1, len(first) + 2, 100 - len(first))


def test_who_reads_loses_nothing() -> None:
    """Control: the same, with a guest that reads."""
    guests = Guests(unsent_bytes=500)
    guests.subscribers.add(ONE, 11)
    for number in range(100):
        guests.tell(event(number))
        assert guests.read(ONE) == [Happened(0, (event(number),))]


# --- at the switchboard -------------------------------------------------------------------------------------------


def subscribed(bench: Bench, session: int = FIRST_SESSION) -> PeerId:
    bench.credentials = OWNER
    peer = bench.guest()
    bench.send(peer, Subscribe(session))
    return peer


def test_a_guest_subscribes_until_its_connection_ends() -> None:
    bench = Bench()
    peer = subscribed(bench)
    assert bench.board.subscribers
    bench.hang_up(peer)
    assert not bench.board.subscribers


def test_a_subscription_of_another_session_counts_for_nothing() -> None:
    bench = Bench()
    peer = subscribed(bench, FIRST_SESSION + 1)
    assert not bench.board.subscribers
    assert peer not in bench.dropped


def test_a_stranger_may_not() -> None:
    bench = Bench()
    bench.credentials = STRANGER
    peer = bench.guest()
    bench.send(peer, Subscribe(FIRST_SESSION))
    assert not bench.board.subscribers
    assert bench.dropped[peer].reason == "may not subscribe: only root and the daemon's own user may"


def test_who_is_no_guest_may_not() -> None:
    bench = Bench()
    peer = bench.open(OWNER)
    bench.send(peer, Subscribe(FIRST_SESSION))
    assert peer in bench.dropped


@pytest.mark.parametrize("mode", ["none", "access", "strict"])
def test_guests_of_any_mode_may(mode: str) -> None:
    bench = Bench()
    bench.credentials = OWNER
    peer = bench.guest(mode=mode)
    bench.send(peer, Subscribe(FIRST_SESSION))
    assert bench.board.subscribers
    assert peer not in bench.dropped
