"""What a guest has made, and somebody else has renamed or removed before the guest's agent could look at it."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.granting_guest import GrantingGuest
from tests.guests import Host

MAKE: dict[str, Callable[[Path], object]] = {
    "symlink": lambda path: os.symlink("target", path),
    "mkdir": os.mkdir,
    "mknod": lambda path: os.mknod(path, stat.S_IFIFO | 0o600),
    "link": lambda path: os.link(path.parent / "there", path),
}


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        (host.share / "there").write_text("there")
        yield host


@pytest.fixture(scope="module")
def guest(host: Host) -> Iterator[GrantingGuest]:
    with GrantingGuest(host) as guest:
        yield guest


@contextmanager
def before_it_is_looked_at(guest: GrantingGuest, name: str, meanwhile: Callable[[], object]) -> Iterator[None]:
    look_up = guest.fs.look_up
    left = [meanwhile]

    def late(parent: Any, at: int, looked_for: bytes) -> Any:
        if os.fsdecode(looked_for) == name and os.path.lexists(f"/proc/self/fd/{at}/{name}") and left:
            left.pop()()
        return look_up(parent, at, looked_for)

    guest.fs.look_up = late  # type: ignore[method-assign, assignment]
    try:
        yield
        assert not left, "it has not been looked at"
    finally:
        del guest.fs.look_up


def take_away(path: Path) -> None:
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("kind", MAKE)
def test_removed_it_was_made_all_the_same(host: Host, guest: GrantingGuest, kind: str) -> None:
    name = f"removed-{kind}"
    with before_it_is_looked_at(guest, name, lambda: take_away(host.export / name)):
        MAKE[kind](guest.path / name)
    assert not os.path.lexists(guest.path / name)
    assert name not in os.listdir(guest.path)
    MAKE[kind](guest.path / name)
    assert os.path.lexists(guest.path / name)


@pytest.mark.parametrize("kind", MAKE)
def test_replaced_it_was_made_all_the_same(host: Host, guest: GrantingGuest, kind: str) -> None:
    """By something of another type, which a kernel would not take for what it has asked for."""
    name = f"replaced-{kind}"

    def replace() -> None:
        (host.export / name).rename(host.export / f"moved-{kind}")
        (host.export / name).mkdir() if kind != "mkdir" else (host.export / name).touch()

    with before_it_is_looked_at(guest, name, replace):
        MAKE[kind](guest.path / name)
    for each in (name, f"moved-{kind}"):
        assert os.lstat(guest.path / each).st_mode == os.lstat(host.share / each).st_mode


def test_names_of_what_is_gone_can_be_used_at_once(host: Host, guest: GrantingGuest) -> None:
    with before_it_is_looked_at(guest, "again", lambda: take_away(host.export / "again")):
        (guest.path / "again").mkdir()
    (guest.path / "again").write_text("a file now")
    assert (host.share / "again").read_text() == "a file now"
    guest.fs.nodes.check()
