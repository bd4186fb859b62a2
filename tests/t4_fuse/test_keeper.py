"""The keeper outlives the agent long enough to make its mount harmless; and an agent outlives its keeper."""

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.protocol import Goodbye, Message
from coherency.protocol_stream import Decoder
from tests.dropping import Call, Dropping, dropping
from tests.passthrough import TIMEOUT_S, eventually
from tests.scenarios.comparing import attempt

SIZE = 4  # helpers that are kept
DEAD = ("ENOTCONN", "ECONNABORTED")


class Daemon:
    """The daemon's end of a guest's control socket."""

    def __init__(self) -> None:
        self.socket, self.guests_end = socket.socketpair()
        self.socket.settimeout(TIMEOUT_S)

    def messages(self) -> list[Message]:
        """All that comes, until nobody has the other end any more."""
        self.guests_end.close()
        decoder, messages = Decoder(), []
        while data := self.socket.recv(4096):
            messages += decoder.feed(data)
        return messages

    def hears_nothing(self) -> bool:
        return not select.select([self.socket], [], [], 0)[0]


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.guests_end.close()
    daemon.socket.close()


@pytest.fixture
def directory(make_socket_dir: Callable[[], Path]) -> Path:
    return make_socket_dir()


def processes_of(mount: Dropping) -> list[int]:
    eventually(lambda: (pool := mount.pool())["helpers"] - pool["left"] == SIZE)
    return [mount.ask("keeper"), *mount.ask("helpers")]


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def all_gone(pids: list[int]) -> bool:
    return not any(is_running(pid) for pid in pids)


# --- the agent dies ---


@pytest.mark.parametrize("cleans", [True, False], ids=["cleaned", "negative control"])
def test_a_dead_mount_answers_nothing_old(directory: Path, daemon: Daemon, cleans: bool) -> None:
    """By the time that the goodbye is heard: whoever hears it may change what the kernel was allowed to keep."""
    with dropping(directory, channel=daemon.guests_end.fileno(), cleans=cleans) as mount:
        theirs = mount.directory / "d" / "f"
        theirs.parent.mkdir()
        theirs.write_text("old")
        mount.warm("d/f")
        file = os.open(mount.mountpoint / "d" / "f", os.O_RDONLY)
        held = os.open(mount.mountpoint / "d", os.O_PATH)
        os.fstat(file)
        processes = processes_of(mount)
        mount.kill()
        assert isinstance(daemon.messages()[0], Goodbye)
        theirs.write_text("another")
        outcomes: list[Any] = [
            attempt(os.stat, mount.mountpoint / "d" / "f"),
            attempt(os.stat, "f", dir_fd=held),
            attempt(os.fstat, file),
            attempt(os.fstat, held),
            attempt(os.stat, mount.mountpoint),
        ]
        if cleans:
            assert all(outcome in DEAD for outcome in outcomes), outcomes
        else:
            assert [outcome.st_size for outcome in outcomes[2:3]] == [3]
        os.close(held)
        attempt(os.close, file)
        eventually(lambda: all_gone(processes))


def test_nobody_hangs_on_a_dead_agent(directory: Path, daemon: Daemon) -> None:
    """Callers whose request waits, callers behind them, and helpers."""
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        mount.ask("hold", "CREATE", "", "new")
        creating = Call(lambda: os.open(mount.mountpoint / "new", os.O_CREAT | os.O_WRONLY))
        assert mount.ask("is_held", "CREATE", "", "new")
        assert mount.drop("f")
        behind = Call(lambda: os.stat(mount.mountpoint / "f"))
        eventually(lambda: behind.sleeps_in() == "walk_component")
        processes = processes_of(mount)
        mount.kill()
        assert creating.result() in DEAD
        assert behind.result() in DEAD
        assert daemon.messages() == [Goodbye()]
        eventually(lambda: all_gone(processes))


def test_the_last_connection_is_said_goodbye_on(directory: Path, daemon: Daemon) -> None:
    """And none, if there is none."""
    with dropping(directory) as mount, socket.socket(socket.AF_UNIX) as listening:
        address = str(directory / "socket")
        listening.bind(address)
        listening.listen()
        mount.ask("share_connection", address)
        first, _ = listening.accept()
        mount.ask("share_connection", address)
        second, _ = listening.accept()
        for each in (first, second):
            each.settimeout(TIMEOUT_S)
        assert first.recv(100) == b""
        mount.kill()
        assert Decoder().feed(second.recv(100)) == [Goodbye()]
        assert second.recv(100) == b""
        first.close()
        second.close()


def test_without_a_connection_there_is_no_goodbye(directory: Path, daemon: Daemon) -> None:
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        mount.ask("share_nothing")
        assert daemon.messages() == []
        processes = processes_of(mount)
        mount.kill()
        eventually(lambda: all_gone(processes))


def test_an_agent_that_had_granted_much(directory: Path, daemon: Daemon) -> None:
    """The keeper goes through all nodes."""
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        file = os.open(mount.mountpoint / "f", os.O_RDONLY)
        mount.ask("granted_up_to", 100_000)
        mount.kill()
        assert daemon.messages() == [Goodbye()]
        assert attempt(os.fstat, file) in DEAD
        attempt(os.close, file)


def test_an_agent_that_had_granted_more_than_can_be_gone_through(directory: Path, daemon: Daemon) -> None:
    """No goodbye, so that the daemon waits for the end of the lease; but nobody hangs meanwhile."""
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        mount.ask("granted_up_to", 1 << 40)
        processes = processes_of(mount)
        mount.kill()
        assert daemon.messages() == []
        assert attempt(os.stat, mount.mountpoint / "f") in DEAD
        eventually(lambda: all_gone(processes))


