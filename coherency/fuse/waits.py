"""System calls that wait until somebody outside lets go, each ended when its caller gives up.

1. A wait takes one thread of its session until it is over. So there are at most so many at a time as the session can spare;
   who comes on top of that gets ENOLCK, and nobody else is kept waiting.
2. What ends a system call is a signal to its thread. It may come just before the call begins to wait, so it is repeated
   until the call has returned.
3. The signal is blocked outside the call: nothing else that the thread does is ever disturbed by it.

The signal is SIGURG: ignored unless somebody asks for it, and hardly anybody does.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Final

from coherency.fuse import syscalls
from coherency.fuse.codec import Request

_SIGNAL: Final = signal.SIGURG
_REPEAT_S: Final = 0.005


class Wait:
    """The wait of one request; see :meth:`Waits.begin`. Its methods belong to the thread that began it, except ``kick``."""

    def __init__(self, request: Request, changed: threading.Condition) -> None:
        self.thread = threading.get_ident()
        self.inside = self.kicked = False  # both under the condition
        self._request, self._changed = request, changed

    def arm(self) -> None:
        """From now on a kick ends the next call. ``InterruptedError`` if the caller has given up."""
        with self._changed:
            self.kicked = False
        if self._request.interrupted:  # noted before it kicks
            raise InterruptedError(errno.EINTR, "the caller has given up")

    def call(self, function: Callable[[], object]) -> bool:
        """Whether ``function`` has returned: false if a kick, or anything else, has ended it."""
        with self._changed:
            if self.kicked:
                return False
            self.inside = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (_SIGNAL,))
        try:
            function()
        except InterruptedError:
            return False
        else:
            return True
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, (_SIGNAL,))
            with self._changed:
                self.inside = False

    def kick(self) -> None:
        """End the call, now or as soon as it begins. From any thread."""
        with self._changed:
            self.kicked = True
            self._changed.notify_all()


class Waits:
    """All waits of one mount. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._waits: set[Wait] = set()
        self._interrupter: threading.Thread | None = None

    @contextlib.contextmanager
    def begin(self, request: Request) -> Iterator[Wait]:
        """The request's thread waits inside. ENOLCK by rule 1."""
        wait = Wait(request, self._changed)
        with self._changed:
            if len(self._waits) >= self._most:
                raise OSError(errno.ENOLCK, f"{self._most} requests wait for locks already")
            if self._interrupter is None:
                self._start_interrupter()
            self._waits.add(wait)
        request.on_interrupt = wait.kick
        try:
            yield wait
        finally:
            request.on_interrupt = None
            with self._changed:
                self._waits.discard(wait)
                self._changed.notify_all()

    def _start_interrupter(self) -> None:
        syscalls.let_signal_interrupt(_SIGNAL)
        interrupter = threading.Thread(target=self._interrupt, name="interrupter", daemon=True)
        try:
            interrupter.start()
        except RuntimeError as error:
            raise OSError(errno.ENOLCK, "no thread is left to end a wait") from error
        self._interrupter = interrupter

    def _interrupt(self) -> None:
        """Rule 2, as long as anybody waits."""
        with self._changed:
            while self._waits:
                kicked = [wait for wait in self._waits if wait.kicked and wait.inside]
                for wait in kicked:
                    signal.pthread_kill(wait.thread, _SIGNAL)
                self._changed.wait(_REPEAT_S if kicked else None)
            self._interrupter = None

    def __len__(self) -> int:
        return len(self._waits)
