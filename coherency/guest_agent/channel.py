"""One connection to a daemon: finds the socket, carries messages, keeps the descriptors that came with them.

Every wait ends: with the answer, at its deadline, when the daemon hangs up, or when `wakeup` becomes readable.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple

from coherency.errors import DaemonUnavailable, ProtocolVersionError, Refused
from coherency.protocol import (
    Decoder,
    Message,
    Refusal,
    RefusalCode,
    encode,
)
from coherency.rendezvous import CONTROL_SOCKET_NAME, check_share_name

READ_BYTES: Final = 65536
_DESCRIPTORS_AT_ONCE: Final = 4
_BUSY_RETRY_NS: Final = 20_000_000


class Interrupted(Exception):
    """The owner is closing: whoever waited for the daemon gives up at once."""


class ChannelStatistics(NamedTuple):
    """Messages received, and bytes in both directions."""

    messages: int
    received_bytes: int
    sent_bytes: int


class Channel:
    """A connection.  One thread receives; any thread may send."""

    def __init__(self, sock: socket.socket, name: str, wakeup: int | None) -> None:
        """Use `dial` instead.  `wakeup` stays the caller's."""
        self._sock = sock
        self._name = name
        self._wakeup = wakeup
        self._decoder = Decoder()
        self._arrived: list[Message] = []
        self._descriptors: list[int] = []
        self._send_lock = threading.Lock()
        self._messages = self._sent_bytes = 0

    @classmethod
    def dial(cls, runtime_root: Path, name: str, *, deadline_ns: int, wakeup: int | None = None) -> Channel:
        """Connect to the daemon that serves `name`.  The deadline is on the monotonic clock.

        Raises `DaemonUnavailable` if nobody listens or nobody accepts in time, `Refused` if the socket's mode keeps
        this user out, `UsageError` if `name` is none, `Interrupted`.
        """
        directory = runtime_root / check_share_name(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            while not _connected(sock, directory, name):
                _wait_for_room(name, deadline_ns, wakeup)
        except BaseException:
            sock.close()
            raise
        return cls(sock, name, wakeup)

    def send(self, message: Message) -> None:
        """Send one message without waiting.

        Raises `ConnectionError` if the daemon is gone, or has left so much unread that there is no room for the frame.
        """
        frame = encode(message)
        if self._send(frame) < len(frame):
            raise ConnectionAbortedError("the daemon does not read")

    def offer(self, message: Message) -> bool:
        """Send one message without waiting, or nothing: False if there is no room, or the daemon is gone."""
        frame = encode(message)
        try:
            sent = self._send(frame)
        except ConnectionError:
            return False  # the receiving thread finds out
        if 0 < sent < len(frame):
            self.hang_up()  # half a frame: nothing that follows would be understood
        return sent == len(frame)

    def _send(self, frame: bytes) -> int:
        with self._send_lock:
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError as error:  # also the channel closed by another thread
                raise ConnectionAbortedError(f"the daemon is gone: {error.strerror}") from error
            self._sent_bytes += sent
        return sent

    def fileno(self) -> int:
        """The descriptor of the connection, for who must share it."""
        return self._sock.fileno()

    def ask(self, question: Message) -> None:
        """Send the first message of a connection.  If it does not get through, `answer` tells why.

        A daemon that takes nobody any more says so and hangs up, without waiting for a question.
        """
        with contextlib.suppress(ConnectionError):
            self.send(question)

    def receive(self, deadline_ns: int, *, with_descriptors: bool = False) -> list[Message]:
        """What has arrived, waiting for it until the deadline; an empty list then.

        Raises `ConnectionError` if the daemon hung up, `PeerError` if it sent what is no message, `Interrupted`.
        Descriptors are closed by the kernel unless the caller wants them: see `take_descriptors`.
        """
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            return arrived
        if not wait_readable(self._wakeup, self._sock, deadline_ns - time.monotonic_ns()):
            return []
        try:
            data = self._receive_with_descriptors() if with_descriptors else self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionAbortedError("the daemon hung up")
        messages = self._decoder.feed(data)
        self._messages += len(messages)
        return messages

    def answer(self, deadline_ns: int, *, with_descriptors: bool = False) -> Message:
        """The next message, as the answer to what was sent.

        Raises `DaemonUnavailable` if none comes in time or the daemon hangs up, `ProtocolVersionError` or `Refused` if
        it is a Refusal, `PeerError`, `Interrupted`.
        """
        try:
            while not self._arrived:
                if time.monotonic_ns() >= deadline_ns:
                    raise DaemonUnavailable(self._name, "it does not answer")
                self._arrived = self.receive(deadline_ns, with_descriptors=with_descriptors)
        except ConnectionError as error:
            raise DaemonUnavailable(self._name, str(error)) from error
        message = self._arrived.pop(0)
        if isinstance(message, Refusal):
            if message.code == RefusalCode.VERSION:
                raise ProtocolVersionError(message.text)
            raise Refused(message.code, message.text)
        return message

    def take_descriptors(self) -> list[int]:
        """The descriptors that came so far; the caller closes them."""
        descriptors, self._descriptors = self._descriptors, []
        return descriptors

    def hang_up(self) -> None:
        """Make the receiving thread, whichever it is, see the end of the stream.  From any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the daemon was faster, or the channel is closed

    def close(self) -> None:
        """Close the connection and what nobody took.  May be called again; not while another thread receives."""
        self._sock.close()
        for descriptor in self.take_descriptors():
            os.close(descriptor)

    def statistics(self) -> ChannelStatistics:
        """A frozen copy of the counters."""
        return ChannelStatistics(self._messages, self._decoder.statistics().received_bytes, self._sent_bytes)

    def check(self) -> None:
        """Assert the decoder's invariants; from the receiving thread."""
        self._decoder.check()

    def _receive_with_descriptors(self) -> bytes:
        descriptors = array.array("i")
        room = socket.CMSG_LEN(_DESCRIPTORS_AT_ONCE * descriptors.itemsize)
        data, ancillary, _flags, _address = self._sock.recvmsg(READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        self._descriptors += descriptors
        return data


def wait_readable(wakeup: int | None, sock: socket.socket | None, timeout_ns: int) -> bool:
    """Wait until `sock` is readable (True) or the time is over (False).

    Raises `Interrupted` if `wakeup` is readable, and nothing is said about `sock` then.
    """
    poll = select.poll()
    if wakeup is not None:
        poll.register(wakeup, select.POLLIN)
    if sock is not None:
        poll.register(sock, select.POLLIN)
    # Rounded up to milliseconds, lest a loop turns idly in the last one.
    ready = [fd for fd, _ in poll.poll(max(0, -(-timeout_ns // 1_000_000)))]
    if wakeup in ready:
        raise Interrupted
    return bool(ready)


def _wait_for_room(name: str, deadline_ns: int, wakeup: int | None) -> None:
    remaining_ns = deadline_ns - time.monotonic_ns()
    if remaining_ns <= 0:
        raise DaemonUnavailable(name, "it accepts no connection")
    wait_readable(wakeup, None, min(_BUSY_RETRY_NS, remaining_ns))


def _connected(sock: socket.socket, directory: Path, name: str) -> bool:
    """Try once; False if the daemon's queue is full.  By the directory's descriptor: see the server's `_bind`."""
    try:
        directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{directory_fd}/{CONTROL_SOCKET_NAME}")
        finally:
            os.close(directory_fd)
    except BlockingIOError:
        return False
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise DaemonUnavailable(name) from None
    except PermissionError:
        raise Refused(RefusalCode.PERMISSION, f"this user may not use the control socket of '{name}'") from None
    return True