# --- the agent ends ---


def test_a_clean_end_leaves_nothing(directory: Path, daemon: Daemon) -> None:
    """No process, and no goodbye of the keeper's."""
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        processes = processes_of(mount)
        mount.ask("close")
        assert all_gone(processes)
        assert daemon.messages() == []
        mount.ask("close")


def test_somebody_unmounts(directory: Path) -> None:
    """The keeper's copy of the device does not keep the session alive."""
    with dropping(directory) as mount:
        processes = processes_of(mount)
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.ask("is_over", 20)
        mount.ask("close")
        assert all_gone(processes)


def test_a_clean_end_while_helpers_wait(directory: Path) -> None:
    with dropping(directory) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        mount.ask("hold", "CREATE", "", "new")
        creating = Call(lambda: os.open(mount.mountpoint / "new", os.O_CREAT | os.O_WRONLY))
        assert mount.ask("is_held", "CREATE", "", "new")
        assert mount.drop("f")
        processes = processes_of(mount)
        mount.ask("close_helpers")
        assert not is_running(processes[0])
        mount.ask("release_all")
        os.close(creating.result())
        eventually(lambda: all_gone(processes))


# --- the keeper or a helper dies ---


def test_a_keeper_that_dies_is_replaced(directory: Path, daemon: Daemon) -> None:
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        mount.logs_expected = True
        (mount.directory / "f").touch()
        mount.warm("f")
        processes = processes_of(mount)
        mount.ask("kill", processes[0])
        eventually(lambda: mount.pool()["keepers"] == 2)
        assert mount.drop("f")
        assert not mount.is_cached("f")
        eventually(lambda: all_gone(processes))
        assert daemon.hears_nothing()
        mount.warm("f")
        file = os.open(mount.mountpoint / "f", os.O_RDONLY)
        os.fstat(file)
        processes = processes_of(mount)
        mount.kill()
        assert daemon.messages() == [Goodbye()]  # of the new keeper, which knows what the old one did
        assert attempt(os.fstat, file) in DEAD
        attempt(os.close, file)
        eventually(lambda: all_gone(processes))
        assert "the keeper of " in mount.logged()


@pytest.mark.parametrize("who", ["helper", "keeper"])
def test_a_drop_survives_its_helper(directory: Path, who: str) -> None:
    with dropping(directory) as mount:
        mount.logs_expected = who == "keeper"
        (mount.directory / "f").write_text("content")
        mount.warm("f")
        assert mount.drop("f")
        mount.ask("hold", "LOOKUP", "", "f")
        looking = Call(lambda: os.stat(mount.mountpoint / "f").st_size)
        assert mount.ask("is_held", "LOOKUP", "", "f")
        outcome = mount.begin_drop("f")
        eventually(lambda: mount.ask("helpers_sleep_in") == ["d_alloc_parallel"])
        [busy] = mount.ask("busy_helpers")
        mount.ask("kill", busy if who == "helper" else mount.ask("keeper"))
        mount.ask("release", "LOOKUP", "", "f")
        assert outcome(20)
        assert looking.result() == 7
        assert not mount.is_cached("f")
        eventually(lambda: mount.pool()["helpers"] == SIZE)


def test_helpers_that_die_are_replaced(directory: Path) -> None:
    with dropping(directory) as mount:
        (mount.directory / "f").touch()
        for _ in range(3):
            mount.warm("f")
            helpers = mount.ask("helpers")
            for pid in helpers:
                mount.ask("kill", pid)
            assert mount.drop("f")
            assert not mount.is_cached("f")
            eventually(lambda: mount.pool()["helpers"] == SIZE and not set(mount.ask("helpers")) & set(helpers))  # noqa: B023


# --- what they are ---


def test_signals_for_the_group_are_the_agents_business(directory: Path) -> None:
    """Ctrl-C does not reach them, nor does who ends a service by a signal to all of its processes."""
    with dropping(directory) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        processes = processes_of(mount)
        assert {os.getsid(pid) for pid in processes} == {processes[0]}
        for pid in processes:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        assert mount.drop("f")
        assert processes_of(mount) == processes


def test_they_have_nothing_that_is_not_theirs(directory: Path, daemon: Daemon) -> None:
    with dropping(directory, channel=daemon.guests_end.fileno()) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        assert mount.drop("f")
        keeper, *helpers = processes_of(mount)
        for pid in helpers:
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            eventually(lambda: [target.split(":")[0] for target in descriptors(pid)] == ["socket"])  # noqa: B023
        assert os.readlink(f"/proc/{keeper}/cwd") == "/"
        # Processes, the alarm, orders, channel; in the middle of a fork more for a moment.
        own = ["/dev/fuse", "/memfd", *["anon_inode"] * (1 + SIZE), *["pipe"] * 2, "socket", "socket"]
        eventually(lambda: sorted(target.split(":")[0] for target in descriptors(keeper)[3:]) == own)
        assert len(os.listdir(f"/proc/{keeper}/task")) == 1


def descriptors(pid: int) -> list[str]:
    where = Path(f"/proc/{pid}/fd")
    return [os.readlink(where / name) for name in sorted(os.listdir(where), key=int)]


def test_without_helpers_there_is_no_mount(directory: Path) -> None:
    """What start() raises when processes cannot be started."""
    with dropping(directory) as mount:
        mount.logs_expected = True
        assert "MountError" in mount.ask("start_another_without", "python")
        assert "MountError" in mount.ask("start_another_without", "helpers")
