"""Makes the guest's kernel forget names, without the lock of their directory: also while a change there waits for an answer.

The kernel offers notifications for that, and all of them take the lock. A look-up of a cached name does not. So a helper, a
process of our own, stats the name; the agent answers it, and nobody else, otherwise than the truth: its GETATTR gets ESTALE,
whereupon the kernel looks the name up again, and its LOOKUP gets ENOENT, whereupon the kernel takes the name out of its cache,
for everybody. Everybody else is answered truthfully, before and after, and keeps what is open.

When a name has been dropped, given that no reply is computed any more that grants it:

1. The helper has been told that the name is not there, or that the kernel does not have its directory. A first look-up by
   somebody else whose reply is still on its way is waited for by the kernel, and dropped then. A renewal that is still on its way
   renews what nobody finds any more.
2. Or the helper's LOOKUP has been answered, and it waits for the directory's lock, for another look-up: it only goes there when
   the first has taken effect.
3. Or the helper waits for the directory's lock before any LOOKUP, and one and the same request of this mount has been unanswered
   since before the job began for which the kernel holds that lock alone. Then the name was not cached, and nobody could be
   about to change that. Without such a request this proves nothing: look-ups share the lock, and who wants it alone makes later
   ones wait. If there is one now that was not there when the job began, another helper is sent.

A helper that waits for the lock goes on waiting as long as it must; it is left, and counted on when it has answered.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from coherency.fuse import syscalls
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.fuse.codec import Request
from coherency.guest_agent import keeper
from coherency.guest_agent.helper_processes import Connection, Helper, HelperProcesses
from coherency.ids import NodeId

log = logging.getLogger(__name__)

_PATIENCE_NS: Final = 200_000  # with nothing in its way a drop is over soon after
_FIRST_PAUSE_NS: Final = 100_000
_LAST_PAUSE_NS: Final = 10_000_000
_NEVER_NS: Final = 1 << 62

# Where a look-up sleeps that waits for its directory's lock; which of them depends on the kernel's version and compiler.
_WAITS_FOR_LOCK: Final = frozenset(
    (b"rwsem_down_read_slowpath", b"down_read", b"down_read_killable", b"lookup_slow", b"walk_component", b"path_lookupat")
)  # fmt: skip
_HOLDS_LOCK_ALONE: Final = frozenset(
    (
        Opcode.CREATE, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME,
        Opcode.RENAME2, Opcode.SETATTR, Opcode.SETXATTR, Opcode.REMOVEXATTR,
    )
)  # fmt: skip
_RENAMES: Final = (Opcode.RENAME, Opcode.RENAME2)


class Mounted(Connection, Protocol):
    """What the pool needs of a session."""

    def unanswered(self) -> Sequence[Request]:
        """The requests that have been read and whose replies are not being written yet."""


@dataclass(frozen=True)
class HelperPoolStatistics:
    dropped: int  # names
    failed: int  # names that were not dropped in time
    helpers: int
    left: int  # of these: they wait for a lock, and nobody for them
    keepers: int  # started so far


class _Name:
    """A name to be dropped."""

    __slots__ = ("dropped", "name", "parent")

    def __init__(self, parent: NodeId, name: bytes) -> None:
        self.parent, self.name = parent, name
        self.dropped = False


class _Job:
    """A helper's: to ask for a name."""

    __slots__ = ("holders", "lookups", "name", "number", "parent", "target")

    def __init__(self, target: _Name, number: int, holders: frozenset[int]) -> None:
        self.target, self.number = target, number
        self.parent, self.name = target.parent, target.name
        self.holders = holders  # requests that had the directory's lock alone before the helper was told
        self.lookups = 0  # of the name, by the helper, so far


def _busy(helpers: dict[int, Helper[_Job]]) -> list[tuple[Helper[_Job], _Job]]:
    return [(helper, helper.job) for helper in helpers.values() if helper.job is not None]


