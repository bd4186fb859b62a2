"""`TableReader`: which memory it takes, when it gives stamps, when they are valid, and how long it trusts."""

import itertools

import pytest

from coherency.errors import TableError
from coherency.ids import HostInode
from coherency.shm_table import (
    DEFAULT_SLOT_COUNT,
    EPOCH_WORD,
    HEARTBEAT_PERIOD_NS,
    STATE_WORD,
    TRUST_MARGIN_NS,
    TRUST_NS,
    State,
    TableReader,
    TableWriter,
    bytes_needed,
)

INODE = HostInode(42)
OTHER = HostInode(43)
MS = 1_000_000


@pytest.fixture
def words() -> memoryview:
    return memoryview(bytearray(bytes_needed(1024))).cast("Q")


@pytest.fixture
def writer(words: memoryview) -> TableWriter:
    writer = TableWriter.create(words, slot_count=1024, table_id=(1, 2))
    writer.set_state(State.SERVING)
    return writer


@pytest.fixture
def reader(writer: TableWriter) -> TableReader:
    return TableReader(writer.words.toreadonly())


# --- opening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value", "reason"),
    [
        (0, 0, "does not hold"),
        (0, int.from_bytes(b"COHTABLE", "big"), "does not hold"),
        (1, 0, "ABI version 0"),
        (1, 2, "ABI version 2"),
        (2, 640, "header is inconsistent"),
        (2, 8192, "header is inconsistent"),
        (3, 32768, "only 16384 are there"),
        (3, 8192, "do not fit"),
        (6, 0, "power of two"),
        (6, 1000, "power of two"),
        (6, 2048, "do not fit"),
        (6, 2**29, "power of two"),
        (6, 2**63, "power of two"),
        (7, 0, "header is inconsistent"),
        (7, 4104, "header is inconsistent"),
        (7, 8192 + 64, "do not fit"),
        (7, 2**64 - 64, "do not fit"),
        (8, 0, "hash 0"),
        (8, 2, "hash 2"),
    ],
)
def test_a_header_that_is_not_sound_is_refused(writer: TableWriter, word: int, value: int, reason: str) -> None:
    TableReader(writer.words)
    writer.words[word] = value
    with pytest.raises(TableError, match=reason):
        TableReader(writer.words)


def test_short_foreign_and_unaligned_memory_is_refused(writer: TableWriter) -> None:
    whole = writer.words.cast("B")
    with pytest.raises(TableError, match="only 8192 are there"):
        TableReader(whole[:8192].cast("Q"))
    with pytest.raises(TableError, match="too short"):
        TableReader(whole[:4088].cast("Q"))
    with pytest.raises(TableError, match="row of u64"):
        TableReader(whole)
    shifted = bytearray(4) + whole.tobytes() + bytearray(4)
    with pytest.raises(TableError, match="aligned"):
        TableReader(memoryview(shifted).toreadonly()[4:-4].cast("Q"))


def test_another_table_than_the_one_expected_is_refused(writer: TableWriter) -> None:
    TableReader(writer.words, table_id=(1, 2))
    with pytest.raises(TableError, match=r"this is table \(1, 2\), not \(1, 3\)"):
        TableReader(writer.words, table_id=(1, 3))


def test_memory_longer_than_the_table_is_taken(writer: TableWriter) -> None:
    """The memory may be a PCI BAR, which is as long as its power of two."""
    longer = bytearray(writer.words.tobytes() + bytes(16384))
    reader = TableReader(memoryview(longer).cast("Q"))
    assert reader.statistics()[-2:] == (1024, 16384)


def test_a_later_writer_may_move_the_slots_and_add_fields(writer: TableWriter) -> None:
    """Presence by size: a longer header and slots further on are no reason to refuse, nor to go wrong."""
    later = memoryview(bytearray(32768)).cast("Q")
    later[:512] = writer.words[:512]
    later[2], later[3], later[7] = 1024, 32768, 8192
    later[100] = 12345
    reader = TableReader(later)
    assert reader.word_of(INODE) - 1024 == TableReader(writer.words).word_of(INODE) - 512


def test_reader_tells_what_the_header_says(writer: TableWriter, reader: TableReader) -> None:
    assert (reader.table_id, reader.epoch, reader.state) == ((1, 2), 1, State.SERVING)
    assert reader.epoch_word == EPOCH_WORD
    writer.words[STATE_WORD] = 77
    assert reader.state is State.CLOSED
    writer.close()
    assert (reader.epoch, reader.state) == (2, State.CLOSED)
    assert reader.statistics() == (2, State.CLOSED, 0, False, 1024, 16384)


def test_a_reader_needs_no_right_to_write(writer: TableWriter, reader: TableReader) -> None:
    assert reader.words.readonly
    assert reader.sample(INODE) is not None


# --- stamps -------------------------------------------------------------------------------------------------------


def test_a_stamp_is_valid_until_its_inode_changes(writer: TableWriter, reader: TableReader) -> None:
    stamp, other = reader.sample(INODE), reader.sample(OTHER)
    assert stamp is not None
    assert other is not None
    assert stamp == (reader.word_of(INODE), 0, 1)
    assert reader.valid(stamp)
    slots = writer.slots_of([INODE])
    writer.begin(slots)
    assert not reader.valid(stamp)
    writer.end(slots)
    assert not reader.valid(stamp)
    assert reader.valid(other)


def test_no_stamp_while_a_change_is_in_flight(writer: TableWriter, reader: TableReader) -> None:
    slots = writer.slots_of([INODE])
    writer.begin(slots)
    assert reader.sample(INODE) is None
    assert reader.sample(OTHER) is not None
    writer.end(slots)
    stamp = reader.sample(INODE)
    assert stamp is not None
    assert stamp.version == 2


