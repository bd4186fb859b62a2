"""A session on a real mount: what the kernel is told takes effect, whoever gives up gets away, and it ends whatever happens."""

import ctypes
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import parse_mountinfo
from tests.passthrough import Served, eventually, serve
from tests.scenarios.comparing import UserProcess, attempt
from tests.t4_fuse.conftest import FOREVER

ROOT = 1
PROMPTLY_S = 5.0


@pytest.fixture(scope="module")
def remembering(make_socket_dir: Callable[[], Path]) -> Iterator[Served]:
    """Its kernel believes what it knows for ever."""
    with serve(make_socket_dir(), kernel_cache=FOREVER) as served:
        yield served


@pytest.fixture
def mount(make_socket_dir: Callable[[], Path]) -> Iterator[Served]:
    with serve(make_socket_dir()) as served:
        yield served


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for this test's own file."""
    return str(request.node.name)


def is_mounted(path: Path) -> bool:
    return any(mount.mountpoint == path for mount in parse_mountinfo(Path("/proc/self/mountinfo").read_bytes()))


# --- notifications: each shows what was stale before it ---


def test_invalidated_inode_has_new_attributes(remembering: Served, name: str) -> None:
    mine, theirs = remembering.mountpoint / name, remembering.directory / name
    mine.touch(mode=0o644)
    os.stat(mine)
    theirs.chmod(0o600)
    assert os.stat(mine).st_mode & 0o777 == 0o644  # negative control
    assert remembering.ask("invalidate_inode", remembering.ask("node_of", theirs.stat().st_ino))
    assert os.stat(mine).st_mode & 0o777 == 0o600


def test_invalidated_pages_are_read_again(remembering: Served, name: str) -> None:
    mine, theirs = remembering.mountpoint / name, remembering.directory / name
    mine.write_text("old text")
    assert mine.read_text() == "old text"
    before = theirs.stat()
    theirs.write_text("new text")
    os.utime(theirs, ns=(before.st_atime_ns, before.st_mtime_ns))  # or else the kernel would notice by itself
    node = remembering.ask("node_of", before.st_ino)
    assert remembering.ask("invalidate_inode", node)  # attributes only
    assert mine.read_text() == "old text"  # negative control
    assert remembering.ask("invalidate_inode", node, 0, 0)
    assert mine.read_text() == "new text"


@pytest.mark.parametrize("how", ["entry", "expire-only", "epoch"])
def test_invalidated_name_is_looked_up(remembering: Served, name: str, how: str) -> None:
    mine, theirs = remembering.mountpoint / name, remembering.directory / name
    (theirs.parent / "other").write_text("other")
    mine.write_text("first")
    os.rename(theirs.parent / "other", theirs)
    assert mine.read_text() == "first"  # negative control
    if how == "entry":
        offered, done = True, remembering.ask("invalidate_entry", ROOT, name)
    elif how == "expire-only":
        offered, done = (
            remembering.ask("offers", "HAS_EXPIRE_ONLY"),
            remembering.ask("invalidate_entry", ROOT, name, True),
        )
    else:
        offered, done = remembering.statistic("protocol_minor") >= 44, remembering.ask("increment_epoch")
    assert done == offered
    assert mine.read_text() == ("other" if done else "first")
    theirs.unlink()
    assert mine.exists()  # negative control
    assert remembering.ask("invalidate_entry", ROOT, name)
    assert not mine.exists()


def test_what_the_kernel_does_not_know_cannot_be_invalidated(remembering: Served) -> None:
    assert not remembering.ask("invalidate_inode", 123456789)
    assert not remembering.ask("invalidate_entry", 123456789, "name")
    assert not remembering.ask("invalidate_entry", ROOT, "never looked up")


# --- interrupts ---


def interrupted_mkdir(after_s: float = 0.2) -> str:
    """What a mkdir(2) returns to somebody whom a signal interrupts; Python's own might try again."""
    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    return "made" if libc.mkdir(b"new", 0o755) == 0 else errno.errorcode[ctypes.get_errno()]


