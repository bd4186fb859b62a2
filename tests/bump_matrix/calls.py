"""Each row of the bump matrix as system calls of a program in a guest.

A row is a generator. What comes before its first `yield` is over before the observers look for the first time; what
comes after it is the change. Where files are open, a second `yield` lets the observers look while they still are.
"""

import contextlib
import errno
import mmap
import os
import resource
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from coherency.fuse import syscalls
from tests.bump_matrix.ground import FILE_BYTES, GROUP, USER, acl
from tests.bump_matrix.requests import EXCHANGE, KEEP_SIZE, NOREPLACE, PUNCH_HOLE, WHITEOUT, ZERO_RANGE


class Place(NamedTuple):
    """Where a row happens: its tree, as the acting guest and as the host sees it."""

    at: Path
    on_the_share: Path
    daemon_pid: int | None
    """None: whoever plays the row limits what the daemon may write, where a row asks for that (`LIMITED`)."""


class Refused(Exception):
    """The file system of the share cannot do that at all, nor could a program on the host."""


Change: TypeAlias = Generator[None, None, None]


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def as_user(work: Callable[[], object]) -> None:
    """Do `work` in a thread of an unprivileged user: no CAP_FSETID, for instance."""
    problems: list[BaseException] = []

    def in_thread() -> None:
        try:
            syscalls.set_fs_ids(USER, USER)
            work()
        except BaseException as problem:  # noqa: BLE001 - raised again below
            problems.append(problem)

    thread = threading.Thread(target=in_thread, name="user")
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


LIMITED = {"setattr-partial": FILE_BYTES}
"""Rows in which no file of the share may grow beyond that."""


@contextlib.contextmanager
def daemon_files_at_most(pid: int | None, size_bytes: int) -> Iterator[None]:
    """No file of the share grows beyond that."""
    if pid is None:
        yield
        return
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def _if_possible() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        raise Refused(os.strerror(error.errno)) from error


def _rename2(place: Place, old: str, new: str, flags: int) -> None:
    with opened(place.at, os.O_RDONLY) as at, _if_possible():
        syscalls.renameat2(at, os.fsencode(old), at, os.fsencode(new), flags)


def _fallocate(place: Place, mode: int, offset: int, length: int) -> None:
    with opened(place.at / "file", os.O_RDWR) as fd, _if_possible():
        syscalls.fallocate(fd, mode, offset, length)


# ---- rows of more than one call ----


def _create(place: Place) -> Change:
    yield
    with opened(place.at / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640) as fd:
        os.write(fd, b"new")
        yield


def _create_existing(place: Place) -> Change:
    yield
    with opened(place.at / "file", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600):
        yield


def _tmpfile(place: Place) -> Change:
    yield
    with opened(place.at, os.O_TMPFILE | os.O_RDWR, 0o600) as fd:
        os.write(fd, b"without a name")
        yield


def _link_tmpfile(place: Place) -> Change:
    with opened(place.at, os.O_TMPFILE | os.O_RDWR, 0o600) as fd, opened(place.at, os.O_RDONLY) as at:
        os.write(fd, b"named later")
        yield
        os.link(syscalls.proc_path(fd), b"new", dst_dir_fd=at, follow_symlinks=True)
        yield


def _setattr_size_handle(place: Place) -> Change:
    with opened(place.at / "file", os.O_RDWR) as fd:
        yield
        os.ftruncate(fd, FILE_BYTES + 1)
        yield


def _setattr_kill(place: Place) -> Change:
    with opened(place.at / "setid", os.O_RDWR) as fd:
        yield
        as_user(lambda: os.ftruncate(fd, 1))
        yield


def _setattr_symlink(place: Place) -> Change:
    yield
    os.chown(place.at / "link", USER, GROUP, follow_symlinks=False)
    os.utime(place.at / "link", (7, 7), follow_symlinks=False)


