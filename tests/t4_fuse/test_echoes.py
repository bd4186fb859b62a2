"""What an echo may not do: change anything, believe what is past, hold anybody up, or stay behind when somebody dies."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from coherency.events import Event, EventKind
from coherency.fuse import syscalls
from coherency.fuse.mounts import MountList
from coherency.fuse.nodes import Node
from coherency.guest_agent.echo_jobs import EchoJob
from coherency.guest_agent.helper_pool import _WAITS_FOR_LOCK
from coherency.ids import HostInode, NodeId
from coherency.protocol_events import Happened
from tests.granting_guest import Gate, GrantingGuest, InBackground, state
from tests.guests import Host, Program
from tests.waiting import until
from tests.watcher import watching

PAGE = 4096


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir(), "--lease", "60") as host:
        host.mount("other", "none")
        yield host


def actor(host: Host) -> Path:
    """Another guest's mount: what this process changes on the host would be taken for this process's own guest's doing."""
    return host.directory / "other"


@pytest.fixture(scope="module")
def guest(host: Host) -> Iterator[GrantingGuest]:
    with GrantingGuest(host, events=True) as guest:
        yield guest


@pytest.fixture
def place(host: Host, guest: GrantingGuest, request: pytest.FixtureRequest) -> str:
    """The name of a new directory in the share, which the guest knows; its events are over."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    with watching(guest.path) as watcher:
        (actor(host) / name).mkdir()
        (actor(host) / name / "file").write_text("file")
        os.mknod(actor(host) / f"{name}.made")
        watcher.await_event("CREATE", f"{name}.made")
    os.stat(guest.path / name)
    return name


class HeldEchoes:
    """``with HeldEchoes(guest) as gate``: no system call of an echo is made before the gate is open, or the block left."""

    def __init__(self, guest: GrantingGuest) -> None:
        self._echoes, self._perform = guest.echoes, guest.echoes._perform
        self.gate = Gate()

    def __enter__(self) -> Gate:
        def held(job: EchoJob) -> None:
            self.gate.pass_through()
            self._perform(job)

        self._echoes._perform = held  # type: ignore[method-assign]
        self.gate.shut()
        return self.gate

    def __exit__(self, *exc: object) -> None:
        self._echoes._perform = self._perform  # type: ignore[method-assign]
        self.gate.open()


# --- names that are granted ---------------------------------------------------------------------------------------


def _nothing_taken_back(
    names: Sequence[tuple[NodeId, bytes]], given_up: Callable[[], bool]
) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def test_a_name_that_was_looked_up_before_its_event_is_told_all_the_same(
    host: Host, guest: GrantingGuest, place: str
) -> None:
    """And granted. (Newer kernels ask about the name of what is made, and the new name of a rename, in any case.)"""
    new = guest.path / place / "new"
    refused = guest.echoes.statistics().refused
    with watching(guest.path / place) as watcher:
        with HeldEchoes(guest) as gate:
            os.mknod(actor(host) / place / "new")
            gate.await_reached()
            guest.warm(lambda: os.stat(new))
        os.mknod(actor(host) / place / "end")
        watcher.await_event("CREATE", "end")
    assert [each.name for each in watcher.seen] == ["new", "end"]
    assert guest.echoes.statistics().refused == refused
    assert state(new) == state(host.share / place / "new")


@pytest.mark.parametrize("taken_back", [True, False], ids=["taken back", "control: not taken back"])
def test_a_file_that_was_made_anew_is_not_removed_for_the_old_one(
    host: Host, guest: GrantingGuest, place: str, monkeypatch: pytest.MonkeyPatch, taken_back: bool
) -> None:
    """The event of the old file comes when the guest has the new one under the same name, and is sure of it."""
    if not taken_back:
        monkeypatch.setattr(guest.fs, "unassured", _nothing_taken_back)
    file = guest.path / place / "file"
    os.stat(file)
    with HeldEchoes(guest) as gate:
        os.unlink(actor(host) / place / "file")
        gate.await_reached()
        (actor(host) / place / "file").write_text("anew")
        guest.warm(lambda: os.stat(file))
        with watching(guest.path / place, file) as watcher:
            gate.open()
            os.mknod(actor(host) / place / "end")
            watcher.await_event("CREATE", "end")
    seen = [(each.what, each.name) for each in watcher.seen if each.watched != file]
    assert ("DELETE", "file") in seen if taken_back else ("DELETE", "file") not in seen
    assert not [each for each in watcher.seen if "DELETE_SELF" in each.what], "the new file is there"
    assert file.read_text() == "anew"


# --- what the kernel has of an inode -------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [True, False], ids=["now", "control: before"])
def test_pages_of_a_file_that_has_grown_are_not_lost(
    host: Host, guest: GrantingGuest, place: str, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    """The guest extends a file and writes into its pages between an event and its echo: the kernel cuts what it takes for too long."""
    file = guest.path / place / "file"
    with HeldEchoes(guest) as gate:
        os.stat(file)
        with open(actor(host) / place / "file", "r+b", buffering=0) as opened:
            opened.write(b"FILE")
        gate.await_reached()
        before = guest.fs.attributes_now(_node(guest, file))
        if not now:
            monkeypatch.setattr(guest.echoes._answers, "_attributes_now", lambda _node: before)
        # In a process of its own: a page that is missing is asked for while its thread holds Python's lock.
        command = [sys.executable, "-c", _EXTEND, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout is not None
                assert syscalls.wait_readable([writer.stdout.fileno()], 20_000_000_000)
                with watching(file) as watcher:
                    gate.open()
                    watcher.await_event("MODIFY")
                writer.communicate(b"go on", timeout=20)
            finally:
                writer.kill()
    assert ((host.share / place / "file").read_bytes()[PAGE:][:1] == b"X") == now


_EXTEND = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
os.ftruncate(fd, 2 * mmap.PAGESIZE)
with mmap.mmap(fd, 2 * mmap.PAGESIZE) as pages:
    pages[mmap.PAGESIZE] = 0x58
    print("dirty", flush=True)
    sys.stdin.read()
    pages.flush()
"""


