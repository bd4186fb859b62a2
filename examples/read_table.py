#!/usr/bin/env python3
"""Read a coherency version table, knowing only `docs/spec/table.md`.

    read_table.py TABLE [INODE ...] [--json] [--watch SECONDS]

TABLE is what holds the table: the `table` link of a daemon's runtime directory, /proc/PID/fd/N of a process that has
it open, /dev/shm/NAME, or resource2 of an ivshmem PCI device.  Prints the header and the versions of the given inode numbers;
with --watch, also what changes during so many seconds.  Needs no rights but to open TABLE for reading.

This file does not use the package on purpose: it shows what a guest in another language has to do.  The rules it
quotes (R1, T3 ...) are those of the specification.
"""

import argparse
import fcntl
import json
import mmap
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

MAGIC = 0x454C424154484F43
FIELDS = {  # offsets of the words, in bytes
    "magic": 0,
    "abi_version": 8,
    "header_bytes": 16,
    "table_bytes": 24,
    "table_id_high": 32,
    "table_id_low": 40,
    "slot_count": 48,
    "slots_offset": 56,
    "hash_id": 64,
    "epoch": 512,
    "state": 576,
    "heartbeat": 640,
}
KNOWN_HEADER_BYTES = 704
STATES = {0: "closed", 1: "serving"}
TRUST_NS = 1_000_000_000
LOOK_EVERY_S = 0.02
U64 = 2**64 - 1


class NoTable(Exception):
    """What was named on the command line is not a table that this program can read."""


