"""Events over real sockets: who is told, and that nobody is dropped, or waited for, on account of events."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from coherency.daemon.events import Events
from coherency.daemon.origins import Origins
from coherency.events import Event, EventKind
from coherency.guest_agent.client import fetch_status
from coherency.ids import HostInode
from coherency.protocol_events import Happened, Subscribe
from tests.control_daemon import ControlDaemon
from tests.scripted_guests import ScriptedGuest
from tests.waiting import until


def event(number: int, name: bytes = b"name") -> Event:
    return Event(EventKind.CREATED, HostInode(number), False, HostInode(1), name)


@pytest.fixture
def daemon(socket_dir: Path) -> Iterator[ControlDaemon]:
    with ControlDaemon(socket_dir, "share-1") as daemon:
        yield daemon


def subscriber(daemon: ControlDaemon, mode: str = "access") -> ScriptedGuest:
    guest = ScriptedGuest(daemon.path, mode)
    guest.say(Subscribe(guest.session))
    return guest


def settle(daemon: ControlDaemon) -> None:
    fetch_status(daemon.root, daemon.name)


def test_who_has_subscribed_is_told_but_for_who_did_it(daemon: ControlDaemon) -> None:
    events = Events(daemon.server)
    assert [events.wanted] == [False]
    with subscriber(daemon) as one, subscriber(daemon, "strict") as two, ScriptedGuest(daemon.path) as deaf:
        settle_guests(daemon, one, two)
        assert [events.wanted] == [True]
        events.tell(event(1), event(2))
        events.tell(event(3), origin=one.session)
        assert one.hear(Happened) == Happened(0, (event(1), event(2)))
        assert [two.hear(Happened), two.hear(Happened)] == [Happened(0, (event(1), event(2))), Happened(0, (event(3),))]
        assert one.hears_nothing()
        assert deaf.hears_nothing()
    settle(daemon)
    assert [events.wanted] == [False]


def settle_guests(daemon: ControlDaemon, *guests: ScriptedGuest) -> None:
    """Until the daemon has read what these have said."""
    until(lambda: daemon.server.subscribers.statistics().subscribers == len(guests))


def test_a_guest_that_does_not_read_loses_events_and_nothing_else(daemon: ControlDaemon) -> None:
    events = Events(daemon.server)
    with subscriber(daemon) as slow:
        settle_guests(daemon, slow)
        for number in range(4000):
            events.tell(event(number, b"n" * 255))
        assert daemon.server.statistics().dropped == 0
        lost = daemon.server.subscribers.statistics().lost
        assert lost > 0
        heard = 0
        while heard + lost < 4000:
            message = slow.hear(Happened)
            assert message.lost == 0
            heard += len(message.events)
        events.tell(event(4000))
        assert slow.hear(Happened) == Happened(lost, (event(4000),))


def test_that_something_has_happened_of_which_nothing_is_known_is_told_with_the_next(daemon: ControlDaemon) -> None:
    events = Events(daemon.server)
    with subscriber(daemon) as guest:
        settle_guests(daemon, guest)
        events.tell(lost=2)
        assert guest.hears_nothing()
        events.tell(event(1), lost=1)
        events.tell(event(2))
        assert [guest.hear(Happened), guest.hear(Happened)] == [Happened(3, (event(1),)), Happened(0, (event(2),))]
        assert daemon.server.subscribers.statistics().lost == 3


def test_the_process_of_a_guest_in_any_mode_is_known(daemon: ControlDaemon) -> None:
    """Else it would be told of its own changes."""
    origins = Origins(daemon.leasing.knows, process_of=lambda thread: thread)
    for mode in ("none", "access", "strict"):
        with ScriptedGuest(daemon.path, mode) as guest:
            assert origins.introduce(guest.session, 77)
            assert origins.session_of(77) == guest.session
        settle(daemon)
        assert not daemon.leasing.has(guest.session)
