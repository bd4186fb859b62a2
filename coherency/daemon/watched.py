"""Which file systems are watched, and which inode an event of theirs is about.

1. The file system of the share is watched, and those that are mounted below it. ``look`` finds what was mounted since; it
   marks everything again, since a mark ends with its mount.
2. An inode is known by its number also when it is gone: the number is read from the file handle where the handles of the
   file system are what they look like, which one whose number is known has shown. Otherwise the handle is opened, and of
   what cannot be opened nothing is known.
3. What was watched once is still known when it is not mounted below the share any more: somebody may have it open.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Final, NamedTuple

from coherency.daemon.fanotify import Group, why_not
from coherency.daemon.fanotify_events import can_be_read, numbered
from coherency.errors import WatchError
from coherency.fuse import syscalls
from coherency.fuse.mounts import Mount, mounts

log = logging.getLogger(__name__)

_ITSELF: Final = b"."
_O_LOOK: Final = os.O_PATH | os.O_CLOEXEC
_O_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class _FileSystem(NamedTuple):
    path: bytes
    """Of something on it, from the share."""
    device: int
    readable: bool
    """Whether numbers can be read from its handles: rule 2."""
    tree: int


class Watched:
    """The file systems of one share, and the queue of what happens on them. For one thread, but ``unwatched``."""

    def __init__(self, share: int, path: Path) -> None:
        """``share`` is the open directory ``path``, and stays the caller's. ``WatchError`` if it cannot be watched."""
        self._path = os.path.realpath(os.fsencode(path))
        self._below = self._path.rstrip(b"/") + b"/"
        self._mounts: frozenset[Mount] | None = None
        self.unwatched: dict[str, str] = {}
        """The mounts below the share that cannot be watched, and why."""
        try:
            self.group = Group()
        except OSError as error:
            raise WatchError(why_not(error, "")) from error
        self._share = os.dup(share)
        try:
            self._own = self._watch(_ITSELF)
            self._by_fsid = dict([self._own])
            self.look()
        except OSError as error:
            self.close()
            raise WatchError(why_not(error, self._kind())) from error

    def look(self) -> bool:
        """Watch what is mounted below the share by now. Whether anything was mounted or unmounted there since the last look."""
        found = frozenset(mount for mount in mounts() if mount.path.startswith(self._below))
        if found == self._mounts:
            return False
        self._mounts = found
        watched, unwatched = dict([self._own]), {}
        for mount in sorted(found):
            try:
                if mount.kind.startswith("fuse"):
                    raise OSError(errno.EOPNOTSUPP, "its server is not asked, since it need not answer")
                fsid, file_system = self._watch(mount.path[len(self._below) :])
                if watched.setdefault(fsid, file_system).device != file_system.device:
                    raise FileExistsError(errno.EEXIST, "two with one id")
            except (FileNotFoundError, NotADirectoryError):
                continue  # gone again, or not to be reached from the share: nobody can be shown it
            except OSError as error:
                unwatched[os.fsdecode(mount.path)] = why_not(error, mount.kind)
        for path in unwatched.keys() - self.unwatched.keys():
            log.warning("changes made directly in %s are not seen: %s", path, unwatched[path])
        self.unwatched = unwatched
        self._by_fsid |= watched
        return True

    def identity(self, fsid: int, handle: bytes) -> tuple[int, int] | None:
        """Device and number of the inode that an event tells the handle of; None if nobody can know it."""
        file_system = self._by_fsid.get(fsid)
        if file_system is None:
            return None
        if file_system.readable:
            found = numbered(handle)
            if found is not None and found.tree == file_system.tree:
                return file_system.device, found.ino
        return self._opened(file_system.path, handle)

    def close(self) -> None:
        self.group.close()
        os.close(self._share)

    def _watch(self, path: bytes) -> tuple[int, _FileSystem]:
        fd = os.open(path, _O_LOOK, dir_fd=self._share)
        try:
            self.group.watch(fd)
            status, handle = os.fstat(fd), syscalls.file_handle(fd)
            fsid = os.fstatvfs(fd).f_fsid
        finally:
            os.close(fd)
        own = None if handle is None else numbered(handle)
        readable = handle is not None and can_be_read(handle, status.st_ino)
        return fsid, _FileSystem(path, status.st_dev, readable, own.tree if own else 0)

    def _opened(self, path: bytes, handle: bytes) -> tuple[int, int] | None:
        try:
            there = os.open(path, _O_READ, dir_fd=self._share)
            try:
                fd = syscalls.open_by_handle(there, handle, os.O_PATH)
            finally:
                os.close(there)
            try:
                status = os.fstat(fd)
            finally:
                os.close(fd)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _kind(self) -> str:
        """The type of the file system that the share is on."""
        around = [mount for mount in mounts() if self._below.startswith(mount.path.rstrip(b"/") + b"/")]
        return max(around, key=lambda mount: len(mount.path)).kind if around else "unknown"
