"""An export at which requests are handed in by hand: no mount, no kernel, a table in a bytearray.

A desk belongs to one thread, made for it by `apart`: serving changes the ids, the umask and the securebits of a thread.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.fuse import abi, codec
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.fuse.codec import Request
from coherency.fuse.session import Reply
from coherency.ids import HostInode, NodeId, SlotIndex
from coherency.shm_table import TableWriter, bytes_needed

T = TypeVar("T")
Inodes: TypeAlias = frozenset[HostInode]
SLOT_COUNT = 1 << 10
ROOT_NODE = NodeId(ROOT_ID)
_INO_IN_ENTRY = abi.entry_out.size
"""Where `attr.ino` lies in the reply to a request that makes something."""


class Asked(NamedTuple):
    """What became of one request."""

    reply: Reply
    error: int
    """errno, or 0."""
    begun: Inodes | None
    """Whose words were odd before the first system call; None if no change was begun."""
    applied: Inodes | None
    """Whose words were odd after the last system call."""
    moved: Inodes
    """Whose words have other values than before."""

    @property
    def new_inode(self) -> HostInode:
        """The inode that the reply makes known."""
        return HostInode(int.from_bytes(self.reply[0][_INO_IN_ENTRY : _INO_IN_ENTRY + 8], "little"))


def node_in(reply: Reply) -> NodeId:
    """The node in the reply to a LOOKUP, or to a request that makes something."""
    return NodeId(int.from_bytes(reply[0][:8], "little"))


class OneSlotEach(TableWriter):
    """A table in which no two inodes share a slot, so that the words tell which inodes were bumped."""

    inodes: list[HostInode]
    """By slot."""
    deaf_to: Callable[[HostInode], bool] | None = None
    """For negative controls: inodes that are left out of every change."""

    def slots_of(self, inodes: Iterable[HostInode]) -> tuple[SlotIndex, ...]:
        heard = {ino for ino in inodes if self.deaf_to is None or not self.deaf_to(ino)}
        self.inodes += heard - set(self.inodes)
        return tuple(sorted(SlotIndex(self.inodes.index(ino)) for ino in heard))

    def versions(self) -> dict[HostInode, int]:
        return dict(zip(self.inodes, self._slots, strict=False))


class Desk:
    """See the module. Without `bumps` nothing is ever bumped: a negative control."""

    def __init__(self, root: Path, *, bumps: bool = True) -> None:
        self.root = root
        words = memoryview(bytearray(bytes_needed(SLOT_COUNT))).cast("Q")
        table = OneSlotEach.create(words, slot_count=SLOT_COUNT, table_id=(1, 2))
        assert isinstance(table, OneSlotEach)
        table.inodes = []
        self.table = table
        self.changes = Changes(self.table, bumps=bumps)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.export = Export(descriptor, self.changes, descriptor_limit=100)
        self._operations = cast("Mapping[int, Callable[[Request], Reply]]", self.export.operations)
        self._unique = iter(range(2, 1 << 20, 2)).__next__

    def close(self) -> None:
        self.export.close()
        self.table.check()

    # ---- what rows are made of ----

    def request(self, opcode: Opcode, path: str, body: Any, *, uid: int = 0) -> Request:
        """A request about the node at `path`."""
        return Request(self._unique(), opcode, self.node(path), uid, uid, os.getpid(), body)

    def node(self, path: str) -> NodeId:
        """The node at `path`, by LOOKUPs."""
        node = ROOT_NODE
        for name in path.split("/"):
            if name != ".":
                body = codec.Name(name.encode())
                request = Request(self._unique(), Opcode.LOOKUP, node, 0, 0, os.getpid(), body)
                node = node_in(self._operations[Opcode.LOOKUP](request))
        return node

    def open(self, path: str, flags: int = os.O_RDWR, *, opcode: Opcode = Opcode.OPEN) -> int:
        """A file handle."""
        reply = self._operations[opcode](self.request(opcode, path, codec.Open(flags, 0)))
        return int.from_bytes(reply[-1][:8], "little")

    def ino(self, path: str) -> HostInode:
        return HostInode(os.lstat(self.root / path).st_ino)

    # ---- asking ----

    def ask(self, request: Request, during: Callable[[], AbstractContextManager[Any]] | None = None) -> Asked:
        """Hand in `request`. `during()` is entered when its change has begun and left before it ends."""
        odd: dict[str, Inodes] = {}
        inside = contextlib.ExitStack()

        def reach(point: str) -> None:
            assert point not in odd, f"{request} is two changes"
            odd[point] = frozenset(ino for ino, version in self.table.versions().items() if version & 1)
            if point == "begun" and during is not None:
                inside.enter_context(during())
            if point == "applied":
                inside.close()

        before = self.table.versions()
        self.changes.reach = reach
        reply: Reply = ()
        error = 0
        try:
            reply = self._operations[request.opcode](request)
        except OSError as raised:
            error = raised.errno or -1
        finally:
            inside.close()
            self.changes.reach = lambda point: None
        moved = set()
        for ino, version in self.table.versions().items():
            assert not version & 1, "a change was not ended"
            assert version >= before.get(ino, 0), "a version went back"
            if version > before.get(ino, 0):
                moved.add(ino)
        self.table.check()
        assert self.table.statistics().changes_in_flight == 0
        return Asked(reply, error, odd.get("begun"), odd.get("applied"), frozenset(moved))


def apart(work: Callable[[], T]) -> T:
    """Do `work` in a thread that ends afterwards."""
    with ThreadPoolExecutor(1, "desk") as pool:
        return pool.submit(work).result()


@contextlib.contextmanager
def desk_at(root: Path, **options: Any) -> Iterator[Desk]:
    desk = Desk(root, **options)
    try:
        yield desk
    finally:
        desk.close()
