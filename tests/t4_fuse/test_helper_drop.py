"""Names dropped by helpers: the kernel forgets them for everybody, whatever waits in their directory, and disturbs nobody."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.fuse.syscalls import file_handle
from coherency.guest_agent.keeper import MAX_HELPERS, file_handle_of
from tests.dropping import Call, Dropping, dropping
from tests.passthrough import eventually
from tests.scenarios.comparing import UserProcess, as_user

ROOT = 1
NOBODY = 65534
SIZE = 4  # helpers that are kept


@pytest.fixture(scope="module")
def mount(make_socket_dir: Callable[[], Path]) -> Iterator[Dropping]:
    with dropping(make_socket_dir()) as served:
        yield served
        eventually(lambda: served.pool()["left"] == 0)


@pytest.fixture
def place(mount: Dropping, request: pytest.FixtureRequest) -> Iterator[str]:
    """This test's own directory, with a file ``f`` that the kernel has cached."""
    name = "".join(each if each.isalnum() else "-" for each in request.node.name)
    (mount.directory / name).mkdir(mode=0o777)
    (mount.directory / name).chmod(0o777)
    (mount.directory / name / "f").write_text("content")
    mount.warm(f"{name}/f")
    mount.ask("seen")
    yield name
    mount.ask("grant", True, True)
    mount.ask("release_all")


def looked_up(mount: Dropping) -> list[str]:
    """Names that somebody else than helpers has looked up since the last time."""
    return [name for opcode, _, name, is_helper in mount.ask("seen") if opcode == "LOOKUP" and not is_helper]


# --- forgotten by everybody ---


def test_a_dropped_name_is_looked_up_again(mount: Dropping, place: str) -> None:
    path = f"{place}/f"
    os.stat(mount.mountpoint / path)
    assert looked_up(mount) == []  # negative control
    assert mount.drop(path)
    assert not mount.is_cached(path)
    assert as_user(mount.mountpoint / place, lambda: os.stat("f").st_size, uid=NOBODY, gid=NOBODY) == 7
    # The directory was looked up, too: whoever opens a node by its handle takes from its name the time that was granted.
    assert looked_up(mount) == [place, "f"]


def test_a_name_in_the_root(mount: Dropping) -> None:
    (mount.directory / "in the root").touch()
    mount.warm("in the root")
    assert mount.drop("in the root")
    assert not mount.is_cached("in the root")


def test_without_the_lie_the_name_stays(make_socket_dir: Callable[[], Path]) -> None:
    """Negative control."""
    with dropping(make_socket_dir(), lies=False) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        assert not mount.drop("f")
        assert mount.is_cached("f")


def test_what_replaces_a_dropped_name_is_seen(mount: Dropping, place: str) -> None:
    theirs = mount.directory / place
    (theirs / "other").write_text("another")
    os.rename(theirs / "other", theirs / "f")
    assert (mount.mountpoint / place / "f").read_text() == "content"  # negative control
    assert mount.drop(f"{place}/f")
    assert (mount.mountpoint / place / "f").read_text() == "another"


# --- nobody is disturbed ---