def test_a_change_that_is_held_can_be_interrupted(make_socket_dir: Callable[[], Path]) -> None:
    with serve(make_socket_dir(), hold_s=600) as held:
        began = time.monotonic()
        child = UserProcess(held.mountpoint, interrupted_mkdir, uid=0, gid=0)
        assert child.result() == "EINTR"
        assert time.monotonic() - began < PROMPTLY_S
        assert os.listdir(held.mountpoint) == []
        eventually(lambda: held.statistic("in_flight") == 0)  # the listing's RELEASEDIR may still be on its way


def test_a_change_that_is_held_can_be_killed(make_socket_dir: Callable[[], Path]) -> None:
    with serve(make_socket_dir(), hold_s=600) as held:
        child = subprocess.Popen(["mkdir", held.mountpoint / "new"])
        eventually(lambda: held.statistic("in_flight") == 1)
        began = time.monotonic()
        child.kill()
        child.wait()
        assert time.monotonic() - began < PROMPTLY_S
        eventually(lambda: held.statistic("in_flight") == 0)
        assert os.listdir(held.mountpoint) == []


def test_a_change_that_is_not_held_is_not_interrupted(mount: Served) -> None:
    """Negative control."""
    child = UserProcess(mount.mountpoint, interrupted_mkdir, uid=0, gid=0)
    assert child.result() == "made"
    assert os.listdir(mount.mountpoint) == ["new"]


# --- operations that wait ---


def test_operations_that_wait_do_not_hold_others_up(mount: Served) -> None:
    (mount.directory / "f").write_text("content")
    threads = mount.statistic("threads")
    # In directories of their own, since the kernel looks up one new name at a time in each.
    for number in range(12):
        (mount.directory / str(number)).mkdir()
    waiting = [
        UserProcess(mount.mountpoint, lambda: os.stat(f"{number}/gate-{number}"))  # noqa: B023
        for number in range(12)
    ]
    eventually(lambda: bool(mount.ask("waiting") == 12))
    assert mount.statistic("threads") >= threads + 10
    assert (mount.mountpoint / "f").read_text() == "content"
    (mount.mountpoint / "new").mkdir()
    mount.ask("check")
    mount.ask("open_gate")
    assert [process.result() for process in waiting] == ["ENOENT"] * 12
    assert mount.ask("waiting") == 0


def test_more_operations_than_threads_take_turns(make_socket_dir: Callable[[], Path]) -> None:
    with serve(make_socket_dir(), max_threads=3) as mount:
        for number in range(8):
            (mount.directory / str(number)).mkdir()
        waiting = [
            UserProcess(mount.mountpoint, lambda: os.stat(f"{number}/gate-{number}"))  # noqa: B023
            for number in range(8)
        ]
        eventually(lambda: bool(mount.ask("waiting") == 3))
        mount.ask("open_gate")
        assert [process.result() for process in waiting] == ["ENOENT"] * 8
        assert mount.statistic("threads") == 3


# --- the end ---


def test_unmounting_what_is_idle(mount: Served) -> None:
    (mount.mountpoint / "f").touch()
    mount.ask("close")
    assert not is_mounted(mount.mountpoint)
    assert mount.ask("is_over")
    assert os.listdir(mount.directory) == ["f"]
    mount.ask("close")


def test_unmounting_what_is_in_use(mount: Served) -> None:
    """Open files, a working directory, and a call under way: all of them get errors, none of them hangs."""
    descriptor = os.open(mount.mountpoint / "f", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"written")
    stuck = UserProcess(mount.mountpoint, lambda: os.stat("gate-x"))
    eventually(lambda: bool(mount.ask("waiting") == 1))
    mount.ask("open_gate_later", 0.5)
    mount.ask("close")
    assert not is_mounted(mount.mountpoint)
    assert stuck.result() in ("ECONNABORTED", "ENOTCONN", "ENOENT")
    assert attempt(os.pread, descriptor, 9, 0) in ("ENOTCONN", "ECONNABORTED", "EIO")
    assert attempt(os.write, descriptor, b"more") in ("ENOTCONN", "ECONNABORTED", "EIO")
    assert attempt(os.close, descriptor) in ("ENOTCONN", "ECONNABORTED", None)
    assert (mount.directory / "f").read_text() == "written"
    eventually(lambda: bool(mount.ask("is_over")))


