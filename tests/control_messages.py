"""Control messages for tests: any legal message, and frames made by hand."""

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
from hypothesis import strategies as st

from coherency.events import Event, EventKind
from coherency.protocol import CATALOGUE, MAGIC, Message, wire_fields
from coherency.protocol_fields import (
    REPORT_KEYS,
    Choice,
    Flag,
    Happenings,
    Keys,
    Kind,
    Path,
    Report,
    ReportValue,
    Text,
    Unsigned,
)

REPORT: Mapping[str, ReportValue] = {
    "name": "share-1",
    "share": "/srv/data",
    "export": "/run/coherency/share-1/export",
    "pid": 4711,
    "uptime_ns": 1_000_000_000,
    "epoch": 3,
    "bumps": 17,
    "changes_in_flight": 0,
    "slot_count": 1 << 20,
    "table_bytes": (1 << 23) + 4096,
    "lease_ns": 10_000_000_000,
    "keys_held": 12,
    "recalls": 5,
    "evictions": 1,
    "lost_guests": 0,
    "waits": 2,
    "waited_ns": 3_000_000,
    "longest_wait_ns": 2_000_000,
    "held_ns": 0,
    "held_for_guests": 0,
}


def texts(kind: Text) -> st.SearchStrategy[str]:
    printable = st.characters(exclude_categories=["C", "Z"]) | st.just(" ")
    # Four bytes at most for a character: never too long, and cut from the end to the shortest length that is allowed.
    return st.text(printable.filter(str.isprintable), min_size=kind.min_bytes, max_size=kind.max_bytes // 4)


def values(kind: Kind) -> st.SearchStrategy[Any]:
    """The legal Python values of a kind."""
    if isinstance(kind, Unsigned):
        return st.integers(0, 2**kind.bits - 1)
    if isinstance(kind, Flag):
        return st.booleans()
    if isinstance(kind, Text):
        return texts(kind)
    if isinstance(kind, Choice):
        return st.sampled_from(kind.words)
    if isinstance(kind, Path):
        return (
            st.binary(min_size=1, max_size=300)
            .map(lambda raw: raw.replace(b"\0", b"/"))
            .map(lambda raw: raw.decode("utf-8", "surrogateescape"))
        )
    if isinstance(kind, Keys):
        return st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple)
    if isinstance(kind, Happenings):
        return st.lists(events(), max_size=10).map(tuple)
    assert isinstance(kind, Report)
    required = st.fixed_dictionaries({name: values(entry) for name, entry in REPORT_KEYS.items()})
    others = st.dictionaries(texts(kind.key), values(kind.number) | texts(kind.text), max_size=20)
    return st.tuples(others, required).map(lambda parts: {**parts[0], **parts[1]})


def events() -> st.SearchStrategy[Event]:
    """Any event, also such as nobody would tell."""
    inodes = st.integers(0, 2**64 - 1)
    names = st.binary(max_size=255).filter(lambda name: not {*b"/\0"} & {*name} and name not in (b".", b".."))
    return st.builds(Event, st.sampled_from(EventKind), inodes, st.booleans(), inodes, names, inodes, names, inodes)


def messages(kind: type[Message] | None = None) -> st.SearchStrategy[Message]:
    """Legal messages, of one kind or of any.  All speak our version of the protocol."""
    if kind is None:
        return st.one_of([messages(entry.message) for entry in CATALOGUE])
    build: Any = kind
    fields = {name: values(entry) for name, entry in wire_fields(kind) if name != "protocol"}
    return st.builds(build, **fields)


def frame(payload: bytes, *, magic: bytes = MAGIC, length: int | None = None, checksum: int | None = None) -> bytes:
    """A frame around any payload, with any of its fields wrong if asked for."""
    return (
        struct.pack(
            "<4sII",
            magic,
            len(payload) if length is None else length,
            zlib.crc32(payload) if checksum is None else checksum,
        )
        + payload
    )


def packed(items: object) -> bytes:
    """A sound frame around anything that msgpack can pack."""
    payload: bytes = msgpack.packb(items)
    return frame(payload)
