"""How an agent reaches its daemon, and where it finds the version table: here for agents on the daemon's own machine."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from coherency.errors import MessageError
from coherency.guest_agent.channel import Channel
from coherency.guest_agent.requests import require
from coherency.protocol import Hello, Welcome
from coherency.shm_memory import map_read_only
from coherency.shm_table import TableReader


class Link(Protocol):
    """A way to one daemon."""

    @property
    def line(self) -> str:
        """What Hello says of it; a ``serial`` one is used by agents one after the other."""

    def dial(self, *, deadline_ns: int, wakeup: int | None) -> Channel:
        """Connect.  Raises `DaemonUnavailable`, `Refused`, `UsageError`, `Interrupted`."""

    def map_table(self, welcome: Welcome, descriptors: list[int]) -> TableReader:
        """The table of that Welcome; the descriptors that came with it stay the caller's.  Raises `TableError`."""

    def watch(self, reader: TableReader, clock_ns: Callable[[], int]) -> Callable[[], str | None]:
        """What tells, asked several times per second, why a connection with this table is of no use any more, if it is not."""


class LocalLink:
    """The control socket of a daemon on this machine; the table comes with its Welcome."""

    line = "socket"

    def __init__(self, runtime_root: Path, name: str) -> None:
        self._runtime_root = runtime_root
        self._name = name

    def dial(self, *, deadline_ns: int, wakeup: int | None) -> Channel:
        """See `Channel.dial`."""
        return Channel.dial(self._runtime_root, self._name, deadline_ns=deadline_ns, wakeup=wakeup)

    def map_table(self, welcome: Welcome, descriptors: list[int]) -> TableReader:
        """See `Link`."""
        if len(descriptors) != 1:
            raise MessageError(f"the daemon said welcome with {len(descriptors)} descriptors instead of one")
        memory = map_read_only(descriptors[0], welcome.table_bytes)
        # The reader alone keeps the mapping: other threads may still compare words of a reader that was withdrawn.
        table_id = (welcome.table_id_high, welcome.table_id_low)
        return TableReader(memory.words, trust_ns=welcome.trust_ns, table_id=table_id)

    def watch(self, reader: TableReader, clock_ns: Callable[[], int]) -> Callable[[], str | None]:
        """See `Link`.  Daemon and agent have one clock."""
        return lambda: None


def say_hello(channel: Channel, hello: Hello, deadline_ns: int) -> Welcome:
    """The daemon's answer to a Hello.  Raises like `Channel.answer`, and `MessageError`.

    What comes first on a serial line may have been meant for the agent before: it is no answer.
    """
    is_serial_line = hello.line == "serial"
    hello = dataclasses.replace(hello, nonce=secrets.randbits(64) if is_serial_line else 0)
    channel.ask(hello)
    while True:
        message = channel.answer(deadline_ns, with_descriptors=True)
        if not is_serial_line or (isinstance(message, Welcome) and message.nonce == hello.nonce):
            return require(Welcome, message)
