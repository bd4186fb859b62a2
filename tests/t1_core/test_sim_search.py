"""The search through racing histories: by hand, against all orders of small ones, and on the names of a race."""

import errno
import itertools
import stat
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coherency.sim.calls import Step
from coherency.sim.history import Call
from coherency.sim.names import Entry
from coherency.sim.race import check_race
from coherency.sim.search import Operation, check_search
from coherency.sim.verdict import Promise, judge

# --- a register with compare-and-set, whose values repeat ---


def write(start: int, end: int, value: int, *, certain: bool = True) -> Operation:
    return Operation(start, end, lambda _: (value,), True, certain)


def read(start: int, end: int, value: int) -> Operation:
    return Operation(start, end, lambda state: (state,) if state == value else (), False)


def swap(start: int, end: int, old: int, new: int, *, certain: bool = True) -> Operation:
    return Operation(start, end, lambda state: (new,) if state == old else (), True, certain)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [read(0, 1, 0)],
        [write(10, 20, 1), read(12, 15, 0), read(13, 16, 1), read(30, 31, 1)],
        # Two that race: either may be last, and all readers agree.
        [write(10, 50, 1), write(10, 50, 2), read(60, 61, 1), read(62, 63, 1)],
        # A value that comes back.
        [swap(0, 9, 0, 1), swap(0, 9, 1, 0), read(10, 11, 0), write(12, 13, 1), read(14, 15, 1)],
        # What may have happened did not, or did so later, or between two looks long after.
        [write(10, 20, 1, certain=False), read(30, 40, 0)],
        [write(10, 20, 1, certain=False), read(30, 40, 0), read(50, 60, 1), read(70, 80, 1)],
        [write(10, 20, 1), read(20, 30, 0)],
    ],
)
def test_right_histories_pass(history: list[Operation]) -> None:
    assert check_search(history, 0) is None


@pytest.mark.parametrize(
    ("history", "shortest"),
    [
        ([write(10, 20, 1), read(21, 22, 0)], 1),
        ([write(10, 50, 1), read(12, 15, 1), read(16, 18, 0)], 3),
        ([read(0, 9, 1), write(10, 20, 1)], 1),
        # Readers that do not agree on which was last.
        ([write(10, 50, 1), write(10, 50, 2), read(60, 61, 1), read(62, 63, 2)], 1),
        # Only one of two can have found 0.
        ([swap(0, 9, 0, 1), swap(0, 9, 0, 1)], 2),
        # What may have happened has, once it was seen.
        ([write(10, 20, 1, certain=False), read(30, 40, 1), read(50, 60, 0)], 1),
        # Nothing from before an instant at which nothing was under way: all that matters of it is the state.
        ([*(write(each, each + 1, each) for each in range(0, 100, 3)), read(200, 210, 98)], 1),
    ],
)
def test_wrong_histories_are_found_and_shortened(history: list[Operation], shortest: int) -> None:
    found = check_search(history, 0)
    assert found is not None
    assert len(found.operations) == shortest
    assert all(check_search(found.operations, state) is not None for state in found.states)


def exists_order(operations: Sequence[Operation], state: Any) -> bool:
    """By the definition."""
    unsure = [each for each in operations if not each.certain]
    sure = [each for each in operations if each.certain]
    choices = itertools.product([True, False], repeat=len(unsure))
    return any(_ordered([*sure, *itertools.compress(unsure, choice)], state) for choice in choices)


def _ordered(left: list[Operation], state: Any) -> bool:
    if not left:
        return True
    for each in left:
        if any(other.certain and other.end_ns < each.start_ns for other in left):
            continue
        rest = [other for other in left if other is not each]
        if any(_ordered(rest, then) for then in each.effect(state)):
            return True
    return False


def either(start: int, end: int, old: int, new: int) -> Operation:
    """Changes it, or not."""
    return Operation(start, end, lambda state: (new, state) if state == old else (), True)


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    start, length = draw(st.integers(0, 14)), draw(st.integers(0, 7))
    certain = draw(st.sampled_from([True, True, True, False]))
    values = st.integers(0, 2)
    match draw(st.sampled_from(["write", "read", "read", "swap", "either"])):
        case "write":
            return write(start, start + length, draw(values), certain=certain)
        case "read":
            return read(start, start + length, draw(values))
        case "either":
            return either(start, start + length, draw(values), draw(values))
        case _:
            return swap(start, start + length, draw(values), draw(values), certain=certain)


@settings(max_examples=1000)
@given(st.lists(operations(), max_size=7))
def test_search_agrees_with_all_orders(history: list[Operation]) -> None:
    found = check_search(history, 0)
    assert (found is None) == exists_order(history, 0)
    if found is not None:
        assert set(map(id, found.operations)) <= set(map(id, history))
        assert not any(exists_order(found.operations, state) for state in found.states)


def test_long_histories_with_much_that_nobody_knows() -> None:
    """Ten changes that may happen at any time cost configurations, not exponentially many of them."""
    unsure = [swap(0, 1, value, value + 1, certain=False) for value in range(10)]
    looks = [read(10 * each, 10 * each + 5, 0) for each in range(2000)]
    assert check_search([*unsure, *looks], 0) is None
    assert check_search([*unsure, *looks, read(30_000, 30_001, 7)], 0) is None
    assert check_search([*unsure, *looks, read(30_000, 30_001, 7), read(30_002, 30_003, 6)], 0) is not None


# --- names ---


