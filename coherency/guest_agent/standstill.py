"""Notices that this machine has stood still while its host went on.

When QEMU stops a virtual machine, its clock stands, and with it every lease: its kernel would go on to believe what it was granted,
though that is over for the daemon. But the heartbeat in the version table counts the host's time. More beats than the clock here
has room for say that it has stood; then everything that was granted is given up.

Rules:

1. A beat comes `HEARTBEAT_PERIOD_NS` after the one before, or later, never earlier.
2. Clock, heartbeat, clock: what lies between two looks at the heartbeat is at most from the clock before the first to the
   clock after the second.  So who is only slow, or was stopped alone, is never taken for a machine that was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from coherency.shm_table import HEARTBEAT_PERIOD_NS, HEARTBEAT_WORD, TableReader

TOLERANCE_NS: Final = 2 * HEARTBEAT_PERIOD_NS
"""The beat that was just due at the first look, and as much again for two clocks that do not go alike."""


class Standstill:
    """Of one connection, for one thread."""

    def __init__(self, reader: TableReader, clock_ns: Callable[[], int]) -> None:
        self._words, self._clock_ns = reader.words, clock_ns
        self._before_ns = clock_ns()
        self._beat: int = self._words[HEARTBEAT_WORD]

    def trouble(self) -> str | None:
        """Look, several times per second.  Returns why nothing that was granted may be believed, if that is so."""
        before_ns = self._clock_ns()
        beat = self._words[HEARTBEAT_WORD]
        after_ns = self._clock_ns()
        host_ns, here_ns = (beat - self._beat) * HEARTBEAT_PERIOD_NS, after_ns - self._before_ns
        self._beat, self._before_ns = beat, before_ns
        if host_ns - here_ns <= TOLERANCE_NS:
            return None
        return f"this machine has stood still for {(host_ns - here_ns) / 1e9:.1f} s"
