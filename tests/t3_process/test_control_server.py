"""The control socket with real peers, some of them hostile: whoever breaks the rules goes, and nobody else notices."""

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import resource
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from coherency.daemon.server import ControlServer
from coherency.daemon.switchboard import Limits
from coherency.errors import DaemonUnavailable, Refused
from coherency.guest_agent.client import Client, fetch_status, invalidate
from coherency.protocol import (
    Goodbye,
    GuestReport,
    Hello,
    Invalidated,
    InvalidateRequest,
    Message,
    Refusal,
    RefusalCode,
    StatisticsRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    encode,
)
from coherency.protocol_stream import Decoder
from coherency.shm_table import TableReader
from tests.control_daemon import PATIENT, ControlDaemon, DaemonProcess
from tests.control_messages import REPORT, frame
from tests.switchboards import make_leasing
from tests.waiting import until

QUICK = Limits(opening_ns=400_000_000, frame_ns=200_000_000, statistics_ns=10_000_000_000)
HELLO = encode(Hello(name="raw", pid=1, mode="none", former=0))
COUNTERS = SimpleNamespace(hits=1, misses=2, refreshes=3, lower_requests=4, entries=5)
PATIENCE_S = 20.0


class RawPeer:
    """A peer made of bytes."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.settimeout(PATIENCE_S)
        self.decoder = Decoder()

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the daemon has hung up, or the test has
            self.sock.send(encode(Goodbye()))
        self.sock.close()

    def hear(self) -> list[Message]:
        """The next messages; an empty list when the daemon has hung up."""
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            return []
        return self.decoder.feed(data) if data else []

    def hear_until_the_end(self) -> list[Message]:
        heard: list[Message] = []
        while more := self.hear():
            heard += more
        return heard


@contextlib.contextmanager
def guest(daemon: ControlDaemon | DaemonProcess, name: str = "good") -> Iterator[Client]:
    """A guest as it should be."""
    client = Client.connect(daemon.root, daemon.name, guest_name=name, mode="access", statistics=lambda: COUNTERS)
    with client:
        yield client
        client.check()


@pytest.fixture
def daemon(socket_dir: Path) -> Iterator[ControlDaemon]:
    with ControlDaemon(socket_dir, "share-1", limits=QUICK) as serving:
        yield serving


def assert_serves(daemon: ControlDaemon, good: Client) -> None:
    """The good guest is connected and answers, and its table is trusted."""
    status = fetch_status(daemon.root, daemon.name)
    assert [(each["name"], each["answered"], each["hits"]) for each in status["guests"] if each["name"] == "good"] == [
        ("good", True, 1)
    ]
    until(lambda: good.reader.trusted_until_ns > time.monotonic_ns())
    assert good.statistics().losses == 0


# --- hello and welcome ---------------------------------------------------------------------------------------------


def receive_table(peer: RawPeer) -> tuple[Welcome, int]:
    data, descriptors, _, _ = socket.recv_fds(peer.sock, 65536, 4)
    (welcome,), (descriptor,) = peer.decoder.feed(data), descriptors
    assert isinstance(welcome, Welcome)
    return welcome, descriptor


def test_a_welcome_brings_a_table_that_can_only_be_read(daemon: ControlDaemon) -> None:
    with RawPeer(daemon.path) as peer:
        peer.sock.send(HELLO)
        welcome, table = receive_table(peer)
    try:
        assert os.fstat(table).st_size == welcome.table_bytes
        assert fcntl.fcntl(table, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(PermissionError):
            mmap.mmap(table, welcome.table_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(table, b"x")
        # Root may open it again for writing: the seals are what keeps the table whole.
        again = os.open(f"/proc/self/fd/{table}", os.O_RDWR)
        try:
            with pytest.raises(PermissionError):
                os.write(again, b"x")
            with pytest.raises(PermissionError):
                mmap.mmap(again, welcome.table_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(PermissionError):
                os.truncate(again, 0)
        finally:
            os.close(again)

        words = memoryview(mmap.mmap(table, welcome.table_bytes, mmap.MAP_SHARED, mmap.PROT_READ)).cast("Q")
        reader = TableReader(words, table_id=(welcome.table_id_high, welcome.table_id_low))
        before = reader.epoch
        daemon.table.advance_epoch()
        assert reader.epoch == before + 1
    finally:
        os.close(table)


def test_the_socket_is_for_owner_and_group(daemon: ControlDaemon) -> None:
    assert stat.S_IMODE(daemon.path.stat().st_mode) == 0o660


def test_guests_are_known(daemon: ControlDaemon) -> None:
    with guest(daemon, "one"), guest(daemon, "two"):
        one, two = daemon.server.guests()
        assert (one.name, one.pid, one.mode, one.statistics) == ("one", os.getpid(), "access", None)
        assert one.credentials == (os.getpid(), os.geteuid())
        assert two.guest_id == one.guest_id + 1
        fetch_status(daemon.root, daemon.name)
        known = daemon.server.guests()[0].statistics
        assert known is not None
        assert (known.hits, known.entries) == (1, 5)
    until(lambda: daemon.server.guests() == ())


# --- hostile input -------------------------------------------------------------------------------------------------


def garbage(peer: RawPeer) -> None:
    peer.sock.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")


def oversized(peer: RawPeer) -> None:
    peer.sock.send(frame(b"", length=1 << 30))


def endless(peer: RawPeer) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            peer.sock.send(b"COH1" * 10000)


def wrong_checksum(peer: RawPeer) -> None:
    peer.sock.send(HELLO[:8] + b"\0\0\0\0" + HELLO[12:])


def wrong_fields(peer: RawPeer) -> None:
    peer.sock.send(frame(b"\x92\x01\x01"))


def wrong_moment(peer: RawPeer) -> None:
    peer.sock.send(HELLO + HELLO)


def newer_version(peer: RawPeer) -> None:
    peer.sock.send(frame(b"\x92\x01\x02"))


def half_a_frame(peer: RawPeer) -> None:
    peer.sock.send(HELLO[:20])


def idleness(peer: RawPeer) -> None:
    """An operator that has had its answer, and stays."""
    peer.sock.send(encode(StatusRequest()))


def dribble(peer: RawPeer) -> None:
    """A byte at a time, each in good time, all together too late."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for byte in encode(Hello(name="x" * 64, pid=1, mode="none", former=0)):
            peer.sock.send(bytes([byte]))
            if select.select([peer.sock], [], [], 0.01)[0]:
                return


