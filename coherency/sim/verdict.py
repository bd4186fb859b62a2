"""Whether a history keeps the promise of its cache mode, and how stale what was.

The promise is checked for every register (``history``); the staleness of a read is the least time for which what it saw
had certainly been overwritten when it began.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from coherency.sim.calls import ATTRIBUTE_FILES, RENAMES
from coherency.sim.checker import (
    Finding,
    Matches,
    Read,
    Write,
    check_ordered,
    check_unique,
    staleness_of_ordered,
    staleness_of_unique,
)
from coherency.sim.history import LOST, NAME, Accesses, Call, Register, accesses, races
from coherency.sim.names import UNKNOWN, agrees
from coherency.sim.race import check_race, describe_state
from coherency.sim.search import TooMuch
from coherency.sim.waits import Delay, Faults, Longest, Wait, Window, longest_calls, unexplained_waits

_MS: Final = 1_000_000
_SECOND_NS: Final = 1_000_000_000
AUTO_TIMEOUT_NS: Final = 1_000_000_000
# The kernel counts its timeouts in ticks, of 10 ms at most.
_TICK_NS: Final = 10 * _MS
_MISLEADING: Final = (*RENAMES, "append", "fallocate", "copy_file_range")
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
    BOUNDED = "never older than the bound"
    NOTHING = "none"


PROMISES: Final[dict[str, Promise]] = {
    "none": Promise.LINEARIZABLE,
    "auto": Promise.BOUNDED,
    "always": Promise.NOTHING,
    "access": Promise.LINEARIZABLE,
    "prompt": Promise.BOUNDED,
    "strict": Promise.LINEARIZABLE,
}
GRANTING: Final = ("prompt", "strict")
"""The modes in which there are leases."""


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
    violations: tuple[Violation, ...]  # what was seen, the shortest history first; then what took too long; then errors
    calls: int
    disturbed: int  # calls that a fault excuses
    reads: int  # of registers
    writes: int
    registers: int
    raced: int  # calls that were searched through
    staleness: Staleness
    longest: dict[str, Longest]


def judge(
    calls: Sequence[Call],
    initial: Mapping[Register, Any],
    windows: Sequence[Window],
    promise: Promise,
    bound_ns: int = AUTO_TIMEOUT_NS,
    delays: Sequence[Delay] = (),
) -> Verdict:
    """Check everything. ``windows``: the faults, in their order; an unexplained error outside of them breaks a linearizable mode.

    ``bound_ns``: for the modes that have one, besides the length of the longest call and the longest delay meanwhile.
    ``delays``: of the machine, in their order.
    """
    registers = accesses(calls, initial)
    faults = Faults(windows, delays)
    disturbed = [call for call in calls if call.is_disturbed]
    # An answer of the cache was fetched by an earlier call of that guest, and no call took longer than the longest one.
    bound_ns += _TICK_NS + max((call.end_ns - call.start_ns for call in calls), default=0)
    stale: list[int] = []
    violations = []
    for register, each in registers.items():
        ages = _staleness(register, each)
        stale += [age for age in ages if age]
        finding = _FINDERS[promise](register, each, ages, bound_ns, calls, faults)
        if finding is not None:
            violations.append(_violation(str(register), finding.reason, [each.tag for each in finding.operations], calls))
    raced = races(calls)
    errors: list[Violation] = []
    if promise is Promise.LINEARIZABLE:  # in the others a kernel that believes in what is gone makes odd errors, too
        violations += [found for name, each in raced.items() if (found := _raced(name, each, calls)) is not None]
        errors = [found for call in disturbed if (found := _error(call, windows)) is not None]
    return Verdict(
        promise,
        (
            *sorted(violations, key=lambda each: len(each.calls)),
            *map(_waited, unexplained_waits(calls, faults)),
            *errors,
        ),
        len(calls),
        len(disturbed),
        sum(len(each.reads) for each in registers.values()),
        sum(len(each.writes) for each in registers.values()),
        len(registers),
        sum(map(len, raced.values())),
        _summary(stale),
        longest_calls(calls, faults),
    )


def _error(call: Call, windows: Sequence[Window]) -> Violation | None:
    if call.error == LOST:
        return Violation(call.step.path, "a success that the share does not show", (call,))
    if any(window.excuses(call) for window in windows):
        return None
    return Violation(call.step.path, "an error without a cause", (call,))


def _waited(wait: Wait) -> Violation:
    took_s, allowed_s = (wait.call.end_ns - wait.call.start_ns) / _SECOND_NS, wait.allowed_ns / _SECOND_NS
    why = f"even with {', '.join(wait.faults)}" if wait.faults else "with nothing wrong"
    return Violation(wait.call.step.path, f"took {took_s:.3f} s, where {why} {allowed_s:.3f} s are allowed", (wait.call,))


def _raced(name: str, calls_there: list[tuple[int, Call]], calls: Sequence[Call]) -> Violation | None:
    try:
        found = check_race(calls_there)
    except TooMuch:
        return Violation(f"race {name}", "too much happened at once for a verdict", ())
    if found is None:
        return None
    contradiction, names = found
    begun = " or ".join(describe_state(state, names) for state in contradiction.states)
    tags = [each.tag for each in contradiction.operations]
    return _violation(
        f"race {name}", f"no order explains these calls; before them: {begun}", [*_last_changes(tags, calls_there, calls), *tags], calls
    )


def _last_changes(tags: Sequence[int], calls_there: list[tuple[int, Call]], calls: Sequence[Call]) -> set[int]:
    """For the reader: the calls that last changed, before ``tags``, the names that these are about."""
    start_ns = min(calls[tag].start_ns for tag in tags)
    before = [(tag, call) for tag, call in calls_there if call.end_ns < start_ns and call.is_change and not call.error]
    before.sort(key=lambda each: each[1].end_ns)
    paths = {path for tag in tags for path in (calls[tag].step.path, calls[tag].step.other)}
    last = {path: tag for tag, call in before for path in (call.step.path, call.step.other) if path in paths and path}
    return set(last.values())


def _staleness(register: Register, each: Accesses) -> list[int | None]:
    if _is_unique(register):
        return staleness_of_unique(each.writes, each.reads)
    return staleness_of_ordered(each.writes, each.reads, _matches(register))


def _linearizable(register: Register, each: Accesses, *_: object) -> Finding | None:
    if _is_unique(register):
        return check_unique(each.writes, each.reads)
    return check_ordered(each.writes, each.reads, _matches(register))


def _is_unique(register: Register) -> bool:
    """Whether its writers race, with a value of its own for each; the others have one writer at a time."""
    return register.what != NAME and register.path in ATTRIBUTE_FILES


def _matches(register: Register) -> Matches:
    return agrees if register.what == NAME else lambda seen, value: bool(seen == value)


def _bounded(
    register: Register, each: Accesses, ages: list[int | None], bound_ns: int, calls: Sequence[Call], faults: Faults
) -> Finding | None:
    for read, age in zip(each.reads, ages, strict=True):
        if _is_about_the_inode(calls[read.tag]):
            continue
        if age is None:
            if _is_misled(each, read, bound_ns, calls):
                continue
            return Finding("saw what was never there", (read,))
        if age <= bound_ns:
            continue
        # A machine that is late is so with the ticks, too, by which the kernel counts its timeouts.
        delays = faults.delays_during(read.start_ns - age, read.end_ns)
        allowed_ns = bound_ns + max((delay.late_ns for delay in delays), default=0)
        if age > allowed_ns:
            current = [write for write in each.writes if write.start_ns <= read.start_ns - age][-1:]
            return Finding(
                f"saw what had been overwritten {age / _SECOND_NS:.3f} s before, with {allowed_ns / _SECOND_NS:.3f} s allowed",
                (*_last_written(register, each.writes, read), *current, read),
            )
    return None


def _is_about_the_inode(call: Call) -> bool:
    """A kernel that believes in an old name links what this was. If that is gone there is nothing to link, whatever the name is now."""
    return call.step.op == "link" and call.error == errno.ENOENT


def _is_misled(each: Accesses, read: Read, bound_ns: int, calls: Sequence[Call]) -> bool:
    """Whether the guest itself had just renamed something to or from this name, or made the file longer.

    Its kernel then has under the new name what it believed to be under the old one, which may never have been there; and
    it believes that the file ends where it would if the size had been what it believed in. And a kernel that believes in an old
    name may make with O_CREAT what it opens, so that nobody can tell by what was there before.
    """
    if any(
        calls[other.tag].step.op == "open-create"
        and other.start_ns <= read.end_ns
        and read.start_ns <= other.end_ns + bound_ns
        for other in each.reads
    ):
        return True
    return any(
        write.start_ns <= read.end_ns
        and read.start_ns <= write.end_ns + bound_ns
        and calls[write.tag].step.op in _MISLEADING
        and calls[write.tag].guest == calls[read.tag].guest
        for write in each.writes
        if write.tag >= 0
    )


def _last_written(register: Register, writes: Sequence[Write], read: Read) -> list[Write]:
    matches = _matches(register)
    return [write for write in writes if write.start_ns <= read.end_ns and matches(read.seen, write.value)][-1:]


_Finder: TypeAlias = Callable[[Register, Accesses, list[int | None], int, Sequence[Call], Faults], Finding | None]
_FINDERS: Final[dict[Promise, _Finder]] = {
    Promise.LINEARIZABLE: _linearizable,
    Promise.BOUNDED: _bounded,
    Promise.NOTHING: lambda *_: None,
}


def _violation(where: str, reason: str, tags: Iterable[int], calls: Sequence[Call]) -> Violation:
    ordered = sorted({tag for tag in tags if tag >= 0}, key=lambda tag: calls[tag].start_ns)
    return Violation(where, reason, tuple(calls[tag] for tag in ordered))


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
    made = f" (made {call.made})" if call.made and call.made is not UNKNOWN else ""
    return f"{times}  guest {call.guest} worker {call.worker}: {step.op} {step.path}{rest} -> {outcome}{made}"


def _error_name(error: int) -> str:
    return "done, but it was not" if error == LOST else errno.errorcode.get(error, f"errno {error}")
