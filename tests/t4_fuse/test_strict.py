"""Modes strict and prompt: the kernel answers by itself, and never what is not true any more."""

import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from coherency.fuse import syscalls
from coherency.fuse.abi import Opcode
from coherency.guest_agent import pages
from coherency.ids import HostInode
from tests.granting_guest import GrantingGuest, HeldOperation, InBackground, state
from tests.guests import Host
from tests.waiting import until

_ACL = "system.posix_acl_access"
_RENAME_EXCHANGE = 2
_STATX_BASIC_STATS, _STATX_BTIME = 0x7FF, 0x800


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


@pytest.fixture(scope="module")
def guest(host: Host) -> Iterator[GrantingGuest]:
    with GrantingGuest(host) as guest:
        yield guest


@pytest.fixture(scope="module")
def other(host: Host, guest: GrantingGuest) -> Path:
    """Another guest, in a process of its own."""
    return host.mount("other", "strict")


@pytest.fixture
def place(host: Host, request: pytest.FixtureRequest) -> str:
    """The name of a new directory in the share, with a file and a directory in it."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    (host.export / name / "directory").mkdir(parents=True)
    (host.export / name / "directory" / "below").write_text("below")
    (host.export / name / "file").write_text("file")
    return name


# --- what is granted ----------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_answered_by_the_kernel(host: Host, guest: GrantingGuest, place: str) -> None:
    file = guest.path / place / "directory" / "below"
    guest.warm(lambda: os.stat(file))
    trips = host.host_trips()
    assert guest.asks(lambda: [os.stat(file) for _ in range(20)]) == 0
    assert host.host_trips() == trips


def test_without_a_grant_each_look_asks(guest: GrantingGuest, place: str) -> None:
    """Negative control: the same with nobody who could take back what is granted, so that nothing is."""
    file = guest.path / place / "directory" / "below"
    recalls, guest.fs._recalls = guest.recalls, None
    try:
        os.stat(file)
        assert guest.asks(lambda: [os.stat(file) for _ in range(20)]) >= 20
    finally:
        guest.fs._recalls = recalls


def test_names_that_do_not_exist_are_asked_for(guest: GrantingGuest, place: str) -> None:
    directory = guest.path / place
    guest.warm(lambda: os.stat(directory))
    assert guest.asks(lambda: [os.path.exists(directory / "absent") for _ in range(5)]) == 5


def test_the_second_walk_asks_only_for_the_listings(host: Host, guest: GrantingGuest, place: str) -> None:
    for number in range(5):
        (host.export / place / f"d{number}").mkdir()
        for name in range(20):
            (host.export / place / f"d{number}" / str(name)).write_text("")

    def walk(directory: Path) -> int:
        entries = list(os.scandir(directory))
        for entry in entries:
            os.lstat(entry.path)
        return 1 + sum(walk(Path(entry.path)) for entry in entries if entry.is_dir(follow_symlinks=False))

    def grants_are_confirmed() -> bool:
        statistics = guest.grants.statistics()
        return statistics.keys == statistics.confirmed

    directories = walk(guest.path / place)
    until(grants_are_confirmed)
    walk(guest.path / place)  # for replies that were faster than their Confirm
    trips = host.host_trips()
    # OPENDIR, READDIR twice, RELEASEDIR, and GETATTR, since the kernel thinks that reading changes the access time.
    assert guest.asks(lambda: walk(guest.path / place)) <= 6 * directories
    assert host.host_trips() == trips


def test_what_statx_tells_is_granted_too(guest: GrantingGuest, place: str) -> None:
    """Newer kernels ask with STATX when somebody wants the time of birth."""
    fd = os.open(guest.path / place / "file", os.O_PATH)
    try:
        guest.warm(lambda: syscalls.statx(fd, _STATX_BASIC_STATS | _STATX_BTIME, 0))
    finally:
        os.close(fd)


# --- what is changed elsewhere ------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def _write(place: Path) -> None:
    with open(place / "file", "r+b", buffering=0) as opened:
        opened.write(b"other contents")


def _replace(place: Path) -> None:
    (place / "new").write_text("new file")
    os.rename(place / "new", place / "file")


def _exchange(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY)
    try:
        syscalls.renameat2(fd, b"file", fd, b"directory", _RENAME_EXCHANGE)
    finally:
        os.close(fd)


def _create(place: Path) -> None:
    (place / "made").write_text("made")


def _remove_directory(place: Path) -> None:
    os.unlink(place / "directory" / "below")
    os.rmdir(place / "directory")


# What is done, and the names to look at. "second" is another name of "file".
CHANGES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "chmod": (lambda place: os.chmod(place / "file", 0o600), ("file",)),
    "utime": (lambda place: os.utime(place / "file", (1, 1)), ("file",)),
    "truncate": (lambda place: os.truncate(place / "file", 1), ("file",)),
    "write": (_write, ("file",)),
    "link": (lambda place: os.link(place / "file", place / "third"), ("file", "second", "third")),
    "create": (_create, ("made", ".")),
    "unlink": (lambda place: os.unlink(place / "file"), ("file", "second", ".")),
    "unlink-second-name": (lambda place: os.unlink(place / "second"), ("file", "second")),
    "replace": (_replace, ("file", "second")),
    "rename": (lambda place: os.rename(place / "file", place / "renamed"), ("file", "renamed", ".")),
    "rename-directory": (
        lambda place: os.rename(place / "directory", place / "renamed"),
        ("directory/below", "directory", "renamed/below", "."),
    ),
    "exchange": (_exchange, ("file", "directory", "directory/below", "file/below")),
    "rmdir": (_remove_directory, ("directory", "directory/below", ".")),
}


@pytest.mark.parametrize("by", ["host", "other guest", "own guest"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_once(
    host: Host, guest: GrantingGuest, other: Path, place: str, change: str, by: str
) -> None:
    make, names = CHANGES[change]
    os.link(host.export / place / "file", host.export / place / "second")
    here = guest.path / place
    warm = [here / name for name in (".", "file", "second", "directory", "directory/below")]
    guest.warm(*(partial(os.lstat, path) for path in warm))
    make({"host": host.export, "other guest": other, "own guest": guest.path}[by] / place)
    # Twice: what the first look has brought into the kernel must be right, too.
    for _ in range(2):
        assert {name: state(here / name) for name in names} == {name: state(host.share / place / name) for name in names}
    guest.grants.check()


@pytest.mark.parametrize("look", ["attributes", "name"])
def test_a_change_waits_until_the_kernel_has_forgotten(
    host: Host, guest: GrantingGuest, place: str, look: str
) -> None:
    file = guest.path / place / "file"
    guest.warm(lambda: os.stat(file))
    before = state(file)
    with guest.shut() as gate:
        change = InBackground(os.chmod if look == "attributes" else _unlink, host.export / place / "file", 0o600)
        gate.await_reached()
        assert not change.is_over
        assert state(host.share / place / "file") == before
        # The attributes' key is not good for grants any more; what the kernel still has is still true.
        assert state(file) == before
    change.wait()
    assert state(file) == state(host.share / place / "file") != before


def _unlink(path: Path, _mode: int) -> None:
    os.unlink(path)


def test_ack_first_is_stale(host: Host, place: str) -> None:
    """Negative control: the same with an agent that says it has forgotten before it has."""
    with GrantingGuest(host, "ack-first", danger="ack-first") as guest:
        file = guest.path / place / "file"
        guest.warm(lambda: os.stat(file))
        with guest.shut() as gate:
            os.chmod(host.export / place / "file", 0o600)
            gate.await_reached()
            assert state(file) != state(host.share / place / "file")
        until(lambda: state(file) == state(host.share / place / "file"))


def test_prompt_does_not_keep_a_change_waiting(host: Host, place: str) -> None:
    with GrantingGuest(host, "prompt", "prompt") as guest:
        file = guest.path / place / "file"
        guest.warm(lambda: os.stat(file))
        assert guest.asks(lambda: os.stat(file)) == 0
        with guest.shut() as gate:
            os.chmod(host.export / place / "file", 0o600)
            gate.await_reached()
            assert state(file) != state(host.share / place / "file"), "prompt is stale until the recall is carried out"
        until(lambda: state(file) == state(host.share / place / "file"))


# --- names --------------------------------------------------------------------------------------------------------


def test_a_granted_name_that_the_guest_renames_is_not_kept_as_the_new_name(
    host: Host, guest: GrantingGuest, place: str
) -> None:
    here = guest.path / place
    guest.warm(lambda: os.stat(here / "file"))
    os.rename(here / "file", here / "renamed")
    assert state(here / "file") == ()
    os.unlink(host.export / place / "renamed")
    assert state(here / "renamed") == ()


def test_without_dropping_it_first_it_would_be(host: Host, place: str) -> None:
    """Negative control: the kernel moves what it has of the old name, for which nobody looks under the new one."""
    with GrantingGuest(host, "no-self-recall", danger="no-self-recall") as guest:
        here = guest.path / place
        guest.warm(lambda: os.stat(here / "file"))
        guest.recalls._helpers.drop = lambda names, deadline_s: True  # type: ignore[method-assign]
        os.rename(here / "file", here / "renamed")
        os.unlink(host.export / place / "renamed")
        assert state(here / "renamed") != ()


def test_a_name_is_dropped_while_a_change_in_its_directory_waits(host: Host, guest: GrantingGuest, place: str) -> None:
    """The kernel holds the directory's lock until its CREATE is answered; the recall does not need it."""
    here = guest.path / place
    guest.warm(lambda: os.stat(here / "file"))
    with HeldOperation(guest, Opcode.CREATE) as held:
        making = InBackground((here / "made").write_text, "made")
        held.await_reached()
        os.unlink(host.export / place / "file")
        assert not making.is_over
    making.wait()
    assert state(here / "file") == ()


