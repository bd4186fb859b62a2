"""What a client's thread does about grants, for guests that grant and for those that do not."""

from __future__ import annotations

from typing import Protocol

from coherency.guest_agent.channel import Channel
from coherency.protocol import Message, Welcome


class Grantor(Protocol):
    """What deals with grants on the client's thread; see `sharer`."""

    def joined(self, welcome: Welcome, asked_at_ns: int, channel: Channel) -> None: ...
    def handle(self, message: Message) -> str | None: ...
    def tend(self) -> str | None: ...
    def lost(self) -> None: ...
    def is_clean(self) -> bool: ...


class NoGrants:
    """A guest that never lets its kernel keep anything on the daemon's word."""

    def joined(self, welcome: Welcome, asked_at_ns: int, channel: Channel) -> None: ...
    def handle(self, message: Message) -> str | None:
        """Nothing may come."""
        return f"{type(message).__name__} came unasked"

    def tend(self) -> str | None:
        """Nothing is due."""
        return None

    def lost(self) -> None: ...
    def is_clean(self) -> bool:
        """Always."""
        return True
