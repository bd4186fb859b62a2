"""The table in a real sealed memfd, between two processes: what a guest can and cannot do with its descriptor."""

import errno
import fcntl
import gc
import itertools
import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.errors import TableError, UnsupportedPlatform
from coherency.shm_memory import OwnedMemory, create_memfd, map_read_only
from coherency.shm_table import DEFAULT_SLOT_COUNT, State, TableReader, TableWriter, bytes_needed
from tests.t3_process import table_child
from tests.t3_process.table_child import ATTACKS, ENOUGH, INODE, TRUTH_WORD

ROOT = Path(__file__).resolve().parents[2]
SIZE_BYTES = bytes_needed(1024)


@pytest.fixture
def memory() -> Iterator[OwnedMemory]:
    memory = create_memfd("coherency-test", SIZE_BYTES)
    yield memory
    memory.close()


def run_child(task: str, *fds: int, meanwhile: Callable[[], None] | None = None) -> dict[str, Any]:
    """Give the descriptors to a new process by SCM_RIGHTS, let it do its task, and return what it prints."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", table_child.__name__, task, str(theirs.fileno())]
        child = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
        socket.send_fds(ours, [b"x"], fds)
    with child:
        while meanwhile is not None and child.poll() is None:
            meanwhile()
        output, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return dict(json.loads(output))


# --- what the seals keep out --------------------------------------------------------------------------------------


def test_a_guest_can_map_read_only_and_nothing_else(memory: OwnedMemory) -> None:
    TableWriter.create(memory.words, slot_count=1024, table_id=(1, 2)).set_state(State.SERVING)
    before = memory.words.tobytes()
    fd = memory.read_only_fd()
    assert run_child("open", fd) == {"state": "SERVING", "readonly": "True"}
    outcome = run_child("attack", fd)
    os.close(fd)
    for how in ("given", "reopened"):
        assert outcome[how].keys() == ATTACKS.keys()
        assert "succeeded" not in outcome[how].values(), outcome[how]
    assert memory.words.tobytes() == before
    memory.check()


def test_the_owner_cannot_either_once_it_is_sealed(memory: OwnedMemory) -> None:
    memory.words[0] = 7
    outcome = table_child.attack(memory.fd)
    assert outcome.keys() == ATTACKS.keys()
    assert "succeeded" not in outcome.values(), outcome
    assert memory.words[0] == 7
    memory.words[0] = 8  # by the mapping from before the sealing, the one way in
    assert map_read_only(memory.fd, SIZE_BYTES).words[0] == 8


def test_a_descriptor_that_outlives_its_owner_cannot_be_adopted(memory: OwnedMemory) -> None:
    """Why `--table memfd` starts with a new table after a crash: nobody can ever map this one writable again."""
    TableWriter.create(memory.words, slot_count=1024, table_id=(1, 2))
    kept = os.dup(memory.fd)
    memory.close()
    with pytest.raises(PermissionError):
        mmap.mmap(kept, SIZE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(TableError, match="read-only"):
        TableWriter.adopt(map_read_only(kept, SIZE_BYTES).words)
    os.close(kept)


def unsealed_memfd() -> int:
    fd = os.memfd_create("coherency-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE_BYTES)
    return fd


def test_unsealed_memfd_can_be_written_through_proc() -> None:
    """Control: without seals a read-only descriptor protects nothing."""
    fd = unsealed_memfd()
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    outcome = run_child("attack by writing", read_only)
    assert outcome == {
        "given": {"write": "EBADF", "map writable": "EACCES"},
        "reopened": {"write": "succeeded", "map writable": "succeeded"},
    }
    assert os.pread(fd, 8, 0) == b"attacked"
    os.close(read_only)
    os.close(fd)


# --- what a reader refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])
def test_a_memfd_that_could_shrink_is_refused(seals: int) -> None:
    fd = unsealed_memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(TableError, match="could shrink"):
        map_read_only(fd, SIZE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    map_read_only(fd, SIZE_BYTES).close()
    os.close(fd)


def test_another_size_is_refused(memory: OwnedMemory) -> None:
    for size_bytes in (SIZE_BYTES - 4096, SIZE_BYTES + 4096, 0):
        with pytest.raises(TableError, match=f"instead of {size_bytes}"):
            map_read_only(memory.fd, size_bytes)
    assert map_read_only(memory.fd, None).size_bytes == SIZE_BYTES


def test_what_is_no_memory_is_refused(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    for fd in (reading, writing):
        with pytest.raises(TableError, match="whole number of pages"):
            map_read_only(fd, None)
        os.close(fd)
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(5000))
    with odd.open("rb") as file, pytest.raises(TableError, match="whole number of pages"):
        map_read_only(file.fileno(), None)
    odd.write_bytes(bytes(4096))
    with odd.open("ab") as file, pytest.raises(TableError, match="cannot be mapped"):
        map_read_only(file.fileno(), None)


def test_memory_without_a_table_is_refused_by_the_guest(memory: OwnedMemory) -> None:
    assert "does not hold a version table" in run_child("open", memory.fd)["refused"]


# --- life of the objects ------------------------------------------------------------------------------------------


def test_the_default_table_takes_hardly_any_memory_until_it_is_used() -> None:
    memory = create_memfd("coherency-test", bytes_needed(DEFAULT_SLOT_COUNT))
    writer = TableWriter.create(memory.words, slot_count=DEFAULT_SLOT_COUNT, table_id=(1, 2))
    writer.bump([INODE])
    used = memory.statistics()
    assert used.size_bytes == 16 * 2**20
    assert 0 < used.allocated_bytes < 2**20
    memory.close()


def test_read_only_descriptors_are_close_on_exec_and_read_only(memory: OwnedMemory) -> None:
    fd = memory.read_only_fd()
    assert not os.get_inheritable(fd)
    assert not os.get_inheritable(memory.fd)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.close(fd)


def test_the_path_of_a_memfd_opens_it(memory: OwnedMemory) -> None:
    """As QEMU does, by way of the runtime directory's `table` link."""
    memory.words[3] = 5
    fd = os.open(memory.path, os.O_RDONLY)
    assert map_read_only(fd, SIZE_BYTES).words[3] == 5
    os.close(fd)


