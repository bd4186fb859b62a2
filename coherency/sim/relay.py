"""What lies between an agent and the daemon's control socket when a simulation wants to break what is between them.

A relay listens in a runtime directory of its own, where one agent finds it in the daemon's place, and passes on what
either side says, descriptors included. It does not know what it passes on.

1. Bytes stay in order and none are lost; they come late by the delay of their direction. A delay that becomes shorter
   does not let bytes overtake others.
2. The end of one side's stream is passed on after what came before it, and then the other side's.
3. While it is cut, there is no connection, and each new one ends at once. So it ends if the daemon cannot be reached.
4. Muted, it reads nothing and passes on nothing, and neither side is told. What was said comes when that is over.
5. Each direction keeps at most ``ROOM_BYTES``; then it does not read on, as a socket would not.
"""

from __future__ import annotations

import array
import contextlib
import os
import selectors
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NamedTuple, Self

from coherency.rendezvous import CONTROL_SOCKET_NAME

ROOM_BYTES: Final = 1 << 20
_READ_BYTES: Final = 65536
_DESCRIPTORS_AT_ONCE: Final = 4
_BACKLOG: Final = 16


class _Chunk(NamedTuple):
    due_ns: int
    data: bytes  # empty: the end of the stream
    descriptors: tuple[int, ...]


