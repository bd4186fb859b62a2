"""Owners of locks as the kernel numbers them, handed in by hand: what no kernel does in a given order, and sometimes does."""

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.fuse import abi, locks, syscalls, waits
from coherency.fuse.abi import Opcode
from coherency.fuse.codec import Request
from coherency.fuse.locks import OFFSET_MAX
from coherency.fuse.passthrough import Passthrough
from coherency.ids import NodeId
from tests.fake_kernel import FakeKernel
from tests.fuse_messages import body, message, request
from tests.locker import waiting_for
from tests.waiting import until

FIRST, SECOND = 11, 12  # owners


class FewWaits(Passthrough):
    most_lock_waits = 2


class Ground:
    """A file behind a connection whose kernel is the test."""

    def __init__(self, path: Path, kernel: FakeKernel, files: Passthrough) -> None:
        self.path, self.kernel, self.files = path, kernel, files
        self.node = kernel.ask("LOOKUP", os.fsencode(path.name) + b"\0").read("entry_out")["nodeid"]

    def open(self, flags: int = os.O_RDWR) -> int:
        return self.kernel.ask("OPEN", node=self.node, flags=flags).read("open_out")["fh"]

    def fields(self, fh: int, owner: int, kind: int, start: int = 0, end: int = OFFSET_MAX) -> dict[str, Any]:
        return {"fh": fh, "owner": owner, "lk.start": start, "lk.end": end, "lk.type": kind, "lk.pid": 100 + owner}

    def lock(self, fh: int, owner: int, kind: int, start: int = 0, end: int = OFFSET_MAX) -> int:
        return self.kernel.ask("SETLK", node=self.node, **self.fields(fh, owner, kind, start, end)).error

    def begin_to_wait(self, fh: int, owner: int, kind: int, start: int = 0, end: int = OFFSET_MAX) -> int:
        unique, before = self.kernel.new_unique(), waiting_for(self.path)
        fields = self.fields(fh, owner, kind, start, end)
        self.kernel.send(request("SETLKW", unique=unique, node=self.node, **fields))
        until(lambda: waiting_for(self.path) == before + 1)
        return unique

    def holder(self, fh: int, owner: int, start: int = 0) -> tuple[int, int]:
        """Kind and pid of who has the byte."""
        fields = self.fields(fh, owner, fcntl.F_WRLCK, start, start)
        found = self.kernel.ask("GETLK", node=self.node, **fields).read("lk_out")
        return found["lk.type"], found["lk.pid"]


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    (tmp_path / "file").write_bytes(bytes(100))
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    files = FewWaits(root, descriptor_limit=100)
    with FakeKernel(files) as kernel:
        ground = Ground(tmp_path / "file", kernel, files)
        yield ground
        files.locks.check()
    assert files.locks.statistics().owners == 0


W, R, U = fcntl.F_WRLCK, fcntl.F_RDLCK, fcntl.F_UNLCK


def test_a_number_that_is_used_again_before_its_handle_is_released(ground: Ground) -> None:
    """An open file was closed with OFD locks, and the next one has got its number: RELEASE comes late."""
    closed, fresh, other = ground.open(os.O_RDONLY), ground.open(), ground.open()
    assert ground.lock(closed, FIRST, R, 0, 9) == 0
    assert ground.lock(fresh, FIRST, W, 5, 14) == 0
    assert ground.kernel.ask("RELEASE", node=ground.node, fh=closed).error == 0
    assert ground.holder(other, SECOND, 0)[0] == U
    assert ground.holder(other, SECOND, 5) == (W, 100 + FIRST)
    assert ground.kernel.ask("RELEASE", node=ground.node, fh=fresh).error == 0
    assert ground.lock(other, SECOND, W) == 0


def test_a_process_that_locks_again_after_its_close_keeps_that_when_the_handle_is_released(ground: Ground) -> None:
    closed, mine, other = ground.open(), ground.open(), ground.open()
    assert ground.lock(closed, FIRST, W, 0, 9) == 0
    assert ground.kernel.ask("FLUSH", node=ground.node, fh=closed, lock_owner=FIRST).error == 0
    assert ground.lock(other, SECOND, W, 0, 4) == 0
    assert ground.lock(mine, FIRST, W, 5, 9) == 0
    assert ground.kernel.ask("RELEASE", node=ground.node, fh=closed).error == 0
    assert ground.lock(other, SECOND, R, 5, 9) == errno.EAGAIN


def test_a_handle_that_is_released_without_a_flush_takes_its_locks_along(ground: Ground) -> None:
    """The kernel sends no FLUSH if it could not write its pages before."""
    mine, other = ground.open(), ground.open()
    assert ground.lock(mine, FIRST, W) == 0
    assert ground.kernel.ask("RELEASE", node=ground.node, fh=mine).error == 0
    assert ground.lock(other, SECOND, W) == 0


