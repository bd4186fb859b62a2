"""A rename for which the kernel has resolved a granted name, which is recalled before the agent hears of the rename."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.fuse import syscalls
from coherency.fuse.abi import Opcode
from tests.granting_guest import GrantingGuest, HeldOperation, InBackground, state
from tests.guests import Host

EXCHANGE = 2


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


@pytest.fixture(scope="module")
def guest(host: Host) -> Iterator[GrantingGuest]:
    with GrantingGuest(host) as guest:
        yield guest


def rename(directory: Path, flags: int) -> None:
    syscalls.renameat2(
        syscalls.AT_FDCWD, os.fsencode(directory / "old"), syscalls.AT_FDCWD, os.fsencode(directory / "new"), flags
    )


def prepared(host: Host, guest: GrantingGuest, name: str) -> tuple[Path, Path]:
    """The same directory through the export and through the guest, whose kernel has the old name.

    Not the new one: a helper that drops that as well comes back when the rename is over, and drops what the kernel has then.
    """
    there, here = host.export / name, guest.path / name
    there.mkdir()
    for each in ("old", "other"):
        (there / each).write_text(each)
    guest.warm(lambda: os.stat(here / "old"))
    return there, here


def renamed_meanwhile(guest: GrantingGuest, there: Path, here: Path, flags: int) -> None:
    """What is under the old name is exchanged by somebody else, after the guest's kernel has resolved it."""
    with HeldOperation(guest, Opcode.RENAME2 if flags else Opcode.RENAME) as gate:
        renaming = InBackground(rename, here, flags)
        gate.await_reached()
        (there / "other").rename(there / "old")
        gate.open()
        renaming.wait()


@pytest.mark.parametrize("flags", [0, EXCHANGE])
def test_the_kernel_does_not_keep_what_it_had_under_the_new_name(host: Host, guest: GrantingGuest, flags: int) -> None:
    there, here = prepared(host, guest, f"flags{flags}")
    if flags == EXCHANGE:
        (there / "new").write_text("new")
    renamed_meanwhile(guest, there, here, flags)
    assert (there / "new").read_text() == "other"
    for each in ("old", "new"):
        assert state(here / each) == state(there / each), each


def test_control_without_minding_recalled_names_it_does(host: Host, guest: GrantingGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest.grants, "may_be_moved", lambda name: True)
    there, here = prepared(host, guest, "control")
    renamed_meanwhile(guest, there, here, 0)
    assert state(here / "new") != state(there / "new")


def test_it_is_tried_again_once_and_then_done(host: Host, guest: GrantingGuest) -> None:
    """Names that were recalled long ago, and looked up since, are renamed at once."""
    there, here = prepared(host, guest, "again")
    (there / "old").unlink()
    (there / "old").write_text("new one")
    with HeldOperation(guest, Opcode.RENAME) as gate:
        gate.open()
        rename(here, 0)
    assert (there / "new").read_text() == "new one"
    assert state(here / "new") == state(there / "new")
    guest.grants.check()