class HelperPool(HelperProcesses[_Job]):
    """The helpers of one mount, and what is dropped with them. ``start()`` makes it; thread-safe."""

    _session: Mounted

    def __init__(self, session: Mounted, mountpoint: str, size: int) -> None:
        """Use ``start`` instead."""
        super().__init__(session, mountpoint, size)
        self._next_number = iter(range(1, 1 << 63)).__next__
        self._dropped = self._failed = 0

    # ---- for who answers requests ----

    def lie(self, request: Request) -> int | None:
        """The errno with which a helper's request is to be answered; None: truthfully, like anybody's. Takes no lock.

        It depends on the job that the helper has: LOOKUP of the name gets ENOENT; GETATTR and STATX get ESTALE, unless they are
        about the name's directory or the root, which the kernel asks for on the way.
        """
        helper = self._by_pid.get(request.pid)
        job = helper.job if helper is not None else None
        if job is None:
            return None
        if request.opcode == Opcode.LOOKUP:
            if request.node == job.parent and request.body.name == job.name:
                job.lookups += 1
                return errno.ENOENT
        elif request.opcode in (Opcode.GETATTR, Opcode.STATX) and request.node not in (job.parent, ROOT_ID):
            return errno.ESTALE
        return None

    # ---- for who recalls ----

    def drop(self, names: Iterable[tuple[NodeId, bytes, NodeId]], deadline_s: float) -> bool:
        """Make the kernel forget names, each given as directory, name, and what it leads to; nobody may grant them meanwhile.

        True: none of them is cached any more; who looks one up makes the kernel ask. False: that is not sure after ``deadline_s``
        seconds, though it may happen yet. Nothing that is open or somebody's working directory is disturbed; what is mounted on
        a dropped name, or below, is unmounted, as it is whenever a name goes away.

        All names are worked on at the same time. Waits for helpers, whose requests must be answered meanwhile: not on a thread
        that they could need.
        """
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9)
        targets = [_Name(parent, name) for parent, name, _ in names]
        active: dict[int, Helper[_Job]] = {}  # by socket
        try:
            self._drop(deque(targets), active, deadline_ns)
        finally:
            for helper in active.values():
                self.leave(helper)
        dropped = sum(target.dropped for target in targets)
        with self._lock:
            self._dropped += dropped
            self._failed += len(targets) - dropped
        return dropped == len(targets)

    def _drop(self, pending: deque[_Name], active: dict[int, Helper[_Job]], deadline_ns: int) -> None:
        """Until all are dropped, one cannot be, or the deadline."""
        while pending or active:
            while pending:
                if pending[0].dropped:  # by the first of two helpers
                    pending.popleft()
                    continue
                helper = self.take(deadline_ns, wait=not active)
                if helper is None:
                    break
                if self._tell(helper, pending[0]):
                    pending.popleft()
                    active[helper.socket] = helper
            now_ns = time.monotonic_ns()
            if not active or now_ns >= deadline_ns:
                return
            look_at_ns = min(deadline_ns, *(helper.look_at_ns for helper in active.values()))
            for descriptor in syscalls.wait_readable(list(active), look_at_ns - now_ns):
                target, number = self._hear(active.pop(descriptor))
                if number is None:
                    pending.append(target)
                elif number:
                    log.debug("%r in node %d is not dropped: %s", target.name, target.parent, os.strerror(number))
                    return
                else:
                    target.dropped = True
            now_ns = time.monotonic_ns()
            for helper, job in _busy(active):
                if helper.look_at_ns <= now_ns and not job.target.dropped and self._look_at(helper, job, now_ns):
                    pending.append(job.target)
            for helper, job in _busy(active):
                if job.target.dropped:
                    self.leave(active.pop(helper.socket))

    def _tell(self, helper: Helper[_Job], target: _Name) -> bool:
        """Give it a job. False: it is dead."""
        job = helper.job = _Job(target, self._next_number(), self._holders(target.parent))
        helper.pause_ns = _FIRST_PAUSE_NS
        helper.look_at_ns = time.monotonic_ns() + _PATIENCE_NS
        try:
            os.write(helper.socket, keeper.job.pack(job.number, job.parent) + job.name)
        except OSError:
            helper.close()
            return False
        return True

    def _hear(self, helper: Helper[_Job]) -> tuple[_Name, int | None]:
        """Its answer; None: it has died, or been struck off meanwhile, and was told the truth."""
        assert helper.job is not None
        target, number = helper.job.target, helper.answer()
        if number is None or not self.is_helper(helper.pid):
            helper.close()
            return target, None
        self.give_back(helper)
        return target, number

    def _look_at(self, helper: Helper[_Job], job: _Job, now_ns: int) -> bool:
        """Find out whether the name has been dropped, though the helper has not answered. True: another one must be sent."""
        has_looked_up = job.lookups > 0  # seen before where it sleeps: that is no sleep before this look-up
        if self._words[keeper.FIRST_STAGE + helper.slot] == job.number and helper.sleeps_in() in _WAITS_FOR_LOCK:
            holders = self._holders(job.parent)
            if has_looked_up or holders & job.holders:
                job.target.dropped = True
                return False
            if holders:
                helper.look_at_ns = _NEVER_NS  # its answer will do, too
                return True
        helper.look_at_ns = now_ns + helper.pause_ns
        helper.pause_ns = min(2 * helper.pause_ns, _LAST_PAUSE_NS)
        return False

    def _holders(self, directory: NodeId) -> frozenset[int]:
        """The unanswered requests for which the kernel holds the lock of ``directory`` alone."""
        return frozenset(
            request.unique
            for request in self._session.unanswered()
            if request.opcode in _HOLDS_LOCK_ALONE
            and (request.node == directory or (request.opcode in _RENAMES and request.body.new_parent == directory))
        )

    # ---- inspection ----

    def statistics(self) -> HelperPoolStatistics:
        """A frozen copy of the counters."""
        processes = self.process_statistics()
        with self._lock:
            return HelperPoolStatistics(
                self._dropped, self._failed, processes.helpers, processes.left, processes.keepers
            )  # fmt: skip
