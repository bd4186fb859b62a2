"""The checker of histories: hand-made ones, good and bad, and all small ones against a search through all orders."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coherency.sim.checker import (
    Finding,
    Read,
    Write,
    check_ordered,
    check_unique,
    staleness_of_ordered,
    staleness_of_unique,
)

INITIAL = Write(-1, -1, 0)


def equal(seen: Any, value: Any) -> bool:
    return bool(seen == value)


def ordered(writes: Sequence[Write], reads: Sequence[Read]) -> Finding | None:
    return check_ordered(writes, reads, equal)


BOTH = pytest.mark.parametrize("check", [check_unique, ordered])
Check = Callable[[Sequence[Write], Sequence[Read]], Finding | None]


# --- by hand ---


@BOTH
@pytest.mark.parametrize(
    ("writes", "reads"),
    [
        ([], []),
        ([], [Read(0, 1, 0), Read(5, 6, 0)]),
        ([Write(10, 20, 1)], [Read(0, 5, 0), Read(21, 25, 1)]),
        # While a write is under way either value may be seen, by calls that overlap each other too,
        ([Write(10, 20, 1)], [Read(12, 15, 0), Read(13, 16, 1), Read(14, 18, 0)]),
        # and a call that ends when the write begins, or begins when it ends, overlaps it.
        ([Write(10, 20, 1)], [Read(0, 10, 1), Read(0, 9, 0)]),
        ([Write(10, 20, 1)], [Read(20, 30, 0)]),
        # What may have happened did not happen, or happened at any later time.
        ([Write(10, 20, 1, certain=False)], [Read(30, 40, 0), Read(50, 60, 0)]),
        ([Write(10, 20, 1, certain=False)], [Read(30, 40, 0), Read(50, 60, 1)]),
    ],
)
def test_right_histories_pass(check: Check, writes: list[Write], reads: list[Read]) -> None:
    assert check([INITIAL, *writes], reads) is None


@BOTH
@pytest.mark.parametrize(
    ("writes", "reads", "shortest"),
    [
        # The plain stale read.
        ([Write(10, 20, 1)], [Read(0, 5, 0), Read(21, 25, 0), Read(30, 31, 1)], 3),
        # Older after newer, while the write is under way the whole time.
        ([Write(10, 50, 1)], [Read(12, 15, 1), Read(16, 18, 0), Read(60, 61, 1)], 4),
        # From the future, and from nowhere.
        ([Write(10, 20, 1)], [Read(0, 9, 1)], 2),
        ([Write(10, 20, 1)], [Read(30, 40, 7)], 1),
        # What may have happened has happened once it was seen.
        ([Write(10, 20, 1, certain=False)], [Read(30, 40, 1), Read(50, 60, 0)], 4),
        # Two values back.
        ([Write(10, 20, 1), Write(30, 40, 2), Write(50, 60, 3)], [Read(70, 80, 1)], 3),
    ],
)
def test_wrong_histories_are_found_and_shortened(
    check: Check, writes: list[Write], reads: list[Read], shortest: int
) -> None:
    finding = check([INITIAL, *writes], reads)
    assert finding is not None
    assert len(finding.operations) <= shortest
    assert any(isinstance(each, Read) for each in finding.operations)


def test_racing_writes_must_agree_with_all_readers() -> None:
    writes = [INITIAL, Write(10, 50, 1), Write(10, 50, 2)]
    assert check_unique(writes, [Read(60, 61, 1), Read(62, 63, 1)]) is None
    assert check_unique(writes, [Read(60, 61, 1), Read(62, 63, 2)]) is not None
    assert check_unique(writes, [Read(20, 21, 1), Read(60, 61, 2)]) is None


def test_value_that_comes_back_may_be_seen_again() -> None:
    writes = [INITIAL, Write(10, 20, 1), Write(30, 40, 0)]
    assert ordered(writes, [Read(22, 24, 1), Read(35, 36, 0), Read(50, 60, 0)]) is None
    finding = ordered(writes, [Read(22, 24, 0)])
    assert finding is not None
    assert {each.start_ns for each in finding.operations} == {-1, 10, 22}


def test_a_chain_of_readers_is_explained() -> None:
    """Nobody alone is wrong: the second pushes the third beyond what it saw."""
    writes = [INITIAL, Write(10, 100, 1), Write(100, 200, 0), Write(200, 300, 2)]
    reads = [Read(20, 30, 1), Read(110, 120, 0), Read(130, 140, 1)]
    assert ordered(writes, reads[:2]) is None
    assert ordered(writes, [reads[0], reads[2]]) is None
    finding = ordered(writes, reads)
    assert finding is not None
    assert {reads[1], reads[2]} <= set(finding.operations)


def test_partial_knowledge_matches_several_values() -> None:
    writes = [INITIAL, Write(10, 20, 1), Write(30, 40, 2)]
    assert check_ordered(writes, [Read(50, 60, "even")], lambda seen, value: value % 2 == 0) is None
    assert check_ordered(writes, [Read(22, 24, "even")], lambda seen, value: value % 2 == 0) is not None


def test_histories_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        check_unique([INITIAL, Write(5, 6, 0)], [])
    with pytest.raises(ValueError, match="order"):
        ordered([INITIAL, Write(5, 9, 1), Write(8, 10, 2)], [])
    with pytest.raises(ValueError, match="order"):
        ordered([INITIAL, Write(5, 6, 1, certain=False), Write(8, 10, 2)], [])
    with pytest.raises(ValueError, match="initial"):
        ordered([], [])


def test_staleness_is_the_time_since_it_was_certainly_overwritten() -> None:
    writes = [INITIAL, Write(10, 20, 1), Write(30, 40, 2)]
    reads = [Read(15, 16, 0), Read(25, 26, 0), Read(45, 50, 0), Read(45, 50, 1), Read(45, 50, 2), Read(1, 2, 2)]
    assert staleness_of_unique(writes, reads) == [0, 5, 25, 5, 0, None]
    assert staleness_of_ordered(writes, reads, equal) == [0, 5, 25, 5, 0, None]
    racing = [INITIAL, Write(10, 20, 1), Write(15, 40, 2)]
    assert staleness_of_unique(racing, [Read(50, 60, 1), Read(50, 60, 0)]) == [0, 30]


# --- against a search ---


def precedes(first: Write | Read, second: Write | Read) -> bool:
    first_end = first.done_ns if isinstance(first, Write) else first.end_ns
    return first_end < second.start_ns


def is_linearizable(writes: Sequence[Write], reads: Sequence[Read]) -> bool:
    """By the definition: some order of what happened, that keeps to the times, in which every read reads the last write."""
    unsure = [write for write in writes if not write.certain]
    sure = [write for write in writes if write.certain]
    for happened in itertools.product([True, False], repeat=len(unsure)):
        chosen = [*sure, *itertools.compress(unsure, happened), *reads]
        if _search(chosen, None):
            return True
    return False


def _search(left: list[Any], current: Any) -> bool:
    if not left:
        return True
    for each in left:
        if any(precedes(other, each) for other in left if other is not each):
            continue
        rest = [other for other in left if other is not each]
        if isinstance(each, Write) and _search(rest, each.value):
            return True
        if isinstance(each, Read) and current == each.seen and _search(rest, current):
            return True
    return False


@st.composite
def histories(draw: st.DrawFn, *, unique: bool) -> tuple[list[Write], list[Read]]:
    """Few operations in little time, so that they overlap in all ways."""
    writes = [INITIAL]
    spans = st.tuples(st.integers(0, 12), st.integers(0, 6))
    count = draw(st.integers(0, 4 if unique else 3))
    now = 0
    for number in range(1, count + 1):
        start, length = draw(spans)
        if unique:
            certain = draw(st.booleans()) or draw(st.booleans())
            value = number
        else:
            start, now = now + 1 + start // 4, now + 1 + start // 4 + length
            certain = number < count or draw(st.booleans())
            value = draw(st.integers(0, 2))
        writes.append(Write(start, start + length, value, certain))
    values = st.integers(0, count if unique else 2)
    reads = [Read(start, start + length, draw(values)) for start, length in draw(st.lists(spans, max_size=4))]
    return writes, [read._replace(tag=tag) for tag, read in enumerate(reads)]


@settings(max_examples=600)
@given(histories(unique=True))
def test_unique_agrees_with_the_search(history: tuple[list[Write], list[Read]]) -> None:
    finding = check_unique(*history)
    assert (finding is None) == is_linearizable(*history)
    if finding is not None:
        assert set(finding.operations) <= {*history[0], *history[1]}


@settings(max_examples=600)
@given(histories(unique=False))
def test_ordered_agrees_with_the_search(history: tuple[list[Write], list[Read]]) -> None:
    finding = ordered(*history)
    assert (finding is None) == is_linearizable(*history)
    if finding is not None:
        assert set(finding.operations) <= {*history[0], *history[1]}


@settings(max_examples=300)
@given(histories(unique=True))
def test_what_is_reported_is_wrong_by_itself(history: tuple[list[Write], list[Read]]) -> None:
    finding = check_unique(*history)
    if finding is None or not {each.seen for each in history[1]} <= {each.value for each in history[0]}:
        return
    writes = [each for each in finding.operations if isinstance(each, Write)]
    reads = [each for each in finding.operations if isinstance(each, Read)]
    assert not is_linearizable(writes, reads)
    for read in reads:
        assert is_linearizable(writes, [each for each in reads if each is not read]), "could be shorter"


@given(histories(unique=False))
def test_linearizable_means_not_stale(history: tuple[list[Write], list[Read]]) -> None:
    if ordered(*history) is None:
        assert set(staleness_of_ordered(*history, equal)) <= {0}


@given(histories(unique=True))
def test_linearizable_means_not_stale_with_racing_writers(history: tuple[list[Write], list[Read]]) -> None:
    if check_unique(*history) is None:
        assert set(staleness_of_unique(*history)) <= {0}
