"""What is mounted where, without asking a mount: a dead one would not answer. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import threading
from pathlib import Path
from typing import Final, NamedTuple

from coherency.errors import MountError
from coherency.fuse import syscalls

log = logging.getLogger(__name__)

FILE_SYSTEM_TYPE: Final = "fuse.coherency"
_ANSWER_TIMEOUT_S: Final = 5.0
_MAX_SYMLINKS: Final = 40
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    path: bytes
    kind: str
    device: int  # the minor number; of a FUSE mount, that of its connection
    number: int  # not used again while it is mounted
    major: int  # of the device


def mounts() -> list[Mount]:
    """All mounts that this process sees, the oldest first."""
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            before, _, after = line.partition(b" - ")
            fields = before.split(b" ")
            path = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), fields[4])
            kind, (major, minor) = os.fsdecode(after.split(b" ")[0]), map(int, fields[2].split(b":"))
            found.append(Mount(path, kind, minor, int(fields[0]), major))
    return found


class MountList:
    """Paths of mounts that lie below a directory; read again only when something was mounted or unmounted."""

    def __init__(self, directory: bytes) -> None:
        self._prefix = directory.rstrip(b"/") + b"/"
        self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._changes = select.poll()
        self._changes.register(self._fd, select.POLLPRI)
        self._paths = self._read()

    def close(self) -> None:
        os.close(self._fd)

    def is_in_use(self, path: bytes) -> bool:
        """Whether something is mounted on ``path``, given from the directory on, or below it."""
        if self._changes.poll(0):
            self._paths = self._read()
        return any(mounted == path or mounted.startswith(path + b"/") for mounted in self._paths)

    def _read(self) -> list[bytes]:
        cut = len(self._prefix)
        return [mount.path[cut:] for mount in mounts() if mount.path.startswith(self._prefix)]


def place_of(path: Path) -> Path:
    """``path`` with all its symlinks resolved, without asking what is mounted there, which need not answer.

    The kernel says by itself that a mounted root is no symlink.
    """
    place = path.absolute()
    for _ in range(_MAX_SYMLINKS):
        if place.name == "..":
            return Path(os.path.realpath(place))
        place = Path(os.path.realpath(place.parent), place.name)
        try:
            place = place.parent / os.readlink(place)
        except OSError:
            break
    return place


def mount_at(path: str | os.PathLike[str], number: int | None = None) -> Mount | None:
    """The topmost mount at ``path`` (resolved up to its last component only), if it is a mount point; or that of the number."""
    parent, name = os.path.split(os.path.abspath(path))
    wanted = os.fsencode(os.path.join(os.path.realpath(parent), name))
    return next((each for each in reversed(mounts()) if each.path == wanted and number in (None, each.number)), None)


def open_mount(path: str | os.PathLike[str]) -> int:
    """Open the root of a mount of ours for reading.

    Raises :class:`MountError` if there is none to be seen at ``path``: what lies below it must not be taken for it, since
    what is written there is lost.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"cannot open {os.fspath(path)}: {error.strerror}") from error
    mount = mount_at(path)
    if mount is None or mount.kind != FILE_SYSTEM_TYPE or os.minor(os.fstat(fd).st_dev) != mount.device:
        os.close(fd)
        raise MountError(
            f"the daemon's mount cannot be seen at {os.fspath(path)}: if this is another mount namespace (a container), let "
            "mounts propagate into it (rslave), or start it after the daemon"
        )
    return fd


def remove_dead_mount(path: str | os.PathLike[str]) -> bool:
    """Unmount what a killed agent left at ``path``. False if nothing of ours is mounted there.

    It is that mount or none, whatever somebody else mounts or unmounts there meanwhile. Raises :class:`MountError` if a
    mount of ours there is alive, or does not answer.
    """
    if mount_at(path) is None:
        return False
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # which asks nobody
    try:
        number = _mount_number(root)
        mount = mount_at(path, number)  # a path may lead to another one than the topmost there: below what covers that
        return mount is not None and mount.kind == FILE_SYSTEM_TYPE and _remove_if_dead(path, root)
    finally:
        os.close(root)


def _mount_number(fd: int) -> int:
    """See proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def _remove_if_dead(path: str | os.PathLike[str], root: int) -> bool:
    answers: list[int] = []
    # On a thread of its own: an agent that is stopped would hold us for as long as it is.
    asking = threading.Thread(target=lambda: answers.append(_ask(root)), daemon=True)
    asking.start()
    asking.join(_ANSWER_TIMEOUT_S)
    if not answers:
        raise MountError(f"{os.fspath(path)} is a mount of ours whose agent does not answer: end that one first")
    if answers[0] not in (errno.ENOTCONN, errno.ECONNABORTED):
        raise MountError(
            f"{os.fspath(path)} is a mount of ours already: choose another mount point, or unmount that one first"
        )
    try:
        syscalls.umount(os.fsdecode(syscalls.proc_path(root)), syscalls.MNT_DETACH)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that somebody else has unmounted it
            raise
    return True


def detach(path: str, device: int) -> bool:
    """Unmount what has this device number at ``path``, in use or not: who uses it gets errors from now on.

    Nothing happens if somebody else has unmounted it. False: it stays, since another mount lies on it.
    """
    try:
        there = mount_at(path)
    except OSError as error:  # no descriptor is left for it
        log.warning("what is mounted on %s cannot be read: %s", path, error)
    else:
        if there is None:
            return True
        if there.device != device:
            log.warning("%s is covered by another mount, which stays", path)
            return False
    try:
        # By force, which ends the connection: copies of the mount in other mount namespaces may outlive this one.
        syscalls.umount(path, syscalls.MNT_FORCE)
    except OSError as error:
        if error.errno != errno.EBUSY:
            return True  # somebody else has unmounted it meanwhile
        try:
            syscalls.umount(path, syscalls.MNT_DETACH)
        except OSError as again:
            log.warning("cannot unmount %s: %s", path, again)
    return True


def _ask(root: int) -> int:
    """The errno of a question that the kernel does not answer itself, as it may a stat of a dead mount."""
    try:
        os.fstatvfs(root)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def send_dirty_pages(mountpoint: str) -> None:
    """The kernel sends what it has not written yet. It does not wait for the answers of a FUSE server (measured on 6.18.44).

    Nothing happens if the mount cannot be opened any more. `OSError` if the kernel reports an error.
    """
    try:
        root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        syscalls.syncfs(root)
    finally:
        os.close(root)
