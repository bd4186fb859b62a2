"""Was every read of a register right? Exact answers in O(n log n), from the times of the calls alone.

A register holds one value at a time. A call took effect at one unknown instant between its start and its end; two calls
whose intervals touch may have taken effect in either order. A history is *linearizable* (Herlihy and Wing, 1990) iff
instants can be chosen so that every read returns what the last write before it had written. Deciding that is NP-complete
in general and easy for the two kinds of history that the simulator makes:

* **unique** (:func:`check_unique`): writers race, but no value is written twice, so each read names its write.
* **ordered** (:func:`check_ordered`): values repeat, and a read may tell only something of the value, but the writes
  do not overlap, so their order is known.

A write that may or may not have happened (its caller was told an error by a fault) is not ``certain``: it may take
effect at any time after its start, or never.

Each check returns None, or a :class:`Finding` with as few operations as still contradict each other. What is left out
there cannot explain it: leaving out a read, or a write that no remaining read may have seen, never makes a
linearizable history wrong.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

FOREVER_NS: Final = (1 << 63) - 1


class Write(NamedTuple):
    """``value`` became current at one instant between start and end; or maybe never, if it is not certain."""

    start_ns: int
    end_ns: int
    value: Any
    certain: bool = True
    tag: int = -1  # whatever the caller knows it by

    @property
    def done_ns(self) -> int:
        """When it had certainly taken effect."""
        return self.end_ns if self.certain else FOREVER_NS


class Read(NamedTuple):
    """``seen`` was told of the value that was current at one instant between start and end."""

    start_ns: int
    end_ns: int
    seen: Any
    tag: int = -1


Operation: TypeAlias = Write | Read
Matches: TypeAlias = Callable[[Any, Any], bool]


class Finding(NamedTuple):
    """A contradiction, and the operations that it takes."""

    reason: str
    operations: tuple[Operation, ...]


def _by_start(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    return tuple(sorted(operations, key=lambda each: (each.start_ns, each.end_ns)))


# ---- unique values -------------------------------------------------------------------------------------------------


class _Cluster(NamedTuple):
    """A write and the reads of its value."""

    write: Write
    reads: list[Read]
    first_end: Operation  # whichever ended first
    last_start: Operation  # whichever began last

    @property
    def f(self) -> int:
        return _end(self.first_end)

    @property
    def s(self) -> int:
        return self.last_start.start_ns

    def operations(self) -> set[Operation]:
        return {self.write, self.first_end, self.last_start}


def _end(operation: Operation) -> int:
    return operation.done_ns if isinstance(operation, Write) else operation.end_ns


def check_unique(writes: Sequence[Write], reads: Sequence[Read]) -> Finding | None:
    """Whether a register that no value is written to twice was linearizable; ``seen`` is a value.

    The initial value is a write too, one that ended before everything else began. ValueError if a value repeats.

    Why it is exact (after Gibbons and Korach, "Testing shared memories", 1997). In any linearization the reads of a value
    stand right after its write, before the next write: the history is a sequence of *clusters*. Cluster A must
    precede B iff some operation of A ended before some operation of B began: iff ``f(A) < s(B)``, with ``f`` the
    earliest end in a cluster and ``s`` the latest start. So the history is linearizable iff no read ended before its
    write began, and "must precede" has no cycle: then write the clusters down in an order that respects it, each with
    its write first and its reads by start. And a cycle exists only if two clusters must precede each other: let F be the
    cluster of the cycle with the smallest f. Every X of the cycle has a predecessor P with ``s(X) > f(P) >= f(F)``, so F
    must precede every X; and F's own predecessor must precede F. So it is enough to look at pairs, and a pair for B is
    found among the clusters with ``f < s(B)`` by their greatest s.
    """
    clusters: dict[Hashable, tuple[Write, list[Read]]] = {}
    for write in writes:
        if write.value in clusters:
            raise ValueError(f"{write.value!r} is written twice")
        clusters[write.value] = write, []
    for read in reads:
        if read.seen not in clusters:
            return Finding("saw a value that nobody has written", (read,))
        write, seen_by = clusters[read.seen]
        if read.end_ns < write.start_ns:
            return Finding("saw a value before it was written", (read, write))
        seen_by.append(read)
    pair = _crossed([_cluster(*cluster) for cluster in clusters.values() if cluster[1] or cluster[0].certain])
    if pair is None:
        return None
    return Finding(
        "saw a value that had been overwritten, or an older one after a newer one",
        _by_start(_without_the_needless(pair[0].operations() | pair[1].operations())),
    )


def _cluster(write: Write, reads: list[Read]) -> _Cluster:
    operations: list[Operation] = [write, *reads]
    return _Cluster(write, reads, min(operations, key=_end), max(operations, key=lambda each: each.start_ns))


def _crossed(clusters: list[_Cluster]) -> tuple[_Cluster, _Cluster] | None:
    """Two clusters of which each must precede the other."""
    clusters.sort(key=lambda each: each.f)
    ends = [each.f for each in clusters]
    # Of the first n clusters, the two that began last: one of them may be the one that is compared with.
    latest: list[tuple[_Cluster | None, _Cluster | None]] = [(None, None)]
    for each in clusters:
        first, second = latest[-1]
        if first is None or each.s > first.s:
            latest.append((each, first))
        else:
            latest.append((first, each if second is None or each.s > second.s else second))
    for each in clusters:
        for other in latest[bisect_left(ends, each.s)]:
            if other is not None and other is not each and other.s > each.f:
                return other, each
    return None


def _without_the_needless(operations: set[Operation]) -> set[Operation]:
    """A smallest part (none of it can be spared) that is not linearizable; of a few operations that are not."""
    kept = set(operations)
    for candidate in sorted(operations, key=lambda each: isinstance(each, Write)):
        rest = kept - {candidate}
        writes = [each for each in rest if isinstance(each, Write)]
        reads = [each for each in rest if isinstance(each, Read)]
        if {read.seen for read in reads} <= {write.value for write in writes} and check_unique(writes, reads):
            kept = rest
    return kept


def staleness_of_unique(writes: Sequence[Write], reads: Sequence[Read]) -> list[int | None]:
    """For each read the least time, in ns, for which what it saw had been overwritten when it began.

    0 also if that is not certain; None if what it saw was never written, or only later.
    """
    by_value = {write.value: write for write in writes}
    certain = sorted((write for write in writes if write.certain), key=lambda each: each.start_ns)
    starts = [write.start_ns for write in certain]
    # done[n]: when the first of the writes from the nth on was done.
    done = list(itertools.accumulate((write.end_ns for write in reversed(certain)), min, initial=FOREVER_NS))[::-1]
    found: list[int | None] = []
    for read in reads:
        write = by_value.get(read.seen)
        if write is None or read.end_ns < write.start_ns:
            found.append(None)
        else:
            found.append(max(0, read.start_ns - done[bisect_right(starts, write.done_ns)]))
    return found


# ---- ordered writes ------------------------------------------------------------------------------------------------


def check_ordered(writes: Sequence[Write], reads: Sequence[Read], matches: Matches) -> Finding | None:
    """Whether a register whose writes came one after the other was linearizable.

    ``matches(seen, value)``: whether a read that saw this may have read that. ``writes``: in their order, the
    initial value first. None of them ends after the next one
    starts (where one ends and the next begins at the same instant, their place decides); only the last one may be uncertain. ValueError
    otherwise.

    Why it is exact. A linearization gives each read the index of the write that it read: one that matches, that had begun
    when the read ended, whose successor was not done when the read began, and not below that of a read which ended
    before this one began. Conversely, indexes with these properties give a linearization: write j may take effect
    between the latest start of itself and of all reads below j, and the earliest end of itself and of all reads from j
    on, which is never empty, and these bounds do not decrease with j. The smallest indexes with these properties, if
    there are any, are found by going through the reads by their start and giving each the smallest one that is allowed:
    whatever ended before a read began has its index already, and a smaller one there never forbids anything here.
    """
    _require_order(writes)
    starts, ends = [write.start_ns for write in writes], [write.done_ns for write in writes]
    order = sorted(range(len(reads)), key=lambda each: reads[each].start_ns)
    by_end = sorted(range(len(reads)), key=lambda each: reads[each].end_ns)
    index: dict[int, int] = {}
    forced_by: dict[int, int] = {}
    ended, newest = 0, -1  # how many of by_end are over, and which of those has the highest index
    for this in order:
        read = reads[this]
        while ended < len(by_end) and reads[by_end[ended]].end_ns < read.start_ns:
            if newest < 0 or index[by_end[ended]] > index[newest]:
                newest = by_end[ended]
            ended += 1
        lowest = max(bisect_left(ends, read.start_ns) - 1, 0)
        if newest >= 0 and index[newest] > lowest:
            lowest, forced_by[this] = index[newest], newest
        highest = bisect_right(starts, read.end_ns)
        found = next((each for each in range(lowest, highest) if matches(read.seen, writes[each].value)), None)
        if found is None:
            chain = [this]
            while (before := forced_by.get(chain[-1])) is not None:
                chain.append(before)
            return _explain(writes, [reads[each] for each in chain], matches)
        index[this] = found
    return None


def _require_order(writes: Sequence[Write]) -> None:
    if not writes:
        raise ValueError("no initial value")
    for earlier, later in itertools.pairwise(writes):
        if not earlier.certain or earlier.end_ns > later.start_ns:
            raise ValueError(f"{earlier} and {later} are not in order")


def _explain(writes: Sequence[Write], reads: list[Read], matches: Matches) -> Finding:
    """``reads``: the one that fits nowhere, then those that push it, each by the next."""
    fails = reads[0]
    if not any(matches(fails.seen, write.value) for write in writes):
        return Finding("saw what was never there", (fails,))
    for candidate in reads[1:]:
        rest = [read for read in reads if read is not candidate]
        if check_ordered(writes, rest, matches):
            reads = rest
    # Of the writes only those that these reads may have seen, and the one before that all of them come after, ...
    first = max(bisect_left([write.done_ns for write in writes], min(read.start_ns for read in reads)) - 1, 0)
    beyond = bisect_right([write.start_ns for write in writes], max(read.end_ns for read in reads))
    kept = list(writes[first:beyond])
    for needless in writes[first + 1 : beyond]:
        rest_of_writes = [write for write in kept if write is not needless]
        seen = any(matches(read.seen, needless.value) for read in reads)
        if not seen and check_ordered(rest_of_writes, reads, matches):
            kept = rest_of_writes
    # ... and, for the reader of the report, the last one that had put there what was seen.
    seen_before = [write for write in writes[:first] if matches(fails.seen, write.value)]
    reason = (
        "saw what had been overwritten, or something older after something newer"
        if any(matches(fails.seen, write.value) for write in writes if write.start_ns <= fails.end_ns)
        else "saw a value before it was written"
    )
    return Finding(reason, _by_start([*seen_before[-1:], *kept, *reads]))


def staleness_of_ordered(writes: Sequence[Write], reads: Sequence[Read], matches: Matches) -> list[int | None]:
    """Like :func:`staleness_of_unique`, for the other kind of history."""
    _require_order(writes)
    starts = [write.start_ns for write in writes]
    found: list[int | None] = []
    for read in reads:
        newest = bisect_right(starts, read.end_ns) - 1
        last = next((each for each in range(newest, -1, -1) if matches(read.seen, writes[each].value)), None)
        if last is None:
            found.append(None)
        elif last + 1 == len(writes):
            found.append(0)
        else:
            found.append(max(0, read.start_ns - writes[last + 1].done_ns))
    return found
