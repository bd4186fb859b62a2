"""The calls that workers make, what they are made on, and what each does if it succeeds: the words of a simulation.

``workload`` chooses among them, ``worker`` makes them, ``history`` says what they tell of the files.

What they are made on belongs to one of two kinds of things: *attribute files*, which all workers change at any time, and
*groups*. A group is a few paths that belong together; there are four kinds of them, see ``workload``. A group has
*generations*, of which one is in use at a time, each with paths of its own.
"""

from __future__ import annotations

import errno
import stat
from typing import Final, NamedTuple

from coherency.sim.names import UNKNOWN, Entry

ATTRIBUTE_DIRECTORY: Final = "a"
KEPT_DIRECTORY: Final = "k"
NAME_DIRECTORIES: Final = ("d0", "d1")
DIRECTORIES: Final = (ATTRIBUTE_DIRECTORY, KEPT_DIRECTORY, *NAME_DIRECTORIES)
ATTRIBUTE_FILES: Final = tuple(f"{ATTRIBUTE_DIRECTORY}/{kind}{number}" for kind in ("size", "mtime") for number in "012")
COPY_SOURCE: Final = f"{KEPT_DIRECTORY}/source"
PAGE_BYTES: Final = 1 << 12  # as long is the source of copies
XATTR: Final = "user.coherency-sim"
MODES: Final = 0o1777 + 1  # how many values a mode can take without set-id bits, which a change of the size clears
MTIME_BASE_S: Final = 1_000_000_000
INITIAL_MODE: Final = 0o644
INSIDE: Final = "in"  # the file in each directory of a tree


class Step(NamedTuple):
    """One call. ``other``: the second path, a symlink's target, or how many bytes are added.

    ``number``: the value, the new size, or a new file's permissions.
    """

    op: str
    path: str
    other: str = ""
    number: int = 0


Names = dict[str, Entry | None]

# Attribute, as the registers call it, by the call that changes it.
ATTRIBUTE_OF: Final = {
    "chmod": "mode", "fchmod": "mode", "chown": "uid", "truncate": "size", "append": "size", "open-truncate": "size",
    "fallocate": "size", "copy_file_range": "size", "utime": "mtime", "setxattr": "xattr", "removexattr": "xattr",
}  # fmt: skip
UNIQUE_CHANGES: Final = ("chmod", "chown", "truncate", "utime", "setxattr")  # those made on attribute files
LOOKS: Final = ("lstat", "stat", "fstat", "open", "exists", "getxattr", "readlink", "listdir")

# What a call may answer because of what is there, rather than because of a fault.
ANSWERS: Final[dict[str, frozenset[int]]] = {
    "create": frozenset({errno.EEXIST}),
    "open-create": frozenset(),
    "mkdir": frozenset({errno.EEXIST}),
    "mknod": frozenset({errno.EEXIST}),
    "symlink": frozenset({errno.EEXIST}),
    "link": frozenset({errno.EEXIST, errno.ENOENT}),
    "unlink": frozenset({errno.ENOENT}),
    "rmdir": frozenset({errno.ENOENT}),
    "rename": frozenset({errno.ENOENT}),
    "rename-noreplace": frozenset({errno.ENOENT, errno.EEXIST}),
    "rename-exchange": frozenset({errno.ENOENT}),
    "lstat": frozenset({errno.ENOENT}),
    "stat": frozenset({errno.ENOENT}),
    "fstat": frozenset({errno.ENOENT}),  # when its descriptor is opened
    "open": frozenset({errno.ENOENT}),
    "exists": frozenset({errno.ENOENT}),
    "readlink": frozenset({errno.ENOENT, errno.EINVAL}),
    "getxattr": frozenset({errno.ENOENT, errno.ENODATA}),
    "listdir": frozenset(),
    **dict.fromkeys(ATTRIBUTE_OF, frozenset({errno.ENOENT})),
    "removexattr": frozenset({errno.ENOENT, errno.ENODATA}),
}
CREATES: Final = {"create": stat.S_IFREG, "mkdir": stat.S_IFDIR, "mknod": stat.S_IFIFO, "symlink": stat.S_IFLNK}
REMOVES: Final = ("unlink", "rmdir")
RENAMES: Final = ("rename", "rename-noreplace", "rename-exchange")
CHANGES: Final = frozenset(ANSWERS) - frozenset(LOOKS)


