"""What ABI 1 looks like in memory, byte by byte, and on which machines it exists at all."""

import pytest

from coherency import shm_abi
from coherency.errors import UnsupportedPlatform
from coherency.ids import HostInode
from coherency.shm_abi import CACHE_LINE_BYTES, SUPPORTED_PLATFORM, WORD_BYTES, Platform
from coherency.shm_table import (
    DEFAULT_SLOT_COUNT,
    State,
    TableReader,
    TableWriter,
    bytes_needed,
    require_platform,
    splitmix64,
)


def word_indexes() -> dict[str, int]:
    return {name: getattr(shm_abi, name) for name in dir(shm_abi) if name.endswith("_WORD")}


def test_a_new_table_is_these_bytes() -> None:
    memory = bytearray(bytes_needed(8))
    writer = TableWriter.create(
        memoryview(memory).cast("Q"), slot_count=8, table_id=(0x1122334455667788, 0x99AABBCCDDEEFF00)
    )
    writer.set_state(State.SERVING)
    writer.beat()
    writer.bump([HostInode(0)])

    expected = bytearray(8192)
    expected[0:72] = bytes.fromhex(
        "434f485441424c45"  # COHTABLE
        "0100000000000000"  # ABI version
        "c002000000000000"  # header bytes
        "0020000000000000"  # table bytes
        "8877665544332211"  # table id
        "00ffeeddccbbaa99"
        "0800000000000000"  # slot count
        "0010000000000000"  # slots offset
        "0100000000000000"  # hash id
    )
    expected[512] = 1  # epoch
    expected[576] = 1  # state: serving
    expected[640] = 1  # heartbeat
    expected[4096 + 7 * 8] = 2  # version of the slot of inode 0
    assert memory == expected


def test_no_two_fields_share_a_word() -> None:
    indexes = word_indexes()
    assert len(set(indexes.values())) == len(indexes) == 12


def test_changing_words_have_cache_lines_of_their_own() -> None:
    def line(index: int) -> int:
        return index * WORD_BYTES // CACHE_LINE_BYTES

    changing = {shm_abi.EPOCH_WORD, shm_abi.STATE_WORD, shm_abi.HEARTBEAT_WORD}
    slots = shm_abi.SLOTS_OFFSET_BYTES // WORD_BYTES
    for index in changing:
        others = {*word_indexes().values(), slots} - {index}
        assert line(index) not in {line(other) for other in others}


def test_header_bytes_covers_every_field_and_nothing_of_the_slots() -> None:
    end = (max(word_indexes().values()) + 1) * WORD_BYTES
    assert end <= shm_abi.HEADER_BYTES <= shm_abi.SLOTS_OFFSET_BYTES


@pytest.mark.parametrize(
    ("slot_count", "size_bytes"),
    [(1, 8192), (512, 8192), (1024, 16384), (DEFAULT_SLOT_COUNT, 16 * 2**20), (2**28, 2**32)],
)
def test_a_table_is_a_power_of_two_that_holds_header_and_slots(slot_count: int, size_bytes: int) -> None:
    assert bytes_needed(slot_count) == size_bytes
    assert size_bytes // 2 < 4096 + slot_count * 8 <= size_bytes


@pytest.mark.parametrize("slot_count", [-1, 0, 3, 2**20 - 1, 2**29])
def test_other_slot_counts_are_refused(slot_count: int) -> None:
    with pytest.raises(ValueError, match=str(slot_count)):
        bytes_needed(slot_count)


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of the generator seeded with 1234567, as in Vigna's C code: its n-th output hashes seed + n * gamma.
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64((1234567 + n * gamma) & (2**64 - 1)) for n in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_inodes_in_a_row_spread_over_the_slots() -> None:
    # A file system numbers its inodes in a row, or in steps: both must use all of a small table.
    memory = bytearray(bytes_needed(64))
    writer = TableWriter.create(memoryview(memory).cast("Q"), slot_count=64, table_id=(1, 2))
    reader = TableReader(writer.words)
    for step in (1, 64, 4096):
        inodes = [HostInode(n * step) for n in range(1024)]
        assert len(writer.slots_of(inodes)) == 64
        assert {reader.word_of(inode) - 512 for inode in inodes} == set(range(64))


def test_this_machine_is_supported() -> None:
    require_platform()
    assert Platform.here() == SUPPORTED_PLATFORM


@pytest.mark.parametrize(
    "other",
    [
        SUPPORTED_PLATFORM._replace(machine="aarch64"),
        SUPPORTED_PLATFORM._replace(system="darwin"),
        SUPPORTED_PLATFORM._replace(byteorder="big"),
        SUPPORTED_PLATFORM._replace(word_bits=32),
        SUPPORTED_PLATFORM._replace(implementation="pypy"),
    ],
)
def test_other_platforms_are_refused_with_the_reason(other: Platform) -> None:
    with pytest.raises(UnsupportedPlatform, match="no memory fences") as caught:
        require_platform(other)
    (different,) = set(other) - set(SUPPORTED_PLATFORM)
    assert repr(different) in str(caught.value)


def test_neither_writer_nor_reader_starts_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    words = memoryview(bytearray(bytes_needed(8))).cast("Q")
    fresh = memoryview(bytearray(bytes_needed(8))).cast("Q")
    TableWriter.create(words, slot_count=8, table_id=(1, 2))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    for attempt in (
        lambda: TableWriter.create(fresh, slot_count=8, table_id=(1, 2)),
        lambda: TableWriter.adopt(words),
        lambda: TableReader(words),
    ):
        with pytest.raises(UnsupportedPlatform, match="aarch64"):
            attempt()
    assert not any(fresh)
