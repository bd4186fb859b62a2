"""The guest's end of the control channel: brings the version table, and says when it must not be believed any more.

Rules:

1. The reader of a connection is trusted only while that connection lives: whatever ends it, `withdraw` comes first,
   then everything else (callbacks, closing, connecting again).
2. A new connection brings a new reader.  Nothing that was validated by an old one is valid for the new one.
3. Trust begins at the moment before HELLO was sent, since only from then on is the daemon known to be alive.
4. The thread never waits for the daemon longer than until the next look at the heartbeat.
5. Hello names the session before, and is not said before the guest is clean: its kernel has nothing any more of what
   was granted then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple, Protocol, Self

from coherency.errors import CoherencyError, DaemonUnavailable, PeerError, Refused, UsageError
from coherency.guest_agent.channel import Channel, Interrupted, wait_readable
from coherency.guest_agent.grantor import Grantor, NoGrants
from coherency.guest_agent.links import Link, LocalLink, say_hello
from coherency.guest_agent.requests import (
    Patience,
    Status,
    fetch_status,
    invalidate,
    served_names,
    status_of,
)
from coherency.protocol import (
    Confirm,
    Evicted,
    Goodbye,
    GuestReport,
    Hello,
    Message,
    Recall,
    Refusal,
    Renewed,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.protocol_events import Happened
from coherency.shm_table import HEARTBEAT_PERIOD_NS, TableReader

__all__ = [
    "Client",
    "ClientStatistics",
    "Counters",
    "LinkState",
    "Patience",
    "Status",
    "fetch_status",
    "invalidate",
    "served_names",
]

_log = logging.getLogger(__name__)

PULSE_PERIOD_NS: Final = HEARTBEAT_PERIOD_NS // 2


class LinkState(Enum):
    """How the guest stands to the daemon."""

    CONNECTED = "connected"
    LOST = "lost"
    CLOSED = "closed"


class LinkEvent(Enum):
    """What changes that."""

    WELCOME = "welcome"
    LOSS = "loss"
    CLOSE = "close"


LINK_TRANSITIONS: Final[Mapping[tuple[LinkState, LinkEvent], LinkState]] = {
    (LinkState.LOST, LinkEvent.WELCOME): LinkState.CONNECTED,
    (LinkState.CONNECTED, LinkEvent.LOSS): LinkState.LOST,
    (LinkState.CONNECTED, LinkEvent.CLOSE): LinkState.CLOSED,
    (LinkState.LOST, LinkEvent.CLOSE): LinkState.CLOSED,
}


class Counters(Protocol):
    """What the agent counts; the fields of `Statistics` without the serial."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def refreshes(self) -> int: ...
    @property
    def lower_requests(self) -> int: ...
    @property
    def entries(self) -> int: ...


class ClientStatistics(NamedTuple):
    """`connections` made, `losses`, and requests for statistics `answered` so far."""

    state: LinkState
    connections: int
    losses: int
    answered: int


