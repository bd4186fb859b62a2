"""What lies between an agent and its daemon: passes on everything in order, and can be cut, muted and slowed down."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.guest_agent.channel import Channel
from coherency.protocol import StatusRequest
from coherency.rendezvous import CONTROL_SOCKET_NAME
from coherency.sim.relay import ROOM_BYTES, Relay
from tests.control_daemon import ControlDaemon
from tests.waiting import until

DEADLINE_S = 20.0


class Ends:
    """A relay between an agent and a daemon that are plain sockets."""

    def __init__(self, directory: Path) -> None:
        daemon = directory / "run" / "test"
        daemon.mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(daemon / CONTROL_SOCKET_NAME))
        self._listener.listen()
        self._listener.settimeout(DEADLINE_S)
        self.relay = Relay(directory / "relay", daemon / CONTROL_SOCKET_NAME)
        self._sockets: list[socket.socket] = []
        self.agent, self.daemon = self.connect()

    def call(self) -> socket.socket:
        agent = socket.socket(socket.AF_UNIX)
        agent.settimeout(DEADLINE_S)
        agent.connect(str(self.relay.runtime_root / "test" / CONTROL_SOCKET_NAME))
        self._sockets.append(agent)
        return agent

    def connect(self) -> tuple[socket.socket, socket.socket]:
        agent = self.call()
        daemon, _ = self._listener.accept()
        daemon.settimeout(DEADLINE_S)
        self._sockets.append(daemon)
        return agent, daemon

    def close_daemon(self) -> None:
        self._listener.close()
        self.daemon.close()

    def close(self) -> None:
        self.relay.close()
        for sock in (*self._sockets, self._listener):
            sock.close()


@pytest.fixture
def ends(socket_dir: Path) -> Iterator[Ends]:
    ends = Ends(socket_dir)
    yield ends
    ends.close()


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_both_directions(ends: Ends) -> None:
    ends.agent.sendall(b"question")
    assert receive(ends.daemon, 8) == b"question"
    ends.daemon.sendall(b"answer")
    assert receive(ends.agent, 6) == b"answer"


def test_descriptors_come_with_their_bytes(ends: Ends) -> None:
    reading, writing = os.pipe()
    socket.send_fds(ends.daemon, [b"table"], [reading])
    data, descriptors, _, _ = socket.recv_fds(ends.agent, 100, 4)
    assert data == b"table"
    os.write(writing, b"the same pipe")
    assert os.read(descriptors[0], 100) == b"the same pipe"
    for fd in (reading, writing, *descriptors):
        os.close(fd)


def test_more_than_its_room_comes_through(ends: Ends) -> None:
    data = bytes(range(256)) * (ROOM_BYTES // 64)
    sender = threading.Thread(target=ends.agent.sendall, args=(data,))
    sender.start()
    assert receive(ends.daemon, len(data)) == data
    sender.join()


@pytest.mark.parametrize("who", ["agent", "daemon"])
def test_the_end_of_one_side_is_the_end_of_the_other(ends: Ends, who: str) -> None:
    this, other = (ends.agent, ends.daemon) if who == "agent" else (ends.daemon, ends.agent)
    this.sendall(b"last words")
    this.close()
    assert receive(other, 10) == b"last words"
    assert ended(other)


def test_cut_until_it_is_mended(ends: Ends) -> None:
    ends.relay.cut()
    assert ended(ends.agent)
    assert ended(ends.daemon)
    assert ended(ends.call()), "nobody is connected meanwhile"
    ends.relay.mend()
    agent, daemon = ends.connect()
    agent.sendall(b"again")
    assert receive(daemon, 5) == b"again"


def test_muted_nothing_comes_and_nothing_is_lost(ends: Ends) -> None:
    ends.relay.mute()
    ends.agent.sendall(b"acks")
    ends.daemon.sendall(b"recalls")
    for sock in (ends.agent, ends.daemon):
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(DEADLINE_S)
    ends.relay.mend()
    assert receive(ends.daemon, 4) == b"acks"
    assert receive(ends.agent, 7) == b"recalls"


def delayed(there: socket.socket, here: socket.socket) -> float:
    start = time.monotonic()
    there.sendall(b"x")
    assert receive(here, 1) == b"x"
    return time.monotonic() - start


def test_each_direction_is_late_by_its_own_delay(ends: Ends) -> None:
    ends.relay.delay(to_daemon_ns=100_000_000)
    assert delayed(ends.agent, ends.daemon) >= 0.1
    assert delayed(ends.daemon, ends.agent) < delayed(ends.agent, ends.daemon)
    ends.relay.delay(to_guest_ns=100_000_000)
    assert delayed(ends.daemon, ends.agent) >= 0.1


def test_shorter_delay_overtakes_nothing(ends: Ends) -> None:
    ends.relay.delay(to_daemon_ns=200_000_000)
    ends.agent.sendall(b"first")
    assert delayed(ends.daemon, ends.agent) >= 0, "so the relay has read it: it has turned"
    ends.relay.delay(to_daemon_ns=0)
    ends.agent.sendall(b"second")
    assert receive(ends.daemon, 11) == b"firstsecond"


def test_mending_lets_through_what_is_late(ends: Ends) -> None:
    ends.relay.delay(to_daemon_ns=3600 * 10**9)
    ends.agent.sendall(b"late")
    ends.agent.shutdown(socket.SHUT_WR)
    ends.relay.mend()
    assert receive(ends.daemon, 4) == b"late"
    assert ended(ends.daemon)


def test_without_a_daemon_whoever_comes_is_hung_up_on(ends: Ends) -> None:
    ends.close_daemon()
    assert ended(ends.agent)
    assert ended(ends.call())


def test_closed_it_leaves_no_thread_and_no_connection(ends: Ends) -> None:
    ends.relay.close()
    ends.relay.close()
    assert ended(ends.agent)
    assert ended(ends.daemon)
    until(lambda: all(thread.name != "relay" for thread in threading.enumerate()))


def test_agents_find_a_real_daemon_through_it(socket_dir: Path, make_socket_dir: Callable[[], Path]) -> None:
    with (
        ControlDaemon(socket_dir / "run", "test") as daemon,
        Relay(make_socket_dir() / "relay", daemon.path) as relay,
    ):
        channel = Channel.dial(relay.runtime_root, "test", deadline_ns=time.monotonic_ns() + 20 * 10**9)
        channel.ask(StatusRequest())
        assert channel.answer(time.monotonic_ns() + 20 * 10**9) is not None
        channel.close()