DROPPED = r"dropping .*peer \d+ \(pid \d+, uid \d+\): "
DROPPED_GUEST = r"dropping guest .*: (hung up without a goodbye|could not be read)"


@pytest.mark.expected_logs(DROPPED)
@pytest.mark.parametrize(
    ("abuse", "code", "reason"),
    [
        (garbage, RefusalCode.FAULT, "a frame without the magic"),
        (oversized, RefusalCode.FAULT, "a payload of 1073741824 bytes"),
        (endless, RefusalCode.FAULT, "a payload of "),
        (wrong_checksum, RefusalCode.FAULT, "a payload with another checksum"),
        (wrong_fields, RefusalCode.FAULT, "Hello: 1 fields instead of 7"),
        (wrong_moment, RefusalCode.FAULT, "Hello does not belong into the state 'guest'"),
        (newer_version, RefusalCode.VERSION, "Hello: the peer speaks version 2, we speak 1"),
        (half_a_frame, RefusalCode.LATE, "began a frame and did not finish it within 0.2 s"),
        (idleness, RefusalCode.LATE, "sent no request within 0.4 s"),
        (dribble, RefusalCode.LATE, "began a frame and did not finish it within 0.2 s"),
    ],
)
def test_hostile_input_costs_its_sender_the_connection_and_nobody_anything(
    daemon: ControlDaemon,
    caplog: pytest.LogCaptureFixture,
    abuse: Callable[[RawPeer], None],
    code: RefusalCode,
    reason: str,
) -> None:
    with guest(daemon) as good:
        with RawPeer(daemon.path) as bad:
            abuse(bad)
            until(lambda: daemon.server.statistics().dropped == 1)
            if abuse is not endless:  # who never stops writing reads nothing
                refusals = [message for message in bad.hear_until_the_end() if isinstance(message, Refusal)]
                assert [message.code for message in refusals] == [code]
                assert reason in refusals[0].text
        assert [record.message for record in caplog.records if reason in record.message]
        assert_serves(daemon, good)