def _node(guest: GrantingGuest, path: Path) -> Node:
    node = guest.fs.nodes.known(os.stat(path).st_ino)  # type: ignore[arg-type]
    assert node is not None
    return node


@pytest.mark.parametrize("discarded", [True, False], ids=["discarded", "control: taken"])
def test_the_kernel_takes_no_attributes_from_an_echo(
    host: Host, guest: GrantingGuest, place: str, monkeypatch: pytest.MonkeyPatch, discarded: bool
) -> None:
    """As it has them without asking: of the directory in which something is made."""
    if not discarded:
        monkeypatch.setattr(guest.echoes._answers, "_forget_attributes", lambda _node: True)
    directory = os.open(guest.path / place, os.O_PATH)
    try:
        os.fstat(directory)
        with watching(guest.path / place) as watcher:
            os.mknod(actor(host) / place / "new")
            watcher.await_event("CREATE", "new")
        raw = syscalls.statx(directory, syscalls.STATX_BASIC_STATS, syscalls.AT_STATX_DONT_SYNC)
        mode = int.from_bytes(raw[28:30], "little")
        assert (stat.S_IMODE(mode) != 0) == discarded
        assert state(guest.path / place) == state(host.share / place)
    finally:
        os.close(directory)


def test_an_acl_is_not_forgotten_by_it(host: Host, guest: GrantingGuest, place: str) -> None:
    """Who echoes is refused the ACL of a directory that is not its own; the kernel must not take that for an answer."""
    subprocess.run(["setfacl", "-m", "u:1234:rwx", actor(host) / place], check=True, timeout=20)
    os.chown(actor(host) / place, 1000, 1000)
    acl = os.getxattr(host.share / place, "system.posix_acl_access")
    with watching(guest.path / place) as watcher:
        os.mknod(actor(host) / place / "new")
        watcher.await_event("CREATE", "new")
    assert os.getxattr(guest.path / place, "system.posix_acl_access") == acl


# --- what is mounted in the guest ---------------------------------------------------------------------------------


def test_what_is_mounted_on_a_name_stays_and_is_not_touched(
    host: Host, guest: GrantingGuest, place: str
) -> None:
    point = guest.path / place / "point"
    (actor(host) / place / "point").mkdir()
    os.stat(point)
    with watching(guest.path / place) as settled:
        os.mknod(actor(host) / place / "made")
        settled.await_event("CREATE", "made")
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True, timeout=20)
    try:
        before = os.stat(point).st_ctime_ns
        with watching(guest.path / place) as watcher:
            os.chmod(actor(host) / place / "point", 0o700)
            watcher.await_event("ATTRIB|ISDIR", "point")
            assert (os.path.ismount(point), os.stat(point).st_ctime_ns) == (True, before)
            refused = guest.echoes.statistics().refused
            parent = _node(guest, guest.path / place)  # told of by hand: a real removal makes the kernel unmount it by itself
            guest.echoes.hear(Happened(0, (Event(EventKind.REMOVED, HostInode(0), True, parent.ino, b"point"),)))
            os.mknod(actor(host) / place / "end")
            watcher.await_event("CREATE", "end")
        assert [each.what for each in watcher.seen] == ["ATTRIB|ISDIR", "CREATE"]
        assert guest.echoes.statistics().refused == refused + 1
        assert os.path.ismount(point)
    finally:
        subprocess.run(["umount", point], check=True, timeout=20)


