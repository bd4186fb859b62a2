"""Whether a history keeps the promise of its cache mode, and how stale what was.

The promise is checked for every register (``history``); the staleness of a read is the least time for which what it saw
had certainly been overwritten when it began.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from coherency.sim.calls import RENAMES
from coherency.sim.checker import (
    Finding,
    Read,
    Write,
    check_ordered,
    check_unique,
    staleness_of_ordered,
    staleness_of_unique,
)
from coherency.sim.history import LOST, NAME, Accesses, Call, Register, accesses
from coherency.sim.names import agrees

_MS: Final = 1_000_000
_SECOND_NS: Final = 1_000_000_000
AUTO_TIMEOUT_NS: Final = 1_000_000_000
# The kernel counts its timeouts in ticks, of 10 ms at most.
_TICK_NS: Final = 10 * _MS
_BUCKETS: Final[tuple[tuple[str, int], ...]] = (
    ("under 1 ms", _MS),
    ("under 10 ms", 10 * _MS),
    ("under 100 ms", 100 * _MS),
    ("under 1 s", _SECOND_NS),
    ("under 10 s", 10 * _SECOND_NS),
    ("10 s or more", 1 << 63),
)


class Promise(Enum):
    """What is asked of the reads."""

    LINEARIZABLE = "linearizable"
    BOUNDED = "never older than the timeout"
    NOTHING = "none"


PROMISES: Final[dict[str, Promise]] = {
    "none": Promise.LINEARIZABLE,
    "auto": Promise.BOUNDED,
    "always": Promise.NOTHING,
    "access": Promise.LINEARIZABLE,
}


class Window(NamedTuple):
    """From a fault until everything worked again. ``guests``: whose calls may have failed meanwhile."""

    what: str
    start_ns: int
    end_ns: int
    guests: tuple[int, ...]

    def excuses(self, call: Call) -> bool:
        return call.guest in self.guests and self.start_ns <= call.end_ns and call.start_ns <= self.end_ns


class Violation(NamedTuple):
    """A promise that was not kept. ``calls``: the shortest history that shows it, in order."""

    where: str
    reason: str
    calls: tuple[Call, ...]


class Staleness(NamedTuple):
    """Of those reads that were stale; all the others saw what was, or may have been, current."""

    stale: int
    histogram: dict[str, int]
    p50_ns: int
    p99_ns: int
    max_ns: int


class Verdict(NamedTuple):
    promise: Promise
    violations: tuple[Violation, ...]  # what was seen, the shortest history first; then errors
    calls: int
    disturbed: int  # calls that a fault excuses
    reads: int  # of registers
    writes: int
    registers: int
    staleness: Staleness


def judge(
    calls: Sequence[Call],
    initial: Mapping[Register, Any],
    windows: Sequence[Window],
    promise: Promise,
) -> Verdict:
    """Check everything. ``windows``: the faults; an unexplained error outside of them breaks a linearizable mode."""
    registers = accesses(calls, initial)
    disturbed = [call for call in calls if call.is_disturbed]
    violations, errors = [], []
    if promise is Promise.LINEARIZABLE:  # in the others a kernel that believes in what is gone makes odd errors, too
        for call in disturbed:
            if call.error == LOST:
                errors.append(Violation(call.step.path, "a success that the share does not show", (call,)))
            elif not any(window.excuses(call) for window in windows):
                errors.append(Violation(call.step.path, "an error without a cause", (call,)))
    # An answer of the cache was fetched by an earlier call of that guest, and no call took longer than the longest one.
    bound_ns = AUTO_TIMEOUT_NS + _TICK_NS + max((call.end_ns - call.start_ns for call in calls), default=0)
    stale: list[int] = []
    for register, each in registers.items():
        ages = _staleness(register, each)
        stale += [age for age in ages if age]
        finding = _FINDERS[promise](register, each, ages, bound_ns, calls)
        if finding is not None:
            violations.append(_violation(register, finding, calls))
    return Verdict(
        promise,
        (*sorted(violations, key=lambda each: len(each.calls)), *errors),
        len(calls),
        len(disturbed),
        sum(len(each.reads) for each in registers.values()),
        sum(len(each.writes) for each in registers.values()),
        len(registers),
        _summary(stale),
    )


def _staleness(register: Register, each: Accesses) -> list[int | None]:
    if register.what == NAME:
        return staleness_of_ordered(each.writes, each.reads, agrees)
    return staleness_of_unique(each.writes, each.reads)


def _linearizable(register: Register, each: Accesses, *_: object) -> Finding | None:
    if register.what == NAME:
        return check_ordered(each.writes, each.reads, agrees)
    return check_unique(each.writes, each.reads)


def _bounded(
    register: Register, each: Accesses, ages: list[int | None], bound_ns: int, calls: Sequence[Call]
) -> Finding | None:
    for read, age in zip(each.reads, ages, strict=True):
        if age is None:
            if _is_misled(each.writes, read, bound_ns, calls):
                continue
            return Finding("saw what was never there", (read,))
        if age > bound_ns:
            current = [write for write in each.writes if write.start_ns <= read.start_ns - age][-1:]
            return Finding(
                f"saw what had been overwritten {age / _SECOND_NS:.3f} s before, with {bound_ns / _SECOND_NS:.3f} s allowed",
                (*_last_written(register, each.writes, read), *current, read),
            )
    return None


def _is_misled(writes: Sequence[Write], read: Read, bound_ns: int, calls: Sequence[Call]) -> bool:
    """Whether the guest itself had just renamed something to or from this name.

    Its kernel then has under the new name what it believed to be under the old one, which may never have been there.
    """
    return any(
        write.start_ns <= read.end_ns
        and read.start_ns <= write.end_ns + bound_ns
        and calls[write.tag].step.op in RENAMES
        and calls[write.tag].guest == calls[read.tag].guest
        for write in writes
        if write.tag >= 0
    )


def _last_written(register: Register, writes: Sequence[Write], read: Read) -> list[Write]:
    matches: Callable[[Any, Any], bool] = agrees if register.what == NAME else (lambda seen, value: bool(seen == value))
    return [write for write in writes if write.start_ns <= read.end_ns and matches(read.seen, write.value)][-1:]


_Finder: TypeAlias = Callable[[Register, Accesses, list[int | None], int, Sequence[Call]], Finding | None]
_FINDERS: Final[dict[Promise, _Finder]] = {
    Promise.LINEARIZABLE: _linearizable,
    Promise.BOUNDED: _bounded,
    Promise.NOTHING: lambda *_: None,
}


def _violation(register: Register, finding: Finding, calls: Sequence[Call]) -> Violation:
    tags = sorted({each.tag for each in finding.operations if each.tag >= 0}, key=lambda tag: calls[tag].start_ns)
    return Violation(str(register), finding.reason, tuple(calls[tag] for tag in tags))


def _summary(stale: list[int]) -> Staleness:
    stale.sort()
    bucket = Counter(next(name for name, below in _BUCKETS if age < below) for age in stale)
    at = partial(_quantile, stale)
    return Staleness(len(stale), {name: bucket[name] for name, _ in _BUCKETS}, at(0.5), at(0.99), at(1.0))


def _quantile(ordered: Sequence[int], part: float) -> int:
    """Of sorted numbers; 0 if there are none."""
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0


def describe(call: Call, origin_ns: int) -> str:
    """One line of an offending history; times in ms since ``origin_ns``."""
    step = call.step
    rest = "".join(f" {part}" for part in (step.other, step.number if call.is_change else "") if part != "")
    outcome = _error_name(call.error) if call.error else f"{call.result}" if call.result is not None else "done"
    times = f"{(call.start_ns - origin_ns) / _MS:12.3f} .. {(call.end_ns - origin_ns) / _MS:12.3f} ms"
    made = f" (made {call.made})" if call.made else ""
    return f"{times}  guest {call.guest} worker {call.worker}: {step.op} {step.path}{rest} -> {outcome}{made}"


def _error_name(error: int) -> str:
    return "done, but it was not" if error == LOST else errno.errorcode.get(error, f"errno {error}")
