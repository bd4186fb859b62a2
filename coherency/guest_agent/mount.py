"""A guest mount: the agent's FUSE front over the lower directory, and its connection to the daemon.

The mount outlives the daemon. While the daemon is gone the lower directory answers with errors, and so does the mount;
nothing of the user cache is used, since the reader is withdrawn. When the daemon is back, the nodes that the kernel
knows are found again by their names in the new lower directory, and a new cache begins.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from coherency.errors import MountError, UsageError
from coherency.fuse.mounts import place_of, remove_dead_mount
from coherency.fuse.nodes import Node, descriptor_budget
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.replies import FOREVER_NS
from coherency.fuse.session import Session
from coherency.fuse.tree import KernelCache
from coherency.guest_agent.cache import DEFAULT_CAPACITY, Counters, UserCache
from coherency.guest_agent.client import Client
from coherency.guest_agent.echoes import Echoes
from coherency.guest_agent.echoing import Echoing
from coherency.guest_agent.filesystem import MOST_LOCK_WAITS, CachingFileSystem
from coherency.guest_agent.granting import GrantingFileSystem
from coherency.guest_agent.grantor import NoGrants
from coherency.guest_agent.grants import Grants
from coherency.guest_agent.helper_pool import HelperPool
from coherency.guest_agent.links import Link
from coherency.guest_agent.listener import Listener
from coherency.guest_agent.lower import introduce, is_same_mount, open_export, open_given, same_tree
from coherency.guest_agent.pages import Pages
from coherency.guest_agent.recalls import Recalls
from coherency.guest_agent.sharer import Sharer
from coherency.protocol import SHORT_TEXT_BYTES, Welcome
from coherency.shm_table import TableReader

log = logging.getLogger(__name__)

GRANTING_MODES: Final = ("prompt", "strict")
COHERENT_MODES: Final = ("access", *GRANTING_MODES)
MODES: Final = ("none", "auto", "always", *COHERENT_MODES)
DEFAULT_MODE: Final = "strict"
DEFAULT_TIMEOUT_NS: Final = 1_000_000_000
_QUIESCENCE_POLL_S: Final = 0.05
_MAX_THREADS: Final = 256
"""So many changes may wait for other guests at once, and who looks, helpers included, is still answered."""


@dataclass(frozen=True)
class MountOptions:
    """What the operator asked for. Raises :class:`UsageError` if that contradicts itself."""

    name: str
    mountpoint: Path
    runtime_root: Path
    mode: str
    timeout_ns: int | None = None
    writeback: bool = False
    guest_name: str | None = None
    cache_capacity: int = DEFAULT_CAPACITY
    danger: str = ""
    """One of `recalls.DANGERS`."""
    lower: Path | None = None
    """Where the export can be seen, if not at its mount point: in a virtual machine, what virtiofs has mounted."""
    link: Link | None = None
    """The way to the daemon, if it is not its socket."""
    events: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"--cache is one of {', '.join(MODES)}, not {self.mode!r}")
        if self.timeout_ns is not None and self.mode != "auto":
            raise UsageError(f"--timeout belongs to --cache auto; with {self.mode} there is no time to set")
        if self.writeback and self.mode in COHERENT_MODES:
            raise UsageError(
                f"--writeback and --cache {self.mode} exclude each other: with it the kernel believes its own sizes and times"
            )
        if self.danger and self.mode not in GRANTING_MODES:
            raise UsageError(f"--live-dangerously belongs to --cache {' and '.join(GRANTING_MODES)}, not to {self.mode}")
        if self.events and self.mode not in COHERENT_MODES:
            raise UsageError(
                f"--events belongs to --cache {', '.join(COHERENT_MODES)}, not to {self.mode}: "
                "who is told of a change would look, and see what was before"
            )
        name = self.guest_name or ""
        if not name.isprintable() or len(name.encode()) > SHORT_TEXT_BYTES:
            raise UsageError(f"--guest is one line of up to {SHORT_TEXT_BYTES} bytes, not {name!r}")

    def kernel_cache(self) -> KernelCache:
        """What the guest's kernel may keep in this mode."""
        if self.mode == "always":
            return KernelCache(FOREVER_NS, FOREVER_NS, keep_pages=True, readdirplus=True, writeback=self.writeback)
        if self.mode == "auto":
            timeout_ns = DEFAULT_TIMEOUT_NS if self.timeout_ns is None else self.timeout_ns
            return KernelCache(timeout_ns, timeout_ns, readdirplus=True, writeback=self.writeback)
        return KernelCache(writeback=self.writeback)


