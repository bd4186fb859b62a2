"""Listings through a passthrough: huge ones, changing ones, and ones that are left and resumed."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.passthrough import Served
from tests.t4_fuse.conftest import FOREVER

HUGE = 100_000

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.opendir.argtypes = (ctypes.c_char_p,)
libc.readdir.argtypes = libc.telldir.argtypes = libc.closedir.argtypes = libc.rewinddir.argtypes = (ctypes.c_void_p,)
libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
_NAME_OFFSET = 19  # of struct dirent


class Stream:
    """A directory stream of the C library."""

    def __init__(self, path: Path) -> None:
        self._stream = libc.opendir(os.fsencode(path))
        assert self._stream

    def read(self) -> bytes | None:
        entry = libc.readdir(self._stream)
        return ctypes.string_at(entry + _NAME_OFFSET) if entry else None

    def rest(self) -> list[bytes]:
        return list(iter(self.read, None))

    def tell(self) -> int:
        return int(libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        libc.seekdir(self._stream, place)

    def rewind(self) -> None:
        libc.rewinddir(self._stream)

    def close(self) -> None:
        libc.closedir(self._stream)


def fill(directory: Path, names: list[str]) -> None:
    """Make the directory, with empty files of these names."""
    directory.mkdir()
    at = os.open(directory, os.O_RDONLY)
    for name in names:
        os.mknod(name, dir_fd=at)
    os.close(at)


@pytest.fixture(scope="module")
def share(make_socket_dir: Callable[[], Path]) -> Iterator[Path]:
    """With a huge directory in it, in memory: on a disk it takes ten times as long to make."""
    made = make_socket_dir()
    (made / "huge").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", made / "huge"], check=True)
    try:
        fill(made / "huge/of them", [f"entry-{number}" for number in range(HUGE)])
        yield made
    finally:
        subprocess.run(["umount", made / "huge"], check=True)


@pytest.fixture(scope="module", params=["plain", "plus"])
def mount(
    request: pytest.FixtureRequest,
    share: Path,
    make_socket_dir: Callable[[], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Listed by READDIR, or by READDIRPLUS, which looks every name up."""
    options = {"kernel_cache": FOREVER} if request.param == "plus" else {}
    with Served(share, make_socket_dir(), log=tmp_path_factory.mktemp("log") / "server.log", **options) as served:
        (share / "few").mkdir(exist_ok=True)
        for name in "abcde":
            (share / "few" / name).touch()
        os.listdir(served.mountpoint / "few")
        known = 5 if request.param == "plus" else 0
        assert served.statistic("nodes") == 2 + known, "not the kind of listing that this is about"
        yield served


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name for this test's own directory."""
    return str(request.node.name)


def test_every_one_of_a_hundred_thousand_entries_once(mount: Served) -> None:
    names = os.listdir(mount.mountpoint / "huge/of them")
    assert len(names) == HUGE
    assert set(names) == {f"entry-{number}" for number in range(HUGE)}
    mount.ask("check")


def test_a_stream_goes_on_where_it_was_left(mount: Served, name: str) -> None:
    fill(mount.directory / name, [str(number) for number in range(3000)])
    stream = Stream(mount.mountpoint / name)
    read = [stream.read() for _ in range(1000)]
    place = stream.tell()
    rest = stream.rest()
    assert len(set(read) | set(rest)) == 3002  # with . and ..
    assert len(read) + len(rest) == 3002
    stream.seek(place)
    assert stream.rest() == rest
    stream.rewind()
    assert stream.rest() == read + rest
    stream.close()


def test_what_stays_is_listed_once_while_others_come_and_go(mount: Served, name: str) -> None:
    staying = {f"stays-{number}" for number in range(2000)}
    fill(mount.directory / name, [*staying, *(f"goes-{number}" for number in range(500))])
    stream = Stream(mount.mountpoint / name)
    read: list[bytes] = []
    number = 0
    while (entry := stream.read()) is not None:
        read.append(entry)
        if number < 500 and len(read) % 4 == 0:
            # Through the mount and behind its back.
            changing = (mount.mountpoint if number % 2 else mount.directory) / name
            (changing / f"goes-{number}").unlink()
            (changing / f"comes-{number}").touch()
            number += 1
    assert number == 500
    stream.close()
    listed = [os.fsdecode(each) for each in read if os.fsdecode(each) in staying]
    assert sorted(listed) == sorted(staying)
    assert len(set(read)) == len(read)
    mount.ask("check")


def test_a_listing_shows_what_a_look_up_would(mount: Served, name: str) -> None:
    kinds = mount.directory / name
    kinds.mkdir()
    (kinds / "file").write_bytes(b"12345")
    (kinds / "directory").mkdir()
    (kinds / "link").symlink_to("nowhere")
    os.mkfifo(kinds / "fifo")
    with os.scandir(mount.mountpoint / name) as entries:
        for entry in entries:
            assert os.path.samestat(entry.stat(follow_symlinks=False), os.lstat(mount.mountpoint / name / entry.name))
            assert entry.inode() == os.lstat(kinds / entry.name).st_ino
            assert entry.stat(follow_symlinks=False).st_size == os.lstat(kinds / entry.name).st_size


def test_an_empty_directory_and_one_that_is_removed_while_open(mount: Served, name: str) -> None:
    empty = mount.mountpoint / name
    empty.mkdir()
    assert os.listdir(empty) == []
    stream = Stream(empty)
    empty.rmdir()
    assert stream.rest() in ([], [b".", b".."])
    stream.close()
