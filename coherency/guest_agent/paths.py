"""Paths of the share, walked in memory: which object a path leads to, and the stamps that say so.

1. An answer about a path is derived from every directory on the way, every symlink followed, and the object at the end.
   It carries the stamps of all of them, and is used iff all are valid.
2. What leads out of the share, by ``..`` or by a symlink, raises ``OSError`` with EXDEV: for a program outside of any
   mount there is nothing to be found there.
3. What is fetched is fetched by one path of real directories. If a directory on the way was exchanged meanwhile the
   answer is what the path led to at that moment; its stamps have become invalid then, so it is not used again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from coherency.fuse import replies, syscalls
from coherency.guest_agent.cache import UserCache
from coherency.ids import HostInode
from coherency.shm_table import Stamp

_MAX_SYMLINKS: Final = 40
_MAX_ATTEMPTS: Final = 16
_LISTING_BYTES: Final = 1 << 18
NOT_SET: Final = object()  # what ``fetch_xattr`` finds where no such attribute is: an answer like any other
_DIRECTORY_ENDS: Final = (b"/", b"/.")  # only a directory is called by a name that ends like this


class Place(NamedTuple):
    """An object by its path of real directories, and the stamps that say so; None: not to be kept."""

    path: bytes
    status: os.stat_result
    stamps: tuple[Stamp, ...] | None


class _Absent(NamedTuple):
    stamps: tuple[Stamp, ...] | None


class Moved(Exception):
    """A directory on the way is not what it was when the walk passed it: walk again."""


Fetch: TypeAlias = Callable[[Place], Any]


class Paths:
    """The paths of one lower directory, with one cache. Thread-safe."""

    def __init__(self, lower: int, cache: UserCache) -> None:
        """``lower``: an open directory; the caller closes it, when nobody asks any more."""
        self.lower, self.cache = lower, cache

    def answer(self, key: Any, path: str | bytes, fetch: Fetch, *, follow: bool) -> Any:
        """The valid answer under ``key``, or what ``fetch`` makes of the place that ``path`` leads to."""
        value = self.cache.get(key)
        if value is not None:
            return value
        try:
            for _ in range(_MAX_ATTEMPTS):
                try:
                    place, stamps = self._walk(os.fsencode(path), follow)
                    value = fetch(place)
                    break
                except Moved:
                    continue
            else:
                raise OSError(errno.ESTALE, "the directories on the way keep changing")
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO), path) from None
        if stamps is not None:
            self.cache.put(key, value, *stamps, units=1 + len(value) // 16 if isinstance(value, list | bytes) else 1)
        return value

    # ---- the walk ----

    def _walk(self, path: bytes, follow: bool) -> tuple[Place, tuple[Stamp, ...] | None]:
        """Where ``path`` leads to, and the stamps of everything on the way."""
        if b"\0" in path:
            raise ValueError("embedded null byte")
        if not path:
            raise FileNotFoundError(errno.ENOENT, "an empty path")
        todo = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        must_be_directory = path.endswith(_DIRECTORY_ENDS)
        here = [self._root()]
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
            place = self._child(here[-1], part)
            if seen is not None:
                seen = None if place.stamps is None else seen | dict.fromkeys(place.stamps)
            if isinstance(place, _Absent):
                raise FileNotFoundError(errno.ENOENT, "no such name")
            if stat.S_ISLNK(place.status.st_mode) and (todo or follow or must_be_directory):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise OSError(errno.ELOOP, "too many symlinks")
                target = self._target(place)
                if target.startswith(b"/"):
                    raise OSError(errno.EXDEV, "leads out of the share")
                must_be_directory |= not todo and target.endswith(_DIRECTORY_ENDS)
                todo += [step for step in reversed(target.split(b"/")) if step not in (b"", b".")]
            else:
                here.append(place)
        if must_be_directory and not stat.S_ISDIR(here[-1].status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a trailing slash after what is not a directory")
        return here[-1], None if seen is None else tuple(seen)

    def _root(self) -> Place:
        root: Place | None = self.cache.peek(("place", b""))
        if root is None:
            self.cache.counters.fetches += 1
            stamp = self.cache.sample(HostInode(syscalls.cached_inode(self.lower)))
            status = os.fstat(self.lower)
            root = Place(b"", status, None if stamp is None else (stamp,))
            self.cache.put(("place", b""), root, stamp)
        return root

    def _child(self, parent: Place, name: bytes) -> Place | _Absent:
        path = parent.path + b"/" + name if parent.path else name
        key = ("place", path)
        known: Place | _Absent | None = self.cache.peek(key)
        if known is not None:
            return known
        stamps = parent.stamps
        if stamps is not None and not all(map(self.cache.reader.valid, stamps)):
            stamps = None  # the path is fetched as it is now; whether through the same parent is not known
        try:
            fd = self._open(path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            absent = _Absent(stamps)
            if stamps is not None:
                self.cache.put(key, absent, *stamps)
            return absent
        try:
            stamp = self.cache.sample(HostInode(syscalls.cached_inode(fd)))
            status = os.fstat(fd)
        finally:
            os.close(fd)
        place = Place(path, status, None if stamps is None or stamp is None else (*stamps, stamp))
        if place.stamps is not None:
            self.cache.put(key, place, *place.stamps)
        return place

    def _open(self, path: bytes, flags: int) -> int:
        self.cache.counters.fetches += 1
        try:
            return syscalls.open_beneath(self.lower, path, flags)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.EAGAIN):
                raise Moved from None  # a directory on the way has become something else
            raise

    def _target(self, place: Place) -> bytes:
        key = ("target", place.path)
        target: bytes | None = self.cache.peek(key)
        if target is None:
            target = self.fetch_target(place)
            if place.stamps is not None:
                self.cache.put(key, target, *place.stamps)
        return target

    # ---- fetches, by the path of real directories ----

    def fetch_target(self, place: Place) -> bytes:
        if not stat.S_ISLNK(place.status.st_mode):
            raise OSError(errno.EINVAL, "not a symlink")
        fd = self._open_same(place, os.O_PATH | os.O_NOFOLLOW)
        try:
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def fetch_xattr(self, place: Place, name: bytes) -> Any:
        """Its value, or :data:`NOT_SET`."""
        fd = self._open_same(place, os.O_PATH | os.O_NOFOLLOW)
        try:
            if not place.path:
                os.fstat(fd)  # the kernel keeps ACLs until it hears of the inode; other objects have just been looked up
            return os.getxattr(syscalls.proc_path(fd), name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return NOT_SET
        finally:
            os.close(fd)

    def fetch_listing(self, place: Place) -> list[replies.DirectoryEntry]:
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

    def _open_same(self, place: Place, flags: int) -> int:
        fd = self._open(place.path, flags)
        if syscalls.cached_inode(fd) != place.status.st_ino:
            os.close(fd)
            raise Moved
        return fd
