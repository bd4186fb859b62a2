"""Whatever a reader considers valid equals the truth, under any interleaving of changes, fetches, deaths and epochs.

The machine is the specification: the truth is a dictionary of counters.  Below it, machines that break one rule of
`docs/spec/table.md` each, and must be caught by the same invariant.
"""

from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coherency.ids import Epoch, HostInode, SlotIndex
from coherency.shm_table import EPOCH_WORD, Stamp, State, TableReader, TableWriter, bytes_needed

SLOT_COUNT = 2  # fewer slots than inodes: they share
INODES = [HostInode(n) for n in range(3)]

some_inode = st.sampled_from(INODES)
some_inodes = st.sets(some_inode, min_size=1, max_size=2)
DAEMON_ACTIONS = ["begin", "apply", "end"] * 3 + ["announce", "lose events", "die", "close", "adopt"]
GUEST_ACTIONS = ["sample", "fetch", "keep", "sample, fetch and keep"]


@dataclass
class Change:
    inodes: set[HostInode]
    slots: tuple[SlotIndex, ...]


@dataclass
class Fetch:
    guest: "Guest"
    inode: HostInode
    stamp: Stamp | None
    value: int | None = None


@dataclass
class Guest:
    reader: TableReader
    cache: dict[HostInode, tuple[int, Stamp]] = field(default_factory=dict)


class TableMachine(RuleBasedStateMachine):
    """One table, its writer with overlapping changes, two guests that cache what they fetch."""

    writer_type: ClassVar[type[TableWriter]] = TableWriter
    reader_type: ClassVar[type[TableReader]] = TableReader

    def __init__(self) -> None:
        super().__init__()
        self.words = memoryview(bytearray(bytes_needed(SLOT_COUNT))).cast("Q")
        self.writer = self.writer_type.create(self.words, slot_count=SLOT_COUNT, table_id=(1, 2))
        self.writer.set_state(State.SERVING)
        self.guests = [Guest(self.reader_type(self.words.toreadonly())) for _ in range(2)]
        self.truth = dict.fromkeys(INODES, 0)
        self.changes: list[Change] = []
        self.fetches: list[Fetch] = []
        self.unannounced: set[HostInode] = set()
        """Changed by nobody we know of, and not announced yet: no reader can know."""
        self.daemon = "alive"
        # Start in the middle of life: a machine that has to get there first explores little else.
        for which in range(2):
            for inode in INODES:
                self.guest_does("sample, fetch and keep", which, inode)

    # Two rules with many actions, not many rules: Hypothesis switches rules off at random, and an interesting schedule
    # here needs almost all of them.

    @rule(what=st.sampled_from(DAEMON_ACTIONS), inodes=some_inodes, which=st.integers(0, 2))
    def daemon_does(self, what: str, inodes: set[HostInode], which: int) -> None:
        alive = self.daemon == "alive"
        match what:
            case "begin" if alive and len(self.changes) < 3:
                slots = self.writer.slots_of(inodes)
                self.writer.begin(slots)
                self.changes.append(Change(inodes, slots))
            case "apply" if self.changes:
                for inode in self.changes[which % len(self.changes)].inodes:
                    self.truth[inode] += 1
            case "end" if self.changes:
                self.writer.end(self.changes.pop(which % len(self.changes)).slots)
            case "announce" if alive:
                self.writer.bump(self.unannounced)
                self.unannounced.clear()
            case "lose events" if alive:
                self.writer.advance_epoch()
                self.unannounced.clear()
            case "die" if alive:
                self.changes.clear()
                self.daemon = "dead"
            case "close" if alive and not self.changes:
                self.writer.close()
                self.unannounced.clear()
                self.daemon = "closed"
            case "adopt" if not alive:
                self.writer = self.writer_type.adopt(self.words)
                self.writer.set_state(State.SERVING)
                self.unannounced.clear()
                self.daemon = "alive"

    @rule(inode=some_inode)
    def host_changes(self, inode: HostInode) -> None:
        self.truth[inode] += 1
        if self.daemon != "closed":  # then it is announced by nobody, ever: closing must have made everything invalid
            self.unannounced.add(inode)

    @rule(what=st.sampled_from(GUEST_ACTIONS), which=st.integers(0, 1), inode=some_inode)
    def guest_does(self, what: str, which: int, inode: HostInode) -> None:
        guest = self.guests[which]
        match what:
            case "sample" if len(self.fetches) < 3:
                self.fetches.append(Fetch(guest, inode, guest.reader.sample(inode)))
            case "fetch" if self.fetches:
                fetch = self.fetches[0]
                fetch.value = self.truth[fetch.inode]
            case "keep" if self.fetches and self.fetches[0].value is not None:
                fetch = self.fetches.pop(0)
                assert fetch.value is not None
                self.keep(fetch.guest, fetch.inode, fetch.value, fetch.stamp)
            case "sample, fetch and keep":
                stamp = guest.reader.sample(inode)
                self.keep(guest, inode, self.truth[inode], stamp)

    def keep(self, guest: Guest, inode: HostInode, value: int, stamp: Stamp | None) -> None:
        guest.cache.pop(inode, None)
        if stamp is not None:
            guest.cache[inode] = (value, stamp)

    # --- what must hold ---

    @invariant()
    def valid_is_true(self) -> None:
        for number, guest in enumerate(self.guests):
            for inode, (value, stamp) in guest.cache.items():
                if inode not in self.unannounced and guest.reader.valid(stamp):
                    assert value == self.truth[inode], f"stale: guest {number} believes {value} of inode {inode}"

    @invariant()
    def table_is_sound(self) -> None:
        if self.daemon != "dead":
            self.writer.check()

    def teardown(self) -> None:
        """At rest everything can be cached, else a table that is never valid would pass."""
        self.daemon_does("adopt", set(), 0)
        while self.changes:
            self.daemon_does("end", set(), 0)
        for guest in self.guests:
            for inode in INODES:
                stamp = guest.reader.sample(inode)
                assert stamp is not None
                assert guest.reader.valid(stamp)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=100, stateful_step_count=40)


