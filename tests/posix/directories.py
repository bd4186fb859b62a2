"""Listings while entries come and go, places in them, working directories, and what statfs says."""

import ctypes
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from coherency.fuse.syscalls import getdents
from tests.posix.asking import made
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import opened

MANY = 4000
BIG = "many-entries"

libc = ctypes.CDLL(None, use_errno=True)
for _name, _result, *_arguments in (
    ("opendir", ctypes.c_void_p, ctypes.c_char_p), ("readdir", ctypes.c_void_p, ctypes.c_void_p),
    ("closedir", ctypes.c_int, ctypes.c_void_p), ("telldir", ctypes.c_long, ctypes.c_void_p),
    ("seekdir", None, ctypes.c_void_p, ctypes.c_long), ("rewinddir", None, ctypes.c_void_p),
):  # fmt: skip
    getattr(libc, _name).restype, getattr(libc, _name).argtypes = _result, _arguments


class Entry(NamedTuple):
    name: str
    ino: int
    kind: int  # DT_*, which is the upper part of a mode


class Stream:
    """A directory stream of the C library. A context manager."""

    def __init__(self, path: Path) -> None:
        self._stream = libc.opendir(os.fsencode(path))
        if not self._stream:
            raise OSError(ctypes.get_errno(), "opendir", path)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        libc.closedir(self._stream)

    def read(self) -> Entry | None:
        ctypes.set_errno(0)
        entry = libc.readdir(self._stream)
        if not entry:
            assert ctypes.get_errno() == 0
            return None
        ino, _, length, kind = struct.unpack("=QqHB", ctypes.string_at(entry, 19))
        return Entry(os.fsdecode(ctypes.string_at(entry + 19, length - 19).split(b"\0")[0]), ino, kind)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.read, None)

    def names(self) -> list[str]:
        """All that follow, without the two that are always there."""
        return [entry.name for entry in self if entry.name not in (".", "..")]

    def tell(self) -> int:
        return int(libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        libc.seekdir(self._stream, place)

    def rewind(self) -> None:
        libc.rewinddir(self._stream)


def filled(directory: Path, count: int) -> list[str]:
    """A new directory with that many entries, whose long names do not fit into one buffer: links of one file, quickly made."""
    directory.mkdir()
    names = [f"{number:0200}" for number in range(count)]
    (directory / names[0]).touch()
    for name in names[1:]:
        os.link(directory / names[0], directory / name)
    return names


def prepare(root: Path) -> None:
    """What a scenario with many entries finds beside its directory: to make them through a mount would take too long."""
    filled(root / BIG, MANY)


def a_listing_says_what_stat_says(d: Path) -> None:
    (d / "f").touch()
    (d / "sub/below").mkdir(parents=True)
    (d / "link").symlink_to("f")
    os.mkfifo(d / "fifo")
    os.mknod(d / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.link(d / "f", d / "g")
    for directory in (d, d / "sub", d / "sub/below"):
        with Stream(directory) as stream:
            entries = list(stream)
        assert len(entries) == len(os.listdir(directory)) + 2
        for entry in entries:
            status = os.lstat(directory / entry.name)
            assert (entry.name, entry.ino, entry.kind) == (entry.name, status.st_ino, stat.S_IFMT(status.st_mode) >> 12)


def every_entry_once(d: Path) -> None:
    big = d.parent / BIG
    names = sorted(f"{number:0200}" for number in range(MANY))
    assert sorted(os.listdir(big)) == names
    with Stream(big) as stream:
        assert sorted(stream.names()) == names
        assert stream.read() is None


def what_stays_is_listed_once_while_others_come_and_go(d: Path) -> None:
    stays = set(filled(d / "sub", 250))
    _while_others_come_and_go(d / "sub", stays, 25)


def what_stays_is_listed_once_in_a_big_directory(d: Path) -> None:
    _while_others_come_and_go(d.parent / BIG, {f"{number:0200}" for number in range(MANY)}, 20)


def _while_others_come_and_go(directory: Path, stays: set[str], turns: int) -> None:
    for turn in range(turns):
        (directory / f"goes-{turn}").touch()
    with Stream(directory) as stream:
        seen: list[str] = []
        for turn in range(turns):
            seen += [entry.name for _, entry in zip(range(len(stays) // turns), stream, strict=False)]
            (directory / f"comes-{turn}").touch()
            os.unlink(directory / f"goes-{turn}")
            if turn % 3 == 0:
                os.rename(directory / f"comes-{turn}", directory / f"renamed-{turn}")
        seen += stream.names()
    counts = Counter(seen)
    assert {name for name in stays if counts[name] != 1} == set()
    assert {name for name, count in counts.items() if count > 1 and not name.startswith("renamed")} == set()
    new = {f"{'comes' if turn % 3 else 'renamed'}-{turn}" for turn in range(turns)}
    with Stream(directory) as stream:
        assert sorted(stream.names()) == sorted(stays | new)
    for name in new:
        os.unlink(directory / name)


def a_directory_is_emptied_while_it_is_read(d: Path) -> None:
    """As rm -r does."""
    filled(d / "sub", 200)
    with Stream(d / "sub") as stream:
        for entry in stream:
            if entry.name not in (".", ".."):
                os.unlink(d / "sub" / entry.name)
    os.rmdir(d / "sub")


def places_can_be_kept_and_gone_back_to(d: Path) -> None:
    with Stream(d.parent / BIG) as stream:
        places: list[tuple[int, str]] = []
        order: list[str] = []
        while True:
            place = stream.tell()
            entry = stream.read()
            if entry is None:
                break
            order.append(entry.name)
            if len(order) % 250 == 1:  # in the middle of buffers, too
                places.append((place, entry.name))
        end = stream.tell()
        assert len(order) == MANY + 2
        for place, name in reversed(places):
            stream.seek(place)
            found = stream.read()
            assert found is not None
            assert found.name == name
        stream.seek(places[1][0])
        assert [entry.name for entry in stream] == order[250:]
        stream.seek(end)
        assert stream.read() is None


def from_the_beginning_it_is_read_anew(d: Path) -> None:
    (d / "sub").mkdir()
    (d / "sub/a").touch()
    with Stream(d / "sub") as stream:
        assert stream.names() == ["a"]
        (d / "sub/b").touch()
        os.unlink(d / "sub/a")
        stream.rewind()
        assert stream.names() == ["b"]
    with opened(d / "sub", os.O_RDONLY) as fd:
        assert os.listdir(fd) == ["b"]
        (d / "sub/c").touch()
        assert sorted(os.listdir(fd)) == ["b", "c"]


def how_directories_are_read(d: Path) -> None:
    (d / "f").touch()
    made(d / "closed", stat.S_IFDIR | 0o711)
    with opened(d, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert attempt(getdents, fd, 8) == "EINVAL"  # no room for one entry
        assert attempt(os.read, fd, 1) == "EISDIR"
        assert attempt(os.write, fd, b"x") == "EBADF"
        assert len(getdents(fd, 4096)) > 0
        assert getdents(fd, 4096) == b""
        os.lseek(fd, 0, os.SEEK_SET)
        assert len(getdents(fd, 4096)) > 0
    with opened(d / "f", os.O_RDONLY) as fd:
        assert attempt(getdents, fd, 4096) == "ENOTDIR"
    with opened(d, os.O_PATH) as fd:
        assert attempt(getdents, fd, 4096) == "EBADF"
    assert as_user(d, lambda: os.listdir("closed")) == "EACCES"
    assert [attempt(os.listdir, d / name) for name in ("f", "no")] == ["ENOTDIR", "ENOENT"]


def where_one_works_moves_along(d: Path) -> None:
    """In a child process: a working directory belongs to all of a process."""
    (d / "a/sub").mkdir(parents=True)
    (d / "b").mkdir()

    def work() -> list[object]:
        os.chdir(d / "a/sub")
        seen: list[object] = [os.getcwd()]
        os.rename(d / "a/sub", d / "b/moved")
        Path("f").touch()
        seen += [os.getcwd(), os.path.exists(d / "b/moved/f"), os.stat("..").st_ino == os.stat(d / "b").st_ino]
        os.rename(d / "b", d / "c")
        seen += [os.getcwd()]
        os.unlink("f")
        os.rmdir(d / "c/moved")
        seen += [attempt(os.getcwd), attempt(os.listdir, "."), attempt(os.mkdir, "x"), attempt(os.stat, "..") == "ENOENT"]
        seen += [os.stat(".").st_nlink]
        (d / "c/moved").mkdir()
        seen += [attempt(os.getcwd)]
        return seen

    assert as_user(d, work, uid=0, gid=0) == [
        f"{d}/a/sub", f"{d}/b/moved", True, True, f"{d}/c/moved", "ENOENT", [], "ENOENT", False, 0, "ENOENT",
    ]  # fmt: skip


def directories_by_descriptor(d: Path) -> None:
    (d / "sub/below").mkdir(parents=True)
    with opened(d / "sub", os.O_PATH | os.O_DIRECTORY) as at:
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=at))
        os.rename(d / "sub", d / "moved")
        os.link("f", "g", src_dir_fd=at, dst_dir_fd=at)
        os.symlink("f", "link", dir_fd=at)
        os.rename("g", "below/g", src_dir_fd=at, dst_dir_fd=at)
        os.chmod("f", 0o600, dir_fd=at)
        assert os.stat("below/g", dir_fd=at).st_mode == stat.S_IFREG | 0o600
        assert os.readlink("link", dir_fd=at) == "f"
        os.unlink("below/g", dir_fd=at)
        os.rmdir("below", dir_fd=at)
        assert sorted(os.listdir(d / "moved")) == ["f", "link"]


def what_statfs_says(d: Path) -> None:
    """Of a file system of plain size: amounts that can be, and that change as files do."""
    before = os.statvfs(d)
    assert (before.f_bsize, before.f_frsize, before.f_namemax) == (4096, 4096, 255)
    assert 0 < before.f_bavail <= before.f_bfree <= before.f_blocks
    assert 0 < before.f_ffree < before.f_files
    with opened(d / "f") as fd:
        os.posix_fallocate(fd, 0, 8 << 20)
        (d / "sub").mkdir()
        after = os.statvfs(d)
        assert 2048 <= before.f_bfree - after.f_bfree < 2100
        assert before.f_ffree - after.f_ffree == 2
        assert (after.f_blocks, after.f_files) == (before.f_blocks, before.f_files)
        via = os.fstatvfs(fd)
        assert (via.f_bfree, via.f_ffree, via.f_blocks) == (after.f_bfree, after.f_ffree, after.f_blocks)
        os.ftruncate(fd, 0)
        assert before.f_bfree - os.statvfs(d).f_bfree < 100


SCENARIOS: list[Scenario] = [
    a_listing_says_what_stat_says, every_entry_once, what_stays_is_listed_once_while_others_come_and_go,
    what_stays_is_listed_once_in_a_big_directory, a_directory_is_emptied_while_it_is_read,
    places_can_be_kept_and_gone_back_to, from_the_beginning_it_is_read_anew, how_directories_are_read,
    where_one_works_moves_along, directories_by_descriptor, what_statfs_says,
]  # fmt: skip