def _setattr_partial(place: Place) -> Change:
    with opened(place.at / "setid", os.O_RDWR) as fd:
        yield
        with daemon_files_at_most(place.daemon_pid, LIMITED["setattr-partial"]):
            error = 0
            try:
                as_user(lambda: os.ftruncate(fd, 2 * FILE_BYTES))
            except OSError as refusal:
                error = refusal.errno or 0
            assert error == errno.EFBIG
    # The guest's kernel sends size and loss of the set-id bits in one request; the size is refused after that.
    assert stat.S_IMODE(os.stat(place.on_the_share / "setid").st_mode) == 0o775


def _setxattr(place: Place) -> Change:
    yield
    os.setxattr(place.at / "file", "user.colour", b"blue")
    os.setxattr(place.at / "file", "user.new", b"1")


def _setxattr_acl_kill(place: Place) -> Change:
    with opened(place.at / "setid", os.O_RDWR) as fd:
        yield
        as_user(lambda: os.setxattr(fd, "system.posix_acl_access", acl(USER, mask=7)))
        yield


def _removexattr_acl(place: Place) -> Change:
    os.setxattr(place.at / "file", "system.posix_acl_access", acl(USER, mask=6))
    yield
    os.removexattr(place.at / "file", "system.posix_acl_access")


def _open_trunc(place: Place) -> Change:
    yield
    with opened(place.at / "file", os.O_WRONLY | os.O_TRUNC):
        yield


def _open_trunc_kill(place: Place) -> Change:
    with opened(place.at, os.O_RDONLY) as at:
        yield
        as_user(lambda: os.close(os.open("setid", os.O_WRONLY | os.O_TRUNC, dir_fd=at)))


def _write(place: Place) -> Change:
    with opened(place.at / "file", os.O_WRONLY) as fd:
        yield
        os.pwrite(fd, b"inside", 10)
        yield


def _write_append(place: Place) -> Change:
    with opened(place.at / "file", os.O_WRONLY | os.O_APPEND) as fd:
        yield
        os.write(fd, b"more")
        yield


def _write_kill(place: Place) -> Change:
    with opened(place.at / "setid", os.O_WRONLY) as fd:
        yield
        as_user(lambda: os.pwrite(fd, b"x", 0))
        yield


def _write_capabilities(place: Place) -> Change:
    yield
    with opened(place.at / "capped", os.O_WRONLY) as fd:
        os.write(fd, b"x")
        yield


def _write_mmap(place: Place) -> Change:
    with opened(place.at / "file", os.O_RDWR) as fd, mmap.mmap(fd, FILE_BYTES) as pages:
        yield
        pages[5000:5006] = b"mapped"
        pages.flush()
        yield


def _fallocate_kill(place: Place) -> Change:
    with opened(place.at / "setid", os.O_RDWR) as fd:
        yield
        as_user(lambda: syscalls.fallocate(fd, 0, 0, FILE_BYTES))
        yield


def _copy_file_range_kill(place: Place) -> Change:
    with opened(place.at / "file", os.O_RDONLY) as source, opened(place.at / "setid", os.O_WRONLY) as target:
        yield
        as_user(lambda: os.copy_file_range(source, target, 4096))
        yield


def _copy_file_range(place: Place) -> Change:
    with opened(place.at / "file", os.O_RDONLY) as source, opened(place.at / "other", os.O_WRONLY) as target:
        yield
        assert os.copy_file_range(source, target, 4096) == 4096
        yield


def _one_call(call: Callable[[Place], object]) -> Callable[[Place], Change]:
    def change(place: Place) -> Change:
        yield
        call(place)

    return change


