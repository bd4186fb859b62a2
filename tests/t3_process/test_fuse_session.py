"""What a session answers, and in which order, to a kernel that is played by the test."""

import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from coherency.errors import MountError
from coherency.fuse.abi import InitFlag, Opcode
from coherency.fuse.codec import Request
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.session import NO_REPLY, Deferred, Operation, QuickOperation, Reply, Session
from coherency.ids import NodeId
from tests.descriptors import open_descriptors
from tests.fake_kernel import FakeKernel
from tests.fuse_messages import message, request

NODE = NodeId(7)


class Scripted:
    """A file system of a few functions."""

    init_flags = InitFlag(0)

    def __init__(self, **operations: Operation) -> None:
        self.operations: Mapping[int, Operation] = {int(Opcode[name]): each for name, each in operations.items()}
        self.quick_operations: dict[int, QuickOperation] = {}
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Gate:
    """Operations that wait for each other."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self._entered = threading.Semaphore(0)

    def wait(self, request: Request) -> Reply:
        """An operation: answers with the name it was asked for, once the gate is open."""
        self._entered.release()
        assert self.opened.wait(20)
        return (request.body.name,)

    def await_entered(self, count: int) -> None:
        for _ in range(count):
            assert self._entered.acquire(timeout=20)


def names(request: Request) -> Reply:
    return (request.body.name,)


# --- answers ---


def test_pieces_of_a_reply_are_joined() -> None:
    sizes = (0, 1, 4095, 4096, 100_000)
    answers = {size: (b"a", b"b" * size) for size in sizes}
    with FakeKernel(Scripted(READ=lambda request: answers[request.body.size])) as kernel:
        for size in sizes:
            assert kernel.ask("READ", size=size)[1:] == (0, b"a" + b"b" * size)


def test_an_empty_reply_is_one() -> None:
    with FakeKernel(Scripted(FLUSH=lambda request: ())) as kernel:
        assert kernel.ask("FLUSH")[1:] == (0, b"")


def test_no_reply_is_none() -> None:
    seen: list[Request] = []

    def forget(request: Request) -> Reply:
        seen.append(request)
        return NO_REPLY

    with FakeKernel(Scripted(FORGET=forget, LOOKUP=names)) as kernel:
        kernel.send(request("FORGET", unique=kernel.new_unique(), nlookup=1))
        assert kernel.ask("LOOKUP", b"a\0").payload == b"a"  # and nothing before it
        assert kernel.session.statistics().requests == 1
    assert len(seen) == 1


def test_an_error_of_the_system_goes_to_the_caller() -> None:
    def fail(request: Request) -> Reply:
        raise OSError(errno.EXDEV, "no")

    with FakeKernel(Scripted(LOOKUP=fail)) as kernel:
        assert kernel.ask("LOOKUP", b"a\0")[1:] == (errno.EXDEV, b"")


@pytest.mark.expected_logs(r"operation .* failed")
@pytest.mark.parametrize(
    ("error", "number"), [(ValueError, errno.EIO), (OSError, errno.EIO), (MemoryError, errno.ENOMEM)]
)
def test_what_else_goes_wrong_is_answered_too(error: type[Exception], number: int) -> None:
    def fail(request: Request) -> Reply:
        raise error

    with FakeKernel(Scripted(LOOKUP=fail, GETATTR=lambda request: ())) as kernel:
        assert kernel.ask("LOOKUP", b"a\0").error == number
        assert kernel.ask("GETATTR").error == 0
        kernel.session.check()


def test_a_quick_operation_answers_what_it_knows_and_leaves_the_rest() -> None:
    answers: dict[bytes, bytes | int | None] = {b"known": b"from memory", b"absent": errno.ENOENT, b"unknown": None}

    def quick(node: int, body: memoryview, pid: int) -> bytes | int | None:
        return answers[bytes(body[:-1])]  # KeyError, a bug, for any other name

    file_system = Scripted(LOOKUP=names)
    file_system.quick_operations[int(Opcode.LOOKUP)] = quick
    with FakeKernel(file_system) as kernel:
        assert kernel.ask("LOOKUP", b"known\0")[1:] == (0, b"from memory")
        assert kernel.ask("LOOKUP", b"absent\0")[1:] == (errno.ENOENT, b"")
        assert kernel.ask("LOOKUP", b"unknown\0")[1:] == (0, b"unknown")
        assert kernel.ask("LOOKUP", b"bug\0")[1:] == (0, b"bug")
        assert kernel.session.statistics().requests == 4
        kernel.session.check()


class Later(Deferred):
    """Puts the reply together when it is written, with a lock held."""

    def __init__(self, payload: bytes, *, fails: bool = False) -> None:
        self.payload, self.fails, self.lock = payload, fails, threading.Lock()

    def finish(self, send: Callable[[bytes], None]) -> None:
        with self.lock:
            if self.fails:
                raise RuntimeError("a bug")
            send(self.payload)


def test_a_reply_may_be_put_together_when_it_is_written() -> None:
    file_system = Scripted(LOOKUP=lambda request: Later(request.body.name), GETATTR=lambda request: ())
    file_system.quick_operations[int(Opcode.GETATTR)] = lambda node, body, pid: Later(b"%d %d" % (node, pid))
    with FakeKernel(file_system) as kernel:
        assert kernel.ask("LOOKUP", b"later\0")[1:] == (0, b"later")
        assert kernel.ask("GETATTR", node=9)[1:] == (0, b"9 %d" % os.getpid())
        assert kernel.session.statistics().requests == 2


@pytest.mark.expected_logs(r"operation .* failed")
def test_a_reply_that_cannot_be_put_together_is_eio() -> None:
    file_system = Scripted(LOOKUP=lambda request: Later(b"", fails=True), GETATTR=names)
    file_system.quick_operations[int(Opcode.GETATTR)] = lambda node, body, pid: Later(b"", fails=True)
    with FakeKernel(file_system) as kernel:
        assert kernel.ask("LOOKUP", b"later\0")[1:] == (errno.EIO, b"")
        assert kernel.ask("GETATTR")[1:] == (errno.EIO, b"")


def test_everything_else_is_enosys(tmp_path: Path) -> None:
    known = set(Opcode)
    passthrough = Passthrough(os.open(tmp_path, os.O_RDONLY), descriptor_limit=10)
    with FakeKernel(passthrough) as kernel:
        for opcode in [*range(1, 64), 255, 4096, 1 << 31]:
            if opcode not in known or opcode == Opcode.INIT:
                kernel.send(message(opcode, bytes(64), unique=(unique := kernel.new_unique())))
                assert kernel.receive() == (unique, errno.ENOSYS, b""), opcode
        assert kernel.ask("DESTROY").error == 0


def test_destroy_needs_no_operation() -> None:
    with FakeKernel(Scripted()) as kernel:
        assert kernel.ask("DESTROY").error == 0


@pytest.mark.expected_logs(r"malformed request: ")
@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b""])
def test_malformed_request_is_einval_and_the_next_is_served(tmp_path: Path, name: bytes) -> None:
    passthrough = Passthrough(os.open(tmp_path, os.O_RDONLY), descriptor_limit=10)
    with FakeKernel(passthrough) as kernel:
        assert kernel.ask("LOOKUP", name + b"\0").error == errno.EINVAL
        assert kernel.ask("MKDIR", name + b"\0", mode=0o755).error == errno.EINVAL
        assert kernel.ask("WRITE", b"short", size=9).error == errno.EINVAL
        assert kernel.ask("GETATTR").error == 0


def test_without_a_header_there_is_nobody_to_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL, "coherency"), FakeKernel(Scripted(LOOKUP=names)) as kernel:
        kernel.send(b"short")
        assert kernel.ask("LOOKUP", b"a\0").payload == b"a"


# --- threads ---


def test_operations_that_wait_for_each_other_get_a_thread_each() -> None:
    gate = Gate()
    with FakeKernel(Scripted(LOOKUP=gate.wait, GETATTR=lambda request: ())) as kernel:
        waiting = {kernel.new_unique(): b"name%d" % number for number in range(20)}
        for unique, name in waiting.items():
            kernel.send(request("LOOKUP", name + b"\0", unique=unique))
        gate.await_entered(len(waiting))
        assert kernel.ask("GETATTR").error == 0  # others are not held up
        statistics = kernel.session.statistics()
        assert statistics.threads >= len(waiting) + 1
        assert statistics.in_flight == len(waiting)
        assert {request.unique for request in kernel.session.unanswered()} == waiting.keys()
        kernel.session.check()

        gate.opened.set()
        answers = [kernel.receive() for _ in waiting]
        assert {answer.unique: answer.payload for answer in answers} == waiting  # each its own
        assert kernel.session.unanswered() == []


def test_threads_are_bounded() -> None:
    gate = Gate()
    with FakeKernel(Scripted(LOOKUP=gate.wait), max_threads=3) as kernel:
        for _ in range(9):
            kernel.send(request("LOOKUP", b"a\0", unique=kernel.new_unique()))
        gate.await_entered(3)
        statistics = kernel.session.statistics()
        assert (statistics.threads, statistics.in_flight) == (3, 3)
        gate.opened.set()
        assert len({kernel.receive().unique for _ in range(9)}) == 9


@pytest.mark.expected_logs(r"no more than 1 threads")
def test_without_another_thread_requests_are_served_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with FakeKernel(Scripted(LOOKUP=names)) as kernel:
        # The first thread runs already.
        monkeypatch.setattr(threading.Thread, "start", fail)
        for number in range(5):
            assert kernel.ask("LOOKUP", b"%d\0" % number).payload == b"%d" % number
        assert kernel.session.statistics().threads == 1
        kernel.session.check()
        monkeypatch.undo()
        assert kernel.ask("LOOKUP", b"a\0").payload == b"a"
        assert kernel.session.statistics().threads == 2


# --- interrupts ---


def test_interrupt_reaches_the_operation() -> None:
    called = threading.Event()

    def wait(request: Request) -> Reply:
        request.on_interrupt = called.set
        entered.set()
        assert called.wait(20)
        assert request.interrupted
        raise InterruptedError(errno.EINTR, "given up")

    entered = threading.Event()
    with FakeKernel(Scripted(LOOKUP=wait)) as kernel:
        unique = kernel.new_unique()
        kernel.send(request("LOOKUP", b"a\0", unique=unique))
        assert entered.wait(20)
        kernel.send(message("INTERRUPT", unique.to_bytes(8, "little"), unique=unique | 1))
        assert kernel.receive() == (unique, errno.EINTR, b"")  # and none to INTERRUPT itself


def test_interrupt_of_what_is_not_there_is_to_be_asked_again() -> None:
    with FakeKernel(Scripted()) as kernel:
        kernel.send(message("INTERRUPT", (8).to_bytes(8, "little"), unique=9))
        assert kernel.receive() == (9, errno.EAGAIN, b"")


# --- the end ---


def test_file_system_is_closed_once_when_all_operations_have_ended() -> None:
    gate = Gate()
    file_system = Scripted(LOOKUP=gate.wait)
    with FakeKernel(file_system) as kernel:
        kernel.send(request("LOOKUP", b"a\0", unique=kernel.new_unique()))
        gate.await_entered(1)
        kernel._socket.shutdown(1)
        assert not kernel.session.wait(0.05)
        assert file_system.closed == 0
        gate.opened.set()
    assert file_system.closed == 1


def test_a_session_that_never_started_closes_what_it_has() -> None:
    file_system = Scripted()
    kernel = FakeKernel(file_system)
    device = kernel.session._device
    kernel.session.close()
    kernel.session.close()
    assert file_system.closed == 1
    assert kernel.session.wait(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(device)
    kernel._socket.close()


# --- notifications ---


def test_notifications() -> None:
    with FakeKernel(Scripted()) as kernel:
        session = kernel.session
        assert session.invalidate_inode(NODE, -1, 0)
        answer = kernel.receive()
        assert answer[:2] == (0, -2)
        assert answer.read("notify_inval_inode_out") == {"ino": NODE, "off": -1, "len": 0}
        assert session.invalidate_entry(NODE, b"name")
        answer = kernel.receive()
        assert answer[:2] == (0, -3)
        assert answer.read("notify_inval_entry_out") == {"parent": NODE, "namelen": 4, "flags": 0}
        assert session.increment_epoch()
        assert kernel.receive() == (0, -8, b"")


def test_expire_only_is_asked_only_of_kernels_that_offer_it() -> None:
    with FakeKernel(Scripted()) as kernel:
        session = kernel.session
        assert not session.invalidate_entry(NODE, b"name", expire_only=True)
        session.init_flags = InitFlag.HAS_EXPIRE_ONLY
        assert session.invalidate_entry(NODE, b"name", expire_only=True)
        assert kernel.receive().read("notify_inval_entry_out")["flags"] == 1


# --- mounting that cannot be ---


def test_mount_on_what_is_no_directory(tmp_path: Path) -> None:
    file_system = Scripted()
    before = open_descriptors()
    with pytest.raises(MountError, match="cannot mount on"):
        Session.mount(str(tmp_path / "missing"), file_system, source="test")
    assert open_descriptors() <= before
