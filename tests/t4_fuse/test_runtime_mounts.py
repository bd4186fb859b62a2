"""Claiming a name whose last daemon died with its export mounted: nothing may ask that mount anything."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherency.daemon.runtime import RuntimeDirectory
from coherency.errors import UsageError
from coherency.fuse import syscalls
from coherency.fuse.mounts import FILE_SYSTEM_TYPE, mount_at


def mount_fuse(directory: Path) -> int:
    """A mount of ours whose server, the holder of the returned descriptor, never answers."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    syscalls.mount("test", str(directory), FILE_SYSTEM_TYPE, 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0")
    return fd


@contextlib.contextmanager
def detached_in_the_end(directory: Path) -> Iterator[None]:
    try:
        yield
    finally:
        while mount_at(directory):
            syscalls.umount(str(directory), syscalls.MNT_DETACH)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_dead_export_is_unmounted(socket_dir: Path, layers: int) -> None:
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.export.mkdir(parents=True)
    with detached_in_the_end(directory.export):
        for _ in range(layers):
            os.close(mount_fuse(directory.export))
        with pytest.raises(OSError, match="not connected"):
            directory.export.stat()

        claim = directory.claim()
        assert claim.unclean
        assert mount_at(directory.export) is None
        assert list(directory.export.iterdir()) == []
        claim.release()
    assert list(socket_dir.iterdir()) == []


def test_an_export_that_hangs_is_unmounted_without_waiting_for_it(socket_dir: Path) -> None:
    """Its server is there and silent, as when a stopped process still holds the connection."""
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.export.mkdir(parents=True)
    with detached_in_the_end(directory.export):
        server = mount_fuse(directory.export)
        claim = directory.claim()
        assert claim.unclean
        claim.release()
        os.close(server)


def test_the_path_may_need_escapes_and_lead_through_links(socket_dir: Path) -> None:
    (socket_dir / "a b\\c\nd").mkdir()
    (socket_dir / "link").symlink_to(socket_dir / "a b\\c\nd")
    directory = RuntimeDirectory(socket_dir / "link", "share-1")
    directory.export.mkdir(parents=True)
    with detached_in_the_end(directory.export):
        os.close(mount_fuse(directory.export))
        claim = directory.claim()
        assert claim.unclean
        claim.release()


def test_somebody_elses_mount_is_left_alone(socket_dir: Path) -> None:
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.export.mkdir(parents=True)
    syscalls.mount("none", str(directory.export), "tmpfs", 0, "size=4k")
    with detached_in_the_end(directory.export):
        with pytest.raises(UsageError, match="type tmpfs is mounted"):
            directory.claim()
        assert mount_at(directory.export) is not None


@pytest.mark.expected_logs("could not remove everything in .*: .*busy")
def test_an_export_that_is_still_mounted_at_release_is_found_by_the_next(socket_dir: Path) -> None:
    directory = RuntimeDirectory(socket_dir, "share-1")
    claim = directory.claim()
    with detached_in_the_end(directory.export):
        os.close(mount_fuse(directory.export))
        claim.release()
        successor = directory.claim()
        assert successor.unclean
        successor.release()
    assert list(socket_dir.iterdir()) == []
