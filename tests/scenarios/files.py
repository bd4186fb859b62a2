"""Operations on open files. Each function is a scenario: see `comparing`."""

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.scenarios.comparing import Scenario, attempt

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
RWX = os.O_RDWR | os.O_CREAT
BLOCK = 4096
GIB = 1 << 30


@contextmanager
def opened(path: Path, flags: int = RWX, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, offset, length) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def link_descriptor(fd: int, path: Path) -> None:
    """Give a name to what is open. The descriptor of the parent is what makes Python use linkat(2), which follows."""
    with opened(path.parent, os.O_RDONLY) as parent:
        os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=parent, follow_symlinks=True)


def segments(fd: int) -> list[tuple[int, int]]:
    """Where there is data."""
    os.fsync(fd)  # a file system may not have decided before
    found: list[tuple[int, int]] = []
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return found
        end = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, end))


def writes_and_reads(d: Path) -> Any:
    with opened(d / "f") as fd:
        results: list[Any] = [
            os.write(fd, b"0123456789"),
            os.pread(fd, 4, 3),
            os.pread(fd, 99, 8),
            os.pread(fd, 9, 10),
            os.pread(fd, 9, 999),
        ]
        results += [
            os.pwrite(fd, b"XY", 4),
            os.pwritev(fd, [b"a", b"bc"], 12),
            os.lseek(fd, -3, os.SEEK_END),
            os.read(fd, 9),
        ]
        results += [os.fstat(fd).st_size, os.preadv(fd, [bytearray(3)], 0)]
    with opened(d / "f", os.O_RDONLY) as fd:
        results += [attempt(os.write, fd, b"no"), attempt(os.ftruncate, fd, 0), os.read(fd, 99)]
    with opened(d / "f", os.O_WRONLY) as fd:
        results += [attempt(os.read, fd, 9), os.write(fd, b"!")]
    return [*results, (d / "f").read_bytes()]


def large_blocks(d: Path) -> Any:
    data = bytes(range(251)) * (1 << 14)  # several requests
    (d / "f").write_bytes(data)
    with opened(d / "f") as fd:
        os.pwrite(fd, b"middle", 1_234_567)
        return [(d / "f").read_bytes() == data[:1_234_567] + b"middle" + data[1_234_573:], os.fstat(fd).st_size]


def truncation(d: Path) -> Any:
    (d / "f").write_bytes(b"0123456789")
    results: list[Any] = []
    for size in (4, 8):
        os.truncate(d / "f", size)
        results += [(d / "f").read_bytes()]
    with opened(d / "f", os.O_RDWR) as fd:
        os.ftruncate(fd, 2)
        results += [os.fstat(fd).st_size, os.pread(fd, 9, 0), attempt(os.ftruncate, fd, -1)]
    with opened(d / "f", os.O_WRONLY | os.O_TRUNC) as fd:
        results += [os.fstat(fd).st_size]
    with opened(d / "f", RWX | os.O_TRUNC) as fd:
        results += [os.fstat(fd).st_size]
    return [*results, attempt(os.truncate, d, 0), attempt(os.truncate, d / "missing", 0)]


def appending(d: Path) -> Any:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    with opened(d / "f", flags) as one, opened(d / "f", flags) as other:
        for number in range(20):
            os.write(one if number % 2 else other, b"%d " % number)
        os.pwrite(one, b"end", 0)  # which appends too, on Linux
        return [os.pread(other, 99, 0), os.lseek(one, 0, os.SEEK_CUR), os.fstat(one).st_size]


def exclusive_creation(d: Path) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened(d / "f", flags):
        (d / "link").symlink_to("nowhere")
        (d / "through").symlink_to("made")
        results: list[Any] = [attempt(os.open, d / name, flags) for name in ("f", "link")] + [
            attempt(os.open, d, flags)
        ]
    with opened(d / "through"):
        return [*results, (d / "made").exists()]


