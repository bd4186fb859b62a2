"""Who is told a lie, and which: nobody but a helper, and nothing but what its job needs."""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from coherency.fuse import codec
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.guest_agent.helper_pool import HelperPool, _Job, _Name
from coherency.guest_agent.helper_processes import Helper
from coherency.guest_agent.keeper import file_handle_of
from coherency.ids import NodeId

HELPER, IDLE, SOMEBODY = 4711, 4712, 4713
DIRECTORY, CHILD = 5, 6


class Nothing:
    """A session without a mount."""

    connection = 0

    def duplicate_device(self) -> int:
        return os.open("/dev/null", os.O_RDONLY)

    def unanswered(self) -> Sequence[Request]:
        return [
            request(Opcode.CREATE, DIRECTORY, SOMEBODY, None, unique=1),
            request(Opcode.LOOKUP, DIRECTORY, SOMEBODY, codec.Name(b"n"), unique=2),
            request(Opcode.RENAME, 8, SOMEBODY, codec.Rename(NodeId(DIRECTORY), 0, b"a", b"b"), unique=3),
            request(Opcode.MKDIR, 8, SOMEBODY, None, unique=4),
        ]


def request(opcode: int, node: int, pid: int, body: Any, *, unique: int = 1) -> Request:
    return Request(unique, opcode, NodeId(node), 0, 0, pid, body)


@pytest.fixture
def pool() -> Iterator[HelperPool]:
    pool = HelperPool(Nothing(), "/", 4)
    for pid in (HELPER, IDLE):
        reading, writing = os.pipe()
        os.close(writing)
        pool._by_pid[pid] = Helper[_Job](pid, 0, reading)
    pool._by_pid[HELPER].job = _Job(_Name(NodeId(DIRECTORY), b"name"), 1, frozenset())
    yield pool
    for helper in pool._by_pid.values():
        helper.close()
    pool.close()


LOOKUP, GETATTR, STATX = Opcode.LOOKUP, Opcode.GETATTR, Opcode.STATX


@pytest.mark.parametrize(
    ("pid", "opcode", "node", "name", "expected"),
    [
        (HELPER, LOOKUP, DIRECTORY, b"name", errno.ENOENT),
        (HELPER, LOOKUP, DIRECTORY, b"other", None),
        (HELPER, LOOKUP, 7, b"name", None),
        (HELPER, GETATTR, CHILD, b"", errno.ESTALE),
        (HELPER, STATX, CHILD, b"", errno.ESTALE),
        (HELPER, GETATTR, DIRECTORY, b"", None),
        (HELPER, GETATTR, 1, b"", None),
        (HELPER, Opcode.READLINK, CHILD, b"", None),
        (HELPER, Opcode.UNLINK, DIRECTORY, b"name", None),
        (IDLE, LOOKUP, DIRECTORY, b"name", None),
        (IDLE, GETATTR, CHILD, b"", None),
        (SOMEBODY, LOOKUP, DIRECTORY, b"name", None),
        (SOMEBODY, GETATTR, CHILD, b"", None),
        (0, LOOKUP, DIRECTORY, b"name", None),  # from another pid namespace
    ],
)
def test_lies(pool: HelperPool, pid: int, opcode: int, node: int, name: bytes, expected: int | None) -> None:
    body = codec.Name(name) if name else codec.Getattr(0, 0)
    assert pool.lie(request(opcode, node, pid, body)) == expected


def test_helpers_are_known_by_their_process(pool: HelperPool) -> None:
    assert pool.is_helper(HELPER)
    assert pool.is_helper(IDLE)
    assert not pool.is_helper(SOMEBODY)
    pool._strike_off(IDLE)
    assert not pool.is_helper(IDLE)


def test_who_holds_the_lock_of_a_directory(pool: HelperPool) -> None:
    assert pool._holders(NodeId(DIRECTORY)) == {1, 3}
    assert pool._holders(NodeId(8)) == {3, 4}
    assert pool._holders(NodeId(9)) == frozenset()


def test_the_highest_node_only_rises(pool: HelperPool) -> None:
    for node, highest in ((5, 5), (3, 5), (1 << 40, 1 << 40), (5, 1 << 40)):
        pool.granted_up_to(NodeId(node))
        assert pool._words[0] == highest


def test_nothing_is_dropped_without_processes(pool: HelperPool) -> None:
    assert not pool.drop([(NodeId(DIRECTORY), b"name", NodeId(CHILD))], 0.01)
    assert pool.drop([], 0.01)
    assert pool.statistics().failed == 1


def test_file_handles_have_the_kernels_layout() -> None:
    """See ``fuse_encode_fh``; the mounted tests open them."""
    assert file_handle_of(0x1_0000_0002).hex() == "0c00000081000000010000000200000000000000"
