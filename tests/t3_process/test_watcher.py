"""The watcher with a kernel that is played by the test: what it tells guests, what it does when it does not know, how it ends."""

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import pytest

from coherency.daemon import fanotify_events as fan
from coherency.daemon import watch
from coherency.daemon.changes import Changes
from coherency.daemon.fanotify import why_not
from coherency.daemon.fanotify_events import numbered
from coherency.daemon.owners import Owner, Owners
from coherency.daemon.shown import Shown
from coherency.daemon.watch import Watcher
from coherency.events import Event, EventKind
from coherency.fuse.codec import Request
from coherency.ids import GrantKey, HostInode
from coherency.leases import attributes_key, keys_of
from coherency.shm_table import TableWriter, bytes_needed
from tests.granting_guest import Gate, InBackground
from tests.host_events import event, of_inode, of_name, of_rename
from tests.waiting import until

SOMEBODY, ANOTHER = (1001, 1002), (1003, 1004)
ROOT, SHOWN, OTHER, HIDDEN, HIDDEN_DIRECTORY, GONE, REPLACED = (
    HostInode(number) for number in (2, 11, 12, 13, 14, 15, 16)
)


class Kernel:
    """In place of ``Watched``: hands out what the test has put into it."""

    def __init__(self) -> None:
        self.fd, self._feed = os.pipe()
        self.fault: BaseException | None = None
        self.calls: list[str] = []
        self.unwatched: dict[str, str] = {}
        self.owners: dict[int, Owner | None] = {}

    @property
    def group(self) -> "Kernel":
        return self

    def happens(self, *events: bytes) -> None:
        os.write(self._feed, b"".join(events))

    def read(self) -> bytes:
        self.calls.append("read")
        if self.fault is not None:
            raise self.fault
        return os.read(self.fd, 1 << 16)

    def identity(self, _fsid: int, handle: bytes) -> tuple[int, int] | None:
        found = numbered(handle)
        return None if found is None or found.ino == GONE else (1, found.ino)

    def owner(self, _fsid: int, handle: bytes) -> Owner | None:
        found = numbered(handle)
        assert found is not None
        return self.owners.get(found.ino, SOMEBODY)

    def look(self) -> bool:
        self.calls.append("look")
        return False

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._feed)


class Desk:
    """A watcher, its table, and what it has said to whom."""

    def __init__(self) -> None:
        words = memoryview(bytearray(bytes_needed(1 << 10))).cast("Q")
        self.table = TableWriter.create(words, slot_count=1 << 10, table_id=(1, 2))
        self.announced: list[Collection[GrantKey] | None] = []
        self.told: list[Event] = []
        self.missing = 0
        self.said: list[str] = []
        self.wanted = True
        shown = Shown()
        self.owners = Owners()
        for ino in (ROOT, SHOWN, OTHER, REPLACED):
            shown.mark(ino)
            self.owners.tell(ino, SOMEBODY)
        self.kernel = Kernel()
        self.changes = Changes(self.table, recalls=self)
        self.watcher = Watcher(
            self.kernel, self.changes, shown=shown, owners=self.owners, number_on=lambda _, ino: HostInode(ino),  # type: ignore[arg-type]
            tell=self.tell, wanted=lambda: self.wanted,
        )  # fmt: skip

    def revoke(self, keys: Iterable[GrantKey], request: Request | None) -> None:
        raise AssertionError("nobody is waited for")

    def announce(self, keys: Collection[GrantKey] | None) -> None:
        self.announced.append(keys)
        self.said.append("recalled")

    def tell(self, told: Sequence[Event], missing: int) -> None:
        self.told += told
        self.missing += missing
        self.said.append("told")

    def hear(self, *events: bytes) -> list[Event]:
        """What guests are told of these events."""
        self.told.clear()
        self.kernel.happens(*events)
        self.watcher.read_and_deal()
        return self.told

    def told_when_touched(self, ino: HostInode, *owners: Owner) -> None:
        """A guest has asked before, and is answered at the last moment at which it may take the answer for valid."""

        def reach(point: str) -> None:
            if point == "touched":
                for owner in owners:
                    self.owners.tell(ino, owner)

        self.changes.reach = reach

    def keys(self, *inodes: HostInode, leaving: tuple[HostInode, ...] = ()) -> tuple[GrantKey, ...]:
        return keys_of(self.table.slots_of(inodes), self.table.slots_of(leaving))


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.watcher.close()
    desk.kernel.close()
    desk.table.check()


