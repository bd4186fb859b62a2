"""Lets programs of the guest that watch files (inotify) see what others do: each change is done once more, and only seemingly.

The kernel tells watchers of system calls of its own mount, and of nothing else. So a process of the agent's makes the same call in
the mount, when the caches are right; its requests are answered here, by ``echo_jobs``, and change nothing anywhere.
`docs/decisions/0008-events-by-echo.md` says why, and `docs/concurrency.md` what may happen meanwhile.

Rules:

1. Events wait in a queue, ``MAX_WAITING`` of them at most; what does not fit is lost, and counted. A change of data or attributes
   that waits already stands for a further one of the same file.
2. One thread echoes one event after the other, in their order. Who cannot be watching is spared: nothing is done in a directory that
   the kernel does not know.
3. An echo is waited for ``ECHO_NS``. If it takes longer, since somebody in the guest holds a lock, it is over: from then on all that
   it asks is refused; its process is killed, and another one started. At most ``MAX_LEFT`` processes are left like this; while
   there are so many events are lost.
4. The names that an echo makes, removes or moves are not granted from before it until its process has answered or is dead, and
   what was granted of them is taken back first: the kernel would not ask about them.
5. A process id counts as one of ours from before its first request until it is dead, and is reaped after that.
6. Where something is mounted on a name, or below, that name is not made, removed or moved: it would be unmounted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from coherency.events import Event, EventKind
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.mounts import MountList
from coherency.fuse.nodes import Node
from coherency.fuse.session import Reply
from coherency.guest_agent import echo_process
from coherency.guest_agent.echo_helper import EchoHelper
from coherency.guest_agent.echo_jobs import EchoAnswers, EchoJob, Place, links
from coherency.guest_agent.filesystem import CachingFileSystem
from coherency.ids import NodeId
from coherency.protocol_events import Happened

log = logging.getLogger(__name__)

MAX_WAITING: Final = 8192
MAX_LEFT: Final = 4
ECHO_NS: Final = 2_000_000_000
_END_NS: Final = 500_000_000
_CLOSE_S: Final = 4.0
_MAX_DEPTH: Final = 4096  # names in a path; more cannot be: a cycle
_REPEATABLE: Final = (EventKind.MODIFIED, EventKind.ATTRIBUTES)


class Mounted(Protocol):
    """What is needed of a session."""

    @property
    def connection(self) -> int: ...
    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool: ...


@dataclass(frozen=True)
class EchoStatistics:
    waiting: int  # events
    echoed: int  # system calls that were made
    refused: int  # that were made and failed, or were not made since they would have
    lost: int  # events
    left: int  # processes


class Echoes:
    """The echoes of one mount, from ``start()`` to ``close()``; ``hear`` and ``answer`` may be called before and after."""

    def __init__(self, *, echo_ns: int = ECHO_NS, max_waiting: int = MAX_WAITING) -> None:
        self._echo_ns, self._max_waiting = echo_ns, max_waiting
        self._jobs: dict[int, EchoJob | None] = {}  # by process
        self._left: list[tuple[EchoHelper, contextlib.ExitStack]] = []
        self._helper: EchoHelper | None = None
        self._waiting: deque[Event] = deque()
        self._repeatable: set[Event] = set()  # of those that wait
        self._changed = threading.Condition()
        self._closing = False
        self._losing = self._warned = False
        self._echoed = self._refused = self._lost = 0
        self._ready = threading.Event()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="echoes", daemon=True)

    # ---- life ----

    def start(self, file_system: CachingFileSystem, session: Mounted, mountpoint: str) -> None:
        """The mount answers: begin. Ready when this returns, if there can be a process."""
        self._fs, self._session, self._mountpoint = file_system, session, mountpoint
        self._answers = EchoAnswers(file_system.nodes, session.invalidate_inode, file_system.attributes_now)
        self._mounts = MountList(os.fsencode(mountpoint))
        self._thread.start()
        self._ready.wait()

    def close(self) -> None:
        """No echo begins any more, and processes end, unless they hang; before the mount goes."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        os.eventfd_write(self._wakeup, 1)
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)  # it may wait for a daemon that stands still

    def bury(self) -> None:
        """What hung has ended with the mount."""
        if self._thread.is_alive():
            return  # and ends with this process
        if self._thread.ident is not None:
            self._mounts.close()
        self._look_after_left(_END_NS)
        os.close(self._wakeup)

    # ---- for the client's thread ----

    def hear(self, message: Happened) -> None:
        """Take what the daemon tells. Never waits."""
        with self._changed:
            self._lose(message.lost)
            for event in message.events:
                if event in self._repeatable:
                    continue
                if len(self._waiting) >= self._max_waiting:
                    self._lose(1)
                    continue
                self._waiting.append(event)
                if event.kind in _REPEATABLE:
                    self._repeatable.add(event)
            self._changed.notify()

    def _lose(self, count: int) -> None:
        """With the lock."""
        self._lost += count
        if count and not self._losing:
            self._losing = True  # until there is nothing left to do
            log.info("programs that watch files miss some events")

    # ---- for who answers requests ----

    def is_helper(self, pid: int) -> bool:
        """Whether a request with this ``pid`` is of a process that echoes. Takes no lock."""
        return pid in self._jobs

    def answer(self, request: Request) -> Reply:
        """The reply to such a request."""
        if request.opcode != Opcode.SETATTR:
            self._fs.answered_here += 1
        return self._answers.answer(self._jobs.get(request.pid), request)

    # ---- the thread ----

    def _run(self) -> None:
        try:
            try:
                self._start_helper()
            except OSError:
                pass  # tried again when there is something to do
            finally:
                self._ready.set()
            while (event := self._next()) is not None:
                try:
                    self._echo(event)
                except (TimeoutError, InterruptedError, ChildProcessError):
                    with self._changed:
                        self._lose(1)
                except OSError as error:
                    self._refused += 1
                    log.debug("%s is not echoed: %s", event, error)
                except Exception:
                    log.exception("operation %s failed", event)
                self._look_after_left()
        finally:
            if self._helper is not None:
                self._leave(self._helper, contextlib.ExitStack())
            self._look_after_left(_END_NS)

    def _next(self) -> Event | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._losing = False
                self._changed.wait()
            if self._closing:
                return None
            event = self._waiting.popleft()
            self._repeatable.discard(event)  # before it is looked at: what happens from now on is another event
        return event

    def _echo(self, event: Event) -> None:
        if event.kind == EventKind.CREATED:
            self._made(event)
        elif event.kind == EventKind.REMOVED:
            self._removed(event)
        elif event.kind == EventKind.RENAMED:
            self._renamed(event)
        elif event.kind == EventKind.MODIFIED:
            self._touched(event, echo_process.MODIFY)
        else:
            self._touched(event, echo_process.SET_ATTRIBUTES)

    def _made(self, event: Event) -> None:
        parent, node = self._fs.nodes.known(event.parent), self._fs.nodes.known(event.ino)
        if parent is None:
            return
        if node is None or event.is_directory or (node.parent, node.name) == (parent, event.name):
            self._make(parent, event.name, event.is_directory)
        else:  # a further name
            self._perform(EchoJob(echo_process.LINK, Place(parent, event.name, 0), thing=node, kind=node.kind))

    def _make(self, parent: Node, name: bytes, is_directory: bool) -> None:
        what = echo_process.MAKE_DIRECTORY if is_directory else echo_process.MAKE_FILE
        self._perform(EchoJob(what, Place(parent, name, 0), kind=_kind(is_directory)))

    def _removed(self, event: Event) -> None:
        parent, node = self._fs.nodes.known(event.parent), self._fs.nodes.known(event.ino)
        gone = node if node is not None and self._is_gone(node) else None
        if parent is not None:
            self._remove(parent, event.name, gone or _kind(event.is_directory))
        if node is not None and gone is None:
            self._touch(node, echo_process.SET_ATTRIBUTES)  # it has a link less

    def _remove(self, parent: Node, name: bytes, shown: Node | int) -> None:
        is_directory = shown.is_directory if isinstance(shown, Node) else stat.S_ISDIR(shown)
        what = echo_process.REMOVE_DIRECTORY if is_directory else echo_process.REMOVE_FILE
        self._perform(EchoJob(what, Place(parent, name, shown)))

    def _renamed(self, event: Event) -> None:
        nodes = self._fs.nodes
        old, new = nodes.known(event.parent), nodes.known(event.new_parent)
        if old is None or new is None:  # what leads to where nobody watches is as good as gone
            if old is not None:
                self._remove(old, event.name, _kind(event.is_directory))
            if new is not None:
                self._make(new, event.new_name, event.is_directory)
            return
        node = nodes.known(event.ino)
        if node is not None and node.is_directory and (node.parent, node.name) != (old, event.name):
            node = None  # looked up at its new place already, as another node perhaps
        replaced = nodes.known(event.replaced) if event.replaced else None
        gone = replaced if replaced is not None and self._is_gone(replaced) else None
        if gone is not None and gone.is_directory != event.is_directory:
            gone = None
        moved = Place(old, event.name, node or _kind(event.is_directory))
        self._perform(EchoJob(echo_process.MOVE, moved, Place(new, event.new_name, gone or 0)))
        if replaced is not None and gone is None:
            self._touch(replaced, echo_process.SET_ATTRIBUTES)

    def _touched(self, event: Event, what: int) -> None:
        """By its name, if that leads to it, so that who watches the directory is told the name; else by the inode."""
        nodes = self._fs.nodes
        parent_ino, name = event.parent, event.name
        known = nodes.known(event.ino)
        if not name and known is not None and known.parent is not None:  # told without a name: then by that which it has here
            parent_ino, name = known.parent.ino, known.name
        parent = nodes.known(parent_ino) if name else None
        if parent is not None and not self._is_in_use(parent, name):
            try:
                node = self._fs.find_name(parent, name)
            except OSError:
                pass  # it is not there any more
            else:
                try:
                    if node.ino == event.ino:
                        self._touch(node, what, Place(parent, name, node))
                        return
                finally:
                    nodes.forget(node.id, 1)
        if known is not None:
            self._touch(known, what)

    def _touch(self, node: Node, what: int, *places: Place) -> None:
        if what == echo_process.SET_ATTRIBUTES or node.kind == stat.S_IFREG:
            self._perform(EchoJob(what, *places, thing=node))

    def _is_gone(self, node: Node) -> bool:
        """Whether no name leads to it any more."""
        try:
            return not links(self._fs.attributes_now(node))
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return True

    # ---- one system call ----

    def _perform(self, job: EchoJob) -> None:
        if job.takes_names and any(self._is_in_use(place.parent, place.name) for place in job.places):
            raise OSError(errno.EBUSY, "something is mounted there")
        if len(self._left) >= MAX_LEFT:
            raise TimeoutError(errno.ETIMEDOUT, "too many processes are held up by locks")
        helper = self._helper or self._start_helper()
        deadline_ns = time.monotonic_ns() + self._echo_ns
        names = [place.key for place in job.places] if job.takes_names else []
        with contextlib.ExitStack() as undo:
            undo.enter_context(
                self._fs.unassured(names, lambda: self._closing or time.monotonic_ns() > deadline_ns)
            )  # fmt: skip
            self._jobs[helper.pid] = job
            helper.tell(job.encoded())
            try:
                number = helper.answer(deadline_ns - time.monotonic_ns(), self._wakeup)
            except ChildProcessError:
                number = None
            job.over = True
            if number is None:
                self._leave(helper, undo.pop_all())
                raise TimeoutError(errno.ETIMEDOUT, "its process is dead, or held up by a lock")
            self._jobs[helper.pid] = None
        if number:
            raise OSError(number, os.strerror(number))
        self._echoed += 1

    def _is_in_use(self, parent: Node, name: bytes) -> bool:
        """Whether something is mounted on the name, or below."""
        return self._mounts.is_in_use(_path(parent) + name)

    def _start_helper(self) -> EchoHelper:
        try:
            helper = self._helper = EchoHelper.start(self._mountpoint, self._session.connection, self._wakeup)
        except OSError as error:
            if not self._closing and not self._warned:
                log.warning("no process that shows events at %s: %s", self._mountpoint, error.strerror)
            self._warned = True
            raise ChildProcessError(errno.ECHILD, "there is no process") from error
        self._warned = False
        self._jobs[helper.pid] = None
        return helper

    def _leave(self, helper: EchoHelper, undo: contextlib.ExitStack) -> None:
        """It has not answered, and is not waited for: ``undo`` when it is dead."""
        helper.kill()
        self._helper = None
        self._left.append((helper, undo))

    def _look_after_left(self, timeout_ns: int = 0) -> None:
        """Those that are dead are buried; each is waited for so long."""
        for each in list(self._left):
            helper, undo = each
            if helper.has_ended(timeout_ns):
                self._jobs.pop(helper.pid, None)
                helper.reap()
                undo.close()
                self._left.remove(each)

    # ---- inspection ----

    def statistics(self) -> EchoStatistics:
        """A frozen copy of the counters."""
        with self._changed:
            return EchoStatistics(len(self._waiting), self._echoed, self._refused, self._lost, len(self._left))

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._changed:
            assert len(self._waiting) <= self._max_waiting, "too many events"
            assert self._repeatable <= set(self._waiting), "an event that does not wait"
        assert len(self._left) <= MAX_LEFT + 1, "too many processes"


def _kind(is_directory: bool) -> int:
    return stat.S_IFDIR if is_directory else stat.S_IFREG


def _path(directory: Node) -> bytes:
    """Where it was last seen, from the root, with a slash behind it if that is not the root itself."""
    names: list[bytes] = []
    node: Node | None = directory
    while node is not None and node.parent is not None and len(names) < _MAX_DEPTH:
        names.append(node.name + b"/")
        node = node.parent
    return b"".join(reversed(names))
