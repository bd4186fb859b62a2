"""``python -m tests.doomed POINT NUMBER serve|mount ...``: the program, killed by itself at a named point.

It dies of SIGKILL when it reaches the point for the given time:

* ``before`` and ``after``: an operation that changes something, at the moment it was asked for, and when it is done but
  not answered (of the agent with ``mount``, of the export with ``serve``);
* ``mounting`` and ``mounted``: something is mounted or unmounted, or has been;
* ``begun`` and ``applied``: see ``coherency.daemon.changes`` (``serve`` only).

With the point ``never`` it lives; but the clock by which the daemon holds changes stands still until SIGUSR1.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from unittest import mock

from coherency.cli import main
from coherency.daemon import service
from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.fuse import syscalls
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.session import Deferred, Operation, Reply
from coherency.guest_agent import mount
from coherency.guest_agent.filesystem import CachingFileSystem

CHANGING = (Opcode.CREATE, Opcode.WRITE, Opcode.RENAME, Opcode.RENAME2, Opcode.UNLINK, Opcode.SETATTR)


class StoppedClock:
    """Stands still until SIGUSR1."""

    def __init__(self) -> None:
        self._stands_at_ns: int | None = time.monotonic_ns()
        signal.signal(signal.SIGUSR1, self._start)

    def _start(self, *_: object) -> None:
        self._stands_at_ns = None

    def now_ns(self) -> int:
        return time.monotonic_ns() if self._stands_at_ns is None else self._stands_at_ns


class Doom:
    """Counts what comes by, and strikes at one of them."""

    def __init__(self, point: str, number: int) -> None:
        self.point, self.number = point, number
        self._count = itertools.count(1).__next__

    def reach(self, point: str) -> None:
        if point == self.point and self._count() == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, operation: Operation) -> Operation:
        def doomed(request: Request) -> Reply | Deferred:
            self.reach("before")
            reply = operation(request)
            self.reach("after")
            return reply

        return doomed

    def around_mounts(self, call: Callable[..., None]) -> Callable[..., None]:
        def doomed(*arguments: object) -> None:
            self.reach("mounting")
            call(*arguments)
            self.reach("mounted")

        return doomed

    def operations(self, all_of_them: Mapping[int, Operation]) -> Mapping[int, Operation]:
        return dict(all_of_them) | {int(opcode): self.around(all_of_them[int(opcode)]) for opcode in CHANGING}


def run(point: str, number: int, arguments: list[str]) -> None:
    doom = Doom(point, number)

    class DoomedExport(Export):
        @property
        def operations(self) -> Mapping[int, Operation]:
            return doom.operations(super().operations)

    class DoomedFileSystem(CachingFileSystem):
        @property
        def operations(self) -> Mapping[int, Operation]:
            return doom.operations(super().operations)

    clock_ns = StoppedClock().now_ns if point == "never" else time.monotonic_ns
    changes: Callable[..., Changes] = functools.partial(Changes, reach=doom.reach, clock_ns=clock_ns)
    with (
        mock.patch.object(syscalls, "mount", doom.around_mounts(syscalls.mount)),
        mock.patch.object(syscalls, "umount", doom.around_mounts(syscalls.umount)),
        mock.patch.object(service, "Changes", changes),
        mock.patch.object(service, "Export", DoomedExport),
        mock.patch.object(mount, "CachingFileSystem", DoomedFileSystem),
    ):
        main(arguments)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
