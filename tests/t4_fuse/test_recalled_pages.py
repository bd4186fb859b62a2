"""Who looks right after a change is shown it: nothing of the recall meets the question that the kernel asks for that.

The kernel throws an answer away if it is told meanwhile to forget something of the inode, and goes on with what it had.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.fuse.abi import Opcode
from coherency.guest_agent import pages
from coherency.ids import HostInode
from tests.granting_guest import GrantingGuest, HeldOperation, InBackground
from tests.guests import Host
from tests.waiting import until


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


@pytest.fixture(scope="module")
def guest(host: Host) -> Iterator[GrantingGuest]:
    with GrantingGuest(host) as guest:
        yield guest


@pytest.mark.parametrize("told", ["before the change returns", "while it asks"])
def test_a_read_that_asks_for_the_size_gets_it(guest: GrantingGuest, host: Host, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """Negative control: if the kernel is told while it asks, the file seems to end where it did."""
    monkeypatch.setattr(pages, "PATIENCE_S", 20)
    (host.export / told).write_text("file")
    read: list[bytes] = []
    with open(guest.path / told, "rb", buffering=0) as file:
        node = guest.fs.nodes.known(HostInode(os.fstat(file.fileno()).st_ino))
        assert node is not None
        guest.warm(lambda: os.pread(file.fileno(), 99, 0))
        with HeldOperation(guest, Opcode.GETATTR) as gate:
            before = guest.kernel.page_drops
            with open(host.export / told, "a") as there:
                there.write(" and more")
            assert guest.kernel.page_drops == before + 1
            reader = InBackground(lambda: read.append(os.pread(file.fileno(), 99, 0)))
            gate.await_reached()
            if told == "while it asks":
                guest.session.invalidate_inode(node.id, 0, 0)
        reader.wait()
        assert read == [b"file" if told == "while it asks" else b"file and more"]
        assert os.pread(file.fileno(), 99, 0) == b"file and more"
    assert guest.kernel.page_drops == before + 1


def test_what_is_not_open_has_no_pages_to_drop(guest: GrantingGuest, host: Host) -> None:
    (host.export / "closed").write_text("file")
    assert (guest.path / "closed").read_text() == "file"
    guest.warm(lambda: os.stat(guest.path / "closed"))
    until(lambda: not guest.fs._open_counts)  # the kernel tells some time after it was closed
    before = guest.kernel.page_drops
    (host.export / "closed").write_text("other")
    assert (guest.path / "closed").read_text() == "other"
    assert guest.kernel.page_drops == before