def test_readers_keep_the_memory_when_the_owner_closes_it() -> None:
    memory = create_memfd("coherency-test", SIZE_BYTES)
    TableWriter.create(memory.words, slot_count=1024, table_id=(1, 2))
    mapped = map_read_only(memory.fd, SIZE_BYTES)
    memory.close()
    memory.close()
    assert TableReader(mapped.words).table_id == (1, 2)
    mapped.close()
    mapped.close()
    with pytest.raises(ValueError, match="released"):
        mapped.words[0]


def test_a_view_still_in_use_keeps_the_mapping_and_closing_does_not_fail(memory: OwnedMemory) -> None:
    mapped = map_read_only(memory.fd, SIZE_BYTES)
    slots = mapped.words[512:]
    memory.words[512] = 6
    mapped.close()
    assert slots[0] == 6


def test_no_descriptor_is_left_behind() -> None:
    def descriptors() -> set[str]:
        gc.collect()
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    memory = create_memfd("coherency-test", SIZE_BYTES)
    map_read_only(memory.fd, SIZE_BYTES).close()
    map_read_only(memory.fd, SIZE_BYTES)  # dropped without closing
    with pytest.raises(TableError):
        map_read_only(memory.fd, 4096)
    memory.close()
    assert descriptors() == before


def test_a_kernel_that_cannot_seal_is_refused_and_nothing_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr("coherency.shm_memory.TABLE_SEALS", 0x4000)
        with pytest.raises(UnsupportedPlatform, match="cannot seal"):
            create_memfd("coherency-test", SIZE_BYTES)
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_kernels_before_6_3_do_not_know_noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.memfd_create

    def old_kernel(name: str, flags: int) -> int:
        if flags & 0x8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags)

    monkeypatch.setattr("os.memfd_create", old_kernel)
    memory = create_memfd("coherency-test", SIZE_BYTES)
    memory.check()
    memory.close()


# --- two processes at the same time -------------------------------------------------------------------------------


def count_up(memory: OwnedMemory) -> Callable[[], None]:
    """Return a function that stores a thousand values into word 512, whose two halves are always equal."""
    numbers = itertools.count(1)
    words = memory.words

    def store() -> None:
        for number in itertools.islice(numbers, 1000):
            words[512] = number << 32 | number

    return store


def test_no_word_is_torn(memory: OwnedMemory) -> None:
    result = run_child("watch whole", memory.fd, meanwhile=count_up(memory))
    assert result["values"] > ENOUGH, "the two processes did not run at the same time"
    assert result["torn"] == 0


def test_two_half_loads_tear(memory: OwnedMemory) -> None:
    """Control: the same two processes, loading half words."""
    result = run_child("watch halves", memory.fd, meanwhile=count_up(memory))
    assert result["torn"] > 0


@pytest.fixture
def truth() -> Iterator[OwnedMemory]:
    truth = create_memfd("coherency-test", 4096)
    yield truth
    truth.close()


def change_by_the_rules(memory: OwnedMemory, truth: OwnedMemory) -> Callable[[], None]:
    """Return a function that makes fifty changes of the truth, each announced in the table."""
    writer = TableWriter.create(memory.words, slot_count=1024, table_id=(1, 2))
    writer.set_state(State.SERVING)
    slots = writer.slots_of([INODE])

    def change() -> None:
        for _ in range(50):
            writer.begin(slots)
            truth.words[TRUTH_WORD] += 1
            writer.end(slots)
        writer.check()

    return change


def test_a_value_used_is_never_older_than_the_truth(memory: OwnedMemory, truth: OwnedMemory) -> None:
    result = run_child("cache", memory.fd, truth.fd, meanwhile=change_by_the_rules(memory, truth))
    assert min(result["hits"], result["misses"]) > ENOUGH, "the two processes did not run at the same time"
    assert result["stale"] == 0


def test_sampling_last_gives_stale_values_between_processes(memory: OwnedMemory, truth: OwnedMemory) -> None:
    """Control: the same two processes; the reader samples after it has fetched."""
    result = run_child("cache, sampling last", memory.fd, truth.fd, meanwhile=change_by_the_rules(memory, truth))
    assert result["stale"] > 0
