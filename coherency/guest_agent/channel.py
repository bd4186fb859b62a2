"""One connection to a daemon: finds the socket, carries messages, keeps the descriptors that came with them.

What carries the bytes is a `Stream`: a socket, or in a virtual machine a serial port (`virtual_machine`). Every wait ends: with
the answer, at its deadline, when the daemon hangs up, or when `wakeup` becomes readable. A frame that did not fit as a whole is
finished by whoever sends or receives next.
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
from typing import Final, NamedTuple, Protocol

from coherency.errors import DaemonUnavailable, ProtocolVersionError, Refused
from coherency.protocol import (
    Message,
    Refusal,
    RefusalCode,
    encode,
)
from coherency.protocol_stream import Decoder
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


class Stream(Protocol):
    """What carries the bytes of a connection, without ever waiting: where a call would have to, it raises `BlockingIOError`."""

    def fileno(self) -> int: ...
    def write(self, data: bytes) -> int:
        """Take the first bytes of `data`; returns how many."""

    def read(self, *, with_descriptors: bool) -> tuple[bytes, list[int]]:
        """What has arrived, and the descriptors that came with it; no bytes: the other end is closed."""

    def hang_up(self) -> None:
        """Wake who waits for something to read, if that is possible.  From any thread."""

    def close(self) -> None: ...


class SocketStream:
    """A connected Unix socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fileno, self.close, self.write = sock.fileno, sock.close, sock.send

    def read(self, *, with_descriptors: bool) -> tuple[bytes, list[int]]:
        """See `Stream`.  The kernel closes descriptors for which there is no room."""
        descriptors = array.array("i")
        room = socket.CMSG_LEN(_DESCRIPTORS_AT_ONCE * descriptors.itemsize) if with_descriptors else 0
        data, ancillary, _flags, _address = self._sock.recvmsg(READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        return data, list(descriptors)

    def hang_up(self) -> None:
        """See `Stream`."""
        with contextlib.suppress(OSError):  # the daemon was faster, or the channel is closed
            self._sock.shutdown(socket.SHUT_RDWR)


class Channel:
    """A connection.  One thread receives; any thread may send."""

    def __init__(self, stream: Stream, name: str, wakeup: int | None) -> None:
        """Use `dial` instead.  `wakeup` stays the caller's."""
        self._stream = stream
        self._name = name
        self._wakeup = wakeup
        self._decoder = Decoder()
        self._unsent = b""
        self._arrived: list[Message] = []
        self._descriptors: list[int] = []
        self._send_lock = threading.Lock()
        self._hung_up = False
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
        return cls(SocketStream(sock), name, wakeup)

    def hunt(self) -> None:
        """The stream is a serial line: it may begin with what was meant for others, in the middle of a frame."""
        self._decoder.hunt()

    def send(self, message: Message) -> None:
        """Send one message without waiting.

        Raises `ConnectionError` if the daemon is gone, or has left so much unread that there is no room for the frame.
        """
        if not self._send(encode(message)):
            raise ConnectionAbortedError("the daemon does not read")

    def offer(self, message: Message) -> bool:
        """Send one message without waiting, or nothing: False if there is no room, or the daemon is gone."""
        try:
            return self._send(encode(message))
        except ConnectionError:
            return False  # the receiving thread finds out

    def _send(self, frame: bytes) -> bool:
        with self._send_lock:
            self._flush()
            if self._unsent:
                return False
            before = self._sent_bytes
            self._unsent = frame
            self._flush()
            if self._sent_bytes == before:
                self._unsent = b""  # nothing of it has left
                return False
        return True

    def _flush(self) -> None:
        """Send what is left of a frame, as far as there is room.  With the send lock."""
        try:
            while self._unsent:
                sent = self._stream.write(self._unsent)
                self._unsent = self._unsent[sent:]
                self._sent_bytes += sent
        except BlockingIOError:
            return
        except OSError as error:  # also the channel closed by another thread
            self._unsent = b""
            raise ConnectionAbortedError(f"the daemon is gone: {error.strerror}") from error

    def fileno(self) -> int:
        """The descriptor of the connection, for who must share it."""
        return self._stream.fileno()

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
        if self._unsent:
            with self._send_lock:
                self._flush()
        is_readable = wait_readable(self._wakeup, self._stream, deadline_ns - time.monotonic_ns())
        if self._hung_up:
            raise ConnectionAbortedError("it was given up")
        if not is_readable:
            return []
        try:
            data, descriptors = self._stream.read(with_descriptors=with_descriptors)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionAbortedError(f"the daemon is gone: {error.strerror}") from error
        self._descriptors += descriptors
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
        """Make the receiving thread, whichever it is, see the end of the stream, when it looks again at the latest.  From any thread."""
        self._hung_up = True
        self._stream.hang_up()

    def close(self) -> None:
        """Close the connection and what nobody took.  May be called again; not while another thread receives."""
        with self._send_lock:  # nobody may write to a number that is another file's by then
            self._stream.close()
        for descriptor in self.take_descriptors():
            os.close(descriptor)

    def statistics(self) -> ChannelStatistics:
        """A frozen copy of the counters."""
        return ChannelStatistics(self._messages, self._decoder.statistics().received_bytes, self._sent_bytes)

    def check(self) -> None:
        """Assert the decoder's invariants; from the receiving thread."""
        self._decoder.check()


def wait_readable(wakeup: int | None, stream: Stream | None, timeout_ns: int) -> bool:
    """Wait until `stream` is readable (True) or the time is over (False).

    Raises `Interrupted` if `wakeup` is readable, and nothing is said about `stream` then.
    """
    poll = select.poll()
    if wakeup is not None:
        poll.register(wakeup, select.POLLIN)
    if stream is not None:
        poll.register(stream, select.POLLIN)
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
