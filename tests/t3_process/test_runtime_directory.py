"""A name belongs to one process, and comes back whole after that was killed."""

import os
import socket
import stat
from pathlib import Path

import pytest

from coherency.daemon.runtime import RuntimeDirectory
from coherency.errors import AlreadyServing, UsageError
from tests.control_daemon import ControlDaemon, DaemonProcess


def leave_a_socket(path: Path) -> None:
    """A bound socket whose owner is gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_a_claim_makes_the_directory_and_release_removes_it(socket_dir: Path) -> None:
    directory = RuntimeDirectory(socket_dir / "run", "share-1")
    claim = directory.claim()
    claim.check()
    assert not claim.unclean
    assert directory.export.is_dir()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o750
    assert directory.lock.read_text() == f"{os.getpid()}\n"

    leave_a_socket(directory.control_socket)
    directory.table.symlink_to("/proc/1/fd/3")
    claim.release()
    claim.release()
    assert list((socket_dir / "run").iterdir()) == []


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_the_directorys_mode_does_not_depend_on_the_umask(socket_dir: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        claim = RuntimeDirectory(socket_dir, "share-1").claim()
    finally:
        os.umask(old)
    assert stat.S_IMODE(claim.directory.path.stat().st_mode) == 0o750
    claim.release()


@pytest.mark.needs_fuse
def test_whom_a_killed_daemon_let_in_its_successor_does_not(socket_dir: Path) -> None:
    (socket_dir / "share-1").mkdir()
    os.chown(socket_dir / "share-1", -1, 65534)
    (socket_dir / "share-1").chmod(0o777)
    claim = RuntimeDirectory(socket_dir, "share-1").claim()
    status = claim.directory.path.stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (os.getegid(), 0o750)
    claim.release()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x"])
def test_impossible_names(socket_dir: Path, name: str) -> None:
    with pytest.raises(UsageError):
        RuntimeDirectory(socket_dir, name)


def test_a_name_is_held_once_in_a_process(socket_dir: Path) -> None:
    claim = RuntimeDirectory(socket_dir, "share-1").claim()
    with pytest.raises(AlreadyServing, match=f"process {os.getpid()} is already serving 'share-1'"):
        RuntimeDirectory(socket_dir, "share-1").claim()
    RuntimeDirectory(socket_dir, "share-2").claim().release()
    claim.release()


def test_a_second_daemon_is_refused_and_disturbs_nothing(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        before = sorted((path.name, path.lstat().st_ino) for path in (socket_dir / "share-1").iterdir())
        with pytest.raises(AlreadyServing) as caught:
            RuntimeDirectory(socket_dir, "share-1").claim()
        assert caught.value.pid == daemon.pid
        assert sorted((path.name, path.lstat().st_ino) for path in (socket_dir / "share-1").iterdir()) == before


def test_a_daemon_that_stops_in_order_leaves_nothing(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        daemon.stop_in_order()
    assert list(socket_dir.iterdir()) == []
    claim = RuntimeDirectory(socket_dir, "share-1").claim()
    assert not claim.unclean
    claim.release()


def test_what_a_killed_daemon_left_is_cleaned_up(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        daemon.kill()
    directory = RuntimeDirectory(socket_dir, "share-1")
    assert directory.control_socket.is_socket()
    directory.table.symlink_to(f"/proc/{daemon.pid}/fd/3")

    claim = directory.claim()
    assert claim.unclean
    assert sorted(path.name for path in directory.path.iterdir()) == ["export", "lock"]
    assert directory.lock.read_text() == f"{os.getpid()}\n"
    claim.release()
    with ControlDaemon(socket_dir, "share-1") as successor:
        assert not successor.claim.unclean


def test_it_stays_unclean_though_somebody_else_removed_the_traces(socket_dir: Path) -> None:
    """As if a second daemon was killed just after it had cleaned up after the first."""
    with DaemonProcess(socket_dir, "share-1") as daemon:
        daemon.kill()
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.control_socket.unlink()
    directory.export.rmdir()
    claim = directory.claim()
    assert claim.unclean
    claim.release()


def test_negative_control_without_the_lock_file_nothing_tells(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        daemon.kill()
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.control_socket.unlink()
    directory.lock.unlink()
    claim = directory.claim()
    assert not claim.unclean
    claim.release()


def test_a_lock_that_never_served_is_clean(socket_dir: Path) -> None:
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.path.mkdir()
    directory.lock.touch()
    claim = directory.claim()
    assert not claim.unclean
    claim.release()


def test_leftovers_without_a_lock_are_unclean(socket_dir: Path) -> None:
    directory = RuntimeDirectory(socket_dir, "share-1")
    directory.path.mkdir()
    directory.table.symlink_to("/proc/1/fd/3")
    claim = directory.claim()
    assert claim.unclean
    assert not directory.table.is_symlink()
    claim.release()


def test_a_lock_that_is_replaced_while_it_is_claimed_is_claimed_again(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 5: the predecessor's release comes between opening the lock and locking it."""
    directory = RuntimeDirectory(socket_dir, "share-1")
    predecessor = directory.claim()
    opened = os.open

    def open_late(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = opened(path, flags, mode)
        if path == directory.lock:
            predecessor.release()
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_late)
        claim = directory.claim()
    claim.check()
    claim.release()
    assert list(socket_dir.iterdir()) == []


