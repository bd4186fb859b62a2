"""A guest in a process of its own: receives descriptors over a Unix socket, and does what its first argument says.

Run as `python -m tests.t3_process.table_child TASK SOCKET_FD`; prints one JSON object.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from coherency import shm_abi
from coherency.errors import TableError
from coherency.ids import HostInode
from coherency.shm_memory import map_read_only
from coherency.shm_table import TableReader

INODE = HostInode(1)
TRUTH_WORD = 0
LOOPS = 300_000
ENOUGH = 1000

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def map_writable(fd: int) -> None:
    memory = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    memory[:8] = b"attacked"


def make_mapping_writable(fd: int) -> None:
    memory = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    checked(libc.mprotect(address_of(memory), 4096, mmap.PROT_READ | mmap.PROT_WRITE))


def punch_hole(fd: int) -> None:
    checked(libc.fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, 4096))


def remove_pages(fd: int) -> None:
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ).madvise(mmap.MADV_REMOVE)


def write_through_proc_mem(fd: int) -> None:
    memory = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    with Path("/proc/self/mem").open("r+b", buffering=0) as own:
        own.seek(address_of(memory))
        own.write(b"attacked")


def address_of(memory: mmap.mmap) -> int:
    return shm_abi._address_of(memoryview(memory))


ATTACKS: dict[str, Callable[[int], object]] = {
    "map writable": map_writable,
    "make mapping writable": make_mapping_writable,
    "write": lambda fd: os.pwrite(fd, b"attacked", 0),
    "shrink": lambda fd: os.ftruncate(fd, 4096),
    "shrink to nothing": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 2**26),
    "truncate by opening": lambda fd: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)),
    "punch hole": punch_hole,
    "remove pages": remove_pages,
    "write through /proc/self/mem": write_through_proc_mem,
    "add seals": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}


def attack(fd: int, names: Iterable[str] = ATTACKS) -> dict[str, str]:
    """Try all this with a descriptor; answer with the errno's name, or "succeeded", for each attempt."""
    outcome = {}
    for name in names:
        try:
            ATTACKS[name](fd)
        except OSError as error:
            outcome[name] = errno.errorcode[error.errno or 0]
        else:
            outcome[name] = "succeeded"
    return outcome


def attack_twice(fds: list[int], names: Iterable[str] = ATTACKS) -> dict[str, Any]:
    """Attack with the descriptor as it was given, and with one opened for writing by way of /proc."""
    fd = fds[0]
    reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    return {"given": attack(fd, names), "reopened": attack(reopened, names)}


def rounds(enough: Callable[[], bool]) -> Iterator[int]:
    """Yield at least `LOOPS` times, and on until it is enough or a minute is over: what was not seen by then is not there."""
    deadline_s = time.monotonic() + 60
    while True:
        yield from range(LOOPS)
        if enough() or time.monotonic() > deadline_s:
            return


def watch_whole(fds: list[int]) -> dict[str, int]:
    """Load one word many times; count values whose halves differ."""
    words = map_read_only(fds[0], None).words
    seen: set[int] = set()
    for _ in rounds(lambda: len(seen) > ENOUGH):
        seen.add(words[512])
    return {"torn": sum(value >> 32 != value & 0xFFFFFFFF for value in seen), "values": len(seen)}


def watch_halves(fds: list[int]) -> dict[str, int]:
    """The same with two loads of four bytes."""
    halves = map_read_only(fds[0], None).words.cast("B").cast("I")
    torn: set[tuple[int, int]] = set()
    for _ in rounds(lambda: bool(torn)):
        pair = halves[1024], halves[1025]
        if pair[0] != pair[1]:
            torn.add(pair)
    return {"torn": len(torn)}


def cache(fds: list[int], *, sample_first: bool) -> dict[str, int]:
    """Cache the truth by the reader's rules, and count the uses of a value older than the truth was before the use.

    Goes on until enough was hit and missed or, without sampling first, until something stale was used.
    """
    reader = TableReader(map_read_only(fds[0], None).words)
    truth = map_read_only(fds[1], None).words
    count = {"hits": 0, "misses": 0, "stale": 0}
    value, stamp = -1, None
    for _ in rounds(lambda: min(count["hits"], count["misses"]) > ENOUGH if sample_first else count["stale"] > 0):
        at_least = truth[TRUTH_WORD]
        if stamp is not None and reader.valid(stamp):
            count["hits"] += 1
            count["stale"] += value < at_least
        else:
            count["misses"] += 1
            sampled = reader.sample(INODE)
            value = truth[TRUTH_WORD]
            stamp = sampled if sample_first else reader.sample(INODE)
    reader.check()
    return count


def open_table(fds: list[int]) -> dict[str, str]:
    try:
        reader = TableReader(map_read_only(fds[0], None).words)
    except TableError as error:
        return {"refused": str(error)}
    return {"state": reader.state.name, "readonly": str(reader.words.readonly)}


TASKS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "attack": attack_twice,
    "attack by writing": lambda fds: attack_twice(fds, ["write", "map writable"]),
    "watch whole": watch_whole,
    "watch halves": watch_halves,
    "cache": lambda fds: cache(fds, sample_first=True),
    "cache, sampling last": lambda fds: cache(fds, sample_first=False),
    "open": open_table,
}


def main() -> None:
    task, socket_fd = sys.argv[1:]
    with socket.socket(fileno=int(socket_fd)) as channel:
        _, fds, _, _ = socket.recv_fds(channel, 1, 4)
    print(json.dumps(TASKS[task](fds)))  # noqa: T201


if __name__ == "__main__":
    main()
