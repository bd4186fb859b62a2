"""An agent that reaches its daemon by a serial port and finds the table in a PCI device: with stand-ins for both."""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from coherency.errors import DaemonUnavailable, LineUnavailable, Refused, TableError
from coherency.guest_agent.channel import Channel
from coherency.guest_agent.client import Client, LinkState, Patience
from coherency.guest_agent.requests import evict, fetch_status
from coherency.guest_agent.virtual_machine import SerialStream
from coherency.ids import GrantKey, HostInode
from coherency.protocol import Hello, Refusal, RefusalCode, Register, StatisticsRequest, Welcome, encode
from coherency.protocol_stream import Decoder
from coherency.shm_memory import map_pci_region
from tests.control_daemon import ControlDaemon
from tests.fake_machine import PORT, FakeMachine, add_pci_device
from tests.waiting import until

COUNTERS = SimpleNamespace(hits=1, misses=2, refreshes=3, lower_requests=4, entries=5)
# Whatever was on the line of a machine hangs up when that ends, which may be in time for the daemon to say so.
pytestmark = pytest.mark.expected_logs("hung up without a goodbye", "could not be read")
PATIENT = Patience(answer_ns=20 * 10**9, first_retry_ns=2_000_000, line_settles_ns=2_000_000, last_retry_ns=20_000_000)
BRIEF = Patience(answer_ns=500_000_000, first_retry_ns=2_000_000, line_settles_ns=2_000_000, last_retry_ns=20_000_000)
INODE = HostInode(77)
LOST = "lost the daemon of 'share-1'"


@pytest.fixture
def daemon(socket_dir: Path) -> Iterator[ControlDaemon]:
    with ControlDaemon(socket_dir, "share-1") as daemon:
        yield daemon


@pytest.fixture
def machine(daemon: ControlDaemon, tmp_path: Path) -> Iterator[FakeMachine]:
    with FakeMachine(tmp_path, daemon.path) as machine:
        add_pci_device(machine.sysfs, "0000:00:05.0", daemon.memory.path)
        until(lambda: machine.connections)
        yield machine


def connect(machine: FakeMachine, *, patience: Patience = PATIENT, reconnect: bool = True, name: str = "vm") -> Client:
    return Client.connect(
        Path("/nowhere"), "share-1", guest_name=name, mode="access", statistics=lambda: COUNTERS, patience=patience,
        reconnect=reconnect, link=machine.link(),
    )  # fmt: skip


def guests(daemon: ControlDaemon) -> list[tuple[str, str, bool]]:
    return [(guest["name"], guest["line"], guest["answered"]) for guest in fetch_status(daemon.root, daemon.name)["guests"]]


def test_an_agent_in_a_machine_is_a_guest_like_others(daemon: ControlDaemon, machine: FakeMachine) -> None:
    with connect(machine) as client:
        client.check()
        stamp = client.reader.sample(INODE)
        assert stamp is not None
        assert client.reader.valid(stamp)
        slots = (client.reader.slot_of(INODE),)
        daemon.table.begin(slots)
        assert not client.reader.valid(stamp)
        daemon.table.end(slots)
        first_ns = client.reader.trusted_until_ns
        until(lambda: client.reader.trusted_until_ns > first_ns)
        assert guests(daemon) == [("vm", "serial", True)]
        assert [guest["line"] for guest in client.request_status()["guests"]] == ["serial"]
    assert client.reader.trusted_until_ns == 0
    until(lambda: guests(daemon) == [])


def test_the_next_agent_needs_no_new_connection(daemon: ControlDaemon, machine: FakeMachine) -> None:
    for _ in range(3):
        with connect(machine):
            assert len(guests(daemon)) == 1
    assert machine.connections == 1


# --- who was cut off ---------------------------------------------------------------------------------------------------


def die_in_the_middle_of_a_frame(daemon: ControlDaemon, machine: FakeMachine) -> None:
    """As an agent that is killed while it sends a long one; the answers that it had not read lie in the port."""
    hello = encode(Hello("dead", 1, "access", 0, "serial", 4711))
    until(lambda: machine.connections)
    machine.write_as_agent(hello)
    until(lambda: len(daemon.server.guests()) == 1)
    machine.write_as_agent(encode(Register(1, 1, tuple(map(GrantKey, range(900)))))[:2000])
    until(lambda: daemon.server.statistics().received_bytes == len(hello) + 2000)


def test_an_agent_that_comes_after_one_that_was_cut_off(daemon: ControlDaemon, machine: FakeMachine) -> None:
    die_in_the_middle_of_a_frame(daemon, machine)
    with connect(machine, patience=BRIEF, name="next") as client:
        assert client.state is LinkState.CONNECTED
        assert [guest.name for guest in daemon.server.guests()] == ["next"]
    assert machine.connections == 1


