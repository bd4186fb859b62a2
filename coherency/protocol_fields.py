"""The kinds of fields that control messages are made of: what each may hold, and how it looks on the wire.

A kind converts in both directions and refuses with `ValueError` what is no such value; `protocol` makes that a
`MessageError` when a peer sent it.  The notation is that of `docs/spec/control.md`, and a test compares them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from coherency.events import Event, EventKind
from coherency.ids import HostInode

MAX_ITEMS: Final = 64
"""Elements of any one msgpack array or map, entries of a report included."""


class Kind(Protocol):
    """How one field looks in Python and on the wire.  Both directions raise `ValueError` for what is no such value."""

    @property
    def notation(self) -> str:
        """The kind as the specification writes it."""

    def load(self, value: object) -> object:
        """The Python value of what msgpack unpacked."""

    def dump(self, value: Any) -> object:
        """What msgpack shall pack for a Python value."""


@dataclass(frozen=True, slots=True)
class Unsigned:
    """An integer from 0 to 2**bits - 1.  True and False are none."""

    bits: int

    @property
    def notation(self) -> str:
        return f"u{self.bits}"

    def load(self, value: object) -> int:
        if type(value) is not int or not 0 <= value < 1 << self.bits:
            raise ValueError(f"not a {self.notation}")
        return value

    def dump(self, value: int) -> int:
        # Our own numbers may be of a subclass, such as an IntEnum; True and False are no numbers here either.
        return self.load(value if isinstance(value, bool) or not isinstance(value, int) else int(value))


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    notation: str = "flag"

    def load(self, value: object) -> bool:
        if type(value) is not bool:
            raise ValueError("not a flag")
        return value

    dump = load


@dataclass(frozen=True, slots=True)
class Text:
    """Printable text in UTF-8: it ends up in logs and on terminals, so control characters are refused."""

    min_bytes: int
    max_bytes: int

    @property
    def notation(self) -> str:
        return f"text {self.min_bytes}..{self.max_bytes}"

    def load(self, value: object) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError("not printable text")
        if not self.min_bytes <= len(value.encode()) <= self.max_bytes:
            raise ValueError(f"not of {self.min_bytes} to {self.max_bytes} bytes")
        return value

    dump = load


@dataclass(frozen=True, slots=True)
class Path:
    """A path: any bytes but NUL, binary on the wire.  In Python a str with surrogate escapes, as `os` gives it."""

    notation: str = "path"
    max_bytes: int = 4095

    def load(self, value: object) -> str:
        if type(value) is not bytes or not 1 <= len(value) <= self.max_bytes or b"\0" in value:
            raise ValueError("not a path")
        return value.decode("utf-8", "surrogateescape")

    def dump(self, value: str) -> bytes:
        encoded = value.encode("utf-8", "surrogateescape")
        self.load(encoded)
        return encoded


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def notation(self) -> str:
        return "one of " + ", ".join(self.words)

    def load(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError(f"not {self.notation}")
        return self.words[self.words.index(value)]

    dump = load


@dataclass(frozen=True, slots=True)
class Keys:
    """Grant keys: u32 after u32, little-endian, in one binary. In Python a tuple."""

    max_keys: int

    @property
    def notation(self) -> str:
        return f"keys 0..{self.max_keys}"

    def load(self, value: object) -> tuple[int, ...]:
        if type(value) is not bytes or len(value) % 4 or len(value) > 4 * self.max_keys:
            raise ValueError(f"not {self.notation}")
        return struct.unpack(f"<{len(value) // 4}I", value)

    def dump(self, value: tuple[int, ...]) -> bytes:
        if len(value) > self.max_keys:
            raise ValueError(f"not {self.notation}")
        try:
            return struct.pack(f"<{len(value)}I", *value)
        except struct.error:
            raise ValueError(f"not {self.notation}") from None


@dataclass(frozen=True, slots=True)
class Component:
    """A single name, of any bytes but `/` and NUL, binary on the wire; or none, which is empty."""

    notation: str = "name"
    max_bytes: int = 255

    def load(self, value: object) -> bytes:
        if type(value) is not bytes or len(value) > self.max_bytes or value in (b".", b"..") or b"/" in value or b"\0" in value:
            raise ValueError("not a name")
        return value

    dump = load


@dataclass(frozen=True, slots=True)
class Happenings:
    """Events, each an array of its fields, in an array. In Python a tuple of `Event`."""

    max_events: int
    ino: Unsigned = Unsigned(64)
    flag: Flag = Flag()
    name: Component = Component()

    @property
    def notation(self) -> str:
        return f"events 0..{self.max_events}"

    def load(self, value: object) -> tuple[Event, ...]:
        if type(value) is not list or len(value) > self.max_events:
            raise ValueError(f"not {self.notation}")
        return tuple(map(self._event, value))

    def dump(self, value: tuple[Event, ...]) -> list[list[object]]:
        events: list[list[object]] = [[int(field) if isinstance(field, EventKind) else field for field in event] for event in value]
        self.load(events)
        return events

    def _event(self, value: object) -> Event:
        if type(value) is not list or len(value) != len(Event._fields):
            raise ValueError("not an event")
        kind, ino, is_directory, parent, name, new_parent, new_name, replaced = value
        inodes = [HostInode(self.ino.load(each)) for each in (ino, parent, new_parent, replaced)]
        names = [self.name.load(each) for each in (name, new_name)]
        return Event(
            EventKind(self.ino.load(kind)), inodes[0], self.flag.load(is_directory),
            inodes[1], names[0], inodes[2], names[1], inodes[3],
        )  # fmt: skip


ReportValue = int | str
REPORT_KEYS: Final[Mapping[str, Kind]] = {
    "name": Text(1, 64),
    "share": Path(),
    "export": Path(),
    "pid": Unsigned(32),
    "uptime_ns": Unsigned(64),
    "epoch": Unsigned(64),
    "bumps": Unsigned(64),
    "changes_in_flight": Unsigned(64),
    "slot_count": Unsigned(64),
    "table_bytes": Unsigned(64),
    "lease_ns": Unsigned(64),
    "keys_held": Unsigned(64),
    "recalls": Unsigned(64),
    "evictions": Unsigned(64),
    "lost_guests": Unsigned(64),
    "waits": Unsigned(64),
    "waited_ns": Unsigned(64),
    "longest_wait_ns": Unsigned(64),
    "held_ns": Unsigned(64),
    "held_for_guests": Unsigned(64),
}
"""What every status report tells.  It may tell more: numbers (u64) and short texts under other keys."""


@dataclass(frozen=True, slots=True)
class Report:
    """A map of text to numbers and texts: `REPORT_KEYS` all present, others allowed, `MAX_ITEMS` at most."""

    notation: str = "report"
    key: Text = Text(1, 64)
    number: Unsigned = Unsigned(64)
    text: Text = Text(0, 256)

    def load(self, value: object) -> dict[str, ReportValue]:
        return self._converted(value, "load")

    def dump(self, value: Mapping[str, ReportValue]) -> dict[str, object]:
        return self._converted(dict(value), "dump")

    def _converted(self, value: object, direction: str) -> dict[str, Any]:
        if type(value) is not dict or len(value) > MAX_ITEMS:
            raise ValueError("not a report")
        if missing := REPORT_KEYS.keys() - value.keys():
            raise ValueError("a report without " + ", ".join(sorted(missing)))
        converted = {}
        for name, entry in value.items():
            self.key.load(name)
            kind = REPORT_KEYS.get(name, self.text if isinstance(entry, str) else self.number)
            try:
                converted[name] = getattr(kind, direction)(entry)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return converted
