"""A whole simulation: start, work, faults, stop, judge."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

from coherency.errors import UsageError
from coherency.sim.faults import CHANNEL_FAULTS, fault_sequence
from coherency.sim.history import Call, Register, initial_values
from coherency.sim.machine import Machine, NotRecovered, Setup
from coherency.sim.metronome import Metronome
from coherency.sim.verdict import AUTO_TIMEOUT_NS, PROMISES, Verdict, Violation, judge
from coherency.sim.waits import Delay, Window
from coherency.sim.worker import read_record

_SECOND_NS: Final = 1_000_000_000
_SPAN_S: Final = 0.25
# Within this time of the end no further fault begins, so that what follows one is seen, too.
_QUIET_END_S: Final = 1.5


class Outcome(NamedTuple):
    """What came of a simulation. ``violations``: those of the verdict, and what went wrong besides."""

    setup: Setup
    seconds: float
    verdict: Verdict
    violations: tuple[Violation, ...]
    windows: tuple[Window, ...]
    origin_ns: int

    @property
    def passed(self) -> bool:
        return not self.violations


def require_fuse() -> None:
    """Raises :class:`UsageError` where no mount can be made."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise UsageError("a simulation makes real mounts: it needs root and /dev/fuse")


def simulate(setup: Setup, seconds: float, faults: Sequence[str], tell: Callable[[str], None]) -> Outcome:
    """Run it. ``tell`` gets progress. Nothing is left behind, also when an exception (KeyboardInterrupt) ends it."""
    require_fuse()
    if setup.cache not in PROMISES:
        raise UsageError(f"--cache is one of {', '.join(PROMISES)}, not {setup.cache!r}")
    setup = setup._replace(has_relays=not CHANNEL_FAULTS.isdisjoint(faults))
    sequence = fault_sequence(Random(f"{setup.seed}/faults"), faults, setup.guests, setup.lease_ns)
    with Machine(setup, tell) as machine, Metronome(machine.directory / "metronome") as metronome:
        initial = initial_values(machine.inodes())
        origin_ns = time.monotonic_ns()
        until_ns = origin_ns + round(seconds * _SECOND_NS)
        machine.start_workers(until_ns)
        windows: list[Window] = []
        wrong: list[str] = []
        last_start_ns = until_ns - round(_QUIET_END_S * _SECOND_NS)
        try:
            for fault in sequence:
                if time.monotonic_ns() + fault.pause_ns > last_start_ns:
                    break
                time.sleep(fault.pause_ns / _SECOND_NS)
                tell(f"{(time.monotonic_ns() - origin_ns) / _SECOND_NS:6.1f} s  {fault}")
                windows.append(machine.inject(fault, time.sleep))
        except NotRecovered as error:
            wrong.append(str(error))
        while (left_ns := until_ns - time.monotonic_ns()) > 0:
            time.sleep(min(left_ns / _SECOND_NS, _SPAN_S))
        stuck, endless = machine.finish_workers()
        wrong += stuck
        tell("reading what the workers wrote down ...")
        calls = [*itertools.chain.from_iterable(read_record(path) for path in machine.records()), *endless]
    return _judged(setup, seconds, calls, initial, windows, metronome.delays, wrong, origin_ns, tell)


def _judged(
    setup: Setup,
    seconds: float,
    calls: list[Call],
    initial: dict[Register, Any],
    windows: list[Window],
    delays: list[Delay],
    wrong: list[str],
    origin_ns: int,
    tell: Callable[[str], None],
) -> Outcome:
    tell(f"checking {len(calls)} calls ...")
    verdict = judge(calls, initial, windows, PROMISES[setup.cache], setup.known_lease_ns or AUTO_TIMEOUT_NS, delays)
    also = tuple(Violation("the simulation", text, ()) for text in wrong)
    return Outcome(setup, seconds, verdict, also + verdict.violations, tuple(windows), origin_ns)