@pytest.mark.expected_logs("began a frame and did not finish it", "hung up in the middle of a frame")
def test_negative_control_without_hunting_it_never_gets_its_welcome(
    daemon: ControlDaemon, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "hunt", lambda decoder: None)
    die_in_the_middle_of_a_frame(daemon, machine)
    monkeypatch.undo()
    with pytest.raises(DaemonUnavailable, match="does not answer"):
        connect(machine, patience=BRIEF)
    assert [guest.name for guest in daemon.server.guests()] == ["dead"]


def stale_answers(daemon: ControlDaemon, machine: FakeMachine) -> None:
    """What the daemon has said to an agent that is dead, the first of it in part: it lies in the port."""
    machine.write_as_agent(encode(Hello("dead", 1, "access", 0, "serial", 4711)))
    until(lambda: len(daemon.server.guests()) == 1)
    link = daemon.server._links[max(daemon.server._links)]
    frames = encode(StatisticsRequest(9))[3:] + encode(StatisticsRequest(8)) + encode(Welcome(9, 9, 1, 1, 1, 4096, 1, "/", "/", nonce=5))
    link.sock.send(frames)


def test_what_was_meant_for_the_agent_before_is_not_believed(daemon: ControlDaemon, machine: FakeMachine) -> None:
    stale_answers(daemon, machine)
    with connect(machine) as client:
        assert client.welcome.guest_id == 2
        assert client.welcome.share == "/share"


