"""`examples/read_table.py`, the foreign reader, against real tables: it was written from the specification alone."""

import ast
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.ids import HostInode
from coherency.shm_memory import OwnedMemory, create_memfd, create_posix
from coherency.shm_table import DEFAULT_SLOT_COUNT, State, TableReader, TableWriter, bytes_needed

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read_table.py"
INODES = [HostInode(n) for n in (0, 1, 42, 2**40 + 7, 2**64 - 1)]
TABLE_ID = (0x0123456789ABCDEF, 0xFEDCBA9876543210)


@pytest.fixture
def memory() -> Iterator[OwnedMemory]:
    memory = create_memfd("coherency-test", bytes_needed(DEFAULT_SLOT_COUNT))
    yield memory
    memory.close()


@pytest.fixture
def writer(memory: OwnedMemory) -> TableWriter:
    writer = TableWriter.create(memory.words, slot_count=DEFAULT_SLOT_COUNT, table_id=TABLE_ID)
    writer.set_state(State.SERVING)
    return writer


def run_example(*arguments: str | int | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-I", str(EXAMPLE), *map(str, arguments)]  # -I: not even by accident from this checkout
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def read_json(*arguments: str | int | Path) -> dict[str, Any]:
    done = run_example(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return dict(json.loads(done.stdout))


def test_the_example_uses_the_standard_library_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_it_sees_what_the_package_sees(memory: OwnedMemory, writer: TableWriter) -> None:
    writer.bump(INODES[:3])
    writer.bump(INODES[1:2])
    writer.advance_epoch()
    writer.beat()
    in_flight = writer.slots_of(INODES[2:3])
    writer.begin(in_flight)
    reader = TableReader(memory.words)

    found = read_json(memory.path, *INODES)
    versions = [(entry["inode"], entry["version"], entry["settled"]) for entry in found.pop("inodes")]
    assert found == {
        "table_id": "0123456789abcdeffedcba9876543210",
        "abi_version": 1,
        "header_bytes": 704,
        "table_bytes": 16 * 2**20,
        "slot_count": 2**20,
        "slots_offset": 4096,
        "hash_id": 1,
        "epoch": 2,
        "state": "serving",
        "heartbeat": 1,
    }
    assert versions == [
        (0, 2, True),
        (1, 4, True),
        (42, 3, False),
        (INODES[3], 0, True),
        (INODES[4], 0, True),
    ]
    assert [version for _, version, _ in versions] == [memory.words[reader.word_of(inode)] for inode in INODES]
    writer.end(in_flight)


def test_it_prints_for_people_too(memory: OwnedMemory, writer: TableWriter) -> None:
    writer.begin(writer.slots_of([HostInode(42)]))
    done = run_example(memory.path, 42, "0x1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0123456789abcdeffedcba9876543210" in done.stdout
    assert "state      serving" in done.stdout
    assert "version 1 (in flight)" in done.stdout
    assert "inode 1: slot 154817, version 0 (settled)" in done.stdout


def test_it_reads_a_posix_table() -> None:
    memory = create_posix(f"/coherency-example-{os.getpid()}", bytes_needed(8))
    try:
        TableWriter.create(memory.words, slot_count=8, table_id=TABLE_ID)
        assert read_json(memory.path)["state"] == "closed"
    finally:
        memory.unlink()
        memory.close()


def test_it_watches_changes_as_they_come(memory: OwnedMemory, writer: TableWriter) -> None:
    command = [sys.executable, "-I", str(EXAMPLE), memory.path, "42", "--json", "--watch", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as example:
        assert example.stdout is not None
        lines = example.stdout

        def next_change(*, beating: bool = True) -> tuple[str, object, object]:
            while beating and not select.select([lines], [], [], 0.05)[0]:
                writer.beat()
            change = json.loads(lines.readline())
            return change["what"], change["old"], change["new"]

        assert json.loads(lines.readline())["inodes"][0]["version"] == 0
        # What happens before it begins to watch is no change to it: the heartbeat tells when it has begun.
        assert next_change() == ("trusted", False, True)
        slots = writer.slots_of([HostInode(42)])
        writer.begin(slots)
        assert next_change() == ("version of inode 42", 0, 1)
        writer.end(slots)
        assert next_change() == ("version of inode 42", 1, 2)
        writer.advance_epoch()
        assert next_change() == ("epoch", 1, 2)
        writer.set_state(State.CLOSED)
        assert next_change() == ("state", "serving", "closed")
        assert next_change(beating=False) == ("trusted", True, False)
        example.send_signal(signal.SIGINT)
    assert example.returncode == 130


def test_watching_ends_by_itself(memory: OwnedMemory, writer: TableWriter) -> None:
    done = run_example(memory.path, "--watch", "0.1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [
        (0, 1, "magic"),
        (1, 2, "ABI version 2"),
        (2, 512, "contradicts itself"),
        (3, 2**30, "should have"),
        (6, 12, "slot count is 12"),
        (6, 2**21, "do not fit"),
        (7, 64, "contradicts itself"),
        (8, 3, "hash 3"),
    ],
)
def test_it_refuses_what_the_package_refuses(
    memory: OwnedMemory, writer: TableWriter, word: int, value: int, reason: str
) -> None:
    memory.words[word] = value
    done = run_example(memory.path)
    assert (done.returncode, done.stdout) == (1, "")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_refuses_what_is_no_memory(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"COHTABLE")
    for path, reason in ((short, "only 8 bytes"), (tmp_path / "missing", "No such file")):
        done = run_example(path)
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1


def test_it_refuses_a_memfd_that_could_shrink(writer: TableWriter) -> None:
    fd = os.memfd_create("coherency-test", os.MFD_ALLOW_SEALING)
    os.write(fd, writer.words[:1024].tobytes())
    done = run_example(f"/proc/{os.getpid()}/fd/{fd}")
    os.close(fd)
    assert done.returncode == 1
    assert "could shrink" in done.stderr


@pytest.mark.parametrize("inode", ["-1", "x", str(2**64)])
def test_impossible_inodes_are_a_usage_error(memory: OwnedMemory, writer: TableWriter, inode: str) -> None:
    assert run_example(memory.path, "--", inode).returncode == 2