@pytest.mark.expected_logs(DROPPED + "hung up in the middle of a frame")
def test_a_truncated_stream(daemon: ControlDaemon) -> None:
    with guest(daemon) as good:
        with RawPeer(daemon.path) as bad:
            bad.sock.send(HELLO[:20])
            bad.sock.close()
        until(lambda: daemon.server.statistics().dropped == 1)
        assert_serves(daemon, good)


def test_negative_control_an_operator_in_good_order_is_not_dropped(daemon: ControlDaemon) -> None:
    fetch_status(daemon.root, daemon.name)
    until(lambda: daemon.server.statistics().peers == 0)
    assert daemon.server.statistics().dropped == 0


@pytest.mark.expected_logs(DROPPED + "does not read")
def test_a_peer_that_never_reads_is_dropped_and_blocks_nobody(socket_dir: Path) -> None:
    limits = replace(PATIENT, unsent_bytes=4096)
    with ControlDaemon(socket_dir, "share-1", limits=limits) as daemon, guest(daemon) as good:
        with RawPeer(daemon.path) as deaf:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(20000):
                    deaf.sock.send(encode(InvalidateRequest()))
            until(lambda: daemon.server.statistics().dropped == 1)
        assert_serves(daemon, good)


def test_negative_control_a_peer_that_reads_gets_everything(socket_dir: Path) -> None:
    with ControlDaemon(socket_dir, "share-1", limits=replace(PATIENT, unsent_bytes=4096)) as daemon:
        with RawPeer(daemon.path) as peer:
            for _ in range(200):
                peer.sock.sendall(encode(InvalidateRequest()) * 100)
                heard: list[Message] = []
                while len(heard) < 100:
                    heard += peer.hear()
        assert daemon.server.statistics().dropped == 0
        assert daemon.server.statistics().messages >= 20000


def test_descriptors_that_a_peer_sends_are_closed(daemon: ControlDaemon) -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as pipe, RawPeer(daemon.path) as peer:
        socket.send_fds(peer.sock, [HELLO], [write_end] * 200)
        os.close(write_end)
        receive = peer.hear()
        assert [type(message) for message in receive] == [Welcome]
        assert pipe.read() == b""  # the end of the pipe: nobody has the other end open any more
        peer.sock.send(encode(StatusRequest()))
        assert peer.hear() == [StatisticsRequest(1)]


def test_two_hundred_connections_leave_no_descriptor(daemon: ControlDaemon) -> None:
    with guest(daemon):
        pass
    until(lambda: daemon.server.statistics().peers == 0)  # the daemon is in this process: its end counts, too
    gc.collect()  # tables that tracebacks of earlier tests have kept are mapped
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        with guest(daemon, f"guest-{number}"):
            pass
        fetch_status(daemon.root, daemon.name)
        with RawPeer(daemon.path) as peer:
            peer.sock.send(HELLO)
            peer.hear()
        invalidate(daemon.root, daemon.name)
    until(lambda: daemon.server.statistics().peers == 0)
    assert daemon.server.statistics().opened >= 200
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # less: something of an earlier test has gone meanwhile


