"""Shares on file systems that are full, that may only be read, or on which a user may have no more.

Everything is done in two guests and on the export; afterwards all of them show what is in the share.
"""

import contextlib
import errno
import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from coherency.daemon.service import Service, ServiceOptions
from coherency.fuse import syscalls
from coherency.fuse.credentials import Credentials
from tests.bump_matrix.calls import CALLS, Place
from tests.bump_matrix.ground import USER, lay
from tests.file_systems import mounted, run
from tests.guests import Host
from tests.snapshots import assert_same_tree

MIB = 1 << 20
PLACES = {"strict": "other", "access": "dir/inner", "export": "into/taken"}
"""From where, and a small file for each."""
DISKS: dict[str, Callable[[Path], AbstractContextManager[Path]]] = {
    "tmpfs": lambda at: mounted("tmpfs", at, "size=2m,nr_inodes=120"),
    "ext4": lambda at: mounted("ext4", at, size_bytes=12 * MIB, make=("-m", "0", "-N", "64")),
}


class Stage:
    """A small share and who uses it. What is compared lies in `tree`."""

    def __init__(self, directory: Path, make: Callable[[Path], AbstractContextManager[Path]], undo: ExitStack) -> None:
        self.host = host = Host(directory)
        undo.enter_context(make(host.share))
        (host.share / "tree").mkdir()
        lay(host.share / "tree")
        undo.enter_context(host)
        self.roots = {"strict": host.mount("strict", "strict"), "access": host.mount("access"), "export": host.export}

    def fill(self, *, inodes: bool = True) -> None:
        """Neither a block nor, with `inodes`, an inode is left."""
        ballast = self.host.share / "ballast"
        ballast.mkdir()
        with contextlib.suppress(OSError):
            while inodes:
                (ballast / f"empty-{len(os.listdir(ballast))}").touch()
        with open(ballast / "empty-0", "ab", buffering=0) as file:
            for piece in (65536, 4096, 512, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(piece))

    def assert_agreed(self) -> None:
        """No change is under way, and everybody shows what is there."""
        assert self.host.status()["changes_in_flight"] == 0
        for root in self.roots.values():
            assert_same_tree(root / "tree", self.host.share / "tree")


@pytest.fixture(scope="module", params=DISKS)
def full(request: pytest.FixtureRequest, make_socket_dir: Callable[[], Path]) -> Iterator[Stage]:
    with ExitStack() as undo:
        stage = Stage(make_socket_dir(), DISKS[request.param], undo)
        stage.assert_agreed()
        stage.fill()
        yield stage


# ---- full ----


def _open(path: Path, flags: int) -> None:
    os.close(os.open(path, flags, 0o644))


def _with_file(flags: int, work: Callable[[int], object]) -> Callable[[Path], None]:
    def call(root: Path) -> None:
        file = os.open(root / "file", flags)
        try:
            work(file)
        finally:
            with contextlib.suppress(OSError):  # may tell of it once more
                os.close(file)

    return call


def _copy(file: int) -> None:
    size = os.fstat(file).st_size
    while True:
        size += os.copy_file_range(file, file, size, 0, size)


def _store(file: int) -> None:
    size = os.fstat(file).st_size
    os.ftruncate(file, size + 16 * mmap.PAGESIZE)  # a hole takes no space
    try:
        with mmap.mmap(file, 0) as pages:
            pages[-16 * mmap.PAGESIZE :] = b"x" * 16 * mmap.PAGESIZE
            pages.flush()
    finally:
        os.ftruncate(file, size)