@pytest.mark.expected_logs("lost the daemon of 'test'")
def test_inval_entry_waits_for_it(socket_dir: Path) -> None:
    """Negative control: the same with the notification that takes the lock. Only the end of the lease lets both go on."""
    with Host(socket_dir, "--lease", "1") as host, GrantingGuest(host, danger="inval-entry") as guest:
        place = "place"
        (host.export / place).mkdir()
        (host.export / place / "file").write_text("file")
        here = guest.path / place
        guest.warm(lambda: os.stat(here / "file"))
        with HeldOperation(guest, Opcode.CREATE) as held:
            making = InBackground((here / "made").write_text, "made")
            held.await_reached()
            unlinking = InBackground(os.unlink, host.export / place / "file")
            until(lambda: guest.kernel.entries)
        # Now the CREATE waits for the ack of the recall, which waits for the lock that the CREATE holds.
        making.wait()
        unlinking.wait()
        assert guest.client.statistics().losses == 1, "evicted"


def test_two_nodes_of_one_directory_are_both_recalled(host: Host, guest: GrantingGuest, place: str) -> None:
    """A directory that somebody else has moved gets a new node, and who works in it keeps the old one."""
    here = guest.path / place
    fd = os.open(here / "directory", os.O_RDONLY)
    try:
        (host.export / place / "elsewhere").mkdir()
        os.rename(host.export / place / "directory", host.export / place / "elsewhere" / "directory")
        moved = here / "elsewhere" / "directory"
        guest.warm(lambda: os.stat(moved), lambda: os.fstat(fd), lambda: os.stat("below", dir_fd=fd))
        os.chmod(host.export / place / "elsewhere" / "directory", 0o700)
        assert os.stat(moved).st_mode & 0o777 == os.fstat(fd).st_mode & 0o777 == 0o700
        guest.warm(lambda: os.stat(moved / "below"), lambda: os.stat("below", dir_fd=fd))
        os.unlink(host.export / place / "elsewhere" / "directory" / "below")
        assert state(moved / "below") == ()
        with pytest.raises(FileNotFoundError):
            os.stat("below", dir_fd=fd)
    finally:
        os.close(fd)


