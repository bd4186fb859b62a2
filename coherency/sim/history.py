"""What all workers did and saw, as calls; and as reads and writes of registers, which is what can be checked.

A register is one attribute of one file, or what one name stands for. A call may concern several: an ``lstat``
reads the name and each attribute, a rename writes two names. Each register is checked by itself, which is
enough: a history is linearizable iff that of each register is (Herlihy and Wing). What this leaves out is whether the
two names of a rename changed at one instant. The names of a *race* are no registers: they are checked together (see
``race``), and that is not left out there.

A call that answered something which neither success nor the state of the files explains was disturbed: a change then may
have happened, at any time from its start on; a look has seen nothing.
"""

from __future__ import annotations

import errno
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from coherency.sim.calls import (
    ANSWERS,
    ATTRIBUTE_FILES,
    ATTRIBUTE_OF,
    CHANGES,
    CREATES,
    INITIAL_MODE,
    INSIDE,
    KEPT,
    MTIME_BASE_S,
    RACE,
    REMOVES,
    TREE,
    Step,
    changed_attribute,
    file_of,
    generation_of,
    inside_of,
    kind_of,
)
from coherency.sim.checker import Read, Write
from coherency.sim.names import (
    MISSING,
    NO_LINK,
    NOWHERE,
    PRESENT,
    SOMEWHERE,
    UNKNOWN,
    Entry,
    Look,
    entry_look,
    followed_look,
    target_look,
)

BEGINNING_NS: Final = -1
NAME: Final = "name"
NOTHING: Final = "no file"  # the value of an attribute of what has not been made yet
LOST: Final = -1  # in place of an errno: the call succeeded, and the share does not show what it did
_NEVER_NS: Final = 1 << 62
# For how long listings are still held against names of a group that nobody changes any more.
_LISTED_AFTER_RETIREMENT_NS: Final = 1_000_000_000
_SECOND_NS: Final = 1_000_000_000


class Register(NamedTuple):
    """``what``: ``name``, or an attribute."""

    what: str
    path: str

    def __str__(self) -> str:
        return f"{self.what} of {self.path}" if self.what != NAME else self.path


class Call(NamedTuple):
    """One call of one worker. Times are CLOCK_MONOTONIC of the one machine that all of them run on."""

    guest: int
    worker: int
    start_ns: int
    end_ns: int
    step: Step
    error: int  # errno, or 0, or LOST
    result: Any = None  # what a look returned, see ``worker``
    source: Entry | None = None  # what stood at step.path before a change of names, by whoever holds the lock
    target: Entry | None = None  # and at step.other
    made: Entry | None = None  # what a create made, by a look at the share itself

    @property
    def is_disturbed(self) -> bool:
        """Whether its error is none that the files explain."""
        return bool(self.error) and self.error not in ANSWERS[self.step.op]

    @property
    def is_change(self) -> bool:
        return self.step.op in CHANGES

    @property
    def excusable_from_ns(self) -> int:
        """From when on a fault may be to blame for its error: a descriptor that was opened before one may be of no use after it."""
        return self.result if self.step.op == "fstat" and self.error else self.start_ns


