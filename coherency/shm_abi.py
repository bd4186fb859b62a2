"""ABI 1 of the version table: words, values, the hash, and what a sound header is.  `docs/spec/table.md` is normative.

Nothing here writes.  `shm_table` re-exports what its users need.
"""

import ctypes
import platform
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from coherency.errors import TableError, UnsupportedPlatform
from coherency.ids import SlotIndex

# Indexes of words.  The constant part ...
MAGIC_WORD: Final = 0
ABI_VERSION_WORD: Final = 1
HEADER_BYTES_WORD: Final = 2
TABLE_BYTES_WORD: Final = 3
TABLE_ID_HIGH_WORD: Final = 4
TABLE_ID_LOW_WORD: Final = 5
SLOT_COUNT_WORD: Final = 6
SLOTS_OFFSET_WORD: Final = 7
HASH_ID_WORD: Final = 8
# ... and the changing one, each word on a cache line of its own.
EPOCH_WORD: Final = 64
STATE_WORD: Final = 72
HEARTBEAT_WORD: Final = 80

WORD_BYTES: Final = 8
CACHE_LINE_BYTES: Final = 64
MAGIC: Final = int.from_bytes(b"COHTABLE", "little")
ABI_VERSION: Final = 1
HEADER_BYTES: Final = 704
SLOTS_OFFSET_BYTES: Final = 4096
HASH_SPLITMIX64: Final = 1

DEFAULT_SLOT_COUNT: Final = 2**20
MAX_SLOT_COUNT: Final = 2**28

HEARTBEAT_PERIOD_NS: Final = 100_000_000
TRUST_NS: Final = 1_000_000_000
TRUST_MARGIN_NS: Final = 200_000_000

U64_MAX: Final = 2**64 - 1
_SCAN_WORDS: Final = 512
_LOW_BITS: Final = int.from_bytes((b"\x01" + bytes(WORD_BYTES - 1)) * _SCAN_WORDS, "little")


class State(IntEnum):
    """Value of the state word.  Any value that is not listed means the same as CLOSED."""

    CLOSED = 0
    SERVING = 1


class Stamp(NamedTuple):
    """What a reader keeps beside a cached value: the value is usable while both words still hold these numbers."""

    word: int
    """Index of the slot's word, counted from the start of the table."""
    version: int
    epoch: int


class Platform(NamedTuple):
    """What the memory ordering of ABI 1 depends on."""

    system: str
    machine: str
    byteorder: str
    word_bits: int
    implementation: str

    @classmethod
    def here(cls) -> "Platform":
        """Return the platform of this process."""
        bits = sys.maxsize.bit_length() + 1
        return cls(sys.platform, platform.machine(), sys.byteorder, bits, sys.implementation.name)


SUPPORTED_PLATFORM: Final = Platform("linux", "x86_64", "little", 64, "cpython")


def require_platform(found: Platform | None = None) -> None:
    """Raise `UnsupportedPlatform` unless ABI 1 holds here (spec, section "Memory ordering").

    Python has no fences: the table relies on x86-64, where aligned 8-byte loads and stores are whole and stay in
    order, and on CPython, which makes one such access for one index operation.
    """
    found = Platform.here() if found is None else found
    if found != SUPPORTED_PLATFORM:
        wrong = ", ".join(
            f"{field} is {have!r} instead of {want!r}"
            for field, have, want in zip(Platform._fields, found, SUPPORTED_PLATFORM, strict=True)
            if have != want
        )
        raise UnsupportedPlatform(
            f"the version table needs Linux on x86-64 and 64-bit CPython ({wrong}): elsewhere loads and stores of "
            "shared memory may be reordered or torn, and Python has no memory fences to prevent it"
        )


def splitmix64(x: int) -> int:
    """Return the 64-bit SplitMix64 hash of a u64 (Steele, Lea and Flood, 2014; spec, section "Slots")."""
    x = (x + 0x9E3779B97F4A7C15) & U64_MAX
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & U64_MAX
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64_MAX
    return x ^ (x >> 31)


def bytes_needed(slot_count: int) -> int:
    """Return the size of a table: a power of two, because the memory may become a PCI BAR.

    Only the header and the slots in use are ever touched, so that in shared memory the rest costs nothing.
    Raises `ValueError` if `slot_count` is not a power of two from 1 to `MAX_SLOT_COUNT`.
    """
    if not _is_slot_count(slot_count):
        raise ValueError(f"slot count {slot_count} is not a power of two from 1 to {MAX_SLOT_COUNT}")
    least = SLOTS_OFFSET_BYTES + slot_count * WORD_BYTES
    return 1 << (least - 1).bit_length()


