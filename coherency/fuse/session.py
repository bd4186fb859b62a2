"""A mounted FUSE connection: threads that read requests, hand each to its operation, and write the reply.

1. A thread handles one request from its reading to its reply; there is no queue in between.
2. While requests are answered there is always a thread left that reads: the one that takes the last reading thread's
   place is started before the operation runs (up to ``max_threads``), so that operations may wait for each other.
3. An operation answers with bytes (a list of pieces), raises ``OSError`` (its errno goes to the caller), or returns
   ``NO_REPLY``. A number that no system call takes is EINVAL. Anything else that is raised is a bug of ours: logged with
   its traceback, EIO for the caller.
4. Every request that the kernel waits for gets exactly one reply.
5. A quick operation answers from memory: it waits for nobody who waits for a request, and makes no system call, so the
   thread that runs it counts as one that reads. What it does not know (None) takes the ordinary way with the same bytes.
6. A reply may be put together when it is written (``Deferred``), under a lock of who answers; nothing waits for a request
   while holding that lock.
7. When the connection is over, operations that still wait are told that their callers have given up.

Source: fuse(4), Documentation/filesystems/fuse.rst of the kernel.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from coherency.errors import FuseProtocolError, MountError
from coherency.fuse import abi, codec, replies, syscalls
from coherency.fuse.abi import InitFlag, Opcode
from coherency.fuse.codec import Request
from coherency.fuse.mounts import FILE_SYSTEM_TYPE, detach, mount_at, mounts, send_dirty_pages
from coherency.fuse.notifications import Notifications

log = logging.getLogger(__name__)


class Deferred:
    """A reply that is not finished before it is written, for who must hold a lock over the last look and the writing."""

    __slots__ = ()

    def finish(self, send: Callable[[bytes], None]) -> None:
        """Call ``send`` with the payload, exactly once. When that returns, the kernel has the reply; nobody else writes it."""
        raise NotImplementedError


NO_REPLY: Final[list[bytes]] = []
Reply: TypeAlias = Sequence[bytes]
Operation: TypeAlias = Callable[[Request], Reply | Deferred]
QuickOperation: TypeAlias = Callable[[int, memoryview, int], bytes | int | Deferred | None]
"""Node id, body and the caller's thread id to payload, or a positive errno, or None: rule 5."""

MAX_WRITE_BYTES: Final = 1 << 20
_MAX_PAGES: Final = MAX_WRITE_BYTES // 4096
_MAX_BACKGROUND: Final = 64
_unpack_header: Final = abi.in_header.unpack_from
_IN_HEADER_BYTES: Final = abi.in_header.size
_INTERRUPT: Final = int(Opcode.INTERRUPT)
_DESTROY: Final = int(Opcode.DESTROY)
_COPY_BELOW_BYTES: Final = 4096  # a reply is put together in one piece below this size, and written in pieces above
_NOTHING_READ: Final = (errno.ENOENT, errno.EINTR, errno.EAGAIN)  # ENOENT: the request was withdrawn
_QUIET_LOOKS: Final = 5
_LOOK_AGAIN_S: Final = 0.005
_GONE: Final = (errno.ENODEV, errno.ECONNABORTED, errno.EBADF)
_ALWAYS_WANTED: Final = (
    InitFlag.ASYNC_READ | InitFlag.ATOMIC_O_TRUNC | InitFlag.BIG_WRITES | InitFlag.DONT_MASK | InitFlag.AUTO_INVAL_DATA
    | InitFlag.PARALLEL_DIROPS | InitFlag.POSIX_ACL | InitFlag.ABORT_ERROR | InitFlag.MAX_PAGES | InitFlag.ASYNC_DIO
    | InitFlag.HANDLE_KILLPRIV_V2 | InitFlag.SETXATTR_EXT | InitFlag.INIT_EXT
)  # fmt: skip


class FileSystem(Protocol):
    """What a session serves."""

    @property
    def operations(self) -> Mapping[int, Operation]:
        """Opcode to operation; what is missing is answered with ENOSYS."""

    @property
    def quick_operations(self) -> Mapping[int, QuickOperation]:
        """Opcode to quick operation, for what can often be answered from memory."""

    @property
    def init_flags(self) -> InitFlag:
        """What it wants of the kernel beside what every session wants."""

    def close(self) -> None:
        """The connection is over: no operation runs any more, none will."""


