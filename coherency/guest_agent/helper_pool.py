"""Makes the guest's kernel forget names, without the lock of their directory: also while a change there waits for an answer.

The kernel offers notifications for that, and all of them take the lock. A lookup does not, as long as the name is cached. So a
helper, a process of our own, stats the name; the agent, and here only, answers it otherwise than the rest of the world: its
GETATTR gets ESTALE, whereupon the kernel looks the name up again, and its LOOKUP gets ENOENT, whereupon the kernel takes the
name out of its cache, for everybody. Everybody else is answered truthfully, before and after, and keeps what is open.

When a name (P, n) has been dropped, given that no reply is computed any more that grants it:

1. The helper has been told that n is not there, or that the kernel does not have P. A first look-up of n by somebody else, whose
   reply is still on its way, is waited for by the kernel, and dropped then. A renewal on its way renews what nobody finds any more.
2. Or its LOOKUP has been answered, and it waits for P's lock: for a second look-up, which only follows the first's taking effect.
3. Or it waits for P's lock before it has asked anything, and one and the same request of this mount that holds the lock alone has
   been unanswered since before the job began. Then nothing was cached, and nobody could be about to change that. (Without
   such a request this proves nothing: look-ups share the lock, and who wants it alone makes later ones wait. If there is one
   now that was not there when the job began, another helper is sent.)

A helper that waits for P's lock goes on waiting as long as it must; it is not counted on until it has answered.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from coherency.errors import MountError
from coherency.fuse import syscalls
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.fuse.codec import Request
from coherency.guest_agent import keeper
from coherency.ids import NodeId
from coherency.protocol import Goodbye, encode

log = logging.getLogger(__name__)

DEFAULT_SIZE: Final = 4
_START_TIMEOUT_S: Final = 10.0
_END_TIMEOUT_S: Final = 5.0
_FIRST_RESTART_S: Final = 0.05
_LAST_RESTART_S: Final = 5.0
_PATIENCE_NS: Final = 200_000  # a drop that finds nothing in its way is over by then
_FIRST_PAUSE_NS: Final = 100_000
_LAST_PAUSE_NS: Final = 10_000_000
_NEVER_NS: Final = 1 << 60
_PACKAGE_ROOT: Final = str(Path(__file__).resolve().parents[2])
_PROGRAM: Final = (
    f"import sys; sys.path.insert(0, {_PACKAGE_ROOT!r}); from coherency.guest_agent.keeper import main; main()"
)

# Where a look-up sleeps that waits for its directory's lock, by kernel version and compiler.
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


class Mounted(Protocol):
    """What the pool needs of a session."""

    @property
    def mountpoint(self) -> str: ...
    @property
    def connection(self) -> int: ...
    def duplicate_device(self) -> int:
        """A new descriptor of the connection, the caller's to close."""

    def unanswered(self) -> Sequence[Request]:
        """The requests whose operations run now: read, and no reply written."""


@dataclass(frozen=True)
class HelperPoolStatistics:
    drops: int  # names dropped
    failures: int  # names that were not dropped in time
    helpers: int
    waiting: int  # helpers that wait for a lock after their drop was over
    keepers: int  # started so far


class _Name:
    """A name to be dropped."""

    __slots__ = ("done", "name", "parent")

    def __init__(self, parent: NodeId, name: bytes) -> None:
        self.parent, self.name = parent, name
        self.done = False


class _Job:
    """The name that a helper asks for."""

    __slots__ = ("holders", "lookups", "name", "number", "parent", "target")

    def __init__(self, target: _Name, number: int, holders: frozenset[int]) -> None:
        self.target, self.number = target, number
        self.parent, self.name = target.parent, target.name
        self.holders = holders  # requests that had the directory's lock alone before the helper was told
        self.lookups = 0  # of the name, by the helper, so far


class _Helper:
    """A helper process, used by one thread at a time: who takes it out of the pool, or the pool's own."""

    __slots__ = ("job", "look_at_ns", "pause_ns", "pid", "slot", "socket", "wchan")

    def __init__(self, pid: int, slot: int, descriptor: int) -> None:
        self.pid, self.slot, self.socket = pid, slot, descriptor
        self.wchan = -1
        with contextlib.suppress(OSError):  # then it cannot be seen waiting for a lock
            self.wchan = os.open(f"/proc/{pid}/wchan", os.O_RDONLY | os.O_CLOEXEC)
        self.job: _Job | None = None
        self.look_at_ns = self.pause_ns = 0

    def sleeps_in(self) -> bytes:
        try:
            return os.pread(self.wchan, 64, 0)
        except OSError:
            return b""

    def close(self) -> None:
        os.close(self.socket)
        if self.wchan >= 0:
            os.close(self.wchan)


