"""One tree on two mounts: each function gets the same directory as both show it, and the other sees what the one does.

On a local file system these are two mounts of one tree (a bind mount), and so of one kernel. Guests have caches of their own.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tests.posix.asking import links, made, mode, owner
from tests.posix.directories import Stream, filled
from tests.posix.xattrs import ACCESS, NAMED, allowed, usual
from tests.scenarios.comparing import UserProcess, as_user, attempt
from tests.scenarios.files import opened
from tests.scenarios.names import EXCHANGE, renameat2

Between: TypeAlias = Callable[[Path, Path], None]

PAGE = mmap.PAGESIZE
TRIES = 40
TIMEOUT_S = 60


def at_once(work: Callable[[str], Any], *places: Path) -> list[Any]:
    """What ``work`` returns to a process in each of the places, which begin together. It is told which one it is."""
    waiting, starting = os.pipe()

    def begin(name: str) -> Any:
        os.close(starting)
        os.read(waiting, 1)  # until the other end is closed
        return work(name)

    processes = [UserProcess(place, lambda: begin(str(number)), uid=0, gid=0) for number, place in enumerate(places)]  # noqa: B023
    os.close(waiting)
    os.close(starting)
    return [process.result() for process in processes]


def won(action: Callable[[int], Any], refused: str) -> set[int]:
    """The attempts that succeeded; the others were refused in the one way that may be."""
    answers = {number: attempt(action, number) for number in range(TRIES)}
    assert {answer for answer in answers.values() if isinstance(answer, str)} <= {refused}
    return {number for number, answer in answers.items() if answer != refused}


def each_to_one(sets: list[set[int]]) -> None:
    one, other = sets
    assert (one | other, one & other) == (set(range(TRIES)), set())


def of_two_who_create_exclusively_one_does(here: Path, there: Path) -> None:
    def work(name: str) -> set[int]:
        return won(lambda number: os.close(os.open(f"f{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)), "EEXIST")

    each_to_one(at_once(work, here, there))


def of_two_who_make_a_directory_one_does(here: Path, there: Path) -> None:
    each_to_one(at_once(lambda name: won(lambda number: os.mkdir(f"d{number}"), "EEXIST"), here, there))


def of_two_who_link_one_does(here: Path, there: Path) -> None:
    (here / "0").touch()
    (here / "1").touch()
    each_to_one(at_once(lambda name: won(lambda number: os.link(name, f"l{number}"), "EEXIST"), here, there))


def of_two_who_remove_one_does(here: Path, there: Path) -> None:
    for number in range(TRIES):
        (here / f"f{number}").touch()
    each_to_one(at_once(lambda name: won(lambda number: os.unlink(f"f{number}"), "ENOENT"), here, there))
    assert os.listdir(there) == []


def of_two_who_rename_away_one_does(here: Path, there: Path) -> None:
    for number in range(TRIES):
        (here / f"f{number}").touch()
    sets = at_once(lambda name: won(lambda number: os.rename(f"f{number}", f"{name}-{number}"), "ENOENT"), here, there)
    each_to_one(sets)
    assert sorted(os.listdir(there)) == sorted(f"{name}-{number}" for name, mine in enumerate(sets) for number in mine)


def both_append_and_nothing_is_lost(here: Path, there: Path) -> None:
    (here / "f").touch()

    def work(name: str) -> None:
        with opened(Path("f"), os.O_WRONLY | os.O_APPEND) as fd:
            for number in range(TRIES):
                os.write(fd, f"{name}:{number}:".encode().ljust(99, b".") + b"\n")

    assert at_once(work, here, there) == [None, None]
    content = (there / "f").read_bytes()
    assert content == (here / "f").read_bytes()
    lines = [line.decode().strip(".") for line in content.splitlines()]
    assert sorted(lines) == sorted(f"{name}:{number}:" for name in "01" for number in range(TRIES))
    for name in "01":  # and each one's in its order
        assert [line for line in lines if line.startswith(name)] == [f"{name}:{number}:" for number in range(TRIES)]


def who_appends_since_fcntl_does_as_well(here: Path, there: Path) -> None:
    with opened(here / "f") as fd, opened(there / "f", os.O_WRONLY) as other:
        os.write(fd, b"12345")
        for each in (fd, other):
            fcntl.fcntl(each, fcntl.F_SETFL, os.O_APPEND)
        os.write(other, b"67890")
        os.write(fd, b"one")
        os.write(other, b"other")
        assert (here / "f").read_bytes() == (there / "f").read_bytes() == b"1234567890oneother"


def one_file_has_one_number(here: Path, there: Path) -> None:
    (here / "sub").mkdir()
    (here / "f").write_text("content")
    os.link(here / "f", here / "sub/g")
    os.link(there / "sub/g", there / "h")
    numbers = {os.stat(place / name).st_ino for place in (here, there) for name in ("f", "sub/g", "h")}
    assert len(numbers) == 1
    assert [links(here / "f"), links(there / "h")] == [3, 3]
    os.unlink(there / "f")
    assert [links(here / "sub/g"), attempt(os.stat, here / "f")] == [2, "ENOENT"]
    with Stream(here) as one, Stream(there) as other:
        assert {(entry.name, entry.ino) for entry in one if entry.name != ".."} == {(e.name, e.ino) for e in other if e.name != ".."}


def what_is_written_is_read(here: Path, there: Path) -> None:
    """Also through descriptors that are open on both sides."""
    with opened(here / "f") as fd, opened(there / "f", os.O_RDWR) as other:
        for number in range(10):
            os.pwrite(fd, b"%04d" % number, 4 * number)
            assert os.fstat(other).st_size == 4 * number + 4
            assert os.pread(other, 4, 4 * number) == b"%04d" % number
        os.ftruncate(other, 6)
        assert (os.fstat(fd).st_size, os.pread(fd, 99, 0)) == (6, b"000000")
        os.ftruncate(other, 9)
        assert (os.pread(fd, 99, 0), os.fstat(fd).st_size) == (b"000000\0\0\0", 9)
        assert os.lseek(fd, 0, os.SEEK_END) == 9
        with opened(there / "f", os.O_WRONLY | os.O_TRUNC):
            assert (os.fstat(fd).st_size, os.pread(fd, 9, 0)) == (0, b"")


def unlinked_there_it_goes_on_here(here: Path, there: Path) -> None:
    with opened(here / "f") as fd:
        os.write(fd, b"content")
        os.unlink(there / "f")
        assert (links(fd), os.pread(fd, 9, 0), os.write(fd, b" more")) == (0, b"content", 5)
        os.fchmod(fd, 0o604)
        os.ftruncate(fd, 9)
        assert (os.fstat(fd).st_size, mode(fd), attempt(os.stat, here / "f")) == (9, 0o604, "ENOENT")
        (there / "f").write_text("another")
        assert (here / "f").read_text() == "another"
        assert os.pread(fd, 99, 0) == b"content m"


def replaced_there_it_goes_on_here(here: Path, there: Path) -> None:
    (here / "f").write_text("old")
    (here / "new").write_text("new")
    with opened(here / "f", os.O_RDWR) as fd:
        os.rename(there / "new", there / "f")
        assert (os.pread(fd, 9, 0), links(fd), (here / "f").read_text()) == (b"old", 0, "new")
        os.write(fd, b"OLD")
        assert (there / "f").read_text() == "new"


def a_replaced_name_is_always_there(here: Path, there: Path) -> None:
    """Who opens it finds the old file or the new one, and whole."""
    (here / "f").write_bytes(b"%06d" % 0)

    def replace() -> None:
        for number in range(1, TRIES):
            Path("new").write_bytes(b"%06d" % number)
            os.rename("new", "f")

    process = UserProcess(there, replace, uid=0, gid=0)
    last, deadline = 0, time.monotonic() + TIMEOUT_S
    try:
        while last < TRIES - 1:
            number = int((here / "f").read_bytes())
            assert number >= last
            last = number
            assert time.monotonic() < deadline, "the last one never comes"
    finally:
        result = process.result()
    assert result is None


def moved_there_it_is_used_here(here: Path, there: Path) -> None:
    (here / "a/sub").mkdir(parents=True)
    (here / "b").mkdir()
    (here / "a/sub/f").write_text("content")
    with opened(here / "a/sub", os.O_RDONLY | os.O_DIRECTORY) as at, opened(here / "a/sub/f", os.O_RDWR) as fd:
        os.rename(there / "a/sub", there / "b/moved")
        assert attempt(os.stat, here / "a/sub") == "ENOENT"
        assert (here / "b/moved/f").read_text() == "content"
        os.close(os.open("g", os.O_CREAT, dir_fd=at))
        os.write(fd, b"CONTENT")
        assert sorted(os.listdir(there / "b/moved")) == ["f", "g"]
        assert (there / "b/moved/f").read_text() == "CONTENT"
        assert [links(here / "a"), links(here / "b")] == [2, 3]


def removed_there_it_is_empty_here(here: Path, there: Path) -> None:
    (here / "sub").mkdir()
    with opened(here / "sub", os.O_RDONLY | os.O_DIRECTORY) as at:
        os.rmdir(there / "sub")
        assert (links(at), os.listdir(at)) == (0, [])
        assert attempt(os.mkdir, "x", dir_fd=at) == "ENOENT"
        (there / "sub").mkdir()
        (there / "sub/f").touch()
        assert (os.listdir(at), os.listdir(here / "sub")) == ([], ["f"])


def other_kinds_under_the_same_name(here: Path, there: Path) -> None:
    for turn in range(3):
        (here / "x").write_text("a file")
        assert (there / "x").read_text() == "a file"
        os.unlink(there / "x")
        (there / "x").mkdir()
        assert (os.listdir(here / "x"), attempt(os.unlink, here / "x")) == ([], "EISDIR")
        os.rmdir(here / "x")
        (here / "x").symlink_to(f"target{turn}")
        assert os.readlink(there / "x") == f"target{turn}"
        os.unlink(there / "x")
        os.mkfifo(there / "x")
        assert attempt(os.rmdir, here / "x") == "ENOTDIR"
        os.unlink(here / "x")
        assert not os.path.lexists(there / "x")


def exchanged_there(here: Path, there: Path) -> None:
    (here / "f").write_text("content")
    (here / "sub/below").mkdir(parents=True)
    for _ in range(4):
        assert [(here / "f").is_file(), (here / "sub/below").is_dir()] == [True, True]
        renameat2(there / "f", there / "sub", EXCHANGE)
        assert [(here / "sub").read_text(), os.listdir(here / "f")] == ["content", ["below"]]
        renameat2(here / "f", here / "sub", EXCHANGE)
        assert [(there / "f").read_text(), os.listdir(there / "sub")] == ["content", ["below"]]


def permissions_are_those_of_now(here: Path, there: Path) -> None:
    made(here / "f", 0o600, 1001, 1002, b"text")
    read = lambda: Path("f").read_text()  # noqa: E731
    for uid, bits, answer in ((7, 0o604, "text"), (7, 0o600, "EACCES"), (1001, 0o400, "text"), (1001, 0o044, "EACCES")):
        os.chmod(there / "f", bits)
        assert (uid, oct(bits), as_user(here, read, uid=uid, gid=7)) == (uid, oct(bits), answer)
    os.chmod(there / "f", 0o600)
    for new in (7, 1001):
        os.chown(there / "f", new, -1)
        assert [as_user(here, lambda: os.chmod("f", 0o600), uid=uid) for uid in (7, 1001)] == (
            [None, "EPERM"] if new == 7 else ["EPERM", None]
        )
    os.setxattr(there / "f", ACCESS, usual(6, 4, 0, 4, 0))
    assert as_user(here, lambda: allowed("f"), uid=NAMED, gid=7) == "r"
    os.setxattr(there / "f", ACCESS, usual(6, 6, 0, 6, 0))
    assert as_user(here, lambda: allowed("f"), uid=NAMED, gid=7) == "rw"
    os.removexattr(there / "f", ACCESS)
    assert as_user(here, lambda: allowed("f"), uid=NAMED, gid=7) == ""


def directories_are_closed_at_once(here: Path, there: Path) -> None:
    made(here / "open", 0o40755)
    made(here / "open/f", 0o644, 0, 0, b"text")
    read = lambda: Path("open/f").read_text()  # noqa: E731
    for bits, answer in ((0o711, "text"), (0o700, "EACCES"), (0o701, "text")):
        os.chmod(there / "open", bits)
        assert (oct(bits), as_user(here, read)) == (oct(bits), answer)
    os.chmod(there / "open", 0o1777)
    made(there / "open/mine", 0o666, 1001, 1002)
    assert as_user(here, lambda: os.unlink("open/f")) == "EPERM"
    os.chown(there / "open/f", 1001, -1)
    assert as_user(here, lambda: os.unlink("open/f")) is None
    os.chmod(there / "open", 0o2777)
    os.chown(there / "open", -1, 5000)
    assert as_user(here, lambda: os.mkdir("open/sub")) is None
    assert owner(there / "open/sub") == (1001, 5000)


def attributes_are_those_of_now(here: Path, there: Path) -> None:
    (here / "f").touch()
    for number in range(5):
        value = b"%d" % number * number
        os.setxattr(there / "f", "user.a", value)
        os.utime(there / "f", ns=(number, 10 * number))
        os.chown(there / "f", number, 2 * number)
        assert os.getxattr(here / "f", "user.a") == value
        assert (os.stat(here / "f").st_mtime_ns, owner(here / "f")) == (10 * number, (number, 2 * number))
    os.removexattr(there / "f", "user.a")
    assert os.listxattr(here / "f") == []


def set_id_bits_go_for_both(here: Path, there: Path) -> None:
    made(here / "f", 0o6777, 1001, 1002, b"text")
    with opened(here / "f", os.O_RDONLY) as fd:
        assert mode(fd) == 0o6777

        def write() -> None:
            with opened(Path("f"), os.O_WRONLY) as writing:
                os.write(writing, b"x")

        assert as_user(there, write, uid=7) is None
        assert (mode(fd), mode(here / "f")) == (0o777, 0o777)


def memory_that_was_written_back_is_seen(here: Path, there: Path) -> None:
    (here / "f").write_bytes(bytes(2 * PAGE))
    with opened(there / "f", os.O_RDWR) as other:
        assert os.pread(other, 4, PAGE) == bytes(4)
        with opened(here / "f", os.O_RDWR) as fd, mmap.mmap(fd, 2 * PAGE) as memory:
            memory[PAGE : PAGE + 4] = b"page"
            memory.flush()
            assert os.pread(other, 4, PAGE) == b"page"
            assert (there / "f").read_bytes()[PAGE : PAGE + 4] == b"page"


def listings_go_on_while_the_other_works(here: Path, there: Path) -> None:
    stays = filled(here / "sub", 200)
    with Stream(here / "sub") as stream:
        seen = [entry.name for _, entry in zip(range(20), stream, strict=False)]
        for number in range(20):
            (there / f"sub/comes-{number}").touch()
        seen += stream.names()
        stream.rewind()
        again = stream.names()
    assert sorted(name for name in seen if name in set(stays)) == sorted(stays)
    assert sorted(again) == sorted([*stays, *(f"comes-{number}" for number in range(20))])


def moved_between_mounts(here: Path, there: Path) -> None:
    """To the kernel they are different file systems, or mounts."""
    (here / "f").write_text("content")
    assert attempt(os.rename, here / "f", there / "g") == "EXDEV"
    assert attempt(os.link, here / "f", there / "g") == "EXDEV"


SCENARIOS: list[Between] = [
    of_two_who_create_exclusively_one_does, of_two_who_make_a_directory_one_does, of_two_who_link_one_does,
    of_two_who_remove_one_does, of_two_who_rename_away_one_does, both_append_and_nothing_is_lost,
    who_appends_since_fcntl_does_as_well, one_file_has_one_number, what_is_written_is_read, unlinked_there_it_goes_on_here,
    replaced_there_it_goes_on_here, moved_there_it_is_used_here, a_replaced_name_is_always_there,
    removed_there_it_is_empty_here, other_kinds_under_the_same_name, exchanged_there, permissions_are_those_of_now,
    directories_are_closed_at_once, attributes_are_those_of_now, set_id_bits_go_for_both,
    memory_that_was_written_back_is_seen, listings_go_on_while_the_other_works, moved_between_mounts,
]  # fmt: skip
