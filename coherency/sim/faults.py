"""The faults that a simulation can inject, by name, and a random sequence of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Final, NamedTuple

from coherency.errors import UsageError

_MS: Final = 1_000_000


class FaultKind(NamedTuple):
    """``of_guest``: whether one guest is chosen for it. ``breaks``: whose calls may fail, rather than take longer.

    ``hold_ms``: for how long, from and to.
    """

    of_guest: bool
    breaks: str  # nobody, guest or all
    hold_ms: tuple[int, int]
    what: str


# How long a stop lasts reaches to both sides of the time for which a silent daemon is trusted (a second).
FAULTS: Final[dict[str, FaultKind]] = {
    "kill-agent": FaultKind(True, "guest", (0, 500), "SIGKILL for a guest's agent; later it is mounted again"),
    "stop-agent": FaultKind(True, "nobody", (50, 2500), "SIGSTOP for a guest's agent, later SIGCONT"),
    "kill-daemon": FaultKind(False, "all", (0, 1500), "SIGKILL for the daemon; later it serves again"),
    "kill-daemon-unnoticed": FaultKind(
        True, "all", (0, 1500), "likewise while a guest's agent is stopped, which goes on with a table that nobody serves"
    ),
    "restart-daemon": FaultKind(False, "all", (0, 500), "SIGTERM for the daemon; later it serves again"),
    "stop-daemon": FaultKind(False, "nobody", (50, 2500), "SIGSTOP for the daemon, later SIGCONT"),
}
_PAUSE_MS: Final = (200, 2000)


class Fault(NamedTuple):
    """Wait ``pause_ns``, let it happen, keep it for ``hold_ns``, mend it."""

    kind: str
    guest: int | None
    pause_ns: int
    hold_ns: int

    def __str__(self) -> str:
        whom = "" if self.guest is None else f" of guest {self.guest}"
        return f"{self.kind}{whom}, {self.hold_ns // _MS} ms"


def parse_faults(text: str) -> tuple[str, ...]:
    """``all``, ``none``, or names with commas. Raises :class:`UsageError` with the names there are."""
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return ()
    if names == ["all"]:
        return tuple(FAULTS)
    for name in names:
        if name in ("all", "none"):
            raise UsageError(f"--faults {name} stands alone")
        if name not in FAULTS:
            raise UsageError(f"--faults: there is no {name!r}; there are all, none, {', '.join(FAULTS)}")
    return tuple(dict.fromkeys(names))


def fault_sequence(random: Random, kinds: Sequence[str], guests: int) -> Iterator[Fault]:
    """Faults without end, one after the other; none if there are no ``kinds``."""
    while kinds:
        name = random.choice(kinds)
        kind = FAULTS[name]
        guest = random.randrange(guests) if kind.of_guest else None
        yield Fault(name, guest, random.randint(*_PAUSE_MS) * _MS, random.randint(*kind.hold_ms) * _MS)
