"""What the file system of the share refuses reaches the caller, ends the change, and leaves nobody with a wrong size or name.

The share is a FUSE mount that fails as it is told (`tests.failing_server`): every row of the bump matrix, every question.
What real file systems do when they are full is in `test_full_disks.py`.
"""

import contextlib
import errno
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from coherency.daemon.changes import Change
from coherency.daemon.service import Service, ServiceOptions
from coherency.guest_agent.client import fetch_status
from tests import failing_server
from tests.bump_matrix import document
from tests.bump_matrix.calls import CALLS, Place
from tests.bump_matrix.ground import FILE_BYTES, KernelView, differences, lay, look
from tests.guests import Host
from tests.passthrough import Served

ERRNO_AT = {"strict": errno.EIO, "access": errno.EDQUOT, "export": errno.EROFS}
"""Where a program works, and what it is refused with."""
GUESTS = ("strict", "access")
CHANGING = sorted({row.opcode.name for row in document.ROWS.values()})
FAILS_BY_ITSELF = "setattr-partial"  # with another error, which is what it is about


class FailingDisk(Served):
    server: ClassVar[ModuleType] = failing_server

    @contextlib.contextmanager
    def failing(self, number: int, *opcodes: str) -> Iterator[None]:
        self.ask("fail", opcodes, number)
        try:
            yield
        finally:
            self.ask("fail", [], 0)


def assert_settled(status: Mapping[str, object]) -> None:
    """No change is in flight."""
    assert status["changes_in_flight"] == 0


class Stage:
    """A share on a disk that can fail, two guests, and a tree for each row."""

    def __init__(self, directory: Path, undo: contextlib.ExitStack) -> None:
        disk, mounted = directory / "disk", directory / "mounted"
        self.host = host = Host(directory, "--slots", "1024")
        host.share, self.on_disk = mounted / "share", disk / "share"
        mounted.mkdir()
        self.on_disk.mkdir(parents=True)
        for tree in (*CALLS, "reads", "mmap"):
            (self.on_disk / tree).mkdir()
            lay(self.on_disk / tree)
        self.disk = undo.enter_context(FailingDisk(disk, mounted, log=directory / "disk.log"))
        undo.enter_context(host)
        self.roots = {"strict": host.mount("strict", "strict"), "access": host.mount("access"), "export": host.export}
        self.reader = undo.enter_context(host.agent())._client.reader

    def assert_ended(self) -> None:
        """No change is under way, and no slot is odd: guests may keep what they fetch."""
        assert_settled(self.host.status())
        slots = self.reader.words[self.reader._slots_word :][: self.reader.slot_count]
        assert [word for word in slots if word & 1] == []

    def assert_agreed(self, tree: str, *guests: str) -> None:
        """These guests show what is on the disk."""
        truth = look(KernelView(self.on_disk / tree))
        for guest in guests:
            assert differences(truth, look(KernelView(self.roots[guest] / tree))) == [], guest


@pytest.fixture(scope="module")
def stage(make_socket_dir: Callable[[], Path]) -> Iterator[Stage]:
    with contextlib.ExitStack() as undo:
        yield Stage(make_socket_dir(), undo)


@pytest.mark.parametrize("row", [row for row in CALLS if row != FAILS_BY_ITSELF])
def test_a_change_that_fails_is_told_and_ended_and_nobody_is_wrong(stage: Stage, row: str) -> None:
    guest = GUESTS[list(CALLS).index(row) % 2]  # a look takes longer than all the rest
    stage.assert_agreed(row, guest)  # by now it may keep that
    for place, number in ERRNO_AT.items():
        at = Place(stage.roots[place] / row, stage.on_disk / row, stage.host.daemon.process.pid)
        with contextlib.closing(CALLS[row](at)) as change:
            next(change)
            with stage.disk.failing(number, *CHANGING):
                with pytest.raises(OSError, match=os.strerror(number)):
                    next(change)
                stage.assert_ended()
    stage.assert_agreed(row, guest)


# ---- what is only asked ----


def _read(root: Path) -> object:
    with open(root / "file", "rb", buffering=0) as file:
        return file.read(FILE_BYTES)


def _seek(root: Path) -> object:
    with open(root / "file", "rb", buffering=0) as file:
        return file.seek(0, os.SEEK_HOLE)


