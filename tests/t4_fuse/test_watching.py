"""Watching the share: what is of interest, what is not, and what happens where it cannot be done."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.daemon import watched as watched_module
from coherency.daemon.watched import Watched
from coherency.fuse.mounts import mounts
from coherency.fuse.syscalls import wait_readable
from tests.descriptors import open_descriptors
from tests.file_systems import mounted, run
from tests.granting_guest import state
from tests.guests import ROOT, Host
from tests.mounts import detach
from tests.scenarios.comparing import as_user
from tests.waiting import until

CHANGES = 20


class Grounds:
    """A share, a strict guest that has looked at some of it, and a directory beside the share on the same file system."""

    def __init__(self, host: Host) -> None:
        self.host, self.share, self.guest = host, host.share, host.mount("guest", "strict")
        self.outside = host.directory / "outside"
        self.outside.mkdir()
        self._marks = 0

    def look(self, *names: str) -> None:
        for name in names:
            os.lstat(self.guest / name)

    def await_all_seen(self) -> None:
        """Events come in order: when the guest sees this change, all that were made before it have been dealt with."""
        self._marks += 1
        os.utime(self.share / "mark", ns=(self._marks, self._marks))
        until(lambda: os.stat(self.guest / "mark").st_mtime_ns == self._marks)

    def warm(self, *names: str) -> None:
        """The guest's kernel has what it may have of these."""
        for _ in range(3):
            self.look(*names)
            self.host.status()  # what the guest has asked for is confirmed by then

    def bumps(self) -> int:
        """So far, the mark's included."""
        self.await_all_seen()
        return int(self.host.status()["bumps"])

    def agrees(self, name: str) -> None:
        until(lambda: state(self.guest / name) == state(self.share / name))


@pytest.fixture(scope="module")
def module_grounds(make_socket_dir: Callable[[], Path]) -> Iterator[Grounds]:
    directory = make_socket_dir()
    with mounted("tmpfs", directory), Host(directory) as host:  # where nobody else does anything
        (host.share / "mark").touch()
        yield Grounds(host)


@pytest.fixture
def grounds(module_grounds: Grounds, request: pytest.FixtureRequest) -> Iterator[Grounds]:
    """In a directory of its own."""
    module_grounds.await_all_seen()
    yield module_grounds
    assert "CRITICAL" not in module_grounds.host.daemon.logged()


def test_what_comes_through_the_export_is_bumped_once(grounds: Grounds) -> None:
    own = grounds.guest / "own"
    own.touch()
    before, events = grounds.bumps(), grounds.host.status()["host_events"]
    for number in range(CHANGES):
        os.chmod(own, 0o600 | number)
    assert grounds.bumps() - before == CHANGES + 1
    assert grounds.host.status()["host_events"] - events < CHANGES, "those of the daemon are not counted"


def test_control_what_does_not_is_bumped_as_well(grounds: Grounds) -> None:
    (grounds.share / "other").touch()
    grounds.look("other")
    before = grounds.bumps()
    for number in range(CHANGES):
        os.chmod(grounds.share / "other", 0o600 | number)
        grounds.await_all_seen()
    assert grounds.bumps() - before == 2 * CHANGES + 1


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_what_nobody_was_shown_costs_no_bump_and_no_recall(grounds: Grounds, where: str) -> None:
    directory = (grounds.outside if where == "outside" else grounds.share) / f"unseen-{where}"
    directory.mkdir()
    before = grounds.bumps()
    grounds.warm("mark")  # or a recall of it that comes late leaves nothing to be recalled
    recalls, events = (grounds.host.status()[what] for what in ("recalls", "host_events"))
    for number in range(CHANGES):
        (directory / str(number)).write_text("x")
        os.rename(directory / str(number), directory / f"{number}-renamed")
    assert grounds.bumps() - before == 1, "that of the mark"
    assert grounds.host.status()["recalls"] - recalls == 1
    assert grounds.host.status()["host_events"] - events > CHANGES, "they were told, and thrown away"


def test_what_was_shown_is_of_interest_under_a_name_outside(grounds: Grounds) -> None:
    (grounds.share / "linked").write_text("x")
    os.link(grounds.share / "linked", grounds.outside / "linked")
    grounds.look("linked")
    for number in range(3):
        (grounds.outside / "linked").write_text("longer" * (number + 1))
        grounds.agrees("linked")
    os.unlink(grounds.outside / "linked")
    grounds.agrees("linked")
    assert os.stat(grounds.guest / "linked").st_nlink == 1


