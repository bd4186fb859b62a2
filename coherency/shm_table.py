"""The version table, ABI 1: its one writer and its readers, over any buffer of u64 words.

A `bytearray` is a legal table.  The normative text is `docs/spec/table.md`; numbers and layout of the words are in
`shm_abi`.  The rules that this module keeps:

1. Every word is loaded and stored whole, by indexing a `memoryview` of format "Q".
2. One `TableWriter` writes a table.  It stores only under its lock.
3. A slot's word is odd iff changes of that slot are in flight; overlapping changes are counted.  The word never takes
   an old value again: begin and end only add, and no table is formatted twice.
4. `begin` returns after the words are odd; the caller applies the change after that, and calls `end` after applying.
5. A reader samples before it fetches, keeps what it fetched only if it got a stamp (the word was even), and uses it
   only while word and epoch equal the stamp's.
6. The epoch only grows.  Adopting a table closes it, then rounds odd words up, then raises the epoch; closing stores
   the state before the epoch.  Pairs with `TableReader.sample`, which loads the epoch before the state.
7. Formatting stores the magic last: a reader that finds it finds everything else.
8. A reader trusts a table only until `trusted_until_ns`: a writer that died cannot raise the epoch any more.
"""

import threading
from collections.abc import Iterable
from typing import Final, NamedTuple, cast

from coherency.errors import TableError
from coherency.ids import Epoch, HostInode, SlotIndex
from coherency.shm_abi import (
    ABI_VERSION,
    ABI_VERSION_WORD,
    DEFAULT_SLOT_COUNT,
    EPOCH_WORD,
    HASH_ID_WORD,
    HASH_SPLITMIX64,
    HEADER_BYTES,
    HEADER_BYTES_WORD,
    HEARTBEAT_PERIOD_NS,
    HEARTBEAT_WORD,
    MAGIC,
    MAGIC_WORD,
    SLOT_COUNT_WORD,
    SLOTS_OFFSET_BYTES,
    SLOTS_OFFSET_WORD,
    STATE_WORD,
    TABLE_BYTES_WORD,
    TABLE_ID_HIGH_WORD,
    TABLE_ID_LOW_WORD,
    TRUST_MARGIN_NS,
    TRUST_NS,
    U64_MAX,
    WORD_BYTES,
    Layout,
    Stamp,
    State,
    bytes_needed,
    check_layout,
    odd_slots,
    read_layout,
    require_platform,
    require_words,
    splitmix64,
)

__all__ = [
    "DEFAULT_SLOT_COUNT",
    "EPOCH_WORD",
    "HEARTBEAT_PERIOD_NS",
    "HEARTBEAT_WORD",
    "STATE_WORD",
    "TRUST_MARGIN_NS",
    "TRUST_NS",
    "ReaderStatistics",
    "Stamp",
    "State",
    "TableReader",
    "TableWriter",
    "WriterStatistics",
    "bytes_needed",
    "require_platform",
    "splitmix64",
]

_SERVING: Final = int(State.SERVING)


class WriterStatistics(NamedTuple):
    """Counters of a `TableWriter`, taken at one instant."""

    bumps: int
    """Changes ended, counted once for every slot they touched, since this writer exists."""
    changes_in_flight: int
    """Changes begun and not ended, counted the same way."""
    epoch: Epoch
    slot_count: int
    table_bytes: int


class ReaderStatistics(NamedTuple):
    """What a `TableReader` knows."""

    epoch: Epoch
    state: State
    trusted_until_ns: int
    withdrawn: bool
    slot_count: int
    table_bytes: int