def test_a_list_of_mounts_is_up_to_date(tmp_path: Path) -> None:
    point = tmp_path / "deep" / "point"
    point.mkdir(parents=True)
    listed = MountList(os.fsencode(tmp_path))
    try:
        assert not listed.is_in_use(b"deep")
        subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True, timeout=20)
        try:
            assert listed.is_in_use(b"deep")
            assert listed.is_in_use(b"deep/point")
            assert not listed.is_in_use(b"dee")
            assert not listed.is_in_use(b"deep/point/below")
        finally:
            subprocess.run(["umount", point], check=True, timeout=20)
        assert not listed.is_in_use(b"deep")
    finally:
        listed.close()


# --- who is held up, and who dies ---------------------------------------------------------------------------------


def _helpers(agent: int) -> list[int]:
    """The processes that echo for an agent."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if b"echo_process" in (each / "cmdline").read_bytes():
                parent = int((each / "stat").read_bytes().rpartition(b")")[2].split()[1])
                found += [int(each.name)] * (parent == agent)
    return found


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def test_a_process_that_is_killed_is_replaced(host: Host, guest: GrantingGuest, place: str) -> None:
    (helper,) = _helpers(os.getpid())
    os.kill(helper, signal.SIGKILL)
    until(lambda: not _is_alive(helper))
    with watching(guest.path / place) as watcher:
        os.mknod(actor(host) / place / "lost")
        os.mknod(actor(host) / place / "new")
        watcher.await_event("CREATE", "new")
    assert helper not in _helpers(os.getpid())
    guest.echoes.check()


@contextlib.contextmanager
def held_directory(host: Host, mount: Path, place: str) -> Iterator[Program]:
    """The guest at ``mount`` makes something in ``place``, and waits: for a third one, which has that directory and is stopped."""
    third = host.mount("third", "strict")
    stopped = host.guests["third"]
    for _ in range(5):
        os.stat(third / place)
        host.status()
    os.kill(stopped.process.pid, signal.SIGSTOP)
    making = None
    try:
        waits = host.status()["waits"], host.status()["changes_in_flight"]
        making = InBackground(os.mkdir, mount / place / "made here")
        until(lambda: host.status()["changes_in_flight"] > waits[1])
        yield stopped
    finally:
        os.kill(stopped.process.pid, signal.SIGCONT)
        if making is not None:
            with contextlib.suppress(OSError):
                making.wait()
        host.guests.pop("third").stop()


def test_one_that_is_held_up_holds_up_no_other_for_long(
    host: Host, guest: GrantingGuest, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest.echoes, "_echo_ns", 1_000_000_000)
    (actor(host) / place / "below").mkdir()
    (actor(host) / place / "below" / "file").write_text("")
    os.stat(guest.path / place / "below")
    with watching(guest.path / place / "below") as watcher, held_directory(host, guest.path, place):
        os.chmod(actor(host) / place / "file", 0o640)  # not known to the guest: a look-up, which waits for the directory
        until(lambda: guest.echoes.statistics().left)
        os.chmod(actor(host) / place / "below" / "file", 0o640)
        watcher.await_event("ATTRIB", "file")

    def is_buried() -> bool:
        os.utime(actor(host) / place / "below" / "file")  # after each event it is looked at
        return not guest.echoes.statistics().left

    until(is_buried)
    guest.echoes.check()


def test_a_killed_agent_leaves_nothing_behind(host: Host, guest: GrantingGuest, place: str) -> None:
    """Killed while its echo waits for a lock, in a guest of its own."""
    mount = host.mount("doomed", "access", "--events")
    doomed = host.guests.pop("doomed")
    os.stat(mount / place)
    try:
        with held_directory(host, mount, place):
            (helper,) = _helpers(doomed.process.pid)
            os.chmod(actor(host) / place / "file", 0o640)
            until(lambda: _waits_for_a_lock(helper))
            doomed.kill()
            until(lambda: not _is_alive(helper))
            with pytest.raises(OSError, match="not connected"):
                os.statvfs(mount)
    finally:
        if doomed.process.poll() is None:
            doomed.kill()
        syscalls.umount(str(mount), syscalls.MNT_DETACH)


def _waits_for_a_lock(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_bytes() in _WAITS_FOR_LOCK