class Layout(NamedTuple):
    """The constant part of a header that was found to be sound."""

    slot_count: int
    slots_word: int
    """Index of the word of slot 0."""
    table_bytes: int
    table_id: tuple[int, int]


def require_words(words: memoryview) -> None:
    """Raise `TableError` unless every index operation on this memory is one aligned 8-byte access."""
    if words.format != "Q" or words.ndim != 1 or not words.c_contiguous:
        raise TableError(f"the memory must be one contiguous row of u64 words, not format {words.format!r}")
    if words.nbytes < SLOTS_OFFSET_BYTES:
        raise TableError(f"the memory is too short for a table: {words.nbytes} bytes")
    if _address_of(words) % WORD_BYTES:
        raise TableError(f"the memory is not aligned to {WORD_BYTES} bytes: its words could tear")


def read_layout(words: memoryview) -> Layout:
    """Validate the constant part of the header, as the spec (section "Header") tells every reader to do.

    Raises `TableError` if the memory is no table that this program can use.
    """
    require_platform()
    require_words(words)
    if words[MAGIC_WORD] != MAGIC:  # first; pairs with the last store in TableWriter.create()
        raise TableError(f"the memory does not hold a version table (magic {words[MAGIC_WORD]:#x})")
    if words[ABI_VERSION_WORD] != ABI_VERSION:
        raise TableError(f"the table has ABI version {words[ABI_VERSION_WORD]}, this program knows {ABI_VERSION}")
    header_bytes, table_bytes = words[HEADER_BYTES_WORD], words[TABLE_BYTES_WORD]
    slot_count, slots_offset = words[SLOT_COUNT_WORD], words[SLOTS_OFFSET_WORD]
    if words[HASH_ID_WORD] != HASH_SPLITMIX64:
        raise TableError(f"the table uses hash {words[HASH_ID_WORD]}, this program knows {HASH_SPLITMIX64}")
    if table_bytes > words.nbytes:
        raise TableError(f"the table has {table_bytes} bytes, but only {words.nbytes} are there")
    if header_bytes < HEADER_BYTES or slots_offset < header_bytes or slots_offset % CACHE_LINE_BYTES:
        raise TableError(f"the table's header is inconsistent: {header_bytes} bytes, slots from {slots_offset}")
    if not _is_slot_count(slot_count):
        raise TableError(f"the table's slot count {slot_count} is not a power of two from 1 to {MAX_SLOT_COUNT}")
    if slots_offset + slot_count * WORD_BYTES > table_bytes:
        raise TableError(f"{slot_count} slots from byte {slots_offset} do not fit into {table_bytes} bytes")
    table_id = (words[TABLE_ID_HIGH_WORD], words[TABLE_ID_LOW_WORD])
    return Layout(slot_count, slots_offset // WORD_BYTES, table_bytes, table_id)


def check_layout(words: memoryview, expected: Layout) -> None:
    """Raise `AssertionError` if the constant part of the header is not what it was."""
    try:
        layout = read_layout(words)
    except TableError as error:
        raise AssertionError(f"the header is damaged: {error}") from error
    if layout != expected:
        raise AssertionError(f"the constant part of the header changed from {expected} to {layout}")


def odd_slots(slots: memoryview) -> Iterator[SlotIndex]:
    """Yield the slots whose word is odd.  Nobody may write meanwhile.

    Whole groups are tested at once: most of a table is settled, and a default table has a million words.
    """
    for first in range(0, len(slots), _SCAN_WORDS):
        group = slots[first : first + _SCAN_WORDS]
        if int.from_bytes(group.tobytes(), "little") & _LOW_BITS:
            yield from (SlotIndex(first + offset) for offset, word in enumerate(group) if word & 1)


def _is_slot_count(slot_count: int) -> bool:
    return 1 <= slot_count <= MAX_SLOT_COUNT and not slot_count & (slot_count - 1)


class _PyBuffer(ctypes.Structure):
    """CPython's `Py_buffer` (stable since 3.11): the only way to the address of a read-only buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address_of(words: memoryview) -> int:
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(words), ctypes.byref(view), 0)
    try:
        return view.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
