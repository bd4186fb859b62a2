"""Waiting for what another thread or process does: until it is so, never for a time."""

import time
from collections.abc import Callable

POLL_S = 0.002
DEADLINE_S = 20.0


def until(condition: Callable[[], object], *, deadline_s: float = DEADLINE_S) -> None:
    """Return as soon as `condition()` is true; fail after the deadline, which is for broken code only."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"still not so after {deadline_s} s"
        time.sleep(POLL_S)
