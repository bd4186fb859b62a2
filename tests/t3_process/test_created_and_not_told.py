"""A new inode is bumped also if the export fails to tell the kernel of it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.fuse import codec
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.nodes import NodeStore
from coherency.ids import HostInode, NodeId
from coherency.shm_table import State, TableReader, TableWriter, bytes_needed

pytestmark = pytest.mark.needs_fuse  # needs root, like every daemon
SLOTS = 2**16


@pytest.fixture
def table() -> TableWriter:
    words = memoryview(bytearray(bytes_needed(SLOTS))).cast("Q")
    writer = TableWriter.create(words, slot_count=SLOTS, table_id=(1, 2))
    writer.set_state(State.SERVING)
    return writer


@pytest.fixture
def export(tmp_path: Path, table: TableWriter) -> Iterator[Export]:
    export = Export(os.open(tmp_path, os.O_RDONLY), Changes(table), descriptor_limit=100)
    yield export
    export.close()


@pytest.mark.parametrize(
    ("opcode", "body"),
    [(Opcode.MKDIR, codec.Mkdir(b"new", 0o755, 0)), (Opcode.CREATE, codec.Create(b"new", os.O_WRONLY, 0o644, 0, 0))],
)
def test_it_is_bumped(
    opcode: Opcode, body: Any, export: Export, table: TableWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(store: NodeStore, fd: int, *_: Any) -> Any:
        os.close(fd)
        raise OSError(errno.EMFILE, "no descriptor left")

    monkeypatch.setattr(NodeStore, "adopt", no_descriptor)
    request = Request(1, opcode, NodeId(1), os.geteuid(), os.getegid(), os.getpid(), body)
    with pytest.raises(OSError, match="no descriptor left"):
        export.operations[opcode](request)
    ino = HostInode((tmp_path / "new").stat().st_ino)
    stamp = TableReader(table.words).sample(ino)
    assert stamp is not None
    assert stamp.version == 2
    table.check()
