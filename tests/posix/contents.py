"""What is in files: reading and writing, sizes and holes, copies, mapped memory."""

import errno
import mmap
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.posix.asking import made
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import BLOCK, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, opened, segments

PAGE = mmap.PAGESIZE


def where_reading_and_writing_take_place(d: Path) -> None:
    with opened(d / "f") as fd:
        assert os.write(fd, b"0123456789") == 10
        assert [os.pread(fd, 4, 3), os.pread(fd, 99, 8), os.pread(fd, 9, 10), os.pread(fd, 9, 1 << 40)] == [b"3456", b"89", b"", b""]
        assert os.pwrite(fd, b"AB", 2) == 2
        assert os.lseek(fd, 0, os.SEEK_CUR) == 10  # neither has moved
        assert os.lseek(fd, -3, os.SEEK_END) == 7
        assert [os.read(fd, 2), os.read(fd, 9), os.read(fd, 9)] == [b"78", b"9", b""]
        assert [attempt(os.lseek, fd, -1, os.SEEK_SET), attempt(os.lseek, fd, -99, os.SEEK_CUR)] == ["EINVAL"] * 2
        assert attempt(os.pread, fd, 1, -1) == attempt(os.pwrite, fd, b"", -1) == "EINVAL"
        assert (os.write(fd, b""), os.read(fd, 0)) == (0, b"")


def several_buffers_in_one_call(d: Path) -> None:
    with opened(d / "f") as fd:
        assert os.writev(fd, [b"ab", b"", b"cde", b"f" * 5000]) == 5005
        assert os.pwritev(fd, [b"X", b"YZ"], 1) == 3
        one, two, three = bytearray(1), bytearray(0), bytearray(5)
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.readv(fd, [one, two, three]) == 6
        assert bytes(one + two + three) == b"aXYZef"
        assert os.preadv(fd, [one, three], 5003) == 2
        assert attempt(os.writev, fd, [b"x"] * 1025) == "EINVAL"
        assert os.fstat(fd).st_size == 5005


def what_was_never_written_is_zero(d: Path) -> None:
    with opened(d / "f") as fd:
        os.lseek(fd, 10_000, os.SEEK_SET)
        os.write(fd, b"end")
        assert os.pread(fd, 10_003, 0) == bytes(10_000) + b"end"
        os.ftruncate(fd, 4)
        os.ftruncate(fd, 9)
        assert os.pread(fd, 99, 0) == bytes(9)
        os.pwrite(fd, b"123456789", 0)
        os.ftruncate(fd, 3)
        os.pwrite(fd, b"x", 6)
        assert os.pread(fd, 99, 0) == b"123\0\0\0x"
        os.ftruncate(fd, 0)
        os.ftruncate(fd, 3 * PAGE)
        assert os.pread(fd, 4 * PAGE, 0) == bytes(3 * PAGE)


def sizes_that_are_refused(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    assert [attempt(os.truncate, d / "f", size) for size in (-1, 1 << 62)] == ["EINVAL", "EFBIG"]
    assert [attempt(os.truncate, d / name, 0) for name in ("sub", "no")] == ["EISDIR", "ENOENT"]
    with opened(d / "f", os.O_RDONLY) as fd:
        assert attempt(os.ftruncate, fd, 0) == "EINVAL"
    with opened(d / "sub", os.O_RDONLY) as fd:
        assert attempt(os.ftruncate, fd, 0) == "EINVAL"
        assert attempt(os.read, fd, 1) == "EISDIR"
    os.mkfifo(d / "fifo")
    assert attempt(os.truncate, d / "fifo", 0) == "EINVAL"
    assert os.stat(d / "f").st_size == 0


def a_limit_on_sizes_is_kept(d: Path) -> None:
    def work() -> list[Any]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with opened(Path("f")) as fd:
            return [
                os.write(fd, b"x" * 1500), attempt(os.write, fd, b"y"), attempt(os.truncate, "f", 1001),
                attempt(os.posix_fallocate, fd, 0, 1001), os.fstat(fd).st_size, attempt(os.pwrite, fd, b"y", 1000),
            ]  # fmt: skip

    assert as_user(d, work) == [1000, "EFBIG", "EFBIG", "EFBIG", 1000, "EFBIG"]


def holes_are_found(d: Path) -> None:
    with opened(d / "f") as fd:
        os.pwrite(fd, b"x" * BLOCK, 4 * BLOCK)
        os.pwrite(fd, b"x" * BLOCK, 8 * BLOCK)
        os.ftruncate(fd, 16 * BLOCK)
        assert segments(fd) == [(4 * BLOCK, 5 * BLOCK), (8 * BLOCK, 9 * BLOCK)]
        found = [attempt(os.lseek, fd, at * BLOCK, os.SEEK_DATA) for at in (0, 4, 5, 9, 16, 17)]
        assert found == [4 * BLOCK, 4 * BLOCK, 8 * BLOCK, "ENXIO", "ENXIO", "ENXIO"]
        found = [attempt(os.lseek, fd, at * BLOCK, os.SEEK_HOLE) for at in (0, 4, 8, 9, 16)]
        assert found == [0, 5 * BLOCK, 9 * BLOCK, 9 * BLOCK, "ENXIO"]
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4 * BLOCK, BLOCK)
        assert segments(fd) == [(8 * BLOCK, 9 * BLOCK)]
        assert os.pread(fd, BLOCK, 4 * BLOCK) == bytes(BLOCK)
        os.ftruncate(fd, 8 * BLOCK + 10)
        assert segments(fd) == [(8 * BLOCK, 8 * BLOCK + 10)]
    with opened(d / "dense") as fd:
        os.write(fd, b"x" * 100)
        assert [os.lseek(fd, 50, os.SEEK_DATA), os.lseek(fd, 50, os.SEEK_HOLE)] == [50, 100]