def test_what_is_open_stays_open(mount: Dropping, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a directory, a working directory: of names that are dropped, and found again as what they were."""
    inside = f"{place}/d"
    (mount.directory / inside).mkdir()
    (mount.directory / inside / "g").write_text("inside")
    mount.warm(f"{inside}/g")
    inode = os.stat(mount.mountpoint / inside).st_ino
    directory = os.open(mount.mountpoint / inside, os.O_RDONLY | os.O_DIRECTORY)
    with open(mount.mountpoint / place / "f") as file, monkeypatch.context() as context:
        context.chdir(mount.mountpoint / inside)
        assert mount.drop(inside, f"{place}/f")
        assert not mount.is_cached(inside)
        assert not mount.is_cached(f"{place}/f")
        assert file.read() == "content"
        assert os.fstat(file.fileno()).st_ino == os.stat(mount.mountpoint / place / "f").st_ino
        assert os.listdir(directory) == ["g"]
        assert Path("g").read_text() == "inside"
        assert os.stat(".").st_ino == os.stat(mount.mountpoint / inside).st_ino == inode
        assert os.getcwd() == str(mount.mountpoint / inside)
    os.close(directory)


def test_getcwd_of_a_dropped_directory_fails_until_it_is_looked_up(
    mount: Dropping, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs."""
    (mount.directory / place / "d").mkdir()
    mount.warm(f"{place}/d")
    monkeypatch.chdir(mount.mountpoint / place / "d")
    assert mount.drop(f"{place}/d")
    with pytest.raises(FileNotFoundError):
        os.getcwd()
    os.stat(mount.mountpoint / place / "d")
    assert os.getcwd() == str(mount.mountpoint / place / "d")


def test_a_hard_link_keeps_its_other_name(mount: Dropping, place: str) -> None:
    os.link(mount.directory / place / "f", mount.directory / place / "g")
    mount.warm(f"{place}/f", f"{place}/g")
    assert mount.drop(f"{place}/f")
    assert not mount.is_cached(f"{place}/f")
    assert mount.is_cached(f"{place}/g")


@pytest.mark.parametrize("user", [0, NOBODY])
def test_callers_see_no_difference(mount: Dropping, place: str, user: int) -> None:
    """Somebody walks the name all the time while it is dropped: it is there, and it is his own."""
    private = f"{place}/private"
    (mount.directory / private).mkdir(mode=0o700)
    (mount.directory / private / "f").write_text("mine")
    os.chown(mount.directory / private, user, user)
    mount.warm(f"{private}/f")
    again = os.open(mount.mountpoint / private, os.O_PATH)
    reading, writing = os.pipe()

    def walk() -> int:
        walks = 0
        os.set_blocking(reading, False)
        while True:
            assert os.stat("f").st_size == 4
            walks += 1
            try:
                os.read(reading, 1)
            except BlockingIOError:
                continue
            return walks

    walker = UserProcess(mount.mountpoint / private, walk, uid=user, gid=user)
    for _ in range(50):
        os.stat("f", dir_fd=again)
        assert mount.drop(f"{private}/f")
    os.write(writing, b"x")
    assert walker.result() > 0
    for descriptor in (again, reading, writing):
        os.close(descriptor)


def test_umount_finds_nobody_in_the_mount(make_socket_dir: Callable[[], Path]) -> None:
    with dropping(make_socket_dir()) as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        assert mount.drop("f")
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.ask("is_over", 20)


# --- while something waits in the directory ---


def hold(mount: Dropping, place: str, opcode: str, other: str = "other") -> tuple[Call, Callable[[], None]]:
    """A call whose request is held, about ``f`` if it takes a name away; and what lets it go on."""
    at = mount.mountpoint / place
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "CREATE": (other, lambda: os.close(os.open(at / other, os.O_CREAT | os.O_WRONLY))),
        "MKDIR": (other, lambda: os.mkdir(at / other)),
        "SYMLINK": (other, lambda: os.symlink("target", at / other)),
        "LINK": (other, lambda: os.link(at / "f", at / other)),
        "UNLINK": ("f", lambda: os.unlink(at / "f")),
        "RENAME": ("f", lambda: os.rename(at / "f", at / other)),
        "SETATTR": ("", lambda: os.chmod(at, 0o755)),
    }
    name, call = calls[opcode]
    mount.ask("hold", opcode, place, name)
    caller = Call(call)
    assert mount.ask("is_held", opcode, place, name)
    return caller, lambda: mount.ask("release", opcode, place, name)


CHANGES = ["CREATE", "MKDIR", "SYMLINK", "LINK", "UNLINK", "RENAME", "SETATTR"]


@pytest.mark.parametrize("opcode", CHANGES)
def test_dropped_while_a_change_waits(mount: Dropping, place: str, opcode: str) -> None:
    caller, release = hold(mount, place, opcode)
    assert mount.drop(f"{place}/f")
    assert not mount.is_cached(f"{place}/f")
    assert not caller.is_over
    release()
    assert caller.result() is None
    gone = opcode in ("UNLINK", "RENAME")
    assert sorted(os.listdir(mount.mountpoint / place)) == sorted(os.listdir(mount.directory / place))
    assert (mount.mountpoint / place / "f").exists() == (not gone)
    eventually(lambda: mount.pool()["left"] == 0)