WANT_SPACE: dict[str, Callable[[Path], object]] = {
    "create": lambda root: _open(root / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
    "mkdir": lambda root: os.mkdir(root / "new"),
    "mknod": lambda root: os.mknod(root / "new", stat.S_IFIFO | 0o600),
    "symlink": lambda root: os.symlink("x" * 500, root / "new"),
    "tmpfile": lambda root: _open(root, os.O_TMPFILE | os.O_WRONLY),
    "write": _with_file(os.O_RDWR, lambda file: os.pwrite(file, bytes(MIB), 1 << 20)),
    "append": _with_file(os.O_WRONLY | os.O_APPEND, lambda file: [os.write(file, bytes(MIB)) for _ in range(2)]),
    "fallocate": _with_file(os.O_RDWR, lambda file: os.posix_fallocate(file, 0, 2 * MIB)),
    "copy_file_range": _with_file(os.O_RDWR, _copy),
    "mmap": _with_file(os.O_RDWR, _store),
    "setxattr": lambda root: os.setxattr(root / "other", "user.big", bytes(3000)),
}


@pytest.mark.parametrize("call", WANT_SPACE)
def test_a_full_disk_is_told_and_nobody_is_wrong(full: Stage, call: str) -> None:
    for root in full.roots.values():
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            WANT_SPACE[call](root / "tree")
    full.assert_agreed()


@pytest.mark.parametrize("place", PLACES)
def test_what_is_written_in_part_has_its_true_size_everywhere(full: Stage, place: str) -> None:
    with open(full.host.share / "ballast/empty-0", "rb+") as ballast:
        ballast.truncate(ballast.seek(0, os.SEEK_END) - MIB // 4)
        syscalls.syncfs(ballast.fileno())  # or it may not be free yet
    file = os.open(full.roots[place] / "tree" / PLACES[place], os.O_WRONLY | os.O_APPEND)
    try:
        before = os.fstat(file).st_size
        written = os.write(file, bytes(MIB))
        assert 0 < written < MIB
        assert os.fstat(file).st_size == before + written
        full.assert_agreed()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.write(file, bytes(MIB))
    finally:
        os.close(file)
    full.assert_agreed()


@pytest.mark.parametrize("place", PLACES)
def test_pages_of_which_only_some_could_be_written_are_told(full: Stage, place: str) -> None:
    """A kernel does not look at how much of its pages was written: it must be all, or an error."""
    with open(full.host.share / "ballast/empty-0", "rb+", buffering=0) as ballast:
        ballast.truncate(ballast.seek(0, os.SEEK_END) - 4 * mmap.PAGESIZE)
        syscalls.syncfs(ballast.fileno())
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            WANT_SPACE["mmap"](full.roots[place] / "tree")
        ballast.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError):
            while ballast.write(bytes(512)):
                pass
    full.assert_agreed()


@pytest.mark.parametrize("place", PLACES)
def test_what_makes_room_works(full: Stage, place: str) -> None:
    """On a full disk names can be taken away and files cut, through a guest, and then there is room."""
    ballast = full.roots[place] / "ballast"
    os.unlink(ballast / max(os.listdir(ballast)))
    os.truncate(ballast / "empty-0", os.stat(ballast / "empty-0").st_size - MIB // 4)
    name = full.roots[place] / f"tree/made-by-{place}"
    name.write_bytes(bytes(1000))
    full.assert_agreed()


# ---- only to be read ----


@pytest.fixture(scope="module")
def read_only(make_socket_dir: Callable[[], Path]) -> Iterator[Stage]:
    with ExitStack() as undo:
        stage = Stage(make_socket_dir(), lambda at: mounted("tmpfs", at, "size=4m"), undo)
        stage.assert_agreed()
        run("mount", "-o", "remount,ro", stage.host.share)
        yield stage
        run("mount", "-o", "remount,rw", stage.host.share)
        for place, root in stage.roots.items():
            (root / f"tree/by-{place}").write_text("again")
        stage.assert_agreed()


@pytest.mark.parametrize("row", CALLS)
def test_a_share_that_became_read_only_is_told(read_only: Stage, row: str) -> None:
    share = read_only.host.share / "tree"
    for place in PLACES:
        at = Place(read_only.roots[place] / "tree", share, read_only.host.daemon.process.pid)
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            list(CALLS[row](at))
    assert read_only.host.status()["changes_in_flight"] == 0


def test_a_share_that_became_read_only_is_still_shown(read_only: Stage) -> None:
    read_only.assert_agreed()


# ---- not for everybody ----


def test_a_quota_is_told(socket_dir: Path) -> None:
    host = Host(socket_dir)
    with ExitStack() as undo:
        undo.enter_context(mounted("btrfs", host.share))
        run("btrfs", "quota", "enable", host.share)
        undo.enter_context(host)
        roots = host.mount("strict", "strict"), host.mount("access")
        for allowed, root in enumerate(roots, 1):
            run("btrfs", "qgroup", "limit", str(allowed * MIB), host.share)
            with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)), open(root / root.name, "wb") as file:
                file.write(bytes(2 * MIB))
            for each in (*roots, host.export):
                assert os.stat(each / root.name).st_size == os.stat(host.share / root.name).st_size
        assert host.status()["changes_in_flight"] == 0


@pytest.mark.expected_logs("dirty pages of .* could not be written: .*No space left")
@pytest.mark.parametrize("how", ["written", "stored"])
@pytest.mark.parametrize("bound", [True, False])
def test_what_is_reserved_for_root_is_left_alone(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, bound: bool, how: str
) -> None:
    """A user fills the disk through the export, which is served by root. The case in which it remains root is the control."""
    if not bound:
        monkeypatch.setattr(Credentials, "become", lambda *arguments: None)
    share = socket_dir / "share"
    share.mkdir()
    with ExitStack() as undo:
        undo.enter_context(mounted("ext4", share, size_bytes=8 * MIB, make=("-m", "20")))
        share.chmod(0o777)
        service = Service(ServiceOptions(share, "test", socket_dir / "run"))
        service.start()
        undo.callback(service.close)
        at = os.open(service.directory.export, os.O_RDONLY)  # a user does not get here by name
        undo.callback(os.close, at)
        done = subprocess.run(
            [sys.executable, "-c", BECOME + FILL[how], f"/proc/self/fd/{at}/file", str(USER)], stderr=subprocess.PIPE, pass_fds=[at],
            env={"LC_ALL": "C"}, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert os.strerror(errno.ENOSPC) in done.stderr
        left = os.statvfs(share)
        assert (left.f_bfree * left.f_frsize > MIB) == bound


BECOME = """
import mmap, os, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
"""
FILL = {
    "written": """
with open(sys.argv[1], "wb", buffering=0) as file:
    while True:
        file.write(bytes(65536))
""",
    "stored": """
with open(sys.argv[1], "wb+") as file:
    file.truncate(8 << 20)
    with mmap.mmap(file.fileno(), 0) as pages:
        for at in range(0, len(pages), 65536):
            pages[at : at + 65536] = b"x" * 65536
            pages.flush(at, 65536)
""",
}
