"""The runtime directory of one daemon: what makes a name its own, and what a killed predecessor left there.

Rules:

1. Who holds the flock on `lock` owns the name.  The kernel lets go of it when the process ends, however it ends; a
   forked child that lives on would keep it.
2. `lock` has content from the moment its owner may have served until `release`.  So content found by a new owner means
   that the predecessor died without `release`, even if others died between them and removed all other traces.
3. Only the owner removes anything, and nothing but what a daemon makes: the socket, the table link, a FUSE mount at
   `export`, and on `release` the directories and `lock` itself.  The window stays (`window`), and with it the directory.
4. A dead mount is never asked for anything (it might not answer): what is mounted stands in /proc/self/mountinfo.
5. A `lock` that was removed between opening and locking is nobody's: start again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import Final

from coherency.daemon.journal import remove_journal
from coherency.daemon.window import Window
from coherency.errors import AlreadyServing, MountError, UsageError
from coherency.fuse.mounts import FILE_SYSTEM_TYPE, mounts
from coherency.fuse.syscalls import MNT_DETACH, umount
from coherency.rendezvous import (
    CONTROL_SOCKET_NAME,
    EXPORT_DIRECTORY_NAME,
    LOCK_FILE_NAME,
    SESSIONS_FILE_NAME,
    TABLE_LINK_NAME,
    WINDOW_DIRECTORY_NAME,
    check_share_name,
)

_log = logging.getLogger(__name__)

DIRECTORY_MODE: Final = 0o750
"""Whoever may not connect may not use the export either: it would lead around the rights of the share's parents."""
_LOCK_MODE: Final = 0o644
_CLAIM_ATTEMPTS: Final = 100


class RuntimeDirectory:
    """The directory `root/name` and the paths in it.  Nothing exists before `claim`.

    Raises `UsageError` if `name` is none.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = check_share_name(name)
        self.path = root / name
        self.lock = self.path / LOCK_FILE_NAME
        self.control_socket = self.path / CONTROL_SOCKET_NAME
        self.table = self.path / TABLE_LINK_NAME
        self.export = self.path / EXPORT_DIRECTORY_NAME
        self.sessions = self.path / SESSIONS_FILE_NAME
        self.window = Window(self.path / WINDOW_DIRECTORY_NAME)

    def claim(self) -> Claim:
        """Make the name this process's own, and the directory as it should be before serving.

        Raises `AlreadyServing` if another process holds it; `UsageError` if the directory is not this user's or holds
        what no daemon puts there; `MountError` if a dead mount cannot be removed; `OSError` for the rest.
        """
        for _ in range(_CLAIM_ATTEMPTS):
            try:
                self._make_directories()
                lock_fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _LOCK_MODE)
            except FileNotFoundError:
                continue  # the predecessor's release() came between
            try:
                if not self._locked(lock_fd):
                    os.close(lock_fd)
                    continue
                unclean = self._take_over(lock_fd)
            except BaseException:
                os.close(lock_fd)
                raise
            return Claim(self, lock_fd, unclean=unclean)
        raise UsageError(f"{self.path} keeps disappearing while it is being claimed")

    def _make_directories(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        _make_own_directory(self.path)

    def _locked(self, lock_fd: int) -> bool:
        """True if this process holds the name; False by rule 5."""
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyServing(self.name, _pid_in(lock_fd)) from None
        try:
            return os.path.samestat(os.stat(self.lock, follow_symlinks=False), os.fstat(lock_fd))
        except FileNotFoundError:
            return False

    def _take_over(self, lock_fd: int) -> bool:
        """Remove a predecessor's leftovers.  True if it died without releasing the name."""
        unclean = os.fstat(lock_fd).st_size > 0
        # Written over before it is cut to length: the content must not vanish in between (rule 2).
        content = f"{os.getpid()}\n".encode()
        os.pwrite(lock_fd, content, 0)
        os.ftruncate(lock_fd, len(content))
        # Whatever the umask says, and whoever a predecessor let in.
        os.chown(self.path, -1, os.getegid())
        self.path.chmod(DIRECTORY_MODE)
        unclean |= self._unmount_export()
        for path in (self.control_socket, self.table):
            unclean |= _remove_if_there(path)
        _make_own_directory(self.export)
        if unclean:
            _log.info("cleaned up after a daemon that did not end in good order: %s", self.path)
        return unclean

    def _unmount_export(self) -> bool:
        # Resolved only up to the directory: resolving the mount point itself could ask a dead mount.
        mount_point = Path(os.path.realpath(self.path)) / EXPORT_DIRECTORY_NAME
        mounted = [mount.kind for mount in mounts() if mount.path == os.fsencode(mount_point)]
        for kind in reversed(mounted):
            if kind != FILE_SYSTEM_TYPE:
                raise UsageError(f"a file system of type {kind} is mounted at {mount_point}: not one of ours")
            try:
                umount(str(mount_point), MNT_DETACH)
            except OSError as error:
                raise MountError(
                    f"cannot unmount what a killed daemon left at {mount_point}: {error.strerror}"
                ) from error
        return bool(mounted)


class Claim:
    """A name held by this process, from `RuntimeDirectory.claim` to `release` or the end of the process.

    `unclean`: the predecessor died without `release`.  Then agents that have not noticed yet may still believe its
    table, and no change may be applied before `TRUST_NS + TRUST_MARGIN_NS` have passed since the claim; and guests may
    still be granted what its journal (`directory.sessions`) says.
    """

    def __init__(self, directory: RuntimeDirectory, lock_fd: int, *, unclean: bool) -> None:
        """Use `RuntimeDirectory.claim` instead."""
        self.directory = directory
        self.unclean = unclean
        self._lock_fd: int | None = lock_fd

    def release(self, *, clean: bool = True) -> None:
        """Remove what `claim` and the daemon made, except the root, and give the name free.  May be called again.

        To be called last: the export unmounted, the socket closed.  What cannot be removed is logged and left, and the
        next claim finds it `unclean`, as it does if this one says so.
        """
        lock_fd, self._lock_fd = self._lock_fd, None
        if lock_fd is None:
            return
        if not clean:
            os.close(lock_fd)
            return
        directory = self.directory
        try:
            for path in (directory.control_socket, directory.table):
                _remove_if_there(path)
            remove_journal(directory.sessions)
            directory.export.rmdir()
            directory.lock.unlink()  # by rule 2 only when nothing is left that the next claim should know of
            with contextlib.suppress(OSError):
                directory.path.rmdir()  # fails if the next claim has begun already, or there is a window
        except (OSError, UsageError) as error:
            _log.warning("could not remove everything in %s: %s", directory.path, error)
        finally:
            os.close(lock_fd)

    def check(self) -> None:
        """Assert that the name is still this process's: the lock lies where the next claim will look for it."""
        assert self._lock_fd is not None, "released"
        found = os.stat(self.directory.lock, follow_symlinks=False)
        assert os.path.samestat(found, os.fstat(self._lock_fd)), found
        assert _pid_in(self._lock_fd) == os.getpid()


def _make_own_directory(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=DIRECTORY_MODE)
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{path} is not a directory")
    if found.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to user {found.st_uid}, not to this one")


def _remove_if_there(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EPERM) and path.is_dir():
            raise UsageError(f"{path} is a directory: no daemon made that") from None
        raise
    return True


def _pid_in(lock_fd: int) -> int | None:
    content = os.pread(lock_fd, 32, 0).strip()
    return int(content) if content.isdigit() else None
