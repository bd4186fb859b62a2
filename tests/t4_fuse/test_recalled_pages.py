"""A read right after a change, on a descriptor that was open before: pages that are dropped in the background do not disturb it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.fuse.abi import Opcode
from coherency.guest_agent.pages import LEFT_ALONE_NS, RecalledPages
from coherency.ids import NodeId
from tests.granting_guest import GrantingGuest, HeldOperation, InBackground
from tests.guests import Host
from tests.waiting import until


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


class Hands:
    """A guest's pages are dropped by hand."""

    def __init__(self, guest: GrantingGuest) -> None:
        self.now_ns = self.dropped = 0
        self._kernel = guest.kernel
        guest.recalls._pages.close()
        guest.recalls._pages = RecalledPages(self, clock_ns=lambda: self.now_ns)

    def invalidate_inode(self, node: NodeId, offset: int = -1, length: int = 0) -> bool:
        done = self._kernel.invalidate_inode(node, offset, length)
        self.dropped += 1
        return done

    def drop(self) -> None:
        """Those of the one file that was recalled."""
        self.now_ns += LEFT_ALONE_NS
        until(lambda: self.dropped == 1)


@pytest.mark.parametrize("dropped_at", ["after", "meanwhile"])
def test_a_read_that_asks_for_the_size_gets_it(host: Host, dropped_at: str) -> None:
    """Negative control: if pages are dropped while the kernel asks, it throws the answer away, and the file seems to end where it did."""
    (host.export / dropped_at).write_text("file")
    with GrantingGuest(host, dropped_at) as guest, open(guest.path / dropped_at, "rb", buffering=0) as file:
        hands = Hands(guest)
        guest.warm(lambda: os.pread(file.fileno(), 99, 0))
        read: list[bytes] = []
        with HeldOperation(guest, Opcode.GETATTR) as gate:
            with open(host.export / dropped_at, "a") as there:
                there.write(" and more")
            reader = InBackground(lambda: read.append(os.pread(file.fileno(), 99, 0)))
            gate.await_reached()
            if dropped_at == "meanwhile":
                hands.drop()
        reader.wait()
        assert read == [b"file" if dropped_at == "meanwhile" else b"file and more"]
        if dropped_at == "after":
            hands.drop()
        assert os.pread(file.fileno(), 99, 0) == b"file and more"
