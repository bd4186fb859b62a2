"""How late the machine itself was: what a call is not to be blamed for.

A thread sleeps for a short time, changes a file beside the share, and notes how much longer that took than it should. On a
machine that is busy with other things, or whose disk is, everything takes longer by about so much.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final, Self

from coherency.sim.waits import Delay

_PERIOD_NS: Final = 10_000_000
_WORTH_NOTING_NS: Final = 2_000_000


class Metronome:
    """A context manager. ``delays``: what was noted so far, in order."""

    def __init__(self, file: Path) -> None:
        """``file``: on the same file system as the share, and nobody else's."""
        self._file = file
        self.delays: list[Delay] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metronome", daemon=True)

    def __enter__(self) -> Self:
        self._file.touch()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        mode = 0o600
        while not self._stopping.is_set():
            start_ns = time.monotonic_ns()
            time.sleep(_PERIOD_NS / 1e9)
            mode ^= 0o100
            self._file.chmod(mode)
            end_ns = time.monotonic_ns()
            late_ns = end_ns - start_ns - _PERIOD_NS
            if late_ns > _WORTH_NOTING_NS:
                self.delays.append(Delay(start_ns, end_ns, late_ns))