QUESTIONS: dict[str, tuple[Callable[[Path], object], object]] = {
    "LOOKUP": (lambda root: os.lstat(root / "dir/inner").st_size, 9),
    "GETATTR": (lambda root: os.lstat(root / "into/taken").st_size, 10),
    "READLINK": (lambda root: os.readlink(root / "link"), "file"),
    "READDIR": (lambda root: sorted(os.listdir(root / "into")), ["linked", "sub", "taken"]),
    "OPENDIR": (lambda root: os.listdir(root / "dir"), ["inner"]),
    "READ": (_read, bytes(range(256)) * (FILE_BYTES // 256)),
    "LSEEK": (_seek, FILE_BYTES),
    "GETXATTR": (lambda root: os.getxattr(root / "file", "user.colour"), b"red"),
    "LISTXATTR": (lambda root: os.listxattr(root / "file"), ["user.colour"]),
    "STATFS": (lambda root: os.statvfs(root).f_namemax, 255),
}
"""By the request that fails; what is asked, and what the answer is when it does not."""


@pytest.mark.parametrize("place", ERRNO_AT)
@pytest.mark.parametrize("request_kind", QUESTIONS)
def test_a_question_that_fails_is_told_and_nothing_is_kept_of_it(stage: Stage, request_kind: str, place: str) -> None:
    ask, answer = QUESTIONS[request_kind]
    root = stage.roots[place] / "reads"
    with stage.disk.failing(errno.EIO, request_kind), pytest.raises(OSError, match=os.strerror(errno.EIO)):
        ask(root)
    assert ask(root) == answer
    stage.assert_ended()


@pytest.mark.parametrize("place", ERRNO_AT)
def test_errors_of_fsync_and_close_are_told(stage: Stage, place: str) -> None:
    root = stage.roots[place] / "reads"
    file, directory = os.open(root / "other", os.O_RDWR), os.open(root, os.O_RDONLY)
    copy = os.dup(file)
    calls: dict[str, Callable[[], None]] = {
        "FSYNC": lambda: os.fsync(file), "FSYNCDIR": lambda: os.fsync(directory), "FLUSH": lambda: os.close(copy),
    }  # fmt: skip
    try:
        for request_kind, call in calls.items():
            with stage.disk.failing(errno.EIO, request_kind), pytest.raises(OSError, match=os.strerror(errno.EIO)):
                call()
        os.fsync(file)
        os.fsync(directory)
    finally:
        os.close(file)
        os.close(directory)


@pytest.mark.parametrize("place", GUESTS)
def test_a_page_that_could_not_be_written_stays_with_its_guest_until_the_file_is_opened_again(
    stage: Stage, place: str
) -> None:
    """As on a local file system: the error is told once, and the page is clean."""
    other = next(guest for guest in GUESTS if guest != place)
    name = f"mmap/{'file' if place == 'strict' else 'other'}"
    file = os.open(stage.roots[place] / name, os.O_RDWR)
    before = os.pread(file, 4, 0)
    with mmap.mmap(file, 0) as pages:
        pages[0:4] = b"lost"
        with stage.disk.failing(errno.EIO, "WRITE"), pytest.raises(OSError, match=os.strerror(errno.EIO)):
            pages.flush()
        stage.assert_ended()
        assert pages[0:4] == b"lost"
        pages.flush()  # nothing is left to write
    with contextlib.suppress(OSError):  # may tell of it again
        os.close(file)
    assert (stage.on_disk / name).read_bytes()[:4] == before
    for guest in (place, other):
        assert (stage.roots[guest] / name).read_bytes()[:4] == before


# ---- controls ----


@pytest.mark.parametrize("careless", [False, True])
def test_a_change_that_is_not_ended_would_be_seen(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, careless: bool
) -> None:
    """The control: the same look at the daemon, of which the case `careless` does not end what has failed."""
    end = Change.__exit__

    def forget(change: Change, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            end(change, kind, *rest)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "as it was told")

    if careless:
        monkeypatch.setattr(Change, "__exit__", forget)
    (socket_dir / "share").mkdir()
    service = Service(ServiceOptions(socket_dir / "share", "test", socket_dir / "run"))
    service.start()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "mkdir", fail)
            new = service.directory.export / "new"
            made = subprocess.run(["mkdir", new], capture_output=True, text=True, timeout=30, check=False)
        assert os.strerror(errno.EIO) in made.stderr
        found = fetch_status(socket_dir / "run", "test")
    finally:
        service.close()
    if careless:
        with pytest.raises(AssertionError):
            assert_settled(found)
    else:
        assert_settled(found)
