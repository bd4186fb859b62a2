"""Many changes at once, made directly in the share, and guests that end with the truth."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.file_systems import mounted, run
from tests.guests import Host
from tests.waiting import until

QUEUE = Path("/proc/sys/fs/fanotify/max_queued_events")
TINY_QUEUE = 16
FILES, PER_DIRECTORY, WARM_EVERY = 100_000, 1000, 50
TREE, CHANGED = 10_000, 2_000
STATUS_TIMEOUT_S = 120


@contextlib.contextmanager
def queue_of(events: int) -> Iterator[None]:
    """Who asks for a queue inside the block gets one of this length: it is fixed when it is made."""
    before = QUEUE.read_text()
    QUEUE.write_text(str(events))
    try:
        yield
    finally:
        QUEUE.write_text(before)


Look = Callable[[str], os.stat_result]


def looking_at(root: Path) -> Look:
    return lambda name: os.lstat(root / name)


def await_mark(share: Path, value: int, *look: Look) -> None:
    """Events come in order: who sees this change has been told of all that were made before it."""
    os.utime(share / "mark", ns=(value, value))
    for each in look:
        until(lambda each=each: each("mark").st_mtime_ns == value)  # type: ignore[misc]


def facts(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mode, status.st_mtime_ns, status.st_ctime_ns


def stale(share: Path, names: list[str], look: Look) -> list[str]:
    return [name for name in names if facts(os.lstat(share / name)) != facts(look(name))]


@pytest.mark.alone
def test_nothing_is_stale_after_far_more_than_the_queue_holds(socket_dir: Path) -> None:
    share = socket_dir / "share"
    share.mkdir()
    with mounted("tmpfs", share):  # for the time that it takes
        directories = [f"d{number:02}" for number in range(FILES // PER_DIRECTORY)]
        names = [f"{directory}/{number:04}" for directory in directories for number in range(PER_DIRECTORY)]
        warm = names[::WARM_EVERY]
        for directory in directories:
            (share / directory).mkdir()
        for name in ["mark", *warm]:
            (share / name).write_text("")
        host = Host(socket_dir)
        with contextlib.ExitStack() as undo:
            with queue_of(TINY_QUEUE):
                undo.enter_context(host)
            guest, agent = host.mount("guest", "strict"), undo.enter_context(host.agent())
            looks: list[Look] = [looking_at(guest), agent.lstat]
            for look in looks:
                assert stale(share, warm, look) == []
            assert all(len(agent.listdir(directory)) == PER_DIRECTORY // WARM_EVERY for directory in directories)

            for name in names:
                fd = os.open(share / name, os.O_WRONLY | os.O_CREAT)
                os.write(fd, b"written by the host")
                os.close(fd)

            await_mark(share, 1, *looks)
            assert host.status()["overflows"] > 0, "the queue was long enough, and nothing was tried"
            for look in looks:
                assert stale(share, warm, look) == []
            for directory in directories:
                assert sorted(agent.listdir(directory)) == sorted(os.listdir(guest / directory)) == sorted(
                    os.listdir(share / directory)
                )
            assert stale(share, names[1:: WARM_EVERY * 2], agent.stat) == []


# --- git ------------------------------------------------------------------------------------------------------------


def git(at: Path, *arguments: str) -> str:
    return run("git", "-C", at, "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments)


def make_repository(at: Path) -> None:
    """Two branches of a tree of ``TREE`` files, of which the other one changes, removes and adds some."""
    at.mkdir()
    git(at, "init", "-q", "-b", "one")
    for number in range(TREE):
        file = at / f"d{number % 100:02}/s{number % 7}/{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}\n")
    git(at, "add", "-A")
    git(at, "commit", "-q", "-m", "one")
    git(at, "checkout", "-q", "-b", "two")
    for number in range(0, TREE, TREE // CHANGED):
        file = at / f"d{number % 100:02}/s{number % 7}/{number}"
        kind = number // (TREE // CHANGED) % 4
        if kind == 0:
            file.unlink()
        elif kind == 1:
            (file.parent / f"{number}-new").write_text("new\n")
        else:
            file.write_text(f"{number} in the other branch\n")
    git(at, "mv", "d01", "moved")
    git(at, "add", "-A")
    git(at, "commit", "-q", "-m", "two")


class Looping:
    """A guest that runs ``git status`` again and again, until it is told to stop."""

    def __init__(self, at: Path) -> None:
        self.at, self.rounds, self._over = at, 0, False
        self._git = start_status(at)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            self._git.communicate(timeout=STATUS_TIMEOUT_S)
            self.rounds += 1
            if not self._over:
                self._git = start_status(self.at)
        self._git.communicate(timeout=STATUS_TIMEOUT_S)

    def stop(self) -> None:
        self._over = True
        while self._thread.is_alive():
            self._git.kill()
            self._thread.join(0.1)
        if self._git.poll() is None:  # the thread has failed
            self._git.kill()
            self._git.communicate()


def start_status(at: Path) -> subprocess.Popen[str]:
    """It may not write down what it finds: two at once would be in each other's way."""
    command = ["git", "--no-optional-locks", "-C", str(at), "status", "--porcelain"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def status_of(at: Path) -> str:
    """What ``git status`` says: nothing, if all is as in the index."""
    git = start_status(at)
    try:
        return git.communicate(timeout=STATUS_TIMEOUT_S)[0]
    except subprocess.TimeoutExpired:
        git.kill()
        git.communicate()
        raise


@pytest.fixture(scope="module")
def repository(make_socket_dir: Callable[[], Path]) -> Iterator[Path]:
    """A directory for a host, with the repository in its share."""
    directory = make_socket_dir()
    (directory / "share").mkdir()
    with mounted("tmpfs", directory / "share"):
        make_repository(directory / "share/tree")
        (directory / "share/mark").touch()
        yield directory


@pytest.mark.parametrize("mode", ["none", "access", "prompt", "strict"])
def test_after_a_checkout_on_the_host_a_guest_has_the_truth(repository: Path, mode: str) -> None:
    """In each mode that promises it; a GuestAgent beside one."""
    with Host(repository) as host, host.agent() as agent:
        tree, guest = host.share / "tree", host.mount(f"guest-{mode}", mode)
        looks: list[Look] = [looking_at(guest), *([agent.lstat] if mode == "access" else [])]
        differing = git(tree, "diff", "--name-only", "--no-renames", "one", "two").splitlines()
        names = [f"tree/{name}" for name in differing if (tree / name).exists()]
        assert len(names) > CHANGED // 2
        with contextlib.ExitStack() as undo:
            loop = Looping(guest / "tree")
            undo.callback(loop.stop)
            until(lambda: loop.rounds, deadline_s=STATUS_TIMEOUT_S)
            assert [stale(host.share, names, look) for look in looks] == [[]] * len(looks)
            for branch in ("one", "two"):
                git(tree, "checkout", "-q", branch)
        await_mark(host.share, time.time_ns(), *looks)
        assert status_of(tree) == status_of(guest / "tree") == ""
        assert [stale(host.share, names, look) for look in looks] == [[]] * len(looks)
        assert host.status()["host_events"] > CHANGED


def test_control_without_watching_a_guest_keeps_the_other_branch(socket_dir: Path) -> None:
    with Host(socket_dir, "--no-watch") as host:
        tree = host.share / "tree"
        tree.mkdir()
        git(tree, "init", "-q", "-b", "one")
        for text in ("one", "two"):
            (tree / "file").write_text(text * 10)
            git(tree, "add", "-A")
            git(tree, "commit", "-q", "-m", text)
        guest = host.mount("guest", "strict") / "tree"
        assert status_of(guest) == ""
        git(tree, "checkout", "-q", "HEAD~1")
        assert stale(tree, ["file"], looking_at(guest)) == ["file"]
