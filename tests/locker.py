"""A program that locks files as it is told: ``python -m tests.locker``, see :class:`Locker`.

One line of JSON per question, ``[method, arguments]``, and one per answer, ``[result, error]``, where the error is an errno.
SIGUSR1 interrupts a call that waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 30.0
_FLOCK = struct.Struct("=hh4xqqi4x")
SET = {"posix": (fcntl.F_SETLK, fcntl.F_SETLKW), "ofd": (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW)}
GET = {"posix": fcntl.F_GETLK, "ofd": fcntl.F_OFD_GETLK}
KINDS = {"shared": fcntl.F_RDLCK, "exclusive": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}
_WHOLE = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX, "unlock": fcntl.LOCK_UN}


class Locker:
    """The program, to be asked: each method of ``Program`` can be called. A context manager that ends it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.locker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.pid = self.process.pid
        try:
            self.answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def begin(self, method: str, *arguments: Any) -> None:
        """Ask, without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()

    def has_answered(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def answer(self) -> Any:
        """The answer; ``OSError`` if the call has failed."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        assert readable, "no answer: the program hangs"
        line = self.process.stdout.readline()
        assert line, "no answer: the program has died"
        result, number = json.loads(line)
        if number:
            raise OSError(number, os.strerror(number))
        return result

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            self.begin(method, *arguments)
            return self.answer()

        return ask

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.kill()
        self.process.stdout.close()


class Interrupted(Exception):
    """SIGUSR1 came."""


class Program:
    """What can be asked."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._hoarded: list[int] = []

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        self._fds.append(os.open(path, flags | os.O_CLOEXEC))
        return self._fds[-1]

    def dup(self, fd: int) -> int:
        self._fds.append(os.dup(fd))
        return self._fds[-1]

    def close(self, fd: int) -> None:
        self._fds.remove(fd)
        os.close(fd)

    def close_all(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def lock(self, api: str, fd: int, kind: str, start: int = 0, length: int = 0, wait: bool = False) -> bool:
        """False if somebody else has it."""
        try:
            if api == "flock":
                fcntl.flock(fd, _WHOLE[kind] | (0 if wait else fcntl.LOCK_NB))
            else:
                fcntl.fcntl(fd, SET[api][wait], _FLOCK.pack(KINDS[kind], os.SEEK_SET, start, length, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def find(self, api: str, fd: int, kind: str, start: int = 0, length: int = 0) -> list[Any] | None:
        """Kind, start, length and process id of a lock that is in the way."""
        answer = fcntl.fcntl(fd, GET[api], _FLOCK.pack(KINDS[kind], os.SEEK_SET, start, length, 0))
        found, _, start, length, pid = _FLOCK.unpack(answer)
        return None if found == fcntl.F_UNLCK else [{v: k for k, v in KINDS.items()}[found], start, length, pid]

    def read(self, fd: int, size: int) -> str:
        return os.pread(fd, size, 0).decode()

    def in_child(self, method: str, *arguments: Any) -> Any:
        """The same by a forked child, which has the descriptors, and ends."""
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                os.write(writing, json.dumps(_answer(self, method, arguments)).encode())
            os._exit(0)
        os.close(writing)
        with open(reading) as pipe:
            result, number = json.loads(pipe.read())
        os.waitpid(pid, 0)
        if number:
            raise OSError(number, os.strerror(number))
        return result

    def lock_in_thread(self, *arguments: Any) -> None:
        """Waits for a lock beside the questions that follow."""
        self._thread = threading.Thread(target=self.lock, args=(*arguments, True), daemon=True)
        self._thread.start()

    def thread_is_done(self) -> bool:
        return not self._thread.is_alive()

    def hoard(self, path: str, count: int) -> None:
        """So many threads wait for an exclusive lock of the whole file, each as another owner."""
        for _ in range(count):
            threading.Thread(target=self._wait_for_ever, args=(path,), daemon=True).start()

    def _wait_for_ever(self, path: str) -> None:
        with open(path, "rb+") as file:
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            except OSError as error:
                self._hoarded.append(error.errno or 0)
            else:
                self._hoarded.append(0)

    def hoarded(self) -> list[int]:
        """How these have ended, so far: errno or 0."""
        return self._hoarded


def _answer(program: Program, method: str, arguments: list[Any] | tuple[Any, ...]) -> tuple[Any, int]:
    try:
        return getattr(program, method)(*arguments), 0
    except OSError as error:
        return None, error.errno or errno.EIO
    except Interrupted:
        return None, errno.EINTR


def _interrupt(*_: object) -> None:
    raise Interrupted


def main() -> None:
    signal.signal(signal.SIGUSR1, _interrupt)
    program = Program()
    _say((None, 0))
    for line in sys.stdin:
        method, arguments = json.loads(line)
        _say(_answer(program, method, arguments))
    os._exit(0)


def _say(answer: tuple[Any, int]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def waiting_for(path: Path) -> int:
    """How many wait for a lock of this file, which is on a local file system: proc_locks(5)."""
    place = f":{path.stat().st_ino}"
    with open("/proc/locks") as lines:
        return sum("->" in line and any(field.endswith(place) for field in line.split()) for line in lines)


if __name__ == "__main__":
    main()
