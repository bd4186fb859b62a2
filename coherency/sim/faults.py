"""The faults that a simulation can inject, by name, a random sequence of them, and how long each may make calls wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Final, NamedTuple

from coherency.errors import UsageError

_MS: Final = 1_000_000
_SECOND_NS: Final = 1_000_000_000
DEFAULT_LEASE_NS: Final = 2 * _SECOND_NS
"""Of a simulation: so short that a minute has many."""
START_NS: Final = 5 * _SECOND_NS
"""What the start of a process and its mount may take on a busy machine, and the way back to a daemon that serves again."""


class FaultKind(NamedTuple):
    """``of_guest``: whether one guest is chosen for it. ``breaks``: whose calls may fail, rather than take longer.

    ``hold``: for how long, from and to, in leases. ``own`` and ``others``: what a call of that guest, and of the others,
    may have to wait for, besides what a call always may take: ``hold``, ``lease``, ``start``, ``queue``.
    """

    of_guest: bool
    breaks: str  # nobody, guest or all
    hold: tuple[float, float]
    own: tuple[str, ...]
    others: tuple[str, ...]
    what: str


# How long a stop lasts reaches to both sides of a lease, and of the time for which a silent daemon is trusted (a second).
# Waiting for a lease that may have to run out counts where a guest cannot be told, or does not answer.
FAULTS: Final[dict[str, FaultKind]] = {
    "kill-agent": FaultKind(
        True, "guest", (0, 0.25), ("hold", "start"), (), "SIGKILL for a guest's agent; later it is mounted again"
    ),
    "stop-agent": FaultKind(
        True, "nobody", (0.025, 1.25), ("hold",), ("lease",), "SIGSTOP for a guest's agent, later SIGCONT"
    ),
    "cut-channel": FaultKind(
        True, "nobody", (0, 1.25), ("lease",), ("lease",), "a guest's control channel is cut, and cannot be had again for a while"
    ),
    "mute-channel": FaultKind(
        True, "nobody", (0.025, 1.25), ("lease",), ("lease",), "nothing comes through it for a while, and then everything"
    ),
    "slow-acks": FaultKind(
        True, "nobody", (0.25, 1.25), ("lease", "queue"), ("lease", "queue"), "what the guest says to the daemon comes late"
    ),
    "slow-recalls": FaultKind(
        True, "nobody", (0.25, 1.25), ("lease", "queue"), ("lease", "queue"), "what the daemon says to the guest comes late"
    ),
    "kill-daemon": FaultKind(
        False, "all", (0, 0.75), (), ("hold", "start", "lease"), "SIGKILL for the daemon; later it serves again"
    ),
    "kill-daemon-unnoticed": FaultKind(
        True, "all", (0, 0.75), ("hold", "start", "lease"), ("hold", "start", "lease"),
        "likewise while a guest's agent is stopped, which goes on with a table that nobody serves",
    ),
    "restart-daemon": FaultKind(
        False, "all", (0, 0.25), (), ("hold", "start", "lease"), "SIGTERM for the daemon; later it serves again"
    ),
    "stop-daemon": FaultKind(False, "nobody", (0.025, 1.25), (), ("hold",), "SIGSTOP for the daemon, later SIGCONT"),
}  # fmt: skip
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "kill": ("kill-agent",),
    "stop": ("stop-agent",),
    "cut": ("cut-channel", "mute-channel"),
    "slow": ("slow-acks", "slow-recalls"),
    "daemon": ("kill-daemon", "kill-daemon-unnoticed", "restart-daemon", "stop-daemon"),
}
CHANNEL_FAULTS: Final = frozenset({*GROUPS["cut"], *GROUPS["slow"]})
_PAUSE: Final = (0.1, 1)  # in leases, like the length of a fault
_DELAY_MS: Final = (5, 400)


class Fault(NamedTuple):
    """Wait ``pause_ns``, let it happen, keep it for ``hold_ns``, mend it. ``delay_ns``: how late, of what comes late."""

    kind: str
    guest: int | None
    pause_ns: int
    hold_ns: int
    delay_ns: int = 0

    def __str__(self) -> str:
        whom = "" if self.guest is None else f" of guest {self.guest}"
        late = f" by {self.delay_ns // _MS} ms" if self.delay_ns else ""
        return f"{self.kind}{whom}{late}, {self.hold_ns // _MS} ms"


def parse_faults(text: str) -> tuple[str, ...]:
    """``all``, ``none``, or names, of faults or groups, with commas. Raises :class:`UsageError` with the names there are."""
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return ()
    if names == ["all"]:
        return tuple(FAULTS)
    chosen: list[str] = []
    for name in names:
        if name in ("all", "none"):
            raise UsageError(f"--faults {name} stands alone")
        if name not in FAULTS and name not in GROUPS:
            raise UsageError(f"--faults: there is no {name!r}; there are all, none, {', '.join((*GROUPS, *FAULTS))}")
        chosen += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(chosen))


def fault_sequence(
    random: Random, kinds: Sequence[str], guests: int, lease_ns: int = DEFAULT_LEASE_NS
) -> Iterator[Fault]:
    """Faults without end, one after the other; none if there are no ``kinds``. Each kind comes once before any comes twice."""
    while kinds:
        for name in random.sample(kinds, len(kinds)):
            kind = FAULTS[name]
            guest = random.randrange(guests) if kind.of_guest else None
            hold_ns = round(random.uniform(*kind.hold) * lease_ns)
            delay_ns = random.randint(*_DELAY_MS) * _MS if name in GROUPS["slow"] else 0
            yield Fault(name, guest, round(random.uniform(*_PAUSE) * lease_ns), hold_ns, delay_ns)


def patience_ns(fault: Fault, lease_ns: int, callers: int) -> tuple[int, int]:
    """How much longer a call may take because of ``fault``: one of the guest that it concerns, and one of any other.

    ``lease_ns``: 0 in modes that know none. ``callers``: how many calls can be under way at once. Late messages add up
    for a call that has to wait for others in a directory: hence ``queue``.
    """
    times = {"hold": fault.hold_ns, "lease": lease_ns, "start": START_NS, "queue": fault.delay_ns * (callers + 1)}
    kind = FAULTS[fault.kind]
    return sum(times[each] for each in kind.own), sum(times[each] for each in kind.others)