@dataclass
class Accesses:
    """What happened to one register. ``tag`` of each is the number of its call; -1 for the initial value."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


def accesses(calls: Iterable[Call], initial: Mapping[Register, Any]) -> dict[Register, Accesses]:
    """The histories of all registers that ``calls`` concern; those without an initial value begin as no such name."""
    registers: defaultdict[Register, Accesses] = defaultdict(Accesses)
    for register, value in initial.items():
        registers[register].writes.append(Write(BEGINNING_NS, BEGINNING_NS, value))
    listings: list[tuple[int, Call]] = []
    for tag, call in enumerate(calls):
        if call.step.op == "listdir":
            listings.append((tag, call))
        elif kind_of(call.step.path) == RACE:
            continue
        elif call.step.op in ATTRIBUTE_OF:
            _attribute_change(registers, tag, call)
        elif call.is_change:
            _name_change(registers, tag, call)
        else:
            _look(registers, tag, call)
    for register, each in registers.items():
        each.writes.sort(key=lambda write: write.start_ns)
        if register not in initial:
            each.writes.insert(0, Write(BEGINNING_NS, BEGINNING_NS, None if register.what == NAME else NOTHING))
    _hold_listings(registers, listings)
    return dict(registers)


def races(calls: Iterable[Call]) -> dict[str, list[tuple[int, Call]]]:
    """The calls on each generation of each race, with their numbers."""
    found: defaultdict[str, list[tuple[int, Call]]] = defaultdict(list)
    for tag, call in enumerate(calls):
        if kind_of(call.step.path) == RACE:
            found[generation_of(call.step.path)].append((tag, call))
    return dict(found)


def initial_values(inodes: Mapping[str, int]) -> dict[Register, Any]:
    """What the attribute files are like at the beginning. ``inodes``: their inode numbers, by path."""
    initial: dict[Register, Any] = {}
    for path in ATTRIBUTE_FILES:
        initial[Register(NAME, path)] = Entry(stat.S_IFREG | INITIAL_MODE, inodes[path])
        timed = changed_attribute(path)
        values = {"mode": INITIAL_MODE, "uid": 0, "xattr": "0", timed: 0 if timed == "size" else mtime_ns(0)}
        initial.update({Register(what, path): value for what, value in values.items()})
    return initial


def mtime_ns(number: int) -> int:
    """The mtime that stands for a number."""
    return (MTIME_BASE_S + number) * _SECOND_NS + number


def attribute_value(step: Step) -> Any:
    """What a change of an attribute writes."""
    if step.op == "utime":
        return mtime_ns(step.number)
    if step.op == "removexattr":
        return None
    return str(step.number) if step.op == "setxattr" else step.number


def _attribute_change(registers: defaultdict[Register, Accesses], tag: int, call: Call) -> None:
    step = call.step
    attribute = registers[Register(ATTRIBUTE_OF[step.op], file_of(step.path))]
    if call.error and not call.is_disturbed:
        if call.error == errno.ENODATA:
            attribute.reads.append(_read(call, None, tag))
        else:
            registers[Register(NAME, step.path)].reads.append(_read(call, MISSING, tag))
        return
    attribute.writes.append(Write(call.start_ns, call.end_ns, attribute_value(step), not call.error, tag))


def _name_change(registers: defaultdict[Register, Accesses], tag: int, call: Call) -> None:
    """What a change tells of the names before it (that it may be refused is a look, too), and what it does to them."""
    step, op = call.step, call.step.op
    path, other = registers[Register(NAME, step.path)], registers[Register(NAME, step.other)]
    if call.error and not call.is_disturbed:
        if call.error == errno.ENOENT:
            missing = other if op == "rename-exchange" and call.source is None else path
            missing.reads.append(_read(call, MISSING, tag))
        else:
            (path if op in CREATES else other).reads.append(_read(call, PRESENT, tag))
        return
    certain = not call.error

    def write(accesses_of: Accesses, value: Any) -> None:
        accesses_of.writes.append(Write(call.start_ns, call.end_ns, value, certain, tag))

    if kind_of(step.path) == KEPT:
        for what, value in _kept_values(step).items():
            write(registers[Register(what, file_of(step.path))], value)
    if op == "open-create" and call.source is not None:
        if certain:
            path.reads.append(_read(call, followed_look(*call.result[:2]), tag))
        return
    if op in CREATES or op == "open-create":
        if certain and op in CREATES:
            path.reads.append(_read(call, MISSING, tag))
        write(path, call.made)
        return
    if certain:
        path.reads.append(_read(call, PRESENT, tag))
        if op in ("link", "rename-noreplace", "rename-exchange"):
            other.reads.append(_read(call, PRESENT if op == "rename-exchange" else MISSING, tag))
    if op in REMOVES:
        write(path, None)
        return
    # A link is made to the inode that the guest's kernel believes in, whatever its name stands for by now.
    write(other, call.source if certain or op != "link" else UNKNOWN)
    if op != "link":
        left_behind = call.target if op == "rename-exchange" else None
        write(path, left_behind)
        if kind_of(step.path) == TREE:
            write(registers[Register(NAME, f"{step.other}/{INSIDE}")], inside_of(call.source))
            write(registers[Register(NAME, f"{step.path}/{INSIDE}")], inside_of(left_behind))


def _kept_values(step: Step) -> dict[str, Any]:
    """What a change of the names of a kept file does to its attributes."""
    if step.op == "create":
        return {"size": 0, "nlink": 1, "xattr": None, "mode": step.number}
    return {"nlink": 2 if step.op == "link" else 1}


def _read(call: Call, seen: Any, tag: int) -> Read:
    return Read(call.start_ns, call.end_ns, seen, tag)


def _look(registers: defaultdict[Register, Accesses], tag: int, call: Call) -> None:
    if call.is_disturbed:
        return
    step = call.step
    changes_mode = step.path in ATTRIBUTE_FILES or kind_of(step.path) == KEPT

    def saw(what: str, seen: Any, path: str = step.path) -> None:
        registers[Register(what, path)].reads.append(_read(call, seen, tag))

    if step.op == "getxattr" and call.error in (0, errno.ENODATA):
        saw("xattr", call.result, file_of(step.path))
        saw(NAME, SOMEWHERE)
        return
    if step.op != "fstat" or call.error:
        saw(NAME, look_of(call, changes_mode=changes_mode))
    if changes_mode and step.op in _STATUS and not call.error:
        _, mode, uid, size, mtime, nlink = call.result
        values = {"mode": stat.S_IMODE(mode), "size": size}
        if step.path in ATTRIBUTE_FILES:
            timed = changed_attribute(step.path)
            values = {"mode": stat.S_IMODE(mode), "uid": uid, timed: size if timed == "size" else mtime}
        else:
            values["nlink"] = nlink
        for what, value in values.items():
            saw(what, value, file_of(step.path))


def look_of(call: Call, *, changes_mode: bool = False) -> Look:
    """What a look that was not disturbed tells of the name. ``changes_mode``: whether the permissions there are changed by others."""
    op = call.step.op
    if call.error:
        if call.error == errno.EINVAL:
            return NO_LINK
        return NOWHERE if op in _FOLLOWS else MISSING
    if op == "exists":
        return SOMEWHERE
    if op == "readlink":
        return target_look(call.result)
    ino, mode = call.result[:2]
    return (entry_look if op == "lstat" else followed_look)(ino, None if changes_mode else mode)


def _hold_listings(registers: dict[Register, Accesses], listings: list[tuple[int, Call]]) -> None:
    """A listing is a look at each name of its directory that there ever was, as long as its group is not retired for long."""
    retired_ns: dict[str, int] = {}
    for register, each in registers.items():
        if kind_of(register.path) is not None and not each.writes[-1].certain:
            generation = generation_of(register.path)
            retired_ns[generation] = min(each.writes[-1].start_ns, retired_ns.get(generation, _NEVER_NS))
    by_directory: defaultdict[str, list[tuple[str, Accesses, int]]] = defaultdict(list)
    for register, each in registers.items():
        if register.what == NAME:
            directory, _, name = register.path.rpartition("/")
            until_ns = retired_ns.get(generation_of(register.path), _NEVER_NS) + _LISTED_AFTER_RETIREMENT_NS
            by_directory[directory].append((name, each, until_ns))
    for tag, call in listings:
        if call.is_disturbed:
            continue
        listed = set(call.result)
        for name, each, until_ns in by_directory[call.step.path]:
            if call.start_ns <= until_ns:
                each.reads.append(_read(call, PRESENT if name in listed else MISSING, tag))


_STATUS: Final = ("lstat", "stat", "fstat", "open")
_FOLLOWS: Final = ("stat", "fstat", "open", "exists", "getxattr")
