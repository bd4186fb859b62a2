"""Interleaved measuring: A B C, A B C, ... so that whatever disturbs the machine disturbs all alike.

1. A figure is the median over the rounds. Beside it stands the lowest, which is the least disturbed: on a machine with
   other work to do the two lie far apart, and only ratios mean anything.
2. A ratio is the median of the ratios within each round, not the ratio of two medians: a slow minute cancels out.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLOCK_NS = 5_000_000
"""How long one subject is measured in one round, roughly."""

_FEWEST_CALLS, _MOST_CALLS = 20, 100_000


def time_calls(function: Callable[[Any], object], argument: object, count: int) -> float:
    """Nanoseconds per call of ``function(argument)``, the loop included (some tens of them)."""
    arguments = itertools.repeat(argument, count)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start_ns = time.perf_counter_ns()
        for each in arguments:
            function(each)
        return (time.perf_counter_ns() - start_ns) / count
    finally:
        if collecting:
            gc.enable()


def calls_per_block(function: Callable[[Any], object], argument: object) -> int:
    """How many calls take about ``BLOCK_NS``. Calls it a few times: what it fetches once is fetched afterwards."""
    time_calls(function, argument, _FEWEST_CALLS)
    estimate_ns = time_calls(function, argument, _FEWEST_CALLS)
    return max(_FEWEST_CALLS, min(_MOST_CALLS, int(BLOCK_NS / estimate_ns)))


def interleave(subjects: Mapping[str, Callable[[int], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """One figure per subject and round. A subject gets the number of the round. Shows its progress."""
    figures: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        show_progress(f"{title}: round {number + 1} of {rounds}")
        for name, measure in subjects.items():
            figures[name].append(measure(number))
    return figures


def ratio(figures: Sequence[float], reference: Sequence[float]) -> float:
    """Rule 2."""
    return statistics.median(mine / theirs for mine, theirs in zip(figures, reference, strict=True))


def show_progress(text: str) -> None:
    """One line on standard error, the last one replaced if somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def end_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
