"""Where a mount of ours does not do what a local file system does, and what it does instead.

Each function returns what it sees, and `ALL` says what that is on ext4, and what on which of our mounts. Its name is a row
of the table in `docs/guarantees.md`, which says why. Those with two arguments get one directory as two guests show it.
"""

import fcntl
import mmap
import os
import select
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeAlias

from coherency.fuse.syscalls import statx
from tests.passthrough import eventually
from tests.posix.asking import made, mode, wait_for_a_later_time
from tests.posix.contents import signal_that_ends
from tests.posix.programs import program
from tests.scenarios.comparing import UserProcess, as_user, attempt
from tests.scenarios.files import BLOCK, fallocate, opened

PAGE: Final = mmap.PAGESIZE
TIMEOUT_S: Final = 30
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_FIEMAP: Final = 0xC020660B
_COLLAPSE_RANGE, _INSERT_RANGE = 8, 0x20
_STATX_ATTR_IMMUTABLE: Final = 0x10
_STATX_ATTRIBUTES_MASK_OFFSET: Final = 56

Places: TypeAlias = tuple[str, ...]


class Deviation(NamedTuple):
    look: Callable[..., Any]
    local: Any
    """What it returns on ext4."""
    ours: dict[Places, Any]
    """What it returns on a mount of ours, or on two."""
    right_on: tuple[Places, ...] = ()
    """Where it is as on ext4 after all."""


def outcome(call: Callable[..., Any], *arguments: Any) -> str:
    """``done``, or the name of the errno. A descriptor is closed again."""
    answer = attempt(call, *arguments)
    if isinstance(answer, int) and call is os.open:
        os.close(answer)
    return answer if isinstance(answer, str) else "done"


class Elsewhere:
    """A process that works in a directory, and waits in between for what others do. A context manager, which ends it."""

    def __init__(self, directory: Path, work: Callable[[Callable[[], None]], Any], **identity: Any) -> None:
        """``work`` gets a function that returns after the next :meth:`while_it_waits`, or when all is over."""
        self._said, saying = os.pipe()
        hearing, self._telling = os.pipe()

        def pause() -> None:
            os.write(saying, b"x")
            os.read(hearing, 1)

        def begin() -> Any:
            os.close(self._said)
            os.close(self._telling)
            return work(pause)

        self._process = UserProcess(directory, begin, **identity)
        self._result: list[Any] = []
        os.close(saying)
        os.close(hearing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._telling)
        self.result()
        os.close(self._said)

    def while_it_waits(self, change: Callable[[], object]) -> None:
        readable, _, _ = select.select([self._said], [], [], TIMEOUT_S)
        assert readable, "it does not wait"
        os.read(self._said, 1)
        change()
        os.write(self._telling, b"x")

    def result(self) -> Any:
        if not self._result:
            self._result.append(self._process.result())
        return self._result[0]


# --- one mount ---


def reading_sets_the_access_time(d: Path) -> list[bool]:
    """Of a file, a directory and a symlink."""
    (d / "f").write_text("content")
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    found = []
    for path, read in ((d / "f", Path.read_text), (d / "sub", os.listdir), (d / "link", os.readlink)):
        os.utime(path, ns=(1, 1), follow_symlinks=False)
        assert os.lstat(path).st_atime_ns == 1
        read(path)
        found.append(os.lstat(path).st_atime_ns != 1)
    return found


def a_store_to_memory_sets_the_times(d: Path) -> bool:
    """Before the page is written back."""
    with opened(d / "f") as fd:
        os.ftruncate(fd, PAGE)
        with mmap.mmap(fd, PAGE) as memory:
            before = os.fstat(fd).st_mtime_ns
            wait_for_a_later_time(d / "f")
            memory[0] = 1
            return os.fstat(fd).st_mtime_ns != before


def a_store_to_memory_is_data(d: Path) -> list[Any]:
    """To SEEK_DATA, before and after the page is written back."""
    with opened(d / "f") as fd:
        os.ftruncate(fd, 4 * PAGE)
        with mmap.mmap(fd, 4 * PAGE) as memory:
            memory[2 * PAGE] = 1
            before = attempt(os.lseek, fd, 0, os.SEEK_DATA)
            memory.flush()
            return [before, attempt(os.lseek, fd, 0, os.SEEK_DATA)]


