"""The user cache of an agent: what was fetched, believed for as long as the versions agree.

1. Every entry carries the stamps of all inodes that it was derived from, each sampled before the fetch. It is used iff
   every word and the epoch still hold the sampled values, and the table is trusted at the time of use.
2. What could not be sampled (a change was in flight) is answered once and not kept.
3. The cache is bounded: beyond ``capacity`` units the least recently used entries go. An entry that is gone costs a fetch.
4. A cache belongs to one table for life. After a reconnection to another there is a new cache; what is still being stored
   into the old one is never read again. After a reconnection to the same table it goes on with a new reader (``follow``).

Pure: the clock is an argument. Methods may be called from any thread; ``get`` and ``hit`` take no lock, each of
their steps is one operation of a dict.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from coherency.ids import HostInode
from coherency.shm_table import Stamp, TableReader

DEFAULT_CAPACITY: Final = 1_000_000
Entry: TypeAlias = tuple[Any, tuple[tuple[int, int], ...], int, int]


@dataclass
class Counters:
    """What became of the questions to a cache; they outlive it.

    Counted without a lock: under contention one may be lost. They are for people, and no guarantee rests on them.
    """

    hits: int = 0  # answered from the cache
    misses: int = 0  # nothing was there
    refreshes: int = 0  # something was there, and it was stale
    fetches: int = 0  # system calls that went to the lower directory, for who counts them one by one


class UserCache:
    """Answers keyed by anything hashable, each valid as long as its stamps are."""

    def __init__(
        self,
        reader: TableReader,
        counters: Counters,
        *,
        capacity: int = DEFAULT_CAPACITY,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``capacity``: units, one for an entry and more for big ones (see ``put``)."""
        self.reader, self.counters, self.capacity = reader, counters, capacity
        self.words, self.epoch_word, self._clock_ns = reader.words, reader.epoch_word, clock_ns
        # For hot paths that look inside ``get`` themselves: key to (value, ((word, version), ...), epoch, units).
        self.entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._units = 0
        self._lock = threading.Lock()  # of what ``put`` and ``clear`` change

    def follow(self, reader: TableReader) -> None:
        """Use another reader of the same table from now on, since the old one has been withdrawn; a `ValueError` for another table.

        What was kept goes on being valid: the words have been kept up to date all the time, there was only nobody to vouch for it.
        """
        if reader.table_id != self.reader.table_id:
            raise ValueError("another table needs another cache")
        self.words = reader.words  # the same memory
        self.reader = reader

    def sample(self, ino: HostInode) -> Stamp | None:
        """To be called before fetching what depends on ``ino``; what it returns goes to ``put``."""
        return self.reader.sample(ino)

    def get(self, key: Hashable) -> Any | None:
        """The valid answer, or None: fetch it."""
        value = self.hit(key)
        if value is None:
            if key in self.entries:
                self.counters.refreshes += 1
            else:
                self.counters.misses += 1
        return value

    def hit(self, key: Hashable) -> Any | None:
        """Like ``get``, but only a hit is counted: for who asks again by ``get`` before fetching."""
        entry = self.entries.get(key)
        if entry is None or not self._is_valid(entry):
            return None
        self.counters.hits += 1
        try:
            self.entries.move_to_end(key)
        except KeyError:  # evicted meanwhile; the answer is right all the same
            pass
        return entry[0]

    def peek(self, key: Hashable) -> Any | None:
        """Like ``get``, but neither counted nor regarded as a use."""
        entry = self.entries.get(key)
        return entry[0] if entry is not None and self._is_valid(entry) else None

    def _is_valid(self, entry: Entry) -> bool:
        words = self.words
        for word, version in entry[1]:
            if words[word] != version:  # pairs with TableWriter.begin
                return False
        return words[self.epoch_word] == entry[2] and self._clock_ns() < self.reader.trusted_until_ns

    def put(self, key: Hashable, value: Any, *stamps: Stamp | None, units: int = 1) -> None:
        """Keep ``value`` (not None), which was fetched after ``stamps`` were sampled. Without all of them it is not kept."""
        epoch = stamps[0].epoch if stamps and stamps[0] is not None else -1
        pairs = []
        for stamp in stamps:
            if stamp is None or stamp.epoch != epoch:
                return
            pairs.append((stamp.word, stamp.version))
        if not pairs or units > self.capacity:
            return
        with self._lock:
            old = self.entries.pop(key, None)
            self._units += units - (old[3] if old else 0)
            self.entries[key] = value, tuple(pairs), epoch, units
            while self._units > self.capacity:
                self._units -= self.entries.popitem(last=False)[1][3]

    def discard(self, key: Hashable) -> None:
        """What was kept under ``key`` has turned out to be wrong, whatever the versions say."""
        with self._lock:
            old = self.entries.pop(key, None)
            self._units -= old[3] if old else 0

    def clear(self) -> None:
        with self._lock:
            self.entries.clear()
            self._units = 0

    def __len__(self) -> int:
        return len(self.entries)

    def check(self) -> None:
        """The invariants that hold at any time; raises AssertionError."""
        with self._lock:
            assert self._units == sum(entry[3] for entry in self.entries.values()), "units"
            assert self._units <= self.capacity, "capacity"
            assert all(entry[1] for entry in self.entries.values()), "an entry without a stamp"