def test_what_was_shown_is_of_interest_after_it_was_moved_out(grounds: Grounds) -> None:
    (grounds.share / "moving/below").mkdir(parents=True)
    grounds.look("moving", "moving/below")
    fd = os.open(grounds.guest / "moving", os.O_RDONLY)
    try:
        assert os.listdir(fd) == ["below"]
        os.rename(grounds.share / "moving", grounds.outside / "moved")
        grounds.agrees("moving")
        (grounds.outside / "moved/new").touch()
        until(lambda: sorted(os.listdir(fd)) == ["below", "new"])
        os.chmod(grounds.outside / "moved", 0o700)
        until(lambda: os.fstat(fd).st_mode & 0o777 == 0o700)
    finally:
        os.close(fd)


def test_directories_that_were_made_or_moved_in_a_moment_ago(grounds: Grounds) -> None:
    grounds.look(".")
    for number in range(10):
        made, moved = f"made-{number}", f"moved-{number}"
        (grounds.share / made / "a/b").mkdir(parents=True)
        (grounds.share / made / "a/b/file").write_text("1")
        (grounds.outside / moved / "a").mkdir(parents=True)
        (grounds.outside / moved / "a/file").write_text("1")
        os.rename(grounds.outside / moved, grounds.share / moved)
        for file in (f"{made}/a/b/file", f"{moved}/a/file"):
            grounds.agrees(file)
            (grounds.share / file).write_text("22")
            grounds.agrees(file)
            os.rename((grounds.share / file).parent, (grounds.share / file).parent.parent / "renamed")
            grounds.agrees(file)
            grounds.agrees(os.path.join(os.path.dirname(os.path.dirname(file)), "renamed/file"))


def test_a_new_owner_counts_for_who_looks_at_nothing_before(grounds: Grounds) -> None:
    """Whether a caller owns the file the guest's kernel decides by the owner that it was told last."""
    (grounds.share / "given").touch()
    os.chown(grounds.share / "given", 1001, 1002)
    grounds.warm("given")
    os.chown(grounds.share / "given", 7, 7)
    for _ in range(2):  # the second of which was made when the first had been carried out
        grounds.await_all_seen()
    assert as_user(grounds.guest, lambda: os.chmod("given", 0o640), uid=1001) == "EPERM"
    assert as_user(grounds.guest, lambda: os.chmod("given", 0o640), uid=7) is None


def test_a_working_directory_keeps_its_path_when_its_attributes_change(grounds: Grounds) -> None:
    (grounds.share / "working").mkdir()
    grounds.warm("working")
    fd = os.open(grounds.guest / "working", os.O_RDONLY)
    try:
        for number in range(3):
            grounds.warm("working")
            os.utime(grounds.share / "working", (number, number))
            os.chmod(grounds.share / "working", 0o700 | number)
            for _ in range(2):
                grounds.await_all_seen()
            assert os.readlink(f"/proc/self/fd/{fd}") == str(grounds.guest / "working")
        os.chown(grounds.share / "working", 7, 7)
        until(lambda: os.readlink(f"/proc/self/fd/{fd}").endswith("(deleted)"))  # control: so it is when names are recalled
    finally:
        os.close(fd)


def test_a_file_system_that_is_mounted_below_the_share_later(grounds: Grounds) -> None:
    at = grounds.share / "mounted"
    at.mkdir()
    (at / "covered").touch()
    grounds.look("mounted", "mounted/covered")
    epoch = grounds.host.status()["epoch"]
    with mounted("tmpfs", at):
        (at / "file").write_text("1")
        until(lambda: state(grounds.guest / "mounted/covered") == ())
        until(lambda: os.listdir(grounds.guest / "mounted") == ["file"])
        for size in range(2, 6):
            os.stat(grounds.guest / "mounted/file")
            (at / "file").write_text("x" * size)
            until(lambda size=size: os.stat(grounds.guest / "mounted/file").st_size == size)  # type: ignore[misc]
        assert grounds.host.status()["watching"] == "on"
        os.unlink(at / "file")
        until(lambda: not os.path.exists(grounds.guest / "mounted/file"))
    until(lambda: os.listdir(grounds.guest / "mounted") == ["covered"])
    assert grounds.host.status()["epoch"] == epoch + 2