def a_store_to_memory_leaves_capabilities(d: Path) -> bool:
    """As opposed to a write, which takes them away."""
    (d / "f").write_bytes(bytes(PAGE))
    os.setxattr(d / "f", "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    with opened(d / "f", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as memory:
        memory[0] = 1
        memory.flush()
    return bool(attempt(os.getxattr, d / "f", "security.capability") != "ENODATA")


def set_gid_without_execution_goes_with_a_group_one_is_not_in(d: Path) -> str:
    """Its owner, who was not of the file's group, gives it to another group."""
    made(d / "f", 0o2644, 1001, 5000)
    assert as_user(d, lambda: os.chown("f", -1, 1002)) is None
    return oct(mode(d / "f"))


def devices_can_be_opened(d: Path) -> str:
    os.mknod(d / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return outcome(os.open, d / "null", os.O_RDWR)


def ioctl_is_for_files(d: Path) -> list[Any]:
    """Flags as of chattr(1), the extents of a file, and whether statx tells of flags."""
    with opened(d / "f") as fd:
        mask: int = struct.unpack_from("=Q", statx(fd, 0), _STATX_ATTRIBUTES_MASK_OFFSET)[0]
        extents = struct.pack("=QQIIII", 0, (1 << 64) - 1, 0, 0, 0, 0)
        return [
            outcome(fcntl.ioctl, fd, _FS_IOC_GETFLAGS, bytes(8)), outcome(fcntl.ioctl, fd, _FS_IOC_FIEMAP, extents),
            bool(mask & _STATX_ATTR_IMMUTABLE),
        ]  # fmt: skip


def ranges_can_be_cut_out_and_put_in(d: Path) -> list[str]:
    with opened(d / "f") as fd:
        os.write(fd, b"x" * 3 * BLOCK)
        return [outcome(fallocate, fd, how, 0, BLOCK) for how in (_COLLAPSE_RANGE, _INSERT_RANGE)]


def the_kind_of_file_system_is_told(d: Path) -> list[Any]:
    """By statfs, and so what the C library takes for limits: fpathconf(3)."""
    kind = subprocess.run(["stat", "-f", "-c", "%t", d], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return [kind.stdout.strip(), os.statvfs(d).f_fsid != 0, *(os.pathconf(d, name) for name in ("PC_LINK_MAX", "PC_FILESIZEBITS"))]


def an_open_file_is_called_by_its_new_name(d: Path) -> str:
    """In /proc/PID/fd, after this guest has renamed it."""
    with opened(d / "f") as fd:
        os.rename(d / "f", d / "g")
        assert os.path.samestat(os.fstat(fd), os.stat(d / "g"))
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def direct_io_must_be_aligned(d: Path) -> str:
    with opened(d / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
        return outcome(os.write, fd, b"three")


def reading_need_not_wait(d: Path) -> str:
    """RWF_NOWAIT, of what is in memory."""
    with opened(d / "f") as fd:
        os.write(fd, b"content")
        os.pread(fd, 7, 0)
        return outcome(os.preadv, fd, [bytearray(7)], 0, os.RWF_NOWAIT)


def capabilities_count_and_not_the_uid(d: Path) -> list[Any]:
    """Root without CAP_SYS_ADMIN sees no ``trusted.`` names, and loses set-id bits without CAP_FSETID."""
    made(d / "f", 0o6777)
    os.setxattr(d / "f", "trusted.a", b"")

    def without(capability: str, *command: Any) -> str:
        command = ("setpriv", f"--bounding-set=-{capability}", *command)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout

    listed = "trusted.a" in without("sys_admin", "getfattr", "-m", "-", d / "f")
    without("fsetid", "fallocate", "-l", "100", d / "f")
    return [listed, oct(mode(d / "f"))]


# --- two mounts of one tree ---


def one_file_is_the_same_file(here: Path, there: Path) -> list[bool]:
    """By its number; and by the device number, too."""
    (here / "f").touch()
    one, other = os.stat(here / "f"), os.stat(there / "f")
    return [one.st_ino == other.st_ino, one.st_dev == other.st_dev]


def a_program_that_runs_elsewhere_is_not_written(here: Path, there: Path) -> str:
    program(here / "sleep", "sleep")
    with subprocess.Popen([here / "sleep", "60"]) as process:
        try:
            return outcome(os.open, there / "sleep", os.O_WRONLY)
        finally:
            process.kill()


def pipes_and_sockets_lead_to_the_other_mount(here: Path, there: Path) -> list[str]:
    os.mkfifo(here / "fifo")
    with (
        opened(here / "fifo", os.O_RDONLY | os.O_NONBLOCK), opened(here, os.O_RDONLY) as at, opened(there, os.O_RDONLY) as at_other,
        socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as calling,
    ):  # fmt: skip
        listening.bind(f"/proc/self/fd/{at}/socket")
        listening.listen()
        return [
            outcome(os.open, there / "fifo", os.O_WRONLY | os.O_NONBLOCK),
            outcome(calling.connect, f"/proc/self/fd/{at_other}/socket"),
        ]


def a_store_to_memory_is_read_elsewhere(here: Path, there: Path) -> list[bytes]:
    """Before and after it is written back."""
    (here / "f").write_bytes(bytes(PAGE))
    with opened(here / "f", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as memory:
        memory[:5] = b"store"
        before = (there / "f").read_bytes()[:5]
        memory.flush()
        return [before, (there / "f").read_bytes()[:5]]


def memory_is_what_was_written_elsewhere(here: Path, there: Path) -> list[Any]:
    """At once, and after a look at the file; then whether it ends where the file was cut off, at once and after a look."""
    (here / "f").write_bytes(b"before".ljust(PAGE, b"\0"))
    with opened(here / "f", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as memory:
        assert memory[:6] == b"before"
        with opened(there / "f", os.O_RDWR) as other:
            os.pwrite(other, b"after!", 0)
        found: list[Any] = [memory[:6]]
        os.pread(fd, 1, 0)
        found += [memory[:6]]
        os.truncate(there / "f", 0)
        found += [bool(signal_that_ends(lambda: memory[0]))]
        os.fstat(fd)
        return [*found, bool(signal_that_ends(lambda: memory[0]))]


def the_offset_is_where_it_was_appended(here: Path, there: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with opened(here / "f", flags) as one, opened(there / "f", flags) as other:
        os.write(one, b"12345")
        os.write(other, b"67890")
        os.write(one, b"x")
        assert (there / "f").read_bytes() == b"1234567890x"
        return os.lseek(one, 0, os.SEEK_CUR)


def one_call_appends_at_the_end(here: Path, there: Path) -> bytes:
    """RWF_APPEND, by which a call appends whose descriptor does not."""
    with opened(here / "f") as one, opened(there / "f", os.O_RDWR) as other:
        for fd, what in ((one, b"12345"), (other, b"67890"), (one, b"x")):
            os.pwritev(fd, [what], 0, os.RWF_APPEND)
    return (there / "f").read_bytes()


def a_lease_keeps_others_from_opening(here: Path, there: Path) -> str:
    """F_SETLEASE; others are opened as soon as it is given back."""
    (here / "f").touch()

    def work(pause: Callable[[], None]) -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        with opened(Path("f"), os.O_RDONLY) as fd:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            pause()

    found: list[str] = []
    with Elsewhere(here, work, uid=0, gid=0) as process:
        process.while_it_waits(lambda: found.append(outcome(os.open, there / "f", os.O_WRONLY | os.O_NONBLOCK)))
    return found[0]


def a_descriptor_knows_the_new_owner(here: Path, there: Path) -> list[str]:
    """Whether the former one may still change what is open: at once, and after a look at it."""
    made(here / "f", 0o600, 1001, 1002)

    def work(pause: Callable[[], None]) -> list[str]:
        with opened(Path("f"), os.O_RDONLY) as fd:
            pause()
            first = outcome(os.fchmod, fd, 0o600)
            os.fstat(fd)
            return [first, outcome(os.fchmod, fd, 0o600)]

    with Elsewhere(here, work) as process:
        process.while_it_waits(lambda: os.chown(there / "f", 7, 7))
        return list(process.result())


def a_working_directory_has_a_path(here: Path, there: Path) -> list[str]:
    """After somebody else has given it away, then moved it; and when its new path has been looked up. Then removed."""
    (here / "sub").mkdir()

    def work(pause: Callable[[], None]) -> list[str]:
        os.chdir("sub")
        found = []
        for look in (lambda: None, lambda: None, lambda: os.stat("../moved"), lambda: None):
            pause()
            look()
            found.append(attempt(lambda: os.path.basename(os.getcwd())))
        return found

    changes: tuple[Callable[[], None], ...] = (
        lambda: os.chown(there / "sub", 7, 7), lambda: os.rename(there / "sub", there / "moved"), lambda: None,
        lambda: os.rmdir(there / "moved"),
    )  # fmt: skip
    with Elsewhere(here, work, uid=0, gid=0) as process:
        for change in changes:
            process.while_it_waits(change)
        return list(process.result())


def an_open_file_is_called_by_a_name_given_elsewhere(here: Path, there: Path) -> list[str]:
    """In /proc/PID/fd: at once, and when the new name has been looked up."""
    with opened(here / "f") as fd:
        os.rename(there / "f", there / "g")
        first = os.readlink(f"/proc/self/fd/{fd}")
        os.stat(here / "g")
        return [os.path.basename(path) for path in (first, os.readlink(f"/proc/self/fd/{fd}"))]


def space_is_free_once_a_file_is_removed(here: Path, there: Path) -> bool:
    """At once; it must be as soon as the other has looked, too."""
    with opened(here / "f") as fd:
        os.posix_fallocate(fd, 0, 8 << 20)
    os.stat(there / "f")
    before = os.statvfs(here).f_bfree

    def is_free() -> bool:
        return os.statvfs(here).f_bfree - before > 2000

    os.unlink(here / "f")
    at_once = is_free()
    assert attempt(os.stat, there / "f") == "ENOENT"
    eventually(is_free)
    return at_once


EXPORT, STRICT, ACCESS, PROMPT, NONE = ("export",), ("strict",), ("access",), ("prompt",), ("none",)
STRICTS, ACCESSES, BOTH = ("strict", "strict-again"), ("access", "access-again"), ("access", "strict")


def on(places: tuple[Places, ...], what: Any) -> dict[Places, Any]:
    return dict.fromkeys(places, what)


ONE, TWO = (EXPORT, STRICT, ACCESS), (STRICTS, BOTH)

ALL: list[Deviation] = [
    Deviation(reading_sets_the_access_time, [True] * 3, on((STRICT, ACCESS, PROMPT), [False] * 3), right_on=(EXPORT, NONE)),
    Deviation(a_store_to_memory_sets_the_times, True, on(ONE, False)),
    Deviation(a_store_to_memory_is_data, [2 * PAGE] * 2, on(ONE, ["ENXIO", 2 * PAGE])),
    Deviation(a_store_to_memory_leaves_capabilities, True, on(ONE, False)),
    Deviation(set_gid_without_execution_goes_with_a_group_one_is_not_in, "0o644", on(ONE, "0o2644")),
    Deviation(devices_can_be_opened, "done", on(ONE, "EACCES")),
    Deviation(ioctl_is_for_files, ["done", "done", True], on(ONE, ["ENOTTY", "ENOTSUP", False])),
    Deviation(ranges_can_be_cut_out_and_put_in, ["done"] * 2, on(ONE, ["ENOTSUP"] * 2)),
    Deviation(the_kind_of_file_system_is_told, ["ef53", True, 65000, 64], on(ONE, ["65735546", False, 127, 32])),
    Deviation(an_open_file_is_called_by_its_new_name, "g", on((STRICT, PROMPT), "f (deleted)"), right_on=(EXPORT, ACCESS, NONE)),
    Deviation(direct_io_must_be_aligned, "EINVAL", on(ONE, "done")),
    Deviation(reading_need_not_wait, "done", on(ONE, "ENOTSUP")),
    Deviation(capabilities_count_and_not_the_uid, [False, "0o777"], on(ONE, [True, "0o6777"])),
    Deviation(one_file_is_the_same_file, [True, True], on(TWO, [True, False])),
    Deviation(a_program_that_runs_elsewhere_is_not_written, "ETXTBSY", on(TWO, "done")),
    Deviation(pipes_and_sockets_lead_to_the_other_mount, ["done", "done"], on(TWO, ["ENXIO", "ECONNREFUSED"])),
    Deviation(a_store_to_memory_is_read_elsewhere, [b"store"] * 2, on(TWO, [bytes(5), b"store"])),
    Deviation(
        memory_is_what_was_written_elsewhere, [b"after!", b"after!", True, True],
        on((ACCESSES, BOTH), [b"before", b"after!", False, True]),
    ),
    Deviation(the_offset_is_where_it_was_appended, 11, on(TWO, 6)),
    Deviation(one_call_appends_at_the_end, b"1234567890x", on(TWO, b"67890x")),
    Deviation(a_lease_keeps_others_from_opening, "EAGAIN", on(TWO, "done")),
    Deviation(a_descriptor_knows_the_new_owner, ["EPERM"] * 2, on(TWO, ["done", "EPERM"])),
    Deviation(
        a_working_directory_has_a_path, ["sub", "moved", "moved", "ENOENT"],
        {STRICTS: ["ENOENT", "ENOENT", "moved", "ENOENT"], ACCESSES: ["sub", "sub", "moved", "moved"]},
    ),
    Deviation(an_open_file_is_called_by_a_name_given_elsewhere, ["g", "g"], on(TWO, ["f", "f"])),
    Deviation(space_is_free_once_a_file_is_removed, True, on((ACCESSES,), False)),
]  # fmt: skip
