"""Which inodes were ever shown: an exact set, and who is overtaken by another's mark."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coherency.daemon import shown as module
from coherency.daemon.shown import Shown
from coherency.ids import HostInode

NUMBERS = st.one_of(st.integers(0, 600), st.integers(0, 2**64 - 1)).map(HostInode)


@given(st.lists(NUMBERS), st.lists(NUMBERS))
def test_it_is_exact(marked: list[HostInode], others: list[HostInode]) -> None:
    shown = Shown()
    for ino in marked:
        shown.mark(ino)
        shown.check()
    assert all(ino in shown for ino in marked)
    assert {ino for ino in others if ino in shown} == set(others) & set(marked)
    assert shown.marks == len(set(marked))


def test_beyond_its_bound_everything_counts_as_shown() -> None:
    shown = Shown(max_blocks=2)
    for ino in (1, 2, 1 << 20):
        shown.mark(HostInode(ino))
    assert HostInode(3) not in shown
    shown.mark(HostInode(1 << 30))
    assert HostInode(3) in shown
    shown.check()


def test_who_marks_it_first_was_not_shown_it() -> None:
    shown = Shown()
    assert not shown.was_shown(HostInode(5), shown.marks)
    assert shown.was_shown(HostInode(5), shown.marks)
    assert shown.marks == 1


@pytest.mark.parametrize("between", [0, 1, module._RECENT - 1, module._RECENT, module._RECENT + 1])
def test_who_is_overtaken_by_another_s_mark_was_not_shown_it(between: int) -> None:
    shown = Shown()
    shown.mark(HostInode(5))
    began = shown.marks
    shown.mark(HostInode(6))
    for number in range(between):
        shown.mark(HostInode(1000 + number))
    assert not shown.was_shown(HostInode(6), began)
    assert shown.was_shown(HostInode(5), began) == (between < module._RECENT), "and it was, if that can still be known"
    assert shown.was_shown(HostInode(6), shown.marks)


@pytest.mark.parametrize("ino", [HostInode(5), HostInode(1 << 20)], ids=["a number", "everything"])
def test_a_number_that_is_being_marked_is_not_marked_yet(ino: HostInode) -> None:
    """Who begins at any step of another's marking, when it cannot be found yet, was not shown it before."""
    shown = Shown(max_blocks=1)
    began: list[tuple[bool, int]] = []
    shown.mark(HostInode(1))

    def at_each_line(frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        if frame.f_code is not Shown.was_shown.__code__:
            return None
        began.append((ino in shown, shown.marks))
        return at_each_line

    before = sys.gettrace()
    sys.settrace(at_each_line)
    try:
        shown.mark(ino)
    finally:
        sys.settrace(before)
    assert len(began) > 5
    assert {shown.was_shown(ino, since) for found, since in began if not found} == {False}
    assert shown.was_shown(ino, shown.marks)


def test_when_everything_begins_to_count_who_is_under_way_was_overtaken() -> None:
    shown = Shown(max_blocks=1)
    shown.mark(HostInode(1))
    began = shown.marks
    shown.mark(HostInode(1 << 20))
    assert not shown.was_shown(HostInode(1 << 30), began)
    assert shown.was_shown(HostInode(1 << 30), shown.marks)