def test_unmounted_by_somebody_else(mount: Served) -> None:
    (mount.mountpoint / "f").touch()
    subprocess.run(["umount", mount.mountpoint], check=True)
    assert mount.ask("is_over", 20)
    mount.ask("close")


def test_dirty_pages_are_written_at_the_end(make_socket_dir: Callable[[], Path]) -> None:
    with serve(make_socket_dir(), kernel_cache={"writeback": True}) as mount:
        descriptor = os.open(mount.mountpoint / "f", os.O_RDWR | os.O_CREAT)
        os.write(descriptor, b"in the kernel only")
        assert (mount.directory / "f").read_text() == ""  # negative control
        mount.ask("close")
        assert (mount.directory / "f").read_text() == "in the kernel only"
        assert attempt(os.close, descriptor) in (None, "ENOTCONN", "ECONNABORTED")


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Path]:
    """The control files of FUSE connections."""
    where = tmp_path / "connections"
    where.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_an_aborted_connection_is_over(mount: Served, connections: Path) -> None:
    (mount.mountpoint / "f").touch()
    stuck = UserProcess(mount.mountpoint, lambda: os.stat("gate-x"))
    eventually(lambda: bool(mount.ask("waiting") == 1))
    (connections / str(mount.statistic("connection")) / "abort").write_text("1")
    assert stuck.result() in ("ECONNABORTED", "ENOTCONN")
    assert attempt(os.stat, mount.mountpoint / "f") in ("ECONNABORTED", "ENOTCONN")
    assert not mount.ask("is_over")  # an operation still runs
    mount.ask("open_gate")
    assert mount.ask("is_over", 20)
    mount.ask("close")
    assert not is_mounted(mount.mountpoint)


def test_what_lies_on_top_is_not_unmounted(mount: Served) -> None:
    mount.logs_expected = True
    subprocess.run(["mount", "-t", "tmpfs", "none", mount.mountpoint], check=True)
    (mount.mountpoint / "on top").touch()
    mount.ask("close")
    assert (mount.mountpoint / "on top").exists()
    subprocess.run(["umount", mount.mountpoint], check=True)
    subprocess.run(["umount", mount.mountpoint], check=True)


def test_a_copy_in_another_mount_namespace_does_not_keep_it(mount: Served) -> None:
    """As every container has that was started while it was mounted, unless mounts propagate there."""
    (mount.mountpoint / "f").touch()
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "600"]) as elsewhere:
        try:
            eventually(lambda: os.readlink(f"/proc/{elsewhere.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
            began_s = time.monotonic()
            mount.ask("close")
            assert mount.ask("is_over")
            assert time.monotonic() - began_s < PROMPTLY_S
        finally:
            elsewhere.kill()


def test_an_unmounted_file_system_is_known_to_be_gone(mount: Served) -> None:
    assert not mount.ask("is_unknown")
    os.stat(mount.mountpoint)
    subprocess.run(["umount", mount.mountpoint], check=True, timeout=60)
    eventually(lambda: mount.ask("is_gone"))


def test_an_aborted_one_that_is_still_mounted_is_not(mount: Served) -> None:
    """Its kernel may go on answering from memory."""
    fd = os.open(mount.mountpoint, os.O_RDONLY)
    try:
        subprocess.run(["umount", "--force", mount.mountpoint], check=False, timeout=60, capture_output=True)
        eventually(lambda: mount.ask("is_over"))
        assert not mount.ask("is_gone")
        assert is_mounted(mount.mountpoint)
    finally:
        os.close(fd)