def blocks_are_counted(d: Path) -> None:
    with opened(d / "f") as fd:
        assert os.fstat(fd).st_blocks == 0
        os.ftruncate(fd, 100 * BLOCK)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks == 0
        os.pwrite(fd, b"x" * 10 * BLOCK, 0)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks == 10 * BLOCK // 512
        fallocate(fd, 0, 50 * BLOCK, 4 * BLOCK)
        assert os.fstat(fd).st_blocks == 14 * BLOCK // 512
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 10 * BLOCK)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks == 4 * BLOCK // 512
        os.ftruncate(fd, 0)
        assert os.fstat(fd).st_blocks == 0
        assert os.fstat(fd).st_blksize == BLOCK


def space_set_aside(d: Path) -> None:
    with opened(d / "f") as fd:
        os.write(fd, b"x" * 3 * BLOCK)
        fallocate(fd, KEEP_SIZE, 0, 10 * BLOCK)
        assert (os.fstat(fd).st_size, os.fstat(fd).st_blocks) == (3 * BLOCK, 10 * BLOCK // 512)
        fallocate(fd, 0, 0, 5 * BLOCK)
        assert os.fstat(fd).st_size == 5 * BLOCK
        fallocate(fd, ZERO_RANGE, BLOCK - 1, 2)
        assert os.pread(fd, 4, BLOCK - 2) == b"x\0\0x"
        fallocate(fd, ZERO_RANGE, 5 * BLOCK, BLOCK)
        assert os.fstat(fd).st_size == 6 * BLOCK
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, 6 * BLOCK, BLOCK)
        assert os.fstat(fd).st_size == 6 * BLOCK
        assert os.pread(fd, 9 * BLOCK, 3 * BLOCK) == bytes(3 * BLOCK)
        for mode, offset, length, answer in ((0, 0, 0, "EINVAL"), (0, -1, 1, "EINVAL"), (0, 0, -1, "EINVAL"), (0, 1 << 62, 1, "EFBIG")):
            assert (mode, offset, length, attempt(fallocate, fd, mode, offset, length)) == (mode, offset, length, answer)
        assert attempt(fallocate, fd, PUNCH_HOLE, 0, 1) == "ENOTSUP"  # without KEEP_SIZE
    with opened(d / "f", os.O_RDONLY) as fd:
        assert attempt(fallocate, fd, 0, 0, 1) == "EBADF"
    with opened(d, os.O_RDONLY) as fd:
        assert attempt(fallocate, fd, 0, 0, 1) == "EBADF"


