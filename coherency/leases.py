"""What daemon and agents must agree on about grants: what a guest registers, and how long it may grant.

A guest's kernel may cache only what the agent has registered with the daemon: a *key*. A slot of the version table has
two. The attributes key stands for the attributes of every inode of the slot; each change of such an inode recalls it.
The names key stands for the positive names that lead to inodes of the slot; only a change that takes such a name away
recalls it. A name that leads to an inode cannot become wrong without a change of that inode, and so does not hang on
its directory: making a file recalls nothing but the attributes of the directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from coherency.ids import GrantKey, SlotIndex

SECOND_NS: Final = 1_000_000_000

DEFAULT_LEASE_NS: Final = 10 * SECOND_NS
"""How long the daemon waits for a guest at most, counted from the receipt of its last renewal."""
SHORTEST_LEASE_NS: Final = SECOND_NS // 2
LONGEST_LEASE_NS: Final = 60 * SECOND_NS
"""Who waits for a guest waits no longer than this, whatever operators say."""

MAX_KEYS_PER_MESSAGE: Final = 4096
MAX_KEYS_PER_GUEST: Final = 1 << 19
INTRODUCTION_PREFIX: Final = b".coherency-"
"""See `introduction`."""
RENEWALS_PER_LEASE: Final = 4
"""How often an agent renews in the time of one lease, so that one or two lost or late renewals cost nothing."""


def agent_lease_ns(lease_ns: int) -> int:
    """How long an agent may grant, counted from the sending of its HELLO or RENEW, if the daemon's own count is `lease_ns`.

    The difference is the margin for what lies between the agent's last look at its clock and the kernel's installing of
    the reply: a processor that is busy elsewhere, and the kernel's rounding of times up to its next tick.
    """
    return lease_ns - max(lease_ns // 10, 100_000_000)


def attributes_key(slot: SlotIndex) -> GrantKey:
    """What stands for the attributes of the inodes of a slot."""
    return GrantKey(slot << 1)


def names_key(slot: SlotIndex) -> GrantKey:
    """What stands for the positive names that lead to inodes of a slot."""
    return GrantKey(slot << 1 | 1)


def slot_of(key: GrantKey) -> SlotIndex:
    """The slot whose attributes or names the key stands for."""
    return SlotIndex(key >> 1)


def is_names_key(key: GrantKey) -> bool:
    """Whether it stands for names."""
    return bool(key & 1)


def keys_of(slots: Iterable[SlotIndex], leaving: Iterable[SlotIndex] = ()) -> tuple[GrantKey, ...]:
    """The keys that a change recalls: attributes of all `slots`, and the names that lead to inodes of the slots `leaving`."""
    return tuple(sorted({*map(attributes_key, slots), *map(names_key, leaving)}))


def introduction(session: int) -> bytes:
    """The name by whose look-up in the root of the export a guest shows the daemon which process works for it."""
    return INTRODUCTION_PREFIX + b"%016x" % session


def introduced(name: bytes) -> int | None:
    """The session of a name of that kind, None for any other name."""
    digits = name[len(INTRODUCTION_PREFIX) :]
    if not name.startswith(INTRODUCTION_PREFIX) or len(digits) != 16 or digits.strip(b"0123456789abcdef"):
        return None
    return int(digits, 16)
