"""What a guest does on its control channel about grants, and how it makes its kernel forget; the kernel is played by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from coherency.fuse.codec import Request
from coherency.guest_agent import grants as grants_module
from coherency.guest_agent import pages
from coherency.guest_agent import recalls as recalls_module
from coherency.guest_agent.grants import GrantedName, Grants
from coherency.guest_agent.recalls import MANY_NAMES, Recalls
from coherency.guest_agent.sharer import Sharer
from coherency.ids import Epoch, NodeId, SlotIndex
from coherency.leases import RENEWALS_PER_LEASE, attributes_key, names_key
from coherency.protocol import Ack, Confirm, Evicted, Recall, Register, Release, Renew, Renewed

LEASE_NS = 1_000_000_000
SESSION = 77
SLOT = SlotIndex(3)
NODE, DIRECTORY = NodeId(9), NodeId(1)
NAME = GrantedName(DIRECTORY, b"name", NODE)
KEYS = (attributes_key(SLOT), names_key(SLOT))


class Kernel:
    """Writes down what it is told to forget, in the order of all that happens."""

    def __init__(self, happened: list[Any]) -> None:
        self.happened, self.has_epochs, self.is_gone = happened, False, False
        self.pages_after: threading.Event | None = None

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        if offset >= 0 and self.pages_after is not None:
            assert self.pages_after.wait(20)
        self.happened.append(node if offset < 0 else ("pages", node))
        return True

    def invalidate_entry(self, parent: NodeId, name: bytes) -> bool:
        self.happened.append(("entry", name))
        return True

    def increment_epoch(self) -> bool:
        if self.has_epochs:
            self.happened.append("epoch")
        return self.has_epochs


class Helpers:
    def __init__(self, happened: list[Any]) -> None:
        self.happened, self.work, self.was_asked = happened, True, threading.Event()
        self.channels: list[int | None] = []

    def is_helper(self, pid: int) -> bool:
        return False

    def lie(self, request: Request) -> int | None:
        return None

    def drop(self, names: Iterable[tuple[NodeId, bytes, NodeId]], deadline_s: float) -> bool:
        self.happened.append([name for _, name, _ in names])
        self.was_asked.set()
        return self.work

    def granted_up_to(self, node: NodeId) -> None: ...

    def share_channel(self, descriptor: int | None) -> None:
        self.channels.append(descriptor)


class World:
    """A sharer with its books; everything that it does is in ``happened``."""

    def __init__(self, danger: str = "") -> None:
        self.now_ns = 10_000
        self.happened: list[Any] = []
        self.has_room = True
        self.grants = Grants(clock_ns=lambda: self.now_ns)
        self.kernel, self.helpers = Kernel(self.happened), Helpers(self.happened)
        self.opened: set[NodeId] = set()
        self.recalls = Recalls(
            self.grants, self.kernel, self.helpers, is_open=self.opened.__contains__, danger=danger, clock_ns=lambda: self.now_ns
        )
        self.sharer = Sharer(self.grants, clock_ns=lambda: self.now_ns)
        self.channel: Any = SimpleNamespace(offer=self._offer, send=self._send, fileno=lambda: 33)
        self.connect()
        self.sharer.attach(self.recalls, self.helpers)

    def connect(self, session: int = SESSION) -> None:
        welcome: Any = SimpleNamespace(session=session, lease_ns=LEASE_NS)
        self.sharer.joined(welcome, self.now_ns, self.channel)

    def _offer(self, message: Any) -> bool:
        if self.has_room:
            self.happened.append(message)
        return self.has_room

    def _send(self, message: Any) -> None:
        if not self._offer(message):
            raise ConnectionAbortedError("the daemon does not read")

    def grant(self, *names: GrantedName) -> None:
        self.grants.register(KEYS, Epoch(1))
        [register] = (message for message in self.happened if isinstance(message, Register))
        assert self.sharer.handle(Confirm(register.session, register.serial, 1)) is None
        with self.grants.lock:
            assert self.grants.grant_attributes(SLOT, NODE, Epoch(1))
            assert all(self.grants.grant_name(SLOT, name, Epoch(1)) for name in names)
        self.happened.clear()


@pytest.fixture
def world() -> Iterable[World]:
    world = World()
    yield world
    world.recalls.close()


# --- recalls ------------------------------------------------------------------------------------------------------


def test_a_recall_is_acked_when_the_kernel_has_forgotten(world: World) -> None:
    world.grant(NAME)
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [NODE, [b"name"], Ack(SESSION, 1)]


def test_pages_of_an_open_file_are_dropped_before_that(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PATIENCE_S", 20)
    world.grant(NAME)
    world.opened.add(NODE)
    world.kernel.pages_after = world.helpers.was_asked
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [NODE, [b"name"], ("pages", NODE), Ack(SESSION, 1)]


def test_of_what_is_not_open_there_are_none(world: World) -> None:
    world.grant(NAME)
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.recalls._pages._given == 0


def test_a_recall_of_everything(world: World) -> None:
    world.grant(NAME)
    assert world.sharer.handle(Recall(SESSION, 1, ())) is None
    assert world.happened == [NODE, [b"name"], Ack(SESSION, 1)]
    assert world.sharer.handle(Recall(SESSION, 2, KEYS)) is None
    assert world.happened[3:] == [Ack(SESSION, 2)]


def test_what_was_not_granted_is_acked_at_once(world: World) -> None:
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [Ack(SESSION, 1)]


def test_names_that_helpers_do_not_drop_are_dropped_with_all_others(world: World) -> None:
    world.grant(NAME)
    world.helpers.work, world.kernel.has_epochs = False, True
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [NODE, [b"name"], "epoch", Ack(SESSION, 1)]


def test_what_cannot_be_dropped_is_not_acked_nor_what_comes_later(world: World) -> None:
    world.grant(NAME)
    world.helpers.work = False
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.sharer.handle(Recall(SESSION, 2, (attributes_key(SlotIndex(4)),))) is None
    assert not any(isinstance(each, Ack) for each in world.happened)
    world.helpers.work = True
    world.happened.clear()
    assert world.sharer.tend() is None
    assert world.happened == [[b"name"], Ack(SESSION, 2)]


def test_many_names_go_at_once_where_that_can_be_had(world: World) -> None:
    world.kernel.has_epochs = True
    world.grant(*(GrantedName(DIRECTORY, b"%d" % number, NODE) for number in range(MANY_NAMES + 1)))
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [NODE, "epoch", Ack(SESSION, 1)]


def test_elsewhere_in_portions(world: World) -> None:
    world.grant(*(GrantedName(DIRECTORY, b"%d" % number, NODE) for number in range(MANY_NAMES + 1)))
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert [len(each) for each in world.happened if isinstance(each, list)] == [MANY_NAMES, 1]
    assert world.happened[-1] == Ack(SESSION, 1)


def test_control_ack_first(world: World) -> None:
    world = World("ack-first")
    world.grant(NAME)
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [Ack(SESSION, 1), NODE, [b"name"]]
    world.recalls.close()


def test_control_inval_entry(world: World) -> None:
    world = World("inval-entry")
    world.grant(NAME)
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) is None
    assert world.happened == [NODE, ("entry", b"name"), Ack(SESSION, 1)]
    world.recalls.close()


# --- changes of the own guest -------------------------------------------------------------------------------------


def never() -> bool:
    return False


def test_before_a_change_of_its_own_the_guest_forgets_and_says_so(world: World) -> None:
    world.grant(NAME)
    world.recalls.take_back([SLOT], [SLOT], never)
    assert world.happened == [NODE, [b"name"], Release(SESSION, KEYS)]
    world.recalls.take_back([SLOT], [SLOT], never)
    assert len(world.happened) == 3


def test_names_that_do_not_leave_stay(world: World) -> None:
    world.grant(NAME)
    world.recalls.take_back([SLOT], [], never)
    assert world.happened == [NODE, Release(SESSION, KEYS[:1])]
    assert world.grants.slot_of_name(DIRECTORY, b"name") == SLOT


def test_what_cannot_be_dropped_is_waited_for_until_it_lapses(world: World) -> None:
    world.grant(NAME)
    world.helpers.work = False
    attempts = 0

    def give_up_never_but_let_time_pass() -> bool:
        nonlocal attempts
        attempts += 1
        world.now_ns += LEASE_NS
        return False

    world.recalls.take_back([SLOT], [SLOT], give_up_never_but_let_time_pass)
    assert attempts >= 2
    assert world.happened[-1] == Release(SESSION, KEYS)
    assert world.grants.slot_of_name(DIRECTORY, b"name") is None


def test_who_is_interrupted_meanwhile_changes_nothing(world: World) -> None:
    world.grant(NAME)
    world.helpers.work = False
    with pytest.raises(InterruptedError):
        world.recalls.take_back([SLOT], [SLOT], lambda: True)
    assert not any(isinstance(each, Release) for each in world.happened), "the daemon must go on telling this guest"
    assert world.grants.slot_of_name(DIRECTORY, b"name") == SLOT


# --- leases -------------------------------------------------------------------------------------------------------


def renewals(world: World) -> list[Renew]:
    return [each for each in world.happened if isinstance(each, Renew)]


def test_the_lease_is_renewed_several_times_in_its_length(world: World) -> None:
    step_ns = LEASE_NS // 100
    for _ in range(100):
        world.now_ns += step_ns
        assert world.sharer.tend() is None
    assert RENEWALS_PER_LEASE - 1 <= len(renewals(world)) <= RENEWALS_PER_LEASE
    assert [each.serial for each in renewals(world)] == list(range(1, len(renewals(world)) + 1))


def test_it_counts_from_the_sending(world: World) -> None:
    world.grant()
    world.now_ns += LEASE_NS // 2
    sent_ns = world.now_ns
    assert world.sharer.tend() is None
    world.now_ns += 100
    assert world.sharer.handle(Renewed(SESSION, 1)) is None
    with world.grants.lock:
        assert world.grants.grant_attributes(SLOT, NODE, Epoch(1)) == sent_ns + LEASE_NS - world.now_ns


def test_an_answer_to_what_was_not_asked_is_trouble(world: World) -> None:
    assert world.sharer.handle(Renewed(SESSION, 1))
    assert world.sharer.handle(Confirm(SESSION, 1, 1))
    assert world.sharer.handle(Recall(SESSION, 2, KEYS)), "the first is missing"
    assert world.sharer.handle(Evicted(SESSION))


def test_unanswered_renewals_are_bounded_and_a_late_answer_is_of_no_use(world: World) -> None:
    for _ in range(50):
        world.now_ns += LEASE_NS
        world.sharer.tend()
    assert len(world.sharer._renewals) <= 2 * RENEWALS_PER_LEASE
    assert world.sharer.handle(Renewed(SESSION, 1)) is None
    assert world.sharer.handle(Renewed(SESSION, 50)) is None
    assert world.sharer._renewals == {}


def test_a_daemon_that_does_not_read_is_lost(world: World) -> None:
    world.has_room = False
    assert world.sharer.handle(Recall(SESSION, 1, KEYS)) == "the daemon does not read"


# --- the end of a connection --------------------------------------------------------------------------------------


def test_what_is_lost_is_forgotten(world: World) -> None:
    world.grant(NAME)
    world.sharer.lost()
    assert world.happened == [NODE, [b"name"]]
    assert world.sharer.is_clean()
    world.connect(SESSION + 1)
    assert world.helpers.channels == [33, None, 33]
    assert world.sharer.handle(Recall(SESSION + 1, 1, ())) is None, "numbered anew"


def test_the_guest_is_not_clean_before_it_is_or_everything_has_lapsed(world: World) -> None:
    world.grant(NAME)
    world.helpers.work = False
    world.sharer.lost()
    assert not world.sharer.is_clean()
    world.now_ns = world.grants.lapses_ns + 1
    assert world.sharer.is_clean()


def test_a_guest_whose_mount_is_gone_is_clean(world: World) -> None:
    """There is no kernel any more that could answer, and no mount in which a helper could drop names."""
    world.grant(NAME)
    world.helpers.work = False
    world.kernel.is_gone = True
    world.sharer.lost()
    assert world.sharer.is_clean()
    assert world.happened == [NODE]


def test_what_was_not_used_for_long_is_released(world: World) -> None:
    world.grant(NAME)
    for _ in range(8):
        world.now_ns += LEASE_NS // 2
        world.sharer.tend()
    assert Release(SESSION, KEYS) in world.happened
    assert NODE in world.happened
    assert world.grants.statistics().keys == 0


def test_a_sweep_goes_a_portion_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_module, "MAX_KEYS_PER_MESSAGE", 1)
    world.grant(NAME)
    world.now_ns += 3 * LEASE_NS
    world.sharer.tend()
    assert world.grants.statistics().keys == 1
    world.sharer.tend()
    assert world.grants.statistics().keys == 0


def test_a_drop_is_shorter_than_trust() -> None:
    """The client's thread, which looks at the heartbeat, waits for it."""
    assert recalls_module.DROP_S <= 0.5
