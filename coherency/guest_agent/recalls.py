"""Makes the kernel of a guest forget what was granted: because the daemon says so, or for a change of the guest's own.

1. First nothing more is granted (``Grants.revoke``), then the kernel is made to forget, then what it has forgotten is struck out of
   the books; the grant lock is not held meanwhile.
2. Attributes go by a notification that waits for nobody. Names are dropped by helper processes, which takes a few
   hundred microseconds and needs threads that answer their requests; never by a notification, since those wait for the
   lock of the directory, which a caller may hold whose change waits for this very recall.
3. If names cannot be dropped in time, all names of the kernel are (INC_EPOCH), where it offers that. Else they are not
   forgotten, and nobody is told that they were: the lease decides.
4. Pages of open files are dropped, too (``coherency.guest_agent.pages``, rule 2).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from coherency.fuse.codec import Request
from coherency.guest_agent import pages
from coherency.guest_agent.grants import GrantedName, Grants, Revoked
from coherency.ids import GrantKey, NodeId, SlotIndex
from coherency.leases import keys_of

DANGERS: Final = ("ack-first", "inval-entry", "no-self-recall")
"""Negative controls: ack before the kernel has forgotten; drop names by INVAL_ENTRY; do not recall for changes of the own guest."""
FORGETS_LATE_S: Final = 0.02
"""How long after its ack an agent in danger of ``ack-first`` forgets: long enough for whoever looks now and then to meet it."""
DROP_S: Final = 0.25
"""How long one drop of names may take. Well below the time for which the table is trusted: the client's thread waits for it."""
MANY_NAMES: Final = 512


class Kernel(pages.Kernel, Protocol):
    """What is needed of a session."""

    @property
    def is_gone(self) -> bool: ...
    def invalidate_entry(self, parent: NodeId, name: bytes) -> bool: ...
    def increment_epoch(self) -> bool: ...


class Helpers(Protocol):
    """What is needed of a pool of helpers."""

    def is_helper(self, pid: int) -> bool: ...
    def lie(self, request: Request) -> int | None: ...
    def drop(self, names: Iterable[tuple[NodeId, bytes, NodeId]], deadline_s: float) -> bool: ...
    def granted_up_to(self, node: NodeId) -> None: ...
    def share_channel(self, descriptor: int | None) -> None: ...


class Recalls:
    """What one mount takes back of its kernel. From any thread but one on which helpers' requests would wait."""

    def __init__(
        self,
        grants: Grants,
        kernel: Kernel,
        helpers: Helpers,
        *,
        is_open: Callable[[NodeId], bool],
        danger: str = "",
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.grants, self.danger, self._clock_ns = grants, danger, clock_ns
        self._kernel, self._helpers = kernel, helpers
        self._is_open, self._pages = is_open, pages.RecalledPages(kernel)

    def close(self) -> None:
        """Before the mount goes."""
        self._pages.close()

    # ---- for the daemon ----

    def carry_out(self, keys: Sequence[GrantKey]) -> bool:
        """The kernel forgets what was granted under these keys; no keys: everything. False: some names it may still have."""
        revoked = self.grants.revoke(keys) if keys else self.grants.revoke_everything()
        opened = [thing.what for thing in revoked.nodes if self._is_open(thing.what)]
        for node in opened:
            self._pages.drop(node)
        forgotten = self._forget(revoked)
        if opened:
            self._pages.await_begun()
        return forgotten

    def _forget(self, revoked: Revoked) -> bool:
        for thing in revoked.nodes:
            self._kernel.invalidate_inode(thing.what)
        self.grants.dropped(revoked.nodes)
        names = [thing.what for thing in revoked.names]
        forgotten = not names or self._drop(names)
        if forgotten:
            self.grants.dropped(revoked.names)
        return forgotten

    def _drop(self, names: list[GrantedName]) -> bool:
        if self._kernel.is_gone:
            return True
        if self.danger == "inval-entry":
            for parent, name, _ in names:
                self._kernel.invalidate_entry(parent, name)
            return True
        if len(names) > MANY_NAMES and self._kernel.increment_epoch():
            return True
        for start in range(0, len(names), MANY_NAMES):
            if not self._helpers.drop(names[start : start + MANY_NAMES], DROP_S):
                return self._kernel.increment_epoch()
        return True

    # ---- for changes of the own guest ----

    def take_back(
        self, slots: Iterable[SlotIndex], leaving: Iterable[SlotIndex], given_up: Callable[[], bool]
    ) -> None:
        """The guest is about to change inodes of ``slots``, and to take away names that lead to inodes of ``leaving``.

        When this returns, the kernel has nothing any more of what was granted of them, and the daemon is told so. Waits
        for the end of the lease, if names can be dropped by no other means. Raises `InterruptedError` once ``given_up()``.
        """
        keys = keys_of(slots, leaving)
        revoked = self.grants.revoke(keys)
        while not self._forget(revoked):
            if given_up():
                raise InterruptedError(errno.EINTR, "interrupted while names are being dropped")
            if self._clock_ns() > self.grants.lapses_ns:
                self.grants.dropped(revoked.names)
                break
        if revoked.registered:
            self.grants.release(revoked.registered)

    def forget_acl(self, node: NodeId) -> None:
        """The kernel forgets the ACLs of a node, and does not keep one that is being answered."""
        self._kernel.invalidate_inode(node)

    # ---- tidying ----

    def sweep(self) -> bool:
        """Let go of some of what was not used for long; see ``Grants.idle``. False: there was nothing."""
        keys = self.grants.idle()
        revoked = self.grants.revoke(keys)
        for thing in revoked.nodes:  # for the ACLs, which have no time
            self._kernel.invalidate_inode(thing.what)
        self.grants.dropped((*revoked.nodes, *revoked.names))
        self.grants.release(revoked.registered)
        return bool(keys)
