"""The helper processes of a mount and their keeper, as the agent has them: started, lent to who has a job, counted, replaced.

1. A helper is idle, or lent to one thread, or left: its borrower does not wait for it any more, and it has not answered yet.
   Who has it reads its socket and closes it; nobody else does. Idle and left ones are the pool's.
2. ``size`` helpers are not left, if that can be had; there are at most ``keeper.MAX_HELPERS``, left ones and all.
3. A process id counts as a helper's from before its first request until after its last; no other process has it meanwhile,
   since the keeper reaps it afterwards. (Only if the keeper dies, too, nobody sees to that.)
4. If the keeper dies, so do the helpers, and all are started anew; until then there is none to be had.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, Self, TypeVar

from coherency.errors import MountError
from coherency.fuse import syscalls
from coherency.guest_agent import keeper
from coherency.ids import NodeId
from coherency.protocol import Goodbye, encode

log = logging.getLogger(__name__)

DEFAULT_SIZE: Final = 4
_START_TIMEOUT_S: Final = 30.0  # a machine without KVM on a busy host has needed more than ten
_END_TIMEOUT_S: Final = 5.0
_FIRST_RESTART_S: Final = 0.05
_LAST_RESTART_S: Final = 5.0
_NEVER_NS: Final = 1 << 60
_PACKAGE_ROOT: Final = str(Path(__file__).resolve().parents[2])
_PROGRAM: Final = (
    f"import sys; sys.path.insert(0, {_PACKAGE_ROOT!r}); from coherency.guest_agent.keeper import main; main()"
)

Job = TypeVar("Job")


class Connection(Protocol):
    """What the keeper needs of a session."""

    @property
    def connection(self) -> int: ...
    def duplicate_device(self) -> int:
        """A new descriptor of the connection, the caller's to close."""


@dataclass(frozen=True)
class HelperStatistics:
    helpers: int
    left: int  # of these: what they wait for takes longer than they were waited for
    keepers: int  # started so far


class Helper(Generic[Job]):
    """One helper process, at whose disposal a thread is; see rule 1."""

    __slots__ = ("_wchan", "job", "look_at_ns", "pause_ns", "pid", "slot", "socket")

    def __init__(self, pid: int, slot: int, descriptor: int) -> None:
        self.pid, self.slot, self.socket = pid, slot, descriptor
        self._wchan = -1
        with contextlib.suppress(OSError):  # then it is never seen to wait for anything
            self._wchan = os.open(f"/proc/{pid}/wchan", os.O_RDONLY | os.O_CLOEXEC)
        self.job: Job | None = None
        self.look_at_ns = self.pause_ns = 0  # for its borrower

    def sleeps_in(self) -> bytes:
        """The function of the kernel in which it sleeps; something else if it runs, or the kernel does not tell."""
        try:
            return os.pread(self._wchan, 64, 0)
        except OSError:
            return b""

    def answer(self) -> int | None:
        """What it has answered (see ``keeper.answer``), waiting for it; None: it is dead."""
        try:
            message = os.read(self.socket, keeper.answer.size)
        except OSError:
            return None
        number: int | None = keeper.answer.unpack(message)[0] if message else None
        return number

    def close(self) -> None:
        """A living one ends when it has done its job."""
        os.close(self.socket)
        if self._wchan >= 0:
            os.close(self._wchan)


