"""A machine that was stopped by its QEMU, told from one that is merely slow."""

import pytest

from coherency.guest_agent.standstill import TOLERANCE_NS, Standstill
from coherency.shm_table import HEARTBEAT_PERIOD_NS, HEARTBEAT_WORD, State, TableReader, TableWriter, bytes_needed

PULSE_NS = HEARTBEAT_PERIOD_NS // 2


class Machine:
    """The host's time makes the table's heart beat; the machine's goes on unless it is stopped."""

    def __init__(self) -> None:
        words = memoryview(bytearray(bytes_needed(8))).cast("Q")
        self.table = TableWriter.create(words, slot_count=8, table_id=(1, 2))
        self.table.set_state(State.SERVING)
        self.words = words
        self.host_ns = self.here_ns = 1_000_000_000
        self.within: list[int] = []
        self.standstill = Standstill(TableReader(words, trust_ns=10**9), self.clock)

    def clock(self) -> int:
        """Between two looks at it the agent may be stopped: `within` says for how long."""
        now_ns = self.here_ns
        if self.within:
            self.passes(self.within.pop(0))
        return now_ns

    def passes(self, time_ns: int, *, stopped: bool = False) -> None:
        self.host_ns += time_ns
        self.here_ns += 0 if stopped else time_ns
        while self.words[HEARTBEAT_WORD] < (self.host_ns - 1_000_000_000) // HEARTBEAT_PERIOD_NS:
            self.table.beat()


@pytest.mark.parametrize("stopped_ns", [TOLERANCE_NS + HEARTBEAT_PERIOD_NS, 10**9, 3600 * 10**9])
def test_who_was_stopped_notices_at_the_next_look(stopped_ns: int) -> None:
    machine = Machine()
    for _ in range(30):
        machine.passes(PULSE_NS)
        assert machine.standstill.trouble() is None
    machine.passes(stopped_ns + PULSE_NS, stopped=True)
    machine.passes(PULSE_NS)
    trouble = machine.standstill.trouble()
    assert trouble is not None
    assert trouble.startswith("this machine has stood still for ")


def test_negative_control_if_its_clock_had_gone_on_there_would_be_nothing_to_notice() -> None:
    machine = Machine()
    for pause_ns in (PULSE_NS, 10**9, 3600 * 10**9, 1):
        machine.passes(pause_ns)
        assert machine.standstill.trouble() is None


@pytest.mark.parametrize("place", range(4))
def test_an_agent_that_was_stopped_alone_in_the_middle_of_looking_is_no_machine_that_was(place: int) -> None:
    machine = Machine()
    machine.within = [*[0] * place, 10**10, 0, 0]
    for _ in range(4):
        machine.passes(PULSE_NS)
        assert machine.standstill.trouble() is None


def test_a_heart_that_beats_late_is_no_trouble() -> None:
    machine = Machine()
    for _ in range(100):
        machine.here_ns += PULSE_NS  # the daemon's thread gets no time
        assert machine.standstill.trouble() is None
