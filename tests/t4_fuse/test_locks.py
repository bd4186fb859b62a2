"""Advisory locks hold across guests, the export and programs that use the share itself.

Everything is done by programs in processes of their own (`tests.locker`), at two places: the one's locks must mean to the
other what they would mean in one directory.
"""

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coherency.fuse.abi import InitFlag
from coherency.fuse.passthrough import Passthrough
from coherency.guest_agent.filesystem import CachingFileSystem
from coherency.guest_agent.mount import GuestMount, MountOptions
from coherency.guest_agent.pages import Pages
from tests.file_systems import mounted, run
from tests.guests import Host
from tests.locker import Locker, waiting_for
from tests.mounts import detach
from tests.waiting import until

FILE_BYTES = 100


class Places:
    """One share, from everywhere it can be seen, and two programs at each place."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.roots = {
            "strict": host.mount("strict", "strict"), "access": host.mount("access", "access"),
            "none": host.mount("none", "none"), "export": host.export, "share": host.share,
        }  # fmt: skip
        self._lockers: dict[tuple[str, int], Locker] = {}

    def locker(self, place: str, number: int) -> Locker:
        key = place, number
        if key not in self._lockers:
            self._lockers[key] = Locker()
        return self._lockers[key]

    def close(self) -> None:
        for locker in self._lockers.values():
            locker.__exit__(None, None, None)


@pytest.fixture(scope="module")
def places(make_socket_dir: Callable[[], Path]) -> Iterator[Places]:
    with Host(make_socket_dir()) as host:
        places = Places(host)
        try:
            yield places
        finally:
            places.close()


class Pair:
    """Two programs, and a file as each of them calls it."""

    def __init__(self, places: Places, one: str, other: str, name: str) -> None:
        self.on_the_share = places.host.share / name
        self.on_the_share.write_bytes(bytes(FILE_BYTES))
        self.one, self.other = places.locker(one, 1), places.locker(other, 2)
        self.path_of_one, self.path_of_other = str(places.roots[one] / name), str(places.roots[other] / name)
        # Whom `other` is told about: a program at the same mount, which for the export includes agents; else nobody.
        nobody = -1 if other == "share" else 0
        users = {one: self.one.pid}
        if one in places.host.guests:
            users["export"] = places.host.guests[one].process.pid
        self.told_pid = users.get(other, nobody)

    def open(self, flags: int = os.O_RDWR) -> tuple[int, int]:
        return self.one.open(self.path_of_one, flags), self.other.open(self.path_of_other, flags)

    def becomes_free_for_other(self, api: str, fd: int) -> bool:
        until(lambda: self.other.lock(api, fd, "exclusive"))
        return True


PAIRS = [
    ("strict", "access"), ("access", "access"), ("none", "strict"), ("strict", "export"), ("export", "export"),
    ("access", "share"), ("share", "strict"),
]  # fmt: skip
numbers = iter(range(10_000))


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, places: Places) -> Iterator[Pair]:
    one, other = request.param
    pair = Pair(places, one, other, f"file-{next(numbers)}")
    yield pair
    pair.one.close_all()
    pair.other.close_all()


# ---- what excludes what ----


@pytest.mark.parametrize("api", ["posix", "ofd", "flock"])
def test_exclusive_excludes_and_shared_does_not_exclude_shared(pair: Pair, api: str) -> None:
    mine, theirs = pair.open()
    assert pair.one.lock(api, mine, "exclusive")
    assert not pair.other.lock(api, theirs, "exclusive")
    assert not pair.other.lock(api, theirs, "shared")
    assert pair.one.lock(api, mine, "shared")  # downgraded
    assert pair.other.lock(api, theirs, "shared")
    assert not pair.one.lock(api, mine, "exclusive")  # not upgraded, as long as both have it
    assert pair.other.lock(api, theirs, "unlock")
    assert pair.one.lock(api, mine, "exclusive")
    assert not pair.other.lock(api, theirs, "shared")
    assert pair.one.lock(api, mine, "unlock")
    assert pair.other.lock(api, theirs, "exclusive")


@pytest.mark.parametrize("api", ["posix", "ofd"])
def test_ranges(pair: Pair, api: str) -> None:
    mine, theirs = pair.open()
    assert pair.one.lock(api, mine, "exclusive", 10, 20)
    assert pair.other.lock(api, theirs, "exclusive", 0, 10)
    assert not pair.other.lock(api, theirs, "exclusive", 29, 5)
    assert pair.other.lock(api, theirs, "exclusive", 30)  # to wherever the file may end
    assert not pair.one.lock(api, mine, "shared", 1 << 40, 1)
    assert pair.one.lock(api, mine, "unlock", 15, 5)  # from the middle
    assert pair.other.lock(api, theirs, "exclusive", 15, 5)
    assert not pair.other.lock(api, theirs, "shared", 14, 1)
    assert not pair.other.lock(api, theirs, "shared", 20, 1)
    assert pair.one.lock(api, mine, "shared", 20, 5)  # a part of it downgraded
    assert pair.other.lock(api, theirs, "shared", 20, 5)
    assert not pair.other.lock(api, theirs, "shared", 25, 1)


@pytest.mark.parametrize("api", ["posix", "ofd"])
def test_what_is_in_the_way_is_told(pair: Pair, api: str) -> None:
    mine, theirs = pair.open()
    assert pair.one.lock(api, mine, "exclusive", 10, 20)
    assert pair.one.find(api, mine, "exclusive") is None  # nobody is in the own way
    found = pair.other.find(api, theirs, "shared", 0, 0)
    assert found is not None
    assert found[:3] == ["exclusive", 10, 20]
    if api == "posix":
        assert found[3] == pair.told_pid
    assert pair.other.find(api, theirs, "exclusive", 30, 1) is None
    assert pair.one.lock(api, mine, "shared", 10, 20)
    assert pair.other.find(api, theirs, "shared") is None


def test_apis_of_fcntl_exclude_each_other_and_flock_neither(pair: Pair) -> None:
    mine, theirs = pair.open()
    assert pair.one.lock("posix", mine, "exclusive")
    assert not pair.other.lock("ofd", theirs, "exclusive")
    assert pair.other.lock("flock", theirs, "exclusive")
    assert not pair.one.lock("flock", mine, "exclusive")


def test_a_lock_needs_the_access(pair: Pair) -> None:
    mine, _ = pair.open(os.O_RDONLY)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        pair.one.lock("posix", mine, "exclusive")
    assert pair.one.lock("posix", mine, "shared")
    assert pair.one.lock("flock", mine, "exclusive")


def test_what_may_only_be_appended_to_can_be_locked(socket_dir: Path) -> None:
    """By chattr(1): the description below must be one that appends, too."""
    host = Host(socket_dir)
    with mounted("ext4", host.share), host, Locker() as one, Locker() as two:
        log = host.share / "log"
        log.touch()
        run("chattr", "+a", log)
        mine = one.open(f"{host.mount('guest', 'strict')}/log", os.O_WRONLY | os.O_APPEND)
        theirs = two.open(f"{host.export}/log", os.O_WRONLY | os.O_APPEND)
        assert one.lock("posix", mine, "exclusive")
        assert not two.lock("posix", theirs, "exclusive")
        run("chattr", "-a", log)


# ---- whose a lock is, and how long ----


def test_a_process_loses_its_locks_with_any_descriptor_of_the_file(pair: Pair) -> None:
    mine, theirs = pair.open()
    another = pair.one.open(pair.path_of_one, os.O_RDONLY)
    assert pair.one.lock("posix", mine, "exclusive", 0, 10)
    assert not pair.other.lock("posix", theirs, "exclusive", 5, 1)
    pair.one.close(another)
    assert pair.other.lock("posix", theirs, "exclusive", 5, 1)


def test_a_process_is_one_owner_through_all_its_descriptors(pair: Pair) -> None:
    mine, theirs = pair.open()
    reading = pair.one.open(pair.path_of_one, os.O_RDONLY)
    assert pair.one.lock("posix", reading, "shared", 0, 20)
    assert pair.one.lock("posix", mine, "exclusive", 10, 5)  # what only reads below would not do
    assert not pair.other.lock("posix", theirs, "exclusive", 0, 1)
    assert pair.other.lock("posix", theirs, "shared", 0, 10)
    assert not pair.other.lock("posix", theirs, "shared", 10, 1)
    assert pair.one.lock("posix", reading, "unlock", 10, 5)
    assert pair.other.lock("posix", theirs, "shared", 10, 5)


def test_an_open_file_keeps_its_locks_when_another_of_the_process_is_closed(pair: Pair) -> None:
    mine, theirs = pair.open()
    another = pair.one.open(pair.path_of_one)
    assert pair.one.lock("ofd", mine, "exclusive", 0, 10)
    assert not pair.one.lock("ofd", another, "exclusive", 0, 10)
    assert pair.one.lock("ofd", another, "exclusive", 20, 10)
    pair.one.close(another)
    until(lambda: pair.other.lock("ofd", theirs, "exclusive", 20, 10))
    assert not pair.other.lock("ofd", theirs, "exclusive", 0, 10)
    copy = pair.one.dup(mine)
    pair.one.close(mine)
    assert not pair.other.lock("ofd", theirs, "exclusive", 0, 10)
    pair.one.close(copy)
    until(lambda: pair.other.lock("ofd", theirs, "exclusive", 0, 10))


def test_flock_belongs_to_the_open_file(pair: Pair) -> None:
    mine, theirs = pair.open(os.O_RDONLY)
    another = pair.one.open(pair.path_of_one)
    assert pair.one.lock("flock", mine, "exclusive")
    assert not pair.one.lock("flock", another, "exclusive")
    pair.one.close(another)
    copy = pair.one.dup(mine)
    pair.one.close(mine)
    assert not pair.other.lock("flock", theirs, "shared")
    assert pair.one.lock("flock", copy, "unlock")
    assert pair.other.lock("flock", theirs, "exclusive")
    assert pair.other.lock("flock", theirs, "unlock")
    assert pair.one.lock("flock", copy, "exclusive")
    pair.one.close(copy)
    assert pair.becomes_free_for_other("flock", theirs)


def test_a_child_has_the_open_files_and_not_the_process(pair: Pair) -> None:
    mine, theirs = pair.open()
    assert pair.one.lock("posix", mine, "exclusive", 0, 1)
    assert pair.one.lock("ofd", mine, "exclusive", 1, 1)
    assert pair.one.lock("flock", mine, "exclusive")
    assert not pair.one.in_child("lock", "posix", mine, "exclusive", 0, 1)
    assert pair.one.in_child("lock", "ofd", mine, "shared", 1, 1)
    assert pair.one.in_child("lock", "flock", mine, "exclusive")
    # The end of the child has taken nothing along.
    for api, start in (("posix", 0), ("ofd", 1), ("flock", 0)):
        assert not pair.other.lock(api, theirs, "exclusive", start, 1)


@pytest.mark.parametrize("api", ["posix", "ofd", "flock"])
def test_a_process_that_is_killed_has_no_locks(places: Places, api: str) -> None:
    pair = Pair(places, "access", "strict", f"file-{next(numbers)}")
    with Locker() as doomed:
        doomed.lock(api, doomed.open(pair.path_of_one), "exclusive")
        theirs = pair.other.open(pair.path_of_other)
        assert not pair.other.lock(api, theirs, "exclusive")
        doomed.kill()
        assert pair.becomes_free_for_other(api, theirs)
        pair.other.close_all()


# ---- waiting ----

WAITING = [("strict", "access"), ("strict", "strict"), ("export", "strict"), ("share", "access")]


@pytest.fixture(params=WAITING, ids="-".join)
def held(request: pytest.FixtureRequest, places: Places) -> Iterator[Pair]:
    """The one locks, the other is going to wait."""
    one, other = request.param
    pair = Pair(places, one, other, f"file-{next(numbers)}")
    yield pair
    pair.one.close_all()
    pair.other.close_all()


def begin_to_wait(pair: Pair, api: str, kind: str = "exclusive") -> tuple[int, int]:
    mine, theirs = pair.open()
    assert pair.one.lock(api, mine, "exclusive")
    pair.other.begin("lock", api, theirs, kind, 0, 0, True)
    until(lambda: waiting_for(pair.on_the_share) == 1)
    return mine, theirs


@pytest.mark.parametrize("api", ["posix", "ofd", "flock"])
def test_who_waits_gets_it_when_it_is_free(held: Pair, api: str) -> None:
    mine, _ = begin_to_wait(held, api)
    assert not held.other.has_answered()
    assert held.one.lock(api, mine, "unlock")
    assert held.other.answer()
    assert not held.one.lock(api, mine, "shared")


@pytest.mark.parametrize("api", ["posix", "ofd", "flock"])
def test_a_signal_ends_the_wait(held: Pair, api: str) -> None:
    mine, theirs = begin_to_wait(held, api)
    held.other.interrupt()
    with pytest.raises(InterruptedError):
        held.other.answer()
    assert waiting_for(held.on_the_share) == 0
    assert held.one.lock(api, mine, "unlock")
    assert held.one.lock(api, mine, "exclusive")  # nobody has got it unasked
    assert held.one.lock(api, mine, "unlock")
    assert held.other.lock(api, theirs, "exclusive")


@pytest.mark.parametrize("api", ["posix", "flock"])
def test_who_is_killed_waits_no_longer(places: Places, api: str) -> None:
    pair = Pair(places, "access", "strict", f"file-{next(numbers)}")
    with Locker() as doomed:
        mine = pair.one.open(pair.path_of_one)
        assert pair.one.lock(api, mine, "exclusive")
        doomed.begin("lock", api, doomed.open(pair.path_of_other), "exclusive", 0, 0, True)
        until(lambda: waiting_for(pair.on_the_share) == 1)
        doomed.kill()
    until(lambda: waiting_for(pair.on_the_share) == 0)
    assert pair.one.lock(api, mine, "shared")
    pair.one.close_all()


def test_a_signal_ends_the_wait_of_one_and_not_of_others(held: Pair) -> None:
    mine, _ = begin_to_wait(held, "posix")
    with Locker() as third:
        third.begin("lock", "posix", third.open(held.path_of_other), "exclusive", 0, 0, True)
        until(lambda: waiting_for(held.on_the_share) == 2)
        held.other.interrupt()
        with pytest.raises(InterruptedError):
            held.other.answer()
        assert not third.has_answered()
        assert held.one.lock("posix", mine, "unlock")
        assert third.answer()


def test_who_wants_to_write_where_another_thread_of_it_waits_is_not_in_its_own_way(places: Places) -> None:
    """A waiting request has its own description below, which its owner leaves for one that writes."""
    pair = Pair(places, "access", "strict", f"file-{next(numbers)}")
    mine = pair.one.open(pair.path_of_one)
    assert pair.one.lock("posix", mine, "exclusive", 50, 1)
    reading, writing = pair.other.open(pair.path_of_other, os.O_RDONLY), pair.other.open(pair.path_of_other)
    pair.other.lock("posix", reading, "shared", 0, 1)
    pair.other.lock_in_thread("posix", reading, "shared", 0, 100)
    until(lambda: waiting_for(pair.on_the_share) == 1)
    assert pair.other.lock("posix", writing, "exclusive", 10, 1)
    assert not pair.one.lock("posix", mine, "exclusive", 0, 1)  # still has what it had
    assert pair.one.lock("posix", mine, "unlock", 50, 1)
    until(pair.other.thread_is_done)
    assert pair.one.find("posix", mine, "exclusive") == ["shared", 0, 100, 0]
    pair.one.close_all()
    pair.other.close_all()


# ---- what breaks ----


@pytest.fixture
def host(socket_dir: Path) -> Iterator[Host]:
    with Host(socket_dir) as host:
        yield host


def test_an_agent_that_is_killed_has_no_locks(host: Host) -> None:
    guest, other = host.mount("guest", "strict"), host.mount("other", "access")
    (host.share / "file").write_text("text")
    each = (("posix", 0, 1), ("ofd", 1, 1), ("flock", 0, 0))
    with Locker() as one, Locker() as two, Locker() as waiting:
        mine, theirs = one.open(f"{guest}/file"), two.open(f"{other}/file")
        for api, start, length in each:
            assert one.lock(api, mine, "exclusive", start, length)
        waiting.begin("lock", "posix", waiting.open(f"{guest}/file"), "exclusive", 0, 0, True)
        until(lambda: waiting_for(host.share / "file") == 1)
        for api, start, length in each:
            assert not two.lock(api, theirs, "exclusive", start, length)
        host.guests.pop("guest").kill()
        for api, start, length in each:
            until(lambda lock=(api, theirs, "exclusive", start, length): two.lock(*lock))  # type: ignore[misc]
        assert waiting_for(host.share / "file") == 0
        with pytest.raises(OSError, match="|".join(map(os.strerror, (errno.ENOTCONN, errno.ECONNABORTED)))):
            waiting.answer()
    detach(guest)


def test_an_agent_with_waiting_users_ends_when_it_is_told(host: Host) -> None:
    guest = host.mount("guest", "access")
    (host.share / "file").write_text("text")
    with Locker() as one, Locker() as waiting:
        one.lock("flock", one.open(str(host.share / "file")), "exclusive")
        waiting.begin("lock", "flock", waiting.open(f"{guest}/file"), "exclusive", 0, 0, True)
        until(lambda: waiting_for(host.share / "file") == 1)
        assert host.guests["guest"].stop() == 0
        with pytest.raises(OSError, match="|".join(map(os.strerror, (errno.ENOTCONN, errno.ECONNABORTED)))):
            waiting.answer()
        assert waiting_for(host.share / "file") == 0


def test_locks_end_with_the_daemon_and_new_ones_hold(host: Host) -> None:
    guest, other = host.mount("guest", "strict"), host.mount("other", "access")
    (host.share / "file").write_text("text")
    with Locker() as one, Locker() as two, Locker() as waiting:
        before = one.open(f"{guest}/file")
        assert one.lock("posix", before, "exclusive")
        waiting.begin("lock", "posix", waiting.open(f"{other}/file"), "exclusive", 0, 0, True)
        until(lambda: waiting_for(host.share / "file") == 1)
        host.daemon.kill()
        with pytest.raises(OSError, match="|".join(map(os.strerror, (errno.ENOTCONN, errno.ECONNABORTED)))):
            waiting.answer()
        host.serve()
        for mount in (guest, other):
            until(lambda mount=mount: _reads(mount / "file"))  # type: ignore[misc]
        after, theirs = one.open(f"{guest}/file"), two.open(f"{other}/file")
        assert one.lock("posix", after, "exclusive")
        assert not two.lock("posix", theirs, "exclusive")
        one.close(after)
        assert two.lock("posix", theirs, "exclusive")


def _reads(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.read_text() == "text"
    return False


# ---- bounds ----


def test_a_guest_that_hoards_waits_stops_nobody(host: Host) -> None:
    hoarder, other = host.mount("hoarder", "access"), host.mount("other", "strict")
    (host.share / "file").write_text("text")
    (host.share / "free").write_text("text")
    most = CachingFileSystem.most_lock_waits
    with Locker() as one, Locker() as two:
        mine = two.open(f"{other}/file")
        assert two.lock("ofd", mine, "exclusive")
        one.hoard(f"{hoarder}/file", most + 20)
        until(lambda: len(one.hoarded()) == 20)
        assert set(one.hoarded()) == {errno.ENOLCK}
        until(lambda: waiting_for(host.share / "file") == most)
        for root in (hoarder, other):  # everything else goes on, there and elsewhere
            (root / "new").write_text("more")
            assert sorted(os.listdir(root)) == ["file", "free", "new"]
        free, theirs = two.open(f"{other}/free"), one.open(f"{hoarder}/free")
        assert two.lock("posix", free, "exclusive")
        assert not one.lock("posix", theirs, "exclusive")
        with Locker() as three:  # to wait, too
            three.begin("lock", "posix", three.open(f"{other}/free"), "exclusive", 0, 0, True)
            until(lambda: waiting_for(host.share / "free") == 1)
            assert two.lock("posix", free, "unlock")
            assert three.answer()
        one.kill()
        until(lambda: waiting_for(host.share / "file") == 0)
        assert two.lock("ofd", mine, "unlock")


# ---- programs ----

COUNT_UP = """
import contextlib, sqlite3, sys
with contextlib.closing(sqlite3.connect(sys.argv[1], timeout=120, isolation_level=None)) as database:
    for _ in range(int(sys.argv[2])):
        database.execute("BEGIN IMMEDIATE")
        (number,) = database.execute("SELECT max(number) FROM numbers").fetchone()
        database.execute("INSERT INTO numbers VALUES (?)", (number + 1,))
        database.execute("COMMIT")