def ranges_are_copied(d: Path) -> None:
    content = bytes(range(256)) * 100
    (d / "from").write_bytes(content)
    with opened(d / "from", os.O_RDWR) as source, opened(d / "to") as target:
        assert os.copy_file_range(source, target, 1000) == 1000
        assert os.copy_file_range(source, target, 500, 7, 3000) == 500
        assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in (source, target)] == [1000, 1000]
        assert os.pread(target, 9999, 0) == content[:1000] + bytes(2000) + content[7:507]
        assert os.copy_file_range(source, target, 9, len(content)) == 0
        assert os.copy_file_range(source, source, 256, 0, 25_600) == 256
        assert attempt(os.copy_file_range, source, source, 100, 0, 50) == "EINVAL"
    with opened(d / "from", os.O_RDONLY) as source, opened(d / "to", os.O_RDONLY) as closed:
        assert attempt(os.copy_file_range, source, closed, 9) == "EBADF"
        with opened(d / "to", os.O_WRONLY | os.O_APPEND) as end, opened(d, os.O_RDONLY) as directory:
            assert attempt(os.copy_file_range, source, end, 9) == "EBADF"
            assert attempt(os.copy_file_range, directory, end, 9) == "EISDIR"


def sent_and_spliced(d: Path) -> None:
    content = bytes(range(256)) * 100
    (d / "from").write_bytes(content)
    with opened(d / "from", os.O_RDONLY) as source, opened(d / "to") as target:
        assert os.sendfile(target, source, 100, 5000) == 5000
        assert os.sendfile(target, source, None, 10) == 10
        assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in (source, target)] == [10, 5010]
        assert os.pread(target, 9999, 0) == content[100:5100] + content[:10]
        reading, writing = os.pipe()
        assert os.splice(source, writing, 3000, 50) == 3000
        assert os.splice(reading, target, 3000, None, 0) == 3000
        assert os.pread(target, 3000, 0) == content[50:3050]
        os.write(writing, b"from a pipe")
        os.close(writing)
        assert os.splice(reading, target, 99, None, 10) == 11
        assert os.splice(reading, target, 99) == 0
        assert os.pread(target, 11, 10) == b"from a pipe"
        os.close(reading)


def shared_memory_is_the_file(d: Path) -> None:
    """Within one kernel: whoever reads it, maps it or writes it, there is one content."""
    with opened(d / "f") as fd, opened(d / "f", os.O_RDWR) as other:
        os.ftruncate(fd, 2 * PAGE)
        with mmap.mmap(fd, 2 * PAGE) as memory, mmap.mmap(other, 2 * PAGE) as mapped_too:
            memory[PAGE : PAGE + 5] = b"store"
            assert mapped_too[PAGE : PAGE + 5] == b"store"
            assert os.pread(other, 5, PAGE) == b"store"
            os.pwrite(other, b"write", 10)
            assert memory[10:15] == b"write"
            os.ftruncate(other, PAGE)
            os.ftruncate(other, 2 * PAGE)
            assert memory[PAGE : PAGE + 5] == bytes(5)
            memory[:4] = b"last"
        assert os.pread(fd, 4, 0) == b"last"
    assert (d / "f").read_bytes()[:4] == b"last"