@pytest.mark.parametrize("entry", ["table", "control.sock"])
def test_a_directory_in_the_place_of_a_file_is_not_removed(socket_dir: Path, entry: str) -> None:
    (socket_dir / "share-1" / entry).mkdir(parents=True)
    with pytest.raises(UsageError, match="no daemon made that"):
        RuntimeDirectory(socket_dir, "share-1").claim()
    assert (socket_dir / "share-1" / entry).is_dir()


@pytest.mark.parametrize("entry", ["share-1", "share-1/export"])
def test_a_file_in_the_place_of_a_directory(socket_dir: Path, entry: str) -> None:
    (socket_dir / entry).parent.mkdir(exist_ok=True)
    (socket_dir / entry).touch()
    with pytest.raises(UsageError, match="is not a directory"):
        RuntimeDirectory(socket_dir, "share-1").claim()


def test_a_link_in_the_place_of_the_lock_is_not_followed(socket_dir: Path) -> None:
    (socket_dir / "share-1").mkdir()
    (socket_dir / "victim").write_text("precious")
    (socket_dir / "share-1" / "lock").symlink_to(socket_dir / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        RuntimeDirectory(socket_dir, "share-1").claim()
    assert (socket_dir / "victim").read_text() == "precious"


@pytest.mark.needs_fuse
def test_a_directory_of_another_user_is_refused(socket_dir: Path) -> None:
    """Its owner could put anything in the place of what the daemon makes."""
    (socket_dir / "share-1").mkdir()
    os.chown(socket_dir / "share-1", 65534, 65534)
    with pytest.raises(UsageError, match="belongs to user 65534"):
        RuntimeDirectory(socket_dir, "share-1").claim()


@pytest.mark.expected_logs(r"could not remove everything in .*: \[Errno 39\]")
def test_what_cannot_be_removed_is_found_unclean_by_the_next(socket_dir: Path) -> None:
    claim = RuntimeDirectory(socket_dir, "share-1").claim()
    (claim.directory.export / "stray").touch()
    claim.release()
    (claim.directory.export / "stray").unlink()
    successor = RuntimeDirectory(socket_dir, "share-1").claim()
    assert successor.unclean
    successor.release()


def test_claims_do_not_leak_descriptors(socket_dir: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    claim = RuntimeDirectory(socket_dir, "share-1").claim()
    for _ in range(10):
        with pytest.raises(AlreadyServing):
            RuntimeDirectory(socket_dir, "share-1").claim()
    claim.release()
    assert sorted(os.listdir("/proc/self/fd")) == before
