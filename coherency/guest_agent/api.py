"""``GuestAgent``: what ``os`` tells of files, from memory as long as the version table says that nothing changed.

No mount is needed. A call that finds its answer valid makes no system call at all; only what is stale or unknown is
fetched from the lower directory.

1. An answer about a path is derived from every directory on the way, every symlink followed, and the object at the end. It
   carries the stamps of all of them, and is used iff all are valid.
2. Paths are relative to the share; a leading slash means its root. What leads out of it, by ``..`` or by a symlink,
   raises ``OSError`` with EXDEV: for a program outside of any mount there is nothing to be found there.
3. What is fetched is fetched by one path of real directories. If a directory on the way was exchanged meanwhile the
   answer is what the path led to at that moment; its stamps have become invalid then, so it is not used again.
"""

from __future__ import annotations

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
from typing import Any, Final, NamedTuple, Self, TypeAlias

from coherency.errors import MountError
from coherency.fuse import replies, syscalls
from coherency.guest_agent.cache import DEFAULT_CAPACITY, Counters, UserCache
from coherency.guest_agent.client import Client
from coherency.ids import HostInode
from coherency.protocol import DEFAULT_RUNTIME_ROOT, Welcome
from coherency.shm_table import Stamp, TableReader

AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
RUNTIME_ROOT_VARIABLE: Final = "COHERENCY_RUNTIME_DIR"

_MAX_SYMLINKS: Final = 40
_MAX_ATTEMPTS: Final = 16
_LISTING_BYTES: Final = 1 << 18
_DT_UNKNOWN, _DT_DIR, _DT_REG, _DT_LNK = 0, 4, 8, 10


class GuestAgentStatistics(NamedTuple):
    """Counters since the connection was made."""

    hits: int  # calls and steps answered from memory
    misses: int  # nothing was known
    refreshes: int  # something was known, and it was stale
    lower_requests: int  # fetches from the lower directory
    entries: int  # answers in memory


class _Place(NamedTuple):
    """An object by its path of real directories, and the stamps that say so; None: not to be kept."""

    path: bytes
    status: os.stat_result
    stamps: tuple[Stamp, ...] | None


class _Absent(NamedTuple):
    stamps: tuple[Stamp, ...] | None