@pytest.mark.expected_logs(DROPPED + "too many connections", DROPPED_GUEST)
def test_too_many_connections(socket_dir: Path) -> None:
    with ControlDaemon(socket_dir, "share-1", limits=replace(PATIENT, peers=5, statistics_ns=QUICK.frame_ns)) as daemon:
        peers = [RawPeer(daemon.path) for _ in range(5)]
        for peer in peers:  # who says nothing would make room
            peer.sock.send(HELLO)
        until(lambda: daemon.server.statistics().guests == 5)
        for _ in range(50):  # it does not wait for a question before it hangs up, and often is faster than that
            with pytest.raises(Refused, match="too many connections") as caught:
                fetch_status(daemon.root, daemon.name)
            assert caught.value.code == RefusalCode.FULL
        peers[0].sock.close()
        until(lambda: daemon.server.statistics().peers == 4)
        fetch_status(daemon.root, daemon.name)
        for peer in peers:
            peer.sock.close()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_daemon_without_descriptors_waits_for_some(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon, guest(daemon):
        in_use = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (in_use + 2, in_use + 2))
        path = socket_dir / "share-1" / "control.sock"
        peers = [RawPeer(path) for _ in range(10)]
        until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) == in_use + 2)
        cpu_before, began = cpu_seconds(daemon.pid), time.monotonic()
        peers[-1].sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            peers[-1].sock.recv(1)
        # Neither spins on the connections that it cannot take, nor forgets those that it has.
        assert cpu_seconds(daemon.pid) - cpu_before < (time.monotonic() - began) / 2
        for peer in peers:
            peer.sock.close()
        assert [each["answered"] for each in fetch_status(daemon.root, daemon.name)["guests"]] == [True]


# --- status and invalidate -----------------------------------------------------------------------------------------


def test_status_collects_from_all_guests_and_waits_for_none(socket_dir: Path) -> None:
    limits = Limits(statistics_ns=1_000_000_000)
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(ControlDaemon(socket_dir, "share-1", limits=limits))
        for name in ("one", "two"):
            stack.enter_context(guest(daemon, name))
        silent = stack.enter_context(RawPeer(daemon.path))
        silent.sock.send(HELLO)
        until(lambda: len(daemon.server.guests()) == 3)
        status = fetch_status(daemon.root, daemon.name)
        assert {each["name"]: (each["answered"], each["hits"]) for each in status["guests"]} == {
            "one": (True, 1),
            "two": (True, 1),
            "raw": (False, 0),
        }
        assert status.items() >= {**REPORT, "epoch": 1}.items()