def test_negative_control_without_the_nonce_it_is(
    daemon: ControlDaemon, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale_answers(daemon, machine)
    monkeypatch.setattr("coherency.guest_agent.links.secrets", SimpleNamespace(randbits=lambda _: 5))
    with pytest.raises(TableError):  # of another daemon, for all it knows
        connect(machine, patience=BRIEF)


def test_negative_control_without_hunting_the_agent_does_not_get_that_far(
    daemon: ControlDaemon, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale_answers(daemon, machine)
    monkeypatch.setattr(Channel, "hunt", lambda channel: None)
    with pytest.raises(Exception, match="magic"):
        connect(machine, patience=BRIEF)


@pytest.mark.expected_logs(LOST, "could not be read")
def test_a_connection_that_is_cut_is_made_anew(daemon: ControlDaemon, machine: FakeMachine) -> None:
    with connect(machine) as client:
        reader = client.reader
        machine.cut()
        until(lambda: client.statistics().connections == 2)
        assert reader.trusted_until_ns == 0
        assert client.reader is not reader
        until(lambda: guests(daemon) == [("vm", "serial", True)])


def test_who_gives_up_a_line_on_which_nothing_comes_notices() -> None:
    """Nobody can close the host's end from here, so nothing wakes who waits for something to read."""
    ours, theirs = socket.socketpair()
    with contextlib.closing(Channel(SerialStream(ours.detach()), "share-1", None)) as channel, theirs:
        assert channel.receive(0) == []
        channel.hang_up()
        with pytest.raises(ConnectionAbortedError, match="given up"):
            channel.receive(0)


class RefusingDaemon:
    """Takes connections, refuses the first Hello on each, and closes it; notes when each connection came."""

    def __init__(self, path: Path) -> None:
        self.came_at_ns: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    if connection.recv(65536):
                        self.came_at_ns.append(time.monotonic_ns())
                        connection.sendall(encode(Refusal(RefusalCode.FULL, "full")))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def test_a_line_is_left_alone_after_a_refusal_too(socket_dir: Path, tmp_path: Path) -> None:
    """Until QEMU has noticed that the daemon has closed the connection: what is written before may block the port for good."""
    patience = Patience(answer_ns=500_000_000, first_retry_ns=1_000_000, line_settles_ns=300_000_000)
    daemon = RefusingDaemon(socket_dir / "control.sock")
    with contextlib.closing(daemon), FakeMachine(tmp_path, socket_dir / "control.sock") as machine:
        until(lambda: machine.connections)
        with pytest.raises((Refused, DaemonUnavailable)):  # the end of the connection may come before what was sent on it
            connect(machine, patience=patience)
    first, second, *_ = daemon.came_at_ns
    assert second - first >= patience.line_settles_ns


@pytest.mark.expected_logs(LOST + ".*it was evicted|" + LOST, "evicted")
def test_an_evicted_agent_comes_back(daemon: ControlDaemon, machine: FakeMachine) -> None:
    with connect(machine) as client:
        assert evict(daemon.root, daemon.name, "vm") == 1
        until(lambda: client.statistics().connections == 2)


def test_a_long_message_goes_through_a_narrow_port(daemon: ControlDaemon, machine: FakeMachine) -> None:
    """The port takes 4 KiB at a time; the rest of a frame follows when there is room."""
    channel = machine.link().dial(deadline_ns=1 << 62, wakeup=None)
    with contextlib.closing(channel):
        message = Register(1, 1, tuple(map(GrantKey, range(4000))))
        channel.send(Hello("long", 1, "strict", 0, "serial", 1))
        channel.send(message)
        length = len(encode(message))
        while channel.statistics().sent_bytes < length:
            channel.receive(0)
        until(lambda: daemon.server.statistics().messages == 2)


# --- ports -------------------------------------------------------------------------------------------------------------


def test_without_the_port_it_says_which_there_are(machine: FakeMachine) -> None:
    (machine.sysfs / "class/virtio-ports" / PORT / "name").write_text("org.qemu.guest_agent.0\n")
    with pytest.raises(LineUnavailable, match=r"no virtio-serial port 'coherency\.0', but org\.qemu\.guest_agent\.0"):
        connect(machine, patience=BRIEF)


class BusyPort:
    """Opens like `os.open`, but the port is taken the first `times` times, as virtio-serial has it."""

    def __init__(self, times: float) -> None:
        self.times, self._open = times, os.open

    def __call__(self, path: str | os.PathLike[str], *arguments: int, **named: int) -> int:
        if Path(path).name == PORT and self.times > 0:
            self.times -= 1
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return self._open(path, *arguments, **named)


def test_a_port_that_somebody_else_has_is_waited_for(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    port = BusyPort(3)
    monkeypatch.setattr(os, "open", port)
    with connect(machine):
        assert port.times == 0


def test_and_not_for_ever(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", BusyPort(float("inf")))
    with pytest.raises(LineUnavailable, match=r"another process has .* open"):
        connect(machine, patience=BRIEF)


def test_a_machine_without_a_daemon(tmp_path: Path) -> None:
    with FakeMachine(tmp_path, tmp_path / "nobody.sock") as machine, pytest.raises(LineUnavailable):
        connect(machine, patience=BRIEF)


# --- the table ---------------------------------------------------------------------------------------------------------


def test_of_several_devices_the_one_with_the_daemons_table_is_taken(
    daemon: ControlDaemon, machine: FakeMachine, tmp_path: Path
) -> None:
    small, noise = tmp_path / "small", tmp_path / "noise"
    small.write_bytes(bytes(4096))
    noise.write_bytes(os.urandom(daemon.memory.size_bytes))
    add_pci_device(machine.sysfs, "0000:00:03.0", small)
    add_pci_device(machine.sysfs, "0000:00:04.0", noise)
    add_pci_device(machine.sysfs, "0000:00:01.0", daemon.memory.path, device=0x1000)
    with connect(machine) as client:
        assert client.reader.table_id == daemon.table.table_id


def test_a_region_may_be_larger_than_the_table(daemon: ControlDaemon, machine: FakeMachine, tmp_path: Path) -> None:
    (machine.sysfs / "bus/pci/devices/0000:00:05.0/resource2").unlink()
    large = tmp_path / "large"
    large.write_bytes(bytes(daemon.memory.words) + bytes(daemon.memory.size_bytes))
    (machine.sysfs / "bus/pci/devices/0000:00:05.0/resource2").symlink_to(large)
    with connect(machine) as client:
        assert client.reader.words.nbytes == daemon.memory.size_bytes


def test_the_device_is_enabled_once(daemon: ControlDaemon, machine: FakeMachine) -> None:
    enable = machine.sysfs / "bus/pci/devices/0000:00:05.0/enable"
    with connect(machine):
        assert enable.read_text() == "1"
    enable.write_text("2\n")  # the kernel counts
    with connect(machine):
        assert enable.read_text() == "2\n"


def test_a_machine_that_shows_an_old_table_is_told_what_to_do(daemon: ControlDaemon, machine: FakeMachine, tmp_path: Path) -> None:
    device = machine.sysfs / "bus/pci/devices/0000:00:05.0"
    (device / "resource2").unlink()
    old = tmp_path / "old"
    old.write_bytes(bytes(daemon.memory.size_bytes))
    (device / "resource2").symlink_to(old)
    with pytest.raises(TableError, match=r"restart the machine too, or serve with --table posix \(0000:00:05\.0: "):
        connect(machine)
    until(lambda: guests(daemon) == [])  # it has said goodbye: the line would not have


def test_a_machine_without_a_device(daemon: ControlDaemon, machine: FakeMachine) -> None:
    (machine.sysfs / "bus/pci/devices/0000:00:05.0/vendor").write_text("0x8086\n")
    with pytest.raises(TableError, match="no ivshmem device"):
        connect(machine)


def test_the_memory_of_a_device_cannot_be_written(daemon: ControlDaemon, machine: FakeMachine) -> None:
    memory = map_pci_region(machine.sysfs / "bus/pci/devices/0000:00:05.0", 2, 4096)
    assert memory.words.readonly
    with pytest.raises(TypeError):
        memory.words[0] = 1
    memory.close()