# --- what is touched and recalled -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "touched", "leaving"),
    [
        (of_name(fan.CREATE, HIDDEN, ROOT, b"n"), (ROOT,), ()),
        (of_name(fan.CREATE, SHOWN, ROOT, b"n"), (ROOT, SHOWN), ()),
        (of_name(fan.MODIFY, SHOWN, ROOT, b"n"), (SHOWN,), ()),
        (of_name(fan.ATTRIB, SHOWN, ROOT, b"n"), (SHOWN,), ()),
        (of_name(fan.CLOSE_WRITE, SHOWN, ROOT, b"n"), (SHOWN,), ()),
        (of_name(fan.DELETE, SHOWN, ROOT, b"n"), (ROOT, SHOWN), (SHOWN,)),
        (of_name(fan.DELETE, SHOWN, HIDDEN_DIRECTORY, b"n"), (SHOWN,), (SHOWN,)),
        (of_inode(fan.ATTRIB, SHOWN), (SHOWN,), (SHOWN,)),
        (of_inode(fan.ATTRIB | fan.ONDIR, SHOWN), (SHOWN,), ()),
        (of_inode(fan.DELETE_SELF, SHOWN), (SHOWN,), (SHOWN,)),
        (of_inode(fan.DELETE_SELF | fan.ONDIR, SHOWN), (SHOWN,), (SHOWN,)),
        (of_inode(fan.MODIFY, SHOWN), (SHOWN,), ()),
        (of_rename(fan.RENAME, SHOWN, (ROOT, b"n"), (OTHER, b"m")), (ROOT, SHOWN, OTHER), (SHOWN,)),
        (of_rename(fan.RENAME, HIDDEN, (HIDDEN_DIRECTORY, b"n"), (OTHER, b"m")), (OTHER,), ()),
        (of_name(fan.CREATE, SHOWN, ROOT, b"n") + of_inode(fan.ATTRIB, OTHER), (ROOT, SHOWN, OTHER), (OTHER,)),
    ],
)  # fmt: skip
def test_each_batch_is_one_touch_and_one_recall(
    desk: Desk, events: bytes, touched: tuple[HostInode, ...], leaving: tuple[HostInode, ...]
) -> None:
    desk.hear(events)
    assert desk.announced == [desk.keys(*touched, leaving=leaving)]
    assert desk.table.statistics().bumps == len(touched)


@pytest.mark.parametrize(
    "events", [of_name(fan.ATTRIB, SHOWN, ROOT, b"n"), of_inode(fan.ATTRIB | fan.ONDIR, SHOWN)], ids=["file", "directory"]
)
@pytest.mark.parametrize(
    ("now", "told", "leaving"),
    [
        (SOMEBODY, (), ()), (ANOTHER, (), (SHOWN,)), (None, (), (SHOWN,)),
        (ANOTHER, (ANOTHER,), (SHOWN,)), (SOMEBODY, (ANOTHER,), (SHOWN,)),
    ],
    ids=["the same", "a new one", "gone", "a new one that was told of already", "and back"],
)  # fmt: skip
def test_a_new_owner_recalls_names_and_other_attributes_do_not(
    desk: Desk, events: bytes, now: Owner | None, told: tuple[Owner, ...], leaving: tuple[HostInode, ...]
) -> None:
    desk.kernel.owners[SHOWN] = now
    desk.told_when_touched(SHOWN, *told)
    desk.hear(events)
    assert desk.announced == [desk.keys(SHOWN, leaving=leaving)]


@pytest.mark.parametrize(
    "events",
    [
        of_name(fan.MODIFY, HIDDEN, ROOT, b"n"),
        of_name(fan.CREATE, HIDDEN, HIDDEN_DIRECTORY, b"n"),
        of_inode(fan.DELETE_SELF, HIDDEN),
        of_name(fan.MODIFY, SHOWN, ROOT, b"n", pid=os.getpid()),
        b"",
    ],
    ids=["not shown", "not shown, in one not shown", "gone, not shown", "our own doing", "nothing"],
)
def test_what_is_of_no_interest_costs_nothing(desk: Desk, events: bytes) -> None:
    desk.kernel.happens(events + of_name(fan.MODIFY, HIDDEN, HIDDEN_DIRECTORY, b"n"))
    desk.watcher.read_and_deal()
    assert desk.announced == []
    assert desk.table.statistics().bumps == 0
    assert desk.table.statistics().epoch == 1