class _Moved(Exception):
    """A directory on the way is not what it was when the walk passed it: walk again."""


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

    def __init__(self, name: str, *, runtime_dir: str | os.PathLike[str] | None, capacity: int) -> None:
        self.name = name
        self._capacity = capacity
        self._counters = Counters()
        self._lower_requests = 0
        self._lower = -1
        self._closed = threading.Event()
        root = Path(runtime_dir or os.environ.get(RUNTIME_ROOT_VARIABLE) or DEFAULT_RUNTIME_ROOT)
        self._client = Client.connect(
            root,
            name,
            guest_name=f"{socket.gethostname()[:40]}-{os.getpid()}-api",
            mode="access",
            statistics=self.statistics,
            reconnect=True,
            on_connected=self._on_connected,
        )
        try:
            self._on_connected(self._client.reader, self._client.welcome)
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
        lower, self._lower = self._lower, -1
        if lower >= 0:
            os.close(lower)

    def _on_connected(self, reader: TableReader, welcome: Welcome) -> None:
        """A new table and a new export, at the start and whenever the daemon was restarted."""
        try:
            lower = os.open(welcome.export, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(f"cannot open the export {welcome.export}: {error.strerror}") from error
        # The abandoned descriptor of a dead export stays open until then: a call may be using it.
        abandoned, self._lower = self._lower, lower
        self.cache = UserCache(reader, self._counters, capacity=self._capacity)
        if abandoned >= 0:
            threading.Timer(60, os.close, (abandoned,)).start()

    # ---- what os has ----

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """Like ``os.stat``."""
        if path.__class__ is not str:
            path = os.fspath(path)
        cache = self.cache
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
        return self._answer(path, path, _status, follow=True)  # type: ignore[no-any-return]

    def lstat(self, path: AnyPath) -> os.stat_result:
        """Like ``os.lstat``."""
        path = os.fspath(path)
        return self._answer(("lstat", path), path, _status, follow=False)  # type: ignore[no-any-return]

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
        target = self._answer(("readlink", path), path, self._fetch_target, follow=False)
        return target if isinstance(path, bytes) else os.fsdecode(target)

    def getxattr(self, path: AnyPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """Like ``os.getxattr``."""
        path, name = os.fspath(path), os.fsencode(attribute)
        key = ("getxattr", path, name, follow_symlinks)
        value: bytes = self._answer(key, path, lambda place: self._fetch_xattr(place, name), follow=follow_symlinks)
        return value

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
        return GuestAgentStatistics(
            counters.hits, counters.misses, counters.refreshes, self._lower_requests, len(self.cache)
        )

    # ---- answers ----

    def _answer(self, key: Any, path: AnyPath, fetch: Callable[[_Place], Any], *, follow: bool) -> Any:
        """The valid answer under ``key``, or what ``fetch`` makes of the place that ``path`` leads to."""
        cache = self.cache
        value = cache.get(key)
        if value is not None:
            return value
        name: Any = os.fspath(path)
        try:
            for _ in range(_MAX_ATTEMPTS):
                try:
                    place, stamps = self._walk(cache, os.fsencode(name), follow)
                    value = fetch(place)
                    break
                except _Moved:
                    continue
            else:
                raise OSError(errno.ESTALE, "the directories on the way keep changing")
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO), name) from None
        if stamps is not None:
            cache.put(key, value, *stamps, units=1 + len(value) // 16 if isinstance(value, list | bytes) else 1)
        return value

    def _entries(self, path: AnyPath) -> list[replies.DirectoryEntry]:
        entries: list[replies.DirectoryEntry] = self._answer(("listdir", path), path, self._fetch_listing, follow=True)
        return entries

    # ---- the walk ----

    def _walk(self, cache: UserCache, path: bytes, follow: bool) -> tuple[_Place, tuple[Stamp, ...] | None]:
        """Where ``path`` leads to, and the stamps of everything on the way."""
        if b"\0" in path:
            raise ValueError("embedded null byte")
        if not path:
            raise FileNotFoundError(errno.ENOENT, "an empty path")
        todo = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        must_be_directory = path.endswith((b"/", b"/."))
        here = [self._root(cache)]
        seen: dict[Stamp, None] | None = dict.fromkeys(here[0].stamps) if here[0].stamps is not None else None
        links = 0
        while todo:
            part = todo.pop()
            if not stat.S_ISDIR(here[-1].status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "a component is not a directory")
            if part == b"..":
                if len(here) == 1:
                    raise OSError(errno.EXDEV, "leads out of the share")
                here.pop()
                continue
            place = self._child(cache, here[-1], part)
            if seen is not None:
                seen = None if place.stamps is None else seen | dict.fromkeys(place.stamps)
            if isinstance(place, _Absent):
                raise FileNotFoundError(errno.ENOENT, "no such name")
            if stat.S_ISLNK(place.status.st_mode) and (todo or follow or must_be_directory):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise OSError(errno.ELOOP, "too many symlinks")
                target = self._target(cache, place)
                if target.startswith(b"/"):
                    raise OSError(errno.EXDEV, "leads out of the share")
                must_be_directory |= not todo and target.endswith(b"/")
                todo += [step for step in reversed(target.split(b"/")) if step not in (b"", b".")]
            else:
                here.append(place)
        if must_be_directory and not stat.S_ISDIR(here[-1].status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a trailing slash after what is not a directory")
        return here[-1], None if seen is None else tuple(seen)

    def _root(self, cache: UserCache) -> _Place:
        root: _Place | None = cache.peek(("place", b""))
        if root is None:
            self._lower_requests += 1
            stamp = cache.sample(HostInode(syscalls.cached_inode(self._lower)))
            status = os.fstat(self._lower)
            root = _Place(b"", status, None if stamp is None else (stamp,))
            cache.put(("place", b""), root, stamp)
        return root

    def _child(self, cache: UserCache, parent: _Place, name: bytes) -> _Place | _Absent:
        path = parent.path + b"/" + name if parent.path else name
        key = ("place", path)
        known: _Place | _Absent | None = cache.peek(key)
        if known is not None:
            return known
        stamps = parent.stamps
        if stamps is not None and not all(map(cache.reader.valid, stamps)):
            raise _Moved
        try:
            fd = self._open(path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            absent = _Absent(stamps)
            if stamps is not None:
                cache.put(key, absent, *stamps)
            return absent
        try:
            stamp = cache.sample(HostInode(syscalls.cached_inode(fd)))
            status = os.fstat(fd)
        finally:
            os.close(fd)
        place = _Place(path, status, None if stamps is None or stamp is None else (*stamps, stamp))
        if place.stamps is not None:
            cache.put(key, place, *place.stamps)
        return place

    def _open(self, path: bytes, flags: int) -> int:
        self._lower_requests += 1
        try:
            return syscalls.open_beneath(self._lower, path, flags)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.EAGAIN):
                raise _Moved from None  # a directory on the way has become something else
            raise

    def _target(self, cache: UserCache, place: _Place) -> bytes:
        key = ("target", place.path)
        target: bytes | None = cache.peek(key)
        if target is None:
            target = self._fetch_target(place)
            if place.stamps is not None:
                cache.put(key, target, *place.stamps)
        return target

    # ---- fetches, by the path of real directories ----

    def _fetch_target(self, place: _Place) -> bytes:
        if not stat.S_ISLNK(place.status.st_mode):
            raise OSError(errno.EINVAL, "not a symlink")
        fd = self._open_same(place, os.O_PATH | os.O_NOFOLLOW)
        try:
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def _fetch_xattr(self, place: _Place, name: bytes) -> bytes:
        fd = self._open_same(place, os.O_PATH | os.O_NOFOLLOW)
        try:
            return os.getxattr(syscalls.proc_path(fd), name)
        finally:
            os.close(fd)

    def _fetch_listing(self, place: _Place) -> list[replies.DirectoryEntry]:
        if not stat.S_ISDIR(place.status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        fd = self._open_same(place, os.O_RDONLY | os.O_DIRECTORY)
        entries: list[replies.DirectoryEntry] = []
        try:
            while batch := replies.parse_dirents(syscalls.getdents(fd, _LISTING_BYTES)):
                entries += [entry for entry in batch if entry.name not in (b".", b"..")]
        finally:
            os.close(fd)
        return entries

    def _open_same(self, place: _Place, flags: int) -> int:
        fd = self._open(place.path, flags)
        if syscalls.cached_inode(fd) != place.status.st_ino:
            os.close(fd)
            raise _Moved
        return fd


_now_ns = time.monotonic_ns
_status = operator.attrgetter("status")