def test_dropped_while_a_create_waits_ten_times(mount: Dropping, place: str) -> None:
    for number in range(10):
        mount.warm(f"{place}/f")
        caller, release = hold(mount, place, "CREATE", f"new-{number}")
        assert mount.drop(f"{place}/f")
        assert not mount.is_cached(f"{place}/f")
        release()
        assert caller.result() is None
        eventually(lambda: mount.pool()["left"] == 0)  # it looks once more, and would be lied to


def test_what_is_not_cached_counts_as_dropped_while_a_change_waits(mount: Dropping, place: str) -> None:
    assert mount.drop(f"{place}/f")
    caller, release = hold(mount, place, "CREATE")
    assert mount.drop(f"{place}/f")
    assert not mount.is_cached(f"{place}/f")
    release()
    assert caller.result() is None


def test_notifications_wait_for_the_change(mount: Dropping, place: str) -> None:
    """Negative control: this is what helpers are for."""
    directory = mount.ask("node_of", place)
    caller, release = hold(mount, place, "CREATE")
    mount.ask("begin_invalidate_entry", directory, "f")
    eventually(lambda: mount.ask("notifier_sleeps_in") == "fuse_reverse_inval_entry")
    assert mount.is_cached(f"{place}/f")
    release()
    assert caller.result() is None
    eventually(lambda: not mount.is_cached(f"{place}/f"))


def test_more_directories_than_helpers(mount: Dropping, place: str) -> None:
    """Each keeps a helper waiting; there are always some left for others."""
    directories = [f"{place}/{number}" for number in range(SIZE + 3)]
    for directory in directories:
        (mount.directory / directory).mkdir()
        (mount.directory / directory / "f").touch()
        mount.warm(f"{directory}/f")
    held = [hold(mount, directory, "CREATE") for directory in directories]
    assert mount.drop(*(f"{directory}/f" for directory in directories))
    assert not any(mount.is_cached(f"{directory}/f") for directory in directories)
    assert mount.pool()["left"] == len(directories)
    assert mount.drop(f"{place}/f")
    for caller, release in held:
        release()
        assert caller.result() is None
    eventually(lambda: mount.pool()["left"] == 0)
    eventually(lambda: mount.pool()["helpers"] == SIZE)


def test_who_is_born_when_those_who_were_left_are_back_ends(mount: Dropping) -> None:
    eventually(lambda: mount.pool() == mount.pool() | {"helpers": SIZE, "left": 0})
    before = mount.ask("helpers")
    mount.ask("order_helper")
    eventually(lambda: mount.ask("ordered_helpers") == 0)
    eventually(lambda: mount.ask("helpers") == before)


def test_there_is_a_bound_to_helpers(make_socket_dir: Callable[[], Path]) -> None:
    """With all of them waiting nothing is dropped, and that is told in time; one that comes back is enough."""
    with dropping(make_socket_dir()) as mount:
        held = []
        for number in range(MAX_HELPERS):
            (mount.directory / str(number)).mkdir()
            (mount.directory / str(number) / "f").touch()
            mount.warm(f"{number}/f")
        (mount.directory / "f").touch()
        mount.warm("f")
        held = [hold(mount, str(number), "CREATE") for number in range(MAX_HELPERS)]
        assert mount.drop(*(f"{number}/f" for number in range(MAX_HELPERS)))
        assert mount.pool()["left"] == MAX_HELPERS
        assert not mount.ask("drop_within", 0.05, "f")
        assert mount.is_cached("f")
        waiting = mount.begin_drop("f")
        assert waiting(0) is None
        for caller, release in held:
            release()
            assert caller.result() is None
        assert waiting(20)


# --- races with look-ups whose reply is on its way ---


def test_a_renewal_that_comes_late_renews_nothing(mount: Dropping, place: str) -> None:
    mount.ask("grant", False, True)
    assert mount.drop(f"{place}/f")
    os.stat(mount.mountpoint / place / "f")  # cached, but not granted: looked up each time
    mount.ask("grant", True, True)
    mount.ask("hold", "LOOKUP", place, "f")
    caller = Call(lambda: os.stat(mount.mountpoint / place / "f").st_size)
    assert mount.ask("is_held", "LOOKUP", place, "f")
    mount.ask("grant", False, True)
    assert mount.drop(f"{place}/f")
    mount.ask("release", "LOOKUP", place, "f")
    assert caller.result() == 7
    assert not mount.is_cached(f"{place}/f")
    mount.ask("grant", True, True)


