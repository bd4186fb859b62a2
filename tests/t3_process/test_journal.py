"""What a killed daemon leaves to the next: the sessions of its guests, and how long changes are held for them."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from coherency.daemon.holds import Hold
from coherency.daemon.journal import SessionJournal, remove_journal
from coherency.fuse import codec
from coherency.fuse.abi import ROOT_ID, Opcode
from coherency.fuse.codec import Request
from coherency.ids import NodeId
from coherency.leases import LONGEST_LEASE_NS
from tests.waiting import until

LEASE_NS = 1000
ANN, BOB, UID = 0xA, 0xB0B0B0B0B0B0B0B0, 1000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def journal_at(directory: Path, clock: Clock, *, lease_ns: int = LEASE_NS, held_until_ns: int = 0) -> SessionJournal:
    """As the next daemon opens it."""
    return SessionJournal(directory / "sessions", lease_ns=lease_ns, held_until_ns=held_until_ns, clock_ns=clock)


def left_ns(journal: SessionJournal, clock: Clock) -> int:
    return journal.hold.left_ns(clock.now_ns)


def test_nothing_is_written_before_there_is_a_session(tmp_path: Path) -> None:
    clock = Clock()
    journal = journal_at(tmp_path, clock)
    assert left_ns(journal, clock) == 0
    assert list(tmp_path.iterdir()) == []
    journal.add(ANN, UID)
    assert stat.S_IMODE((tmp_path / "sessions").stat().st_mode) == 0o600
    journal.discard(ANN)
    journal.discard(BOB)
    assert list(tmp_path.iterdir()) == []


def test_the_next_daemon_waits_for_each_session_as_long_as_it_was_promised(tmp_path: Path) -> None:
    clock = Clock()
    first = journal_at(tmp_path, clock)
    first.add(ANN, UID)
    first.add(BOB, UID)
    clock.now_ns = 10_000
    second = journal_at(tmp_path, clock, lease_ns=5)
    assert left_ns(second, clock) == LEASE_NS
    assert second.hold.statistics(clock.now_ns) == (LEASE_NS, 2)
    assert second.statistics() == (0, 2)
    second.account(ANN, UID)
    second.add(0xC, UID)
    assert second.statistics() == (1, 1)
    second.check()
    assert second.hold.statistics(clock.now_ns) == (LEASE_NS, 1)
    second.account(BOB, UID)
    assert left_ns(second, clock) == 0


def test_it_waits_for_who_trusts_the_table_in_any_case(tmp_path: Path) -> None:
    clock = Clock()
    journal_at(tmp_path, clock).add(ANN, UID)
    journal = journal_at(tmp_path, clock, held_until_ns=300)
    journal.account(ANN, UID)
    assert left_ns(journal, clock) == 300


@pytest.mark.parametrize(("session", "uid"), [(BOB, UID), (ANN, UID + 1), (0, UID)])
def test_only_the_guest_itself_ends_the_wait(tmp_path: Path, session: int, uid: int) -> None:
    clock = Clock()
    journal_at(tmp_path, clock).add(ANN, UID)
    journal = journal_at(tmp_path, clock)
    journal.account(session, uid)
    assert left_ns(journal, clock) == LEASE_NS


def test_a_guest_of_this_daemon_is_not_one_of_its_predecessor(tmp_path: Path) -> None:
    clock = Clock()
    journal = journal_at(tmp_path, clock)
    journal.add(ANN, UID)
    journal.account(ANN, UID)
    assert left_ns(journal_at(tmp_path, clock), clock) == LEASE_NS


def test_who_is_not_accounted_for_is_left_to_the_third_until_its_lease_is_over(tmp_path: Path) -> None:
    clock = Clock()
    journal_at(tmp_path, clock).add(ANN, UID)
    clock.now_ns = 100
    second = journal_at(tmp_path, clock)
    second.add(BOB, UID)
    second.discard(BOB)
    clock.now_ns = 200
    assert left_ns(journal_at(tmp_path, clock), clock) == LEASE_NS  # killed within the hold
    clock.now_ns = 100 + LEASE_NS
    second.check()
    second.add(BOB, UID)
    second.discard(BOB)
    assert second.statistics() == (0, 0)
    second.check()
    assert left_ns(journal_at(tmp_path, clock), clock) == 0


@pytest.mark.expected_logs("is no list of guests: changes are held as long as any lease may last")
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"coherency sessions 2\n", b"coherency sessions 1\nzz 0 1\n", b"x\n1 2 3\n"])
def test_what_cannot_be_read_is_waited_for_as_long_as_any_lease_may_last(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sessions").write_bytes(content)
    clock = Clock()
    journal = journal_at(tmp_path, clock)
    journal.account(0, 0)
    assert left_ns(journal, clock) == LONGEST_LEASE_NS


def test_half_a_journal_is_none(tmp_path: Path) -> None:
    """Who is killed while writing leaves the one before."""
    clock = Clock()
    journal_at(tmp_path, clock).add(ANN, UID)
    (tmp_path / "sessions.new").write_text("coherency sess")
    journal = journal_at(tmp_path, clock)
    assert left_ns(journal, clock) == LEASE_NS
    journal.add(BOB, UID)
    assert journal_at(tmp_path, clock).hold.statistics(0) == (LEASE_NS, 2)
    (tmp_path / "sessions.new").touch()
    remove_journal(tmp_path / "sessions")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.expected_logs("the list of guests in .* could not be shortened")
def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    clock = Clock()
    journal = journal_at(directory, clock)
    journal.add(ANN, UID)
    os.rename(directory, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        journal.add(BOB, UID)
    (tmp_path / "run").mkdir()
    journal.add(BOB, UID)
    (tmp_path / "run").rename(tmp_path / "elsewhere again")
    journal.discard(ANN)  # only a warning: the next daemon waits for nothing


# --- holds ---------------------------------------------------------------------------------------------------------


def request() -> Request:
    return Request(2, Opcode.UNLINK, NodeId(ROOT_ID), 0, 0, 1, codec.Name(b"name"))


def test_a_hold_ends_when_the_last_guest_is_accounted_for() -> None:
    clock = Clock()
    hold = Hold(10, {ANN: 2**62, BOB: 2**62})
    waiting = threading.Thread(target=hold.wait, args=(None, clock))
    waiting.start()
    clock.now_ns = 10
    hold.account(ANN)
    waiting.join(0.05)
    assert waiting.is_alive()
    hold.account(BOB)
    waiting.join(20)
    assert not waiting.is_alive()
    hold.wait(None, clock)
    assert hold.statistics(clock.now_ns) == (0, 0)


def test_a_hold_ends_by_itself() -> None:
    clock = Clock()
    hold = Hold(100, {ANN: 200})
    assert [hold.left_ns(at_ns) for at_ns in (0, 150, 200, 300)] == [200, 50, 0, 0]
    clock.now_ns = 200
    hold.wait(None, clock)


@pytest.mark.parametrize("how", ["before", "meanwhile", "given up"])
def test_a_caller_that_is_interrupted_does_not_wait(how: str) -> None:
    hold, asked, raised = Hold(2**62), request(), []

    def wait() -> None:
        with pytest.raises(InterruptedError) as caught:
            hold.wait(asked, lambda: 0)
        raised.append(caught.value.errno)

    asked.interrupted = how == "before"
    waiting = threading.Thread(target=wait)
    waiting.start()
    if how == "meanwhile":
        until(lambda: asked.on_interrupt is not None)
        asked.interrupted = True
        assert asked.on_interrupt is not None
        asked.on_interrupt()
    elif how == "given up":
        hold.give_up()
    waiting.join(20)
    assert raised == [errno.EINTR]
