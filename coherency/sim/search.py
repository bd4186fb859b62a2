"""Was a history of a small object right, if its operations race and its values repeat? By search, and still exact.

The registers that ``checker`` deals with need no search. Names that several workers create, move and remove at once are
no such registers: a rename takes whatever is there. They are checked together, as one object whose *state* is small.

An operation is a function from a state to those that may follow it: none, if it cannot have met that one. It took
effect at one instant between its start and its end. One that is not certain may take effect at any time after its
start, or never.

The search (after Lowe, "Testing for linearizability", 2017) goes through the starts and ends in their order and keeps all
*configurations* in which the object may be: its state, and which of the operations under way have taken effect. When an
operation ends it has taken effect, so configurations in which it has not are replaced by those that follow from them
by letting operations under way take effect until it has; a history is wrong iff none is left. An operation that changes
nothing takes effect as soon as it can: that never forbids anything. So the number of configurations is bounded by
the states and by the *changes* that are under way at once, not by the length of the history.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

State: TypeAlias = Hashable
MAX_CONFIGURATIONS: Final = 100_000


class Operation(NamedTuple):
    """``effect(state)``: the states that may be after it; none: it cannot have met that one."""

    start_ns: int
    end_ns: int
    effect: Callable[[Any], Collection[State]]
    changes: bool  # False: the state after it is the same
    certain: bool = True
    tag: int = -1


class Contradiction(NamedTuple):
    """``operations`` cannot have been, if the object was in one of ``states`` before them."""

    states: tuple[State, ...]
    operations: tuple[Operation, ...]


class TooMuch(Exception):
    """The search was given up: more than MAX_CONFIGURATIONS at once. The history was neither right nor wrong."""


_Configuration: TypeAlias = tuple[State, frozenset[int]]  # and the numbers of those that have taken effect


def check_search(operations: Sequence[Operation], initial: State) -> Contradiction | None:
    """Whether the history was linearizable. Raises :class:`TooMuch`."""
    found = _search(operations, {(initial, frozenset())})
    if found is None:
        return None
    states, first, last = found
    # What began before the last instant at which nothing was under way has had its effect on the states.
    end_ns = operations[last].end_ns
    kept = [
        number for number, each in enumerate(operations)
        if each.start_ns <= end_ns and (number in first.under_way or each.start_ns >= first.start_ns)
    ]  # fmt: skip
    for needless in [number for number in kept if number != last and not operations[number].changes]:
        fewer = [operations[number] for number in kept if number != needless]
        if _search(fewer, {(state, frozenset()) for state in states}):
            kept.remove(needless)
    return Contradiction(tuple(states), tuple(sorted((operations[each] for each in kept), key=lambda each: each.start_ns)))


class _Pause(NamedTuple):
    """An instant at which nothing certain was under way, before ``start_ns``. ``under_way``: what was not certain."""

    start_ns: int
    under_way: frozenset[int]


def _search(
    operations: Sequence[Operation], configurations: set[_Configuration]
) -> tuple[set[State], _Pause, int] | None:
    """The states at the last pause before the contradiction, that pause, and the operation that cannot have ended."""
    events = sorted(_events(operations))
    under_way: set[int] = set()
    unsure: set[int] = set()
    pause = _Pause(-(1 << 63), frozenset())
    states = {state for state, _ in configurations}
    for time_ns, is_end, number in events:
        if not is_end:
            if not under_way and all(not done for _, done in configurations):
                pause, states = _Pause(time_ns, frozenset(unsure)), {state for state, _ in configurations}
            (under_way if operations[number].certain else unsure).add(number)
            continue
        configurations = _ended(operations, number, configurations, under_way | unsure)
        under_way.remove(number)
        if not configurations:
            return states, pause, number
        if len(configurations) > MAX_CONFIGURATIONS:
            raise TooMuch
        settled = unsure.intersection(*(done for _, done in configurations))
        if settled:
            unsure -= settled
            configurations = {(state, done - settled) for state, done in configurations}
    return None


def _events(operations: Sequence[Operation]) -> Iterable[tuple[int, bool, int]]:
    """Where one ends and another starts at the same instant, they overlap."""
    for number, each in enumerate(operations):
        yield each.start_ns, False, number
        if each.certain:
            yield each.end_ns, True, number


def _ended(
    operations: Sequence[Operation], number: int, configurations: set[_Configuration], under_way: set[int]
) -> set[_Configuration]:
    """Those in which operation ``number`` has taken effect, and need not be remembered any more."""
    looks = [each for each in under_way if not operations[each].changes]
    changes = [each for each in under_way if operations[each].changes]
    ended: set[_Configuration] = set()
    seen: set[_Configuration] = set()
    waiting = [_with_looks(operations, each, looks) for each in configurations]
    while waiting:
        configuration = waiting.pop()
        if configuration in seen:
            continue
        seen.add(configuration)
        state, done = configuration
        if number in done:
            ended.add((state, done - {number}))
            continue
        for each in changes:
            if each not in done:
                then = operations[each].effect(state)
                waiting += [_with_looks(operations, (after, done | {each}), looks) for after in then]
    return ended


def _with_looks(operations: Sequence[Operation], configuration: _Configuration, looks: list[int]) -> _Configuration:
    state, done = configuration
    more = [each for each in looks if each not in done and operations[each].effect(state)]
    return state, done.union(more) if more else done
