"""What the kernel of a guest has in memory of files: made to forget it, where size and time of the file do not tell it to.

Dropping pages waits until those that are being read or written just now are done, for which threads of the session are needed.

1. Who has got a lock reads what others wrote before they let it go: pages are dropped before the lock is answered (``Pages``).
   Only a few requests do so at a time. Who does not get his turn in time goes on without: the pages are then as good as
   without locks.
2. Pages of an open file that was recalled are dropped by a thread of its own (``RecalledPages``), which is waited for before the
   ack, but only for a moment. The first thing that the kernel does is what makes it throw away the answers about this inode that are on
   their way: who looks after the ack must not be met by that, or he is shown an old size or let in by old permissions. What
   it may wait for comes after that. What is not open needs no such care: the next open drops its pages.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Final, Protocol

from coherency.ids import NodeId

log = logging.getLogger(__name__)

PATIENCE_S: Final = 0.05
"""How long an ack waits for pages: they take some microseconds, unless one of them is just being read or written."""
_MOST_WAITING: Final = 1 << 16
_CLOSE_S: Final = 1.0
_MOST_AT_A_TIME: Final = 32
_PATIENCE_S: Final = 1.0


class Kernel(Protocol):
    """What is needed of a session."""

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool: ...


class Pages:
    """The pages of one mount. Thread-safe."""

    def __init__(self) -> None:
        self._kernel: Kernel | None = None
        self._turns = threading.BoundedSemaphore(_MOST_AT_A_TIME)

    def belong_to(self, kernel: Kernel) -> None:
        """There is a mount now: nothing was in anybody's memory before."""
        self._kernel = kernel

    def drop(self, node_id: NodeId) -> None:
        """The kernel reads the file anew (rule 2)."""
        if self._kernel is not None and self._turns.acquire(timeout=_PATIENCE_S):
            try:
                self._kernel.invalidate_inode(node_id, 0, 0)
            finally:
                self._turns.release()


class RecalledPages:
    """The pages of what was recalled (rule 2). Thread-safe; the thread ends with ``close``."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._changed = threading.Condition()
        self._waiting: deque[NodeId] = deque()
        self._given = self._done = 0
        self._is_stuck = self._closing = False
        self._thread = threading.Thread(target=self._run, name="recalled-pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, unless it waits for I/O: then it ends with that. Before the mount goes."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)

    def drop(self, node: NodeId) -> None:
        """Begin with it as soon as those that were given before are done."""
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:  # who reads finds another size or time, all the same
                log.debug("the pages of node %d are not dropped", node)
                return
            self._waiting.append(node)
            self._given += 1
            self._changed.notify_all()

    def await_begun(self) -> None:
        """Until those that were given are done, or one of them has had so much time that it is waiting for I/O."""
        with self._changed:
            given = self._given
            if not self._is_stuck:
                self._is_stuck = not self._changed.wait_for(lambda: self._done >= given or self._closing, PATIENCE_S)

    def _run(self) -> None:
        while (node := self._next()) is not None:
            self._kernel.invalidate_inode(node, 0, 0)
            with self._changed:
                self._done += 1
                self._is_stuck = False
                self._changed.notify_all()

    def _next(self) -> NodeId | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return None if self._closing else self._waiting.popleft()
