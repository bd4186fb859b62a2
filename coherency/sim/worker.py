"""One worker of a simulated guest: a process that makes calls on the guest's mount and writes down what came of each.

``python -m coherency.sim.worker ORDERS`` with the orders as JSON. It ends by itself when its time is over. Each line of
its record is one call; what it is busy with stands in a file of its own, for the day when a call does not return.

Files of the groups, in a directory that has nothing to do with the share: ``N`` holds the names of group N, is written
under flock by whoever changes them, and is never read without; ``generations`` has a word per group, for those who look.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from coherency.fuse import syscalls
from coherency.sim.calls import CREATES, XATTR, Names, Step, after, made_by, names_of
from coherency.sim.history import LOST, Call, mtime_ns
from coherency.sim.names import Entry
from coherency.sim.workload import Workload

GENERATIONS_FILE: Final = "generations"
_WORD_BYTES: Final = 8
_FLAGS: Final = {"rename-noreplace": 1, "rename-exchange": 2}
_CURRENT_BYTES: Final = 256
_LOOKS_PER_CHANGE: Final = {True: 1, False: 30}
_CHANGES_OF_NAMES: Final = 0.5
# After an error that a fault must have caused: long enough not to fill the record with thousands of them.
_PAUSE_AFTER_ERROR_S: Final = 0.01


@dataclass(frozen=True)
class Orders:
    """What a worker is told. ``writes``: mostly changes things; the others mostly look."""

    mount: str
    share: str  # the truth, for what a change of names has made
    groups: str
    record: str
    current: str
    guest: int
    worker: int
    workers: int
    group_count: int
    seed: str
    writes: bool
    until_ns: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


# ---- the calls -----------------------------------------------------------------------------------------------------


def _status(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns


def _create(path: str, _other: str, number: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, number))


def _rename(flags: int) -> Callable[[str, str, int], Any]:
    return lambda path, other, _number: syscalls.renameat2(
        syscalls.AT_FDCWD, os.fsencode(path), syscalls.AT_FDCWD, os.fsencode(other), flags
    )


def _listdir(path: str, _other: str, _number: int) -> list[str]:
    return os.listdir(path)


_CALLS: Final[dict[str, Callable[[str, str, int], Any]]] = {
    "chmod": lambda path, _, number: os.chmod(path, number),
    "chown": lambda path, _, number: os.chown(path, number, -1),
    "truncate": lambda path, _, number: os.truncate(path, number),
    "utime": lambda path, _, number: os.utime(path, ns=(0, mtime_ns(number))),
    "setxattr": lambda path, _, number: os.setxattr(path, XATTR, b"%d" % number),
    "create": _create,
    "mkdir": lambda path, _, number: os.mkdir(path, number),
    "symlink": lambda path, other, _: os.symlink(other, path),
    "link": lambda path, other, _: os.link(path, other, follow_symlinks=False),
    "unlink": lambda path, *_: os.unlink(path),
    "rmdir": lambda path, *_: os.rmdir(path),
    "rename": _rename(0),
    "rename-noreplace": _rename(_FLAGS["rename-noreplace"]),
    "rename-exchange": _rename(_FLAGS["rename-exchange"]),
    "lstat": lambda path, *_: _status(os.lstat(path)),
    "stat": lambda path, *_: _status(os.stat(path)),
    # What os.path.exists does, but for hiding which error it was.
    "exists": lambda path, *_: bool(os.stat(path)),
    "readlink": lambda path, *_: os.readlink(path),
    "getxattr": lambda path, *_: os.getxattr(path, XATTR).decode(),
    "listdir": _listdir,
}
_SECOND_IS_A_PATH: Final = frozenset({"link", "rename", "rename-noreplace", "rename-exchange"})


# ---- groups --------------------------------------------------------------------------------------------------------


def prepare_groups(directory: Path, count: int) -> None:
    """Fresh groups, all of them empty."""
    for group in range(count):
        (directory / str(group)).write_text(json.dumps([0, [None] * len(names_of(group, 0))]))
    (directory / GENERATIONS_FILE).write_bytes(bytes(_WORD_BYTES * count))


class Groups:
    """The names that are changed under a lock; see the module."""

    def __init__(self, directory: Path, count: int) -> None:
        self._files = [os.open(directory / str(group), os.O_RDWR | os.O_CLOEXEC) for group in range(count)]
        with open(directory / GENERATIONS_FILE, "r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), _WORD_BYTES * count)).cast("Q")

    def generations(self) -> list[int]:
        return self._words.tolist()

    @contextlib.contextmanager
    def locked(self, group: int) -> Iterator[tuple[int, Names] | None]:
        """The generation and names of the group, for whoever holds its lock; None if somebody else does."""
        fd = self._files[group]
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        try:
            generation, entries = json.loads(os.pread(fd, 1 << 16, 0))
            names = zip(names_of(group, generation), entries, strict=True)
            yield generation, {path: None if entry is None else Entry(*entry) for path, entry in names}
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def store(self, group: int, generation: int, names: Names) -> None:
        """By the holder of the lock."""
        data = json.dumps([generation, list(names.values())]).encode()
        os.ftruncate(self._files[group], os.pwrite(self._files[group], data, 0))
        self._words[group] = generation


# ---- the worker ----------------------------------------------------------------------------------------------------


class Worker:
    """Makes calls until its time is over."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._mount, self._share = orders.mount + "/", orders.share + "/"
        self._workload = Workload(
            Random(orders.seed), worker=orders.worker, workers=orders.workers, groups=orders.group_count
        )  # fmt: skip
        self._groups = Groups(Path(orders.groups), orders.group_count)
        self._serials = itertools.count()
        self._current = os.open(orders.current, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def run(self) -> None:
        until_ns, looks = self.orders.until_ns, _LOOKS_PER_CHANGE[self.orders.writes]
        with open(self.orders.record, "w") as record:
            turn = 0
            while time.monotonic_ns() < until_ns:
                turn += 1
                call = self._change() if turn % (looks + 1) == 0 else self._look()
                if call is None:
                    continue
                record.write(json.dumps(call) + "\n")
                if call.is_disturbed:
                    time.sleep(_PAUSE_AFTER_ERROR_S)

    def _look(self) -> Call:
        return self._make(self._workload.look(self._groups.generations()))

    def _change(self) -> Call | None:
        if not self._workload.chance(_CHANGES_OF_NAMES):
            return self._make(self._workload.change_attribute())
        group = self._workload.pick_group()
        with self._groups.locked(group) as held:
            return None if held is None else self._change_name(group, *held)

    def _change_name(self, group: int, generation: int, names: Names) -> Call:
        step = self._workload.change_name(names, next(self._serials))
        call = self._make(step)._replace(source=names[step.path], target=names.get(step.other))
        if not call.error:
            made = self._entry(step.path) if step.op in CREATES else None
            then = after(step, names, made)
            as_asked = step.op not in CREATES or (made is not None and made == made_by(step, made.ino))
            if as_asked and all(self._entry(path) == then[path] for path in (step.path, step.other) if path in then):
                self._groups.store(group, generation, then)
                return call._replace(made=made)
            call = call._replace(error=LOST)
        if call.is_disturbed:
            fresh: Names = dict.fromkeys(names_of(group, generation + 1))
            self._groups.store(group, generation + 1, fresh)
            if step.op in CREATES:
                call = call._replace(made=made_by(step, None))
        return call

    def _entry(self, path: str) -> Entry | None:
        """What the share itself has there."""
        try:
            status = os.lstat(self._share + path)
            return Entry(status.st_mode, status.st_ino, _target(self._share + path, status.st_mode))
        except FileNotFoundError:
            return None

    def _make(self, step: Step) -> Call:
        orders, number = self.orders, step.number
        path = self._mount + step.path
        other = self._mount + step.other if step.op in _SECOND_IS_A_PATH else step.other
        make = _CALLS[step.op]
        result, error = None, 0
        start_ns = time.monotonic_ns()
        os.pwrite(self._current, f"{start_ns} {' '.join(map(str, step))}\n".ljust(_CURRENT_BYTES).encode(), 0)
        start_ns = time.monotonic_ns()
        try:
            result = make(path, other, number)
        except OSError as failure:
            error = failure.errno or LOST
        end_ns = time.monotonic_ns()
        return Call(orders.guest, orders.worker, start_ns, end_ns, step, error, result)


def _target(path: str, mode: int) -> str | None:
    return os.readlink(path) if Entry(mode).is_link else None


def read_record(path: Path) -> Iterator[Call]:
    """The calls that a worker wrote down. One that it was killed in the middle of is left out."""
    with open(path) as lines:
        for line in lines:
            if line.endswith("\n"):
                yield _call(*json.loads(line))


def _call(
    guest: int, worker: int, start_ns: int, end_ns: int, step: list[Any], error: int, result: Any, *entries: Any
) -> Call:
    known = [None if each is None else Entry(*each) for each in entries]
    return Call(guest, worker, start_ns, end_ns, Step(*step), error, result, *known)


def main() -> None:
    os.umask(0)
    Worker(Orders(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