def test_a_flush_of_somebody_else_takes_nothing(ground: Ground) -> None:
    mine, other = ground.open(), ground.open()
    assert ground.lock(mine, FIRST, W) == 0
    assert ground.kernel.ask("FLUSH", node=ground.node, fh=mine, lock_owner=SECOND).error == 0
    assert ground.lock(other, SECOND, R) == errno.EAGAIN


def test_locks_are_never_let_go_for_a_description_that_writes(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing, other = ground.open(os.O_RDONLY), ground.open(), ground.open()
    assert ground.lock(reading, FIRST, R, 0, 9) == 0
    assert ground.lock(reading, FIRST, R, 20, 29) == 0
    between: list[int] = []
    real = syscalls.lock

    def lock_and_look(fd: int, command: int, *rest: int) -> tuple[int, int, int]:
        with open(ground.path, "rb+") as file:  # who looks is another process's description, as far as locks go
            between.extend(real(file.fileno(), fcntl.F_OFD_GETLK, W, start, start)[0] for start in (0, 20))
        return real(fd, command, *rest)

    monkeypatch.setattr(syscalls, "lock", lock_and_look)
    assert ground.lock(writing, FIRST, W, 40, 49) == 0
    monkeypatch.undo()
    assert len(between) >= 6
    assert set(between) == {R}
    assert ground.lock(other, SECOND, R, 0, 29) == 0
    assert ground.lock(other, SECOND, R, 40, 49) == errno.EAGAIN


@pytest.mark.parametrize(
    ("kind", "start", "end"), [(3, 0, 1), (W, 2, 1), (W, 0, OFFSET_MAX + 1), ((1 << 32) - 1, 0, 1), (W, 1 << 63, 1 << 63)]
)
def test_what_is_no_lock(ground: Ground, kind: int, start: int, end: int) -> None:
    assert ground.lock(ground.open(), FIRST, kind, start, end) == errno.EINVAL


def test_pieces_are_bounded_also_when_they_come_of_unlocking(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_MOST_PIECES", 3)
    mine = ground.open()
    assert ground.lock(mine, FIRST, W, 0, 99) == 0
    for offset in (10, 20):
        assert ground.lock(mine, FIRST, U, offset, offset) == 0
    for kind in (U, R, W):
        assert ground.lock(mine, FIRST, kind, 30, 30) == errno.ENOLCK
    assert ground.lock(mine, FIRST, U, 5, 40) == 0  # it is fewer now
    assert ground.lock(mine, FIRST, U, 50, 50) == 0


@pytest.mark.parametrize("api", ["ofd", "flock"])
@pytest.mark.parametrize("patient", [True, False])
def test_what_was_closed_just_now_is_not_in_the_way(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, patient: bool, api: str
) -> None:
    """RELEASE comes after `close` has returned, and by then somebody else may have tried. The impatient case is the control."""
    monkeypatch.setattr(locks, "_RELEASED_WITHIN_NS", 20_000_000_000 if patient else 0)
    closed, other = ground.open(), ground.open()
    flags: dict[str, Any] = {"lk_flags": abi.LK_FLOCK} if api == "flock" else {}
    assert ground.kernel.ask("SETLK", node=ground.node, **ground.fields(closed, FIRST, W), **flags).error == 0
    assert ground.kernel.ask("SETLK", node=ground.node, **ground.fields(other, SECOND, W), **flags).error == errno.EAGAIN
    assert ground.kernel.ask("FLUSH", node=ground.node, fh=closed, lock_owner=99).error == 0
    tries = ground.kernel.new_unique()
    ground.kernel.send(request("SETLK", unique=tries, node=ground.node, **ground.fields(other, SECOND, W), **flags))
    if not patient:
        assert ground.kernel.receive().error == errno.EAGAIN
        return
    until(lambda: [each.unique for each in ground.kernel.session.unanswered()] == [tries])
    ground.kernel.send(request("RELEASE", unique=1000, node=ground.node, fh=closed))
    answers = ground.kernel.receive(), ground.kernel.receive()
    assert {answer.unique: answer.error for answer in answers} == {tries: 0, 1000: 0}


# ---- waiting ----


def test_a_wait_too_many_is_refused_and_keeps_nobody_waiting(ground: Ground) -> None:
    mine, other = ground.open(), ground.open()
    assert ground.lock(mine, FIRST, W) == 0
    waiting = {ground.begin_to_wait(other, owner, W, owner, owner) for owner in (21, 22)}
    fields = ground.fields(other, 23, W)
    assert ground.kernel.ask("SETLKW", node=ground.node, **fields).error == errno.ENOLCK
    assert ground.kernel.ask("SETLKW", node=ground.node, **ground.fields(mine, FIRST, R)).error == 0  # need not wait
    assert ground.kernel.ask("GETATTR", node=ground.node).error == 0
    assert ground.files.locks.statistics().waiting == 2
    ground.kernel.send(request("SETLK", unique=1000, node=ground.node, **ground.fields(mine, FIRST, U)))
    answers = [ground.kernel.receive() for _ in range(3)]
    assert {answer.unique for answer in answers} == waiting | {1000}
    assert {answer.error for answer in answers} == {0}


def test_what_waits_is_interrupted_and_nothing_else_is(ground: Ground) -> None:
    mine, other = ground.open(), ground.open()
    assert ground.lock(mine, FIRST, W) == 0
    first, second = ground.begin_to_wait(other, SECOND, W, 0, 9), ground.begin_to_wait(other, SECOND, W, 10, 19)
    ground.kernel.send(message("INTERRUPT", body("INTERRUPT", unique=first), unique=first + 1))
    answer = ground.kernel.receive()
    assert (answer.unique, answer.error) == (first, errno.EINTR)
    assert waiting_for(ground.path) == 1
    ground.kernel.send(request("SETLK", unique=1000, node=ground.node, **ground.fields(mine, FIRST, U)))
    assert {answer.unique: answer.error for answer in (ground.kernel.receive(), ground.kernel.receive())} == {1000: 0, second: 0}
    assert ground.lock(mine, FIRST, W, 0, 9) == 0


def test_who_has_got_it_when_another_thread_of_the_owner_unlocks_has_not_got_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the kernel's answer and our note of it: nobody is told of a lock that is not there, and none is noted."""
    mine, other = ground.open(), ground.open()
    assert ground.lock(mine, FIRST, W) == 0
    granted, go_on, call = threading.Event(), threading.Event(), waits.Wait.call

    def call_and_pause(wait: waits.Wait, function: Callable[[], object]) -> bool:
        done = call(wait, function)
        granted.set()
        assert go_on.wait(30)
        return done

    monkeypatch.setattr(waits.Wait, "call", call_and_pause)
    waiting = ground.begin_to_wait(other, SECOND, W)
    assert ground.lock(mine, FIRST, U) == 0
    assert granted.wait(30)
    assert ground.lock(other, SECOND, U) == 0
    assert ground.lock(mine, FIRST, W) == 0
    go_on.set()
    until(lambda: waiting_for(ground.path) == 1)
    ground.kernel.send(request("SETLK", unique=1000, node=ground.node, **ground.fields(mine, FIRST, U)))
    assert {answer.unique: answer.error for answer in (ground.kernel.receive(), ground.kernel.receive())} == {1000: 0, waiting: 0}
    assert ground.holder(mine, FIRST) == (W, 100 + SECOND)


def test_a_wait_ends_with_its_connection(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    files = FewWaits(root, descriptor_limit=100)
    with FakeKernel(files) as kernel:  # which asserts that the session ends
        ground = Ground(tmp_path / "file", kernel, files)
        assert ground.lock(ground.open(), FIRST, W) == 0
        ground.begin_to_wait(ground.open(), SECOND, W)


@pytest.mark.parametrize("repeated", [True, False])
def test_a_signal_that_comes_too_early_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeated: bool
) -> None:
    """The call begins to wait only when one has come already. The case without is the control."""
    asked, came = Request(2, Opcode.SETLKW, NodeId(1), 0, 0, 0, None), list[int]()
    real = signal.pthread_kill

    def count(thread: int, number: int) -> None:
        real(thread, number)
        came.append(number)

    monkeypatch.setattr(signal, "pthread_kill", count)
    if not repeated:
        monkeypatch.setattr(waits, "_REPEAT_S", None)
    (tmp_path / "file").write_bytes(b"")
    with open(tmp_path / "file") as one, open(tmp_path / "file") as two:
        fcntl.flock(one, fcntl.LOCK_EX)

        def call() -> None:
            asked.interrupt()
            until(lambda: came)
            syscalls.flock(two.fileno(), fcntl.LOCK_EX)

        def let_go() -> None:
            until(lambda: waiting_for(tmp_path / "file"))
            fcntl.flock(one, fcntl.LOCK_UN)

        other = threading.Thread(target=let_go)
        if not repeated:  # nothing else would end it
            other.start()
        with waits.Waits(1).begin(asked) as wait:
            assert wait.call(call) != repeated
            with pytest.raises(InterruptedError):
                wait.arm()
        if not repeated:
            other.join()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "interrupter"])
