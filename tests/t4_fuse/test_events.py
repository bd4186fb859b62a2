"""Programs that watch files in a guest see what other guests and the host do: the same as if it had been done where they are."""

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from coherency.fuse import syscalls
from tests.guests import Host
from tests.waiting import until
from tests.watcher import Seen, Watcher, watching

MODES = ("access", "prompt", "strict")
ACTORS: dict[str, Callable[[Host], Path]] = {
    "guest": lambda host: host.directory / "actor",
    "host": lambda host: host.export,
    "behind the export": lambda host: host.share,
}
"""Where changes are made."""
_END = "the end"
_EXCHANGE = 2


class Change(NamedTuple):
    """Made in a directory like ``lay`` makes. ``noise``: what may be seen in the directory beside what a local watcher sees."""

    make: Callable[[Path], object]
    noise: tuple[str, str] | None = None


def lay(place: Path) -> None:
    (place / "into").mkdir()
    (place / "dir").mkdir()
    (place / "empty").mkdir()
    for name in ("file", "other", "linked", "into/taken"):
        (place / name).write_text(name)
    os.link(place / "linked", place / "into/linked")
    os.setxattr(place / "other", "user.colour", b"red")


WATCHED = (".", "into", "dir", "empty", "file", "other", "linked", "into/taken")
DIRECTORIES = (".", "into")


def _write(path: Path, flags: int, data: bytes = b"") -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        if data:
            os.write(fd, data)
    finally:
        os.close(fd)


def _exchange(place: Path) -> None:
    at = os.open(place, os.O_PATH)
    try:
        syscalls.renameat2(at, b"file", at, b"into/taken", _EXCHANGE)
    finally:
        os.close(at)


CHANGES: dict[str, Change] = {
    "create": Change(lambda place: _write(place / "new", os.O_CREAT | os.O_EXCL)),
    "mknod": Change(lambda place: os.mknod(place / "new")),
    "fifo": Change(lambda place: os.mkfifo(place / "new")),
    "mkdir": Change(lambda place: os.mkdir(place / "new")),
    "symlink": Change(lambda place: os.symlink("file", place / "new")),
    "link": Change(lambda place: os.link(place / "file", place / "into/new")),
    "unlink": Change(lambda place: os.unlink(place / "file")),
    "unlink-linked": Change(lambda place: os.unlink(place / "into/linked"), ("ATTRIB", "linked")),
    "rmdir": Change(lambda place: os.rmdir(place / "empty")),
    "rename": Change(lambda place: os.rename(place / "file", place / "new")),
    "rename-over": Change(lambda place: os.rename(place / "file", place / "other")),
    "rename-across": Change(lambda place: os.rename(place / "file", place / "into/new")),
    "rename-across-over": Change(lambda place: os.rename(place / "file", place / "into/taken")),
    "rename-over-linked": Change(lambda place: os.rename(place / "file", place / "into/linked"), ("ATTRIB", "linked")),
    "rename-directory": Change(lambda place: os.rename(place / "dir", place / "new")),
    "rename-directory-across": Change(lambda place: os.rename(place / "dir", place / "into/new")),
    "rename-directory-over": Change(lambda place: os.rename(place / "dir", place / "empty")),
    "rename-exchange": Change(_exchange),
    "write": Change(lambda place: _write(place / "file", 0, b"written")),
    "append": Change(lambda place: _write(place / "file", os.O_APPEND, b"more")),
    "truncate": Change(lambda place: os.truncate(place / "file", 2)),
    "open-truncating": Change(lambda place: _write(place / "file", os.O_TRUNC)),
    "chmod": Change(lambda place: os.chmod(place / "file", 0o600)),
    "chmod-directory": Change(lambda place: os.chmod(place / "into", 0o700)),
    "chown": Change(lambda place: os.chown(place / "file", 1000, 2000)),
    "utime": Change(lambda place: os.utime(place / "file", (1, 2))),
    "setxattr": Change(lambda place: os.setxattr(place / "file", "user.colour", b"blue")),
    "removexattr": Change(lambda place: os.removexattr(place / "other", "user.colour")),
}


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        host.mount("actor", "strict", "--events")
        for mode in MODES:
            host.mount(mode, mode, "--events")
        host.mount("deaf", "strict")
        yield host