"""
EACH = 15


def test_sqlite_is_written_by_guests_and_the_host_at_the_same_time(host: Host) -> None:
    """Nobody's number is lost, or there twice, and the database is whole."""
    with contextlib.closing(sqlite3.connect(host.share / "db")) as database, database:
        database.execute("CREATE TABLE numbers (number)")
        database.execute("INSERT INTO numbers VALUES (0)")
    roots = host.mount("strict", "strict"), host.mount("access"), host.export
    with ExitStack() as undo:
        writers = []
        for root in roots:
            writers.append(subprocess.Popen([sys.executable, "-c", COUNT_UP, root / "db", str(EACH)]))
            undo.callback(writers[-1].wait)
            undo.callback(writers[-1].kill)
        assert [writer.wait(180) for writer in writers] == [0, 0, 0]
    for root in (*roots, host.share):
        with contextlib.closing(sqlite3.connect(root / "db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found = database.execute("SELECT number FROM numbers ORDER BY number").fetchall()
            assert found == [(number,) for number in range(len(roots) * EACH + 1)], root


# ---- what was written under a lock ----


def rewrite(path: Path, text: str) -> None:
    """As many bytes as before, at the same time: as within one tick of a clock."""
    with open(path, "r+") as file:
        before = os.fstat(file.fileno())
        file.write(text)
        file.flush()
        os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("mode", ["access", "none", "auto", "always"])
@pytest.mark.parametrize("api", ["posix", "flock"])
def test_who_has_got_a_lock_reads_what_was_written_before(
    places: Places, monkeypatch: pytest.MonkeyPatch, mode: str, api: str
) -> None:
    name, reader = f"file-{next(numbers)}", places.locker("in this process", 1)
    written = places.roots["access"] / name
    written.write_text("old")
    with guests_in_this_process(places.host, mode) as (here, there):
        for root in (here, there):
            fd = reader.open(f"{root}/{name}")
            assert reader.read(fd, 3) == "old"
            if root == there:  # the control
                monkeypatch.setattr(Pages, "drop", lambda *arguments: None)
            rewrite(written, "new")
            assert reader.lock(api, fd, "shared")
            assert reader.read(fd, 3) == ("old" if root == there else "new")
            assert reader.lock(api, fd, "unlock")
            rewrite(written, "old")
        reader.close_all()


# ---- controls ----


@contextlib.contextmanager
def guests_in_this_process(host: Host, mode: str = "access") -> Iterator[tuple[Path, Path]]:
    with ExitStack() as undo:
        roots = host.directory / "here", host.directory / "there"
        for root in roots:
            root.mkdir(exist_ok=True)
            mount = GuestMount(MountOptions(host.name, root, host.runtime_dir, mode))
            mount.start()
            undo.callback(mount.close)
        yield roots


@pytest.mark.parametrize("api", ["posix", "ofd", "flock"])
@pytest.mark.parametrize("forwarded", [True, False])
def test_without_the_flags_two_guests_have_it_both(
    places: Places, monkeypatch: pytest.MonkeyPatch, forwarded: bool, api: str
) -> None:
    """The control of all of the above."""
    if not forwarded:
        flags = Passthrough.init_flags.fget  # type: ignore[attr-defined]
        kept = ~(InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS)
        monkeypatch.setattr(CachingFileSystem, "init_flags", property(lambda self: flags(self) & kept))
    name = f"file-{next(numbers)}"
    (places.host.share / name).write_text("text")
    one, two = places.locker("in this process", 1), places.locker("in this process", 2)
    with guests_in_this_process(places.host) as (here, there):
        assert one.lock(api, one.open(f"{here}/{name}"), "exclusive")
        assert two.lock(api, two.open(f"{there}/{name}"), "exclusive") != forwarded
        assert not two.lock(api, two.open(f"{here}/{name}"), "exclusive")
        one.close_all()
        two.close_all()
