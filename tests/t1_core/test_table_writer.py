"""`TableWriter`: what the words are after each step, and that nothing makes an odd word even too early."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest

from coherency.errors import TableError
from coherency.ids import HostInode, SlotIndex
from coherency.shm_table import EPOCH_WORD, HEARTBEAT_WORD, STATE_WORD, State, TableReader, TableWriter, bytes_needed

FIRST_SLOT = 512
A, B, C = SlotIndex(1), SlotIndex(2), SlotIndex(5)


def fresh_words(slot_count: int = 8) -> memoryview:
    return memoryview(bytearray(bytes_needed(slot_count))).cast("Q")


@pytest.fixture
def writer() -> TableWriter:
    writer = TableWriter.create(fresh_words(), slot_count=8, table_id=(1, 2))
    writer.set_state(State.SERVING)
    return writer


def version(writer: TableWriter, slot: SlotIndex) -> int:
    return writer.words[FIRST_SLOT + slot]


# --- create -------------------------------------------------------------------------------------------------------


def test_create_leaves_a_closed_table_in_epoch_1() -> None:
    writer = TableWriter.create(fresh_words(), slot_count=8, table_id=(1, 2))
    assert writer.statistics() == (0, 0, 1, 8, 8192)
    assert TableReader(writer.words).state is State.CLOSED
    writer.check()


def test_create_takes_memory_longer_than_the_table() -> None:
    words = fresh_words(1024)
    assert TableWriter.create(words, slot_count=8, table_id=(1, 2)).table_bytes == 8192
    assert TableReader(words).table_bytes == 8192


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (memoryview(bytearray(8192)), "row of u64"),
        (memoryview(bytearray(8192)).cast("q"), "row of u64"),
        (memoryview(bytearray(16384)).cast("Q")[::2], "row of u64"),
        (memoryview(bytearray(8192 + 8))[4:-4].cast("Q"), "aligned"),
        (memoryview(bytes(8192)).cast("Q"), "read-only"),
        (memoryview(bytearray(4096)).cast("Q"), "need 8192 bytes"),
        (memoryview(bytearray(4088)).cast("Q"), "too short"),
    ],
)
def test_create_refuses_unsuitable_memory(words: memoryview, reason: str) -> None:
    with pytest.raises(TableError, match=reason):
        TableWriter.create(words, slot_count=8, table_id=(1, 2))


def test_create_refuses_memory_that_holds_a_table(writer: TableWriter) -> None:
    writer.bump([HostInode(7)])
    before = writer.words.tobytes()
    with pytest.raises(TableError, match="not fresh"):
        TableWriter.create(writer.words, slot_count=8, table_id=(3, 4))
    assert writer.words.tobytes() == before


@pytest.mark.parametrize("table_id", [(-1, 0), (0, 2**64)])
def test_create_refuses_an_impossible_id_and_writes_nothing(table_id: tuple[int, int]) -> None:
    words = fresh_words()
    with pytest.raises(ValueError, match="table id"):
        TableWriter.create(words, slot_count=8, table_id=table_id)
    assert not any(words)


def test_magic_is_stored_after_everything_else() -> None:
    class Recorder:
        """Stands for the memory: hands everything on, and remembers the order of the stores."""

        def __init__(self, words: memoryview) -> None:
            self._words = words
            self.stored: list[int] = []

        def __setitem__(self, index: int, value: int) -> None:
            self.stored.append(index)
            self._words[index] = value

        def __getitem__(self, index: int) -> int:
            return self._words[index]

        def __getattr__(self, name: str) -> object:
            return getattr(self._words, name)

    recorder = Recorder(fresh_words())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coherency.shm_abi._address_of", lambda words: 0)
        TableWriter.create(recorder, slot_count=8, table_id=(1, 2))  # type: ignore[arg-type]
    assert recorder.stored[-1] == 0
    assert sorted(recorder.stored) == [*range(9), EPOCH_WORD, STATE_WORD]


# --- begin and end ------------------------------------------------------------------------------------------------


def test_one_change_makes_its_words_odd_and_then_even(writer: TableWriter) -> None:
    writer.begin((A, B))
    assert (version(writer, A), version(writer, B), version(writer, C)) == (1, 1, 0)
    assert writer.statistics().changes_in_flight == 2
    writer.check()
    writer.end((A, B))
    assert (version(writer, A), version(writer, B), version(writer, C)) == (2, 2, 0)
    assert writer.statistics()[:2] == (2, 0)
    writer.check()


def test_overlapping_changes_of_one_slot_keep_it_odd_until_the_last_ends(writer: TableWriter) -> None:
    writer.begin((A, B))
    writer.begin((A, C))
    assert version(writer, A) == 1
    writer.end((A, B))
    assert (version(writer, A), version(writer, B), version(writer, C)) == (1, 2, 1)
    writer.check()
    writer.begin((A,))
    writer.end((A, C))
    assert version(writer, A) == 1
    writer.end((A,))
    assert (version(writer, A), version(writer, C)) == (2, 2)
    writer.check()


def test_changes_may_end_in_any_order(writer: TableWriter) -> None:
    writer.begin((A,))
    writer.begin((A, B))
    writer.end((A,))
    writer.end((A, B))
    assert (version(writer, A), version(writer, B)) == (2, 2)


def test_a_change_of_nothing_is_allowed(writer: TableWriter) -> None:
    writer.begin(())
    writer.end(())
    assert writer.statistics().bumps == 0


def test_slots_of_is_sorted_and_without_duplicates(writer: TableWriter) -> None:
    inodes = [HostInode(n) for n in (9, 3, 3, 0, 2**64 - 1, 9)]
    slots = writer.slots_of(inodes)
    assert list(slots) == sorted(set(slots))
    reader = TableReader(writer.words)
    assert {slot + FIRST_SLOT for slot in slots} == {reader.word_of(inode) for inode in inodes}


def test_bump_moves_each_slot_once_to_the_next_even_version(writer: TableWriter) -> None:
    inode = HostInode(4)
    (slot,) = writer.slots_of([inode])
    writer.bump([inode, inode])
    assert version(writer, slot) == 2
    writer.begin((slot,))
    writer.bump([inode])
    assert version(writer, slot) == 3, "a bump must not end somebody else's change"
    writer.end((slot,))
    assert version(writer, slot) == 4


@pytest.mark.parametrize("slots", [(SlotIndex(-1),), (SlotIndex(8),), (A, SlotIndex(8)), (A, SlotIndex(-8))])
def test_begin_outside_the_table_is_refused_and_leaves_nothing_in_flight(
    writer: TableWriter, slots: tuple[SlotIndex, ...]
) -> None:
    with pytest.raises(IndexError):
        writer.begin(slots)
    assert writer.statistics().changes_in_flight == 0
    assert not any(writer.words[FIRST_SLOT + 8 :])
    writer.check()
    writer.begin((A,))  # and the lock is free
    assert version(writer, A) & 1


def test_end_of_what_was_not_begun_is_refused_and_changes_nothing(writer: TableWriter) -> None:
    writer.begin((A,))
    with pytest.raises(ValueError, match="slot 2 has no change"):
        writer.end((A, B))
    assert (version(writer, A), version(writer, B)) == (1, 0)
    writer.check()
    writer.end((A,))
    with pytest.raises(ValueError, match="slot 1 has no change"):
        writer.end((A,))
    assert version(writer, A) == 2


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt."""


