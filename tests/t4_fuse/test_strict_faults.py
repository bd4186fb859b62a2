"""Modes strict and prompt when somebody dies, stops, or is cut off: never stale, and nobody waits for longer than a lease."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.guest_agent.client import Client, LinkState
from tests.granting_guest import Gate, GrantingGuest, InBackground, state
from tests.guests import Host
from tests.mounts import detach
from tests.scenarios.comparing import attempt
from tests.waiting import until

LEASE_S = 1.0
LONG_LEASE_S = 10.0
PATIENCE_S = 60


@pytest.fixture(scope="module")
def hasty(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    """A daemon with a short lease."""
    with Host(make_socket_dir(), "--lease", str(LEASE_S)) as host:
        yield host


@pytest.fixture
def file(hasty: Host, request: pytest.FixtureRequest) -> str:
    """A new file of that share."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    (hasty.export / name).write_text("file")
    return name


# --- time ---------------------------------------------------------------------------------------------------------


def test_after_its_time_a_grant_is_renewed_without_asking_the_host(hasty: Host, file: str) -> None:
    with GrantingGuest(hasty, file[:50] + "-guest") as guest:
        path = guest.path / file
        guest.warm(lambda: os.stat(path))
        counted, trips = guest.grants.statistics(), hasty.host_trips()

        def is_granted_anew() -> bool:
            os.stat(path)
            return guest.grants.statistics().granted_names > counted.granted_names

        until(is_granted_anew)  # when the time is over the kernel asks again
        guest.warm(lambda: os.stat(path))
        assert hasty.host_trips() == trips
        assert guest.client.statistics().losses == 0


@pytest.mark.expected_logs("lost the daemon of 'test'")
def test_who_does_not_ack_is_evicted_and_nothing_it_had_is_used_again(hasty: Host, file: str) -> None:
    with GrantingGuest(hasty, file[:50] + "-guest") as guest:
        path = guest.path / file
        guest.warm(lambda: os.stat(path))
        with guest.shut() as gate:
            began_s = time.monotonic()
            change = InBackground(os.chmod, hasty.export / file, 0o600)
            gate.await_reached()
            change.wait()  # the end of the lease
            assert time.monotonic() - began_s < LEASE_S * 3
            # The kernel's own time is over, too: it asks, and the agent is told the truth by the export.
            assert state(path) == state(hasty.share / file)
        until(lambda: guest.client.statistics().connections == 2)
        assert state(path) == state(hasty.share / file)
        guest.warm(lambda: os.stat(path))
        os.chmod(hasty.export / file, 0o640)
        assert state(path) == state(hasty.share / file)