class HelperProcesses(Generic[Job]):
    """The keeper of one mount, and its helpers. ``start()`` makes it; thread-safe."""

    def __init__(self, session: Connection, mountpoint: str, size: int) -> None:
        """Use ``start`` instead."""
        self._session, self._mountpoint, self._size = session, os.path.abspath(mountpoint), size
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # something about idle helpers
        self._by_pid: dict[int, Helper[Job]] = {}
        self._idle: deque[Helper[Job]] = deque()
        self._left: dict[int, Helper[Job]] = {}  # by socket
        self._free_slots = list(range(keeper.MAX_HELPERS))
        self._starting = self._keepers = 0
        self._channel = -1
        self._closing = False
        self._orders: socket.socket | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._page_fd = os.memfd_create("helpers", os.MFD_CLOEXEC)
        os.ftruncate(self._page_fd, keeper.PAGE_BYTES)
        self._words = keeper.Page(self._page_fd).words
        self._thread = threading.Thread(target=self._run, name="helpers", daemon=True)

    @classmethod
    def start(cls, session: Connection, mountpoint: str, *, size: int = DEFAULT_SIZE) -> Self:
        """Start the keeper and ``size`` helpers for the mount of ``session``; return when the first is ready.

        Raises :class:`MountError` if they cannot be started.
        """
        processes = cls(session, mountpoint, size)
        try:
            processes._start_keeper()
            processes._thread.start()
            with processes._changed:
                processes._changed.wait_for(lambda: processes._idle or not processes._orders, _START_TIMEOUT_S)
                if not processes._idle:
                    raise MountError(f"the helper processes of {mountpoint} do not start: see the messages before this one")
        except OSError as error:
            processes.close()
            raise MountError(f"the helper processes of {mountpoint} cannot be started: {error.strerror}") from error
        except BaseException:
            processes.close()
            raise
        return processes

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
            with contextlib.suppress(OSError):  # dead already
                keeper.send(self._orders, keeper.END)
        self._await_end_of_keeper()
        if self._orders is not None:
            self._orders.close()
        with self._lock:
            self._by_pid = {}
            self._close_helpers()
            descriptors = [self._page_fd, self._wakeup, *([self._channel] if self._channel >= 0 else [])]
        for descriptor in descriptors:
            os.close(descriptor)

    def is_helper(self, pid: int) -> bool:
        """Whether a request with this ``pid`` is a helper's. Takes no lock."""
        return pid in self._by_pid

    # ---- lending ----

    def take(self, deadline_ns: int, *, wait: bool) -> Helper[Job] | None:
        """An idle helper. None: there is none now, or (``wait``) none until the deadline."""
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

    def give_back(self, helper: Helper[Job]) -> None:
        """It has answered, and was not left."""
        helper.job = None
        with self._changed:
            if self._by_pid.get(helper.pid) is not helper or self._closing or len(self._idle) >= self._size:
                helper.close()
            else:
                self._idle.append(helper)
                self._changed.notify()

    def leave(self, helper: Helper[Job]) -> None:
        """It has not answered, and is not waited for. Its job stays with it until it has."""
        with self._lock:
            if self._closing or self._by_pid.get(helper.pid) is not helper:
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
        with contextlib.suppress(OSError):  # the keeper is dead, which will be noticed
            self._orders.send(keeper.FORK + keeper.order.pack(self._free_slots[-1]), socket.MSG_DONTWAIT)
            self._free_slots.pop()
            self._starting += 1

    # ---- for the keeper ----

    def granted_up_to(self, node: NodeId) -> None:
        """The kernel may keep something of nodes up to this one; to be said before it is told so.

        If this process dies, that is what the keeper takes from the kernel.
        """
        with self._lock:
            if node > self._words[keeper.HIGHEST_NODE]:
                self._words[keeper.HIGHEST_NODE] = node

    def share_channel(self, descriptor: int | None) -> None:
        """If this process dies, the keeper says goodbye on this connection to the daemon. None: there is no connection.

        Copies are kept until the next call: who gives a connection up must shut it down, closing does not suffice.
        """
        copy = -1 if descriptor is None else os.dup(descriptor)
        with self._lock:
            if not self._closing:
                copy, self._channel = self._channel, copy
                self._send_channel()
        if copy >= 0:
            os.close(copy)

    def _send_channel(self) -> None:
        """With the lock."""
        if self._orders is None:
            return
        with contextlib.suppress(OSError):  # the keeper is dead, the next will be told
            if self._channel >= 0:
                keeper.send(self._orders, keeper.CHANNEL + encode(Goodbye()), self._channel)
            else:
                keeper.send(self._orders, keeper.CHANNEL)

    def _start_keeper(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(mine.close)
            device = self._session.duplicate_device()
            try:
                kept = (theirs.fileno(), device, self._page_fd)
                arguments = (*kept, os.getpid(), self._mountpoint, self._session.connection)
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, *(str(each) for each in arguments)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True, pass_fds=kept,
                )  # fmt: skip
            finally:
                os.close(device)
            undo.pop_all()
        with self._lock:
            self._orders = mine
            self._keepers += 1
            self._send_channel()
            for _ in range(self._size):
                self._order_helper()

    def _await_end_of_keeper(self) -> None:
        if self._keeper is None:
            return
        try:
            self._keeper.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()

    # ---- the thread: what keeper and left helpers say ----

    def _run(self) -> None:
        delay_s = _FIRST_RESTART_S
        while not self._closing:
            if self._orders is None:
                self._sleep(delay_s)
                delay_s = min(2 * delay_s, _LAST_RESTART_S)
                self._restart_keeper()
                continue
            with self._lock:
                descriptors = [self._wakeup, self._orders.fileno(), *self._left]
            for descriptor in syscalls.wait_readable(descriptors, _NEVER_NS):
                if descriptor == self._wakeup:
                    os.eventfd_read(self._wakeup)
                elif descriptor in self._left:
                    self._take_back(self._left[descriptor])
                elif self._hear_keeper(self._orders):
                    delay_s = _FIRST_RESTART_S

    def _sleep(self, timeout_s: float) -> None:
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        while not self._closing and (remaining_ns := deadline_ns - time.monotonic_ns()) > 0:
            if syscalls.wait_readable([self._wakeup], remaining_ns):
                os.eventfd_read(self._wakeup)

    def _restart_keeper(self) -> None:
        if self._closing:
            return
        try:
            self._start_keeper()
        except OSError as error:
            log.warning("the keeper of %s cannot be started: %s", self._mountpoint, error)

    def _take_back(self, helper: Helper[Job]) -> None:
        number = helper.answer()
        with self._lock:
            del self._left[helper.socket]
        if number is None:
            helper.close()
        else:
            self.give_back(helper)

    def _hear_keeper(self, orders: socket.socket) -> bool:
        """Deal with one thing that it says. True: a helper was born."""
        try:
            message, descriptors = keeper.receive(orders)
        except OSError:
            message, descriptors = b"", []
        kind, rest = message[:1], message[1:]
        if kind == keeper.BORN:
            pid, slot = keeper.born.unpack(rest)
            helper = Helper[Job](pid, slot, descriptors[0])
            with self._changed:
                self._by_pid[pid] = helper
                self._starting -= 1
                if len(self._idle) >= self._size:  # those that were left have come back meanwhile
                    helper.close()
                else:
                    self._idle.append(helper)
                    self._changed.notify()
            return True
        if kind == keeper.DIED:
            self._strike_off(*keeper.order.unpack(rest))
            with contextlib.suppress(OSError):  # the keeper is dead, too
                keeper.send(orders, keeper.REAP + rest)
        elif kind == keeper.FAILED:
            number, slot = keeper.born.unpack(rest)
            log.warning("no further helper process for %s: %s", self._mountpoint, os.strerror(number))
            with self._lock:
                self._free_slots.append(slot)
                self._starting -= 1
        else:
            self._lose_keeper(orders)
        return False

    def _strike_off(self, pid: int) -> None:
        with self._lock:
            helper = self._by_pid.pop(pid)
            self._free_slots.append(helper.slot)
            if helper in self._idle:
                self._idle.remove(helper)
                helper.close()
            if len(self._by_pid) - len(self._left) + self._starting < self._size:
                self._order_helper()

    def _lose_keeper(self, orders: socket.socket) -> None:
        with self._changed:
            self._orders = None
            self._by_pid = {}
            self._close_helpers()
            self._free_slots = list(range(keeper.MAX_HELPERS))
            self._starting = 0
            self._changed.notify_all()
        orders.close()
        self._await_end_of_keeper()
        log.warning("the keeper of %s has died; it is started anew", self._mountpoint)

    def _close_helpers(self) -> None:
        """With the lock."""
        for helper in [*self._idle, *self._left.values()]:
            helper.close()
        self._idle.clear()
        self._left.clear()

    # ---- inspection ----

    def process_statistics(self) -> HelperStatistics:
        """A frozen copy of the counters."""
        with self._lock:
            return HelperStatistics(len(self._by_pid), len(self._left), self._keepers)

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._lock:
            slots = [helper.slot for helper in self._by_pid.values()] + self._free_slots
            assert len(set(slots)) == len(slots), slots
            assert len(slots) + self._starting == keeper.MAX_HELPERS, (slots, self._starting)
            assert all(helper.job is None for helper in self._idle), "an idle helper has a job"
            assert all(helper.job is not None for helper in self._left.values()), "a busy helper has no job"
