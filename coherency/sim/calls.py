"""The calls that workers make, what they are made on, and what each does if it succeeds: the words of a simulation.

``workload`` chooses among them, ``worker`` makes them, ``history`` says what they tell of the files.
"""

from __future__ import annotations

import errno
import stat
from typing import Final, NamedTuple

from coherency.sim.names import Entry

ATTRIBUTE_DIRECTORY: Final = "a"
NAME_DIRECTORIES: Final = ("d0", "d1")
DIRECTORIES: Final = (ATTRIBUTE_DIRECTORY, *NAME_DIRECTORIES)
ATTRIBUTE_FILES: Final = tuple(f"{ATTRIBUTE_DIRECTORY}/{kind}{number}" for kind in ("size", "mtime") for number in "012")
XATTR: Final = "user.coherency-sim"
MODES: Final = 0o1777 + 1  # how many values a mode can take without set-id bits, which a change of the size clears
MTIME_BASE_S: Final = 1_000_000_000
INITIAL_MODE: Final = 0o644

_LETTERS: Final = "abcd"


class Step(NamedTuple):
    """One call. ``other``: the second path, or a symlink's target. ``number``: the value, or a new file's permissions."""

    op: str
    path: str
    other: str = ""
    number: int = 0


Names = dict[str, Entry | None]

# Attribute, as the registers call it, by the call that changes it.
ATTRIBUTE_OF: Final = {"chmod": "mode", "chown": "uid", "truncate": "size", "utime": "mtime", "setxattr": "xattr"}
LOOKS: Final = ("lstat", "stat", "exists", "getxattr", "readlink", "listdir")

# What a call may answer because of what is there, rather than because of a fault.
ANSWERS: Final[dict[str, frozenset[int]]] = {
    "create": frozenset({errno.EEXIST}),
    "mkdir": frozenset({errno.EEXIST}),
    "symlink": frozenset({errno.EEXIST}),
    "link": frozenset({errno.EEXIST, errno.ENOENT}),
    "unlink": frozenset({errno.ENOENT}),
    "rmdir": frozenset({errno.ENOENT}),
    "rename": frozenset({errno.ENOENT}),
    "rename-noreplace": frozenset({errno.ENOENT, errno.EEXIST}),
    "rename-exchange": frozenset({errno.ENOENT}),
    "lstat": frozenset({errno.ENOENT}),
    "stat": frozenset({errno.ENOENT}),
    "exists": frozenset({errno.ENOENT}),
    "readlink": frozenset({errno.ENOENT, errno.EINVAL}),
    "getxattr": frozenset({errno.ENOENT}),
    "listdir": frozenset(),
    **dict.fromkeys(ATTRIBUTE_OF, frozenset({errno.ENOENT})),
}
CREATES: Final = {"create": stat.S_IFREG, "mkdir": stat.S_IFDIR, "symlink": stat.S_IFLNK}
REMOVES: Final = ("unlink", "rmdir")
RENAMES: Final = ("rename", "rename-noreplace", "rename-exchange")


def changed_attribute(path: str) -> str:
    """Of an attribute file: ``size`` or ``mtime``, whichever of the two is changed."""
    return path.removeprefix(f"{ATTRIBUTE_DIRECTORY}/").rstrip("0123456789")


def names_of(group: int, generation: int) -> list[str]:
    """The paths of a group, in two directories."""
    return [
        f"{NAME_DIRECTORIES[place % len(NAME_DIRECTORIES)]}/g{group}.{generation}.{letter}"
        for place, letter in enumerate(_LETTERS)
    ]


def made_by(step: Step, ino: int | None) -> Entry:
    """What a create, mkdir or symlink puts there."""
    kind = CREATES[step.op]
    if kind == stat.S_IFLNK:
        return Entry(kind | 0o777, ino, step.other)
    return Entry(kind | step.number, ino)


def after(step: Step, names: Names, made: Entry | None) -> Names:
    """What is there after ``step`` has succeeded. ``made``: by :func:`made_by`, if it makes anything."""
    changed = dict(names)
    if step.op in CREATES:
        changed[step.path] = made
    elif step.op in REMOVES:
        changed[step.path] = None
    elif step.op == "link":
        changed[step.other] = names[step.path]
    else:
        changed[step.other] = names[step.path]
        changed[step.path] = names[step.other] if step.op == "rename-exchange" else None
    return changed
