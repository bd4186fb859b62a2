"""``GuestAgent``: what ``os`` tells of files, from memory as long as the version table says that nothing changed.

No mount is needed. A call that finds its answer valid makes no system call at all; only what is stale or unknown is
fetched from the lower directory.

Paths are relative to the share; a leading slash means its root. See ``paths`` for what an answer rests on, and for what
leads out of the share.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

from coherency.fuse.mounts import open_mount
from coherency.fuse.replies import DirectoryEntry
from coherency.guest_agent.cache import DEFAULT_CAPACITY, Counters, UserCache
from coherency.guest_agent.client import Client
from coherency.guest_agent.paths import NOT_SET, Paths
from coherency.protocol import Welcome
from coherency.rendezvous import DEFAULT_RUNTIME_ROOT, RUNTIME_ROOT_VARIABLE
from coherency.shm_table import TableReader

AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_DT_UNKNOWN, _DT_DIR, _DT_REG, _DT_LNK = 0, 4, 8, 10


class GuestAgentStatistics(NamedTuple):
    """Counters since the connection was made."""

    hits: int  # calls and steps answered from memory
    misses: int  # nothing was known
    refreshes: int  # something was known, and it was stale
    lower_requests: int  # fetches from the lower directory
    entries: int  # answers in memory


class DirEntry:
    """What ``scandir`` yields; like ``os.DirEntry``."""

    __slots__ = ("_agent", "_ino", "_kind", "name", "path")

    def __init__(self, agent: GuestAgent, name: Any, path: Any, ino: int, kind: int) -> None:
        self.name, self.path = name, path
        self._agent, self._ino, self._kind = agent, ino, kind

    def inode(self) -> int:
        return self._ino

    def is_symlink(self) -> bool:
        if self._kind == _DT_UNKNOWN:
            return self._is(_DT_LNK, stat.S_ISLNK, follow_symlinks=False)
        return self._kind == _DT_LNK

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(_DT_DIR, stat.S_ISDIR, follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return self._is(_DT_REG, stat.S_ISREG, follow_symlinks)

    def _is(self, kind: int, test: Callable[[int], bool], follow_symlinks: bool) -> bool:
        if self._kind != _DT_UNKNOWN and not (follow_symlinks and self._kind == _DT_LNK):
            return self._kind == kind
        try:
            return test(self.stat(follow_symlinks=follow_symlinks).st_mode)
        except FileNotFoundError:
            return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return self._agent.stat(self.path, follow_symlinks=follow_symlinks)

    def __fspath__(self) -> Any:
        return self.path

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"


class ScandirIterator:
    """What ``scandir`` returns: an iterator and a context manager, like ``os.scandir``'s. There is nothing to close."""

    def __init__(self, entries: Iterator[DirEntry]) -> None:
        self._entries = entries

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DirEntry:
        return next(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries = iter(())


class GuestAgent:
    """A reader of a share; see the module. Thread-safe. Use :meth:`connect`, as a context manager."""

    _paths: Paths

    def __init__(self, name: str, *, runtime_dir: str | os.PathLike[str] | None, capacity: int) -> None:
        self.name = name
        self._capacity = capacity
        self._counters = Counters()
        self._undo = contextlib.ExitStack()
        self._connecting = threading.Lock()
        root = Path(runtime_dir or os.environ.get(RUNTIME_ROOT_VARIABLE) or DEFAULT_RUNTIME_ROOT)
        self._client = Client.connect(
            root,
            name,
            guest_name=f"{socket.gethostname()[:40]}-{os.getpid()}-api",
            mode="access",
            statistics=self.statistics,
            reconnect=True,
            on_connected=self._on_reconnected,
        )
        try:
            with self._connecting:
                if not hasattr(self, "_paths"):  # the daemon may have been restarted already
                    self._use(self._client.reader, self._client.welcome)
        except BaseException:
            self._client.close()
            raise

    @classmethod
    def connect(
        cls, name: str, *, runtime_dir: str | os.PathLike[str] | None = None, capacity: int = DEFAULT_CAPACITY
    ) -> GuestAgent:
        """Connect to the daemon that serves ``name`` on this machine.

        ``runtime_dir``: the parent of the daemon's directory, by default ``$COHERENCY_RUNTIME_DIR`` or /run/coherency.
        ``capacity``: how many answers to keep. Raises :class:`~coherency.errors.DaemonUnavailable` if nobody serves it.
        """
        return cls(name, runtime_dir=runtime_dir, capacity=capacity)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye. Nothing may be asked afterwards. Safe to call twice."""
        self._client.close()
        self._undo.close()

    def _on_reconnected(self, reader: TableReader, welcome: Welcome) -> None:
        """The daemon is back, with a new table and a new export (on the client's thread, which tries again if this raises)."""
        with self._connecting:
            self._use(reader, welcome)

    def _use(self, reader: TableReader, welcome: Welcome) -> None:
        lower = open_mount(welcome.export)
        # That of a dead export stays open as long as this object: a call may still be using it.
        self._undo.callback(os.close, lower)
        self._paths = Paths(lower, UserCache(reader, self._counters, capacity=self._capacity))

    # ---- what os has ----

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """Like ``os.stat``."""
        if path.__class__ is not str:
            path = os.fspath(path)
        cache = self._paths.cache
        entry = cache.entries.get(path)
        if entry is not None and follow_symlinks:
            # UserCache.get, spelled out: this is the hit that everything is about.
            words = cache.words
            for word, version in entry[1]:
                if words[word] != version:
                    break
            else:
                if words[cache.epoch_word] == entry[2] and _now_ns() < cache.reader.trusted_until_ns:
                    self._counters.hits += 1
                    try:
                        cache.entries.move_to_end(path)
                    except KeyError:  # evicted meanwhile
                        pass
                    return entry[0]  # type: ignore[no-any-return]
        if not follow_symlinks:
            return self.lstat(path)
        return self._paths.answer(path, path, _status, follow=True)  # type: ignore[no-any-return]

    def lstat(self, path: AnyPath) -> os.stat_result:
        """Like ``os.lstat``."""
        path = os.fspath(path)
        return self._paths.answer(("lstat", path), path, _status, follow=False)  # type: ignore[no-any-return]

    def exists(self, path: AnyPath) -> bool:
        """Like ``os.path.exists``: false also for a symlink that leads nowhere, and where access is denied."""
        try:
            self.stat(path)
        except (OSError, ValueError):
            return False
        return True

    def readlink(self, path: AnyPath) -> Any:
        """Like ``os.readlink``: of the type of ``path``."""
        path = os.fspath(path)
        paths = self._paths
        target = paths.answer(("readlink", path), path, paths.fetch_target, follow=False)
        return target if isinstance(path, bytes) else os.fsdecode(target)

    def getxattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """Like ``os.getxattr``."""
        path, name = os.fspath(path), os.fsencode(attribute)
        key = ("getxattr", path, name, follow_symlinks)
        paths = self._paths
        value = paths.answer(key, path, lambda place: paths.fetch_xattr(place, name), follow=follow_symlinks)
        if value is NOT_SET:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)
        return value  # type: ignore[no-any-return]

    def listdir(self, path: AnyPath = ".") -> list[Any]:
        """Like ``os.listdir``: names of the type of ``path``."""
        path = os.fspath(path)
        entries = self._entries(path)
        if isinstance(path, bytes):
            return [entry.name for entry in entries]
        return [os.fsdecode(entry.name) for entry in entries]

    def scandir(self, path: AnyPath = ".") -> ScandirIterator:
        """Like ``os.scandir``. The listing is complete when this returns."""
        base: Any = os.fspath(path)
        entries = self._entries(base)
        if isinstance(base, bytes):
            return ScandirIterator(
                DirEntry(self, entry.name, os.path.join(base, entry.name), entry.ino, entry.kind) for entry in entries
            )
        names = ((os.fsdecode(entry.name), entry) for entry in entries)
        return ScandirIterator(
            DirEntry(self, name, os.path.join(base, name), entry.ino, entry.kind) for name, entry in names
        )

    def walk(
        self,
        top: AnyPath = ".",
        *,
        topdown: bool = True,
        onerror: Callable[[OSError], object] | None = None,
        followlinks: bool = False,
    ) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """Like ``os.walk``."""
        base: Any = os.fspath(top)
        directories: list[Any] = []
        others: list[Any] = []
        try:
            entries = list(self.scandir(base))
        except OSError as error:
            if onerror is not None:
                onerror(error)
            return
        for entry in entries:
            try:
                (directories if entry.is_dir() else others).append(entry.name)
            except OSError:
                others.append(entry.name)
        if topdown:
            yield base, directories, others
        for name in directories:
            below = os.path.join(base, name)
            if followlinks or not self._is_symlink(below):
                yield from self.walk(below, topdown=topdown, onerror=onerror, followlinks=followlinks)
        if not topdown:
            yield base, directories, others

    def _is_symlink(self, path: AnyPath) -> bool:
        try:
            return stat.S_ISLNK(self.lstat(path).st_mode)
        except OSError:
            return False

    def statistics(self) -> GuestAgentStatistics:
        counters = self._counters
        entries = len(self._paths.cache) if hasattr(self, "_paths") else 0  # asked while it is being connected
        return GuestAgentStatistics(counters.hits, counters.misses, counters.refreshes, counters.fetches, entries)

    def _entries(self, path: str | bytes) -> list[DirectoryEntry]:
        paths = self._paths
        entries: list[DirectoryEntry] = paths.answer(("listdir", path), path, paths.fetch_listing, follow=True)
        return entries


_now_ns = time.monotonic_ns
_status = operator.attrgetter("status")
