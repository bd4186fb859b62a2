"""What the workers of all guests know together of the groups, in a directory that has nothing to do with the share.

The file of a group holds its generation and what it is like, and is read and written under flock by whoever changes the
group. ``words`` has the generation of each group, for those who only look, and for races, which nobody locks; and what somebody is
about to change, so that others look at it meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from coherency.sim.calls import ATTRIBUTE_FILES, KEPT, Group, Names, Scene
from coherency.sim.names import Entry
from coherency.sim.workload import Kept

_WORDS_FILE: Final = "words"
_WORD_BYTES: Final = 8
_READ_BYTES: Final = 1 << 16


def prepare_plots(directory: Path, scene: Scene) -> None:
    """Fresh groups, with nothing in them."""
    groups = scene.groups()
    for group in groups:
        (directory / str(group)).write_text(json.dumps([0, None]))
    (directory / _WORDS_FILE).write_bytes(bytes(_WORD_BYTES * (len(groups) + 1)))


class Plots:
    """Of one worker. What a group is like: a ``Kept``, or the ``Names`` that are there."""

    def __init__(self, directory: Path, scene: Scene) -> None:
        self._scene, self._groups = scene, scene.groups()
        self._files = {group: os.open(directory / str(group), os.O_RDWR | os.O_CLOEXEC) for group in self._groups}
        with open(directory / _WORDS_FILE, "r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), _WORD_BYTES * (len(self._groups) + 1))).cast("Q")
        self._places: list[Group | str] = [*self._groups, *ATTRIBUTE_FILES]

    def generations(self) -> dict[Group, int]:
        """Those in use."""
        return dict(zip(self._groups, self._words.tolist(), strict=False))

    def announce(self, place: Group | str) -> None:
        """This group, or attribute file, is about to be changed."""
        self._words[-1] = (self._words[-1] // len(self._places) + 1) * len(self._places) + self._places.index(place)

    @property
    def news(self) -> int:
        """Another number after each ``announce``, but for some that come at once."""
        return self._words[-1]

    def announced(self) -> Group | str:
        """What was announced last."""
        return self._places[self._words[-1] % len(self._places)]

    @contextlib.contextmanager
    def locked(self, group: Group) -> Iterator[tuple[int, Kept | Names] | None]:
        """The generation of the group and what it is like, for whoever holds its lock; None if somebody else does."""
        fd = self._files[group]
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        try:
            generation, state = json.loads(os.pread(fd, _READ_BYTES, 0))
            yield generation, self._loaded(group, generation, state)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def store(self, group: Group, generation: int, state: Kept | Names) -> None:
        """By the holder of the lock."""
        self._write(group, generation, list(state) if isinstance(state, Kept) else list(state.values()))

    def retire(self, group: Group, generation: int) -> None:
        """By the holder of the lock: go on with the next generation."""
        self._write(group, generation + 1, None)

    def retire_race(self, group: Group, generation: int) -> None:
        """By anybody who has found that it cannot go on. Others may have found so, too."""
        fd = self._files[group]
        fcntl.flock(fd, fcntl.LOCK_EX)
        if self.generations()[group] == generation:
            self.retire(group, generation)
        fcntl.flock(fd, fcntl.LOCK_UN)

    def _write(self, group: Group, generation: int, state: Any) -> None:
        data = json.dumps([generation, state]).encode()
        os.ftruncate(self._files[group], os.pwrite(self._files[group], data, 0))
        self._words[self._groups.index(group)] = generation

    def _loaded(self, group: Group, generation: int, state: Any) -> Kept | Names:
        if group.kind == KEPT:
            if state is None:
                return Kept()
            entry, *rest = state
            return Kept(_entry(entry), *rest)
        paths = self._scene.names_of(group, generation)
        return dict(zip(paths, map(_entry, state or [None] * len(paths)), strict=True))


def _entry(fields: list[Any] | None) -> Entry | None:
    return None if fields is None else Entry(*fields)