def test_a_late_renewal_renews_what_was_only_expired(mount: Dropping, place: str) -> None:
    """Negative control: why names are dropped, and not merely expired, which would be gentler."""
    mount.ask("grant", False, True)
    assert mount.drop(f"{place}/f")
    os.stat(mount.mountpoint / place / "f")
    mount.ask("grant", True, True)
    mount.ask("hold", "LOOKUP", place, "f")
    caller = Call(lambda: os.stat(mount.mountpoint / place / "f").st_size)
    assert mount.ask("is_held", "LOOKUP", place, "f")
    mount.ask("release", "LOOKUP", place, "f")
    assert caller.result() == 7
    assert mount.is_cached(f"{place}/f")


def first_lookup(mount: Dropping, place: str) -> Call:
    """Somebody's first look-up of ``f``, whose granting reply is held."""
    assert mount.drop(f"{place}/f")
    mount.ask("hold", "LOOKUP", place, "f")
    caller = Call(lambda: os.stat(mount.mountpoint / place / "f").st_size)
    assert mount.ask("is_held", "LOOKUP", place, "f")
    return caller


def test_a_first_lookup_is_waited_for(mount: Dropping, place: str) -> None:
    caller = first_lookup(mount, place)
    outcome = mount.begin_drop(f"{place}/f")
    eventually(lambda: mount.ask("helpers_sleep_in") == ["d_alloc_parallel"])
    assert outcome(0.05) is None
    mount.ask("release", "LOOKUP", place, "f")
    assert outcome(20)
    assert caller.result() == 7
    assert not mount.is_cached(f"{place}/f")


def test_a_drop_that_takes_too_long_says_so(mount: Dropping, place: str) -> None:
    caller = first_lookup(mount, place)
    began = time.monotonic()
    assert not mount.ask("drop_within", 0.1, f"{place}/f")
    assert 0.1 <= time.monotonic() - began < 5
    mount.ask("release", "LOOKUP", place, "f")
    assert caller.result() == 7
    eventually(lambda: mount.pool()["left"] == 0)
    assert not mount.is_cached(f"{place}/f")  # it has happened yet


def queue_behind_a_lookup(mount: Dropping, place: str) -> tuple[Call, Call, Callable[[float], bool | None]]:
    """A first look-up that shares the directory's lock; a create that waits for it; a drop whose helper waits behind the create."""
    looking = first_lookup(mount, place)
    mount.ask("hold", "CREATE", place, "new")
    creating = Call(lambda: os.close(os.open(mount.mountpoint / place / "new", os.O_CREAT | os.O_WRONLY)))
    eventually(lambda: creating.sleeps_in() in ("path_openat", "open_last_lookups", "rwsem_down_write_slowpath"))
    outcome = mount.begin_drop(f"{place}/f")
    eventually(lambda: mount.ask("helpers_sleep_in") == ["walk_component"])
    return looking, creating, outcome


def test_waiting_for_the_lock_is_no_proof_while_others_share_it(mount: Dropping, place: str) -> None:
    looking, creating, outcome = queue_behind_a_lookup(mount, place)
    assert outcome(0.05) is None
    mount.ask("release", "LOOKUP", place, "f")
    assert looking.result() == 7  # and is cached and granted; the helper has missed it, and waits behind the create
    assert mount.ask("is_held", "CREATE", place, "new")
    assert outcome(10)  # by another helper, while the create waits
    assert not mount.is_cached(f"{place}/f")
    mount.ask("release", "CREATE", place, "new")
    assert creating.result() is None
    eventually(lambda: mount.pool()["left"] == 0)


def test_who_takes_it_for_a_proof_is_wrong(make_socket_dir: Callable[[], Path]) -> None:
    """Negative control."""
    with dropping(make_socket_dir(), proves_locks=False) as mount:
        (mount.directory / "d").mkdir()
        (mount.directory / "d" / "f").write_text("content")
        mount.warm("d/f")
        place = "d"
        looking, creating, outcome = queue_behind_a_lookup(mount, place)
        assert outcome(20)
        mount.ask("release", "LOOKUP", place, "f")
        assert looking.result() == 7
        assert mount.ask("is_held", "CREATE", place, "new")
        assert mount.is_cached("d/f")
        mount.ask("release", "CREATE", place, "new")
        assert creating.result() is None


