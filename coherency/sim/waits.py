"""How long calls took, and whether anything explains it.

A call may take ``LONGEST_CALL_NS`` if nothing is wrong, and longer by what each fault that it overlaps can explain, and by
what the machine itself was late meanwhile (see ``metronome``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, NamedTuple

from coherency.sim.history import Call

LONGEST_CALL_NS: Final = 1_000_000_000


class Window(NamedTuple):
    """From a fault until everything worked again. ``guests``: whose calls may have failed meanwhile.

    ``own_ns`` and ``others_ns``: how much longer a call of ``guest``, and of any other, may take.
    """

    what: str
    start_ns: int
    end_ns: int
    guests: tuple[int, ...] = ()
    guest: int | None = None
    own_ns: int = 0
    others_ns: int = 0

    def excuses(self, call: Call) -> bool:
        return call.guest in self.guests and self.start_ns <= call.end_ns and call.excusable_from_ns <= self.end_ns

    def patience_ns(self, call: Call) -> int:
        return self.own_ns if call.guest == self.guest else self.others_ns


class Delay(NamedTuple):
    """Something short that was ``late_ns`` late, and when."""

    start_ns: int
    end_ns: int
    late_ns: int


class Longest(NamedTuple):
    """Of one kind of call. ``quiet_ns``: of those during which no fault was; then those that overlapped one, and which."""

    calls: int
    quiet_ns: int
    faulty_ns: int
    fault: str


class Wait(NamedTuple):
    """A call that took longer than anything explains."""

    call: Call
    allowed_ns: int
    faults: tuple[str, ...]


class Faults:
    """The faults of a simulation, which came one after the other, and the delays of its machine; both in their order."""

    def __init__(self, windows: Sequence[Window], delays: Sequence[Delay] = ()) -> None:
        self._windows, self._delays = windows, delays
        self._ends = [window.end_ns for window in windows]
        self._delay_ends = [delay.end_ns for delay in delays]

    def during(self, call: Call) -> Sequence[Window]:
        """Those that ``call`` overlaps."""
        first = last = bisect_left(self._ends, call.start_ns)
        while last < len(self._windows) and self._windows[last].start_ns <= call.end_ns:
            last += 1
        return self._windows[first:last]

    def allowed_ns(self, call: Call) -> int:
        late_ns = sum(delay.late_ns for delay in self.delays_during(call.start_ns, call.end_ns))
        return LONGEST_CALL_NS + sum(window.patience_ns(call) for window in self.during(call)) + late_ns

    def delays_during(self, start_ns: int, end_ns: int) -> Sequence[Delay]:
        """Those of the machine."""
        first = last = bisect_left(self._delay_ends, start_ns)
        while last < len(self._delays) and self._delays[last].start_ns <= end_ns:
            last += 1
        return self._delays[first:last]


def longest_calls(calls: Sequence[Call], faults: Faults) -> dict[str, Longest]:
    """By kind of call, sorted."""
    found: dict[str, Longest] = {}
    for call in calls:
        op, took_ns = call.step.op, call.end_ns - call.start_ns
        count, quiet_ns, faulty_ns, fault = found.get(op, _NONE)
        if took_ns > min(quiet_ns, faulty_ns):
            during = faults.during(call)
            if not during:
                quiet_ns = max(quiet_ns, took_ns)
            elif took_ns > faulty_ns:
                faulty_ns, fault = took_ns, max(during, key=lambda window: window.patience_ns(call)).what
        found[op] = Longest(count + 1, quiet_ns, faulty_ns, fault)
    return dict(sorted(found.items()))


def unexplained_waits(calls: Sequence[Call], faults: Faults) -> list[Wait]:
    """Calls that took longer than they may, the longest first."""
    waits = [
        Wait(call, allowed_ns, tuple(window.what for window in faults.during(call)))
        for call in calls
        if call.end_ns - call.start_ns > LONGEST_CALL_NS
        and call.end_ns - call.start_ns > (allowed_ns := faults.allowed_ns(call))
    ]
    return sorted(waits, key=lambda wait: wait.call.start_ns - wait.call.end_ns)


_NONE: Final = Longest(0, 0, 0, "")