def test_a_forgotten_node_is_struck_out_of_the_books(host: Host, guest: GrantingGuest, place: str) -> None:
    file = guest.path / place / "file"
    guest.warm(lambda: os.stat(file))
    slot = guest.fs.cache.reader.slot_of(os.stat(file).st_ino)  # type: ignore[arg-type]
    parent = next(node.id for node in guest.fs.nodes._nodes.values() if node.name == place.encode())
    assert guest.grants.slot_of_name(parent, b"file") == slot
    os.unlink(file)  # nobody has it open: the kernel gives all look-ups back
    until(lambda: guest.grants.slot_of_name(parent, b"file") is None)
    guest.grants.check()


# --- what else the kernel keeps -----------------------------------------------------------------------------------


def _acl(permissions: int) -> bytes:
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, permissions, 1000), (4, 4, nobody), (16, 7, nobody), (32, 4, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_acls_that_the_kernel_keeps_are_recalled(host: Host, guest: GrantingGuest, place: str) -> None:
    file, there = guest.path / place / "file", host.export / place / "file"
    os.setxattr(there, _ACL, _acl(7))
    guest.warm(lambda: os.stat(file))
    for permissions in (1, 2, 3, 4):
        os.setxattr(there, _ACL, _acl(permissions))
        # Of an object whose attributes are not granted any more, and by a name that still is: nothing else is asked for.
        assert os.getxattr(file, _ACL) == _acl(permissions)
    guest.warm(lambda: os.stat(file), lambda: os.getxattr(file, _ACL))
    os.setxattr(there, _ACL, _acl(5))
    assert os.getxattr(file, _ACL) == _acl(5)


# --- pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["before the change returns", "while it asks"])
def test_a_read_that_asks_for_the_size_gets_it(guest: GrantingGuest, host: Host, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    """Nothing of a recall meets the question that the kernel asks after the change.

    Negative control: told meanwhile to forget something of the inode, the kernel throws the answer away, and the file seems to
    end where it did.
    """
    monkeypatch.setattr(pages, "PATIENCE_S", 20)
    (host.export / told).write_text("file")
    read: list[bytes] = []
    with open(guest.path / told, "rb", buffering=0) as file:
        node = guest.fs.nodes.known(HostInode(os.fstat(file.fileno()).st_ino))
        assert node is not None
        guest.warm(lambda: os.pread(file.fileno(), 99, 0))
        with HeldOperation(guest, Opcode.GETATTR) as gate:
            before = guest.kernel.page_drops
            with open(host.export / told, "a") as there:
                there.write(" and more")
            assert guest.kernel.page_drops == before + 1
            reader = InBackground(lambda: read.append(os.pread(file.fileno(), 99, 0)))
            gate.await_reached()
            if told == "while it asks":
                guest.session.invalidate_inode(node.id, 0, 0)
        reader.wait()
        assert read == [b"file" if told == "while it asks" else b"file and more"]
        assert os.pread(file.fileno(), 99, 0) == b"file and more"
    assert guest.kernel.page_drops == before + 1


def test_what_is_not_open_has_no_pages_to_drop(guest: GrantingGuest, host: Host) -> None:
    (host.export / "closed").write_text("file")
    assert (guest.path / "closed").read_text() == "file"
    guest.warm(lambda: os.stat(guest.path / "closed"))
    until(lambda: not guest.fs._open_counts)  # the kernel tells some time after it was closed
    before = guest.kernel.page_drops
    (host.export / "closed").write_text("other")
    assert (guest.path / "closed").read_text() == "other"
    assert guest.kernel.page_drops == before