class TableWriter:
    """The one writer of a table.  All methods may be called from any thread.

    Make one with `create` (fresh memory) or `adopt` (the table of a predecessor).  Both leave the table CLOSED, so that
    the owner can get everything else ready before `set_state(State.SERVING)`.
    """

    def __init__(self, words: memoryview, layout: Layout) -> None:
        """Use `create` or `adopt` instead: this constructor writes nothing and checks nothing."""
        self.words = words
        self.slot_count = layout.slot_count
        self.table_bytes = layout.table_bytes
        self.table_id = layout.table_id
        self._layout = layout
        self._mask = layout.slot_count - 1
        self._slots = words[layout.slots_word : layout.slots_word + layout.slot_count]
        self._in_flight: dict[SlotIndex, int] = {}
        self._bumps = 0
        self._lock = threading.Lock()

    @classmethod
    def create(cls, words: memoryview, *, slot_count: int, table_id: tuple[int, int]) -> "TableWriter":
        """Format fresh, zeroed memory of at least `bytes_needed(slot_count)` bytes: state CLOSED, epoch 1.

        `table_id` is two random u64, never used for another table.  Only the header is touched: a slot of zeroed memory
        is settled at version 0.  Raises `TableError` if the memory is unsuitable or its header is not all zero: a table
        in use must be adopted, since versions that start again would let readers believe what they cached (rule 3).
        """
        require_platform()
        require_words(words)
        table_bytes = bytes_needed(slot_count)
        if words.readonly:
            raise TableError("the memory of a table to be created is read-only")
        if words.nbytes < table_bytes:
            raise TableError(f"{slot_count} slots need {table_bytes} bytes, the memory has {words.nbytes}")
        if any(words[: SLOTS_OFFSET_BYTES // WORD_BYTES]):
            raise TableError("the memory is not fresh: a table can only be created in zeroed memory")
        if not all(0 <= half <= U64_MAX for half in table_id):
            raise ValueError(f"table id is not two u64: {table_id}")
        words[ABI_VERSION_WORD] = ABI_VERSION
        words[HEADER_BYTES_WORD] = HEADER_BYTES
        words[TABLE_BYTES_WORD] = table_bytes
        words[TABLE_ID_HIGH_WORD], words[TABLE_ID_LOW_WORD] = table_id
        words[SLOT_COUNT_WORD] = slot_count
        words[SLOTS_OFFSET_WORD] = SLOTS_OFFSET_BYTES
        words[HASH_ID_WORD] = HASH_SPLITMIX64
        words[STATE_WORD] = State.CLOSED
        words[EPOCH_WORD] = 1
        words[MAGIC_WORD] = MAGIC  # last, rule 7; pairs with the first load in read_layout()
        return cls(words, read_layout(words))

    @classmethod
    def adopt(cls, words: memoryview) -> "TableWriter":
        """Take over the table of a predecessor that is known to be dead (the caller holds the lock on its name).

        Changes that died half-way left odd words: they are rounded up to the next even value.  The epoch grows, so that
        nothing cached before is used again.  The state is CLOSED afterwards.  Raises `TableError`, having written
        nothing, if the memory holds no sound table: then give it up and create one elsewhere.
        """
        layout = read_layout(words)
        if words.readonly:
            raise TableError("the memory of a table to be adopted is read-only")
        writer = cls(words, layout)
        slots = writer._slots
        words[STATE_WORD] = State.CLOSED
        for slot in odd_slots(slots):
            slots[slot] += 1
        words[EPOCH_WORD] += 1  # after the rounding, rule 6: no word that it made even is usable under the old epoch
        return writer

    def slots_of(self, inodes: Iterable[HostInode]) -> tuple[SlotIndex, ...]:
        """Return the slots of these inodes in ascending order, each once: what `begin` and `end` take."""
        mask = self._mask
        return cast("tuple[SlotIndex, ...]", tuple(sorted({splitmix64(inode) & mask for inode in inodes})))

    def begin(self, slots: tuple[SlotIndex, ...]) -> None:
        """Begin a change: when this returns, the words of `slots` are odd and nobody may use or cache anything of them.

        Every `begin` is followed by one `end` with the same slots, also if the change failed.  If `begin` itself
        raises, the change has not begun and no `end` is due.  `slots` as from `slots_of`; raises `IndexError` if one of
        them is not in the table.
        """
        words, in_flight = self._slots, self._in_flight
        if min(slots, default=0) < 0:
            raise IndexError(f"no slot is below 0: {slots}")
        with self._lock:
            begun = 0
            try:
                for slot in slots:
                    word = words[slot]
                    in_flight[slot] = in_flight.get(slot, 0) + 1
                    # Decided by the word, not by the count: should an interrupt tear these two steps apart, the word
                    # stays odd too long, which costs refreshes, but is never even while a change is in flight.
                    if not word & 1:
                        words[slot] = word + 1
                    begun += 1
            except BaseException:
                self._settle(slots[:begun])
                raise
        # Releasing the lock is a locked instruction: other processors see the odd words before the caller's next load.

    def end(self, slots: tuple[SlotIndex, ...]) -> None:
        """End a change begun with the same slots, after it was applied, or after it failed.

        Words whose last change this was become even, one higher.  Raises `ValueError`, and changes nothing, if one of
        the slots has no change in flight.
        """
        with self._lock:
            in_flight = self._in_flight
            for slot in slots:
                if slot not in in_flight:
                    raise ValueError(f"slot {slot} has no change in flight")
            self._settle(slots)
            self._bumps += len(slots)

    def bump(self, inodes: Iterable[HostInode]) -> None:
        """Announce a change that is already made: `begin` and `end` in one.  Nothing fetched before is used again."""
        slots = self.slots_of(inodes)
        self.begin(slots)
        self.end(slots)

    def advance_epoch(self) -> Epoch:
        """Raise the epoch: nothing that any reader cached before is used again.  Returns the new epoch."""
        with self._lock:
            return self._advance_epoch()

    def set_state(self, state: State) -> None:
        """Store the state.  Readers take samples only while it is SERVING; use `close` to end serving."""
        with self._lock:
            self.words[STATE_WORD] = state

    def beat(self) -> None:
        """Move the heartbeat.  Call it every `HEARTBEAT_PERIOD_NS`: readers distrust a table that is silent."""
        with self._lock:
            self.words[HEARTBEAT_WORD] += 1

    def close(self) -> None:
        """Stop serving: no reader takes samples, nothing cached validates.  Changes in flight may still be ended.

        The memory stays as it is; `set_state(State.SERVING)` would open the table again.
        """
        with self._lock:
            self.words[STATE_WORD] = State.CLOSED  # before the epoch, rule 6; pairs with the loads in sample()
            self._advance_epoch()

    def statistics(self) -> WriterStatistics:
        """Return the counters, all taken at one instant."""
        with self._lock:
            in_flight = sum(self._in_flight.values())
            epoch = Epoch(self.words[EPOCH_WORD])
            return WriterStatistics(self._bumps, in_flight, epoch, self.slot_count, self.table_bytes)

    def check(self) -> None:
        """Raise `AssertionError` if an invariant is broken.  Scans the whole table under the lock: for tests."""
        with self._lock:
            check_layout(self.words, self._layout)
            odd = set(odd_slots(self._slots))
            if odd != self._in_flight.keys():
                raise AssertionError(f"odd slots {sorted(odd)}, in flight {sorted(self._in_flight)}")
            if any(count < 1 for count in self._in_flight.values()):
                raise AssertionError(f"in-flight counts below one: {self._in_flight}")
            if self.words[EPOCH_WORD] < 1:
                raise AssertionError("the epoch is 0")

    def _settle(self, slots: tuple[SlotIndex, ...]) -> None:
        words, in_flight = self._slots, self._in_flight
        for slot in slots:
            count = in_flight[slot] - 1
            if count:
                in_flight[slot] = count
            else:
                words[slot] += 1
                del in_flight[slot]

    def _advance_epoch(self) -> Epoch:
        epoch = Epoch(self.words[EPOCH_WORD] + 1)
        self.words[EPOCH_WORD] = epoch
        return epoch


class TableReader:
    """A reader of a table.  Methods may be called from any thread; none of them waits or makes a system call.

    Use of a cached value needs two things: `valid(stamp)`, and a clock, read after the request arrived, that is below
    `trusted_until_ns` (rule 8).  Hot paths compare `words[stamp.word]` and `words[epoch_word]` themselves.
    """

    epoch_word: Final = EPOCH_WORD

    def __init__(self, words: memoryview, *, trust_ns: int = TRUST_NS, table_id: tuple[int, int] | None = None) -> None:
        """Validate the header.  Raises `TableError` if this is no table, or not the one that `table_id` names.

        `words` may be longer than the table.  `trust_ns` is what the daemon announced.  A new reader trusts nothing:
        see `vouch` and `pulse`.
        """
        layout = read_layout(words)
        if table_id is not None and table_id != layout.table_id:
            raise TableError(f"this is table {layout.table_id}, not {table_id}")
        self.words = words
        self.slot_count = layout.slot_count
        self.table_bytes = layout.table_bytes
        self.table_id = layout.table_id
        self.trust_ns = trust_ns
        self.trusted_until_ns = 0
        self._layout = layout
        self._slots_word = layout.slots_word
        self._mask = layout.slot_count - 1
        self._beat: int = words[HEARTBEAT_WORD]
        self._pulse_ns: int | None = None
        self._withdrawn = False
        self._trust_lock = threading.Lock()

    @property
    def epoch(self) -> Epoch:
        """The epoch now."""
        return Epoch(self.words[EPOCH_WORD])

    @property
    def state(self) -> State:
        """The state now; values that this program does not know count as CLOSED."""
        return State.SERVING if self.words[STATE_WORD] == _SERVING else State.CLOSED

    def word_of(self, inode: HostInode) -> int:
        """Return the index in `words` of the word that holds this inode's version."""
        return self._slots_word + (splitmix64(inode) & self._mask)

    def slot_of(self, inode: HostInode) -> SlotIndex:
        """Return the slot that holds this inode's version."""
        return SlotIndex(splitmix64(inode) & self._mask)

    def sample(self, inode: HostInode) -> Stamp | None:
        """Return the stamp for what is fetched **after** this call, or None if that may not be cached now.

        None means that a change is in flight or the table is closed: fetch, answer, and forget.
        Fetching before sampling is wrong: a change in between would be stamped as seen.
        """
        words = self.words
        epoch = words[EPOCH_WORD]  # before the state, rule 6; pairs with TableWriter.close()
        if words[STATE_WORD] != _SERVING:
            return None
        word = self._slots_word + (splitmix64(inode) & self._mask)
        version = words[word]  # pairs with the stores in TableWriter.begin() and end()
        if version & 1:
            return None
        return Stamp(word, version, epoch)

    def valid(self, stamp: Stamp) -> bool:
        """Return whether word and epoch still hold the stamp's values.  Does not look at the clock.

        True means that the value was current at some instant during this call, provided that the table was trusted when
        the call began.  A stamp is valid only with the table it was sampled from.
        """
        words = self.words
        word, version, epoch = stamp
        # Two loads need not be atomic: neither word ever takes an old value again, so both held at the first of them.
        return words[word] == version and words[EPOCH_WORD] == epoch

    def pulse(self, now_ns: int) -> None:
        """Look at the heartbeat.  Call it about twice per `HEARTBEAT_PERIOD_NS` with a monotonic clock read before.

        If it moved since the previous pulse, the daemon was alive after that pulse: trust counts from *then* on.  Not
        from now on: this reader may have been stopped for hours, and the daemon dead since shortly after the stop.
        """
        with self._trust_lock:
            beat = self.words[HEARTBEAT_WORD]
            if beat != self._beat and self._pulse_ns is not None:
                self._trust(self._pulse_ns)
            self._beat = beat
            self._pulse_ns = now_ns

    def vouch(self, asked_at_ns: int) -> None:
        """Trust from `asked_at_ns` on: the daemon answered a question on the control channel, asked after that time."""
        with self._trust_lock:
            self._trust(asked_at_ns)

    def withdraw(self) -> None:
        """Trust this table never again: the control channel is gone.  From now on `trusted_until_ns` is 0."""
        with self._trust_lock:
            self._withdrawn = True
            self.trusted_until_ns = 0

    def statistics(self) -> ReaderStatistics:
        """Return what is known of the table now."""
        with self._trust_lock:
            return ReaderStatistics(
                self.epoch, self.state, self.trusted_until_ns, self._withdrawn, self.slot_count, self.table_bytes
            )

    def check(self) -> None:
        """Raise `AssertionError` if the constant part of the table changed, or trust outlived its withdrawal."""
        with self._trust_lock:
            check_layout(self.words, self._layout)
            if self._withdrawn and self.trusted_until_ns:
                raise AssertionError("a withdrawn table is trusted")

    def _trust(self, alive_at_ns: int) -> None:
        if not self._withdrawn:
            self.trusted_until_ns = max(self.trusted_until_ns, alive_at_ns + self.trust_ns)
