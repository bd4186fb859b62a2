"""A reader that has not noticed the death of its daemon never uses the abandoned table for a stale answer.

Daemons are killed, or close, and are followed by others with a table of their own; guests look at the heartbeat whenever
they please, may be stopped for long, and have clocks that agree neither in time nor in rate.  Below, machines that break
one rule of `docs/spec/table.md` each, and must be caught.
"""

from random import Random
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coherency.ids import HostInode
from coherency.shm_table import (
    HEARTBEAT_PERIOD_NS,
    TRUST_MARGIN_NS,
    TRUST_NS,
    Stamp,
    State,
    TableReader,
    TableWriter,
    bytes_needed,
)

INODE = HostInode(1)
PERIODS = [1, 2, 5, 11, 13]
DAEMON_ACTIONS = ["beat", "answer", "change", "change", "be killed", "close"]
GUEST_ACTIONS = ["pulse", "ask", "receive", "fetch", "connect"]


class Daemon:
    """A daemon with a fresh table of its own."""

    def __init__(self, number: int, first_change_ns: int) -> None:
        self.words = memoryview(bytearray(bytes_needed(1))).cast("Q")
        self.writer = TableWriter.create(self.words, slot_count=1, table_id=(0, number))
        self.writer.set_state(State.SERVING)
        self.number = number
        self.first_change_ns = first_change_ns


class Guest:
    """A guest with a clock of its own: it started at another time and runs at `rate_percent`."""

    def __init__(self, daemon: Daemon, reader: TableReader, offset_ns: int, rate_percent: int) -> None:
        self.offset_ns = offset_ns
        self.rate_percent = rate_percent
        self.connect(daemon, reader)

    def clock_ns(self, now_ns: int) -> int:
        return self.offset_ns + now_ns * self.rate_percent // 100

    def connect(self, daemon: Daemon, reader: TableReader) -> None:
        self.daemon = daemon
        self.reader = reader
        self.cached: tuple[int, Stamp] | None = None
        self.asked_at_ns: int | None = None
        self.answered_at_ns: int | None = None


class TrustMachine(RuleBasedStateMachine):
    """Two guests of one share, whose daemons come and go."""

    reader_type: ClassVar[type[TableReader]] = TableReader
    grace_ns: ClassVar[int] = TRUST_NS + TRUST_MARGIN_NS
    """How long a daemon waits whose predecessor was killed."""
    rest_is_inherited: ClassVar[bool] = True
    """Whether the successor of one that closed while it was still waiting waits for the rest."""
    slow_clock_percent: ClassVar[int] = 84

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.truth = 0
        self.daemon = Daemon(0, 0)
        self.guests = [
            Guest(self.daemon, self.new_reader(), 0, 100),
            Guest(self.daemon, self.new_reader(), 10**15, self.slow_clock_percent),
        ]
        # Start in the middle of life: a machine that has to get there first explores little else.
        for which in range(2):
            for what in ("pulse", "ask"):
                self.guest_does(what, which)
        for what in ("beat", "answer"):
            self.daemon_does(what)
        for which in range(2):
            for what in ("pulse", "receive", "fetch"):
                self.guest_does(what, which)

    def new_reader(self) -> TableReader:
        return self.reader_type(self.daemon.words.toreadonly())

    @rule(periods=st.sampled_from(PERIODS))
    def time_passes(self, periods: int) -> None:
        self.now_ns += periods * HEARTBEAT_PERIOD_NS

    @rule(what=st.sampled_from(DAEMON_ACTIONS))
    def daemon_does(self, what: str) -> None:
        daemon = self.daemon
        match what:
            case "beat":
                daemon.writer.beat()
            case "answer":
                for guest in self.guests:
                    if guest.daemon is daemon:
                        guest.answered_at_ns = guest.asked_at_ns
            case "change" if self.now_ns >= daemon.first_change_ns:
                slots = daemon.writer.slots_of([INODE])
                daemon.writer.begin(slots)
                self.truth += 1
                daemon.writer.end(slots)
            case "be killed":
                self.daemon = Daemon(daemon.number + 1, self.now_ns + self.grace_ns)
            case "close":
                daemon.writer.close()
                rest_ns = max(daemon.first_change_ns - self.now_ns, 0) if self.rest_is_inherited else 0
                self.daemon = Daemon(daemon.number + 1, self.now_ns + rest_ns)

    @rule(what=st.sampled_from(GUEST_ACTIONS), which=st.integers(0, 1))
    def guest_does(self, what: str, which: int) -> None:
        """What a guest does, not knowing whether its daemon is the one that lives."""
        guest = self.guests[which]
        match what:
            case "pulse":
                guest.reader.pulse(guest.clock_ns(self.now_ns))
            case "ask":
                guest.asked_at_ns = guest.clock_ns(self.now_ns)
            case "receive" if guest.answered_at_ns is not None:
                guest.reader.vouch(guest.answered_at_ns)
            case "fetch":
                stamp = guest.reader.sample(INODE)
                guest.cached = None if stamp is None else (self.truth, stamp)
            case "connect" if guest.daemon is not self.daemon:
                guest.reader.withdraw()
                guest.connect(self.daemon, self.new_reader())

    # --- what must hold ---

    @invariant()
    def used_is_true(self) -> None:
        for number, guest in enumerate(self.guests):
            if guest.cached is not None and guest.clock_ns(self.now_ns) < guest.reader.trusted_until_ns:
                value, stamp = guest.cached
                assert not guest.reader.valid(stamp) or value == self.truth, f"stale: guest {number} believes {value}"

    def teardown(self) -> None:
        self.daemon.writer.check()
        for guest in self.guests:
            guest.reader.check()


