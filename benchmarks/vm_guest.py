"""What ``vm`` has measured inside a guest: the clock, too, is the guest's."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/run"}
_PROGRAM_TIMEOUT_S = 100


def stat_us(path: str, calls: int) -> float:
    """Microseconds per ``stat`` of one file. Some calls before are not counted: they renew what has run out meanwhile."""
    stat = os.stat
    for _ in range(calls // 10):
        stat(path)
    start_ns = time.perf_counter_ns()
    for _ in range(calls):
        stat(path)
    return (time.perf_counter_ns() - start_ns) / 1000 / calls


def read_us(paths: Sequence[str]) -> float:
    """Microseconds per file for ``open``, ``read`` of all of it, ``close``."""
    start_ns = time.perf_counter_ns()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while os.read(fd, 1 << 16):
            pass
        os.close(fd)
    return (time.perf_counter_ns() - start_ns) / 1000 / len(paths)


def program_us(arguments: Sequence[str], directory: str) -> float:
    """Microseconds that a program takes, its start included."""
    start_ns = time.perf_counter_ns()
    subprocess.run(
        arguments, cwd=directory, env=os.environ | _ENVIRONMENT, check=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=_PROGRAM_TIMEOUT_S,
    )  # fmt: skip
    return (time.perf_counter_ns() - start_ns) / 1000


def mtime_ns(path: str) -> int:
    """The modification time."""
    return os.stat(path).st_mtime_ns


def set_mtime_ns(path: str, value: int) -> None:
    """Give it another one."""
    os.utime(path, ns=(value, value))