def map_words(path: str) -> memoryview:
    """Map the file read-only, as a row of 64-bit words."""
    if platform.machine() != "x86_64":
        raise NoTable("ABI 1 is defined for x86-64 only")
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(fd).st_size
        if size_bytes < 4096:
            raise NoTable(f"it has only {size_bytes} bytes")
        is_memfd = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
        if is_memfd and not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise NoTable("it is a memfd that could shrink while it is read")
        return memoryview(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
    finally:
        os.close(fd)


def splitmix64(x: int) -> int:
    """The hash that finds the slot of an inode."""
    x = (x + 0x9E3779B97F4A7C15) & U64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & U64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & U64
    return x ^ (x >> 31)


class Table:
    """A table whose header is sound."""

    def __init__(self, words: memoryview) -> None:
        """Check what R1 says, in its order."""
        self.words = words
        if self.field("magic") != MAGIC:
            raise NoTable("it does not start with the magic of a version table")
        if self.field("abi_version") != 1:
            raise NoTable(f"it has ABI version {self.field('abi_version')}, and this program knows only 1")
        if self.field("hash_id") != 1:
            raise NoTable(f"it uses hash {self.field('hash_id')}, and this program knows only 1")
        if self.field("table_bytes") > words.nbytes:
            raise NoTable(f"it should have {self.field('table_bytes')} bytes, and has {words.nbytes}")
        header_bytes, slots_offset = self.field("header_bytes"), self.field("slots_offset")
        if header_bytes < KNOWN_HEADER_BYTES or slots_offset < header_bytes or slots_offset % 64:
            raise NoTable("its header contradicts itself")
        slot_count = self.field("slot_count")
        if not 1 <= slot_count <= 2**28 or slot_count & (slot_count - 1):
            raise NoTable(f"its slot count is {slot_count}")
        if slots_offset + 8 * slot_count > self.field("table_bytes"):
            raise NoTable("its slots do not fit into it")
        self.slot_count = slot_count
        self.first_slot = slots_offset // 8

    def field(self, name: str) -> int:
        """Load one word of the header."""
        return self.words[FIELDS[name] // 8]

    def state(self) -> str:
        """The state by name; unknown values mean closed."""
        return STATES.get(self.field("state"), "closed")

    def slot(self, inode: int) -> int:
        """The slot of an inode."""
        return splitmix64(inode) & (self.slot_count - 1)

    def version(self, inode: int) -> int:
        """The word of the inode's slot: odd while a change is in flight."""
        return self.words[self.first_slot + self.slot(inode)]

    def snapshot(self, inodes: list[int]) -> dict[str, Any]:
        """Everything there is to print."""
        return {
            "table_id": f"{self.field('table_id_high'):016x}{self.field('table_id_low'):016x}",
            "abi_version": self.field("abi_version"),
            "header_bytes": self.field("header_bytes"),
            "table_bytes": self.field("table_bytes"),
            "slot_count": self.slot_count,
            "slots_offset": self.field("slots_offset"),
            "hash_id": self.field("hash_id"),
            "epoch": self.field("epoch"),
            "state": self.state(),
            "heartbeat": self.field("heartbeat"),
            "inodes": [
                {"inode": inode, "slot": self.slot(inode), "version": version, "settled": version % 2 == 0}
                for inode in inodes
                for version in [self.version(inode)]
            ],
        }


class Trust:
    """Rules T2 and T3: until when the table may be believed, judging by its heartbeat alone."""

    def __init__(self, heartbeat: int, now_ns: int) -> None:
        """The first look only remembers."""
        self.heartbeat = heartbeat
        self.looked_at_ns = now_ns
        self.until_ns = 0

    def look(self, heartbeat: int, now_ns: int) -> bool:
        """Look again, with a clock read before; return whether the table is to be trusted at that time."""
        if heartbeat != self.heartbeat:
            self.until_ns = self.looked_at_ns + TRUST_NS
        self.heartbeat = heartbeat
        self.looked_at_ns = now_ns
        return now_ns < self.until_ns


class Change(NamedTuple):
    """Something was seen to change."""

    after_s: float
    what: str
    old: object
    new: object


def watch(table: Table, inodes: list[int], seconds: float) -> Iterator[Change]:
    """Yield one change after the other, for so many seconds."""
    started_ns = time.monotonic_ns()
    trust = Trust(table.field("heartbeat"), started_ns)
    before: dict[str, object] = {}
    while True:
        now_ns = time.monotonic_ns()
        now: dict[str, object] = {
            "trusted": trust.look(table.field("heartbeat"), now_ns),
            "epoch": table.field("epoch"),
            "state": table.state(),
        }
        now.update({f"version of inode {inode}": table.version(inode) for inode in inodes})
        for what, value in now.items():
            if before and value != before[what]:
                yield Change(round((now_ns - started_ns) / 1e9, 3), what, before[what], value)
        before = now
        if now_ns - started_ns >= seconds * 1e9:
            return
        time.sleep(LOOK_EVERY_S)


def print_snapshot(found: dict[str, Any]) -> None:
    """Print for a person."""
    print(f"table      {found['table_id']}, ABI {found['abi_version']}")
    print(f"size       {found['table_bytes']} bytes, header {found['header_bytes']}")
    print(f"slots      {found['slot_count']}, from byte {found['slots_offset']}, hash {found['hash_id']}")
    print(f"epoch      {found['epoch']}")
    print(f"state      {found['state']}")
    print(f"heartbeat  {found['heartbeat']}")
    for entry in found["inodes"]:
        condition = "settled" if entry["settled"] else "in flight"
        print(f"inode {entry['inode']}: slot {entry['slot']}, version {entry['version']} ({condition})")


def u64(text: str) -> int:
    """An inode number, as decimal, or hexadecimal with 0x."""
    value = int(text, 0)
    if not 0 <= value <= U64:
        raise ValueError
    return value


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Read a coherency version table.")
    parser.add_argument("table", help="the table link of a daemon, /proc/PID/fd/N, /dev/shm/NAME or a PCI resource2")
    parser.add_argument("inodes", metavar="inode", nargs="*", type=u64, help="show the version of this inode number")
    parser.add_argument("--json", action="store_true", help="print one JSON object to a line")
    parser.add_argument("--watch", metavar="SECONDS", type=float, default=0.0, help="then print changes for so long")
    options = parser.parse_args()
    try:
        table = Table(map_words(options.table))
    except (NoTable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"read_table: {options.table}: {reason}", file=sys.stderr)
        return 1

    found = table.snapshot(options.inodes)
    if options.json:
        print(json.dumps(found), flush=True)
    else:
        print_snapshot(found)
    if options.watch > 0:
        for change in watch(table, options.inodes, options.watch):
            if options.json:
                print(json.dumps(change._asdict()), flush=True)
            else:
                print(f"{change.after_s:8.3f} s  {change.what}: {change.old} -> {change.new}", flush=True)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