@pytest.mark.parametrize("events", [event(fan.Q_OVERFLOW, pid=0), of_inode(fan.DELETE_SELF, GONE)])
def test_what_cannot_be_known_is_everything(desk: Desk, events: bytes) -> None:
    assert len(desk.hear(of_name(fan.CREATE, SHOWN, ROOT, b"n"), events, of_name(fan.DELETE, SHOWN, ROOT, b"n"))) == 2
    assert desk.announced == [None]
    assert desk.table.statistics().epoch == 2
    assert sum(desk.watcher.statistics()[1:]) == 1
    assert desk.missing == 1, "and guests are told that there is something that they are not told"
    desk.wanted = False
    desk.hear(events)
    assert desk.missing == 1


def test_a_change_under_way_stays_odd(desk: Desk) -> None:
    slots = desk.table.slots_of((SHOWN,))
    desk.table.begin(slots)
    desk.hear(of_inode(fan.MODIFY, SHOWN))
    assert desk.table.statistics().changes_in_flight == 1
    desk.table.check()
    desk.table.end(slots)


# --- what guests are told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (of_name(fan.CREATE | fan.ONDIR, HIDDEN, ROOT, b"n"), [Event(EventKind.CREATED, HIDDEN, True, ROOT, b"n")]),
        (
            of_name(fan.CREATE | fan.MODIFY | fan.CLOSE_WRITE, HIDDEN, ROOT, b"n"),
            [Event(kind, HIDDEN, False, ROOT, b"n") for kind in (EventKind.CREATED, EventKind.MODIFIED)],
        ),
        (of_name(fan.DELETE, HIDDEN, ROOT, b"n"), [Event(EventKind.REMOVED, HIDDEN, False, ROOT, b"n")]),
        (of_name(fan.CLOSE_WRITE, SHOWN, ROOT, b"n"), []),
        (of_inode(fan.ATTRIB, SHOWN), [Event(EventKind.ATTRIBUTES, SHOWN, False)]),
        (of_inode(fan.ATTRIB, HIDDEN), []),
        (of_inode(fan.ATTRIB | fan.DELETE_SELF, SHOWN), []),
        (of_name(fan.MODIFY, SHOWN, HIDDEN_DIRECTORY, b"n"), []),
        (
            of_rename(fan.RENAME, SHOWN, (ROOT, b"n"), (OTHER, b"m")),
            [Event(EventKind.RENAMED, SHOWN, False, ROOT, b"n", OTHER, b"m")],
        ),
        (
            of_rename(fan.RENAME, SHOWN, (ROOT, b"n"), (HIDDEN_DIRECTORY, b"m")),
            [Event(EventKind.REMOVED, SHOWN, False, ROOT, b"n")],
        ),
        (
            of_rename(fan.RENAME, HIDDEN, (HIDDEN_DIRECTORY, b"n"), (ROOT, b"m")),
            [Event(EventKind.CREATED, HIDDEN, False, ROOT, b"m")],
        ),
        (of_rename(fan.RENAME, HIDDEN, (HIDDEN_DIRECTORY, b"n"), (HIDDEN_DIRECTORY, b"m")), []),
        (  # a hard link
            of_inode(fan.ATTRIB, SHOWN) + of_name(fan.CREATE, SHOWN, ROOT, b"n"),
            [Event(EventKind.CREATED, SHOWN, False, ROOT, b"n")],
        ),
        (of_inode(fan.ATTRIB, SHOWN) + of_name(fan.DELETE, SHOWN, ROOT, b"n"), [Event(EventKind.REMOVED, SHOWN, False, ROOT, b"n")]),
        (  # over an existing name
            of_rename(fan.RENAME, HIDDEN, (ROOT, b"n"), (ROOT, b"m")) + of_inode(fan.ATTRIB | fan.DELETE_SELF, SHOWN),
            [Event(EventKind.RENAMED, HIDDEN, False, ROOT, b"n", ROOT, b"m", SHOWN)],
        ),
        (  # and somebody else has changed a file through a descriptor
            of_rename(fan.RENAME, HIDDEN, (ROOT, b"n"), (ROOT, b"m")) + of_inode(fan.ATTRIB, SHOWN, pid=1),
            [Event(EventKind.RENAMED, HIDDEN, False, ROOT, b"n", ROOT, b"m"), Event(EventKind.ATTRIBUTES, SHOWN, False)],
        ),
        (  # the same with directories
            of_rename(fan.RENAME | fan.ONDIR, HIDDEN, (ROOT, b"n"), (ROOT, b"m")) + of_inode(fan.ATTRIB | fan.ONDIR, REPLACED),
            [Event(EventKind.RENAMED, HIDDEN, True, ROOT, b"n", ROOT, b"m", REPLACED)],
        ),
        (  # where another one is changed by the same process
            of_rename(fan.RENAME | fan.ONDIR, HIDDEN, (ROOT, b"n"), (ROOT, b"m")) + of_inode(fan.ATTRIB | fan.ONDIR, SHOWN),
            [Event(EventKind.RENAMED, HIDDEN, True, ROOT, b"n", ROOT, b"m"), Event(EventKind.ATTRIBUTES, SHOWN, True)],
        ),
        (  # from where nobody looks
            of_rename(fan.RENAME, HIDDEN, (HIDDEN_DIRECTORY, b"n"), (ROOT, b"m")) + of_inode(fan.ATTRIB, SHOWN),
            [Event(EventKind.CREATED, HIDDEN, False, ROOT, b"m"), Event(EventKind.ATTRIBUTES, SHOWN, False)],
        ),
        (of_inode(fan.ATTRIB, OTHER) + of_name(fan.DELETE, SHOWN, ROOT, b"n"), [
            Event(EventKind.ATTRIBUTES, OTHER, False), Event(EventKind.REMOVED, SHOWN, False, ROOT, b"n"),
        ]),
    ],
)  # fmt: skip
def test_what_guests_are_told(desk: Desk, events: bytes, expected: list[Event]) -> None:
    desk.kernel.owners[REPLACED] = None
    assert desk.hear(events) == expected
    desk.wanted = False
    assert desk.hear(events) == []


