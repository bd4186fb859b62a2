"""Calls on names that everybody changes at once, as operations on one object: all names of the group (see ``search``)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TypeAlias

from coherency.sim.calls import CREATES, RENAMES
from coherency.sim.history import Call, look_of
from coherency.sim.names import Entry, agrees
from coherency.sim.search import Contradiction, Operation, State, check_search

Table: TypeAlias = tuple[Entry | None, ...]
_Effect: TypeAlias = Callable[[Table], Table | None]


def check_race(calls: Sequence[tuple[int, Call]]) -> tuple[Contradiction, list[str]] | None:
    """Whether the calls on the names of one group, which was empty at first, have an order. ``calls``: with their tags.

    Returns what contradicts itself, and the names in the order in which its states have them. Raises ``search.TooMuch``.
    """
    names = sorted({path for _, call in calls for path in (call.step.path, *_second(call))})
    place = {path: number for number, path in enumerate(names)}
    operations = [operation for tag, call in calls if (operation := _operation(call, tag, place)) is not None]
    found = check_search(operations, (None,) * len(names))
    return None if found is None else (found, names)


def describe_state(state: State, names: Sequence[str]) -> str:
    """For the reader of a report."""
    assert isinstance(state, tuple)
    there = [f"{name} is {entry}" for name, entry in zip(names, state, strict=True) if entry is not None]
    return "; ".join(there) or "none of the names is there"


def _second(call: Call) -> tuple[str, ...]:
    return (call.step.other,) if call.step.op in RENAMES else ()


def _operation(call: Call, tag: int, place: dict[str, int]) -> Operation | None:
    """None: it tells nothing."""
    if call.is_disturbed and not call.is_change:
        return None
    effect = _look(call, place) if not call.is_change else _change(call, place)
    changes = call.is_change and (not call.error or call.is_disturbed)
    return Operation(call.start_ns, call.end_ns, effect, changes, not call.is_disturbed, tag)


def _look(call: Call, place: dict[str, int]) -> _Effect:
    look, at = look_of(call), place[call.step.path]
    return lambda table: table if agrees(look, table[at]) else None


def _change(call: Call, place: dict[str, int]) -> _Effect:
    """What it does if it succeeds, or may have done if it was disturbed; or what it tells by being refused."""
    step, at = call.step, place[call.step.path]
    to = place[step.other] if step.op in RENAMES else at
    if call.error and not call.is_disturbed:
        return _refused(call, at, to)
    if step.op in CREATES:
        return lambda table: _put(table, {at: call.made}) if table[at] is None else None
    if step.op == "unlink":
        return lambda table: _put(table, {at: None}) if table[at] is not None else None

    def rename(table: Table) -> Table | None:
        if table[at] is None or (table[to] is None and step.op == "rename-exchange"):
            return None
        if table[to] is not None and step.op == "rename-noreplace":
            return None
        return _put(table, {to: table[at], at: table[to] if step.op == "rename-exchange" else None})

    return rename


def _refused(call: Call, at: int, to: int) -> _Effect:
    if call.error == errno.EEXIST:
        return lambda table: table if table[to] is not None else None
    if call.step.op == "rename-exchange":
        return lambda table: table if table[at] is None or table[to] is None else None
    return lambda table: table if table[at] is None else None


def _put(table: Table, values: dict[int, Entry | None]) -> Table:
    return tuple(values.get(number, entry) for number, entry in enumerate(table))