def test_a_file_that_is_mounted_over_another(grounds: Grounds) -> None:
    """Not a directory, and on a file system that is watched already."""
    for file in (grounds.share / "under", grounds.outside / "over"):
        file.write_text(file.name)
    grounds.agrees("under")
    run("mount", "--bind", grounds.outside / "over", grounds.share / "under")
    try:
        until(lambda: (grounds.guest / "under").read_text() == "over")
        (grounds.outside / "over").write_text("over again")
        until(lambda: (grounds.guest / "under").stat().st_size == len("over again"))
        assert grounds.host.status()["watching"] == "on"
    finally:
        detach(grounds.share / "under")
    until(lambda: (grounds.guest / "under").read_text() == "under")


def test_mounts_elsewhere_are_no_business_of_it(grounds: Grounds) -> None:
    epoch = grounds.host.status()["epoch"]
    with mounted("tmpfs", grounds.outside):
        grounds.await_all_seen()
    grounds.await_all_seen()
    assert grounds.host.status()["epoch"] == epoch


@contextlib.contextmanager
def watched_share(directory: Path) -> Iterator[tuple[Path, Watched]]:
    """Without a daemon."""
    share = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.closing(Watched(share, directory)) as watched:
            yield directory, watched
    finally:
        os.close(share)


def test_what_was_mounted_anew_before_anybody_looked_is_watched(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the list of mounts tells, if the kernel uses its numbers again."""
    with mounted("tmpfs", socket_dir):
        below = socket_dir / "below"
        below.mkdir()
        with mounted("tmpfs", below), watched_share(socket_dir) as (_, watched):
            before = mounts()
            monkeypatch.setattr(watched_module, "mounts", lambda: before)
            assert not watched.look(), "control: there is nothing to see"
            run("umount", below)
            run("mount", "-t", "tmpfs", "none", below)
            assert watched.look()
            (below / "file").touch()
            assert watched.group.read(), "it is watched"
            assert not watched.look()


@pytest.mark.expected_logs(r"changes made directly in .* are not seen: a file system of type")
@pytest.mark.parametrize("kind", ["nfs4", "virtiofs", "fuse.sshfs", "9p"])
def test_whose_server_need_not_answer_is_not_asked(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    below = socket_dir / "below"
    below.mkdir()
    with mounted("tmpfs", below):
        shown_as = [each._replace(kind=kind) if each.path == os.fsencode(below) else each for each in mounts()]
        monkeypatch.setattr(watched_module, "mounts", lambda: shown_as)
        with watched_share(socket_dir) as (_, watched):
            assert list(watched.unwatched) == [str(below)]
            (below / "file").touch()
            assert not watched.group.read(), "nobody has touched it"


def test_a_watch_that_cannot_be_set_up_leaves_nothing_open(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_descriptors(_fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", out_of_descriptors)
    before = open_descriptors()
    with pytest.raises(OSError, match="Too many open files"), watched_share(socket_dir):
        pass
    assert open_descriptors() == before


def test_subvolumes_are_watched_and_flood_nobody(socket_dir: Path) -> None:
    """Each has numbers of its own; what is gone is known by its number in them, too."""
    with mounted("btrfs", socket_dir), Host(socket_dir) as host:
        (host.share / "mark").touch()
        for subvolume in (socket_dir / "elsewhere", host.share / "inside"):
            run("btrfs", "subvolume", "create", subvolume)
        grounds = Grounds(host)
        grounds.warm("inside")
        grounds.await_all_seen()
        before = host.status()["host_events"]
        for place in (socket_dir / "elsewhere", host.share / "inside"):
            for number in range(CHANGES):
                (place / "file").write_text("x" * number)
                if place.parent == host.share:
                    until(lambda number=number: os.stat(grounds.guest / "inside/file").st_size == number)  # type: ignore[misc]
                os.unlink(place / "file")
        until(lambda: not os.path.exists(grounds.guest / "inside/file"))
        grounds.await_all_seen()
        assert host.status()["host_events"] > before + CHANGES
        assert host.status()["epoch"] == 1


# --- where it cannot be done, or only in part ------------------------------------------------------------------------


def overlay_options(directory: Path, *more: str) -> str:
    layers = [directory / name for name in ("lower", "upper", "work")]
    for layer in layers:
        layer.mkdir()
    return ",".join([*(f"{layer.name}dir={layer}" for layer in layers), *more])


@pytest.fixture(params=["overlay", "btrfs-subvolume"])
def unwatchable(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[tuple[Path, str]]:
    """A directory for a host whose share cannot be watched, and why."""
    share = socket_dir / "share"
    share.mkdir()
    if request.param == "overlay":
        with mounted("overlay", share, overlay_options(socket_dir)):
            yield socket_dir, "a file system of type overlay does not tell what is changed in it"
    else:
        (socket_dir / "top").mkdir()
        with mounted("btrfs", socket_dir / "top"):
            run("btrfs", "subvolume", "create", socket_dir / "top/sub")
            run("mount", "--bind", socket_dir / "top/sub", share)
            try:
                yield socket_dir, "of btrfs only the topmost subvolume can be watched"
            finally:
                detach(share)


def test_where_it_cannot_be_done_it_serves_without_and_says_so(unwatchable: tuple[Path, str]) -> None:
    directory, why = unwatchable
    with Host(directory) as host:
        assert f"changes made directly in {host.share} will not be seen: {why}" in host.daemon.logged()
        assert host.status()["watching"] == "off"
        assert host.status()["watching_why"].startswith(why)
        guest = host.mount("guest", "strict")
        (guest / "file").write_text("through the export")
        assert (host.share / "file").read_text() == "through the export"


def test_without_the_capability_it_serves_without_and_says_so(socket_dir: Path) -> None:
    (socket_dir / "share").mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "coherency", "serve", "share", "--name", "test"]
    with subprocess.Popen(
        [*command, "--runtime-dir", "run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=socket_dir, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as daemon:  # fmt: skip
        try:
            assert daemon.stdout is not None
            assert wait_readable([daemon.stdout.fileno()], 30_000_000_000)
            assert daemon.stdout.readline().startswith("serving share as 'test'")
            daemon.terminate()
            errors = daemon.communicate(timeout=30)[1]
        finally:
            daemon.kill()
    assert "will not be seen: to watch a whole file system takes CAP_SYS_ADMIN in the first user namespace; make them" in errors


def test_where_it_cannot_be_done_who_asks_for_it_is_refused(unwatchable: tuple[Path, str]) -> None:
    directory, why = unwatchable
    refused = serve_in_vain(directory, "--watch")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"coherency: --watch is not possible here: {why}")


def serve_in_vain(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coherency", "serve", str(directory / "share"), "--name", "test", *options]
    return subprocess.run(
        [*command, "--runtime-dir", str(directory / "run")],
        check=False, capture_output=True, text=True, timeout=30, cwd=ROOT,
    )  # fmt: skip


def test_an_overlay_that_can_be_exported_is_watched(socket_dir: Path) -> None:
    """Its handles say no number: they are opened, and what is gone means a new epoch."""
    share = socket_dir / "share"
    share.mkdir()
    with mounted("overlay", share, overlay_options(socket_dir, "index=on", "nfs_export=on")), Host(socket_dir) as host:
        (share / "mark").touch()
        grounds = Grounds(host)
        assert host.status()["watching"] == "on"
        (share / "d").mkdir()
        for number in range(3):
            (share / "d/file").write_text("x" * number)
            grounds.agrees("d/file")
        assert host.status()["epoch"] == 1
        os.unlink(share / "d/file")
        grounds.agrees("d/file")
        os.rmdir(share / "d")
        grounds.agrees("d")
        assert host.status()["epoch"] > 1


def test_a_mount_below_the_share_that_cannot_be_watched_is_named(socket_dir: Path) -> None:
    (socket_dir / "share/sub").mkdir(parents=True)
    with mounted("overlay", socket_dir / "share/sub", overlay_options(socket_dir)), Host(socket_dir) as host:
        assert f"changes made directly in {host.share}/sub are not seen: a file system of" in host.daemon.logged()
        assert host.status()["watching"] == "in part"
        text = subprocess.run(
            [sys.executable, "-m", "coherency", "status", "test", "--runtime-dir", host.runtime_dir],
            capture_output=True, text=True, timeout=30, cwd=ROOT, check=True,
        ).stdout  # fmt: skip
        assert "watching in part (without 1 file systems below the share: see the log)" in text


def test_it_can_be_switched_off(socket_dir: Path) -> None:
    with Host(socket_dir, "--no-watch") as host:
        assert (host.status()["watching"], host.status()["watching_why"]) == ("off", "--no-watch")
        assert host.daemon.logged() == ""