class LowerPassthrough(Passthrough):
    """A guest's file system without a user cache."""

    most_lock_waits = MOST_LOCK_WAITS

    def __init__(self, lower: int, *, descriptor_limit: int, kernel_cache: KernelCache) -> None:
        super().__init__(lower, descriptor_limit=descriptor_limit, kernel_cache=kernel_cache)
        self.pages = Pages()

    def locked(self, node: Node) -> None:
        self.pages.drop(node.id)

    descriptors_pin = False
    moved_directories_are_new = True


class MountStatistics(NamedTuple):
    """What a guest tells the daemon, and its mount's own counters."""

    hits: int
    misses: int
    refreshes: int
    lower_requests: int  # requests of the guest's kernel that needed the lower directory
    entries: int
    requests: int  # all requests of the guest's kernel


class GuestMount:
    """One mount, from ``start()`` to ``close()``."""

    def __init__(self, options: MountOptions) -> None:
        self.options = options
        self._counters = Counters()
        self._file_system: LowerPassthrough | CachingFileSystem | None = None
        self._session: Session | None = None
        self._undo = contextlib.ExitStack()
        self._connecting = threading.Lock()  # the daemon may be restarted while the mount is being made
        self._sharer = Sharer(Grants()) if options.mode in GRANTING_MODES else None
        self.echoes = Echoes() if options.events else None
        self._mountpoint = place_of(options.mountpoint)

    def start(self) -> None:
        """Mounted and answering when this returns; nothing is left behind when it raises."""
        options = self.options
        mountpoint = self._mountpoint
        if not mountpoint.name:
            raise UsageError(f"{mountpoint} cannot be a mount point: choose a directory below it")
        if remove_dead_mount(mountpoint):
            log.warning("removed the dead mount of a killed agent from %s", mountpoint)
        if not mountpoint.is_dir():
            raise MountError(f"{mountpoint} is not a directory: a mount point must exist (mkdir {mountpoint})")
        with contextlib.ExitStack() as undo:
            if self.echoes is not None:
                undo.callback(self.echoes.bury)
            self.client = Client.connect(
                options.runtime_root,
                options.name,
                guest_name=options.guest_name or f"{socket.gethostname()[:40]}-{os.getpid()}",
                mode=options.mode,
                statistics=self.statistics,
                reconnect=True,
                on_connected=self._on_connected,
                grantor=Listener(self._sharer or NoGrants(), self.echoes.hear) if self.echoes else self._sharer,
                link=options.link,
            )
            undo.callback(self.client.close)
            with self._connecting:
                lower = self._open_lower(self.client.welcome)
                file_system = self._file_system = self._make_file_system(lower)
                try:
                    session = self._session = Session.mount(
                        str(mountpoint), Echoing(file_system, self.echoes) if self.echoes else file_system,
                        source=f"coherency:{options.name}", name="mount", max_threads=_MAX_THREADS,
                    )  # fmt: skip
                except BaseException:
                    file_system.close()
                    raise
            undo.callback(session.close)
            file_system.pages.belong_to(session)
            session.start()
            if self._sharer is not None and isinstance(file_system, GrantingFileSystem):
                self._begin_granting(self._sharer, file_system, session, undo)
            if self.echoes is not None and isinstance(file_system, CachingFileSystem):
                undo.callback(self.echoes.close)
                self.echoes.start(file_system, session, str(mountpoint))
            self._undo = undo.pop_all()

    def _begin_granting(
        self, sharer: Sharer, file_system: GrantingFileSystem, session: Session, undo: contextlib.ExitStack
    ) -> None:
        pool = HelperPool.start(session, str(self._mountpoint))
        undo.callback(pool.close)
        recalls = Recalls(sharer.grants, session, pool, is_open=file_system.is_open, danger=self.options.danger)
        undo.callback(recalls.close)
        undo.callback(sharer.wait_until_clean)
        undo.callback(file_system.stop_granting)
        sharer.attach(recalls, pool)
        file_system.grant_by(recalls, pool)

    def _open_lower(self, welcome: Welcome) -> int:
        """The export's root, as this guest can reach it, and the daemon knows now by which process it will."""
        if self.options.lower is not None:
            return open_given(self.options.lower, welcome, self._mountpoint)
        lower = open_export(welcome, self._mountpoint)
        introduce(welcome, lower)
        return lower

    def _make_file_system(self, lower: int) -> LowerPassthrough | CachingFileSystem:
        budget = descriptor_budget()
        if self.options.mode in COHERENT_MODES:
            cache = self._make_cache(self.client.reader)
            if self._sharer is not None:
                return GrantingFileSystem(lower, cache, self._sharer.grants, descriptor_limit=budget)
            return CachingFileSystem(lower, cache, descriptor_limit=budget)
        return LowerPassthrough(lower, descriptor_limit=budget, kernel_cache=self.options.kernel_cache())

    def _make_cache(self, reader: TableReader) -> UserCache:
        return UserCache(reader, self._counters, capacity=self.options.cache_capacity)

    def _on_connected(self, reader: TableReader, welcome: Welcome) -> None:
        """The daemon is back, with a new table and a new export (on the client's thread, which tries again if this raises)."""
        with self._connecting:
            file_system, session = self._file_system, self._session
        if file_system is None or session is None:
            return  # not begun yet: it will be with this connection
        lower = same_tree(self._open_lower(welcome), file_system)
        same_mount = is_same_mount(lower, file_system)
        same_table = isinstance(file_system, CachingFileSystem) and reader.table_id == file_system.cache.reader.table_id
        if isinstance(file_system, CachingFileSystem) and same_mount and same_table:
            os.close(lower)  # only the channel was cut
            file_system.cache.follow(reader)
            return
        abandoned = file_system.nodes.rebase(lower)
        if not same_mount:
            file_system.locks.end()
        if isinstance(file_system, CachingFileSystem):
            file_system.cache = self._make_cache(reader)  # after the nodes: what it keeps was fetched through them
        threading.Thread(
            target=_close_when_unused, args=(session, abandoned), name="abandoned-descriptors", daemon=True
        ).start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until somebody unmounts it; false after ``timeout_s``."""
        assert self._session is not None
        return self._session.wait(timeout_s)

    def close(self) -> None:
        """Unmount, say goodbye. Who still uses the mount gets errors from now on."""
        self._undo.close()

    def statistics(self) -> MountStatistics:
        file_system, counters = self._file_system, self._counters
        requests = self._session.statistics().requests if self._session else 0
        entries = here = 0
        if isinstance(file_system, CachingFileSystem):
            entries, here = len(file_system.cache), file_system.answered_here
        return MountStatistics(
            counters.hits, counters.misses, counters.refreshes, max(requests - here, 0), entries, requests
        )


def _close_when_unused(session: Session, descriptors: list[int]) -> None:
    users = set(session.unanswered())
    while not users.isdisjoint(session.unanswered()) and not session.wait(_QUIESCENCE_POLL_S):
        pass
    for fd in descriptors:
        os.close(fd)