def test_many_ask_at_once(daemon: ControlDaemon) -> None:
    answers: list[int] = []
    with guest(daemon, "one"), guest(daemon, "two"):
        askers = [
            threading.Thread(target=lambda: answers.append(len(fetch_status(daemon.root, daemon.name)["guests"])))
            for _ in range(20)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    assert answers == [2] * 20


def test_answers_that_the_socket_does_not_take_at_once_come_later_and_in_order(daemon: ControlDaemon) -> None:
    """A socket takes a few hundred small messages that nobody reads; the others wait in the server."""
    count = 1000
    with guest(daemon), RawPeer(daemon.path) as asker:
        for _ in range(count):
            asker.sock.send(encode(InvalidateRequest()))
        asker.sock.send(encode(StatusRequest()))
        until(lambda: daemon.server.statistics().messages >= count + 2)
        unsent = [len(link.unsent) for link in daemon.server._links.values()]
        assert max(unsent) > 0
        heard: list[Message] = []
        while len(heard) < count + 2:
            heard += asker.hear()
    assert heard[:count] == [Invalidated(2 + number) for number in range(count)]
    assert [type(message) for message in heard[count:]] == [GuestReport, StatusReply]


def test_invalidate(daemon: ControlDaemon) -> None:
    with guest(daemon) as good:
        before = good.reader.epoch
        assert invalidate(daemon.root, daemon.name) == before + 1 == good.reader.epoch


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.needs_fuse
def test_others_may_not_connect(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        socket_dir.parent.chmod(0o711)
        (socket_dir / "share-1").chmod(0o755)
        with as_nobody(), pytest.raises(Refused, match="may not use the control socket") as caught:
            fetch_status(daemon.root, daemon.name)
        assert caught.value.code == RefusalCode.PERMISSION


@pytest.mark.needs_fuse
def test_who_may_connect_may_not_invalidate(socket_dir: Path) -> None:
    with DaemonProcess(socket_dir, "share-1") as daemon:
        socket_dir.parent.chmod(0o711)
        (socket_dir / "share-1").chmod(0o755)
        (socket_dir / "share-1" / "control.sock").chmod(0o666)
        with as_nobody():
            epoch = fetch_status(daemon.root, daemon.name)["epoch"]
            with pytest.raises(Refused, match="may not invalidate") as caught:
                invalidate(daemon.root, daemon.name)
        assert caught.value.code == RefusalCode.PERMISSION
        assert fetch_status(daemon.root, daemon.name)["epoch"] == epoch
        assert invalidate(daemon.root, daemon.name) == epoch + 1


@pytest.mark.expected_logs(DROPPED + "could not be answered")
def test_a_report_that_fails_is_logged_with_its_cause(
    socket_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ControlDaemon(socket_dir, "share-1") as daemon, guest(daemon) as good:
        with monkeypatch.context() as patch:
            patch.setattr(daemon.table, "statistics", lambda: 1 / 0)
            with pytest.raises(Refused, match="could not be answered"):
                fetch_status(daemon.root, daemon.name)
        assert "ZeroDivisionError" in caplog.text
        assert_serves(daemon, good)


# --- start and end -------------------------------------------------------------------------------------------------


def test_close_ends_everything_and_may_be_repeated(socket_dir: Path) -> None:
    before = threading.active_count()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    daemon = ControlDaemon(socket_dir, "share-1")
    with RawPeer(daemon.path) as peer:
        peer.sock.send(HELLO)
        assert len(peer.hear()) == 1
        closers = [threading.Thread(target=daemon.server.close) for _ in range(3)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        assert peer.hear() == []
    assert not daemon.path.exists()
    assert daemon.server.guests() == ()
    daemon.close()
    assert threading.active_count() == before
    del daemon
    gc.collect()  # the table's writer keeps the mapping, and that a descriptor
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(DaemonUnavailable):
        fetch_status(socket_dir, "share-1")


def unstarted(path: Path) -> ControlServer:
    return ControlServer(
        path,
        welcome=Welcome(0, 5, 9 * 10**9, 1, 2, 4096, 1, "/s", "/e"),
        table_fd=0,
        status=lambda: REPORT,
        invalidate=lambda: pytest.fail("not called"),
        leasing=make_leasing(),
    )


def test_a_server_that_never_started_can_be_closed(socket_dir: Path) -> None:
    before = os.listdir("/proc/self/fd")
    server = unstarted(socket_dir / "control.sock")
    server.check()
    server.close()
    server.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_socket_in_use_is_not_taken(daemon: ControlDaemon) -> None:
    server = unstarted(daemon.path)
    with pytest.raises(OSError, match="in use") as caught:
        server.start()
    assert caught.value.errno == errno.EADDRINUSE
    server.close()
    fetch_status(daemon.root, daemon.name)


def test_a_runtime_directory_may_have_a_long_path(socket_dir: Path) -> None:
    root = socket_dir / ("long" * 20) / ("longer" * 20)
    with ControlDaemon(root, "x" * 64) as daemon, guest(daemon) as good:
        assert len(str(daemon.path)) > 250
        assert_serves(daemon, good)


@pytest.mark.expected_logs("the control channel failed", "lost the daemon")
def test_a_server_that_fails_hangs_up_on_everybody(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No guest may go on believing a table whose daemon cannot tell it to stop."""
    daemon = ControlDaemon(socket_dir, "share-1")
    with guest(daemon) as good:
        monkeypatch.setattr(daemon.server._board, "tick", lambda _now: 1 / 0)
        with pytest.raises(DaemonUnavailable):
            fetch_status(daemon.root, daemon.name)
        until(lambda: good.reader.trusted_until_ns == 0)
    daemon.close()