def test_guests_are_told_when_the_caches_are_right(desk: Desk) -> None:
    desk.hear(of_name(fan.MODIFY, SHOWN, ROOT, b"a"), of_name(fan.CREATE, OTHER, ROOT, b"b"))
    assert desk.said == ["recalled", "told"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (
            of_rename(fan.RENAME, HIDDEN, (ROOT, b"n"), (ROOT, b"m")), of_inode(fan.ATTRIB, SHOWN),
            [Event(EventKind.RENAMED, HIDDEN, False, ROOT, b"n", ROOT, b"m", SHOWN)],
        ),
        (
            of_inode(fan.ATTRIB, SHOWN), of_name(fan.DELETE, SHOWN, ROOT, b"n"),
            [Event(EventKind.REMOVED, SHOWN, False, ROOT, b"n")],
        ),
    ],
    ids=["over another", "removed"],
)  # fmt: skip
def test_what_the_kernel_tells_in_two_events_is_one_also_if_it_is_read_in_between(
    desk: Desk, first: bytes, second: bytes, expected: list[Event]
) -> None:
    coming = [second]

    def reach(point: str) -> None:
        if point == "touched" and coming:
            assert desk.told == []
            desk.kernel.happens(coming.pop())

    desk.changes.reach = reach
    assert desk.hear(first) == expected
    assert desk.said == ["recalled", "recalled", "told"], "no cache waits for it"


# --- the thread -----------------------------------------------------------------------------------------------------


def test_it_deals_with_what_happens_until_it_is_closed(desk: Desk) -> None:
    desk.kernel.happens(of_inode(fan.MODIFY, SHOWN))
    desk.watcher.start()
    until(lambda: desk.announced)
    desk.kernel.happens(of_inode(fan.MODIFY, OTHER))
    until(lambda: len(desk.announced) == 2)
    assert desk.announced == [(attributes_key(slot),) for ino in (SHOWN, OTHER) for slot in desk.table.slots_of((ino,))]


