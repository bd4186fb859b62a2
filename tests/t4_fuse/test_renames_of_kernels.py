"""A fact about kernels that the check of races allows for: a rename whose two names are the same file by the time it has looked."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.fuse import syscalls
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.session import Deferred, Reply
from tests.granting_guest import Gate, GrantingGuest, InBackground
from tests.guests import Host

_EXCHANGE = 2


@pytest.fixture(scope="module")
def guest(make_socket_dir: Callable[[], Path]) -> Iterator[tuple[Host, GrantingGuest]]:
    with Host(make_socket_dir()) as host, GrantingGuest(host) as guest:
        yield host, guest


def renamed(directory: Path, old: str, new: str, flags: int) -> None:
    syscalls.renameat2(
        syscalls.AT_FDCWD, os.fsencode(directory / old), syscalls.AT_FDCWD, os.fsencode(directory / new), flags
    )


@pytest.mark.parametrize("flags", [0, _EXCHANGE])
def test_a_kernel_that_finds_one_file_under_both_names_does_nothing(guest: tuple[Host, GrantingGuest], flags: int) -> None:
    host, here = guest
    old, new = f"old{flags}", f"new{flags}"
    (host.share / old).write_text("one")
    (host.share / new).write_text("two")
    gate = Gate()
    operations = here.session._operations
    look_up = operations[Opcode.LOOKUP]

    def late(request: Request) -> Reply | Deferred:
        if request.body.name == os.fsencode(new):
            gate.pass_through()
        return look_up(request)

    operations[Opcode.LOOKUP] = late
    gate.shut()
    rename = InBackground(renamed, here.path, old, new, flags)
    gate.await_reached()  # it has found the one name, and looks for the other
    renamed(host.export, old, new, flags)
    gate.open()
    rename.wait()  # "done"
    operations[Opcode.LOOKUP] = look_up
    assert (host.share / new).read_text() == "one", "exchanged once, not twice"
    assert (host.share / old).exists() == bool(flags)