def test_no_stamp_from_a_table_that_is_not_serving(writer: TableWriter, reader: TableReader) -> None:
    writer.set_state(State.CLOSED)
    assert reader.sample(INODE) is None
    writer.words[STATE_WORD] = 2
    assert reader.sample(INODE) is None
    writer.set_state(State.SERVING)
    assert reader.sample(INODE) is not None


@pytest.mark.parametrize("how", ["advance", "close", "adopt"])
def test_no_stamp_survives_an_epoch(writer: TableWriter, reader: TableReader, how: str) -> None:
    stamps = [reader.sample(HostInode(n)) for n in range(20)]
    assert all(stamp is not None and reader.valid(stamp) for stamp in stamps)
    if how == "advance":
        writer.advance_epoch()
    elif how == "close":
        writer.close()
    else:
        TableWriter.adopt(writer.words)
    assert not any(stamp is not None and reader.valid(stamp) for stamp in stamps)


def test_sample_loads_epoch_then_state_then_version(writer: TableWriter, reader: TableReader) -> None:
    """The table closes between any two of the loads: there is no stamp, or one that is not valid."""

    class Closing:
        """Hands loads on; closes the table before the given one."""

        def __init__(self, before_load: int) -> None:
            self.before_load = before_load
            self.loads: list[int] = []

        def __getitem__(self, index: int) -> int:
            if len(self.loads) == self.before_load:
                writer.close()
            self.loads.append(index)
            return writer.words[index]

    for before_load in range(3):
        writer.set_state(State.SERVING)
        closing = Closing(before_load)
        reader.words = closing  # type: ignore[assignment]
        stamp = reader.sample(INODE)
        reader.words = writer.words
        assert stamp is None or not reader.valid(stamp)
        expected = [EPOCH_WORD, STATE_WORD, reader.word_of(INODE)]
        assert closing.loads == expected[: len(closing.loads)]
        assert len(closing.loads) >= 2


def test_inodes_that_share_a_slot_cost_a_refresh_and_no_stale_answer(writer: TableWriter, reader: TableReader) -> None:
    first = HostInode(1)
    twin = next(HostInode(n) for n in itertools.count(2) if reader.word_of(HostInode(n)) == reader.word_of(first))
    stamp = reader.sample(first)
    assert stamp is not None
    writer.bump([twin])
    assert not reader.valid(stamp)


def test_check_notices_that_the_constant_part_changed(writer: TableWriter, reader: TableReader) -> None:
    reader.check()
    writer.words[5] = 3
    with pytest.raises(AssertionError, match="constant part"):
        reader.check()


# --- trust --------------------------------------------------------------------------------------------------------


def test_the_times_leave_room_for_lost_pulses() -> None:
    assert TRUST_NS >= 5 * HEARTBEAT_PERIOD_NS
    assert TRUST_MARGIN_NS >= HEARTBEAT_PERIOD_NS
    assert bytes_needed(DEFAULT_SLOT_COUNT) == 16 * 2**20


def test_a_new_reader_trusts_nothing_and_the_first_pulse_only_remembers(
    writer: TableWriter, reader: TableReader
) -> None:
    assert reader.trusted_until_ns == 0
    writer.beat()
    reader.pulse(5000 * MS)
    assert reader.trusted_until_ns == 0, "the beat may be older than anything this reader knows"


def test_a_moved_heartbeat_is_trusted_from_the_previous_pulse_on(writer: TableWriter, reader: TableReader) -> None:
    reader.pulse(1000 * MS)
    writer.beat()
    reader.pulse(1050 * MS)
    assert reader.trusted_until_ns == 2000 * MS
    reader.pulse(1100 * MS)
    assert reader.trusted_until_ns == 2000 * MS, "nothing moved"
    writer.beat()
    writer.beat()
    reader.pulse(1150 * MS)
    assert reader.trusted_until_ns == 2100 * MS


def test_a_reader_that_was_stopped_does_not_trust_an_old_beat(writer: TableWriter, reader: TableReader) -> None:
    reader.pulse(1000 * MS)
    writer.beat()  # ... and then both are stopped or killed, for an hour
    reader.pulse(3_600_000 * MS)
    assert reader.trusted_until_ns == 2000 * MS
    reader.pulse(3_600_050 * MS)
    assert reader.trusted_until_ns == 2000 * MS


def test_vouching_counts_from_the_question_and_never_shortens(writer: TableWriter, reader: TableReader) -> None:
    reader.vouch(3000 * MS)
    assert reader.trusted_until_ns == 4000 * MS
    reader.vouch(2000 * MS)
    assert reader.trusted_until_ns == 4000 * MS
    reader.pulse(2500 * MS)
    writer.beat()
    reader.pulse(2600 * MS)
    assert reader.trusted_until_ns == 4000 * MS


def test_withdrawal_is_for_ever(writer: TableWriter, reader: TableReader) -> None:
    reader.vouch(3000 * MS)
    reader.pulse(3000 * MS)
    reader.withdraw()
    assert reader.trusted_until_ns == 0
    reader.vouch(3010 * MS)
    writer.beat()
    reader.pulse(3050 * MS)
    assert reader.trusted_until_ns == 0
    assert reader.statistics().withdrawn
    reader.check()
    reader.trusted_until_ns = 1
    with pytest.raises(AssertionError, match="withdrawn"):
        reader.check()


def test_the_length_of_trust_is_the_announced_one(writer: TableWriter) -> None:
    reader = TableReader(writer.words, trust_ns=7)
    reader.vouch(100)
    assert reader.trusted_until_ns == 107