def test_it_looks_for_mounts_that_came_before_it_was_ready(desk: Desk) -> None:
    desk.kernel.happens(of_inode(fan.MODIFY, SHOWN))
    desk.watcher.start()
    until(lambda: desk.announced)
    assert desk.kernel.calls[:2] == ["look", "read"]


def _of_another_kernel(desk: Desk) -> None:
    desk.kernel.happens(event(fan.MODIFY, version=4))


def _out_of_order(desk: Desk) -> None:
    desk.kernel.fault = OSError(errno.EIO, "broken")
    desk.kernel.happens(b"x")


@pytest.mark.expected_logs("changes made directly in the share are not seen any more")
@pytest.mark.parametrize("break_it", [_of_another_kernel, _out_of_order])
def test_a_fault_is_told_and_nothing_old_is_believed(desk: Desk, break_it: Callable[[Desk], None]) -> None:
    desk.watcher.start()
    break_it(desk)
    until(lambda: desk.announced)
    assert desk.watcher.failed
    assert desk.announced == [None]
    assert desk.table.statistics().epoch == 2


def test_who_catches_up_deals_with_all_that_has_happened(desk: Desk) -> None:
    for _ in range(3):
        desk.kernel.happens(of_name(fan.MODIFY, SHOWN, ROOT, b"n"))
    desk.watcher.catch_up()
    assert desk.table.statistics().bumps > 0
    reads = desk.kernel.calls.count("read")
    desk.watcher.catch_up()  # nothing is left
    assert desk.kernel.calls.count("read") == reads > 0


def hold_what_is_read(desk: Desk) -> Gate:
    """The thread has read an event, and is not let go on."""
    gate = Gate()
    desk.watcher.reach = lambda point: gate.pass_through() if point == "read" else None
    desk.watcher.start()
    gate.shut()
    desk.kernel.happens(of_name(fan.MODIFY, SHOWN, ROOT, b"n"))
    gate.await_reached()
    return gate


def test_who_catches_up_waits_for_what_the_thread_deals_with(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_CATCH_UP_S", 60)
    gate = hold_what_is_read(desk)
    waiting = InBackground(desk.watcher.catch_up)
    assert not waiting.is_over
    assert desk.table.statistics().bumps == 0
    gate.open()
    waiting.wait()
    assert desk.table.statistics().bumps == 1


def test_who_catches_up_does_not_wait_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_CATCH_UP_S", 0.01)
    gate = hold_what_is_read(desk)
    desk.watcher.catch_up()
    assert desk.table.statistics().bumps == 0
    gate.open()


@pytest.mark.expected_logs("changes made directly in the share are not seen any more")
def test_a_fault_while_catching_up_is_a_fault_of_the_watcher(desk: Desk) -> None:
    desk.kernel.fault = OSError(errno.EIO, "odd")
    desk.kernel.happens(of_name(fan.MODIFY, SHOWN, ROOT, b"n"))
    desk.watcher.catch_up()
    assert desk.watcher.failed
    assert desk.announced == [None]
    desk.watcher.catch_up()
    assert desk.kernel.calls.count("read") == 1


def test_control_without_a_fault_it_has_not_failed(desk: Desk) -> None:
    desk.watcher.start()
    desk.kernel.happens(of_inode(fan.MODIFY, SHOWN))
    until(lambda: desk.announced)
    assert not desk.watcher.failed
    assert desk.table.statistics().epoch == 1


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EPERM, "CAP_SYS_ADMIN"), (errno.EINVAL, "Linux 5.17"), (errno.ENOSYS, "no fanotify"), (errno.EXDEV, "subvolume"),
        (errno.ENODEV, "of type odd"), (errno.EOPNOTSUPP, "nfs_export"), (errno.EMFILE, "max_user_groups"),
        (errno.ENOSPC, "max_user_marks"), (errno.EIO, "Input/output error"), (errno.EEXIST, "same id"),
    ],
)  # fmt: skip
def test_why_it_cannot_be_done_is_told_in_words(number: int, reason: str) -> None:
    assert reason in why_not(OSError(number, os.strerror(number)), "odd")
    assert why_not(OSError(number, "x"), "\x1b[0m" * 100).isprintable()
    assert len(why_not(OSError(number, "x"), "x" * 1000)) < 256
