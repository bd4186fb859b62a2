"""`--table posix`: a table under a stable name, which survives its daemon."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from coherency.errors import TableError
from coherency.ids import HostInode
from coherency.shm_memory import create_posix, map_read_only
from coherency.shm_table import State, TableReader, TableWriter, bytes_needed

ROOT = Path(__file__).resolve().parents[2]
SIZE_BYTES = bytes_needed(8)
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture
def name() -> Iterator[str]:
    name = f"/coherency-test-{os.getpid()}"
    yield name
    file_of(name).unlink(missing_ok=True)


def file_of(name: str) -> Path:
    return Path("/dev/shm" + name)


def test_a_new_object_is_zero_readable_by_its_group_and_writable_by_nobody(name: str) -> None:
    memory = create_posix(name, SIZE_BYTES, gid=12345)
    status = file_of(name).stat()
    assert not memory.existed
    assert (status.st_mode & 0o7777, status.st_gid, status.st_size) == (0o440, 12345, SIZE_BYTES)
    assert memory.path == str(file_of(name))
    assert not any(memory.words)
    assert not os.get_inheritable(memory.fd)
    memory.check()
    memory.close()


def test_the_second_open_adopts(name: str) -> None:
    first = create_posix(name, SIZE_BYTES)
    writer = TableWriter.create(first.words, slot_count=8, table_id=(1, 2))
    writer.set_state(State.SERVING)
    fd = first.read_only_fd()
    reader = TableReader(map_read_only(fd, SIZE_BYTES).words)
    os.close(fd)
    stamp = reader.sample(HostInode(1))
    assert stamp is not None
    writer.begin(writer.slots_of([HostInode(1)]))
    first.close()  # and the process dies in the middle of that change

    second = create_posix(name, SIZE_BYTES)
    assert second.existed
    heir = TableWriter.adopt(second.words)
    heir.set_state(State.SERVING)
    assert (heir.table_id, heir.statistics().epoch) == ((1, 2), 2)
    assert not reader.valid(stamp)
    again = reader.sample(HostInode(1))
    assert again is not None, "the old mapping shows the new daemon's table"
    heir.bump([HostInode(1)])
    assert not reader.valid(again)
    second.check()
    second.close()


def test_an_object_of_another_size_is_replaced_and_its_readers_keep_the_old_one(name: str) -> None:
    old = create_posix(name, SIZE_BYTES)
    old.words[0] = 9
    new = create_posix(name, 2 * SIZE_BYTES)
    assert not new.existed
    assert not any(new.words)
    assert old.words[0] == 9
    old.unlink()  # must not remove the name, which is the new one's by now
    assert file_of(name).stat().st_size == 2 * SIZE_BYTES
    old.close()
    new.close()


@pytest.mark.parametrize("mode", [0o460, 0o602, 0o666])
def test_an_object_that_others_could_have_opened_for_writing_is_replaced(name: str, mode: int) -> None:
    planted = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=SIZE_BYTES)
    os.fchmod(planted.fd, mode)
    memory = create_posix(name, SIZE_BYTES)
    assert not memory.existed
    assert not os.path.sameopenfile(memory.fd, planted.fd)
    os.close(planted.fd)
    memory.close()


@needs_root
def test_an_object_of_another_user_is_replaced(name: str) -> None:
    planted = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600, size=SIZE_BYTES)
    os.fchown(planted.fd, NOBODY, NOBODY)
    memory = create_posix(name, SIZE_BYTES)
    assert not memory.existed
    assert file_of(name).stat().st_uid == 0
    os.close(planted.fd)
    memory.close()


AS_NOBODY = """
import json, os, sys
from coherency.shm_memory import create_posix
os.setgroups([]); os.setgid(65534); os.setuid(65534)
name, size_bytes = sys.argv[1], int(sys.argv[2])
try:
    existed = []
    for _ in range(3):
        memory = create_posix(name, size_bytes)
        existed.append(memory.existed)
        mode = os.fstat(memory.fd).st_mode & 0o7777
        memory.words[1] += 1
        memory.close()
    print(json.dumps({"existed": existed, "mode": mode, "word": create_posix(name, size_bytes).words[1]}))
except OSError as error:
    print(json.dumps({"refused": error.errno}))
"""


def run_as_nobody(name: str) -> object:
    command = [sys.executable, "-c", AS_NOBODY, name, str(SIZE_BYTES)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=60).stdout)


@needs_root
def test_a_daemon_without_root_takes_over_its_own_object_in_spite_of_the_mode(name: str) -> None:
    assert run_as_nobody(name) == {"existed": [False, True, True], "mode": 0o440, "word": 3}


@needs_root
def test_a_daemon_without_root_is_refused_the_name_of_another_user(name: str) -> None:
    memory = create_posix(name, SIZE_BYTES)
    memory.words[1] = 7
    outcome = run_as_nobody(name)
    assert outcome in ({"refused": 13}, {"refused": 1})  # EACCES or EPERM, as /dev/shm is sticky or not
    assert memory.words[1] == 7
    memory.unlink()
    memory.close()


def test_unlink_removes_the_name_and_may_be_called_twice(name: str) -> None:
    memory = create_posix(name, SIZE_BYTES)
    memory.unlink()
    memory.unlink()
    assert not file_of(name).exists()
    memory.words[0] = 1
    memory.close()


def test_a_reader_takes_a_posix_object_which_cannot_be_sealed(name: str) -> None:
    memory = create_posix(name, SIZE_BYTES)
    fd = os.open(memory.path, os.O_RDONLY)
    with pytest.raises(TableError, match="does not hold"):
        TableReader(map_read_only(fd, SIZE_BYTES).words)
    TableWriter.create(memory.words, slot_count=8, table_id=(1, 2))
    assert TableReader(map_read_only(fd, SIZE_BYTES).words).table_id == (1, 2)
    os.close(fd)
    memory.close()


def test_a_table_whose_formatting_was_interrupted_is_not_adopted(name: str) -> None:
    half = create_posix(name, SIZE_BYTES)
    half.words[1] = 1  # the first store of formatting; the magic never came
    half.close()
    memory = create_posix(name, SIZE_BYTES)
    assert memory.existed
    with pytest.raises(TableError, match="does not hold"):
        TableWriter.adopt(memory.words)
    memory.unlink()
    memory.close()
    fresh = create_posix(name, SIZE_BYTES)
    assert not fresh.existed
    TableWriter.create(fresh.words, slot_count=8, table_id=(1, 2))
    fresh.close()


@pytest.mark.parametrize("name", ["", "/", "coherency", "/a/b", "/..", "/a\0b"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        create_posix(name, SIZE_BYTES)
