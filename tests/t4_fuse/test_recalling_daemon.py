"""A whole daemon and scripted guests: changes of the share wait for them, and what a killed daemon leaves is waited for."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from coherency.guest_agent.client import invalidate
from coherency.ids import GrantKey, SlotIndex
from coherency.leases import attributes_key, introduction, names_key
from coherency.protocol import Register
from coherency.shm_abi import splitmix64
from coherency.shm_table import DEFAULT_SLOT_COUNT, TRUST_MARGIN_NS, TRUST_NS
from tests.guests import ROOT, Host
from tests.scripted_guests import ScriptedGuest
from tests.waiting import until

LEASE_S = 3.0
HELD_S = (TRUST_NS + TRUST_MARGIN_NS) / 1e9
LONG = ("--lease", "60")


class World:
    """A host with one file, guests that are ended with it, and a pool for changes."""

    def __init__(self, directory: Path, undo: ExitStack, *options: str) -> None:
        self.undo = undo
        self.host = undo.enter_context(Host(directory, *options))
        self.pool = undo.enter_context(ThreadPoolExecutor(8))
        self.control_socket = self.host.runtime_dir / "test" / "control.sock"
        self.sessions = self.control_socket.with_name("sessions")
        self.file = self.host.export / "file"
        self.file.touch()

    def guest(self, mode: str = "strict", *, former: int = 0) -> ScriptedGuest:
        guest = ScriptedGuest(self.control_socket, mode, former=former)
        self.undo.callback(guest.goodbye)
        return guest

    def keys(self, path: Path | None = None) -> tuple[GrantKey, GrantKey]:
        """Those of the attributes, and of the names that lead to it."""
        slot = SlotIndex(splitmix64((path or self.file).stat().st_ino) & (DEFAULT_SLOT_COUNT - 1))
        return attributes_key(slot), names_key(slot)

    def chmod(self, mode: int = 0o600) -> "Future[float]":
        """In a thread: how many seconds it took."""
        return self.pool.submit(self.timed, lambda: self.file.chmod(mode))

    @staticmethod
    def timed(change: Callable[[], Any]) -> float:
        began = time.monotonic()
        change()
        return time.monotonic() - began


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(make_socket_dir: Callable[[], Path]) -> Iterator[MakeWorld]:
    with ExitStack() as undo:
        yield lambda *options: World(make_socket_dir(), undo, *options)


def shown(world: World) -> str:
    """What an operator sees."""
    command = [sys.executable, "-m", "coherency", "status", "--runtime-dir", str(world.host.runtime_dir)]
    return subprocess.check_output(command, text=True, cwd=ROOT)


# --- changes wait --------------------------------------------------------------------------------------------------


def test_a_change_is_made_when_the_guest_has_forgotten_and_not_before(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    attributes, names = world.keys()
    guest.register(attributes, names)
    removed = world.pool.submit(world.file.unlink)
    assert set(guest.hear_recall().keys) == {attributes, names}
    assert (world.host.share / "file").exists()
    assert world.host.status()["changes_in_flight"] == 2  # directory and file
    assert not removed.done()
    guest.ack(1)
    removed.result(20)
    assert not (world.host.share / "file").exists()


def test_without_recalls_it_is_made_at_once(make_world: MakeWorld) -> None:
    """The negative control."""
    world = make_world(*LONG, "--live-dangerously", "no-recalls")
    guest = world.guest()
    guest.register(*world.keys())
    world.chmod().result(20)
    assert world.host.status()["recalling"] == "off"
    assert "recalls are switched off: guests are stale" in shown(world)
    assert guest.hears_nothing()


def test_what_makes_a_file_recalls_only_the_attributes_of_its_directory(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    attributes, names = world.keys(world.host.export)
    guest.register(attributes, names, *world.keys())
    made = world.pool.submit((world.host.export / "new").touch)
    assert guest.hear_recall().keys == (attributes,)
    guest.ack(1)
    made.result(20)
    assert guest.hears_nothing()


def test_while_many_changes_wait_everything_else_goes_on(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    files = [world.host.export / f"file {number}" for number in range(100)]
    for file in files:
        file.touch()
    guest = world.guest()
    guest.register(*(key for file in files for key in world.keys(file)))
    changes = [threading.Thread(target=file.chmod, args=(0o600,)) for file in files]
    for change in changes:
        change.start()
    try:
        until(lambda: world.host.status()["changes_in_flight"] == len(files))
        assert world.timed(world.file.stat) < 5
        assert world.timed(lambda: world.file.chmod(0o644)) < 5
        assert world.timed(lambda: os.listdir(world.host.export)) < 5
    finally:
        guest.ack_everything()
        for change in changes:
            change.join()


def test_a_process_that_waits_can_be_killed(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    guest.register(*world.keys())
    with subprocess.Popen(["chmod", "600", world.file]) as process:
        guest.hear_recall()
        process.kill()
        process.wait(20)
    until(lambda: world.host.status()["changes_in_flight"] == 0)
    assert (world.host.share / "file").stat().st_mode & 0o777 == 0o644


SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("signalled", flush=True))
print("ready", flush=True)
os.unlink(sys.argv[1])
print("done", flush=True)
"""


