"""The lower directory of a guest: the export of the daemon, reached by its mount point or, in a virtual machine, by virtiofs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from coherency.errors import MountError, UsageError
from coherency.fuse.mounts import open_mount
from coherency.fuse.passthrough import Passthrough
from coherency.leases import introduction
from coherency.protocol import Welcome
from coherency.rendezvous import EXPORT_DIRECTORY_NAME


def open_export(welcome: Welcome, mountpoint: Path) -> int:
    """Open the export where the daemon has mounted it, on the same machine.

    Raises :class:`UsageError` if a mount at ``mountpoint`` would contain itself or hide it, and :class:`MountError`.
    """
    lower = Path(os.path.realpath(welcome.export))
    _check_place(mountpoint, lower, Path(os.path.realpath(welcome.share)))
    return open_mount(lower)


def open_given(given: Path, welcome: Welcome, mountpoint: Path) -> int:
    """Open the export where the operator says that it is to be seen: the directory itself, or ``export`` in it.

    In a virtual machine it is the latter if virtiofsd serves the daemon's window. The daemon tells by the introduction which of
    them it is. Raises like ``open_export``.
    """
    place = Path(os.path.realpath(given))
    _check_place(mountpoint, place)
    for lower in (place, place / EXPORT_DIRECTORY_NAME):
        try:
            fd = os.open(lower, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise MountError(f"cannot open the lower directory {lower}: {error.strerror}") from error
        if introduce(welcome, fd):
            return fd
        os.close(fd)
    raise MountError(
        f"{given} does not lead to {welcome.export} of the host: mount there what virtiofsd serves of it; coherency vm-args says how"
    )


def _check_place(mountpoint: Path, lower: Path, *others: Path) -> None:
    for tree in (*others, lower):
        if tree == mountpoint or tree in mountpoint.parents:
            raise UsageError(f"{mountpoint} lies in {tree}: the mount would contain itself; choose another mount point")
    if mountpoint in lower.parents:
        raise UsageError(f"{mountpoint} contains {lower}, which the mount would hide; choose another mount point")


def introduce(welcome: Welcome, lower: int) -> bool:
    """Let the daemon see by which process this guest uses the export: it asks for a name that does not exist.

    False if the daemon has not heard it, since the directory does not lead there.
    """
    try:
        os.stat(introduction(welcome.session), dir_fd=lower, follow_symlinks=False)
    except OSError as error:
        return error.errno == errno.EISCONN
    return False


def same_tree(lower: int, file_system: Passthrough) -> int:
    """Returns ``lower``, and closes it if it raises: the kernel of this mount knows nodes of the tree that it began with."""
    try:
        if os.fstat(lower).st_ino != file_system.nodes.root.ino:
            raise MountError("another directory is served under this name now; unmount this guest, and mount it again")
    except BaseException:
        os.close(lower)
        raise
    return lower


def is_same_mount(lower: int, file_system: Passthrough) -> bool:
    """Whether the open directory is of the very mount that the file system is on already, and that still answers."""
    # The number of a dead mount is not used again as long as a descriptor of it is open. In a virtual machine it stays the same.
    try:
        return os.fstat(lower).st_dev == os.fstat(file_system.nodes.root.fd).st_dev
    except OSError:
        return False