A, B = "d0/r0.0.a", "d1/r0.0.b"
FILE = Entry(stat.S_IFREG | 0o640, 7)
LINK = Entry(stat.S_IFLNK | 0o777, None, "there")


def call(start: int, end: int, op: str, path: str = A, other: str = "", **rest: Any) -> Call:
    return Call(0, 0, start, end, Step(op, path, other), **({"error": 0} | rest))


def wrong(*calls: Call) -> bool:
    return check_race(list(enumerate(calls))) is not None


MADE = call(0, 1, "create", made=FILE)
LINKED = call(0, 1, "symlink", B, "there", made=LINK)


@pytest.mark.parametrize(
    "calls",
    [
        [MADE, call(2, 3, "lstat", result=[7, FILE.mode]), call(4, 5, "unlink"), call(6, 7, "exists", error=errno.ENOENT)],
        [MADE, call(2, 3, "create", error=errno.EEXIST), call(4, 5, "rename", A, B), call(6, 7, "stat", B, result=[7, FILE.mode])],
        [MADE, LINKED, call(2, 3, "rename-exchange", A, B), call(4, 5, "readlink", A, result="there")],
        [MADE, LINKED, call(2, 3, "rename-noreplace", A, B, error=errno.EEXIST)],
        # A rename takes what is there: here the file, which the exchange has put in the place of the link.
        [MADE, LINKED, call(2, 9, "rename-exchange", A, B), call(2, 9, "rename", B, A), call(10, 11, "lstat", A, result=[7, FILE.mode])],
        # Two that remove, of which one is late.
        [MADE, call(2, 9, "unlink"), call(2, 9, "unlink", error=errno.ENOENT)],
        # A kernel that finds, one after the other, the same file under both names does nothing.
        [MADE, call(2, 9, "rename", A, B), call(2, 9, "rename", A, B), call(10, 11, "lstat", B, result=[7, FILE.mode])],
        [MADE, LINKED, call(2, 9, "rename-exchange", A, B), call(2, 9, "rename", B, A), call(10, 11, "readlink", A, result="there")],
        # What was disturbed may have happened.
        [MADE, call(2, 3, "unlink", error=errno.EIO), call(4, 5, "lstat", error=errno.ENOENT)],
        [MADE, call(2, 3, "unlink", error=errno.EIO), call(4, 5, "lstat", result=[7, FILE.mode])],
        [MADE, call(2, 3, "lstat", error=errno.EIO)],
    ],
)  # fmt: skip
def test_right_races_pass(calls: list[Call]) -> None:
    assert not wrong(*calls)


@pytest.mark.parametrize(
    "calls",
    [
        # The name is shown that is gone; the one is not shown that is there.
        [MADE, call(2, 3, "unlink"), call(4, 5, "lstat", result=[7, FILE.mode])],
        [MADE, call(2, 3, "lstat", error=errno.ENOENT)],
        # Both, or neither, of the names of a rename.
        [MADE, call(2, 3, "rename", A, B), call(4, 5, "exists", A, result=True)],
        [MADE, call(2, 9, "rename", A, B), call(3, 4, "lstat", B, result=[7, FILE.mode]), call(5, 6, "lstat", A, result=[7, FILE.mode])],
        [MADE, call(2, 9, "rename", A, B), call(3, 4, "lstat", A, error=errno.ENOENT), call(5, 6, "lstat", B, error=errno.ENOENT)],
        # Nobody renamed anything at that time: it must have been done.
        [MADE, LINKED, *(call(each, each + 1, "rename-exchange", A, B) for each in (2, 4)), call(6, 7, "readlink", A, result="there")],
        # Twice removed, twice made, replaced though it should not be.
        [MADE, call(2, 9, "unlink"), call(2, 9, "unlink")],
        [MADE, call(2, 3, "create", made=FILE)],
        [MADE, LINKED, call(2, 3, "rename-noreplace", A, B)],
        # New, and then old.
        [MADE, call(2, 9, "unlink"), call(3, 4, "exists", error=errno.ENOENT), call(5, 6, "exists", result=True)],
        # The link is gone: the exchange found both names, so the rename came after it, and was not looking meanwhile.
        [MADE, LINKED, call(2, 9, "rename-exchange", A, B), call(10, 11, "rename", B, A), call(12, 13, "readlink", A, result="there")],
        # Exchanged for one, and not for the other.
        [MADE, LINKED, call(2, 3, "rename-exchange", A, B), call(4, 5, "readlink", B, result="there")],
        # A refusal that nothing explains.
        [MADE, call(2, 3, "unlink", error=errno.ENOENT)],
        [MADE, call(2, 3, "rename-noreplace", A, B, error=errno.EEXIST)],
        [MADE, LINKED, call(2, 3, "rename-exchange", A, B, error=errno.ENOENT)],
    ],
)  # fmt: skip
def test_control_wrong_races_are_found(calls: list[Call]) -> None:
    assert wrong(*calls)


def test_verdict_shows_the_calls_and_what_was_there_before() -> None:
    calls = [MADE, call(2, 3, "lstat", result=[7, FILE.mode]), call(4, 9, "unlink"), call(10, 11, "exists", result=True)]
    (violation,) = judge(calls, {}, (), Promise.LINEARIZABLE).violations
    assert violation.where == "race r0.0"
    assert violation.calls == (calls[2], calls[3]), "what was there last, and what contradicts it"
    assert "none of the names is there" in violation.reason
    assert judge(calls, {}, (), Promise.BOUNDED).violations == ()
