"""The two lines from the host into a machine: calls to the runner in the guest, and QEMU's monitor."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tests.vm.frames import READY, Answer, Request, messages, pack

R = TypeVar("R")

CALL_S = 60.0
"""How long an answer may take, unless something else is said: far longer than it does."""


class VmError(Exception):
    """A virtual machine does not do what it should; the message has the end of its console."""


class Pending(Generic[R]):
    """The answer to a call, to come."""

    def __init__(self, runner: RunnerLine, what: str, answers: queue.SimpleQueue[Answer | None]) -> None:
        self._runner, self._what, self._answers = runner, what, answers

    def __call__(self, timeout_s: float = CALL_S) -> R:
        """Wait for it; once. Returns or raises what the function did; VmError if the guest says nothing."""
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise self._runner.problem(f"{self._what} has not come back within {timeout_s:.0f} s") from None
        if answer is None:
            raise self._runner.problem(f"{self._what} has not come back: the guest is gone")
        if answer.problem is not None:
            raise answer.problem
        value: R = answer.value
        return value


class RunnerLine:
    """Calls of functions in the guest; any number at a time. One thread receives the answers."""

    def __init__(self, connection: socket.socket, problem: Callable[[str], VmError]) -> None:
        """`problem` makes a message into an error with what the machine has said."""
        self._connection, self.problem = connection, problem
        connection.settimeout(None)
        self._lock = threading.Lock()
        self._number = 0
        self._waiting: dict[int, queue.SimpleQueue[Answer | None]] = {READY.number: queue.SimpleQueue()}
        self._over = False
        self.ready: Pending[str] = Pending(self, "the start", self._waiting[READY.number])
        self._thread = threading.Thread(target=self._receive, name="vm-runner", daemon=True)
        self._thread.start()

    def start(self, function: Callable[..., R], arguments: tuple[object, ...]) -> Pending[R]:
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        what = f"{getattr(function, '__name__', function)}{arguments!r:.200}"
        with self._lock:
            if self._over:
                raise self.problem(f"{what} cannot be called: the guest is gone")
            self._number += 1
            self._waiting[self._number] = answers
            self._connection.sendall(pack(Request(self._number, function, arguments)))
        return Pending(self, what, answers)

    def _receive(self) -> None:
        try:
            for answer in messages(self._connection.recv):
                with self._lock:
                    waiting = self._waiting.pop(answer.number)
                waiting.put(answer)
        except OSError:  # QEMU was killed, or close() was called
            pass
        with self._lock:
            self._over = True
            for waiting in self._waiting.values():
                waiting.put(None)

    def close(self) -> None:
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._thread.join()
        self._connection.close()


class Monitor:
    """QEMU's machine protocol: one command at a time, events skipped."""

    def __init__(self, connection: socket.socket, problem: Callable[[str], VmError]) -> None:
        self._connection, self._problem = connection, problem
        connection.settimeout(CALL_S)
        self._lines = connection.makefile("rb")
        self._receive()
        self.execute("qmp_capabilities", {})

    def execute(self, command: str, arguments: dict[str, object]) -> Any:
        """The answer; VmError if QEMU refuses or says nothing."""
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise self._problem(f"{command}: {answer['error']}")

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise self._problem("QEMU has closed its monitor")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._lines.close()
        self._connection.close()