@pytest.fixture
def place(host: Host, request: pytest.FixtureRequest) -> str:
    """The name of a new directory in the share, laid; its events are over."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    (host.export / name).mkdir()
    lay(host.export / name)
    settle(host, f"{name}.laid")
    return name


def settle(host: Host, name: str) -> None:
    """Whatever has happened before has been echoed by all guests."""
    guests = {host.directory / guest for guest in (*MODES, "actor")}
    with watching(*guests) as watcher:
        (host.export / name).mkdir()
        until(lambda: watcher.read(0.1) and guests <= {each.watched for each in watcher.seen if each.name == name})


def truth(place: Path) -> dict[str, object]:
    """All that there is to see in a place, but for access times."""
    found: dict[str, object] = {}
    for directory, directories, files in os.walk(place):
        for name in (".", *directories, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            found[os.path.relpath(path, place)] = (
                status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size,
                status.st_mtime_ns, status.st_ctime_ns,
                Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else sorted(os.listdir(path)) if name == "." else None,
            )  # fmt: skip
    return found


def warm(guest: Path, host: Host, place: str) -> None:
    """The guest has looked at everything, and may keep what it can."""
    for _ in range(3):
        for each in WATCHED:
            os.stat(guest / place / each)
        host.status()  # what the guest has asked for is confirmed by then


def by_watched(seen: list[Seen], place: Path) -> dict[str, list[tuple[str, str]]]:
    """What each watched path was told, in order."""
    told: dict[str, list[tuple[str, str]]] = {}
    for each in seen:
        if each.name != _END:
            told.setdefault(os.path.relpath(each.watched, place), []).append((each.what, each.name))
    return told


def watch(place: Path, watched: tuple[str, ...]) -> Watcher:
    return Watcher(*(place / each for each in watched))


def local_events(directory: Path, change: Change, watched: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """What is seen by who watches a directory of the machine's own."""
    directory.mkdir()
    lay(directory)
    watcher = watch(directory, watched)
    try:
        change.make(directory)
        (directory / _END).mkdir()
        watcher.await_event("CREATE|ISDIR", _END)
    finally:
        watcher.close()
    return by_watched(watcher.seen, directory)


@pytest.mark.parametrize(("kept", "actor"), [("warm", "guest"), ("cold", "host"), ("warm", "behind the export")])
@pytest.mark.parametrize("name", CHANGES)
def test_they_see_what_a_local_watcher_sees_and_find_it_so(
    host: Host, place: str, name: str, kept: str, actor: str, tmp_path: Path
) -> None:
    change, watched = CHANGES[name], WATCHED if kept == "warm" else DIRECTORIES
    expected = local_events(tmp_path / "local", change, watched)
    acting = ACTORS[actor](host) / place
    os.listdir(acting)
    guests = {mode: host.directory / mode for mode in MODES}
    watchers: dict[str, Watcher] = {}
    try:
        for mode, guest in guests.items():
            if kept == "warm":
                warm(guest, host, place)
            watchers[mode] = watch(guest / place, watched)
        change.make(acting)
        now = truth(host.share / place)
        for mode, guest in guests.items():
            if expected:
                until(lambda watcher=watchers[mode]: watcher.read(0.1))  # type: ignore[misc]
            assert truth(guest / place) == now, "what is told is not true yet"
        (acting / _END).mkdir()
        for watcher in watchers.values():
            watcher.await_event("CREATE|ISDIR", _END)
    finally:
        for watcher in watchers.values():
            watcher.close()
    for mode, guest in guests.items():
        seen = [each for each in watchers[mode].seen if (each.what, each.name) != change.noise]
        assert by_watched(seen, guest / place) == expected, mode
        assert truth(guest / place) == truth(host.share / place)
    cookies = {each.cookie for each in watchers["strict"].seen if "MOVED" in each.what}
    assert len(cookies) == (2 if name == "rename-exchange" else bool(cookies)), "both sides of a rename have one cookie"


