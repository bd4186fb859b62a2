"""The process that echoes, as the agent has it: started, told what to do, waited for with a bound, ended."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, Self

from coherency.fuse import syscalls
from coherency.guest_agent import echo_process

_PACKAGE_ROOT: Final = str(Path(__file__).resolve().parents[2])
_PROGRAM: Final = (
    f"import sys; sys.path.insert(0, {_PACKAGE_ROOT!r}); from coherency.guest_agent.echo_process import main; main()"
)
_START_NS: Final = 10_000_000_000


class EchoHelper:
    """One process. It dies with the thread that started it."""

    def __init__(self, process: subprocess.Popen[bytes], orders: socket.socket) -> None:
        """Use ``start`` instead."""
        self._process, self._orders = process, orders
        self.pid = process.pid

    @classmethod
    def start(cls, mountpoint: str, connection: int, wakeup: int) -> Self:
        """Ready for a job when this returns. Raises ``OSError`` if there can be no further process, or ``wakeup`` can be read."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(mine.close)
            arguments = (theirs.fileno(), os.getpid(), mountpoint, connection)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
            undo.pop_all()
        helper = cls(process, mine)
        with contextlib.suppress(ChildProcessError):
            if helper.answer(_START_NS, wakeup) == 0:
                return helper
        helper.kill()
        helper.reap()
        raise ChildProcessError(errno.ECHILD, "it does not get ready")

    def tell(self, message: bytes) -> None:
        """Give it a job. Nothing happens if it is dead: ``answer`` says so."""
        with contextlib.suppress(OSError):
            self._orders.send(message)

    def answer(self, timeout_ns: int, wakeup: int) -> int | None:
        """The errno of the job, 0 for none. None: it has not answered in time, or ``wakeup`` can be read.

        Raises ``ChildProcessError`` if it is dead.
        """
        ready = syscalls.wait_readable([self._orders.fileno(), wakeup], timeout_ns)
        if self._orders.fileno() not in ready:
            return None
        with contextlib.suppress(OSError):
            if message := self._orders.recv(echo_process.answer.size):
                number: int = echo_process.answer.unpack(message)[0]
                return number
        raise ChildProcessError("the process that echoes has died")

    def kill(self) -> None:
        """It ends as soon as the kernel lets it, whatever it does."""
        self._orders.close()
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGKILL)  # not by way of Popen, which would reap it if it is dead

    def has_ended(self, timeout_ns: int = 0) -> bool:
        """Whether it has, waiting for that; its number is still its own."""
        if self._process.returncode is not None:
            return True
        process = os.pidfd_open(self.pid)
        try:
            return bool(syscalls.wait_readable([process], timeout_ns))
        finally:
            os.close(process)

    def reap(self) -> None:
        """Free its number: it has ended."""
        self._process.wait()