class HelperPool:
    """The helpers of one mount, and their keeper. ``start()`` makes it; thread-safe."""

    def __init__(self, session: Mounted, mountpoint: str, size: int) -> None:
        """Use ``start`` instead."""
        self._session, self._mountpoint, self._size = session, mountpoint, size
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # of what is idle
        self._by_pid: dict[int, _Helper] = {}
        self._idle: deque[_Helper] = deque()
        self._left: dict[int, _Helper] = {}  # by socket: still busy when their drop was over
        self._free_slots = list(range(keeper.MAX_HELPERS))
        self._starting = 0
        self._next_number = iter(range(1, 1 << 63)).__next__
        self._drops = self._failures = self._keepers = 0
        self._channel = -1
        self._closing = False
        self._page_fd = os.memfd_create("helpers", os.MFD_CLOEXEC)
        os.ftruncate(self._page_fd, keeper.PAGE_BYTES)
        self._words = keeper.Page(self._page_fd).words
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._orders: socket.socket | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="helpers", daemon=True)

    @classmethod
    def start(cls, session: Mounted, mountpoint: str, *, size: int = DEFAULT_SIZE) -> HelperPool:
        """Start the keeper and ``size`` helpers for the mount of ``session``, which answers already.

        Returns when the first of them is ready. Raises :class:`MountError` if they cannot be started.
        """
        pool = cls(session, mountpoint, size)
        try:
            pool._start_keeper()
            pool._thread.start()
            with pool._changed:
                pool._changed.wait_for(lambda: pool._idle, _START_TIMEOUT_S)
                if not pool._idle:
                    raise MountError(f"no helper process for {mountpoint} has started within {_START_TIMEOUT_S:.0f} s")
        except OSError as error:
            pool.close()
            raise MountError(f"the keeper of {mountpoint} cannot be started: {error.strerror}") from error
        except BaseException:
            pool.close()
            raise
        return pool

    def close(self) -> None:
        """End keeper and helpers; nothing is done to the mount. Drops under way fail. Safe to call twice."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join()
        if self._orders is not None:
            with contextlib.suppress(OSError):
                keeper.send(self._orders, keeper.END)
        self._end_keeper()
        with self._lock:
            for helper in [*self._idle, *self._left.values()]:
                helper.close()
            self._idle.clear()
            self._left.clear()
            self._by_pid = {}
        os.close(self._page_fd)
        os.close(self._wakeup)
        if self._channel >= 0:
            os.close(self._channel)

    # ---- for who answers requests ----

    def is_helper(self, pid: int) -> bool:
        """Whether a request with this ``pid`` is a helper's."""
        return pid in self._by_pid

    def lie(self, request: Request) -> int | None:
        """The errno with which a helper's request is to be answered; None: truthfully, as everybody's.

        Quick, and takes no lock. What it answers is for the job that the helper has, and changes nothing for others: LOOKUP of
        the job's name gets ENOENT; GETATTR and STATX get ESTALE, unless they are about the directory or the root, which are
        asked for on the way to the name.
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
        """Make the kernel forget names: (directory, name, what it leads to), all at the same time; nothing is granted for them meanwhile.

        True: none of them is cached any more, whoever looks one up asks. False: that could not be made sure of within
        ``deadline_s`` seconds, though it may happen yet. What is open, and who works in a dropped directory, is not disturbed;
        what is mounted on a dropped name or below is unmounted, as it is whenever a name goes away.
        Waits for helpers, who wait for answers to their requests: not on the only thread that answers.
        """
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9)
        targets = [_Name(parent, name) for parent, name, _ in names]
        pending = deque(targets)
        active: dict[int, _Helper] = {}  # by socket
        try:
            dropped = self._drop(pending, active, deadline_ns)
        finally:
            for helper in active.values():
                self._leave(helper)
        with self._lock:
            self._drops += sum(target.done for target in targets)
            self._failures += sum(not target.done for target in targets)
        return dropped

    def _drop(self, pending: deque[_Name], active: dict[int, _Helper], deadline_ns: int) -> bool:
        while True:
            while pending:
                helper = self._take(deadline_ns, wait=not active)
                if helper is None:
                    break
                if self._tell(helper, pending[0]):
                    pending.popleft()
                    active[helper.socket] = helper
            if not active:
                return not pending
            now_ns = time.monotonic_ns()
            if now_ns >= deadline_ns:
                return False
            look_at_ns = min(deadline_ns, *(helper.look_at_ns for helper in active.values()))
            for descriptor in syscalls.wait_readable(list(active), look_at_ns - now_ns):
                target, number = self._hear(active.pop(descriptor))
                if number is None:
                    pending.append(target)
                elif number:
                    log.debug("%r in node %d is not dropped: %s", target.name, target.parent, os.strerror(number))
                    return False
                target.done = target.done or number == 0
            now_ns = time.monotonic_ns()
            for helper in list(active.values()):
                assert helper.job is not None
                if helper.look_at_ns <= now_ns and not helper.job.target.done and self._look_at(helper, now_ns):
                    pending.append(helper.job.target)
            for helper in [each for each in active.values() if each.job is not None and each.job.target.done]:
                self._leave(active.pop(helper.socket))

    def _take(self, deadline_ns: int, *, wait: bool) -> _Helper | None:
        with self._changed:
            while not self._closing:
                if self._idle:
                    return self._idle.pop()
                if not self._starting:
                    self._order_helper()
                remaining_ns = deadline_ns - time.monotonic_ns()
                if not wait or remaining_ns <= 0:
                    break
                self._changed.wait(remaining_ns / 1e9)
            return None

    def _tell(self, helper: _Helper, target: _Name) -> bool:
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

    def _hear(self, helper: _Helper) -> tuple[_Name, int | None]:
        """Its answer; None: it has died."""
        assert helper.job is not None
        target = helper.job.target
        number = _read_answer(helper.socket)
        if number is None:
            helper.close()
        else:
            self._give_back(helper)
        return target, number

    def _look_at(self, helper: _Helper, now_ns: int) -> bool:
        """Find out whether the name is dropped though the helper has not answered. True: another helper must be sent."""
        job = helper.job
        assert job is not None
        has_looked_up = job.lookups > 0  # before looking where it sleeps: then that is not this look-up
        if self._words[keeper.FIRST_STAGE + helper.slot] == job.number and helper.sleeps_in() in _WAITS_FOR_LOCK:
            holders = self._holders(job.parent)
            if has_looked_up or holders & job.holders:
                job.target.done = True
                return False
            if holders:
                helper.look_at_ns = _NEVER_NS
                return True
        helper.look_at_ns = now_ns + helper.pause_ns
        helper.pause_ns = min(2 * helper.pause_ns, _LAST_PAUSE_NS)
        return False

    def _holders(self, directory: NodeId) -> frozenset[int]:
        """The requests on account of which the kernel holds the lock of ``directory``, and nobody else does."""
        return frozenset(
            request.unique
            for request in self._session.unanswered()
            if request.opcode in _HOLDS_LOCK_ALONE
            and (request.node == directory or (request.opcode in _RENAMES and request.body.new_parent == directory))
        )

    def _give_back(self, helper: _Helper) -> None:
        helper.job = None
        with self._changed:
            if self._by_pid.get(helper.pid) is not helper or self._closing or len(self._idle) >= self._size:
                helper.close()  # which ends it
            else:
                self._idle.append(helper)
                self._changed.notify()

    def _leave(self, helper: _Helper) -> None:
        """To the pool's thread, which waits until it has answered."""
        with self._lock:
            if self._closing:
                helper.close()
                return
            self._left[helper.socket] = helper
            if len(self._by_pid) - len(self._left) + self._starting < self._size:
                self._order_helper()
        os.eventfd_write(self._wakeup, 1)

    def _order_helper(self) -> None:
        """With the lock."""
        if not self._free_slots or self._orders is None:
            return
        with contextlib.suppress(OSError):  # it is dead: that will be noticed
            self._orders.send(keeper.FORK + keeper.order.pack(self._free_slots[-1]), socket.MSG_DONTWAIT)
            self._free_slots.pop()
            self._starting += 1

    # ---- for the supervisor ----

    def granted_up_to(self, node: NodeId) -> None:
        """Node ids up to this one may be cached by the kernel: the keeper takes care of them if this process dies. Before the grant."""
        with self._lock:
            if node > self._words[keeper.HIGHEST_NODE]:
                self._words[keeper.HIGHEST_NODE] = node

    def share_channel(self, descriptor: int | None) -> None:
        """The keeper shall say goodbye on this connection to the daemon if this process dies; None: there is no connection.

        Copies are kept until the next call: who gives the connection up must shut it down, closing it does not suffice.
        """
        copy = -1 if descriptor is None else os.dup(descriptor)
        with self._lock:
            copy, self._channel = self._channel, copy
            self._send_channel()
        if copy >= 0:
            os.close(copy)

    def _send_channel(self) -> None:
        """With the lock."""
        if self._orders is None:
            return
        with contextlib.suppress(OSError):  # it is dead: the next one is told
            if self._channel >= 0:
                keeper.send(self._orders, keeper.CHANNEL + encode(Goodbye()), self._channel)
            else:
                keeper.send(self._orders, keeper.CHANNEL)

    # ---- the thread ----

    def _run(self) -> None:
        delay_s = _FIRST_RESTART_S
        while not self._closing:
            if self._orders is None:
                if self._sleep(delay_s):
                    return
                delay_s = min(2 * delay_s, _LAST_RESTART_S)
                try:
                    self._start_keeper()
                except OSError as error:
                    log.warning("the keeper of %s cannot be started: %s", self._mountpoint, error)
                continue
            orders = self._orders.fileno()
            with self._lock:
                descriptors = [self._wakeup, orders, *self._left]
            for descriptor in syscalls.wait_readable(descriptors, _NEVER_NS):
                if descriptor == self._wakeup:
                    os.eventfd_read(self._wakeup)
                elif descriptor == orders:
                    if self._hear_keeper(self._orders):
                        delay_s = _FIRST_RESTART_S
                elif descriptor in self._left:
                    self._take_back(self._left[descriptor])

    def _sleep(self, timeout_s: float) -> bool:
        """True: the pool is being closed."""
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        while not self._closing and (remaining_ns := deadline_ns - time.monotonic_ns()) > 0:
            if syscalls.wait_readable([self._wakeup], remaining_ns):
                os.eventfd_read(self._wakeup)
        return self._closing

    def _take_back(self, helper: _Helper) -> None:
        number = _read_answer(helper.socket)
        with self._lock:
            del self._left[helper.socket]
        if number is None:
            helper.close()
        else:
            self._give_back(helper)

    def _hear_keeper(self, orders: socket.socket) -> bool:
        """Deal with what it says. True: a helper was born."""
        try:
            message, descriptors = keeper.receive(orders)
        except OSError:
            message, descriptors = b"", []
        kind, rest = message[:1], message[1:]
        if not kind:
            self._lose_keeper(orders)
        elif kind == keeper.BORN:
            pid, slot = keeper.born.unpack(rest)
            helper = _Helper(pid, slot, descriptors[0])
            with self._changed:
                self._by_pid[pid] = helper
                self._idle.append(helper)
                self._starting -= 1
                self._changed.notify()
            return True
        elif kind == keeper.FAILED:
            number, slot = keeper.born.unpack(rest)
            log.warning("no further helper process for %s: %s", self._mountpoint, os.strerror(number))
            with self._lock:
                self._free_slots.append(slot)
                self._starting -= 1
        elif kind == keeper.DIED:
            self._bury(*keeper.order.unpack(rest))
            with contextlib.suppress(OSError):
                keeper.send(orders, keeper.REAP + rest)
        return False

    def _bury(self, pid: int) -> None:
        """Strike it off, before another process can get its number."""
        with self._lock:
            helper = self._by_pid.pop(pid)
            self._free_slots.append(helper.slot)
            if helper in self._idle:
                self._idle.remove(helper)
                helper.close()  # otherwise who has it will find out

    def _lose_keeper(self, orders: socket.socket) -> None:
        with self._changed:
            self._orders = None
            self._by_pid = {}
            for helper in [*self._idle, *self._left.values()]:
                helper.close()
            self._idle.clear()
            self._left.clear()
            self._free_slots = list(range(keeper.MAX_HELPERS))
            self._starting = 0
        orders.close()
        self._end_keeper()
        log.warning("the keeper of %s has died; starting another", self._mountpoint)

    def _start_keeper(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            device = -1
            try:
                device = self._session.duplicate_device()
                kept = (theirs.fileno(), device, self._page_fd)
                arguments = (*kept, os.getpid(), self._mountpoint, self._session.connection)
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, *(str(each) for each in arguments)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True, pass_fds=kept,
                )  # fmt: skip
            except BaseException:
                mine.close()
                raise
            finally:
                if device >= 0:
                    os.close(device)
        with self._lock:
            self._orders = mine
            self._keepers += 1
            self._send_channel()
            for _ in range(self._size):
                self._order_helper()

    def _end_keeper(self) -> None:
        if self._keeper is None:
            return
        try:
            self._keeper.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()

    # ---- inspection ----

    def statistics(self) -> HelperPoolStatistics:
        """A frozen copy of the counters."""
        with self._lock:
            return HelperPoolStatistics(
                self._drops, self._failures, len(self._by_pid), len(self._left), self._keepers
            )  # fmt: skip

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._lock:
            slots = sorted([helper.slot for helper in self._by_pid.values()] + self._free_slots)
            assert len(set(slots)) == len(slots), slots
            assert len(slots) + self._starting == keeper.MAX_HELPERS, (slots, self._starting)
            assert all(helper.job is None for helper in self._idle), "an idle helper has a job"
            assert all(helper.job is not None for helper in self._left.values()), "a busy helper has no job"


def _read_answer(descriptor: int) -> int | None:
    """Of a helper; None: it has died."""
    try:
        message = os.read(descriptor, keeper.answer.size)
    except OSError:
        return None
    number: int | None = keeper.answer.unpack(message)[0] if message else None
    return number
