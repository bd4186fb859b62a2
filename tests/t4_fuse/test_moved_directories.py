"""A directory that somebody else has moved can be renamed at once, without looking at it first."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coherency.daemon.service import Service, ServiceOptions
from coherency.guest_agent.filesystem import CachingFileSystem
from coherency.guest_agent.mount import GuestMount, LowerPassthrough, MountOptions

MakeGuests = Callable[[str], list[Path]]
MODES = pytest.mark.parametrize("mode", ["none", "access"])


@pytest.fixture
def make_guests(socket_dir: Path) -> Iterator[MakeGuests]:
    with ExitStack() as undo:
        (socket_dir / "share").mkdir()
        service = Service(ServiceOptions(socket_dir / "share", "test", socket_dir / "run"))
        service.start()
        undo.callback(service.close)

        def make(mode: str) -> list[Path]:
            places = [socket_dir / "a", socket_dir / "b"]
            for place in places:
                place.mkdir()
                mount = GuestMount(MountOptions("test", place, socket_dir / "run", mode))
                mount.start()
                undo.callback(mount.close)
            return places

        yield make


def _move_what_another_guest_has_moved(a: Path, b: Path) -> None:
    (a / "d0/x").mkdir(parents=True)
    (a / "d1").mkdir()
    (b / "d0/x").stat()
    (a / "d0/x").rename(a / "d1/x")
    (b / "d1/x").rename(b / "d0/y")


@MODES
def test_directory_is_renamed_after_another_guest_moved_it(make_guests: MakeGuests, mode: str) -> None:
    a, b = make_guests(mode)
    _move_what_another_guest_has_moved(a, b)
    assert (a / "d0/y").is_dir()
    assert (a / "d0/y").stat().st_ino == (b / "d0/y").stat().st_ino
    assert os.listdir(a / "d1") == os.listdir(b / "d1") == []
    (b / "d0/y/file").touch()
    assert os.listdir(a / "d0/y") == ["file"]


@MODES
def test_process_inside_stays_there(make_guests: MakeGuests, mode: str) -> None:
    a, b = make_guests(mode)
    (a / "d0/x").mkdir(parents=True)
    (a / "d1").mkdir()
    inside = os.open(b / "d0/x", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (a / "d0/x").rename(a / "d1/x")
        assert (b / "d1/x").is_dir()
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
        assert os.listdir(inside) == os.listdir(a / "d1/x") == ["file"]
        assert os.fstat(inside).st_ino == (b / "d1/x").stat().st_ino
        (a / "d1/x").chmod(0o711)
        assert os.fstat(inside).st_mode == (b / "d1/x").stat().st_mode
    finally:
        os.close(inside)


@MODES
def test_control_the_kernel_refuses_to_move_its_own_dentry(
    make_guests: MakeGuests, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (LowerPassthrough, CachingFileSystem):
        monkeypatch.setattr(kind, "moved_directories_are_new", False)
    a, b = make_guests(mode)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        _move_what_another_guest_has_moved(a, b)