def shared_memory_of_two_processes(d: Path) -> None:
    made(d / "f", 0o666, 0, 0, bytes(PAGE))

    def store() -> None:
        with opened(Path("f"), os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as memory:
            memory[7:12] = b"child"

    with opened(d / "f", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as memory:
        assert as_user(d, store) is None
        assert memory[7:12] == b"child"
        memory.flush()
    assert (d / "f").read_bytes()[7:12] == b"child"


def what_is_appended_is_in_memory_too(d: Path) -> None:
    """And what was stored there stays, in the same page."""
    with opened(d / "f") as fd, opened(d / "f", os.O_WRONLY | os.O_APPEND) as log:
        os.ftruncate(fd, PAGE)  # as Python wants it to map a page
        with mmap.mmap(fd, PAGE) as memory:
            os.ftruncate(fd, 0)
            os.write(fd, b"0123456789")
            for number in range(5):
                memory[number] = ord("x")
                os.write(log, b"%d" % number)
                assert memory[10 + number] == ord(str(number))
                assert os.pread(fd, 99, 0)[10:] == b"01234"[: number + 1]
            memory.flush()
    assert (d / "f").read_bytes() == b"xxxxx5678901234"


def private_memory_is_not_the_file(d: Path) -> None:
    (d / "f").write_bytes(b"content".ljust(PAGE, b"\0"))
    with opened(d / "f", os.O_RDONLY) as fd:
        with mmap.mmap(fd, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
            memory[:7] = b"private"
            memory.flush()
            assert os.pread(fd, 7, 0) == b"content"
            assert memory[:7] == b"private"
        assert os.pread(fd, 7, 0) == b"content"


def memory_needs_the_right_descriptor(d: Path) -> None:
    (d / "f").write_bytes(bytes(PAGE))
    map_ = mmap.mmap
    with opened(d / "f", os.O_RDONLY) as fd:
        assert attempt(map_, fd, PAGE) == "EACCES"  # shared, to write
        map_(fd, PAGE, prot=mmap.PROT_READ).close()
    with opened(d / "f", os.O_WRONLY) as fd:
        assert attempt(map_, fd, PAGE, prot=mmap.PROT_READ) == "EACCES"
    with opened(d, os.O_RDONLY) as fd:
        assert attempt(map_, fd, PAGE, prot=mmap.PROT_READ) == "ENODEV"


def signal_that_ends(action: Callable[[], Any]) -> int:
    """The signal that ends a child process which does this; 0: none does."""
    if (child := os.fork()) == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            action()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def there_is_no_memory_beyond_the_end(d: Path) -> None:
    with opened(d / "f") as fd:
        os.write(fd, b"x" * 10)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
            assert memory[9:10] == b"x"
        os.ftruncate(fd, 2 * PAGE)
        with mmap.mmap(fd, 2 * PAGE) as memory:
            os.ftruncate(fd, PAGE + 1)
            memory[PAGE + 100] = 7  # of the last page, but not of the file
            memory.flush()
            os.ftruncate(fd, 10)
            assert signal_that_ends(lambda: memory[5]) == 0
            assert signal_that_ends(lambda: memory[PAGE]) == signal.SIGBUS
            os.ftruncate(fd, 2 * PAGE)
            assert memory[PAGE + 100] == 0
    assert (d / "f").read_bytes()[10:] == bytes(2 * PAGE - 10)


def an_unlinked_file_stays_mapped(d: Path) -> None:
    with opened(d / "f") as fd:
        os.write(fd, b"content".ljust(2 * PAGE, b"\0"))
        memory = mmap.mmap(fd, 2 * PAGE)
    os.unlink(d / "f")
    with memory:
        assert memory[:7] == b"content"
        memory[PAGE : PAGE + 4] = b"more"
        memory.flush()
        assert memory[PAGE : PAGE + 4] == b"more"


def advice_is_accepted(d: Path) -> None:
    with opened(d / "f") as fd:
        os.write(fd, b"x" * 3 * BLOCK)
        os.fsync(fd)
        for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_RANDOM, os.POSIX_FADV_WILLNEED):
            os.posix_fadvise(fd, 0, 0, advice)
        assert os.pread(fd, 3, BLOCK) == b"xxx"
        for sync in (os.fsync, os.fdatasync):
            assert sync(fd) is None
    with opened(d, os.O_RDONLY) as fd:
        os.fsync(fd)


def what_is_full_of_zeros_is_a_regular_file(d: Path) -> None:
    """At an offset beyond four GiB, read as it was written, in few blocks."""
    with opened(d / "f") as fd:
        for offset in (0, (4 << 30) - 2, 1 << 40):
            os.pwrite(fd, b"1234", offset)
            assert os.pread(fd, 4, offset) == b"1234"
        status = os.fstat(fd)
        assert (status.st_size, stat.S_ISREG(status.st_mode), status.st_blocks < 1000) == ((1 << 40) + 4, True, True)
        assert attempt(os.pwrite, fd, b"x", (1 << 63) - 1) in (errno.errorcode[errno.EFBIG], errno.errorcode[errno.EINVAL])


SCENARIOS: list[Scenario] = [
    where_reading_and_writing_take_place, several_buffers_in_one_call, what_was_never_written_is_zero, sizes_that_are_refused,
    a_limit_on_sizes_is_kept, holes_are_found, blocks_are_counted, space_set_aside, ranges_are_copied, sent_and_spliced,
    shared_memory_is_the_file, shared_memory_of_two_processes, what_is_appended_is_in_memory_too,
    private_memory_is_not_the_file,
    memory_needs_the_right_descriptor, there_is_no_memory_beyond_the_end, an_unlinked_file_stays_mapped, advice_is_accepted,
    what_is_full_of_zeros_is_a_regular_file,
]  # fmt: skip
