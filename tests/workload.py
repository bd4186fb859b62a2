"""A seeded workload in one directory, which knows at any moment what the directory may look like.

An operation that was acknowledged has happened. One under way has happened or not; what it was about to write is there up
to some point, and nothing else has changed.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

State: TypeAlias = dict[str, bytes]
"""The whole content of a directory."""


@dataclass(frozen=True)
class Write:
    """A file is created, or appended to, in pieces; then fsync, then close."""

    name: str
    old: bytes | None  # what is there before; None: nothing, not even the name
    new: bytes
    piece_bytes: int

    def apply(self, root: Path) -> None:
        flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if self.old is None else os.O_APPEND)
        fd = os.open(root / self.name, flags, 0o644)
        try:
            for start in range(0, len(self.new), self.piece_bytes):
                os.write(fd, self.new[start : start + self.piece_bytes])
            os.fsync(fd)
        finally:
            os.close(fd)

    def result(self, state: State) -> State:
        return state | {self.name: (self.old or b"") + self.new}

    def explains(self, before: State, found: State) -> bool:
        there = found.get(self.name)
        if there is None:
            return self.old is None and found == before
        begins = there.startswith(self.old or b"") and ((self.old or b"") + self.new).startswith(there)
        return begins and found == before | {self.name: there}


@dataclass(frozen=True)
class Rename:
    """A file is renamed, to a new name or over another file."""

    name: str
    target: str

    def apply(self, root: Path) -> None:
        os.rename(root / self.name, root / self.target)

    def result(self, state: State) -> State:
        return {name: content for name, content in state.items() if name != self.name} | {self.target: state[self.name]}

    def explains(self, before: State, found: State) -> bool:
        return found in (before, self.result(before))


@dataclass(frozen=True)
class Unlink:
    name: str

    def apply(self, root: Path) -> None:
        os.unlink(root / self.name)

    def result(self, state: State) -> State:
        return {name: content for name, content in state.items() if name != self.name}

    def explains(self, before: State, found: State) -> bool:
        return found in (before, self.result(before))


@dataclass
class Worker:
    """One thread's work in a directory of its own. ``run`` returns when an operation fails, or when told to stop."""

    directory: str
    seed: int
    state: State = field(default_factory=dict)
    acknowledged: int = 0
    under_way: Write | Rename | Unlink | None = None
    error: OSError | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._number = 0

    def run(self, root: Path, stop: threading.Event) -> None:
        self.error = None
        while not stop.is_set():
            self.under_way = self._choose()
            try:
                self.under_way.apply(root / self.directory)
            except OSError as error:
                self.error = error
                return
            self.state, self.under_way = self.under_way.result(self.state), None
            self.acknowledged += 1

    def _choose(self) -> Write | Rename | Unlink:
        choice, names = self._random.random(), sorted(self.state)
        if len(names) < 3 or (choice < 0.4 and len(names) < 12):
            return Write(self._new_name(), None, self._content(), 4096)
        name = self._random.choice(names)
        if choice < 0.6:
            return Write(name, self.state[name], self._content(), 1000)
        if choice < 0.75:
            return Rename(name, self._new_name())
        if choice < 0.9:
            return Rename(name, self._random.choice([each for each in names if each != name]))
        return Unlink(name)

    def _new_name(self) -> str:
        self._number += 1
        return f"{self._number}"

    def _content(self) -> bytes:
        return self._random.randbytes(self._random.randrange(1, 10_000))

    def settle(self, share: Path) -> None:
        """Assert that the directory is what the acknowledged operations made of it, and go on from what is found."""
        found = {path.name: path.read_bytes() for path in (share / self.directory).iterdir()}
        if self.under_way is None:
            assert found == self.state, (self.seed, self.acknowledged, _names(found), _names(self.state))
        else:
            explained = self.under_way.explains(self.state, found)
            assert explained, (self.seed, self.acknowledged, self.under_way, _names(found), _names(self.state))
        self.state, self.under_way = found, None


def _names(state: State) -> dict[str, int]:
    return {name: len(content) for name, content in sorted(state.items())}


class Workload:
    """Several workers at once."""

    def __init__(self, share: Path, seed: int, workers: int = 3) -> None:
        self.share = share
        self.workers = [Worker(f"worker{number}", seed * 100 + number) for number in range(workers)]
        for worker in self.workers:
            (share / worker.directory).mkdir()

    def acknowledged(self) -> int:
        return sum(worker.acknowledged for worker in self.workers)

    def start(self, root: Path) -> Running:
        return Running(self, root)

    def settle(self) -> None:
        for worker in self.workers:
            worker.settle(self.share)


class Running:
    """A workload under way: a context manager; whoever leaves it waits for the workers."""

    def __init__(self, workload: Workload, root: Path) -> None:
        self.workload = workload
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=worker.run, args=(root, self._stop), name=worker.directory)
            for worker in workload.workers
        ]

    def __enter__(self) -> Running:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self.wait_until_all_failed()

    def wait_until_all_failed(self) -> list[OSError]:
        for thread in self._threads:
            thread.join()
        return [worker.error for worker in self.workload.workers if worker.error is not None]