# --- what follows a rename ---


@pytest.mark.parametrize("dropped", [False, True])
def test_a_renamed_name_takes_its_grant_along(mount: Dropping, place: str, dropped: bool) -> None:
    """The kernel moves what it has under the old name to the new one, time and all, also if it was dropped meanwhile.

    So a reply to RENAME grants the new name what was granted to the old one. It can be dropped, of course.
    """
    mount.ask("grant", False, True)
    caller, release = hold(mount, place, "RENAME")
    assert not dropped or mount.drop(f"{place}/f")
    release()
    assert caller.result() is None
    assert mount.is_cached(f"{place}/other")
    assert mount.drop(f"{place}/other")
    assert not mount.is_cached(f"{place}/other")


# --- which names, and where ---


def test_many_names_at_once(mount: Dropping, place: str) -> None:
    names = [f"{place}/{number}" for number in range(40)]
    for name in names:
        (mount.directory / name).touch()
    mount.warm(*names)
    assert mount.drop(*names)
    assert not any(mount.is_cached(name) for name in names)


def test_drops_at_the_same_time(mount: Dropping, place: str) -> None:
    names = [f"{place}/{number}" for number in range(24)]
    for name in names:
        (mount.directory / name).touch()
    mount.warm(*names)
    outcomes = [mount.begin_drop(*names[first : first + 4], names[0]) for first in range(0, 24, 4)]
    assert all(outcome(20) for outcome in outcomes)
    assert not any(mount.is_cached(name) for name in names)


@pytest.mark.parametrize("name", [b"\xff\xfe not UTF-8", b"x" * 255, b"line\nfeed", b" ", "ü€😀".encode()])
def test_names_are_bytes(mount: Dropping, place: str, name: bytes) -> None:
    path = os.fsencode(place) + b"/" + name
    with open(os.fsencode(mount.directory) + b"/" + path, "wb"):
        pass
    mount.warm(path)
    assert mount.drop(path)
    assert not mount.is_cached(path)


def test_deep_down(mount: Dropping, place: str) -> None:
    path = Path(place, *["a directory"] * 100)
    (mount.directory / path).mkdir(parents=True)
    (mount.directory / path / "f").touch()
    mount.warm(str(path / "f"))
    assert mount.drop(str(path / "f"))
    assert not mount.is_cached(str(path / "f"))


@pytest.mark.parametrize("kind", ["directory", "symlink", "dangling symlink", "fifo"])
def test_whatever_it_is(mount: Dropping, place: str, kind: str) -> None:
    theirs = mount.directory / place / "it"
    if kind == "directory":
        theirs.mkdir(mode=0)
    elif kind == "fifo":
        os.mkfifo(theirs)
    else:
        theirs.symlink_to("f" if kind == "symlink" else "nowhere")
    mount.warm(f"{place}/it")
    assert mount.drop(f"{place}/it")
    assert not mount.is_cached(f"{place}/it")


def test_a_directory_that_has_moved(mount: Dropping, place: str) -> None:
    """By this guest, and behind its back: it is reached by its node, not by the name that it had."""
    for name in ("here", "there"):
        (mount.directory / place / name).mkdir()
    (mount.directory / place / "here" / "f").touch()
    mount.warm(f"{place}/here/f")
    node = mount.ask("node_of", f"{place}/here")
    held = os.open(mount.mountpoint / place / "here", os.O_PATH)
    os.rename(mount.mountpoint / place / "here", mount.mountpoint / place / "there" / "moved")
    assert mount.is_cached(f"{place}/there/moved/f")
    assert mount.ask("drop_names", [[node, "f", 0]], 10)
    assert not mount.is_cached(f"{place}/there/moved/f")
    mount.warm(f"{place}/there/moved/f")
    os.rename(mount.directory / place / "there" / "moved", mount.directory / "moved again")
    assert mount.ask("drop_names", [[node, "f", 0]], 10)
    assert looked_up(mount).count("f") == 2
    os.stat("f", dir_fd=held)
    assert looked_up(mount) == ["f"]
    os.close(held)