TestTrust = TrustMachine.TestCase
TestTrust.settings = settings(max_examples=100, stateful_step_count=30)


def walk(machine: TrustMachine, random: Random) -> None:
    """Drive the machine through 25 steps, every one as likely as the next (see `test_table_machine.walk`)."""
    for _ in range(25):
        match random.randrange(5):
            case 0:
                machine.time_passes(random.choice(PERIODS))
            case 1 | 2:
                machine.daemon_does(random.choice(DAEMON_ACTIONS))
            case _:
                machine.guest_does(random.choice(GUEST_ACTIONS), random.randrange(2))
        machine.used_is_true()


def walk_all(machine_type: type[TrustMachine]) -> None:
    for seed in range(2000):
        machine = machine_type()
        walk(machine, Random(seed))
        machine.teardown()


def test_used_is_true_on_uniform_walks() -> None:
    walk_all(TrustMachine)


def test_trust_can_last_for_ever_while_the_daemon_beats() -> None:
    """The machine above would also be satisfied by a reader that never trusts."""
    daemon = Daemon(0, 0)
    reader = TableReader(daemon.words)
    now_ns = 10**12
    reader.vouch(now_ns)
    for _ in range(1000):
        now_ns += HEARTBEAT_PERIOD_NS // 2
        assert now_ns < reader.trusted_until_ns
        daemon.writer.beat()
        reader.pulse(now_ns)


# --- negative controls: one broken rule each ----------------------------------------------------------------------


class HastySuccessor(TrustMachine):
    """T7 broken: changes begin at once after a killed predecessor."""

    grace_ns = 0


class ForgetfulSuccessor(TrustMachine):
    """T7 broken: one that closes while it is still waiting leaves no trace of the death before it."""

    rest_is_inherited = False


class NoMargin(TrustMachine):
    """T7 broken: waits for `trust` only, and a slow clock has not come to its end by then."""

    grace_ns = TRUST_NS


class SlowerClock(TrustMachine):
    """A clock beyond what the margin allows for."""

    slow_clock_percent = 60


class ImpatientReader(TableReader):
    def pulse(self, now_ns: int) -> None:
        if self._pulse_ns is not None:
            self._pulse_ns = now_ns
        super().pulse(now_ns)


class TrustFromNow(TrustMachine):
    """T3 broken: trust counts from the look that saw the heartbeat moved, not from the one before."""

    reader_type = ImpatientReader


class LateVoucher(TableReader):
    def vouch(self, asked_at_ns: int) -> None:
        super().vouch(asked_at_ns + TRUST_NS)


class TrustFromReceipt(TrustMachine):
    """T4 broken: trust counts from the answer's arrival, any time after the question."""

    reader_type = LateVoucher


class CredulousReader(TableReader):
    def _trust(self, alive_at_ns: int) -> None:
        self.trusted_until_ns = 2**63


class TrustForEver(TrustMachine):
    """T2 broken: one sign of life is enough."""

    reader_type = CredulousReader


@pytest.mark.parametrize(
    "control",
    [HastySuccessor, ForgetfulSuccessor, NoMargin, SlowerClock, TrustFromNow, TrustFromReceipt, TrustForEver],
)
def test_the_machine_catches_a_broken_rule(control: type[TrustMachine]) -> None:
    with pytest.raises(AssertionError, match="stale: guest"):
        walk_all(control)