def test_a_stopped_agent_keeps_a_change_waiting_once(hasty: Host, file: str) -> None:
    guest = hasty.mount(file[:50] + "-guest", "strict")
    path = guest / file
    for _ in range(5):
        os.stat(path)
    process = hasty.guests[file[:50] + "-guest"].process
    process.send_signal(signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        os.chmod(hasty.export / file, 0o600)
        os.chmod(hasty.export / file, 0o640)
        assert time.monotonic() - began_s < LEASE_S * 4
    finally:
        process.send_signal(signal.SIGCONT)
    for _ in range(5):
        assert state(path) == state(hasty.share / file)
    os.unlink(hasty.export / file)
    assert state(path) == ()


# --- the channel --------------------------------------------------------------------------------------------------


class Cut:
    """``with Cut(guest) as cut``: the guest cannot connect again inside."""

    def __init__(self, guest: GrantingGuest, monkeypatch: pytest.MonkeyPatch) -> None:
        self._guest, self._gate = guest, Gate()
        join = Client._join

        def held(client: Client) -> Callable[[], None]:
            self._gate.pass_through()
            return join(client)

        monkeypatch.setattr(Client, "_join", held)

    def __enter__(self) -> Gate:
        self._gate.shut()
        self._guest.client._channel.hang_up()
        self._gate.await_reached()
        return self._gate

    def __exit__(self, *exc: object) -> None:
        self._gate.open()
        until(lambda: self._guest.client.state is LinkState.CONNECTED)


@pytest.mark.expected_logs("lost the daemon of 'test'")
def test_without_a_channel_the_kernel_keeps_nothing(
    hasty: Host, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GrantingGuest(hasty, file[:50] + "-guest") as guest:
        path = guest.path / file
        guest.warm(lambda: os.stat(path))
        cut = Cut(guest, monkeypatch)
        with cut:
            assert guest.grants.statistics()[:4] == (0, 0, 0, 0)
            assert guest.asks(lambda: [os.stat(path) for _ in range(3)]) >= 3
            os.chmod(hasty.export / file, 0o600)
            assert state(path) == state(hasty.share / file)
        os.chmod(hasty.export / file, 0o640)
        assert state(path) == state(hasty.share / file)
        guest.warm(lambda: os.stat(path))


@pytest.mark.expected_logs("lost the daemon of 'test'")
def test_after_a_mere_cut_nodes_and_user_cache_are_still_good(
    hasty: Host, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GrantingGuest(hasty, file[:50] + "-guest") as guest, open(guest.path / file, "rb") as opened:
        path = guest.path / file
        guest.warm(lambda: os.stat(path))
        cache, reader, descriptors = guest.fs.cache, guest.client.reader, guest.fs.nodes.statistics().descriptors
        with Cut(guest, monkeypatch):
            os.chmod(hasty.export / file, 0o600)
        until(lambda: guest.fs.cache.reader is not reader)
        assert guest.fs.cache is cache
        assert guest.fs.nodes.statistics().descriptors == descriptors
        assert opened.read() == b"file"
        assert state(path) == state(hasty.share / file)  # what was changed meanwhile is fetched
        trips = hasty.host_trips()
        guest.warm(lambda: os.stat(path))  # what was not, is not
        assert hasty.host_trips() - trips <= 1  # the introduction


# --- the daemon ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_the_mount_goes_on_with_the_next_daemon(make_socket_dir: Callable[[], Path], end: str) -> None:
    with Host(make_socket_dir(), "--lease", str(LEASE_S)) as host:
        (host.export / "file").write_text("file")
        (host.export / "directory").mkdir()
        guest = host.mount("guest", "strict")
        for _ in range(5):
            os.stat(guest / "file")
            os.stat(guest / "directory")
        if end == "killed":
            host.daemon.kill()
        else:
            host.daemon.stop()
        host.serve()
        os.chmod(host.export / "file", 0o600)
        os.rmdir(host.export / "directory")

        def answers() -> bool:
            try:
                return state(guest / "file") == state(host.share / "file")
            except OSError:
                return False

        until(answers)
        assert state(guest / "directory") == ()
        os.chmod(host.export / "file", 0o640)
        assert state(guest / "file") == state(host.share / "file")


# --- the agent ----------------------------------------------------------------------------------------------------


def test_after_a_killed_agent_nobody_waits_for_its_lease(socket_dir: Path) -> None:
    """Its keeper makes the kernel forget, and says goodbye for it."""
    with Host(socket_dir) as host:
        (host.export / "file").write_text("file")
        guest = host.mount("guest", "strict")
        fd = os.open(guest / "file", os.O_PATH)
        try:
            for _ in range(5):
                os.stat(guest / "file")
                os.fstat(fd)
            host.guests.pop("guest").kill()
            began_s = time.monotonic()
            os.chmod(host.export / "file", 0o600)
            assert time.monotonic() - began_s < LONG_LEASE_S / 2
            assert attempt(os.fstat, fd) in ("ENOTCONN", "ECONNABORTED")
        finally:
            os.close(fd)
            detach(guest)


def test_unmounting_says_goodbye_and_nobody_waits(hasty: Host, file: str) -> None:
    with GrantingGuest(hasty, file[:50] + "-guest") as guest:
        path = guest.path / file
        guest.warm(lambda: os.stat(path))
    began_s = time.monotonic()
    os.chmod(hasty.export / file, 0o600)
    assert time.monotonic() - began_s < LEASE_S / 2


def test_whoever_unmounts_a_guest_nobody_waits_for_it(socket_dir: Path) -> None:
    """The agent finds its mount gone, and says goodbye, since no kernel has anything any more. (Otherwise: one lease of ten seconds.)"""
    with Host(socket_dir) as host:
        (host.export / "file").write_text("file")
        guest = host.mount("guest", "strict")
        for _ in range(5):
            os.stat(guest / "file")
        assert host.status()["keys_held"]
        subprocess.run(["umount", guest], check=True, timeout=PATIENCE_S)
        assert host.guests.pop("guest").ended() == 1
        assert not host.status()["lost_guests"]
        os.chmod(host.export / "file", 0o600)
        assert not host.status()["waits"]
