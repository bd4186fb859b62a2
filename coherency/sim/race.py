"""Calls on names that everybody changes at once, as operations on one object: all names of the group (see ``search``).

One thing is not held against anybody, since no file server can help it: the kernel of a guest that renames looks up one name and
then the other, and if both are the same file by then, because others have renamed it from the one to the other in between, it
takes that for a rename of a file to itself: it says that it is done, and does nothing (tests/t4_fuse/test_renames_of_kernels.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from coherency.sim.calls import CREATES, RENAMES
from coherency.sim.history import Call, look_of
from coherency.sim.names import Entry, agrees
from coherency.sim.search import Contradiction, Operation, State, check_search

Table: TypeAlias = tuple[Entry | None, ...]
_Effect: TypeAlias = Callable[[Table], Collection[Table]]


def check_race(calls: Sequence[tuple[int, Call]]) -> tuple[Contradiction, list[str]] | None:
    """Whether the calls on the names of one group, which was empty at first, have an order. ``calls``: with their tags.

    Returns what contradicts itself, and the names in the order in which its states have them. Raises ``search.TooMuch``.
    """
    names = sorted({path for _, call in calls for path in (call.step.path, *_second(call))})
    place = {path: number for number, path in enumerate(names)}
    renames = [call for _, call in calls if call.step.op in RENAMES and (not call.error or call.is_disturbed)]
    operations = [operation for tag, call in calls if (operation := _operation(call, tag, place, renames)) is not None]
    found = check_search(operations, (None,) * len(names))
    return None if found is None else (found, names)


def describe_state(state: State, names: Sequence[str]) -> str:
    """For the reader of a report."""
    assert isinstance(state, tuple)
    there = [f"{name} is {entry}" for name, entry in zip(names, state, strict=True) if entry is not None]
    return "; ".join(there) or "none of the names is there"


def _second(call: Call) -> tuple[str, ...]:
    return (call.step.other,) if call.step.op in RENAMES else ()


def _operation(call: Call, tag: int, place: dict[str, int], renames: Sequence[Call]) -> Operation | None:
    """None: it tells nothing."""
    if call.is_disturbed and not call.is_change:
        return None
    effect = _change(call, place, renames) if call.is_change else _look(call, place)
    changes = call.is_change and (not call.error or call.is_disturbed)
    return Operation(call.start_ns, call.end_ns, effect, changes, not call.is_disturbed, tag)


def _look(call: Call, place: dict[str, int]) -> _Effect:
    look, at = look_of(call), place[call.step.path]
    return lambda table: (table,) if agrees(look, table[at]) else ()


def _change(call: Call, place: dict[str, int], renames: Sequence[Call]) -> _Effect:
    """What it does if it succeeds, or may have done if it was disturbed; or what it tells by being refused."""
    step, at = call.step, place[call.step.path]
    to = place[step.other] if step.op in RENAMES else at
    if call.error and not call.is_disturbed:
        return _refused(call, at, to)
    if step.op in CREATES:
        return lambda table: (_put(table, {at: call.made}),) if table[at] is None else ()
    if step.op == "unlink":
        return lambda table: (_put(table, {at: None}),) if table[at] is not None else ()
    return _rename(step.op, at, to, _may_do_nothing(call, renames))


def _rename(op: str, at: int, to: int, may_do_nothing: bool) -> _Effect:
    def rename(table: Table) -> list[Table]:
        then = []
        possible = {"rename": True, "rename-noreplace": table[to] is None, "rename-exchange": table[to] is not None}[op]
        if table[at] is not None and possible:
            then.append(_put(table, {to: table[at], at: table[to] if op == "rename-exchange" else None}))
        if may_do_nothing and table[to] is not None and op != "rename-noreplace":
            then.append(table)
        return then

    return rename


def _may_do_nothing(call: Call, renames: Sequence[Call]) -> bool:
    """Whether others may, meanwhile, have renamed a file from its one name to its other; see the module."""
    meanwhile = [
        each for each in renames
        if each is not call and each.start_ns <= call.end_ns and (call.start_ns <= each.end_ns or each.is_disturbed)
    ]  # fmt: skip
    return any(call.step.path in _from(each) for each in meanwhile) and any(call.step.other in _to(each) for each in meanwhile)


def _from(call: Call) -> tuple[str, ...]:
    """The names that a rename takes something from."""
    return call.step[1:3] if call.step.op == "rename-exchange" else (call.step.path,)


def _to(call: Call) -> tuple[str, ...]:
    return call.step[1:3] if call.step.op == "rename-exchange" else (call.step.other,)


def _refused(call: Call, at: int, to: int) -> _Effect:
    if call.error == errno.EEXIST:
        return lambda table: (table,) if table[to] is not None else ()
    if call.step.op == "rename-exchange":
        return lambda table: (table,) if table[at] is None or table[to] is None else ()
    return lambda table: (table,) if table[at] is None else ()


def _put(table: Table, values: dict[int, Entry | None]) -> Table:
    return tuple(values.get(number, entry) for number, entry in enumerate(table))
