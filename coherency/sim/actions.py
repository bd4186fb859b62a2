"""The system calls behind the words of ``calls``, on a guest's mount."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from typing import Any, Final

from coherency.fuse import syscalls
from coherency.sim.calls import COPY_SOURCE, XATTR, Step
from coherency.sim.history import LOST, mtime_ns

_FLAGS: Final = {"rename": 0, "rename-noreplace": 1, "rename-exchange": 2}
_KEPT_DESCRIPTORS: Final = 32
_SECOND_IS_A_PATH: Final = frozenset({"link", *_FLAGS})


class Actions:
    """Makes calls. It keeps descriptors open for those that are made through one; from one thread."""

    def __init__(self, mount: str) -> None:
        """``mount``: all paths are below it."""
        self._mount = mount + "/"
        self._open: dict[str, tuple[int, int]] = {}  # descriptor, and since when

    def make(self, step: Step) -> tuple[int, Any]:
        """Returns (0, what a look has seen), or (an errno, None): see ``Call`` for both."""
        path = self._mount + step.path
        other = self._mount + step.other if step.op in _SECOND_IS_A_PATH else step.other
        if step.op == "fstat":
            return self._fstat(step.path, path)
        try:
            return 0, _CALLS[step.op](self._mount, path, other, step.number)
        except OSError as failure:
            return failure.errno or LOST, None

    def _fstat(self, key: str, path: str) -> tuple[int, Any]:
        """Through a descriptor that stays open. After an error it is of no use any more, and the result says since when it was open."""
        if key not in self._open:
            now_ns = time.monotonic_ns()
            try:
                self._keep(key, os.open(path, os.O_RDONLY | os.O_CLOEXEC), now_ns)
            except OSError as failure:
                return failure.errno or LOST, now_ns
        fd, since_ns = self._open[key]
        try:
            return 0, _status(os.fstat(fd))
        except OSError as failure:
            del self._open[key]
            _close(fd)
            return failure.errno or LOST, since_ns

    def _keep(self, key: str, fd: int, now_ns: int) -> None:
        if len(self._open) >= _KEPT_DESCRIPTORS:
            _close(self._open.pop(next(iter(self._open)))[0])
        self._open[key] = fd, now_ns


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        return  # its mount is gone, and so is the descriptor


def _status(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_nlink


def _opened(path: str, flags: int, mode: int = 0) -> tuple[int, ...]:
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        return _status(os.fstat(fd))
    finally:
        _close(fd)


def _extended(path: str, extend: Callable[[int], object], flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags)
    try:
        extend(fd)
    finally:
        os.close(fd)  # which may be where a write fails


def _append(_mount: str, path: str, count: str, _number: int) -> None:
    _extended(path, lambda fd: os.write(fd, b"x" * int(count)), os.O_APPEND)


def _truncate_on_open(_mount: str, path: str, _other: str, _number: int) -> None:
    _extended(path, lambda fd: None, os.O_TRUNC)


def _fallocate(_mount: str, path: str, _other: str, number: int) -> None:
    _extended(path, lambda fd: os.posix_fallocate(fd, 0, number))


def _copy(mount: str, path: str, count: str, number: int) -> None:
    source = os.open(mount + COPY_SOURCE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _extended(path, lambda fd: os.copy_file_range(source, fd, int(count), 0, number - int(count)))
    finally:
        _close(source)


def _fchmod(_mount: str, path: str, _other: str, number: int) -> None:
    _extended(path, lambda fd: os.fchmod(fd, number))


def _rename(flags: int) -> Callable[[str, str, str, int], Any]:
    return lambda _mount, path, other, _number: syscalls.renameat2(
        syscalls.AT_FDCWD, os.fsencode(path), syscalls.AT_FDCWD, os.fsencode(other), flags
    )


_CREATE: Final = os.O_CREAT | os.O_WRONLY
_CALLS: Final[dict[str, Callable[[str, str, str, int], Any]]] = {
    "chmod": lambda _m, path, _, number: os.chmod(path, number),
    "fchmod": _fchmod,
    "chown": lambda _m, path, _, number: os.chown(path, number, -1),
    "truncate": lambda _m, path, _, number: os.truncate(path, number),
    "append": _append,
    "open-truncate": _truncate_on_open,
    "fallocate": _fallocate,
    "copy_file_range": _copy,
    "utime": lambda _m, path, _, number: os.utime(path, ns=(0, mtime_ns(number))),
    "setxattr": lambda _m, path, _, number: os.setxattr(path, XATTR, b"%d" % number),
    "removexattr": lambda _m, path, *_: os.removexattr(path, XATTR),
    "create": lambda _m, path, _, number: _opened(path, _CREATE | os.O_EXCL, number),
    # Not to wait for a reader, should a kernel believe in the FIFO that was there before.
    "open-create": lambda _m, path, _, number: _opened(path, _CREATE | os.O_NONBLOCK, number),
    "mkdir": lambda _m, path, _, number: os.mkdir(path, number),
    "mknod": lambda _m, path, _, number: os.mknod(path, stat.S_IFIFO | number),
    "symlink": lambda _m, path, other, _: os.symlink(other, path),
    "link": lambda _m, path, other, _: os.link(path, other, follow_symlinks=False),
    "unlink": lambda _m, path, *_: os.unlink(path),
    "rmdir": lambda _m, path, *_: os.rmdir(path),
    **{op: _rename(flags) for op, flags in _FLAGS.items()},
    "lstat": lambda _m, path, *_: _status(os.lstat(path)),
    "stat": lambda _m, path, *_: _status(os.stat(path)),
    "open": lambda _m, path, *_: _opened(path, os.O_RDONLY | os.O_NONBLOCK),
    # What os.path.exists does, but for hiding which error it was.
    "exists": lambda _m, path, *_: bool(os.stat(path)),
    "readlink": lambda _m, path, *_: os.readlink(path),
    "getxattr": lambda _m, path, *_: os.getxattr(path, XATTR).decode(),
    "listdir": lambda _m, path, *_: os.listdir(path),
}
