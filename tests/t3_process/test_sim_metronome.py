"""How late the machine was is noted, with the time at which it was."""

import threading
import time
from pathlib import Path
from typing import Any

from coherency.sim.metronome import Metronome
from tests.waiting import until

LATE_NS = 50_000_000


class SlowFile:
    """A file that takes its time to be changed."""

    def touch(self) -> None: ...

    def chmod(self, _mode: int) -> None:
        time.sleep(LATE_NS / 1e9)


def test_a_slow_disk_is_noted() -> None:
    slow: Any = SlowFile()
    start_ns = time.monotonic_ns()
    with Metronome(slow) as metronome:
        until(lambda: len(metronome.delays) > 2)
    for delay in metronome.delays:
        assert delay.late_ns >= LATE_NS
        assert start_ns <= delay.start_ns < delay.end_ns <= time.monotonic_ns()
    starts = [delay.start_ns for delay in metronome.delays]
    assert starts == sorted(starts)


def test_it_ends_with_its_block(tmp_path: Path) -> None:
    with Metronome(tmp_path / "file"):
        until((tmp_path / "file").exists)
    assert all(thread.name != "metronome" for thread in threading.enumerate())