def test_a_signal_that_does_not_kill_changes_nothing(make_world: MakeWorld) -> None:
    """Programs that use timers do not expect EINTR of unlink. A later signal may still kill it."""
    world = make_world(*LONG)
    guest = world.guest()
    for ends in ("ack", "kill"):
        world.file.touch()
        guest.register(*world.keys())
        command = [sys.executable, "-c", SIGNALLED, str(world.file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            recall = guest.hear_recall()
            process.send_signal(signal.SIGUSR1)
            assert world.host.status()["changes_in_flight"] == 2
            if ends == "ack":
                guest.ack(recall.serial)
                assert process.stdout.read() == "signalled\ndone\n"
            else:
                process.terminate()
                assert process.wait(20) == -signal.SIGTERM
    until(lambda: world.host.status()["changes_in_flight"] == 0)
    assert (world.host.share / "file").exists()


def test_an_agent_that_releases_before_it_changes_is_not_recalled(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    with pytest.raises(OSError, match=os.strerror(errno.EISCONN)):
        (world.host.export / os.fsdecode(introduction(guest.session))).stat()
    for turn in range(50):
        guest.register(*world.keys())
        guest.release(*world.keys())
        world.file.chmod(0o600 + turn)
        assert guest.hears_nothing()
    guest.register(*world.keys())
    changed = world.chmod()  # the negative control
    guest.ack(guest.hear_recall().serial)
    changed.result(20)


def test_the_status_tells_of_a_guest_that_keeps_a_change_waiting(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    guest.register(*world.keys())
    changed = world.chmod()
    recall = guest.hear_recall()
    assert [line.split()[-9:-2] for line in shown(world).splitlines() if "scripted" in line] == [["0"] * 4 + ["1"] * 3]
    (told,) = world.host.status()["guests"]
    assert (told["keys"], told["recalls"], told["unacked"]) == (1, 1, 1)
    assert 0 < told["lease_left_ns"] < 60e9
    guest.ack(recall.serial)
    changed.result(20)
    assert "1 changes waited" in shown(world)


def test_a_guest_that_does_not_answer_delays_a_change_by_one_lease(make_world: MakeWorld) -> None:
    world = make_world("--lease", str(LEASE_S))
    guest = world.guest()
    guest.register(*world.keys())
    assert 0.1 < world.chmod().result(20) <= LEASE_S + 1
    assert world.chmod().result(20) < 1
    report = world.host.status()
    assert (report["evictions"], report["waits"], report["lease_ns"]) == (1, 1, int(LEASE_S * 1e9))
    assert report["longest_wait_ns"] == report["waited_ns"] > 100_000_000
    assert "its lease of 3 s is over" in world.host.daemon.logged()


def test_invalidate_returns_when_the_guests_have_forgotten(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    guest.register(*world.keys())
    asked = world.pool.submit(invalidate, world.host.runtime_dir, "test")
    assert guest.hear_recall().keys == ()
    assert not asked.done()
    guest.ack(1)
    assert asked.result(20) == 2


# --- a daemon that is killed ---------------------------------------------------------------------------------------


def test_the_next_daemon_waits_for_the_guests_of_a_killed_one(make_world: MakeWorld) -> None:
    world = make_world("--lease", str(LEASE_S))
    guest = world.guest()
    guest.register(*world.keys())
    world.host.daemon.kill()
    killed = time.monotonic()
    world.host.serve()
    report = world.host.status()
    assert report["held_for_guests"] == 1
    assert 0 < report["held_ns"] <= LEASE_S * 1e9
    assert "the daemon before this one was killed, and 1 of its guests have not come back" in shown(world)
    world.chmod().result(20)
    assert time.monotonic() - killed >= LEASE_S
    assert world.host.status()["held_ns"] == 0


@pytest.mark.parametrize("mode", ["strict", "access"])
def test_no_longer_than_until_they_have_come_back(make_world: MakeWorld, mode: str) -> None:
    """Or until nobody trusts its table, if none of them could have anything in its kernel: the negative control."""
    world = make_world(*LONG)
    guest = world.guest(mode)
    if mode == "strict":
        guest.register(*world.keys())
    world.host.daemon.kill()
    killed = time.monotonic()
    world.host.serve()
    changed = world.chmod()
    if mode == "strict":
        until(lambda: world.host.status()["held_ns"] < 58e9)
        assert not changed.done()
        world.guest("prompt", former=guest.session)
    changed.result(20)
    assert HELD_S <= time.monotonic() - killed < 20


def test_a_daemon_that_is_killed_while_it_waits_leaves_that_to_the_next(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    for _ in range(2):
        world.host.daemon.kill()
        world.host.serve()
    assert world.host.status()["held_for_guests"] == 1
    world.guest(former=guest.session)
    world.chmod().result(20)


def test_a_change_that_waits_when_the_daemon_is_killed_is_not_made(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    guest.register(*world.keys())
    changed = world.chmod()
    guest.hear_recall()
    world.host.daemon.kill()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - one of several
        changed.result(20)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert (world.host.share / "file").stat().st_mode & 0o777 == 0o644
    world.host.serve()
    world.guest(former=guest.session)


# --- a daemon that is stopped --------------------------------------------------------------------------------------


def test_a_daemon_that_is_stopped_lets_its_guests_forget_first(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    guest.register(*world.keys())
    world.host.daemon.process.send_signal(signal.SIGTERM)
    assert guest.hear_recall().keys == ()
    guest.say(Register(guest.session, 9, world.keys()))  # whoever registers now is too late to be granted anything
    assert world.host.daemon.process.poll() is None
    guest.ack(1)
    world.host.daemon.process.wait(20)
    assert world.host.daemon.stop() == 0
    assert not world.control_socket.parent.exists()
    world.host.serve()
    assert world.host.status()["held_ns"] == 0
    assert world.chmod().result(20) < HELD_S


def test_or_waits_for_one_lease(make_world: MakeWorld) -> None:
    world = make_world("--lease", str(LEASE_S))
    joined = time.monotonic()
    guest = world.guest()
    guest.register(*world.keys())
    assert world.host.daemon.stop() == 0
    assert time.monotonic() - joined >= LEASE_S
    assert not world.control_socket.parent.exists()
    world.host.serve()


def test_a_second_signal_leaves_that_to_the_next(make_world: MakeWorld) -> None:
    world = make_world(*LONG)
    guest = world.guest()
    guest.register(*world.keys())
    changed = world.chmod()
    guest.hear_recall()
    world.host.daemon.process.send_signal(signal.SIGTERM)
    assert guest.hear_recall().keys == ()
    assert world.host.daemon.stop() == 0
    with pytest.raises(OSError) as caught:  # noqa: PT011 - one of several
        changed.result(20)
    assert caught.value.errno in (errno.EINTR, errno.ENOTCONN, errno.ECONNABORTED)
    assert world.sessions.exists()
    world.host.serve()
    assert world.host.status()["held_for_guests"] == 1
    world.guest(former=guest.session)
