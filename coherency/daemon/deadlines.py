"""What is due when: at most one deadline per key, the earliest at hand.  Pure; the time is an argument."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, NamedTuple, TypeVar

from sortedcontainers import SortedSet

Key = TypeVar("Key", bound=Hashable)


class DeadlineStatistics(NamedTuple):
    """`pending`: deadlines that are set; `next_ns`: the earliest of them, None if there is none."""

    pending: int
    next_ns: int | None


class Deadlines(Generic[Key]):
    """Deadlines by key, each on the caller's clock in nanoseconds.  Keys must be orderable among each other.

    Setting, clearing and expiring cost O(log n), so that thousands of peers cost a loop nothing while none is due.
    """

    def __init__(self) -> None:
        self._at_ns: dict[Key, int] = {}
        self._order: Any = SortedSet()  # of (at_ns, key)

    def __contains__(self, key: Key) -> bool:
        return key in self._at_ns

    def __getitem__(self, key: Key) -> int:
        return self._at_ns[key]

    def __len__(self) -> int:
        return len(self._at_ns)

    @property
    def next_ns(self) -> int | None:
        """The earliest deadline."""
        return self._order[0][0] if self._order else None

    def set(self, key: Key, at_ns: int) -> None:
        """`key` is due at `at_ns`, whatever was set before."""
        self.clear(key)
        self._at_ns[key] = at_ns
        self._order.add((at_ns, key))

    def clear(self, key: Key) -> None:
        """`key` is not due; nor does it matter if it never was."""
        at_ns = self._at_ns.pop(key, None)
        if at_ns is not None:
            self._order.remove((at_ns, key))

    def pop_due(self, now_ns: int) -> Key | None:
        """Take out the earliest key whose deadline is not after `now_ns`; None if there is none.

        One at a time, since dealing with one may clear others.
        """
        if not self._order or self._order[0][0] > now_ns:
            return None
        _, key = self._order.pop(0)
        del self._at_ns[key]
        due: Key = key
        return due

    def check(self) -> None:
        """Assert that both views hold the same deadlines."""
        assert {(at_ns, key) for key, at_ns in self._at_ns.items()} == set(self._order), self

    def statistics(self) -> DeadlineStatistics:
        """A frozen copy."""
        return DeadlineStatistics(len(self._at_ns), self.next_ns)
