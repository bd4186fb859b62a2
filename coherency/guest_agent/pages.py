"""What the kernel of a guest has in memory of files, for who has got a lock: he reads what others wrote before they let it go.

Without that the kernel looks at size and time of a file only, and these may be the same.

1. Pages are dropped before the lock is answered. That waits until those that are being read or written just now are done, for
   which other threads of the session are needed. So only a few do it at a time.
2. Who does not get his turn in time goes on without: the pages are then as good as without locks.
"""

from __future__ import annotations

import threading
from typing import Final

from coherency.fuse.notifications import Notifications
from coherency.ids import NodeId

_MOST_AT_A_TIME: Final = 32
_PATIENCE_S: Final = 1.0


class Pages:
    """The pages of one mount. Thread-safe."""

    def __init__(self) -> None:
        self._kernel: Notifications | None = None
        self._turns = threading.BoundedSemaphore(_MOST_AT_A_TIME)

    def belong_to(self, kernel: Notifications) -> None:
        """There is a mount now: nothing was in anybody's memory before."""
        self._kernel = kernel

    def drop(self, node_id: NodeId) -> None:
        """The kernel reads the file anew (rule 2)."""
        if self._kernel is not None and self._turns.acquire(timeout=_PATIENCE_S):
            try:
                self._kernel.invalidate_inode(node_id, 0, 0)
            finally:
                self._turns.release()