@dataclass(frozen=True)
class SessionStatistics:
    requests: int  # since the mount, without FORGET
    in_flight: int
    threads: int
    protocol_minor: int


class Session(Notifications):
    """One mount. ``mount()`` makes it, ``start()`` serves it, ``close()`` unmounts it; ``wait()`` returns when it is over."""

    def __init__(self, device: int, mountpoint: str, file_system: FileSystem, *, name: str, max_threads: int) -> None:
        super().__init__(device)
        self.mountpoint = mountpoint
        self._places = [mountpoint]
        self.connection = 0  # the number under /sys/fs/fuse/connections
        self.protocol_minor = 0
        self._file_system, self._name, self._max_threads = file_system, name, max_threads
        self._operations = dict(file_system.operations)
        self._quick_operations = dict(file_system.quick_operations)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._reading = 0
        self._ever_started = 0
        self._in_flight: dict[int, Request] = {}
        self._requests = 0
        self._setxattr_ext = False
        self._over = threading.Event()
        self._closing = False
        self._ended = False

    # ---- life ----

    @classmethod
    def mount(
        cls, mountpoint: str, file_system: FileSystem, *, source: str, name: str = "fuse", max_threads: int = 64
    ) -> Session:
        """Mount ``file_system`` on the directory ``mountpoint`` and agree with the kernel on the protocol.

        Requests are answered from ``start()`` on; until then they wait. The kernel checks permissions by mode bits and
        ACLs (default_permissions), and every user may enter (allow_other). Raises :class:`MountError` with a reason
        that the operator can act on.
        """
        try:
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(
                f"cannot open /dev/fuse ({error.strerror}): is the fuse module loaded, are you root?"
            ) from error
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
        session = cls(device, os.path.realpath(mountpoint), file_system, name=name, max_threads=max_threads)
        try:
            syscalls.mount(source, mountpoint, FILE_SYSTEM_TYPE, syscalls.MS_NODEV, options)
        except OSError as error:
            os.close(device)
            raise MountError(
                f"cannot mount on {mountpoint}: {error.strerror} (mounting needs CAP_SYS_ADMIN)"
            ) from error
        try:
            # The device number of a FUSE mount is its connection's number; asked of /proc, since stat would ask ourselves.
            own = mount_at(session.mountpoint)
            if own is None:
                raise MountError(f"{mountpoint} has been unmounted already")
            session.connection = own.device
            session._handshake()
        except BaseException:
            session._detach()
            os.close(device)
            raise
        return session

    def _handshake(self) -> None:
        buffer = bytearray(abi.MIN_READ_BUFFER_BYTES)
        request = codec.decode(memoryview(buffer)[: os.readv(self._device, [buffer])])
        if request.opcode != Opcode.INIT:
            raise MountError(f"the kernel began with request {request.opcode} instead of INIT")
        init: codec.Init = request.body
        if init.major != abi.KERNEL_VERSION or init.minor < abi.OLDEST_MINOR_VERSION:
            self._write(request.unique, (), errno.EPROTO)
            raise MountError(
                f"the kernel speaks FUSE {init.major}.{init.minor}; {abi.KERNEL_VERSION}.{abi.OLDEST_MINOR_VERSION} (Linux 5.4) is needed"
            )
        offered = InitFlag(init.flags)
        wanted = _ALWAYS_WANTED | self._file_system.init_flags
        # Knowing whether names can be expired is all there is to it; the reply may not claim it.
        self.init_flags = offered & (wanted | InitFlag.HAS_EXPIRE_ONLY)
        self._setxattr_ext = InitFlag.SETXATTR_EXT in self.init_flags
        self.protocol_minor = min(init.minor, abi.KERNEL_MINOR_VERSION)
        reply = replies.encode_init_out(
            self.protocol_minor, init.max_readahead, int(offered & wanted),
            max_write_bytes=MAX_WRITE_BYTES, max_pages=_MAX_PAGES, max_background=_MAX_BACKGROUND,
        )  # fmt: skip
        self._write(request.unique, (reply,))

    def start(self) -> None:
        """Begin to answer."""
        self._start_thread()

    def bind(self, place: str) -> None:
        """Let the same file system be seen at the directory ``place``, too, until it ends. ``MountError`` if that cannot be."""
        place = os.path.realpath(place)
        try:
            syscalls.mount(self.mountpoint, place, "none", syscalls.MS_BIND, "")
        except OSError as error:
            raise MountError(f"cannot mount on {place}: {error.strerror} (mounting needs CAP_SYS_ADMIN)") from error
        self._places.append(place)

    def is_everywhere(self) -> bool:
        """Whether it is still what is seen at each of its places. Asks no file system."""
        seen = {mount.path: mount.device for mount in mounts()}  # the youngest at a path is the one that is seen
        return all(seen.get(os.fsencode(place)) == self.connection for place in self._places)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until the connection is over (unmounted by anybody, or aborted); false if it is not within ``timeout_s``."""
        return self._over.wait(timeout_s)

    def close(self, *, grace_s: float = 5.0) -> None:
        """Write dirty pages, unmount, and wait for the threads. Who still uses the mount gets errors from now on, not a hang.

        Safe to call twice, and after somebody else has unmounted. What somebody has mounted on top stays, and so does
        the mount below it.
        """
        with self._lock:
            first, self._closing = not self._closing, True
        if first and not self._over.is_set():
            if self._ever_started:
                flusher = threading.Thread(target=self._flush_dirty_pages, daemon=True, name=f"{self._name}-flush")
                flusher.start()
                flusher.join(grace_s)
            if not self._detach():
                return
            if not self._ever_started:
                self._finish()
        elif first and not self.is_gone:
            self._detach()  # an aborted connection is over, its mount is still there
        self._over.wait(grace_s)
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(grace_s)

    def _flush_dirty_pages(self) -> None:
        try:
            send_dirty_pages(self.mountpoint)
        except OSError as error:
            log.warning("dirty pages of %s could not be written: %s", self.mountpoint, error)
        self._wait_for_writes()

    def _wait_for_writes(self) -> None:
        # One that a thread has read, and not noted yet, shows neither in the device nor in our list: hence several looks.
        device, quiet = select.poll(), 0
        device.register(self._device, select.POLLIN)
        while quiet < _QUIET_LOOKS:
            writing = any(request.opcode == Opcode.WRITE for request in self.unanswered())
            quiet = 0 if writing or device.poll(0) else quiet + 1
            if self._over.wait(_LOOK_AGAIN_S):
                return

    def _detach(self) -> bool:
        """False: a mount stays, since another one lies on it."""
        gone = [detach(place, self.connection) for place in reversed(self._places)]
        return all(gone)

    # ---- serving ----

    def _start_thread(self) -> None:
        """With or without the lock: only ``start`` and the thread that found nobody reading come here."""
        self._reading += 1
        self._ever_started += 1
        thread = threading.Thread(target=self._serve, name=f"{self._name}-{self._ever_started}", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self._reading -= 1
            self._threads.discard(thread)
            raise

    def _start_another_thread(self) -> None:
        try:
            self._start_thread()
        except (RuntimeError, MemoryError) as error:
            log.warning("no more than %d threads for %s: %s", len(self._threads), self.mountpoint, error)

    def _serve(self) -> None:
        device, lock = self._device, self._lock
        try:
            buffer = mmap.mmap(-1, MAX_WRITE_BYTES + 4096)  # takes as much memory as the longest request that came
            view, buffers = memoryview(buffer), [buffer]
            while True:
                try:
                    count = os.readv(device, buffers)
                except OSError as error:
                    if error.errno in _NOTHING_READ:
                        continue
                    if error.errno not in _GONE:
                        log.error("cannot read requests for %s: %s", self.mountpoint, error)
                    break
                if not count:
                    break  # the end of a connection that is no device
                if self._answer_quickly(view[:count]):
                    continue
                with lock:
                    self._reading -= 1
                    if not self._reading and len(self._threads) < self._max_threads:
                        self._start_another_thread()
                try:
                    self._handle(view[:count])
                finally:
                    with lock:
                        self._reading += 1
            self._ended = True  # before the look: pairs with the look at it in _handle, after noting the request
            for request in self.unanswered():
                request.interrupt()
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._reading -= 1
            self._threads.discard(threading.current_thread())
            if self._threads:
                return
        self._finish()

    def _finish(self) -> None:
        try:
            self._file_system.close()
        finally:
            self.is_gone = self.is_unknown()
            device, self._device = self._device, -1  # who still has something to notify finds nothing
            os.close(device)
            self._over.set()

    def _answer_quickly(self, message: memoryview) -> bool:
        """Rule 5: whether the message was a request that a quick operation has answered."""
        try:
            length, opcode, unique, node, _, _, pid, extensions, _ = _unpack_header(message)
            operation = self._quick_operations.get(opcode)
            if operation is None or extensions or length != len(message):
                return False
            answer = operation(node, message[_IN_HEADER_BYTES:], pid)
        except Exception:  # noqa: BLE001 - too short, or a bug: the ordinary way finds out and says so
            return False
        if answer is None:
            return False
        self._requests += 1
        if isinstance(answer, bytes):
            self._write(unique, (answer,))
        elif isinstance(answer, int):
            self._write(unique, (), answer)
        else:
            self._finish_reply(unique, answer)
        return True

    def _handle(self, message: memoryview) -> None:
        try:
            request = codec.decode(message, setxattr_ext=self._setxattr_ext)
        except FuseProtocolError as error:
            log.error("malformed request: %s", error)
            unique = codec.unique_of(message)
            if unique:
                self._write(unique, (), errno.EINVAL)
            return
        unique, opcode = request.unique, request.opcode
        if opcode == _INTERRUPT:
            self._interrupt(request)
            return
        operation = self._operations.get(opcode)
        if operation is None or request.body is None:
            self._requests += 1
            self._write(unique, (), 0 if opcode == _DESTROY else errno.ENOSYS)
            return
        self._in_flight[unique] = request
        request.interrupted = self._ended
        number, reply = 0, NO_REPLY  # type: tuple[int, Reply | Deferred]
        try:
            reply = operation(request)
        except OSError as error:
            number = error.errno or errno.EIO
        except MemoryError:
            number = errno.ENOMEM
        except OverflowError:  # a number that no system call takes
            number = errno.EINVAL
        except Exception:
            log.exception("operation %s failed", request)
            number = errno.EIO
        finally:
            del self._in_flight[unique]
        if isinstance(reply, Deferred):
            self._requests += 1
            self._finish_reply(unique, reply)
        elif number or reply is not NO_REPLY:
            self._requests += 1
            self._write(unique, reply, number)

    def _finish_reply(self, unique: int, reply: Deferred) -> None:
        written = False

        def send(payload: bytes) -> None:
            nonlocal written
            written = True
            self._write(unique, (payload,))

        try:
            reply.finish(send)
        except Exception:
            log.exception("operation %s failed", reply)
        if not written:
            self._write(unique, (), errno.EIO)

    def _write(self, unique: int, pieces: Reply, error: int = 0) -> None:
        try:
            if error:
                os.write(self._device, replies.reply_header(unique, 0, error))
                return
            payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            header = replies.reply_header(unique, len(payload))
            if len(payload) < _COPY_BELOW_BYTES:
                os.write(self._device, header + payload)
            else:
                os.writev(self._device, (header, payload))
        except OSError as problem:
            # ENOENT: the caller does not wait any more (the connection is being aborted).
            if problem.errno not in (errno.ENOENT, *_GONE):
                log.error("reply to %d refused by the kernel: %s", unique, problem)

    def _interrupt(self, request: Request) -> None:
        target = self._in_flight.get(request.body.unique)
        if target is None:
            # Not read yet by any thread, or answered already: the kernel asks again in the first case only.
            self._write(request.unique, (), errno.EAGAIN)
            return
        target.interrupt()

    # ---- inspection ----

    def unanswered(self) -> Sequence[Request]:
        """The requests whose operations run now. Who is in two such lists has not been answered in between."""
        return list(self._in_flight.values())

    def statistics(self) -> SessionStatistics:
        """A snapshot. Counters are kept without a lock: they are for people, and no guarantee rests on them."""
        with self._lock:
            threads = len(self._threads)
        return SessionStatistics(self._requests, len(self._in_flight), threads, self.protocol_minor)

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._lock:
            if not self._over.is_set():
                assert 0 <= self._reading <= len(self._threads) <= self._max_threads, self.statistics()