def changed_attribute(path: str) -> str:
    """Of an attribute file: ``size`` or ``mtime``, whichever of the two is changed."""
    return path.removeprefix(f"{ATTRIBUTE_DIRECTORY}/").rstrip("0123456789")


# ---- groups --------------------------------------------------------------------------------------------------------

NAMES: Final = "names"
TREE: Final = "tree"
KEPT: Final = "kept"
RACE: Final = "race"
# By the first letter of a name, and with how many names.
_PREFIXES: Final = {NAMES: "g", TREE: "t", KEPT: "x", RACE: "r"}
_LETTERS: Final = {NAMES: "abcd", TREE: "abcd", KEPT: "a", RACE: "abc"}
_KIND_OF_PREFIX: Final = {prefix: kind for kind, prefix in _PREFIXES.items()}


class Group(NamedTuple):
    """``kind``: one of the four above."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}{self.number}"


class Scene(NamedTuple):
    """What there is to work on. ``directories``: where the names of the groups lie."""

    names: int
    trees: int = 0
    kept: int = 0
    races: int = 0
    has_attribute_files: bool = True
    directories: tuple[str, ...] = NAME_DIRECTORIES

    def groups(self) -> list[Group]:
        counts = {NAMES: self.names, TREE: self.trees, KEPT: self.kept, RACE: self.races}
        return [Group(kind, number) for kind, count in counts.items() for number in range(count)]

    def names_of(self, group: Group, generation: int) -> list[str]:
        """The names of a group that may be made, moved and removed."""
        prefix = f"{_PREFIXES[group.kind]}{group.number}.{generation}."
        return [
            f"{self.directories[place % len(self.directories)]}/{prefix}{letter}"
            for place, letter in enumerate(_LETTERS[group.kind])
        ]


def kept_file(group: Group, generation: int) -> str:
    """The path of a kept file, which it never loses; the one name of its group comes and goes beside it."""
    return f"{KEPT_DIRECTORY}/x{group.number}.{generation}"


def kind_of(path: str) -> str | None:
    """The kind of the group that a path belongs to; None if it belongs to none."""
    directory, _, rest = path.partition("/")
    if directory == KEPT_DIRECTORY and rest:
        return KEPT
    return _KIND_OF_PREFIX.get(rest[:1]) if directory in NAME_DIRECTORIES else None


def generation_of(path: str) -> str:
    """Of a path of a group: what its group and generation are called, for instance ``r0.3``."""
    return ".".join(path.partition("/")[2].split(".")[:2])


def file_of(path: str) -> str:
    """The path that the attributes of what lies at ``path`` are known by: of the name of a kept file that of the file."""
    return f"{KEPT_DIRECTORY}/{generation_of(path)}" if kind_of(path) == KEPT else path


def made_by(step: Step, ino: int | None) -> Entry:
    """What a call that makes something puts there."""
    kind = CREATES.get(step.op, stat.S_IFREG)
    if kind == stat.S_IFLNK:
        return Entry(kind | 0o777, ino, step.other)
    return Entry(kind | step.number, ino)


def inside_of(entry: Entry | None) -> Entry | None:
    """What lies at INSIDE in a directory of a tree, for the one who looks along its name."""
    if entry is UNKNOWN:
        return UNKNOWN
    return None if entry is None or entry.inside is None else Entry(stat.S_IFREG | INITIAL_MODE, entry.inside)


def after(step: Step, names: Names, made: Entry | None) -> Names:
    """What is there after ``step`` has succeeded. ``made``: by :func:`made_by`, if it makes anything."""
    changed = dict(names)
    if step.op in CREATES or step.op == "open-create":
        changed[step.path] = made
    elif step.op in REMOVES:
        changed[step.path] = None
    elif step.op == "link":
        changed[step.other] = names[step.path]
    else:
        changed[step.other] = names[step.path]
        changed[step.path] = names[step.other] if step.op == "rename-exchange" else None
    return changed
