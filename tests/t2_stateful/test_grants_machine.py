"""The books of an agent beside a slow daemon, with everything that travels between them late: nothing the kernel has is ever old.

The daemon here is the plainest that keeps section 8 of `docs/spec/control.md`; the kernel is a table of what may be believed until
when. Whatever happens, when a change is applied the kernel must have nothing of it any more.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from coherency.guest_agent import grants as grants_module
from coherency.guest_agent.grants import GrantedName, Grants, Revoked
from coherency.ids import Epoch, GrantKey, NodeId, SlotIndex
from coherency.leases import agent_lease_ns, attributes_key, is_names_key, keys_of, names_key, slot_of
from coherency.protocol import Ack, Confirm, Recall, Register, Release, Renew, Renewed

DAEMON_LEASE_NS = 10_000_000_000
LEASE_NS = agent_lease_ns(DAEMON_LEASE_NS)
EPOCH = Epoch(1)
SLOTS = (SlotIndex(0), SlotIndex(1))
NODES = (NodeId(10), NodeId(11))
NAMES = (b"a", b"b")


@dataclass(eq=False)
class Change:
    """A change under way at the daemon."""

    slots: tuple[SlotIndex, ...]
    keys: tuple[GrantKey, ...]
    session: int
    must_ack: int


@dataclass(eq=False)
class Recalling:
    """A recall under way at the guest."""

    revoked: Revoked
    serial: int  # 0: nobody asked, the keys were idle
    is_dropped: bool = False


@dataclass(eq=False)
class OwnChange:
    """A change that the guest itself wants to make."""

    slots: tuple[SlotIndex, ...]
    leaving: tuple[SlotIndex, ...]
    revoked: Revoked
    forwarded: Change | None = None


@dataclass
class Daemon:
    session: int = 0
    sharers: set[GrantKey] = field(default_factory=set)
    owed: dict[GrantKey, int] = field(default_factory=dict)
    sent: int = 0
    acked: int = 0
    deadline_ns: int = 0


class World:
    """All of it, one seeded walk long. ``STEPS`` says what may happen next, and how often it is chosen."""

    def __init__(self, books: type[Grants], random: Random) -> None:
        self.random = random
        self.now_ns = 0
        self.words = {SlotIndex(0): 0, SlotIndex(1): 0}
        self.in_flight = {SlotIndex(0): 0, SlotIndex(1): 0}
        self.cache: dict[SlotIndex, int] = {}
        self.kernel: dict[tuple[GrantKey, Any], int] = {}  # until when it believes what
        self.daemon = Daemon()
        self.to_daemon: deque[Any] = deque()
        self.to_guest: deque[Any] = deque()
        self.changes: list[Change] = []
        self.recalling: deque[Recalling] = deque()
        self.own: list[OwnChange] = []
        self.connected, self.sessions = False, 0
        self.renewals: dict[int, int] = {}
        self.grants = books(clock_ns=lambda: self.now_ns)
        self.hello()

    def send(self, message: Register | Release) -> bool:
        self.to_daemon.append(message)
        return True

    # ---- time and the connection ----

    def time_passes(self) -> None:
        self.now_ns += self.random.choice((1_000_000, LEASE_NS // 8, LEASE_NS // 2))
        if self.daemon.session and self.now_ns >= self.daemon.deadline_ns:
            self.daemon = Daemon()  # evicted

    def the_channel_is_lost(self) -> None:
        self.connected = False
        self.to_daemon.clear()
        self.to_guest.clear()
        self.recalling.clear()
        self.renewals.clear()
        self.grants.end()

    def hello(self) -> None:
        """Everything is dropped first, which another recall or change may be doing, too."""
        revoked = self.grants.revoke_everything()
        self.drop(revoked)
        self.grants.dropped((*revoked.nodes, *revoked.names))
        asked_at_ns = self.now_ns
        self.now_ns += self.random.choice((0, LEASE_NS // 8))
        self.sessions += 1
        self.daemon = Daemon(session=self.sessions, deadline_ns=self.now_ns + DAEMON_LEASE_NS)
        self.grants.begin(self.daemon.session, LEASE_NS, asked_at_ns, self.send)
        self.connected = True

    def renew(self) -> None:
        serial = len(self.renewals) + 1
        self.renewals[serial] = self.now_ns
        self.to_daemon.append(Renew(self.daemon.session, serial))

    def the_daemon_reads(self) -> None:
        message, daemon = self.to_daemon.popleft(), self.daemon
        if message.session != daemon.session or not daemon.session:
            return
        if isinstance(message, Register):
            daemon.sharers.update(message.keys)
            self.to_guest.append(Confirm(daemon.session, message.serial, EPOCH))
        elif isinstance(message, Release):
            daemon.sharers.difference_update(message.keys)
        elif isinstance(message, Ack):
            daemon.acked = message.serial
        elif daemon.acked == daemon.sent:
            daemon.deadline_ns = self.now_ns + DAEMON_LEASE_NS
            self.to_guest.append(Renewed(daemon.session, message.serial))

    def the_guest_reads(self) -> None:
        message = self.to_guest.popleft()
        if isinstance(message, Confirm):
            assert self.grants.confirm(message.serial, message.epoch)
        elif isinstance(message, Renewed):
            self.grants.renew(self.renewals[message.serial])
        else:
            self.recalling.append(Recalling(self.grants.revoke(message.keys), message.serial))

    # ---- the kernel ----

    def drop(self, revoked: Revoked) -> None:
        for thing in (*revoked.nodes, *revoked.names):
            self.kernel.pop((thing.key, thing.what), None)

    def the_kernel_drops(self) -> None:
        recalling = next(each for each in self.recalling if not each.is_dropped)
        recalling.is_dropped = True
        if recalling.serial:
            self.drop(recalling.revoked)

    def a_recall_is_carried_out(self) -> None:
        recalling = self.recalling.popleft()
        self.grants.dropped((*recalling.revoked.nodes, *recalling.revoked.names))
        if recalling.serial:
            self.to_daemon.append(Ack(self.daemon.session, recalling.serial))
        else:
            self.grants.release(recalling.revoked.registered)

    def the_kernel_forgets_a_node(self) -> None:
        slot, node = self.random.choice(SLOTS), self.random.choice(NODES)
        for key, what in list(self.kernel):
            if slot_of(key) == slot and (what.child if is_names_key(key) else what) == node:
                del self.kernel[key, what]
        self.grants.forget(node, slot)

    # ---- looking ----

    def fetch(self) -> None:
        slot = self.random.choice(SLOTS)
        self.grants.register((attributes_key(slot), names_key(slot)), EPOCH)
        if not self.words[slot] & 1:
            self.cache[slot] = self.words[slot]

    def ask_for_attributes(self) -> None:
        self.answer(attributes_key(self.random.choice(SLOTS)), self.random.choice(NODES))

    def ask_for_a_name(self) -> None:
        name = GrantedName(NodeId(1), self.random.choice(NAMES), self.random.choice(NODES))
        self.answer(names_key(self.random.choice(SLOTS)), name)

    def answer(self, key: GrantKey, what: Any) -> None:
        slot = slot_of(key)
        with self.grants.lock:
            if self.cache.get(slot) != self.words[slot]:
                return
            left_ns = (
                self.grants.grant_name(slot, what, EPOCH) if is_names_key(key) else self.grants.grant_attributes(slot, what, EPOCH)
            )
            if left_ns:
                self.kernel[key, what] = self.now_ns + left_ns

    def sweep(self) -> None:
        """What has lapsed need not be dropped."""
        self.recalling.append(Recalling(self.grants.revoke(self.grants.idle()), 0))

    # ---- changes ----

    def begin_change(self, slots: tuple[SlotIndex, ...], leaving: tuple[SlotIndex, ...]) -> Change:
        daemon, keys = self.daemon, keys_of(slots, leaving)
        for slot in slots:
            if not self.in_flight[slot]:
                self.words[slot] += 1
            self.in_flight[slot] += 1
        told = tuple(key for key in keys if key in daemon.sharers)
        if told:
            daemon.sharers.difference_update(told)
            daemon.sent += 1
            daemon.owed.update(dict.fromkeys(told, daemon.sent))
            if self.connected:  # a lost guest cannot be told
                self.to_guest.append(Recall(daemon.session, daemon.sent, told))
        must_ack = max((daemon.owed.get(key, 0) for key in keys), default=0)
        change = Change(slots, keys, daemon.session, must_ack)
        self.changes.append(change)
        return change

    def somebody_begins_a_change(self) -> None:
        slot = self.random.choice(SLOTS)
        self.begin_change((slot,), self.random.choice(((slot,), ())))

    def may_apply(self, change: Change) -> bool:
        return change.session != self.daemon.session or self.daemon.acked >= change.must_ack

    def a_change_is_applied(self) -> None:
        change = next(filter(self.may_apply, self.changes))
        self.changes.remove(change)
        for (key, what), until_ns in self.kernel.items():
            assert key not in change.keys or until_ns <= self.now_ns, f"stale: the kernel still has {what} of {key}"
        for slot in change.slots:
            self.in_flight[slot] -= 1
            if not self.in_flight[slot]:
                self.words[slot] += 1

    def the_guest_wants_to_change_something(self) -> None:
        slots = (self.random.choice(SLOTS),)
        leaving = self.random.choice((slots, ()))
        self.grants.begin_change(slots)
        self.own.append(OwnChange(slots, leaving, self.grants.revoke(keys_of(slots, leaving))))

    def it_forwards_it(self) -> None:
        own = next(each for each in self.own if each.forwarded is None)
        self.drop(own.revoked)
        self.grants.dropped((*own.revoked.nodes, *own.revoked.names))
        self.grants.release(own.revoked.registered)
        own.forwarded = self.begin_change(own.slots, own.leaving)

    def it_has_been_made(self) -> None:
        own = next(each for each in self.own if each.forwarded and each.forwarded not in self.changes)
        self.own.remove(own)
        self.grants.end_change(own.slots)

    # ---- always ----

    def what_the_kernel_has_is_in_the_books(self) -> None:
        for (key, what), until_ns in self.kernel.items():
            if until_ns > self.now_ns:
                entry = self.grants._keys.get(key)
                assert entry is not None and what in entry.things, f"stale: {what} of {key} would never be recalled"  # noqa: PT018


STEPS: dict[Callable[[World], None], tuple[int, Callable[[World], object]]] = {
    World.time_passes: (2, lambda world: True),
    World.the_channel_is_lost: (1, lambda world: world.connected),
    World.hello: (3, lambda world: not world.connected),
    World.renew: (4, lambda world: world.connected),
    World.the_daemon_reads: (10, lambda world: world.to_daemon),
    World.the_guest_reads: (14, lambda world: world.to_guest),
    World.the_kernel_drops: (10, lambda world: not all(each.is_dropped for each in world.recalling)),
    World.a_recall_is_carried_out: (10, lambda world: world.recalling and world.recalling[0].is_dropped),
    World.the_kernel_forgets_a_node: (1, lambda world: True),
    World.fetch: (10, lambda world: True),
    World.ask_for_attributes: (8, lambda world: True),
    World.ask_for_a_name: (8, lambda world: True),
    World.sweep: (1, lambda world: world.connected),
    World.somebody_begins_a_change: (2, lambda world: len(world.changes) < 3),
    World.a_change_is_applied: (10, lambda world: any(map(world.may_apply, world.changes))),
    World.the_guest_wants_to_change_something: (2, lambda world: len(world.own) < 2),
    World.it_forwards_it: (4, lambda world: any(each.forwarded is None for each in world.own)),
    World.it_has_been_made: (
        4, lambda world: any(each.forwarded is not None and each.forwarded not in world.changes for each in world.own),
    ),
}  # fmt: skip


def walk(books: type[Grants], walks: int, steps: int = 150) -> int:
    """Returns how often something was granted."""
    granted = 0
    for seed in range(walks):
        world = World(books, Random(seed))
        taken = []
        try:
            for _ in range(steps):
                possible = [step for step, (_, may) in STEPS.items() if may(world)]
                step = world.random.choices(possible, [STEPS[each][0] for each in possible])[0]
                taken.append(step.__name__)
                step(world)
                world.what_the_kernel_has_is_in_the_books()
                world.grants.check()
        except AssertionError as error:
            raise AssertionError(f"{error}; seed {seed}, after {taken}") from error
        granted += sum(world.grants.statistics()[4:])
    return granted


def test_nothing_that_the_kernel_has_is_ever_old() -> None:
    assert walk(Grants, 600) > 600, "the walks grant too little to show anything"


# What the walks are too coarse for stands in tests/t1_core/test_grants.py.
CONTROLS = {
    "a confirm of any registration counts": ("if entry is not None and entry.serial == serial:", "if entry is not None:"),
    "a grant lasts a whole lease": ("left_ns = self._lease_until_ns - now_ns", "left_ns = self._lease_ns"),
    "the lease counts from the answer": ("asked_at_ns + self._lease_ns)", "self._clock_ns() + self._lease_ns)"),
    "revoked means dropped": ("                if not entry.things:\n", "                entry.things = {}\n                if True:\n"),
    "idle too early": ("LAPSE_LEASES * self._lease_ns", "self._lease_ns // 8"),
    "revoked keys are still good": ("entry.serial, entry.epoch = 0, -1", "pass"),
}


def broken(old: str, new: str) -> type[Grants]:
    """The books with a line of them changed."""
    source = inspect.getsource(grants_module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the code"
    module = types.ModuleType("broken_grants")
    sys.modules[module.__name__] = module  # for its dataclasses
    try:
        exec(compile(source.replace(old, new), "broken_grants.py", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    found: type[Grants] = module.Grants
    return found


@pytest.mark.parametrize("rule_broken", CONTROLS)
def test_the_walks_catch(rule_broken: str) -> None:
    with pytest.raises(AssertionError, match="stale"):
        walk(broken(*CONTROLS[rule_broken]), 4000)
