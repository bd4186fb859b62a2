"""A program that watches files: inotify(7), read as the kernel gives it."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from coherency.fuse.syscalls import wait_readable

ACCESS, MODIFY, ATTRIB, CLOSE_WRITE, CLOSE_NOWRITE, OPEN = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
UNMOUNT, OVERFLOW, IGNORED, ISDIR = 0x2000, 0x4000, 0x8000, 0x40000000
NAMES: Final = {
    value: name for name, value in list(globals().items()) if name.isupper() and isinstance(value, int)
}  # fmt: skip
_CHANGES: Final = MODIFY | ATTRIB | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF
_ALL: Final = 0xFFF
_record = struct.Struct("=iIII")
_BUFFER_BYTES: Final = 1 << 16
_DEADLINE_S: Final = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


class Seen(NamedTuple):
    """One event: what was watched, what happened as words, the name in a watched directory, and what ties two together."""

    watched: Path
    what: str
    name: str = ""
    cookie: int = 0


class Watcher:
    """An inotify instance. ``watch`` paths, then wait for events by ``await_all``."""

    def __init__(self, *paths: Path, mask: int = _CHANGES) -> None:
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._watched: dict[int, Path] = {}
        self.seen: list[Seen] = []
        for path in paths:
            self.watch(path, mask)

    def watch(self, path: Path, mask: int = _CHANGES) -> None:
        number = _libc.inotify_add_watch(self.fd, os.fsencode(path), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        self._watched[number] = path

    def close(self) -> None:
        os.close(self.fd)

    def read(self, timeout_s: float) -> list[Seen]:
        """What comes within that time, or nothing; also kept in ``seen``."""
        if not wait_readable([self.fd], int(timeout_s * 1e9)):
            return []
        try:
            data = os.read(self.fd, _BUFFER_BYTES)
        except BlockingIOError:
            return []
        found = list(self._parse(data))
        self.seen += found
        return found

    def _parse(self, data: bytes) -> Iterator[Seen]:
        at = 0
        while at < len(data):
            number, mask, cookie, length = _record.unpack_from(data, at)
            name = data[at + _record.size :][:length].rstrip(b"\0")
            at += _record.size + length
            words = "|".join(word for bit, word in sorted(NAMES.items()) if mask & bit)
            if not mask & IGNORED:
                yield Seen(self._watched[number], words, os.fsdecode(name), cookie)

    def await_event(self, what: str, name: str = "", on_event: Callable[[Seen], None] = lambda _: None) -> Seen:
        """The first event of that kind, waiting for it; ``on_event`` is called with each that comes, at once."""
        end_s = time.monotonic() + _DEADLINE_S
        while True:
            for each in self.read(max(0.0, end_s - time.monotonic())):
                on_event(each)
                if (each.what, each.name) == (what, name):
                    return each
            assert time.monotonic() < end_s, f"no {what} {name!r}: {self.seen}"


@contextmanager
def watching(*paths: Path, mask: int = _CHANGES) -> Iterator[Watcher]:
    watcher = Watcher(*paths, mask=mask)
    try:
        yield watcher
    finally:
        watcher.close()
