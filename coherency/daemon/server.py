"""The control socket: one thread that carries bytes between the sockets and the `switchboard`, and logs what that says.

Rules:

1. Nothing here waits for a peer: all sockets are non-blocking, and what a peer does not read is kept up to
   `Limits.unsent_bytes`; then the peer is dropped.
2. A peer gets one read of `READ_BYTES` per round, so that none can keep the others waiting; `recall` reads `_POLLS` times
   from the guest that it is called for.
3. Descriptors that a peer sends are closed by the kernel, since nothing is received with room for them.
4. Switchboard and sockets are touched under the control lock.  The loop holds it while it deals with what has happened,
   not while it waits; threads that make changes take it to send recalls themselves, so that these need no second thread.
5. Only the loop touches the selector, and closes sockets: what other threads leave to it they put into `_attention` or
   `_retired`, and wake it.
6. Nobody takes another lock of ours and then the control lock.
7. What a peer has said before its end counts, also if the end is noticed by sending to it.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from coherency.daemon.actions import Drop, Note, Send
from coherency.daemon.leasing import Leasing
from coherency.daemon.ledger import Round
from coherency.daemon.peer_states import Credentials, GuestSnapshot, PeerId
from coherency.daemon.switchboard import Limits, Switchboard, SwitchboardStatistics
from coherency.events import Event
from coherency.ids import Epoch, GrantKey
from coherency.protocol import Welcome
from coherency.protocol_fields import ReportValue

_log = logging.getLogger(__name__)

READ_BYTES: Final = 65536
SOCKET_MODE: Final = 0o660
_ACCEPTS_PER_ROUND: Final = 64
_POLLS: Final = 4
"""Reads that empty a socket's buffer of usual size."""
_UCRED: Final = struct.Struct("=iII")
_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class ServerStatistics(NamedTuple):
    """Those of the switchboard, and the bytes received and sent since the start."""

    peers: int
    guests: int
    opened: int
    dropped: int
    messages: int
    runs: int
    received_bytes: int
    sent_bytes: int


@dataclass(slots=True)
class _Link:
    sock: socket.socket
    peer: PeerId
    unsent: bytearray = field(default_factory=bytearray)
    table_goes_next: bool = False
    waits_for_room: bool = False
    broken: bool = False


