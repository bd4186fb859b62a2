"""The guest's end of the control channel: what it believes, when it stops believing it, how it comes back."""

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from coherency.errors import (
    DaemonUnavailable,
    FrameError,
    MessageError,
    ProtocolVersionError,
    Refused,
    TableError,
    UsageError,
)
from coherency.guest_agent.channel import Channel
from coherency.guest_agent.client import Client, LinkState, Patience, fetch_status, invalidate, served_names
from coherency.ids import HostInode
from coherency.protocol import (
    Hello,
    Invalidated,
    Message,
    Refusal,
    RefusalCode,
    Statistics,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.shm_memory import create_memfd
from coherency.shm_table import State, TableReader, TableWriter, bytes_needed
from tests.control_daemon import TRUST_NS, ControlDaemon, DaemonProcess
from tests.control_messages import REPORT, frame
from tests.waiting import until

COUNTERS = SimpleNamespace(hits=1, misses=2, refreshes=3, lower_requests=4, entries=5)
EAGER = Patience(answer_ns=20_000_000_000, first_retry_ns=1_000_000, last_retry_ns=4_000_000)
SHORT = Patience(answer_ns=500_000_000)
INODE = HostInode(4711)


class Told:
    """What a client's callbacks were told, with the trust at that moment."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.client: Client
        self.client_is_known = threading.Event()

    def lost(self) -> None:
        self.client_is_known.wait()
        self.events.append(f"lost, trusted until {self.client.reader.trusted_until_ns}")

    def connected(self, reader: TableReader, welcome: Welcome) -> None:
        assert (reader, welcome) == (self.client.reader, self.client.welcome)
        self.events.append("connected")


def connect(
    root: Path,
    name: str = "share-1",
    *,
    told: Told | None = None,
    reconnect: bool = False,
    patience: Patience = EAGER,
) -> Client:
    told = told or Told()
    told.client = Client.connect(
        root,
        name,
        guest_name="guest",
        mode="access",
        statistics=lambda: COUNTERS,
        reconnect=reconnect,
        on_lost=told.lost,
        on_connected=told.connected,
        patience=patience,
    )
    told.client_is_known.set()
    return told.client


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# --- trust ---------------------------------------------------------------------------------------------------------


def test_trust_begins_before_the_hello_and_grows_with_the_heartbeat(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1"):
        before_ns = time.monotonic_ns()
        with connect(socket_dir) as client:
            first_ns = client.reader.trusted_until_ns
            assert before_ns + TRUST_NS <= first_ns <= time.monotonic_ns() + TRUST_NS
            until(lambda: client.reader.trusted_until_ns > first_ns)
            client.check()
        assert client.reader.trusted_until_ns == 0


def test_the_clock_of_trust_is_the_callers(socket_dir: Path) -> None:
    with ControlDaemon(socket_dir, "share-1"):
        client = Client.connect(
            socket_dir, "share-1", guest_name="g", mode="none", statistics=lambda: COUNTERS, clock_ns=lambda: 77
        )
        with client:
            assert client.reader.trusted_until_ns == 77 + TRUST_NS


@pytest.mark.expected_logs("lost the daemon of 'share-1': the daemon hung up")
def test_a_killed_daemon_is_not_believed_any_more(socket_dir: Path) -> None:
    told = Told()
    with DaemonProcess(socket_dir, "share-1") as daemon, connect(socket_dir, told=told) as client:
        stamp = client.reader.sample(INODE)
        assert stamp is not None
        daemon.kill()
        until(lambda: client.state is LinkState.LOST)
        assert client.reader.trusted_until_ns == 0
        # Negative control: the words alone do not tell. Nobody will ever change them again.
        assert client.reader.valid(stamp)
        until(lambda: told.events == ["lost, trusted until 0"])
        client.check()


def test_a_stopped_daemon_is_not_believed_for_long(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon, connect(socket_dir) as client:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            until(lambda: client.reader.trusted_until_ns < time.monotonic_ns())
            assert client.state is LinkState.CONNECTED
            with pytest.raises(DaemonUnavailable, match="it does not answer"):
                fetch_status(socket_dir, "share-1", patience=SHORT)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        until(lambda: client.reader.trusted_until_ns > time.monotonic_ns())


@pytest.mark.expected_logs("lost the daemon")
def test_a_daemon_that_stops_in_order_is_not_believed_either(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon, connect(socket_dir) as client:
        stamp = client.reader.sample(INODE)
        assert stamp is not None
        daemon.stop_in_order()
        until(lambda: client.state is LinkState.LOST)
        assert not client.reader.valid(stamp)


# --- coming back ---------------------------------------------------------------------------------------------------


@pytest.mark.expected_logs("lost the daemon")
def test_a_client_finds_the_next_daemon_by_itself(socket_dir: Path) -> None:
    told = Told()
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(DaemonProcess(socket_dir, "share-1"))
        client = stack.enter_context(connect(socket_dir, told=told, reconnect=True))
        for turn in range(1, 4):
            old = client.reader
            daemon.kill()
            daemon = stack.enter_context(DaemonProcess(socket_dir, "share-1"))
            until(lambda turn=turn: told.events == ["lost, trusted until 0", "connected"] * turn)  # type: ignore[misc]
            assert client.reader is not old
            assert client.reader.table_id != old.table_id
            assert client.reader.trusted_until_ns > 0
            assert old.trusted_until_ns == 0
            assert [each["answered"] for each in client.request_status()["guests"]] == [True]
            client.check()
        assert client.statistics()[1:3] == (4, 3)


class Bookkeeper:
    """A grantor that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.clean = threading.Event()
        self.asked_for_clean = threading.Event()

    def joined(self, welcome: Welcome, asked_at_ns: int, channel: Channel) -> None:
        self.events.append("joined")

    def handle(self, message: Message) -> str | None:
        self.events.append(type(message).__name__)
        return None

    def tend(self) -> str | None:
        return None

    def lost(self) -> None:
        self.events.append("lost")

    def is_clean(self) -> bool:
        self.asked_for_clean.set()
        return self.clean.is_set()


@pytest.mark.expected_logs("lost the daemon", "hung up without a goodbye")
def test_the_next_hello_waits_until_the_guest_is_clean_and_names_the_session_before(socket_dir: Path) -> None:
    keeper, told = Bookkeeper(), Told()
    with ControlDaemon(socket_dir, "share-1") as daemon:
        told.client = client = Client.connect(
            socket_dir, "share-1", guest_name="g", mode="strict", statistics=lambda: COUNTERS, reconnect=True,
            on_connected=told.connected, grantor=keeper, patience=EAGER,
        )  # fmt: skip
        with client:
            session = client.welcome.session
            assert client._channel is not None
            client._channel.hang_up()
            assert keeper.asked_for_clean.wait(20)
            assert client.state is LinkState.LOST
            assert keeper.events == ["joined", "lost"]
            assert [former for former, _ in daemon.journal.accounted] == [0]
            keeper.clean.set()
            until(lambda: keeper.events == ["joined", "lost", "joined"])
            assert told.events == ["connected"]
            assert [former for former, _ in daemon.journal.accounted] == [0, session]
            assert client.welcome.session != session
        assert keeper.events[-1] == "lost", "closing, too"


@pytest.mark.expected_logs("lost the daemon")
def test_without_reconnect_a_lost_client_stays_lost(socket_dir: Path) -> None:
    threads = threading.active_count()
    with DaemonProcess(socket_dir, "share-1") as daemon:
        client = connect(socket_dir)
        daemon.kill()
        until(lambda: threading.active_count() == threads)
    with DaemonProcess(socket_dir, "share-1"):
        with pytest.raises(DaemonUnavailable, match="the connection is lost"):
            client.request_status()
        assert client.state is LinkState.LOST
        client.close()
        client.close()
        assert client.state is LinkState.CLOSED  # type: ignore[comparison-overlap]


@pytest.mark.expected_logs("lost the daemon")
def test_a_client_that_waits_for_a_daemon_can_be_closed(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        client = Client.connect(
            socket_dir,
            "share-1",
            guest_name="g",
            mode="none",
            statistics=lambda: COUNTERS,
            reconnect=True,
            patience=Patience(first_retry_ns=10**12),
        )
        daemon.kill()
        until(lambda: client.state is LinkState.LOST)
        client.close()
        client.check()


@pytest.mark.expected_logs("lost the daemon", "is back, but of no use: .*version")
def test_a_daemon_of_another_version_is_reported_once(socket_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon, connect(socket_dir, reconnect=True) as client:
        daemon.kill()
        until(lambda: client.state is LinkState.LOST)
        (socket_dir / "share-1" / "control.sock").unlink()
        with FakeDaemon(socket_dir, lambda: encode(Refusal(RefusalCode.VERSION, "we speak version 2"))) as fake:
            until(lambda: fake.served >= 4)
        assert client.state is LinkState.LOST
    assert caplog.text.count("of no use: we speak version 2") == 1


# --- daemons that are none -----------------------------------------------------------------------------------------


class FakeDaemon:
    """Listens where a daemon would, reads what comes first, answers `answer()` with `fds()`, and hangs up if told to."""

    def __init__(
        self,
        root: Path,
        answer: Callable[[], bytes],
        *,
        fds: Callable[[], list[int]] = list,
        hang_up: bool = True,
    ) -> None:
        (root / "share-1").mkdir(exist_ok=True)
        self.path = root / "share-1" / "control.sock"
        self.answer, self.fds, self.hang_up = answer, fds, hang_up
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.served = 0
        self.peers: list[socket.socket] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            peer, _ = self.listener.accept()
            if not peer.recv(65536):
                peer.close()
                return
            fds = self.fds()
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(peer, [self.answer()], fds)
            for fd in fds:
                os.close(fd)
            if self.hang_up:
                peer.close()
            else:
                self.peers.append(peer)
            self.served += 1

    def __enter__(self) -> "FakeDaemon":
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        self.thread.join()
        self.listener.close()
        for peer in self.peers:
            peer.close()
        self.path.unlink()


TABLE_ID = (3, 4)
TABLE_BYTES = bytes_needed(512)
WELCOME = Welcome(1, 5, 9 * 10**9, *TABLE_ID, TABLE_BYTES, TRUST_NS, "/share", "/export")


def a_table() -> int:
    memory = create_memfd("fake", TABLE_BYTES)
    TableWriter.create(memory.words, slot_count=512, table_id=TABLE_ID).set_state(State.SERVING)
    fd = memory.read_only_fd()
    memory.close()
    return fd


def a_table_that_could_shrink() -> int:
    fd = os.memfd_create("fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, TABLE_BYTES)
    return fd


def a_pipe_end() -> int:
    read_end, write_end = os.pipe()
    os.close(write_end)
    return read_end


def test_negative_control_a_fake_that_does_everything_right_is_believed(socket_dir: Path) -> None:
    with (
        FakeDaemon(socket_dir, lambda: encode(WELCOME), fds=lambda: [a_table()], hang_up=False),
        connect(socket_dir) as client,
    ):
        assert client.welcome == WELCOME
        assert client.reader.trusted_until_ns > 0


OTHER_ID = Welcome(1, 5, 9 * 10**9, 3, 5, TABLE_BYTES, TRUST_NS, "/share", "/export")
OTHER_SIZE = Welcome(1, 5, 9 * 10**9, *TABLE_ID, TABLE_BYTES * 2, TRUST_NS, "/share", "/export")


@pytest.mark.parametrize(
    ("answer", "fds", "error", "match"),
    [
        (b"", [], DaemonUnavailable, "hung up"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", [], FrameError, "magic"),
        (encode(WELCOME)[:-1], [], DaemonUnavailable, "hung up"),
        (frame(b"\x92\x02\x02"), [], ProtocolVersionError, "version 2, we speak 1"),
        (encode(Refusal(RefusalCode.VERSION, "we speak 2")), [], ProtocolVersionError, "we speak 2"),
        (encode(Refusal(RefusalCode.FULL, "no room")), [], Refused, "no room"),
        (encode(Refusal(99, "for reasons of our own")), [], Refused, "for reasons of our own .code 99"),
        (encode(Invalidated(1)), [], MessageError, "Invalidated instead of Welcome"),
        (encode(Hello(name="x", pid=1, mode="none", former=0)), [], MessageError, "Hello instead of Welcome"),
        (encode(WELCOME), [], MessageError, "0 descriptors"),
        (encode(WELCOME), [a_table, a_table], MessageError, "2 descriptors"),
        (encode(WELCOME), [a_table] * 50, MessageError, "descriptors"),
        (encode(WELCOME), [a_pipe_end], TableError, "0 bytes"),
        (encode(WELCOME), [a_table_that_could_shrink], TableError, "shrink"),
        (encode(OTHER_ID), [a_table], TableError, "not .3, 5."),
        (encode(OTHER_SIZE), [a_table], TableError, "bytes instead of"),
    ],
)
def test_answers_to_a_hello_that_are_no_welcome(
    socket_dir: Path, answer: bytes, fds: list[Callable[[], int]], error: type[Exception], match: str
) -> None:
    with FakeDaemon(socket_dir, lambda: answer, fds=lambda: [make() for make in fds]):
        before, threads = descriptors(), threading.active_count()
        with pytest.raises(error, match=match):
            connect(socket_dir)
        assert threading.active_count() == threads
        until(lambda: descriptors() == before)


@pytest.mark.parametrize("ask", [fetch_status, invalidate])
def test_answers_to_an_operator_that_are_none(socket_dir: Path, ask: Callable[[Path, str], object]) -> None:
    cases: list[tuple[bytes, type[Exception]]] = [
        (b"", DaemonUnavailable),
        (b"nonsense", FrameError),
        (encode(WELCOME), MessageError),
        (encode(Refusal(RefusalCode.INTERNAL, "broken")), Refused),
    ]
    for answer, error in cases:
        with FakeDaemon(socket_dir, lambda answer=answer: answer), pytest.raises(error):  # type: ignore[misc]
            ask(socket_dir, "share-1")


def test_a_daemon_that_never_answers_is_given_up(socket_dir: Path) -> None:
    with FakeDaemon(socket_dir, lambda: encode(WELCOME)[:-1], hang_up=False):
        with pytest.raises(DaemonUnavailable, match="it does not answer"):
            connect(socket_dir, patience=SHORT)
        with pytest.raises(DaemonUnavailable, match="it does not answer"):
            fetch_status(socket_dir, "share-1", patience=SHORT)


def test_a_daemon_that_never_accepts_is_given_up(socket_dir: Path) -> None:
    (socket_dir / "share-1").mkdir()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(socket_dir / "share-1" / "control.sock"))
        listener.listen(0)
        filler = stack.enter_context(socket.socket(socket.AF_UNIX))
        filler.connect(str(socket_dir / "share-1" / "control.sock"))
        with pytest.raises(DaemonUnavailable, match="it accepts no connection"):
            fetch_status(socket_dir, "share-1", patience=SHORT)


@pytest.mark.expected_logs("lost the daemon of 'share-1': ")
@pytest.mark.parametrize(
    ("later", "reason"),
    [
        (b"nonsense", "a frame without the magic"),
        (encode(WELCOME), "Welcome came unasked"),
        (encode(StatusReply({**REPORT})), "StatusReply came unasked"),
        (encode(Refusal(RefusalCode.LATE, "you are late")), "you are late"),
    ],
)
def test_a_daemon_that_breaks_the_rules_later_is_lost(
    socket_dir: Path, caplog: pytest.LogCaptureFixture, later: bytes, reason: str
) -> None:
    fake = FakeDaemon(socket_dir, lambda: encode(WELCOME), fds=lambda: [a_table()], hang_up=False)
    with fake, connect(socket_dir) as client:
        until(lambda: fake.peers)
        fake.peers[0].send(later)
        until(lambda: client.state is LinkState.LOST)
        assert client.reader.trusted_until_ns == 0
        until(lambda: reason in caplog.text)


def test_what_comes_with_the_welcome_is_not_lost(socket_dir: Path) -> None:
    """A daemon may ask for statistics in the same breath."""
    both = encode(WELCOME) + encode(StatisticsRequest(9))
    with (
        FakeDaemon(socket_dir, lambda: both, fds=lambda: [a_table()], hang_up=False) as fake,
        connect(socket_dir) as client,
    ):
        until(lambda: fake.peers)
        fake.peers[0].settimeout(20)
        assert fake.peers[0].recv(1000) == encode(Statistics(9, 1, 2, 3, 4, 5))
        until(lambda: client.statistics().answered == 1)


def test_nobody_there(socket_dir: Path) -> None:
    before = descriptors()
    for made in ("nothing", "the directory", "a file in the socket's place"):
        if made == "the directory":
            (socket_dir / "share-1").mkdir()
        elif made != "nothing":
            (socket_dir / "share-1/control.sock").touch()
        for ask in (connect, fetch_status, invalidate):
            with pytest.raises(DaemonUnavailable, match="start it with: coherency serve"):
                ask(socket_dir, "share-1")
    assert descriptors() == before


@pytest.mark.parametrize("name", ["", "../share-1", "a/b"])
def test_impossible_names(socket_dir: Path, name: str) -> None:
    for ask in (connect, fetch_status, invalidate):
        with pytest.raises(UsageError):
            ask(socket_dir, name)


@pytest.mark.parametrize(("guest_name", "mode"), [("", "none"), ("a\nb", "none"), ("x" * 65, "none"), ("g", "fast")])
def test_impossible_guests(socket_dir: Path, guest_name: str, mode: str) -> None:
    with pytest.raises(UsageError, match=r"Hello\."):
        Client.connect(socket_dir, "share-1", guest_name=guest_name, mode=mode, statistics=lambda: COUNTERS)


# --- asking --------------------------------------------------------------------------------------------------------


def test_a_guest_asks_over_its_own_connection(socket_dir: Path) -> None:
    with ControlDaemon(socket_dir, "share-1") as daemon, connect(socket_dir) as client:
        opened = daemon.server.statistics().opened
        for _ in range(3):
            status = client.request_status()
            assert status["guests"][0]["hits"] == 1
            assert status["epoch"] == 1
        assert daemon.server.statistics().opened == opened


def test_guests_ask_from_several_threads(socket_dir: Path) -> None:
    with ControlDaemon(socket_dir, "share-1"), connect(socket_dir) as client:
        answers: list[int] = []
        askers = [
            threading.Thread(target=lambda: answers.append(client.request_status()["guests"][0]["hits"]))
            for _ in range(8)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert answers == [1] * 8


def test_a_channel_that_was_closed_or_cut_says_so(socket_dir: Path) -> None:
    """Whoever asks while the connection ends learns that, and no other error."""
    with ControlDaemon(socket_dir, "share-1"):
        for end in (Channel.close, Channel.hang_up):
            channel = Channel.dial(socket_dir, "share-1", deadline_ns=time.monotonic_ns() + EAGER.answer_ns)
            end(channel)
            with pytest.raises(ConnectionError, match="the daemon is gone"):
                channel.send(StatusRequest())
            channel.close()


@pytest.mark.expected_logs("lost the daemon")
def test_a_question_without_an_answer_ends_the_connection(socket_dir: Path) -> None:
    with (
        FakeDaemon(socket_dir, lambda: encode(WELCOME), fds=lambda: [a_table()], hang_up=False),
        connect(socket_dir, patience=SHORT) as client,
    ):
        with pytest.raises(DaemonUnavailable, match="no answer"):
            client.request_status()
        until(lambda: client.state is LinkState.LOST)
        client.check()


@pytest.mark.expected_logs("lost the daemon")
def test_a_question_to_a_daemon_that_is_killed_meanwhile(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon, connect(socket_dir) as client:
        os.kill(daemon.pid, signal.SIGSTOP)
        killer = threading.Thread(target=daemon.kill)
        killer.start()
        with pytest.raises(DaemonUnavailable):
            client.request_status()
        killer.join()


def test_served_names(socket_dir: Path) -> None:
    assert served_names(socket_dir / "nowhere") == []
    with ControlDaemon(socket_dir, "b"), ControlDaemon(socket_dir, "a"):
        (socket_dir / "empty").mkdir()
        (socket_dir / "file").touch()
        assert served_names(socket_dir) == ["a", "b"]


# --- the end -------------------------------------------------------------------------------------------------------


def test_close_says_goodbye_and_may_be_repeated(socket_dir: Path) -> None:
    threads = threading.active_count()
    with ControlDaemon(socket_dir, "share-1") as daemon:
        serving = threading.active_count()
        told = Told()
        client = connect(socket_dir, told=told, reconnect=True)
        closers = [threading.Thread(target=client.close) for _ in range(3)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        assert client.state is LinkState.CLOSED
        assert client.reader.trusted_until_ns == 0
        assert threading.active_count() == serving
        assert told.events == []
        until(lambda: daemon.server.statistics().peers == 0)
        assert daemon.server.statistics().dropped == 0
        client.check()
    assert threading.active_count() == threads


def test_connections_leave_no_descriptor(socket_dir: Path) -> None:
    with ControlDaemon(socket_dir, "share-1") as daemon:
        connect(socket_dir).close()
        until(lambda: daemon.server.statistics().peers == 0)
        before = descriptors()
        for _ in range(50):
            connect(socket_dir).close()
        until(lambda: descriptors() == before)


@pytest.mark.expected_logs("lost the daemon")
def test_lost_connections_leave_no_descriptor(socket_dir: Path) -> None:
    """The table of a lost connection is unmapped when nobody looks at it any more."""
    fake = FakeDaemon(socket_dir, lambda: encode(WELCOME), fds=lambda: [a_table()])
    with fake, connect(socket_dir, reconnect=True) as client:
        until(lambda: fake.served >= 5)
        before = descriptors()
        until(lambda: fake.served >= 100)
        assert descriptors() <= before + 5  # one connection more or less may be under way
        client.check()


class Failure(Exception):
    """What a callback raises."""


def fail(*_: object) -> None:
    raise Failure


@pytest.mark.expected_logs("lost the daemon", "the connection to 'share-1' is given up")
@pytest.mark.parametrize("which", ["statistics", "on_lost", "on_connected"])
def test_a_callback_that_fails_ends_the_client(socket_dir: Path, caplog: pytest.LogCaptureFixture, which: str) -> None:
    callbacks = {"statistics": lambda: COUNTERS, "on_lost": lambda: None, "on_connected": lambda _r, _w: None}
    callbacks[which] = fail
    threads = threading.active_count()
    with DaemonProcess(socket_dir, "share-1") as daemon:
        client = Client.connect(
            socket_dir,
            "share-1",
            guest_name="g",
            mode="none",
            reconnect=True,
            patience=EAGER,
            **callbacks,  # type: ignore[arg-type]
        )
        if which == "statistics":
            fetch_status(socket_dir, "share-1")
        else:
            daemon.kill()
        with DaemonProcess(socket_dir, "share-2" if which == "statistics" else "share-1"):
            until(lambda: threading.active_count() == threads)
        assert client.reader.trusted_until_ns == 0
        assert "Failure" in caplog.text
        client.check()
        client.close()
        client.check()