class InterruptedSlots(tuple[SlotIndex, ...]):
    """Slots whose iteration is interrupted after the first."""

    __slots__ = ()

    def __iter__(self) -> Iterator[SlotIndex]:
        yield self[0]
        raise Interrupted


def test_an_interrupted_begin_takes_back_what_it_began(writer: TableWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.min", lambda slots, default: 0)  # lets the iteration reach the loop under the lock
    with pytest.raises(Interrupted):
        writer.begin(InterruptedSlots((A, B)))
    monkeypatch.undo()
    assert writer.statistics().changes_in_flight == 0
    assert version(writer, A) == 2, "it was odd, so it must not become 0 again"
    writer.check()


def test_a_count_lost_to_an_interrupt_leaves_the_word_odd_not_even(writer: TableWriter) -> None:
    """An interrupt between count and word: whatever follows, the word is odd while a real change is in flight."""
    writer._in_flight[A] = 1  # counted, but the word still even
    writer.begin((A,))
    assert version(writer, A) & 1
    writer.end((A,))
    assert version(writer, A) & 1, "the lost change is never ended: odd for ever costs refreshes, no stale answer"


def test_a_word_left_odd_by_an_interrupt_is_not_made_even_by_the_next_begin(writer: TableWriter) -> None:
    writer.words[FIRST_SLOT + A] = 1  # odd, but not counted
    with pytest.raises(AssertionError, match="odd slots"):
        writer.check()
    writer.begin((A,))
    assert version(writer, A) == 1
    writer.end((A,))
    assert version(writer, A) == 2
    writer.check()


ROUNDS, THREADS = 400, 6


def hammer(writer: TableWriter) -> list[str]:
    """Let threads begin and end changes of a slot they share and one of their own; return what they saw go wrong."""
    wrong: list[str] = []
    start = threading.Barrier(THREADS)

    def work(own: SlotIndex) -> None:
        start.wait()
        slots = (SlotIndex(0), own)
        for _ in range(ROUNDS):
            try:
                writer.begin(slots)
                if not (version(writer, SlotIndex(0)) & 1 and version(writer, own) & 1):
                    wrong.append(f"even while slot {own} was in flight")
                writer.end(slots)
            except (ValueError, KeyError) as error:
                wrong.append(str(error))
            if version(writer, own) & 1:
                wrong.append(f"slot {own} odd after its only change ended")

    workers = [threading.Thread(target=work, args=(SlotIndex(1 + n),)) for n in range(THREADS)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval_s)
    return wrong


def test_begin_and_end_from_many_threads_lose_no_count(writer: TableWriter) -> None:
    assert hammer(writer) == []
    assert writer.statistics()[:2] == (2 * ROUNDS * THREADS, 0)
    assert [version(writer, SlotIndex(1 + n)) for n in range(THREADS)] == [2 * ROUNDS] * THREADS
    writer.check()


def test_without_the_lock_the_same_threads_go_wrong(writer: TableWriter) -> None:
    """Control: the test above would notice a lock that does not lock."""
    writer._lock = contextlib.nullcontext()  # type: ignore[assignment]
    assert any(hammer(writer) for _ in range(20))


# --- epoch, state, heartbeat --------------------------------------------------------------------------------------


def test_advance_epoch_adds_one_and_says_so(writer: TableWriter) -> None:
    assert [writer.advance_epoch(), writer.advance_epoch()] == [2, 3]
    assert writer.words[EPOCH_WORD] == 3 == writer.statistics().epoch


def test_beat_moves_the_heartbeat_and_nothing_else(writer: TableWriter) -> None:
    before = writer.words.tolist()
    writer.beat()
    changed = [index for index, word in enumerate(writer.words) if word != before[index]]
    assert changed == [HEARTBEAT_WORD]


def test_close_closes_and_raises_the_epoch_and_changes_in_flight_may_end(writer: TableWriter) -> None:
    writer.begin((A,))
    writer.close()
    assert (writer.words[STATE_WORD], writer.words[EPOCH_WORD]) == (State.CLOSED, 2)
    writer.end((A,))
    assert version(writer, A) == 2
    writer.check()


def test_check_notices_a_damaged_header(writer: TableWriter) -> None:
    writer.words[6] = 4
    with pytest.raises(AssertionError, match="constant part"):
        writer.check()
    writer.words[6] = 3
    with pytest.raises(AssertionError, match="damaged"):
        writer.check()


# --- adopt --------------------------------------------------------------------------------------------------------


def test_adopt_rounds_odd_words_up_and_raises_the_epoch(writer: TableWriter) -> None:
    writer.bump([HostInode(n) for n in range(50)])
    writer.begin((A, B))
    writer.begin((A,))
    writer.beat()
    before = writer.words[FIRST_SLOT : FIRST_SLOT + 8].tolist()

    heir = TableWriter.adopt(writer.words)

    after = heir.words[FIRST_SLOT : FIRST_SLOT + 8].tolist()
    assert after == [word + (word & 1) for word in before]
    assert before[A] & 1
    assert heir.statistics() == (0, 0, 2, 8, 8192)
    assert heir.table_id == (1, 2)
    assert TableReader(heir.words).state is State.CLOSED
    assert heir.words[HEARTBEAT_WORD] == 1
    heir.check()


def test_adopt_finds_odd_words_anywhere_in_a_large_table() -> None:
    writer = TableWriter.create(fresh_words(4096), slot_count=4096, table_id=(1, 2))
    odd = tuple(SlotIndex(slot) for slot in (0, 1, 511, 512, 1023, 2048, 4095))
    writer.begin(odd)
    heir = TableWriter.adopt(writer.words)
    assert [slot for slot in range(4096) if version(heir, SlotIndex(slot))] == list(odd)
    assert {version(heir, slot) for slot in odd} == {2}
    heir.check()


def test_adopt_stores_closed_then_words_then_epoch(writer: TableWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before the rounding, it must have closed the table and not yet raised the epoch."""
    writer.begin((A,))

    def die(slots: memoryview) -> NoReturn:
        raise Interrupted

    monkeypatch.setattr("coherency.shm_table.odd_slots", die)
    with pytest.raises(Interrupted):
        TableWriter.adopt(writer.words)
    assert (writer.words[STATE_WORD], writer.words[EPOCH_WORD], version(writer, A)) == (State.CLOSED, 1, 1)


def test_adopt_refuses_what_is_no_table_and_writes_nothing() -> None:
    words = fresh_words()
    words[3] = 99
    with pytest.raises(TableError, match="does not hold"):
        TableWriter.adopt(words)
    assert [word for word in words if word] == [99]


def test_adopt_refuses_read_only_memory(writer: TableWriter) -> None:
    with pytest.raises(TableError, match="read-only"):
        TableWriter.adopt(writer.words.toreadonly())