def test_who_does_not_want_events_gets_none(host: Host, place: str) -> None:
    """Negative control: another guest, mounted without --events."""
    deaf = host.directory / "deaf" / place
    with watching(deaf, deaf / "into", deaf / "file") as watcher:
        for change in ("create", "link", "write", "chmod", "rename-over", "rmdir"):
            CHANGES[change].make(host.export / place)
        settle(host, f"{place}.over")
        assert watcher.read(0) == []


def test_who_makes_a_change_sees_it_once(host: Host, place: str) -> None:
    actor = host.directory / "actor" / place
    with watching(actor) as watcher:
        os.mknod(actor / "new")
        os.rename(actor / "new", actor / "renamed")
        (host.export / place / _END).mkdir()
        watcher.await_event("CREATE|ISDIR", _END)
    assert [(each.what, each.name) for each in watcher.seen[:-1]] == [
        ("CREATE", "new"), ("MOVED_FROM", "new"), ("MOVED_TO", "renamed"),
    ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_watched_directory_that_is_moved_is_still_watched(host: Host, place: str, mode: str) -> None:
    acting, guest = host.directory / "actor" / place, host.directory / mode / place
    os.stat(guest / "into")
    with watching(guest / "dir") as watcher:
        os.rename(acting / "dir", acting / "into/moved")
        watcher.await_event("MOVE_SELF")
        os.mknod(acting / "into/moved/new")
        watcher.await_event("CREATE", "new")
        os.rmdir(acting / "empty")
        os.rename(acting / "into/moved", acting / "empty")
        watcher.await_event("MOVE_SELF")
        os.unlink(acting / "empty/new")
        watcher.await_event("DELETE", "new")
    assert truth(guest) == truth(host.share / place)


def test_nothing_is_changed_by_it_and_nobody_told_again(host: Host, place: str) -> None:
    acting = host.directory / "actor" / place
    for mode in MODES:
        warm(host.directory / mode, host, place)
    before = host.status()
    for change in ("create", "write", "chmod", "rename-across", "unlink-linked"):
        CHANGES[change].make(acting)
    after, made = truth(host.share / place), host.status()
    settle(host, f"{place}.over")
    assert truth(host.share / place) == after
    over = host.status()
    assert (made["events"] - before["events"]) % len(MODES) == 0, "told to all but who made them"
    assert over["events"] - made["events"] == len(MODES) + 1, "what settle made, told to all"
    assert over["bumps"] - made["bumps"] == 2, "of the root and of what settle made"
    assert over["events_lost"] == 0


def test_tail_prints_what_another_guest_appends(host: Host, place: str) -> None:
    """A program of the system's that follows a file."""
    followed = host.directory / "access" / place / "file"
    with subprocess.Popen(["tail", "-n", "+1", "-f", followed], stdout=subprocess.PIPE) as tail:
        try:
            assert tail.stdout is not None
            printed = ""
            _write(host.directory / "actor" / place / "file", os.O_APPEND, b" and more\n")
            while "\n" not in printed:
                assert syscalls.wait_readable([tail.stdout.fileno()], 20_000_000_000), printed
                printed += os.fsdecode(os.read(tail.stdout.fileno(), 4096))
            assert printed == "file and more\n"
        finally:
            tail.kill()


def test_a_program_that_watches_prints_what_others_do(host: Host, place: str) -> None:
    watched = host.directory / "strict" / place
    command = ["inotifywait", "-m", "-q", "-e", "create,delete,move,modify,attrib", "--format", "%e %f", str(watched)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            until(lambda: "inotify wd:" in _inotify_marks(program.pid))
            for change in ("create", "write", "chmod", "rename-over", "rmdir"):
                CHANGES[change].make(host.directory / "actor" / place)
            printed = ""
            while "DELETE" not in printed:
                assert syscalls.wait_readable([program.stdout.fileno()], 20_000_000_000), printed
                printed += os.fsdecode(os.read(program.stdout.fileno(), 4096))
        finally:
            program.kill()
    assert printed.splitlines() == [
        "CREATE new", "MODIFY file", "ATTRIB file", "MOVED_FROM file", "MOVED_TO other", "DELETE,ISDIR empty",
    ]  # fmt: skip


def _inotify_marks(pid: int) -> str:
    """See proc_pid_fdinfo(5)."""
    return "".join(each.read_text() for each in Path(f"/proc/{pid}/fdinfo").iterdir())
