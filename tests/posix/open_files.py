"""Files that are open: flags, and what becomes of them when their names go."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

from tests.posix.asking import links, made, mode
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import link_descriptor, opened

RW_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


def without_a_name_everything_goes_on(d: Path) -> None:
    with opened(d / "f", RW_NEW, 0o644) as fd:
        os.write(fd, b"before")
        number = os.fstat(fd).st_ino
        os.unlink(d / "f")
        assert (links(fd), os.fstat(fd).st_size, os.fstat(fd).st_ino) == (0, 6, number)
        assert os.pwrite(fd, b" after", 6) == 6
        assert os.pread(fd, 99, 0) == b"before after"
        os.ftruncate(fd, 3)
        os.fchmod(fd, 0o600)
        os.fchown(fd, 5, 6)
        os.utime(fd, ns=(1_000, 2_000))
        os.fsync(fd)
        status = os.fstat(fd)
        assert (status.st_size, mode(fd), status.st_uid, status.st_gid) == (3, 0o600, 5, 6)
        assert (status.st_mtime_ns, status.st_nlink) == (2_000, 0)
        os.setxattr(fd, "user.a", b"value")
        assert (os.getxattr(fd, "user.a"), os.listxattr(fd)) == (b"value", ["user.a"])
        with opened(d / "f", RW_NEW) as other:
            assert os.fstat(other).st_ino != number
        assert os.pread(fd, 9, 0) == b"bef"


def without_a_name_it_can_be_opened_again(d: Path) -> None:
    """Through /proc, by which it also gets the other calls that take paths."""
    with opened(d / "f", RW_NEW) as fd:
        os.write(fd, b"content")
        os.unlink(d / "f")
        path = Path(f"/proc/self/fd/{fd}")
        with opened(path, os.O_RDWR) as again:
            assert os.pread(again, 9, 0) == b"content"
            os.pwrite(again, b"C", 0)
        os.chmod(path, 0o604)
        os.truncate(path, 4)
        assert (os.pread(fd, 9, 0), mode(fd), os.stat(path).st_nlink) == (b"Cont", 0o604, 0)
        assert attempt(link_descriptor, fd, d / "again") == "ENOENT"


def the_last_name_counts(d: Path) -> None:
    with opened(d / "a", RW_NEW) as fd:
        os.link(d / "a", d / "b")
        assert links(fd) == 2
        os.unlink(d / "a")
        assert links(fd) == 1
        link_descriptor(fd, d / "c")
        assert links(fd) == 2
        os.unlink(d / "b")
        os.unlink(d / "c")
        assert links(fd) == 0


def a_removed_directory_is_empty_for_good(d: Path) -> None:
    (d / "sub").mkdir()
    with opened(d / "sub", os.O_RDONLY | os.O_DIRECTORY) as at:
        os.rmdir(d / "sub")
        assert (links(at), os.listdir(at)) == (0, [])
        assert attempt(os.open, "f", os.O_CREAT | os.O_WRONLY, dir_fd=at) == "ENOENT"
        assert attempt(os.mkdir, "f", dir_fd=at) == "ENOENT"
        assert attempt(os.stat, "f", dir_fd=at) == "ENOENT"
        assert attempt(os.symlink, "x", "f", dir_fd=at) == "ENOENT"
        (d / "sub").mkdir()
        (d / "sub/f").touch()
        assert os.listdir(at) == []


def a_file_without_a_name_gets_one(d: Path) -> None:
    with opened(d, os.O_RDWR | os.O_TMPFILE, 0o640) as fd:
        os.write(fd, b"content")
        assert (links(fd), os.listdir(d), mode(fd)) == (0, [], 0o640)
        link_descriptor(fd, d / "named")
        assert (links(fd), (d / "named").read_bytes(), mode(d / "named")) == (1, b"content", 0o640)
        assert attempt(link_descriptor, fd, d / "named") == "EEXIST"
        os.unlink(d / "named")
        assert attempt(link_descriptor, fd, d / "again") == "ENOENT"
    with opened(d, os.O_WRONLY | os.O_TMPFILE | os.O_EXCL) as fd:
        assert attempt(link_descriptor, fd, d / "never") == "ENOENT"
    (d / "f").touch()
    assert attempt(os.open, d, os.O_RDONLY | os.O_TMPFILE) == "EINVAL"
    assert attempt(os.open, d / "f", os.O_RDWR | os.O_TMPFILE) == "ENOTDIR"
    assert attempt(os.open, d / "no", os.O_RDWR | os.O_TMPFILE) == "ENOENT"
    made(d / "closed", stat.S_IFDIR | 0o755)
    assert as_user(d, lambda: os.open("closed", os.O_RDWR | os.O_TMPFILE)) == "EACCES"


def creating_exclusively(d: Path) -> None:
    (d / "f").touch()
    (d / "dangling").symlink_to("nowhere")
    (d / "sub").mkdir()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    assert [attempt(os.open, d / name, flags) for name in ("f", "dangling", "sub")] == ["EEXIST"] * 3
    with opened(d / "dangling", os.O_WRONLY | os.O_CREAT):
        assert (d / "nowhere").exists()
    (d / "through").symlink_to("no/where")
    assert attempt(os.open, d / "through", os.O_WRONLY | os.O_CREAT) == "ENOENT"


def only_directories_or_no_symlinks(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    (d / "dirlink").symlink_to("sub")
    for name, flags, answer in (
        ("f", os.O_DIRECTORY, "ENOTDIR"), ("link", os.O_DIRECTORY, "ENOTDIR"), ("link", os.O_NOFOLLOW, "ELOOP"),
        ("dirlink", os.O_NOFOLLOW, "ELOOP"), ("dirlink", os.O_NOFOLLOW | os.O_DIRECTORY, "ENOTDIR"),
        ("link", os.O_NOFOLLOW | os.O_CREAT | os.O_WRONLY, "ELOOP"), ("sub", os.O_WRONLY, "EISDIR"),
        ("sub", os.O_RDWR, "EISDIR"), ("sub", os.O_CREAT, "EISDIR"), ("dirlink", os.O_CREAT | os.O_WRONLY, "EISDIR"),
        ("sub", os.O_TRUNC, "EISDIR"), ("new", os.O_DIRECTORY | os.O_CREAT, "EINVAL"), ("no", os.O_DIRECTORY, "ENOENT"),
    ):  # fmt: skip
        assert (name, oct(flags), attempt(os.open, d / name, flags)) == (name, oct(flags), answer)
    with opened(d / "dirlink", os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.path.samestat(os.fstat(fd), os.stat(d / "sub"))
    assert not os.path.lexists(d / "new")


def a_path_descriptor_only_names(d: Path) -> None:
    made(d / "f", 0o600, 0, 0, b"content")
    (d / "link").symlink_to("f")

    def work() -> list[Any]:
        with opened(Path("f"), os.O_PATH) as fd:
            return [
                os.fstat(fd).st_size, attempt(os.read, fd, 1), attempt(os.fchmod, fd, 0), attempt(os.ftruncate, fd, 0),
                attempt(os.fchown, fd, 1001, 1002), attempt(os.open, f"/proc/self/fd/{fd}", os.O_RDONLY),
            ]  # fmt: skip

    assert as_user(d, work) == [7, "EBADF", "EBADF", "EBADF", "EBADF", "EACCES"]
    with opened(d / "link", os.O_PATH | os.O_NOFOLLOW) as fd:
        assert (stat.S_ISLNK(os.fstat(fd).st_mode), os.readlink("", dir_fd=fd)) == (True, "f")
    with opened(d / "f", os.O_PATH) as fd:
        os.unlink(d / "f")
        assert links(fd) == 0


def the_way_it_was_opened_decides(d: Path) -> None:
    (d / "f").write_bytes(b"content")
    with opened(d / "f", os.O_RDONLY) as fd:
        answers = [attempt(os.write, fd, b"x"), attempt(os.ftruncate, fd, 0), attempt(os.posix_fallocate, fd, 0, 1)]
        assert answers == ["EBADF", "EINVAL", "EBADF"]
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(1, 1))
        assert mode(d / "f") == 0o600
    with opened(d / "f", os.O_WRONLY) as fd:
        assert attempt(os.read, fd, 1) == "EBADF"
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    with opened(d / "f", os.O_RDONLY | os.O_TRUNC) as fd:  # which Linux does
        assert os.fstat(fd).st_size == 0


def truncating_while_others_have_it_open(d: Path) -> None:
    (d / "f").write_bytes(b"content")
    with opened(d / "f", os.O_RDWR) as fd:
        assert os.read(fd, 3) == b"con"
        with opened(d / "f", os.O_WRONLY | os.O_TRUNC) as other:
            assert (os.read(fd, 9), os.fstat(fd).st_size) == (b"", 0)
            os.write(other, b"12345")
        assert os.read(fd, 9) == b"45"


def appending_can_be_switched(d: Path) -> None:
    with opened(d / "f", RW_NEW) as fd:
        os.write(fd, b"12345")
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"end")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 8
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.pwrite(fd, b"X", 0)
        assert os.pread(fd, 99, 0) == b"X2345end"
    for name, flags in (("log", os.O_WRONLY), ("book", os.O_RDWR)):
        with opened(d / name, flags | os.O_CREAT | os.O_APPEND) as fd:
            os.write(fd, b"12345")
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            os.pwrite(fd, b"X", 1)
            os.lseek(fd, 3, os.SEEK_SET)
            os.write(fd, b"YZ!")
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b"end")
            assert (d / name).read_bytes() == b"1X3YZ!end"


def several_append_to_one_file(d: Path) -> None:
    """Processes on one machine: nothing is lost or torn."""
    made(d / "f", 0o666)
    lines = [b"%d " % number * 40 + b"\n" for number in range(3)]
    children = []
    for line in lines:
        if (child := os.fork()) == 0:
            try:
                with opened(d / "f", os.O_WRONLY | os.O_APPEND) as fd:
                    for _ in range(20):
                        os.write(fd, line)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sorted((d / "f").read_bytes().splitlines(keepends=True)) == sorted(lines * 20)


def a_copy_of_a_descriptor_shares_the_offset(d: Path) -> None:
    (d / "f").write_bytes(b"0123456789")
    with opened(d / "f", os.O_RDONLY) as fd, opened(d / "f", os.O_RDONLY) as own:
        copy = os.dup(fd)
        assert [os.read(fd, 2), os.read(copy, 2), os.read(own, 2)] == [b"01", b"23", b"01"]
        os.close(copy)
        if (child := os.fork()) == 0:
            os.read(fd, 2)
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(fd, 2) == b"67"


def open_and_closed_many_times(d: Path) -> None:
    """Each close is one: no descriptor is mixed up with another."""
    (d / "f").write_bytes(b"content")
    for round_ in range(20):
        with opened(d / "f", os.O_RDWR) as one, opened(d / "f", os.O_RDONLY) as other:
            os.pwrite(one, b"%02d" % round_, 0)
            assert os.pread(other, 2, 0) == b"%02d" % round_
        assert attempt(os.fstat, one) == errno.errorcode[errno.EBADF]


SCENARIOS: list[Scenario] = [
    without_a_name_everything_goes_on, without_a_name_it_can_be_opened_again, the_last_name_counts,
    a_removed_directory_is_empty_for_good, a_file_without_a_name_gets_one, creating_exclusively,
    only_directories_or_no_symlinks, a_path_descriptor_only_names, the_way_it_was_opened_decides,
    truncating_while_others_have_it_open, appending_can_be_switched, several_append_to_one_file,
    a_copy_of_a_descriptor_shares_the_offset, open_and_closed_many_times,
]  # fmt: skip