class Client:
    """A guest's connection, with a thread of its own, from `connect` to `close`.

    `reader` and `welcome` are those of the last connection; the reader is withdrawn once that is lost.
    """

    reader: TableReader
    welcome: Welcome

    def __init__(
        self,
        link: Link,
        name: str,
        hello: Hello,
        *,
        statistics: Callable[[], Counters],
        reconnect: bool,
        on_lost: Callable[[], None],
        on_connected: Callable[[TableReader, Welcome], None],
        grantor: Grantor,
        patience: Patience,
        clock_ns: Callable[[], int],
    ) -> None:
        """Use `connect` instead."""
        self._link = link
        self._name = name
        self._hello = hello
        self._counters = statistics
        self._reconnect = reconnect
        self._on_lost = on_lost
        self._on_connected = on_connected
        self._grantor = grantor
        self._patience = patience
        self._clock_ns = clock_ns
        self._channel: Channel | None = None
        self._state = LinkState.LOST
        self._state_lock = threading.Lock()
        self._connections = self._losses = self._answered = 0
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._close_lock = threading.Lock()
        self._status_lock = threading.Lock()
        self._answer: queue.SimpleQueue[Status | None] | None = None
        self._guest_reports: list[GuestReport] = []
        self._thread = threading.Thread(target=self._run, name=f"control-client-{name}", daemon=True)

    @classmethod
    def connect(
        cls,
        runtime_root: Path,
        name: str,
        *,
        guest_name: str,
        mode: str,
        statistics: Callable[[], Counters],
        reconnect: bool = False,
        on_lost: Callable[[], None] = lambda: None,
        on_connected: Callable[[TableReader, Welcome], None] = lambda _reader, _welcome: None,
        grantor: Grantor | None = None,
        patience: Patience | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        link: Link | None = None,
    ) -> Self:
        """Say hello to the daemon that serves `name`; return when it has said welcome and the table is mapped.

        From then on the client's thread answers the daemon, looks at the heartbeat, and calls

        * `statistics` when the daemon asks for the counters;
        * `on_lost` when the connection has ended by anything but `close`: the reader is withdrawn already;
        * `on_connected` with the new reader when, with `reconnect`, there is another connection (not for the first);
        * the methods of `grantor`: `joined` after that, and for the first connection before this method returns; `handle` for
          the messages about grants and events; `tend` several times per second; `lost` when the reader is withdrawn; then `is_clean`
          until it is, before the next Hello.

        The first of them may come before this method returns.  They must not wait for threads that wait for the client,
        nor call `close` or `request_status`.  If `on_connected` raises a `CoherencyError` or an `OSError`, the connection
        is of no use and is made anew; anything else that one raises ends the client: it is logged, the reader stays
        withdrawn.
        `clock_ns` is the clock of `TableReader.trusted_until_ns`; `link` is the way to the daemon, if it is not the socket
        below `runtime_root`.

        Raises `DaemonUnavailable` if nobody serves the name, `Refused`, `ProtocolVersionError`, another `PeerError`, or
        `TableError` if the daemon's table is of no use to us, and `UsageError` for an impossible name or mode.
        """
        link = link or LocalLink(runtime_root, name)
        hello = Hello(name=guest_name, pid=os.getpid(), mode=mode, former=0, line=link.line)
        try:
            encode(hello)
        except ValueError as error:
            raise UsageError(str(error)) from None
        client = cls(
            link,
            name,
            hello,
            statistics=statistics,
            reconnect=reconnect,
            on_lost=on_lost,
            on_connected=on_connected,
            grantor=grantor or NoGrants(),
            patience=patience or Patience(),
            clock_ns=clock_ns,
        )
        try:
            grantor_joins = client._join_first()
            grantor_joins()
        except BaseException:
            os.close(client._wakeup)
            raise
        client._thread.start()
        return client

    # --- from any thread ---------------------------------------------------------------------------------------

    @property
    def state(self) -> LinkState:
        """How things stand."""
        return self._state

    def request_status(self) -> Status:
        """Ask the daemon, over this connection, how it and all its guests are.

        Raises `DaemonUnavailable` if there is no connection, or it is lost meanwhile or given up for want of an answer.
        """
        with self._status_lock:
            answer: queue.SimpleQueue[Status | None] = queue.SimpleQueue()
            with self._state_lock:
                channel = self._channel
                if channel is None:
                    raise DaemonUnavailable(self._name, "the connection is lost")
                self._answer = answer
                self._guest_reports = []
            try:
                channel.send(StatusRequest())
                status = answer.get(timeout=self._patience.answer_ns / 1e9)
            except (ConnectionError, queue.Empty):
                # Without an answer the daemon could not be asked again: the protocol has one question at a time.
                channel.hang_up()
                status = None
        if status is None:
            raise DaemonUnavailable(self._name, "no answer")
        return status

    def close(self) -> None:
        """Withdraw the reader, say goodbye, end the thread.  May be called again; not from a callback."""
        with self._close_lock:
            if self.state is LinkState.CLOSED:
                return
            os.eventfd_write(self._wakeup, 1)
            self._thread.join()
            if self._state is not LinkState.CLOSED:
                self._end(LinkEvent.CLOSE)  # the thread had ended before
            os.close(self._wakeup)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def statistics(self) -> ClientStatistics:
        """A frozen copy of the counters."""
        with self._state_lock:
            return ClientStatistics(self._state, self._connections, self._losses, self._answered)

    def check(self) -> None:
        """Assert rule 1, and that there is a channel exactly while connected."""
        with self._state_lock:
            assert (self._channel is not None) == (self._state is LinkState.CONNECTED), self._state
            if self._channel is None:
                assert self.reader.trusted_until_ns == 0, self.reader.statistics()
                assert self._answer is None

    # --- connecting and losing ---------------------------------------------------------------------------------

    @property
    def _first_retry_ns(self) -> int:
        # What is written to a line before QEMU has noticed its end, and connected anew, can block that for good (QEMU 7.2).
        return self._patience.line_settles_ns if self._link.line == "serial" else self._patience.first_retry_ns

    def _join_first(self) -> Callable[[], None]:
        """Join; on a serial line again, while the time for an answer lasts: what came before on it may have been at fault."""
        deadline_ns = time.monotonic_ns() + self._patience.answer_ns
        while True:
            try:
                return self._join()
            except (DaemonUnavailable, Refused):
                if self._link.line != "serial" or time.monotonic_ns() >= deadline_ns:
                    raise
            wait_readable(self._wakeup, None, self._first_retry_ns)

    def _join(self) -> Callable[[], None]:
        """Returns what lets the grantor begin, when everything else is ready."""
        deadline_ns = time.monotonic_ns() + self._patience.answer_ns
        channel = self._link.dial(deadline_ns=deadline_ns, wakeup=self._wakeup)
        try:
            asked_at_ns = self._clock_ns()  # rule 3
            welcome = say_hello(channel, self._hello, deadline_ns)
            descriptors = channel.take_descriptors()
            try:
                reader = self._link.map_table(welcome, descriptors)
            except BaseException:
                with contextlib.suppress(ConnectionError):
                    channel.send(Goodbye())  # on a serial line nothing else would tell
                raise
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        except BaseException:
            channel.close()
            raise
        reader.vouch(asked_at_ns)
        with self._state_lock:
            self.reader, self.welcome, self._channel = reader, welcome, channel
            self._state = LINK_TRANSITIONS[self._state, LinkEvent.WELCOME]
            self._connections += 1
        self._look = self._link.watch(reader, self._clock_ns)
        self._hello = dataclasses.replace(self._hello, former=welcome.session)
        _log.info("connected to the daemon of '%s' as guest %d", self._name, welcome.guest_id)
        return lambda: self._grantor.joined(welcome, asked_at_ns, channel)

    def _return_to_daemon(self) -> None:
        retry_ns, last_text = self._first_retry_ns, ""
        while True:
            wait_readable(self._wakeup, None, retry_ns)
            if not self._grantor.is_clean():  # rule 5
                continue
            try:
                grantor_joins = self._join()
                self._on_connected(self.reader, self.welcome)
                grantor_joins()
            except DaemonUnavailable as error:
                _log.debug("not yet: %s", error)
            except (CoherencyError, OSError) as error:
                if self._channel is not None:  # the callback cannot use what the daemon has told
                    self._end(LinkEvent.LOSS)
                if str(error) != last_text:
                    _log.warning("the daemon of '%s' is back, but of no use: %s", self._name, error)
                last_text = str(error)
            else:
                break
            retry_ns = min(2 * retry_ns, self._patience.last_retry_ns)

    def _end(self, event: LinkEvent, *, goodbye: bool = False) -> None:
        self.reader.withdraw()  # first, rule 1
        self._grantor.lost()
        with self._state_lock:
            channel, self._channel = self._channel, None
            answer, self._answer = self._answer, None
            self._state = LINK_TRANSITIONS[self._state, event]
            self._losses += event is LinkEvent.LOSS
        if answer is not None:
            answer.put(None)
        if channel is not None:
            if goodbye and self._grantor.is_clean():
                with contextlib.suppress(ConnectionError):
                    channel.send(Goodbye())
            channel.hang_up()  # others may have copies of the socket
            channel.close()

    def _lose(self, reason: str) -> None:
        self._end(LinkEvent.LOSS)
        _log.warning("lost the daemon of '%s': %s", self._name, reason)
        self._on_lost()

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._channel is not None or self._reconnect:
                if self._channel is not None:
                    self._attend(self._channel)
                else:
                    self._return_to_daemon()
        except Interrupted:
            self._end(LinkEvent.CLOSE, goodbye=True)
        except Exception:  # noqa: BLE001 - whatever a callback raised: without this thread nobody would withdraw
            if self._channel is not None:
                self._end(LinkEvent.LOSS)
            _log.critical("the connection to '%s' is given up", self._name, exc_info=True)

    def _attend(self, channel: Channel) -> None:
        """One turn: look at the heartbeat, wait for messages until the next look, deal with them."""
        self.reader.pulse(self._clock_ns())
        if trouble := self._look() or self._grantor.tend():
            self._lose(trouble)
            return
        try:
            messages = channel.receive(time.monotonic_ns() + PULSE_PERIOD_NS)
        except (OSError, PeerError) as error:
            self._lose(str(error))
            return
        for message in messages:
            trouble = self._handle(channel, message)
            if trouble:
                self._lose(trouble)
                return

    def _handle(self, channel: Channel, message: Message) -> str | None:
        """Act on a message.  Returns why the connection is of no use any more, if it is not."""
        if isinstance(message, Confirm | Recall | Renewed | Evicted | Happened):
            return self._grantor.handle(message)
        if isinstance(message, StatisticsRequest):
            return self._tell_counters(channel, message.serial)
        if isinstance(message, GuestReport) and self._answer is not None:
            self._guest_reports.append(message)
        elif isinstance(message, StatusReply) and self._answer is not None:
            answer, self._answer = self._answer, None
            answer.put(status_of(message, self._guest_reports))
        elif isinstance(message, Refusal):
            return message.text
        else:
            return f"{type(message).__name__} came unasked"
        return None

    def _tell_counters(self, channel: Channel, serial: int) -> str | None:
        counters = self._counters()
        try:
            channel.send(
                Statistics(
                    serial, counters.hits, counters.misses, counters.refreshes, counters.lower_requests, counters.entries
                )
            )
        except ConnectionError as error:
            return str(error)
        self._answered += 1
        return None