def walk(machine: TableMachine, random: Random) -> None:
    """Drive the machine through 40 steps, every one as likely as the next.

    Hypothesis prefers simple schedules, and shrinks what fails; uniform ones find what needs many different steps.
    """
    for _ in range(40):
        match random.randrange(5):
            case 0 | 1:
                inodes = set(random.choices(INODES, k=2))
                machine.daemon_does(random.choice(DAEMON_ACTIONS), inodes, random.randrange(3))
            case 2:
                machine.host_changes(random.choice(INODES))
            case _:
                machine.guest_does(random.choice(GUEST_ACTIONS), random.randrange(2), random.choice(INODES))
        machine.valid_is_true()


def walk_all(machine_type: type[TableMachine]) -> None:
    for seed in range(1000):
        machine = machine_type()
        walk(machine, Random(seed))
        machine.teardown()


def test_valid_is_true_on_uniform_walks() -> None:
    walk_all(TableMachine)


# --- negative controls: one broken rule each ----------------------------------------------------------------------


class ParityWriter(TableWriter):
    def begin(self, slots: tuple[SlotIndex, ...]) -> None:
        for slot in slots:
            self._slots[slot] += 1

    def end(self, slots: tuple[SlotIndex, ...]) -> None:
        self.begin(slots)


class PlainParity(TableMachine):
    """W4 broken: nobody counts the changes in flight."""

    writer_type = ParityWriter


class EarlyWriter(TableWriter):
    def begin(self, slots: tuple[SlotIndex, ...]) -> None:
        super().begin(slots)
        super().end(slots)

    def end(self, slots: tuple[SlotIndex, ...]) -> None:
        pass


class BumpBefore(TableMachine):
    """W3 broken: one step, before the change."""

    writer_type = EarlyWriter


class LateWriter(TableWriter):
    def begin(self, slots: tuple[SlotIndex, ...]) -> None:
        pass

    def end(self, slots: tuple[SlotIndex, ...]) -> None:
        super().begin(slots)
        super().end(slots)


class BumpAfter(TableMachine):
    """W3 broken: begin is skipped, one step after the change."""

    writer_type = LateWriter


class SilentHeir(TableWriter):
    @classmethod
    def adopt(cls, words: memoryview) -> TableWriter:
        epoch = words[EPOCH_WORD]
        heir = super().adopt(words)
        words[EPOCH_WORD] = epoch
        return heir


class AdoptWithoutEpoch(TableMachine):
    """W9 broken: odd words are rounded up, the epoch is left."""

    writer_type = SilentHeir


class SilentCloser(TableWriter):
    def close(self) -> None:
        self.set_state(State.CLOSED)


class CloseWithoutEpoch(TableMachine):
    """W8 broken."""

    writer_type = SilentCloser


class MuteWriter(TableWriter):
    def advance_epoch(self) -> Epoch:
        return Epoch(self.words[EPOCH_WORD])


class LoseEventsSilently(TableMachine):
    """W7 broken."""

    writer_type = MuteWriter


class SampleAfterFetch(TableMachine):
    """R2 broken: the stamp is taken when the value is there."""

    def keep(self, guest: Guest, inode: HostInode, value: int, stamp: Stamp | None) -> None:
        super().keep(guest, inode, value, guest.reader.sample(inode))


class GreedyReader(TableReader):
    def sample(self, inode: HostInode) -> Stamp:
        word = self.word_of(inode)
        return Stamp(word, self.words[word], self.words[EPOCH_WORD])


class KeepOdd(TableMachine):
    """R4 broken: what was fetched during a change is kept with the odd version."""

    reader_type = GreedyReader


@pytest.mark.parametrize(
    "control",
    [
        PlainParity,
        BumpBefore,
        BumpAfter,
        AdoptWithoutEpoch,
        CloseWithoutEpoch,
        LoseEventsSilently,
        SampleAfterFetch,
        KeepOdd,
    ],
)
def test_the_machine_catches_a_broken_rule(control: type[TableMachine]) -> None:
    with pytest.raises(AssertionError, match="stale: guest"):
        walk_all(control)
