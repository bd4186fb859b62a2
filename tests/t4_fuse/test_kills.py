"""SIGKILL of agents and daemons at any moment: what the share looks like then, and what works again by itself.

A process that is killed ends only when the requests that it has sent to another FUSE server are answered, so when it is
reaped nothing of it is under way any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency import GuestAgent
from coherency.guest_agent.api import GuestAgentStatistics
from coherency.shm_table import TRUST_MARGIN_NS, TRUST_NS
from tests.guests import ROOT, Host
from tests.mounts import coherency_mounts_below
from tests.workload import Workload

DEADLINE_S = 30.0
GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO, errno.ESTALE, errno.ENODEV}
AGENT_MOMENTS = [("before", 40), ("after", 60), ("before", 1), ("after", 90)]
DAEMON_MOMENTS = [("begun", 50), ("applied", 70), ("after", 1)]


@pytest.fixture
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


def eventually(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.005)


def answers(path: Path) -> bool:
    try:
        os.stat(path)
        os.listdir(path)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
    return True


def size_of(agent: GuestAgent, path: str) -> int | None:
    try:
        return agent.stat(path).st_size
    except OSError as error:
        if error.errno not in GONE:
            raise
        return None


def kill_after(running_workload: Workload, operations: int, kill: Callable[[], None]) -> None:
    goal = running_workload.acknowledged() + operations
    eventually("the workload goes on", lambda: running_workload.acknowledged() >= goal)
    kill()


# ---- agents ----


def test_agents_killed_at_any_moment_leave_the_files_intact(host: Host) -> None:
    """Each successor mounts on the dead mount of its predecessor, and goes on."""
    seed = 4
    chance = random.Random(seed)
    workload = Workload(host.share, seed)
    moments: list[tuple[str, int] | None] = [*AGENT_MOMENTS, None, None, None]
    chance.shuffle(moments)
    for moment in moments:
        guest = host.mount("guest", doom=moment)
        agent = host.guests["guest"]
        with workload.start(guest) as running:
            if moment is None:
                kill_after(workload, chance.randrange(1, 100), agent.kill)
            else:
                agent.wait_until_killed()
            errors = running.wait_until_all_failed()
        assert len(errors) == len(workload.workers)
        assert {error.errno for error in errors} <= GONE, errors
        workload.settle()
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            guest.stat()

    guest = host.mount("guest")
    with workload.start(guest):
        eventually("everybody works again", lambda: all(worker.acknowledged > 0 for worker in workload.workers))
    workload.settle()
    assert [mount.mountpoint for mount in coherency_mounts_below([host.directory])] == [host.export, guest]


def test_nobody_else_notices_a_killed_agent(host: Host) -> None:
    guest, other = host.mount("guest"), host.mount("other")
    (guest / "file").write_text("from the guest")
    assert (other / "file").read_text() == "from the guest"
    host.guests["guest"].kill()
    (other / "file").write_text("from the other")
    assert (host.share / "file").read_text() == "from the other"
    eventually("its connection is gone", lambda: [each["name"] for each in host.status()["guests"]] == ["other"])
    host.mount("guest")


# ---- daemons ----


def test_daemons_killed_at_any_moment_leave_the_files_intact_and_mounts_come_back(host: Host) -> None:
    seed = 7
    chance = random.Random(seed)
    guest, idle = host.mount("guest"), host.mount("idle", "none")
    workload = Workload(host.share, seed)
    moments: list[tuple[str, int] | None] = [None, *DAEMON_MOMENTS]
    chance.shuffle(moments)
    for moment in moments:
        host.daemon.stop()
        host.serve(doom=moment)
        eventually("the guest is back", lambda: answers(guest))
        with workload.start(guest) as running:
            if moment is None:
                kill_after(workload, chance.randrange(1, 100), host.daemon.kill)
            else:
                host.daemon.wait_until_killed()
            errors = running.wait_until_all_failed()
        assert {error.errno for error in errors} <= GONE, errors
        workload.settle()

    host.serve()
    for mount in (guest, idle):
        eventually(f"{mount} is back", lambda: answers(mount))  # noqa: B023
    with workload.start(guest):
        eventually("everybody works again", lambda: all(worker.acknowledged > 0 for worker in workload.workers))
    workload.settle()
    for worker in workload.workers:
        for mount in (guest, idle):
            directory = mount / worker.directory
            assert {path.name: path.read_bytes() for path in directory.iterdir()} == worker.state
    assert {each["name"] for each in host.status()["guests"]} == {"guest", "idle"}
    assert len(coherency_mounts_below([host.directory])) == 3, "one export and two guests"


def test_killed_while_starting(host: Host) -> None:
    """Whatever was there of a daemon or an agent when it was killed, the next one starts."""
    chance = random.Random(11)
    guest = host.mount("guest")
    for _ in range(2):
        for victim, arguments in (
            (host.guests["guest"], ("mount", host.name, str(guest))),
            (host.daemon, ("serve", str(host.share), "--name", host.name)),
        ):
            victim.kill()
            process = subprocess.Popen(
                [sys.executable, "-m", "coherency", *arguments, "--runtime-dir", host.runtime_dir],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
            )  # fmt: skip
            # Not waiting for anything: this is the moment that was chosen.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.1, 0.6))
            process.kill()
            process.wait()
            if victim is host.daemon:
                host.serve()
            else:
                host.mount("guest")
    eventually("the guest is back", lambda: answers(guest))
    (guest / "file").write_text("all is well")
    assert (host.share / "file").read_text() == "all is well"
    assert len(coherency_mounts_below([host.directory])) == 2


class InUse:
    """A guest mount with an open directory, an open file, and a process whose working directory lies in it."""

    def __init__(self, guest: Path, stack: contextlib.ExitStack) -> None:
        self.guest, self.file = guest, guest / "directory/file"
        self.file.stat()
        self.directory_fd = os.open(guest / "directory", os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, self.directory_fd)
        self.file_fd = os.open(self.file, os.O_RDONLY)
        stack.callback(close_whatever_it_says, self.file_fd)
        self.process = subprocess.Popen(["cat"], cwd=guest / "directory", stdin=subprocess.PIPE)
        stack.enter_context(self.process)

    def assert_dead(self, *, reads: bool) -> None:
        asking: tuple[Callable[[], object], ...] = (
            self.file.stat, self.file.read_text, (self.guest / "directory/inner").stat,
            lambda: os.listdir(self.guest / "directory"), lambda: os.stat("file", dir_fd=self.directory_fd),
            lambda: os.listdir(f"/proc/{self.process.pid}/cwd"), lambda: os.read(self.file_fd, 1),
        )  # fmt: skip
        changing: tuple[Callable[[], object], ...] = (
            (self.guest / "directory/new").touch, lambda: self.file.write_text("lost"), lambda: self.file.chmod(0o600),
        )  # fmt: skip
        for ask in (asking if reads else ()) + changing:
            with pytest.raises(OSError) as refused:  # noqa: PT011 - one of several
                ask()
            assert refused.value.errno in GONE

    def assert_alive(self, share: Path) -> None:
        assert self.process.poll() is None
        cwd = Path(f"/proc/{self.process.pid}/cwd")
        (cwd / self.guest.name).write_text("made by a guest")
        assert sorted(os.listdir(cwd)) == sorted(os.listdir(share / "directory"))
        assert (share / "directory" / self.guest.name).read_text() == "made by a guest"
        assert os.stat("file", dir_fd=self.directory_fd).st_ino == (share / "directory/file").stat().st_ino


@pytest.mark.parametrize("modes", [("access", "none"), ("auto", "always")])
def test_mounts_fail_while_the_daemon_is_dead_and_recover(host: Host, modes: tuple[str, ...]) -> None:
    (host.share / "directory/inner").mkdir(parents=True)
    (host.share / "directory/file").write_text("old")
    never_stale = "access" in modes
    with contextlib.ExitStack() as stack:
        mounts = [InUse(host.mount(mode, mode), stack) for mode in modes]
        host.daemon.kill()
        for mode in modes:
            eventually("it notices", lambda: "lost the daemon" in host.guests[mode].logged())  # noqa: B023
        if never_stale:  # changed by the host while no daemon looks
            (host.share / "directory/file").write_text("newer")
            (host.share / "directory/inner").rmdir()
        for mount in mounts:
            mount.assert_dead(reads=never_stale)
        host.serve()
        for mount in mounts:
            eventually("it is back", lambda: answers(mount.guest))  # noqa: B023
            mount.assert_alive(host.share)
            if never_stale:
                assert mount.file.read_text() == "newer"
                assert not (mount.guest / "directory/inner").exists()


def close_whatever_it_says(fd: int) -> None:
    """The file system of an open file may be gone for ever."""
    with contextlib.suppress(OSError):
        os.close(fd)


@pytest.mark.expected_logs("lost the daemon")
def test_agents_of_programs_come_back_by_themselves(host: Host) -> None:
    (host.export / "file").write_text("old")
    with host.agent() as agent:
        assert agent.stat("file").st_size == 3
        for _ in range(2):
            host.daemon.kill()
            (host.share / "file").write_text((host.share / "file").read_text() + "!")
            eventually("it answers with an error", lambda: size_of(agent, "file") is None)
            host.serve()
            eventually("it is back", lambda: size_of(agent, "file") is not None)
            assert size_of(agent, "file") == (host.share / "file").stat().st_size


@pytest.mark.expected_logs("lost the daemon")
def test_killed_daemon_with_a_posix_table(make_socket_dir: Callable[[], Path]) -> None:
    name = f"kill-{os.getpid()}"
    with Host(make_socket_dir(), "--table", "posix", name=name) as host, host.agent() as agent:
        table = host.runtime_dir / name / "table"
        identity, epoch = table.stat().st_ino, host.status()["epoch"]
        (host.export / "file").write_text("x")
        assert agent.stat("file").st_size == 1
        host.daemon.kill()
        host.serve()
        assert table.stat().st_ino == identity, "the same memory: who has it mapped sees the new epoch"
        assert host.status()["epoch"] > epoch
        (host.export / "file").write_text("xx")
        eventually("it is back", lambda: size_of(agent, "file") is not None)
        assert size_of(agent, "file") == 2
    assert not Path(f"/dev/shm/coherency-{name}").exists()


def test_second_daemon_is_refused(host: Host) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coherency", "serve", host.share, "--name", host.name, "--runtime-dir", host.runtime_dir],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"coherency: process {host.daemon.process.pid} is already serving '{host.name}'"
    ]
    (host.export / "still there").touch()
    assert host.status()["pid"] == host.daemon.process.pid


# ---- the table of a dead daemon ----

TAKEN_OVER = "cleaned up after a daemon that did not end in good order"


def test_changes_are_held_after_an_unclean_end(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir(), "--verbose") as host:
        host.daemon.kill()
        started_ns = time.monotonic_ns()
        host.serve()
        (host.export / "new").mkdir()
        # The name was claimed after the start, so this is the least that it can have taken.
        assert time.monotonic_ns() - started_ns >= TRUST_NS + TRUST_MARGIN_NS
        assert TAKEN_OVER in host.daemon.logged()


def test_reads_are_served_while_changes_are_held(host: Host) -> None:
    file = host.export / "file"
    file.write_text("content")
    (host.export / "other").mkdir()
    host.daemon.kill()
    host.serve(doom=("never", 0))
    with host.agent() as agent:
        changer = threading.Thread(target=file.chmod, args=(0o600,))
        changer.start()
        eventually("the change is asked for", lambda: in_system_call(of(changer), CHMOD))
        assert file.read_text() == "content"
        assert sorted(os.listdir(host.export)) == ["file", "other"]
        assert stat.S_IMODE(agent.stat("file").st_mode) == 0o644
        assert in_system_call(of(changer), CHMOD)
        host.daemon.process.send_signal(signal.SIGUSR1)
        changer.join()
        assert stat.S_IMODE(agent.stat("file").st_mode) == 0o600


def test_a_held_change_can_be_interrupted(host: Host) -> None:
    host.daemon.kill()
    host.serve(doom=("never", 0))
    with subprocess.Popen(["mkdir", host.export / "held"]) as process:
        eventually("the change is asked for", lambda: in_system_call(f"/proc/{process.pid}", MKDIR))
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == -signal.SIGINT
    host.daemon.process.send_signal(signal.SIGUSR1)
    (host.export / "another").mkdir()
    assert os.listdir(host.share) == ["another"]


def test_after_a_clean_end_nothing_is_held(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir(), "--verbose") as host:
        host.daemon.stop()
        host.serve()
        (host.export / "new").mkdir()
        assert TAKEN_OVER not in host.daemon.logged()


def test_stopped_agent_wakes_up_after_its_daemon_was_replaced(host: Host) -> None:
    """It was asleep while its daemon died, another took over and the file was changed: it must not believe its table."""
    guest = host.mount("guest")
    (host.export / "file").write_text("old")
    assert (guest / "file").stat().st_size == 3
    agent = host.guests["guest"].process
    for size in (4, 5):
        os.kill(agent.pid, signal.SIGSTOP)
        host.daemon.kill()
        host.serve()
        (host.export / "file").write_text("x" * size)
        seen: list[int] = []

        def ask(seen: list[int] = seen) -> None:
            with contextlib.suppress(OSError):
                seen.append((guest / "file").stat().st_size)

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        eventually("its kernel has questions for it", lambda: all(in_system_call(of(each), STAT) for each in askers))  # noqa: B023
        os.kill(agent.pid, signal.SIGCONT)
        for asker in askers:
            asker.join()
        assert set(seen) <= {size}
        eventually("it is back", lambda: answers(guest))
        assert (guest / "file").stat().st_size == size


# As x86-64 numbers them.
STAT, CHMOD, MKDIR = {4, 262, 332}, {90, 268, 452}, {83, 258}


def in_system_call(task: str, numbers: set[int]) -> bool:
    """Whether a thread, by its directory in /proc, is in one of these system calls."""
    try:
        number = Path(task, "syscall").read_text().split()[0]
    except FileNotFoundError:
        return False
    return number.isdigit() and int(number) in numbers


def of(thread: threading.Thread) -> str:
    return f"/proc/self/task/{thread.native_id}"


class Sleeper(GuestAgent):
    """An agent whose control channel can be put to sleep: like a stopped process, but still able to answer us."""

    def __init__(self, host: Host) -> None:
        self.asleep, self.awake = threading.Event(), threading.Event()
        self.awake.set()
        super().__init__(host.name, runtime_dir=host.runtime_dir, capacity=1000)

    def statistics(self) -> GuestAgentStatistics:
        if threading.current_thread().name.startswith("control-client"):
            self.asleep.set()
            self.awake.wait(DEADLINE_S)
        return super().statistics()

    def sleep(self, host: Host) -> None:
        """Keep the control channel's thread until ``awake`` is set: it asks for no heartbeat, and hears of no end."""
        self.awake.clear()
        host.status()  # asks all guests
        assert self.asleep.wait(DEADLINE_S)


@pytest.mark.expected_logs("lost the daemon")
@pytest.mark.parametrize("trust", ["by the rule", "for ever"])
def test_abandoned_table_is_not_believed(host: Host, trust: str) -> None:
    """And with the rule of trust disabled it would be: the old size is still there, and its versions agree."""
    (host.export / "file").write_text("old")
    with contextlib.closing(Sleeper(host)) as agent:
        assert agent.stat("file").st_size == 3
        agent.sleep(host)
        if trust == "for ever":
            agent._paths.cache.reader.trusted_until_ns = 1 << 62
        host.daemon.kill()
        host.serve()
        (host.export / "file").write_text("newer")
        assert size_of(agent, "file") == (3 if trust == "for ever" else None)
        agent.awake.set()
        eventually("it is back", lambda: size_of(agent, "file") not in (None, 3))
        assert size_of(agent, "file") == 5