@dataclass(eq=False)
class _Direction:
    """From one socket to another. ``delay_ns`` is the relay's."""

    source: socket.socket
    sink: socket.socket
    to_daemon: bool
    waiting: deque[_Chunk] = field(default_factory=deque)
    waiting_bytes: int = 0
    ended: bool = False  # the source has said all
    done: bool = False  # and the sink has been told

    def read(self, now_ns: int, delay_ns: int) -> None:
        """Whatever there is. A stream that breaks ends like any other."""
        try:
            room = socket.CMSG_LEN(_DESCRIPTORS_AT_ONCE * array.array("i").itemsize)
            data, ancillary, _, _ = self.source.recvmsg(_READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        due_ns = max(now_ns + delay_ns, self.waiting[-1].due_ns if self.waiting else 0)  # rule 1
        self.waiting.append(_Chunk(due_ns, data, tuple(descriptors)))
        self.waiting_bytes += len(data)
        self.ended = not data

    def write(self, now_ns: int) -> None:
        """What is due. A sink that is gone swallows the rest."""
        while self.waiting and self.waiting[0].due_ns <= now_ns:
            chunk = self.waiting.popleft()
            if not chunk.data:
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                self.done = True
                return
            try:
                sent = socket.send_fds(self.sink, [chunk.data], chunk.descriptors)
            except BlockingIOError:
                self.waiting.appendleft(chunk)
                return
            except OSError:
                sent = len(chunk.data)
            self.waiting_bytes -= sent
            _close_all(chunk.descriptors)
            if sent < len(chunk.data):
                self.waiting.appendleft(_Chunk(chunk.due_ns, chunk.data[sent:], ()))
                return

    @property
    def reads(self) -> bool:
        return not self.ended and self.waiting_bytes < ROOM_BYTES

    def next_due_ns(self) -> int | None:
        return self.waiting[0].due_ns if self.waiting else None

    def drop(self) -> None:
        for chunk in self.waiting:
            _close_all(chunk.descriptors)
        self.waiting.clear()


class Relay:
    """A thread that passes on between one agent and the daemon; from construction to :meth:`close`.

    What is asked of it has been done when the method returns. For one thread.
    """

    def __init__(self, runtime_root: Path, target: Path) -> None:
        """Listen in ``runtime_root``/NAME for the daemon whose control socket is ``target``, in its NAME directory."""
        self.runtime_root, self._target = runtime_root, target
        directory = runtime_root / target.parent.name
        directory.mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _at(directory, self._listener.bind)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._pairs: list[tuple[_Direction, _Direction]] = []
        self._asked: SimpleQueue[tuple[Callable[[], None], threading.Event]] = SimpleQueue()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = self._is_cut = self._is_mute = False
        self._to_daemon_ns = self._to_guest_ns = 0
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    # ---- what can be done to it ----

    def cut(self) -> None:
        """Hang up on both sides, and on everybody who comes, until :meth:`mend`. What has not arrived never will."""
        self._ask(self._cut)

    def mute(self) -> None:
        """Rule 4, until :meth:`mend`."""
        self._ask(self._mute)

    def delay(self, *, to_daemon_ns: int = 0, to_guest_ns: int = 0) -> None:
        """Let what is said from now on come late by so much, until :meth:`mend`."""

        def slow_down() -> None:
            self._to_daemon_ns, self._to_guest_ns = to_daemon_ns, to_guest_ns

        self._ask(slow_down)

    def mend(self) -> None:
        """Pass on everything at once, what was held back too."""
        self._ask(self._mend)

    def close(self) -> None:
        """Hang up and end. May be called again."""
        if self._thread.is_alive():
            self._ask(self._close)
            self._thread.join()
            os.close(self._wakeup)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, change: Callable[[], None]) -> None:
        done = threading.Event()
        self._asked.put((change, done))
        os.eventfd_write(self._wakeup, 1)
        done.wait()

    # ---- the thread ----

    def _run(self) -> None:
        while not self._closing:
            self._wait()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
            while not self._asked.empty():
                change, done = self._asked.get()
                change()
                done.set()
            if not self._closing:
                self._turn(time.monotonic_ns())

    def _cut(self) -> None:
        self._is_cut = True
        for pair in self._pairs:
            _hang_up(pair)
        self._pairs.clear()

    def _mute(self) -> None:
        self._is_mute = True

    def _mend(self) -> None:
        self._is_cut = self._is_mute = False
        self._to_daemon_ns = self._to_guest_ns = 0
        for direction in self._directions():
            direction.waiting = deque(chunk._replace(due_ns=0) for chunk in direction.waiting)

    def _close(self) -> None:
        self._closing = True
        self._cut()
        self._listener.close()

    def _directions(self) -> list[_Direction]:
        return [direction for pair in self._pairs for direction in pair]

    def _wait(self) -> None:
        """Until something can be done. A socket that nothing is to be done with is not asked: it would say yes for ever."""
        wanted: defaultdict[socket.socket, int] = defaultdict(int)
        dues = []
        now_ns = time.monotonic_ns()
        for direction in [] if self._is_mute else self._directions():
            if direction.reads:
                wanted[direction.source] |= selectors.EVENT_READ
            due_ns = direction.next_due_ns()
            if due_ns is not None and due_ns <= now_ns:
                wanted[direction.sink] |= selectors.EVENT_WRITE
            elif due_ns is not None:
                dues.append(due_ns - now_ns)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            for sock, events in wanted.items():
                selector.register(sock, events)
            selector.select(min(dues) / 1e9 if dues else None)

    def _turn(self, now_ns: int) -> None:
        self._accept()
        if self._is_mute:
            return
        for pair in list(self._pairs):
            for direction in pair:
                if direction.reads:
                    direction.read(now_ns, self._to_daemon_ns if direction.to_daemon else self._to_guest_ns)
                direction.write(now_ns)
            if all(direction.done for direction in pair):
                _hang_up(pair)
                self._pairs.remove(pair)

    def _accept(self) -> None:
        try:
            agent, _ = self._listener.accept()
        except BlockingIOError:
            return
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if self._is_cut:
                raise ConnectionRefusedError
            _at(self._target.parent, daemon.connect)
        except OSError:  # rule 3
            agent.close()
            daemon.close()
            return
        for sock in (agent, daemon):
            sock.setblocking(False)
        self._pairs.append((_Direction(agent, daemon, to_daemon=True), _Direction(daemon, agent, to_daemon=False)))


def _at(directory: Path, use: Callable[[str], object]) -> None:
    """Use the address of the control socket in ``directory``, which may be too long for an address."""
    directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        use(f"/proc/self/fd/{directory_fd}/{CONTROL_SOCKET_NAME}")
    finally:
        os.close(directory_fd)


def _close_all(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _hang_up(pair: tuple[_Direction, _Direction]) -> None:
    for direction in pair:
        direction.drop()
        direction.source.close()
