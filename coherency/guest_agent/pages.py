"""What the kernel of a guest has in memory of files: made to forget it, where size and time of the file do not tell it to.

Dropping pages waits until those that are being read or written just now are done, for which threads of the session are needed.

1. Who has got a lock reads what others wrote before they let it go: pages are dropped before the lock is answered (``Pages``).
   Only a few requests do so at a time. Who does not get his turn in time goes on without: the pages are then as good as
   without locks.
2. Pages of what was recalled are dropped later, by a thread of its own (``RecalledPages``), and not before the inode has been left alone
   for a moment. Who was told that a change is over may read just now, and his kernel ask for the size; if it is made to
   forget something of the inode before it has taken the answer, it throws that away, and the read ends where the file ended
   before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from coherency.ids import NodeId

log = logging.getLogger(__name__)

LEFT_ALONE_NS: Final = 20_000_000
"""So long after the last recall of an inode: a reader that looked right after it has long got its answer."""
AT_THE_LATEST_NS: Final = 1_000_000_000
"""So long after the first recall, if there is one after the other: a mapping must not be old for ever."""
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

    def __init__(self, kernel: Kernel, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._kernel, self._clock_ns = kernel, clock_ns
        self._changed = threading.Condition()
        self._waiting: dict[NodeId, tuple[int, int]] = {}  # first recalled, to be dropped: the earliest first
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="recalled-pages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, unless it waits for I/O: then it ends with that. Before the mount goes."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def drop_later(self, node: NodeId) -> None:
        """The inode was recalled."""
        with self._changed:
            now_ns = self._clock_ns()
            first_ns, _ = self._waiting.get(node, (now_ns, 0))
            if now_ns + LEFT_ALONE_NS > first_ns + AT_THE_LATEST_NS:
                return  # it keeps its time
            if node not in self._waiting and len(self._waiting) >= _MOST_WAITING:
                log.debug("the pages of node %d are not dropped", node)  # who reads finds another size or time, all the same
                return
            self._waiting.pop(node, None)
            self._waiting[node] = (first_ns, now_ns + LEFT_ALONE_NS)
            if len(self._waiting) == 1:  # else the thread waits for an earlier one
                self._changed.notify()

    def _run(self) -> None:
        while (node := self._next()) is not None:
            self._kernel.invalidate_inode(node, 0, 0)

    def _next(self) -> NodeId | None:
        """Waits for the next that is due; None: closing."""
        with self._changed:
            while not self._closing:
                node, (_, due_ns) = next(iter(self._waiting.items()), (None, (0, 0)))
                wait_ns = due_ns - self._clock_ns()
                if node is not None and wait_ns <= 0:
                    del self._waiting[node]
                    return node
                self._changed.wait(None if node is None else wait_ns / 1e9)
            return None
