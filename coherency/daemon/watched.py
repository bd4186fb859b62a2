"""Which file systems are watched, and which inode an event of theirs is about.

1. The file system of the share is watched, and those that are mounted below it. ``look`` finds what was mounted since; it
   marks everything again, since a mark ends with its mount. That is how it notices what was unmounted and mounted again
   in the meantime: the list of mounts may be the same, the mark is gone.
2. An inode is known by its number also when it is gone: the number is read from the file handle where the handles of the
   file system are what they look like, which one whose number is known has shown. Otherwise the handle is opened, and of
   what cannot be opened nothing is known. A handle may also say in which subvolume it is (btrfs): each has numbers and a
   device of its own, which its root tells.
3. What was watched once is still known when it is not mounted below the share any more: somebody may have it open.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Final, NamedTuple

from coherency.daemon.fanotify import Group, why_not
from coherency.daemon.fanotify_events import can_be_read, numbered, subvolume_root
from coherency.errors import WatchError
from coherency.fuse import syscalls
from coherency.fuse.mounts import Mount, mounts

log = logging.getLogger(__name__)

_ITSELF: Final = b"."
_O_LOOK: Final = os.O_PATH | os.O_CLOEXEC
_O_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_OF_SERVERS: Final = ("fuse", "virtiofs", "nfs", "cifs", "smb3", "ceph", "9p", "afs")
"""What the types of file systems begin with whose server is asked for everything."""


class _FileSystem(NamedTuple):
    path: bytes
    """Of something on it, from the share."""
    device: int
    readable: bool
    """Whether numbers can be read from its handles: rule 2."""
    devices: dict[int, int]
    """By subvolume, as far as they are known."""


class Watched:
    """The file systems of one share, and the queue of what happens on them. For one thread, but ``unwatched``."""

    def __init__(self, share: int, path: Path) -> None:
        """``share`` is the open directory ``path``, and stays the caller's. ``WatchError`` if it cannot be watched."""
        self._path = os.path.realpath(os.fsencode(path))
        self._below = self._path.rstrip(b"/") + b"/"
        self._mounts: frozenset[Mount] | None = None
        self._marked: frozenset[tuple[int, int]] = frozenset()  # devices of those
        self.unwatched: dict[str, str] = {}
        """The mounts below the share that cannot be watched, and why."""
        try:
            self.group = Group()
        except OSError as error:
            raise WatchError(why_not(error, "")) from error
        try:
            self._share = os.dup(share)
        except OSError:
            self.group.close()
            raise
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
        if found == self._mounts and self._marked <= self.group.watched():
            return False
        watched, unwatched = dict([self._own]), {}
        for mount in sorted(found):
            try:
                if mount.kind.startswith(_OF_SERVERS):
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
        self._mounts, self._marked = found, self.group.watched() & {(mount.major, mount.device) for mount in found}
        return True

    def identity(self, fsid: int, handle: bytes) -> tuple[int, int] | None:
        """Device and number of the inode that an event tells the handle of; None if nobody can know it."""
        file_system = self._by_fsid.get(fsid)
        if file_system is None:
            return None
        found = numbered(handle) if file_system.readable else None
        if found is None:
            status = self._opened(file_system, handle)
            return None if status is None else (status.st_dev, status.st_ino)
        device = file_system.devices.get(found.tree)
        if device is None:
            status = self._opened(file_system, subvolume_root(found.tree)) or self._opened(file_system, handle)
            if status is None:
                return None
            device = file_system.devices[found.tree] = status.st_dev
        return device, found.ino

    def owner(self, fsid: int, handle: bytes) -> tuple[int, int] | None:
        """To whom, and to which group, the inode belongs now; None if it is gone, or nobody can know it."""
        file_system = self._by_fsid.get(fsid)
        status = None if file_system is None else self._opened(file_system, handle)
        return None if status is None or not status.st_nlink else (status.st_uid, status.st_gid)

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
        return fsid, _FileSystem(path, status.st_dev, readable, {own.tree: status.st_dev} if own else {})

    def _opened(self, file_system: _FileSystem, handle: bytes) -> os.stat_result | None:
        try:
            there = os.open(file_system.path, _O_READ, dir_fd=self._share)
            try:
                fd = syscalls.open_by_handle(there, handle, os.O_PATH)
            finally:
                os.close(there)
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        except OSError:
            return None

    def _kind(self) -> str:
        """The type of the file system that the share is on."""
        around = [mount for mount in mounts() if self._below.startswith(mount.path.rstrip(b"/") + b"/")]
        return max(around, key=lambda mount: len(mount.path)).kind if around else "unknown"