def ways_to_open(d: Path) -> Any:
    (d / "f").write_text("x")
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    (d / "loop").symlink_to("loop")
    results: list[Any] = [
        attempt(os.open, d / "f", os.O_RDONLY | os.O_DIRECTORY), attempt(os.open, d / "link", os.O_RDONLY | os.O_NOFOLLOW),
        attempt(os.open, d / "loop", os.O_RDONLY), attempt(os.open, d / "sub", os.O_WRONLY),
        attempt(os.open, d / "sub", RWX), attempt(os.open, d / "f/x", os.O_RDONLY), attempt(os.open, d / "missing", os.O_RDWR),
        attempt(os.open, f"{d}/f/", os.O_RDONLY), attempt(os.open, d / "missing/x", RWX),
    ]  # fmt: skip
    with opened(d / "link", os.O_PATH | os.O_NOFOLLOW) as fd:
        results += [os.fstat(fd).st_mode, os.readlink("", dir_fd=fd)]
    for flags in (os.O_SYNC, os.O_DSYNC, os.O_NONBLOCK, os.O_NOATIME, os.O_CLOEXEC, os.O_NOCTTY):
        with opened(d / "f", os.O_RDWR | flags) as fd:
            results += [os.pread(fd, 9, 0), os.pwrite(fd, b"x", 0), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & flags)]
    return results


def unbuffered(d: Path) -> Any:
    with opened(d / "f", RWX | os.O_DIRECT) as fd, mmap.mmap(-1, 2 * BLOCK) as aligned:
        aligned[:] = b"ab" * BLOCK
        written = os.pwritev(fd, [aligned], 0)
        aligned[:] = bytes(2 * BLOCK)
        return [written, os.preadv(fd, [aligned], 0), aligned[:] == b"ab" * BLOCK]


def more_than_four_gib(d: Path) -> Any:
    with opened(d / "f") as fd:
        for offset in (0, 4 * GIB - 3, 9 * GIB):
            os.pwrite(fd, b"123456", offset)
        status = os.fstat(fd)
        results: list[Any] = [status.st_size, status.st_blocks < 1000, segments(fd)]
        results += [os.pread(fd, 9, 4 * GIB - 4), os.pread(fd, 9, 9 * GIB + 4), os.lseek(fd, 0, os.SEEK_END)]
        os.ftruncate(fd, 5 * GIB + 1)
        results += [os.fstat(fd).st_size, os.lseek(fd, -1, os.SEEK_END), os.pread(fd, 2, 5 * GIB)]
        os.ftruncate(fd, 0)  # it is to be compared byte for byte
        return results


def holes(d: Path) -> Any:
    with opened(d / "f") as fd:
        os.write(fd, b"x" * 8 * BLOCK)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 2 * BLOCK, 2 * BLOCK)
        fallocate(fd, ZERO_RANGE, 6 * BLOCK + 7, 10)
        results: list[Any] = [segments(fd), os.fstat(fd).st_size]
        fallocate(fd, KEEP_SIZE, 20 * BLOCK, BLOCK)
        results += [os.fstat(fd).st_size]
        fallocate(fd, 0, 30 * BLOCK, BLOCK)
        results += [os.fstat(fd).st_size, attempt(os.posix_fallocate, fd, 0, 10)]
        results += [
            attempt(fallocate, fd, PUNCH_HOLE, 0, 1),
            attempt(fallocate, fd, 0, 0, 0),
            attempt(fallocate, fd, 0, -1, 1),
        ]
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            results += [attempt(os.lseek, fd, offset, whence) for offset in (-5, 2 * BLOCK, 31 * BLOCK, 99 * BLOCK)]
        results += [attempt(os.lseek, fd, 0, 77), attempt(os.lseek, fd, -1, os.SEEK_SET)]
    with opened(d / "f", os.O_RDONLY) as fd:
        results += [attempt(fallocate, fd, 0, 0, 1)]
    return results


def copied_ranges(d: Path) -> Any:
    (d / "from").write_bytes(bytes(range(256)) * 64)
    with opened(d / "from", os.O_RDONLY) as source, opened(d / "to") as target:
        results: list[Any] = [
            os.copy_file_range(source, target, 10_000),
            os.copy_file_range(source, target, 99, 3, 20_000),
        ]
        results += [os.lseek(fd, 0, os.SEEK_CUR) for fd in (source, target)] + [os.fstat(target).st_size]
        results += [os.copy_file_range(source, target, 99, 1 << 20), os.sendfile(target, source, 0, 500)]
        results += [
            attempt(os.copy_file_range, target, source, 9),
            attempt(os.copy_file_range, target, target, 9, 0, 5),
        ]
    return results