CALLS: dict[str, Callable[[Place], Change]] = {
    "create": _create,
    "create-existing": _create_existing,
    "mknod": _one_call(lambda place: os.mknod(place.at / "new", stat.S_IFIFO | 0o600)),
    "mkdir": _one_call(lambda place: os.mkdir(place.at / "new")),
    "symlink": _one_call(lambda place: os.symlink("other", place.at / "new")),
    "tmpfile": _tmpfile,
    "link": _one_call(lambda place: os.link(place.at / "file", place.at / "into/new")),
    "link-tmpfile": _link_tmpfile,
    "unlink": _one_call(lambda place: os.unlink(place.at / "file")),
    "unlink-linked": _one_call(lambda place: os.unlink(place.at / "linked")),
    "rmdir": _one_call(lambda place: os.rmdir(place.at / "empty")),
    "rename": _one_call(lambda place: os.rename(place.at / "file", place.at / "new")),
    "rename-parents": _one_call(lambda place: os.rename(place.at / "file", place.at / "into/new")),
    "rename-directory": _one_call(lambda place: os.rename(place.at / "dir", place.at / "into/new")),
    "rename-over": _one_call(lambda place: os.rename(place.at / "file", place.at / "into/taken")),
    "rename-over-linked": _one_call(lambda place: os.rename(place.at / "file", place.at / "into/linked")),
    "rename-over-directory": _one_call(lambda place: os.rename(place.at / "dir", place.at / "into/sub")),
    "rename-noreplace": _one_call(lambda place: _rename2(place, "file", "into/new", NOREPLACE)),
    "rename-exchange": _one_call(lambda place: _rename2(place, "file", "into/taken", EXCHANGE)),
    "rename-exchange-directory": _one_call(lambda place: _rename2(place, "file", "into/sub", EXCHANGE)),
    "rename-whiteout": _one_call(lambda place: _rename2(place, "file", "into/new", WHITEOUT)),
    "rename-whiteout-over": _one_call(lambda place: _rename2(place, "file", "into/taken", WHITEOUT)),
    "setattr-mode": _one_call(lambda place: os.chmod(place.at / "file", 0o600)),
    "setattr-owner": _one_call(lambda place: os.chown(place.at / "setid", USER + 1, -1)),
    "setattr-group": _one_call(lambda place: os.chown(place.at / "file", -1, GROUP)),
    "setattr-size": _one_call(lambda place: os.truncate(place.at / "file", 100)),
    "setattr-size-handle": _setattr_size_handle,
    "setattr-times": _one_call(lambda place: os.utime(place.at / "file", ns=(5_000_000_005, 1 << 60))),
    "setattr-now": _one_call(lambda place: os.utime(place.at / "file")),
    "setattr-kill": _setattr_kill,
    "setattr-directory": _one_call(lambda place: os.chmod(place.at / "dir", 0o700)),
    "setattr-symlink": _setattr_symlink,
    "setattr-partial": _setattr_partial,
    "setxattr": _setxattr,
    "removexattr": _one_call(lambda place: os.removexattr(place.at / "file", "user.colour")),
    "setxattr-acl": _one_call(
        lambda place: os.setxattr(place.at / "file", "system.posix_acl_access", acl(USER, mask=6))
    ),
    "setxattr-acl-kill": _setxattr_acl_kill,
    "setxattr-acl-default": _one_call(
        lambda place: os.setxattr(place.at / "dir", "system.posix_acl_default", acl(USER, mask=6))
    ),
    "removexattr-acl": _removexattr_acl,
    "open-trunc": _open_trunc,
    "open-trunc-kill": _open_trunc_kill,
    "write": _write,
    "write-append": _write_append,
    "write-kill": _write_kill,
    "write-capabilities": _write_capabilities,
    "write-mmap": _write_mmap,
    "fallocate": _one_call(lambda place: _fallocate(place, 0, 0, 2 * FILE_BYTES)),
    "fallocate-keep-size": _one_call(lambda place: _fallocate(place, KEEP_SIZE, 0, 2 * FILE_BYTES)),
    "fallocate-punch-hole": _one_call(lambda place: _fallocate(place, PUNCH_HOLE | KEEP_SIZE, 0, FILE_BYTES // 2)),
    "fallocate-zero-range": _one_call(lambda place: _fallocate(place, ZERO_RANGE, 0, 2 * FILE_BYTES)),
    "fallocate-kill": _fallocate_kill,
    "copy-file-range": _copy_file_range,
    "copy-file-range-kill": _copy_file_range_kill,
}
