"""Mounts of ``tests.dropping_server``, and what their kernel has cached."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar

from tests import dropping_server, mounts
from tests.passthrough import TIMEOUT_S, Served

_SYS_OPENAT2 = 437
_RESOLVE_CACHED = 0x20
_libc = ctypes.CDLL(None, use_errno=True)


class Dropping(Served):
    """Paths are relative to the directory."""

    server: ClassVar[ModuleType] = dropping_server
    descriptor_options: ClassVar[tuple[str, ...]] = ("channel",)
    killed = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.killed:
            super().__exit__(kind, error, trace)
            return
        mounts.detach(self.mountpoint)

    def kill(self) -> None:
        """SIGKILL to the agent, and reap it."""
        self.killed = True
        self.process.kill()
        assert self.process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def warm(self, *paths: str | bytes) -> None:
        """Let the kernel know the names, their directories and all attributes."""
        for path in paths:
            for step in (*reversed(Path(os.fsdecode(path)).parents), Path(os.fsdecode(path))):
                os.lstat(self.mountpoint / step)
            assert self.is_cached(path), path

    def is_cached(self, path: str | bytes) -> bool:
        """Whether the kernel has the name without asking anybody. The name is not waited for, the directory may be."""
        parent, name = os.path.split(os.fsencode(self.mountpoint) + b"/" + os.fsencode(path))
        directory = os.open(parent, os.O_PATH)
        try:
            os.fstat(directory)  # without its attributes, which looking it up has taken away, the kernel finds nothing in it
            return is_cached(directory, name)
        finally:
            os.close(directory)

    def drop(self, *paths: str | bytes) -> bool:
        return bool(self.ask("drop", *map(os.fsdecode, paths)))

    def begin_drop(self, *paths: str) -> Callable[[float], bool | None]:
        """Returns a function that waits so many seconds for the outcome; None: it is under way."""
        number = self.ask("begin_drop", *paths)
        return lambda within_s: self.ask("outcome", number, within_s)

    def logged(self) -> str:
        return self._log.read_text()

    def pool(self) -> dict[str, int]:
        return dict(self.ask("pool"))


def is_cached(directory: int, name: bytes) -> bool:
    how = struct.pack("=QQQ", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_CACHED)
    fd = _libc.syscall(ctypes.c_long(_SYS_OPENAT2), ctypes.c_long(directory), name, how, ctypes.c_size_t(len(how)))
    if fd >= 0:
        os.close(fd)
        return True
    assert ctypes.get_errno() == errno.EAGAIN, os.strerror(ctypes.get_errno())
    return False


def dropping(directory: Path, **options: Any) -> Dropping:
    """A new empty share and its mount, below ``directory``."""
    share, mountpoint = directory / "share", directory / "mounted"
    share.mkdir()
    mountpoint.mkdir()
    return Dropping(share, mountpoint, log=directory / "server.log", **options)


class Call:
    """A call by a thread of its own, since it is about to wait."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._outcome: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        self._tid = threading.get_native_id()
        try:
            self._outcome.append(function())
        except OSError as error:
            self._outcome.append(errno.errorcode[error.errno or 0])

    def result(self) -> Any:
        """What it has returned, or the name of its errno."""
        self._thread.join(TIMEOUT_S)
        assert self._outcome, "it hangs"
        return self._outcome[0]

    @property
    def is_over(self) -> bool:
        return bool(self._outcome)

    def sleeps_in(self) -> str:
        """The function of the kernel in which the thread sleeps."""
        return sleeps_in(self._tid)


def sleeps_in(tid: int) -> str:
    try:
        return Path(f"/proc/{tid}/wchan").read_text()
    except OSError:
        return ""
