"""What the workers do: a random choice of calls, from a seeded Random and nothing else.

Populations, made so that the history can be checked exactly:

1. *Attribute files* keep their names. All workers of all guests change them at once, each change with a value that no
   other change of that attribute of that file has: those histories are *unique* (see ``checker``). A file has either
   its size changed or its mtime, since a change of the size sets the mtime.
2. *Names*: groups of names in directories that all groups share, for files, directories, symlinks and FIFOs that come and
   go. Whoever changes a name holds its group's lock, which has nothing to do with the file system under test; so the
   changes of one name come one after the other, from changing guests, and whoever makes one knows what is there: those
   histories are *ordered*. Nobody who looks takes a lock.
3. *Trees*: groups likewise, of directories with something in them, which are made once, and then only moved and
   exchanged. So whoever finds the file in one of them found that directory under its name.
4. *Kept files*: groups likewise, of one file that stays and is changed in ways which cannot be unique: its size by
   appending, truncating on opening, allocating and copying; its links; xattrs that come and go. Ordered, too.
5. *Races*: groups of names that everybody changes at any time, without a lock. Those histories are searched (see
   ``search``), for all names of the group at once.

When a change of a group may or may not have happened, nobody knows any more what is there: the group is retired and goes on
with fresh paths, the next *generation*. It is made through the mounts like everything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from random import Random
from typing import Final, NamedTuple

from coherency.sim.calls import (
    ATTRIBUTE_FILES,
    CREATES,
    INITIAL_MODE,
    INSIDE,
    KEPT,
    LOOKS,
    MODES,
    PAGE_BYTES,
    RACE,
    TREE,
    Group,
    Names,
    Scene,
    Step,
    changed_attribute,
    kept_file,
)
from coherency.sim.names import Entry

_FAILS_ON_PURPOSE: Final = 0.1
_DIRECTORIES_OF_A_TREE: Final = 2
_ATTRIBUTE_CHANGES: Final = 0.4
# In the order of LOOKS.
_WEIGHTS_ATTRIBUTE: Final = (8, 8, 4, 2, 1, 4, 0, 1)
_WEIGHTS_NAME: Final = (8, 4, 0, 2, 4, 0, 4, 1)
_WEIGHTS_TREE: Final = (4, 4, 0, 2, 2, 0, 0, 1)
_WEIGHTS_KEPT: Final = (6, 6, 4, 2, 1, 4, 0, 0)
_WEIGHTS_RACE: Final = (8, 2, 0, 1, 2, 0, 8, 0)


class Kept(NamedTuple):
    """What a kept file is like. ``entry``: as it was made; None: it is still to be made."""

    entry: Entry | None = None
    linked: bool = False
    size: int = 0
    xattr: str | None = None
    mode: int = 0


class Workload:
    """The calls of one worker, in an order that depends on ``random`` and on what it is told, only."""

    def __init__(self, random: Random, scene: Scene, *, worker: int, workers: int) -> None:
        """``worker``: which of all ``workers`` it is; values are unique because each has a residue class of its own."""
        self._random, self._scene = random, scene
        self._groups = scene.groups()
        self._numbers: dict[tuple[str, str], Iterator[int]] = {}
        self._worker, self._workers = worker, workers
        self._serials = itertools.count()

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick_group(self) -> Group | None:
        """What to change next; None: an attribute file."""
        if self._scene.has_attribute_files and self.chance(_ATTRIBUTE_CHANGES):
            return None
        return self._random.choice(self._groups)

    # ---- attribute files ----

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

    # ---- names and races ----

    def change_name(self, names: Names) -> Step:
        """A change of a group that looks like ``names``, such that its outcome is certain."""
        while True:
            step = self._change_name(names)
            if step is not None:
                return step

    def _change_name(self, names: Names) -> Step | None:
        random = self._random
        there = [path for path, entry in names.items() if entry is not None]
        free = [path for path, entry in names.items() if entry is None]
        on_purpose = self.chance(_FAILS_ON_PURPOSE)
        op = random.choices(
            ("create", "open-create", "mkdir", "mknod", "symlink", "link", "unlink", "rename", "rename-noreplace", "rename-exchange"),
            (4, 3, 3, 1, 3, 3, 6, 4, 2, 3),
        )[0]
        if op == "open-create":
            places = [path for path in there if _is_regular(names[path])] if self.chance(0.5) else free
            return Step(op, random.choice(places), number=self._permissions()) if places else None
        if op in CREATES:
            places = there if on_purpose else free
            return self._creation(op, random.choice(places)) if places else None
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

    def _creation(self, op: str, path: str) -> Step:
        target = f"t{self._worker}.{next(self._serials)}" if op == "symlink" else ""
        return Step(op, path, target, self._permissions())

    def _permissions(self) -> int:
        return self._random.randrange(0o1000)

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

    def race(self, names: list[str]) -> Step:
        """A change of any of ``names``, whatever is there. Nothing is linked: link(2) itself looks first and links later."""
        random = self._random
        op = random.choices(
            ("create", "symlink", "unlink", "rename", "rename-noreplace", "rename-exchange"), (2, 4, 5, 4, 2, 3)
        )[0]
        path, other = random.sample(names, 2)
        if op in CREATES:
            return self._creation(op, path)
        return Step(op, path, "" if op == "unlink" else other)

    # ---- trees ----

    def change_tree(self, names: Names) -> Step:
        """Make what is missing; then move."""
        there = {path: entry for path, entry in names.items() if entry is not None}
        free = [path for path in names if path not in there]
        for path, entry in there.items():
            if entry.inside is None:
                return Step("create", f"{path}/{INSIDE}", number=INITIAL_MODE)
        if len(there) < _DIRECTORIES_OF_A_TREE:
            return Step("mkdir", free[0], number=0o755)
        op = self._random.choices(("rename", "rename-noreplace", "rename-exchange"), (4, 2, 3))[0]
        path = self._random.choice(list(there))
        places = [each for each in there if each != path] if op == "rename-exchange" else free
        return Step(op, path, self._random.choice(places))

    # ---- kept files ----

    def change_kept(self, path: str, name: str, kept: Kept) -> Step:
        """``path``: of the file itself; ``name``: the one that comes and goes."""
        random = self._random
        if kept.entry is None:
            return Step("create", path, number=self._permissions())
        op = random.choices(
            ("append", "open-truncate", "fallocate", "copy_file_range", "setxattr", "removexattr", "fchmod", "link"),
            (6, 3, 3, 3, 3, 3, 3, 8),
        )[0]
        if op == "link":
            return Step("unlink", name) if kept.linked else Step("link", path, name)
        # Every other time through the second name, if it is there.
        path = name if kept.linked and op != "removexattr" and self.chance(0.5) else path
        if op in ("append", "copy_file_range"):
            # Not beyond a page: kernels write page by page, and whoever looks in between sees a part, on any file system.
            count = random.randint(1, PAGE_BYTES - kept.size % PAGE_BYTES)
            return Step(op, path, str(count), kept.size + count)
        if op == "fallocate":
            return Step(op, path, number=kept.size + random.randint(1, PAGE_BYTES))
        if op in ("setxattr", "fchmod"):
            return Step(op, path, number=self._permissions())
        return Step(op, path)

    # ---- looks ----

    def look(self, generations: Mapping[Group, int]) -> Step:
        """A look at an attribute file, or at something of a group in its present generation."""
        if self._scene.has_attribute_files and self.chance(_ATTRIBUTE_CHANGES):
            return self.look_at(self._random.choice(ATTRIBUTE_FILES), generations)
        return self.look_at(self._random.choice(self._groups), generations)

    def look_at(self, place: Group | str, generations: Mapping[Group, int]) -> Step:
        """A look at this group, or at this attribute file."""
        random = self._random
        if isinstance(place, str):
            return self._look(place, _WEIGHTS_ATTRIBUTE)
        group = place
        generation = generations[group]
        names = self._scene.names_of(group, generation)
        if group.kind == KEPT:
            file = kept_file(group, generation)
            step = self._look(random.choice((file, *names)), _WEIGHTS_KEPT)
            return step._replace(path=file) if step.op == "fstat" else step
        path = random.choice(names)
        if group.kind == TREE:
            step = self._look(path, _WEIGHTS_TREE)
            return step._replace(path=f"{path}/{INSIDE}") if step.op != "listdir" and self.chance(0.7) else step
        return self._look(path, _WEIGHTS_RACE if group.kind == RACE else _WEIGHTS_NAME)

    def _look(self, path: str, weights: tuple[int, ...]) -> Step:
        op = self._random.choices(LOOKS, weights)[0]
        return Step(op, path.partition("/")[0] if op == "listdir" else path)


def after_kept(step: Step, kept: Kept, made: Entry | None) -> Kept:
    """What a kept file is like after ``step`` has succeeded. ``made``: the file, if that made it."""
    match step.op:
        case "create":
            return Kept(made, mode=step.number)
        case "link" | "unlink":
            return kept._replace(linked=step.op == "link")
        case "setxattr":
            return kept._replace(xattr=str(step.number))
        case "removexattr":
            return kept._replace(xattr=None)
        case "fchmod":
            return kept._replace(mode=step.number)
        case _:
            return kept._replace(size=step.number)


def _is_regular(entry: Entry | None) -> bool:
    return entry is not None and entry.is_regular


def _replaces(source: Entry, replaced: Entry | None) -> bool:
    return replaced is not None and source.is_directory == replaced.is_directory and source.ino != replaced.ino