class ControlServer:
    """Serves the control channel at `path` from `start` to `close`.

    `welcome` is the template of every Welcome (its `guest_id` is replaced); `table_fd`, a read-only descriptor of the
    table, stays the caller's and must stay open until `close`.  `status` returns the daemon's part of a status report,
    with at least `REPORT_KEYS`; `invalidate` starts a new epoch and returns it.  Both are called under the control lock,
    must not wait, and must not call the methods below but for `statistics`.
    """

    def __init__(
        self,
        path: Path,
        *,
        welcome: Welcome,
        table_fd: int,
        status: Callable[[], Mapping[str, ReportValue]],
        invalidate: Callable[[], Epoch],
        leasing: Leasing,
        limits: Limits | None = None,
    ) -> None:
        self._path = path
        self._table_fd = table_fd
        self._limits = limits or Limits()
        self._leasing = leasing
        self._board = Switchboard(
            welcome=welcome, status=status, invalidate=invalidate, leasing=leasing,
            own_uid=os.geteuid(), limits=self._limits,
        )  # fmt: skip
        self.subscribers = self._board.subscribers
        self._control_lock = threading.Lock()
        self._links: dict[PeerId, _Link] = {}
        self._attention: list[_Link] = []
        self._retired: list[_Link] = []
        self._broken: list[tuple[_Link, str]] = []
        self._asleep_until_ns: int | None = None
        self._hung_up = False
        self._selector = selectors.DefaultSelector()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self._accept_again_at_ns: int | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._close_lock = threading.Lock()
        self._closed = False
        self._received_bytes = 0
        self._sent_bytes = 0

    # --- from any thread ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind the socket (mode 0660) and begin to serve.  Raises `OSError` if the path cannot be bound."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            _bind(listener, self._path)
            # Nobody can connect before listen(), so nobody meets the socket with another mode.
            self._path.chmod(SOCKET_MODE)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="control-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, hang up on everybody, remove the socket.  May be called again, and before `start`.

        Not from `status` or `invalidate`.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = self._closing = True
            os.eventfd_write(self._wakeup, 1)
            if self._thread is not None:
                self._thread.join()
                self._path.unlink(missing_ok=True)
            with self._control_lock:
                self._hung_up = True
            self._selector.close()
            os.close(self._wakeup)

    def is_held(self, keys: Iterable[GrantKey]) -> bool:
        """Whether `recall` of these keys would tell anybody, or have to wait: see `Ledger.is_held`.  Takes no lock."""
        return self._leasing.is_held(keys)

    def recall(
        self, keys: Iterable[GrantKey] | None, wake: Callable[[], None], *, origin: int | None = None
    ) -> Round:
        """Recall keys, or everything (None), from all who have them.  When this returns the recalls are sent.

        `wake` is called from any thread, under the control lock, when nothing is owed any more; see `Ledger.recall`.
        `origin` is the session of the guest for which this is done: what it has sent is read first, since it releases
        what it knows to be concerned before it asks for a change.
        """
        with self._control_lock:
            link = None if origin is None else self._links.get(self._leasing.peer_of(origin) or PeerId(0))
            if link is not None:
                self._poll(link)
            round_ = self._board.recall(keys, wake, time.monotonic_ns())
            self._act()
            self._wake_if_needed()
        return round_

    def abandon(self, round_: Round) -> None:
        """Nobody waits for this round any more, and its `wake` is not called after this."""
        with self._control_lock:
            self._leasing.abandon(round_)

    def evict_due(self) -> None:
        """Evict whose lease is over.  The loop does so, too; who waits does not want to depend on that."""
        with self._control_lock:
            self._board.tick(time.monotonic_ns())
            self._act()
            self._wake_if_needed()

    def tell(self, events: Iterable[Event], origin: int | None, *, lost: int = 0) -> None:
        """Tell events to those who want them, but for the guest with the session `origin`.  When this returns they are sent, or lost.

        `lost`: see `Subscribers.tell`.
        """
        with self._control_lock:
            for peer, frame in self.subscribers.tell(events, origin, lambda peer: len(self._links[peer].unsent), lost=lost):
                self._links[peer].unsent += frame
                self._flush(self._links[peer])
            self._act()
            self._wake_if_needed()

    def guests(self) -> tuple[GuestSnapshot, ...]:
        """The guests that are connected at this moment, by id, with the counters that they sent last."""
        return self._board.guests()

    def statistics(self) -> ServerStatistics:
        """The counters.  Each is exact; together they are of one moment only while nothing happens."""
        board: SwitchboardStatistics = self._board.statistics()
        board = board._replace(peers=len(self._links) + len(self._retired))  # each has a descriptor
        return ServerStatistics(*board, self._received_bytes, self._sent_bytes)

    def check(self) -> None:
        """Assert the invariants.  Only while the thread does not run: before `start`, after `close`."""
        assert self._thread is None or not self._thread.is_alive()
        assert not self._links, self._links
        self._board.check()

    # --- the loop ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._round()
        except Exception:  # noqa: BLE001 - whatever it was, the guests must learn at once that nobody is there
            _log.critical("the control channel failed, hanging up on everybody", exc_info=True)
        finally:
            with self._control_lock:
                if self._listener is not None:
                    self._listener.close()
                for link in [*self._links.values(), *self._retired]:
                    link.sock.close()
                self._links.clear()
                self._retired.clear()
                self._board.end()
                self._hung_up = True

    def _round(self) -> None:
        for key, events in self._selector.select(self._patience_s()):
            with self._control_lock:  # for each, so that a change gets its turn between them
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd == self._wakeup:
                    os.eventfd_read(self._wakeup)
                else:
                    self._serve_link(key.data, events)
        now_ns = time.monotonic_ns()
        with self._control_lock:
            self._board.tick(now_ns)
            self._act()
            self._attend()
        if self._accept_again_at_ns is not None and now_ns >= self._accept_again_at_ns and self._listener:
            self._accept_again_at_ns = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _attend(self) -> None:
        """Rule 5: what was left to the loop."""
        attention, self._attention = self._attention, []
        for link in attention:
            if link.peer in self._links:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.unsent else 0)
                self._selector.modify(link.sock, events, link)
        while self._retired:
            self._selector.unregister(self._retired[-1].sock)
            self._retired[-1].sock.close()
            self._retired.pop()
            if self._accept_again_at_ns is not None:
                self._accept_again_at_ns = 0  # there is a descriptor now
        due = [at_ns for at_ns in (self._board.next_deadline_ns, self._accept_again_at_ns) if at_ns is not None]
        self._asleep_until_ns = min(due, default=None)

    def _wake_if_needed(self) -> None:
        due = self._board.next_deadline_ns
        earlier = due is not None and (self._asleep_until_ns is None or due < self._asleep_until_ns)
        if not self._hung_up and (self._attention or self._retired or earlier):
            os.eventfd_write(self._wakeup, 1)

    def _patience_s(self) -> float | None:
        if self._asleep_until_ns is None:
            return None
        # Rounded up to the next millisecond, lest the loop turns idly in the last one.
        return max(0, -((time.monotonic_ns() - self._asleep_until_ns) // 1_000_000)) / 1000

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(_ACCEPTS_PER_ROUND):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    _log.warning("could not accept a connection: %s", error)
                    return
                # The connection stays in the queue and would wake the loop for ever.
                _log.warning("accepting no connections for a while: %s", error)
                self._selector.unregister(self._listener)
                self._accept_again_at_ns = time.monotonic_ns() + self._limits.accept_pause_ns
                return
            self._open(sock)

    def _open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        peer = self._board.opened(Credentials(pid, uid), time.monotonic_ns())
        link = self._links[peer] = _Link(sock, peer)
        self._selector.register(sock, selectors.EVENT_READ, link)
        self._act()

    def _serve_link(self, link: _Link, events: int) -> None:
        if events & selectors.EVENT_WRITE and link.peer in self._links:
            self._flush(link)
        if events & selectors.EVENT_READ and link.peer in self._links:
            self._read(link)
        self._act()

    def _poll(self, link: _Link) -> None:
        """Read what lies there, within bounds."""
        for _ in range(_POLLS):
            if not self._read(link):
                break

    def _read(self, link: _Link) -> bool:
        """Read once; false if nothing more is to be expected now.  What follows from it is left to `_act`."""
        try:
            data = link.sock.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._board.lost(link.peer, f"could not be read: {error.strerror}", time.monotonic_ns())
            return False
        self._received_bytes += len(data)
        self._board.received(link.peer, data, time.monotonic_ns())
        return bool(data)

    def _act(self) -> None:
        while (actions := self._board.take_actions()) or self._broken:
            for action in actions:
                if isinstance(action, Note):
                    _log.info("%s: %s", action.who, action.what)
                    continue
                link = self._links.get(action.peer)
                if link is None:
                    continue
                if isinstance(action, Send):
                    link.unsent += action.frame
                    if action.joined:
                        _log.info("%s joined", action.joined)
                    link.table_goes_next |= action.with_table
                    self._flush(link)
                else:
                    self._hang_up(link, action)
            broken, self._broken = self._broken, []  # rule 7; not earlier, since frames leave in the order of the actions
            for link, reason in broken:
                self._poll(link)
                self._board.lost(link.peer, reason, time.monotonic_ns())

    def _flush(self, link: _Link) -> None:
        if link.broken:
            return
        try:
            while link.unsent:
                self._send_some(link)
        except BlockingIOError:
            pass
        except OSError as error:
            link.broken = True
            self._broken.append((link, f"could not be written: {error.strerror}"))
            return
        if len(link.unsent) > self._limits.unsent_bytes:
            self._board.lost(link.peer, f"does not read: {len(link.unsent)} bytes are unsent", time.monotonic_ns())
            return
        if bool(link.unsent) != link.waits_for_room:
            link.waits_for_room = bool(link.unsent)
            self._attention.append(link)

    def _send_some(self, link: _Link) -> None:
        chunk = bytes(link.unsent[:READ_BYTES])
        if link.table_goes_next:
            # A Welcome is the first frame that a guest gets, so the descriptor leaves with the first byte of it.
            sent = socket.send_fds(link.sock, [chunk], [self._table_fd])
            link.table_goes_next = False
        else:
            sent = link.sock.send(chunk)
        self._sent_bytes += sent
        del link.unsent[:sent]

    def _hang_up(self, link: _Link, drop: Drop) -> None:
        if drop.orderly:
            _log.log(logging.INFO if drop.was_guest else logging.DEBUG, "%s %s", drop.who, drop.reason)
        else:
            _log.warning("dropping %s: %s", drop.who, drop.reason, exc_info=drop.error)
        try:
            link.unsent += drop.farewell
            while link.unsent:
                self._send_some(link)
        except OSError:
            _log.debug("%s: the farewell could not be sent", drop.who)
        del self._links[link.peer]
        self._retired.append(link)


def _bind(listener: socket.socket, path: Path) -> None:
    """Bind by way of the directory's descriptor: the address of a socket holds only 107 bytes, a path may be longer."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
