"""A guest that wants to know what others do in the share: asks each daemon that it is connected to, and hears of it."""

from __future__ import annotations

from collections.abc import Callable

from coherency.guest_agent.channel import Channel
from coherency.guest_agent.grantor import Grantor
from coherency.protocol import Message, Welcome
from coherency.protocol_events import Happened, Subscribe


class Listener:
    """Stands before what deals with grants on the client's thread, so that a recall which came first is carried out first.

    What happens while there is no connection is not heard of.
    """

    def __init__(self, grantor: Grantor, hear: Callable[[Happened], None]) -> None:
        """``hear`` is called on the client's thread, and must not wait."""
        self._grantor, self._hear = grantor, hear

    def joined(self, welcome: Welcome, asked_at_ns: int, channel: Channel) -> None:
        self._grantor.joined(welcome, asked_at_ns, channel)
        channel.offer(Subscribe(welcome.session))  # if that fails the client is about to lose the channel

    def handle(self, message: Message) -> str | None:
        """Act on a message of the daemon. Returns why the connection is of no use any more, if it is not."""
        if isinstance(message, Happened):
            self._hear(message)
            return None
        return self._grantor.handle(message)

    def tend(self) -> str | None:
        """What is due to grants."""
        return self._grantor.tend()

    def lost(self) -> None:
        self._grantor.lost()

    def is_clean(self) -> bool:
        """As far as grants are concerned."""
        return self._grantor.is_clean()
