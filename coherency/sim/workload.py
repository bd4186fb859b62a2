"""What the workers do: a random choice of calls, from a seeded Random and nothing else.

Two populations, made so that the history can be checked exactly:

1. *Attribute files* keep their names. All workers of all guests change them at once, each change with a value that no
   other change of that attribute of that file has: those histories are *unique* (see ``checker``). A file has either
   its size changed or its mtime, since a change of the size sets the mtime.
2. *Groups* of names lie in directories that all groups share. Whoever changes a name holds its group's lock, which
   has nothing to do with the file system under test; so the changes of one name come one after the other, from
   changing guests, and whoever makes one knows what is there: those histories are *ordered*. Nobody who looks takes a lock.
3. When a change of a name may or may not have happened, nobody knows any more what is there: its group is retired and goes
   on with fresh names, the next *generation*.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from typing import Final

from coherency.sim.calls import (
    ATTRIBUTE_FILES,
    CREATES,
    INITIAL_MODE,
    LOOKS,
    MODES,
    Names,
    Step,
    changed_attribute,
    names_of,
)
from coherency.sim.names import Entry

_FAILS_ON_PURPOSE: Final = 0.1
# In the order of LOOKS.
_LOOK_WEIGHTS_ATTRIBUTE: Final = (8, 8, 1, 4, 0, 1)
_LOOK_WEIGHTS_NAME: Final = (8, 4, 4, 0, 4, 1)


class Workload:
    """The calls of one worker, in an order that depends on ``random`` and on what it is told, only."""

    def __init__(self, random: Random, *, worker: int, workers: int, groups: int) -> None:
        """``worker``: which of all ``workers`` it is; values are unique because each has a residue class of its own."""
        self._random, self._groups = random, groups
        self._numbers: dict[tuple[str, str], Iterator[int]] = {}
        self._worker, self._workers = worker, workers

    def pick_group(self) -> int:
        return self._random.randrange(self._groups)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def change_attribute(self) -> Step:
        """A change with a value that is used once: only of a mode are there too few of them for a long run."""
        while True:
            path = self._random.choice(ATTRIBUTE_FILES)
            timed = "truncate" if changed_attribute(path) == "size" else "utime"
            op = self._random.choices(("chmod", "chown", timed, "setxattr"), (1, 3, 6, 4))[0]
            number = self._number(op, path)
            if op != "chmod" or (number < MODES and number != INITIAL_MODE):
                return Step(op, path, number=number)

    def _number(self, op: str, path: str) -> int:
        """1 and up: 0 is what the registers begin with, but for the mode."""
        numbers = self._numbers.setdefault((op, path), itertools.count(1 + self._worker, self._workers))
        return next(numbers)

    def change_name(self, names: Names, serial: int) -> Step:
        """A change of a group that looks like ``names``. ``serial``: tells one symlink's target from all others."""
        while True:
            step = self._change_name(names, serial)
            if step is not None:
                return step

    def _change_name(self, names: Names, serial: int) -> Step | None:
        random = self._random
        there = [path for path, entry in names.items() if entry is not None]
        free = [path for path, entry in names.items() if entry is None]
        on_purpose = self.chance(_FAILS_ON_PURPOSE)
        op = random.choices(
            ("create", "mkdir", "symlink", "link", "unlink", "rename", "rename-noreplace", "rename-exchange"),
            (6, 3, 3, 3, 6, 4, 2, 3),
        )[0]
        if op in CREATES:
            places = there if on_purpose else free
            target = f"t{self._worker}.{serial}" if op == "symlink" else ""
            return Step(op, random.choice(places), target, random.randrange(0o1000)) if places else None
        if op == "unlink":
            places = free if on_purpose else there
            if not places:
                return None
            path = random.choice(places)
            entry = names[path]
            return Step("rmdir" if entry and entry.is_directory else "unlink", path)
        if not there:
            return None
        path = random.choice(there)
        return self._second(op, path, names, free, there, on_purpose)

    def _second(
        self, op: str, path: str, names: Names, free: list[str], there: list[str], on_purpose: bool
    ) -> Step | None:
        """The second path of a link or rename, such that the outcome is certain."""
        source = names[path]
        assert source is not None
        others = [each for each in there if each != path]
        if op == "link":
            places = [] if source.is_directory else others if on_purpose else free
        elif op == "rename-noreplace":
            places = others if on_purpose else free
        elif op == "rename-exchange":
            places = others
        else:
            # Renaming one name of a file to another of the same file does nothing at all.
            places = free + [each for each in others if _replaces(source, names[each])]
        return Step(op, path, self._random.choice(places)) if places else None

    def look(self, generations: list[int]) -> Step:
        """A look at an attribute file, or at a name of a group in its present generation."""
        random = self._random
        if random.random() < 0.5:
            op = random.choices(LOOKS, _LOOK_WEIGHTS_ATTRIBUTE)[0]
            path = random.choice(ATTRIBUTE_FILES)
        else:
            op = random.choices(LOOKS, _LOOK_WEIGHTS_NAME)[0]
            group = self.pick_group()
            path = random.choice(names_of(group, generations[group]))
        return Step(op, path.partition("/")[0] if op == "listdir" else path)


def _replaces(source: Entry, replaced: Entry | None) -> bool:
    return replaced is not None and source.is_directory == replaced.is_directory and source.ino != replaced.ino