def open_and_unlinked(d: Path) -> Any:
    with opened(d / "f") as fd:
        os.write(fd, b"before")
        os.unlink(d / "f")
        results: list[Any] = [
            os.fstat(fd).st_nlink,
            os.write(fd, b" and after"),
            os.pread(fd, 99, 0),
            os.fstat(fd).st_size,
        ]
        os.fchmod(fd, 0o600)
        os.fchown(fd, 5, 6)
        os.ftruncate(fd, 9)
        os.utime(fd, ns=(1, 2001))
        status = os.fstat(fd)
        results += [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, status.st_size]
        results += [
            attempt(os.setxattr, fd, "user.a", b"v"),
            attempt(os.getxattr, fd, "user.a"),
            attempt(os.listxattr, fd),
        ]
        os.fsync(fd)
        results += [attempt(link_descriptor, fd, d / "again")]
        (d / "f").write_text("another file")
        return [*results, os.pread(fd, 99, 0), os.fstat(fd).st_nlink]


def replaced_while_open(d: Path) -> Any:
    (d / "new").write_text("new")
    with opened(d / "f") as fd:
        os.write(fd, b"old")
        os.rename(d / "new", d / "f")
        return [
            os.pread(fd, 9, 0),
            os.fstat(fd).st_nlink,
            (d / "f").read_text(),
            os.pwrite(fd, b"OLD", 0),
            (d / "f").read_text(),
        ]


def temporary_files(d: Path) -> Any:
    with opened(d, os.O_RDWR | os.O_TMPFILE, 0o666) as fd:
        results: list[Any] = [os.write(fd, b"content"), os.fstat(fd).st_nlink, os.listdir(d)]
        link_descriptor(fd, d / "named")
        results += [os.fstat(fd).st_nlink, (d / "named").read_bytes()]
    with opened(d, os.O_RDWR | os.O_TMPFILE | os.O_EXCL, 0o666) as fd:
        results += [attempt(link_descriptor, fd, d / "never")]
    return [*results, attempt(os.open, d / "named", os.O_RDWR | os.O_TMPFILE)]


def shared_memory(d: Path) -> Any:
    with opened(d / "f") as fd:
        os.ftruncate(fd, 3 * BLOCK)
        with mmap.mmap(fd, 3 * BLOCK) as memory:
            memory[5:10] = b"hello"
            memory[2 * BLOCK : 2 * BLOCK + 3] = b"end"
            memory.flush()
        results: list[Any] = [os.pread(fd, 5, 5), os.pread(fd, 3, 2 * BLOCK)]
        with mmap.mmap(fd, 3 * BLOCK, prot=mmap.PROT_READ) as memory:
            os.pwrite(fd, b"later", BLOCK)
            results += [memory[BLOCK : BLOCK + 5]]
    with opened(d / "f", os.O_RDWR | os.O_APPEND) as fd, mmap.mmap(fd, BLOCK) as memory:
        memory[0:4] = b"page"
        memory.flush()  # a page that belongs where it is, whatever the descriptor does with a write
        results += [os.fstat(fd).st_size, os.pread(fd, 4, 0)]
    return results


def synchronising(d: Path) -> Any:
    with opened(d / "f") as fd, opened(d, os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.write(fd, b"x")
        subprocess.run(["sync", "-f", d], check=True)
        return [attempt(sync, which) for sync in (os.fsync, os.fdatasync) for which in (fd, directory)]


def locks(d: Path) -> Any:
    with opened(d / "f") as one, opened(d / "f") as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        results: list[Any] = [attempt(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)]
        fcntl.flock(one, fcntl.LOCK_UN)
        return [*results, *(attempt(lock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) for lock in (fcntl.flock, fcntl.lockf))]


def many_open_at_once(d: Path) -> Any:
    descriptors = [os.open(d / str(number), RWX) for number in range(200)]
    for number, fd in enumerate(descriptors):
        os.write(fd, b"%d" % number)
    contents = [os.pread(fd, 9, 0) for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    return contents


SCENARIOS: list[Scenario] = [
    writes_and_reads, large_blocks, truncation, appending, exclusive_creation, ways_to_open, unbuffered, more_than_four_gib,
    holes, copied_ranges, open_and_unlinked, replaced_while_open, temporary_files, shared_memory, synchronising, locks,
    many_open_at_once,
]  # fmt: skip