def test_what_the_kernel_does_not_have_is_not_cached(mount: Dropping, place: str) -> None:
    node = mount.ask("node_of", place)
    assert mount.ask("drop_names", [[123456789, "f", 0]], 10)
    assert mount.ask("drop_names", [[1 << 40, "f", 0]], 10)
    assert mount.ask("drop_names", [[node, "no such name", 0]], 10)
    (mount.directory / place / "gone").mkdir()
    mount.warm(f"{place}/gone")
    gone = mount.ask("node_of", f"{place}/gone")
    os.rmdir(mount.mountpoint / place / "gone")
    assert mount.ask("drop_names", [[gone, "f", 0]], 10)


def test_a_node_that_is_no_directory(mount: Dropping, place: str) -> None:
    """A bug of ours: no name can be dropped there, which is told."""
    assert not mount.ask("drop_names", [[mount.ask("node_of", f"{place}/f"), "f", 0]], 10)


@pytest.mark.alone
def test_under_memory_pressure(mount: Dropping, place: str) -> None:
    held = os.open(mount.mountpoint / place, os.O_PATH)
    for _ in range(5):
        mount.warm(f"{place}/f")
        outcome = mount.begin_drop(f"{place}/f")
        Path("/proc/sys/vm/drop_caches").write_text("2")
        assert outcome(20)
        assert not mount.is_cached(f"{place}/f")
        assert mount.ask("drop_names", [[mount.ask("node_of", place), "f", 0]], 10)
    os.close(held)


def test_a_node_is_found_by_the_handle_that_we_make(mount: Dropping, place: str) -> None:
    held = os.open(mount.mountpoint / place, os.O_PATH)
    assert file_handle(held) == file_handle_of(mount.ask("node_of", place))
    os.close(held)


# --- other mounts ---


def run(*command: Any) -> None:
    subprocess.run(command, check=True)


def test_a_covered_mount_cannot_be_reached(make_socket_dir: Callable[[], Path]) -> None:
    directory = make_socket_dir()
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    with dropping(directory) as mount:
        (mount.directory / "d").mkdir()
        (mount.directory / "d" / "f").touch()
        mount.warm("d/f")
        node = mount.ask("node_of", "d")
        held = os.open(mount.mountpoint / "d", os.O_PATH)
        run("mount", "-t", "tmpfs", "none", mount.mountpoint)
        assert not mount.ask("drop_names", [[node, "f", 0]], 10)
        run("umount", mount.mountpoint)
        assert mount.is_cached("d/f")

        run("mount", "--bind", mount.mountpoint / "d", elsewhere)
        run("mount", "-t", "tmpfs", "none", mount.mountpoint)
        assert mount.ask("drop_names", [[node, "f", 0]], 10)  # it can be seen elsewhere
        run("umount", mount.mountpoint)
        assert not mount.is_cached("d/f")
        run("umount", elsewhere)
        os.close(held)


def test_a_mount_whose_path_was_renamed_is_found(make_socket_dir: Callable[[], Path]) -> None:
    directory = make_socket_dir()
    (directory / "above").mkdir()
    with dropping(directory / "above") as mount:
        (mount.directory / "f").touch()
        mount.warm("f")
        mount.ask("seen")
        os.rename(directory / "above", directory / "renamed")
        assert mount.ask("drop_names", [[ROOT, "f", 0]], 10)
        os.rename(directory / "renamed", directory / "above")
        assert not mount.is_cached("f")


@pytest.mark.parametrize("below", ["", "/below"])
def test_what_is_mounted_on_a_dropped_name_is_unmounted(
    mount: Dropping, place: str, tmp_path: Path, below: str
) -> None:
    """On it, or below: as the kernel does it whenever a name goes away. What is there is reached nevertheless."""
    inside = f"{place}/d{below}"
    (mount.directory / inside).mkdir(parents=True)
    mount.warm(inside)
    (tmp_path / "mounted").touch()
    run("mount", "--bind", tmp_path, mount.mountpoint / inside)
    assert os.listdir(mount.mountpoint / inside) == ["mounted"]
    assert mount.drop(f"{place}/d")
    assert not mount.is_cached(f"{place}/d")
    assert os.listdir(mount.mountpoint / inside) == []
    assert str(mount.mountpoint / inside) not in Path("/proc/self/mounts").read_text()
