"""The books of an agent: what its kernel may have, and whether it may be given more. Pure; clock and sending are arguments.

What a guest registers are keys (``coherency.leases``); what it grants under a key are *things*: nodes, whose attributes the
kernel may keep, or names that lead to a node.

1. A grant is given, and written down, under ``lock``, and the lock is held until the reply with it has been written. So whoever
   revokes either finds it, or comes before it.
2. A key is good for grants only if a Register with it has been confirmed since the key was last revoked: a Confirm counts for a
   key iff the key still waits for that very serial. Serials never repeat, and those of an earlier connection count for nothing.
   The Confirm must be of the table's present epoch, and the lease must not be over. No grant reaches beyond the lease.
3. What a key is revoked for is written down until the kernel is known to have nothing of it (``dropped``): who revokes it again
   meanwhile finds it, too, and does not believe that it is gone. What was granted anew meanwhile stays.
4. While the guest changes something itself, nothing of its slots is registered, and so nothing granted. A name that is held
   off is not granted for a while, one that is withheld not until it is allowed again, whatever it leads to.
5. Register and Release are sent under the lock: the daemon reads them in the order in which they were written down.
6. At most ``max_keys`` keys are in the books, and ``MAX_UNCONFIRMED`` Registers under way; beyond that nothing is granted. A key
   that was not used for so long that no grant of it can be left is swept out, and released. A thing whose node the
   kernel has forgotten is struck out.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from coherency.ids import Epoch, GrantKey, NodeId, SlotIndex
from coherency.leases import MAX_KEYS_PER_GUEST, MAX_KEYS_PER_MESSAGE, attributes_key, is_names_key, names_key, slot_of
from coherency.protocol import Register, Release

MAX_UNCONFIRMED: Final = 4096
_ROOM: Final = 4 * MAX_KEYS_PER_MESSAGE
"""Keys that the daemon may still count while the books do not: their Release could not be sent yet."""
SHORTEST_GRANT_NS: Final = 1_000_000
LAPSE_LEASES: Final = 2
"""After so many leases without a grant the kernel has nothing of a key, however late it took the last reply."""


class GrantedName(NamedTuple):
    """The kernel may have ``name`` in the directory ``parent`` as ``child``."""

    parent: NodeId
    name: bytes
    child: NodeId


class Thing(NamedTuple):
    """What was granted under a key; ``number`` tells it from what is granted later under the same key."""

    key: GrantKey
    what: Any
    number: int


@dataclass(frozen=True)
class Revoked:
    """What the kernel must forget: to be given to ``Grants.dropped`` when it has."""

    nodes: tuple[Thing, ...]
    names: tuple[Thing, ...]
    registered: tuple[GrantKey, ...]
    """Those of the keys of which the daemon may believe that the guest is a sharer."""


class GrantStatistics(NamedTuple):
    """The books at one instant; ``granted_*`` count since the beginning."""

    keys: int
    confirmed: int
    nodes: int
    names: int
    granted_attributes: int
    granted_names: int


class _TakenBack(NamedTuple):
    """A name that was granted, and revoked. ``number``: of that grant; ``until_ns``: then it means nothing any more."""

    number: int
    until_ns: int
    asked_since: bool = False


class _Key:
    """``serial``: of the last Register, 0 if revoked; ``epoch``: of its Confirm, -1 if it waits for that."""

    __slots__ = ("epoch", "serial", "things", "used_ns")

    def __init__(self) -> None:
        self.serial, self.epoch, self.used_ns = 0, -1, 0
        self.things: dict[Any, int] = {}


class Grants:
    """The books of one mount. Methods take ``lock`` themselves, except those that say that it is held."""

    def __init__(
        self, *, max_keys: int = MAX_KEYS_PER_GUEST - _ROOM, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.lock = threading.Lock()
        self._max_keys, self._clock_ns = max_keys, clock_ns
        self._session = 0
        self._send: Callable[[Register | Release], bool] = _nobody_to_tell
        self._lease_ns = self._lease_until_ns = 0
        self._lapses_ns = 0
        self._serial = 0
        self._first_serial = 1  # of the present connection, or since everything was revoked
        self._number = 0
        self._keys: OrderedDict[GrantKey, _Key] = OrderedDict()  # least recently used first
        self._names: dict[tuple[NodeId, bytes], GrantKey] = {}  # where the latest grant of a name is
        self._asked: dict[int, tuple[GrantKey, ...]] = {}  # unconfirmed
        self._unreleased: set[GrantKey] = set()
        self._changing: dict[SlotIndex, int] = {}
        self._held_off: dict[tuple[NodeId, bytes], int] = {}  # until when
        self._withheld: dict[tuple[NodeId, bytes], int] = {}  # how often
        self._taken_back: dict[tuple[NodeId, bytes], _TakenBack] = {}  # see ``may_be_moved``
        self._granted_attributes = self._granted_names = 0

    # ---- the connection ----

    def begin(self, session: int, lease_ns: int, asked_at_ns: int, send: Callable[[Register | Release], bool]) -> None:
        """A new connection: Welcome has come for the Hello of ``asked_at_ns``.

        ``send`` is called with the lock held: it must not wait. False: nothing was sent, the channel is full or gone.
        """
        with self.lock:
            self._void()
            self._session, self._send = session, send
            self._lease_ns, self._lease_until_ns = lease_ns, asked_at_ns + lease_ns

    def renew(self, asked_at_ns: int) -> None:
        """The Renew that was sent at that time has been answered."""
        with self.lock:
            self._lease_until_ns = max(self._lease_until_ns, asked_at_ns + self._lease_ns)

    def end(self) -> None:
        """The connection is gone, or about to be: nothing is granted from now on. What was granted is still written down."""
        with self.lock:
            self._void()
            self._session, self._send, self._lease_until_ns = 0, _nobody_to_tell, 0

    def _void(self) -> None:
        """No registration counts any more."""
        self._first_serial = self._serial + 1
        self._asked.clear()
        self._unreleased.clear()

    def confirm(self, serial: int, epoch: int) -> bool:
        """The daemon has taken that Register. False: there was none, and never has been one."""
        with self.lock:
            for key in self._asked.pop(serial, ()):
                entry = self._keys.get(key)
                if entry is not None and entry.serial == serial:
                    entry.epoch = epoch
            return 0 < serial <= self._serial

    # ---- registering and granting ----

    def register(self, keys: Collection[GrantKey], epoch: Epoch) -> None:
        """What these keys stand for is about to be fetched: ask the daemon to be told of changes, if that has not been done."""
        entries = self._keys
        for key in keys:  # without the lock: usually they are
            entry = entries.get(key)
            if entry is None or entry.serial < self._first_serial or entry.epoch not in (-1, epoch):
                with self.lock:
                    self._register(keys, epoch, self._clock_ns())
                return

    def _register(self, keys: Iterable[GrantKey], epoch: int, now_ns: int) -> None:
        if now_ns >= self._lease_until_ns or len(self._asked) >= MAX_UNCONFIRMED:
            return
        wanted = tuple(key for key in keys if self._may_register(key, epoch))
        if not wanted or len(self._keys) + len(wanted) > self._max_keys:
            return
        self._serial += 1
        if not self._send(Register(self._session, self._serial, wanted)):
            return
        self._asked[self._serial] = wanted
        for key in wanted:
            entry = self._keys.get(key)
            if entry is None:
                entry = self._keys[key] = _Key()
            entry.serial, entry.epoch, entry.used_ns = self._serial, -1, now_ns
            self._keys.move_to_end(key)
            self._unreleased.discard(key)

    def _may_register(self, key: GrantKey, epoch: int) -> bool:
        if slot_of(key) in self._changing:
            return False
        entry = self._keys.get(key)
        return entry is None or entry.serial < self._first_serial or entry.epoch not in (-1, epoch)

    def grant_attributes(self, slot: SlotIndex, node: NodeId, epoch: Epoch) -> int:
        """For how many ns the kernel may keep the attributes of ``node``; 0: not. With the lock held until the reply is written.

        ``epoch``: the table's, read since the lock was taken. The caller has found, since then, that what it answers with is
        still valid.
        """
        left_ns = self._grant(attributes_key(slot), node, epoch)
        self._granted_attributes += left_ns > 0
        return left_ns

    def grant_name(self, slot: SlotIndex, name: GrantedName, epoch: Epoch) -> int:
        """The same for a name that leads to an inode of ``slot``."""
        if name[:2] in self._withheld or (name[:2] in self._held_off and self._is_held_off(name[:2], self._clock_ns())):
            return 0
        key = names_key(slot)
        left_ns = self._grant(key, name, epoch)
        if left_ns:
            self._names[name.parent, name.name] = key
            self._granted_names += 1
        return left_ns

    def _grant(self, key: GrantKey, what: Any, epoch: int) -> int:
        now_ns = self._clock_ns()
        entry = self._keys.get(key)
        if entry is None or entry.serial < self._first_serial or entry.epoch != epoch:
            self._register((key,), epoch, now_ns)
            return 0
        left_ns = self._lease_until_ns - now_ns
        if left_ns < SHORTEST_GRANT_NS:
            return 0
        self._number += 1
        entry.things[what] = self._number
        entry.used_ns = now_ns
        self._keys.move_to_end(key)
        self._lapses_ns = max(self._lapses_ns, self._lease_until_ns)
        return left_ns

    # ---- recalls ----

    def revoke(self, keys: Iterable[GrantKey]) -> Revoked:
        """Nothing is granted under these keys until they have been registered anew. Returns what the kernel may have of them."""
        nodes: list[Thing] = []
        names: list[Thing] = []
        registered = []
        with self.lock:
            for key in keys:
                entry = self._keys.get(key)
                if entry is None:
                    continue
                if entry.serial >= self._first_serial:
                    registered.append(key)
                entry.serial, entry.epoch = 0, -1
                if is_names_key(key):
                    self._note_taken_back(entry.things)
                (names if is_names_key(key) else nodes).extend(
                    Thing(key, what, number) for what, number in entry.things.items()
                )
                if not entry.things:
                    del self._keys[key]
        return Revoked(tuple(nodes), tuple(names), tuple(registered))

    def revoke_everything(self) -> Revoked:
        """The same for all keys; the daemon need not be told."""
        with self.lock:
            self._void()
            keys = list(self._keys)
        return self.revoke(keys)

    def dropped(self, things: Iterable[Thing]) -> None:
        """The kernel has forgotten what was revoked. What was granted anew since then stays in the books."""
        with self.lock:
            for key, what, number in things:
                entry = self._keys.get(key)
                if entry is not None and entry.things.get(what) == number:
                    self._strike_out(key, entry, what)

    def _strike_out(self, key: GrantKey, entry: _Key, what: Any) -> None:
        del entry.things[what]
        if is_names_key(key) and self._names.get(what[:2]) == key and not any(
            other[:2] == what[:2] for other in entry.things  # it may have led to two nodes of the slot in turn
        ):  # fmt: skip
            del self._names[what[:2]]
        if not entry.things and entry.serial < self._first_serial:
            del self._keys[key]

    def release(self, keys: Iterable[GrantKey]) -> None:
        """Tell the daemon that it need not recall these any more, except those that were registered anew."""
        with self.lock:
            self._unreleased.update(key for key in keys if not self._is_registered(key))
            self._send_releases()

    def _send_releases(self) -> None:
        while self._unreleased and self._session:
            some = tuple(sorted(self._unreleased)[:MAX_KEYS_PER_MESSAGE])
            if not self._send(Release(self._session, some)):
                return
            self._unreleased.difference_update(some)

    def _is_registered(self, key: GrantKey) -> bool:
        entry = self._keys.get(key)
        return entry is not None and entry.serial >= self._first_serial

    @property
    def lapses_ns(self) -> int:
        """From then on the kernel has nothing any more of what was ever granted, whatever became of the recalls."""
        return self._lapses_ns + self._lease_ns

    # ---- changes of the own guest ----

    def begin_change(self, slots: Iterable[SlotIndex]) -> None:
        """Nothing of these slots is registered until the ``end_change``; to be followed by revoking what is."""
        with self.lock:
            for slot in slots:
                self._changing[slot] = self._changing.get(slot, 0) + 1

    def end_change(self, slots: Iterable[SlotIndex]) -> None:
        """The change has been made, or has failed."""
        with self.lock:
            for slot in slots:
                count = self._changing[slot] - 1
                if count:
                    self._changing[slot] = count
                else:
                    del self._changing[slot]

    def hold_off(self, names: Iterable[tuple[NodeId, bytes]], for_ns: int) -> None:
        """These names, each with its directory, are not granted for a while."""
        with self.lock:
            until_ns = self._clock_ns() + for_ns
            for name in names:
                self._held_off[name] = until_ns

    def _is_held_off(self, name: tuple[NodeId, bytes], now_ns: int) -> bool:
        if now_ns < self._held_off[name]:
            return True
        del self._held_off[name]
        return False

    def withhold(self, names: Iterable[tuple[NodeId, bytes]]) -> None:
        """These names are not granted until each has been allowed as often as it was withheld."""
        with self.lock:
            for name in names:
                self._withheld[name] = self._withheld.get(name, 0) + 1

    def allow(self, names: Iterable[tuple[NodeId, bytes]]) -> None:
        """See ``withhold``."""
        with self.lock:
            for name in names:
                self._withheld[name] -= 1
                if not self._withheld[name]:
                    del self._withheld[name]

    def slot_of_name(self, parent: NodeId, name: bytes) -> SlotIndex | None:
        """The slot of what the kernel may have under a name, if it may have the name."""
        key = self._names.get((parent, name))
        return None if key is None else slot_of(key)

    def _note_taken_back(self, names: Mapping[GrantedName, int]) -> None:
        for name, number in names.items():
            known = self._taken_back.get(name[:2])
            if known is None or known.number < number:
                self._taken_back[name[:2]] = _TakenBack(number, self.lapses_ns)

    def looked_up(self, name: tuple[NodeId, bytes]) -> None:
        """The kernel has asked for the name, and is about to be answered. With the lock held until the reply is written."""
        known = self._taken_back.get(name)
        if known is not None:
            self._taken_back[name] = known._replace(asked_since=True)

    def may_be_moved(self, name: tuple[NodeId, bytes]) -> bool:
        """Whether a kernel that renames this name now has asked for it since it was last taken back.

        Otherwise it may have resolved the name before that, by what it had been granted, and moves that to the new name.
        """
        known = self._taken_back.get(name)
        return known is None or known.asked_since or known.until_ns <= self._clock_ns()

    # ---- tidying ----

    def forget(self, node: NodeId, slot: SlotIndex) -> None:
        """The kernel has forgotten the node of that slot, and so the names that lead to it."""
        with self.lock:
            key = attributes_key(slot)
            entry = self._keys.get(key)
            if entry is not None and node in entry.things:
                self._strike_out(key, entry, node)
            key = names_key(slot)
            entry = self._keys.get(key)
            if entry is not None:
                for name in [each for each in entry.things if each.child == node]:
                    self._strike_out(key, entry, name)

    def idle(self) -> list[GrantKey]:
        """Keys that were not used for so long that nothing granted under them is left; as many as one message takes.

        To be called now and then, about once per lease or more often as long as there are some.
        """
        with self.lock:
            now_ns = self._clock_ns()
            self._send_releases()
            for name in list(self._held_off):
                self._is_held_off(name, now_ns)
            for name in [name for name, known in self._taken_back.items() if known.until_ns <= now_ns]:
                del self._taken_back[name]
            before_ns = now_ns - LAPSE_LEASES * self._lease_ns
            keys: list[GrantKey] = []
            for key, entry in self._keys.items():
                if entry.used_ns > before_ns or len(keys) == MAX_KEYS_PER_MESSAGE:
                    break
                keys.append(key)
            return keys

    def statistics(self) -> GrantStatistics:
        """A frozen copy of the counters; goes through the books."""
        with self.lock:
            entries = self._keys.items()
            return GrantStatistics(
                len(entries),
                sum(entry.serial >= self._first_serial and entry.epoch >= 0 for _, entry in entries),
                sum(len(entry.things) for key, entry in entries if not is_names_key(key)),
                sum(len(entry.things) for key, entry in entries if is_names_key(key)),
                self._granted_attributes,
                self._granted_names,
            )

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self.lock:
            assert len(self._keys) <= self._max_keys, "too many keys"
            assert len(self._asked) <= MAX_UNCONFIRMED, "too many Registers under way"
            assert all(count > 0 for count in [*self._changing.values(), *self._withheld.values()]), self._changing
            for key, entry in self._keys.items():
                assert entry.things or entry.serial, f"nothing is written down of key {key}"
                assert entry.serial <= self._serial, "a serial that was never used"
            for (parent, name), key in self._names.items():
                assert key in self._keys, (parent, name, key)
                assert any(what[:2] == (parent, name) for what in self._keys[key].things), (parent, name, key)
            assert all(self._first_serial <= serial <= self._serial for serial in self._asked), "an old Register"


def _nobody_to_tell(_message: Register | Release) -> bool:
    return False
