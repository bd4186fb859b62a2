"""serve --in-place: the export is seen at the share's own path, so whoever works there goes through the daemon."""

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.fuse.mounts import FILE_SYSTEM_TYPE, mount_at, remove_dead_mount
from tests.file_systems import mounted
from tests.guests import Host
from tests.mounts import coherency_mounts_below, detach
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60


@pytest.fixture
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir(), "--in-place") as host:
        yield host


def is_covered(path: Path) -> bool:
    mount = mount_at(path)
    return mount is not None and mount.kind == FILE_SYSTEM_TYPE


def below(share: Path) -> list[str]:
    """What lies in the share itself, seen through a mount of its parent on which nothing else is mounted."""
    command = ["unshare", "--mount", "sh", "-c", 'umount -l "$1"; ls "$1"', "sh", str(share)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout.split()


def test_a_change_at_the_share_s_own_path_is_strict(host: Host) -> None:
    """It recalls and waits, as any change that goes through the export: the very next look is right."""
    guest = host.mount("a", "strict")
    file = host.share / "file"
    file.write_text("one")
    for size in range(4, 40):
        assert (guest / "file").stat().st_size == file.stat().st_size  # a look that the guest's kernel keeps
        waits = host.status()["waits"]
        os.truncate(file, size)
        assert (guest / "file").stat().st_size == size
        assert host.status()["waits"] == waits + 1
    assert os.listdir(guest) == os.listdir(host.share) == os.listdir(host.export) == below(host.share) == ["file"]


def test_control_without_it_such_a_change_waits_for_nobody(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir()) as host:
        guest = host.mount("a", "strict")
        (host.share / "file").write_text("one")
        assert (guest / "file").stat().st_size == 3
        os.truncate(host.share / "file", 5)
        assert host.status()["waits"] == 0
        assert not is_covered(host.share)


def test_it_ends_as_if_it_had_not_been(host: Host) -> None:
    (host.share / "file").write_text("through the export")
    assert is_covered(host.share)
    assert host.daemon.stop() == 0
    assert not is_covered(host.share)
    assert not coherency_mounts_below([host.directory])
    assert (host.share / "file").read_text() == "through the export"
    host.serve()
    assert (host.share / "file").read_text() == "through the export"


def test_who_uses_it_does_not_keep_it_from_ending(host: Host) -> None:
    """Somebody has his working directory there, and an open file with pages that are not written yet."""
    file = host.share / "file"
    file.write_bytes(b"old" * 4096)
    opened = os.open(file, os.O_RDWR)
    with subprocess.Popen(["sleep", "600"], cwd=host.share) as there, mmap.mmap(opened, 0) as pages:
        try:
            pages[:3] = b"new"
            assert host.daemon.stop() == 0
            assert not coherency_mounts_below([host.directory])
            assert file.read_bytes()[:6] == b"newold"
            with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
                os.close(opened)
        finally:
            there.kill()


@pytest.mark.parametrize("again", [("--in-place",), ()], ids=["in-place", "not-in-place"])
def test_what_a_killed_daemon_left_goes_away_with_the_next(host: Host, again: tuple[str, ...]) -> None:
    guest = host.mount("a", "strict")
    (host.share / "file").write_text("one")
    assert (guest / "file").read_text() == "one"
    host.daemon.kill()
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(host.share)
    host.serve_options = again
    host.serve()
    assert is_covered(host.share) == bool(again)
    assert (host.share / "file").read_text() == "one"

    def follows() -> bool:
        try:
            return (guest / "file").read_text() == "one"
        except OSError:
            return False

    until(follows)
    if again:
        (host.share / "file").write_text("twofold")
        assert (guest / "file").stat().st_size == 7
    assert host.daemon.stop() == 0
    assert not is_covered(host.share)


def test_killed_and_started_at_once(host: Host) -> None:
    """The next one may come before the kernel has taken the killed one down."""
    for turn in range(3):
        (host.share / f"{turn}").touch()
        host.daemon.kill()
        host.serve()
    assert sorted(os.listdir(host.share)) == ["0", "1", "2"]


def test_a_dead_mount_that_somebody_else_removes_meanwhile(
    make_socket_dir: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two daemons are started at once: what lies below the dead mount is the file system of the share."""
    directory = make_socket_dir()
    (directory / "share").mkdir()
    with mounted("tmpfs", directory / "share"), Host(directory, "--in-place") as host:
        (host.share / "file").touch()
        host.daemon.kill()

        def asked_and_removed(_root: int) -> int:
            detach(host.share)
            return errno.ENOTCONN

        monkeypatch.setattr("coherency.fuse.mounts._ask", asked_and_removed)
        assert remove_dead_mount(host.share)
        assert os.listdir(host.share) == ["file"]
        assert not remove_dead_mount(host.share)
        host.serve()


@pytest.mark.parametrize("point", ["mounting", "mounted"])
@pytest.mark.parametrize(("number", "when"), [(1, "starting"), (2, "starting"), (3, "ending"), (4, "ending")])
def test_killed_between_any_two_mounts(host: Host, point: str, number: int, when: str) -> None:
    """The export and the place are mounted one after the other, and unmounted."""
    (host.share / "file").write_text("one")
    assert host.daemon.stop() == 0
    if when == "starting":
        with pytest.raises(AssertionError, match="did not get ready"):
            host.serve(doom=(point, number))
    else:
        host.serve(doom=(point, number))
        host.daemon.process.send_signal(signal.SIGTERM)
        host.daemon.wait_until_killed()
    host.serve()
    assert (host.share / "file").read_text() == "one"
    (host.share / "file").write_text("two")
    assert below(host.share) == ["file"]
    assert host.status()["in_place"] == "on"
    assert host.daemon.stop() == 0
    assert not coherency_mounts_below([host.directory])
    assert (host.share / "file").read_text() == "two"


def serve_elsewhere(host: Host, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["coherency", "serve", host.share, "--name", "other", "--runtime-dir", directory, *options]
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_second_daemon_is_told_what_it_met(host: Host, make_socket_dir: Callable[[], Path]) -> None:
    got = serve_elsewhere(host, make_socket_dir())
    assert got.returncode == 2
    assert "is a mount of ours already" in got.stderr
    (host.share / "file").touch()  # and the first one goes on
    assert below(host.share) == ["file"]


def test_a_symlink_to_the_share_will_do(make_socket_dir: Callable[[], Path]) -> None:
    directory = make_socket_dir()
    (directory / "real").mkdir()
    (directory / "share").symlink_to("real")
    with Host(directory, "--in-place") as host:
        assert is_covered(directory / "real")
        (host.share / "file").touch()
        assert os.listdir(host.export) == ["file"]
        assert host.daemon.stop() == 0
        assert not is_covered(directory / "real")
        assert os.listdir(directory / "real") == ["file"]


def test_the_status_says_when_somebody_has_uncovered_it(host: Host) -> None:
    assert host.status()["in_place"] == "on"
    detach(host.share)
    assert host.status()["in_place"] == "uncovered"
    assert host.daemon.stop() == 0
