"""What must not be taken for the share, or for its only daemon."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.errors import MountError
from coherency.fuse import syscalls
from coherency.fuse.mounts import open_mount
from coherency.guest_agent import requests
from tests.guests import Host

PATIENCE_S = 60
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        yield host


def coherency(*arguments: str | Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "coherency", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)


def test_a_guest_that_cannot_see_the_export_is_refused(make_socket_dir: Callable[[], Path]) -> None:
    """A container that is older than the daemon, and into which no mount propagates: it would write below the export."""
    directory = make_socket_dir()
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "600"]) as elsewhere:
        try:
            with Host(directory) as host:
                (directory / "guest").mkdir()
                inside = ("nsenter", "--mount", f"--target={elsewhere.pid}")
                got = coherency("mount", "test", directory / "guest", "--runtime-dir", host.runtime_dir, before=inside)
                assert (got.returncode, got.stdout) == (1, "")
                assert "cannot be seen" in got.stderr
        finally:
            elsewhere.kill()


def test_a_directory_is_not_taken_for_the_export(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="cannot be seen"):
        open_mount(tmp_path)


def test_one_directory_has_one_daemon_whatever_the_names(host: Host, make_socket_dir: Callable[[], Path]) -> None:
    same = make_socket_dir() / "link"
    same.symlink_to(host.share)
    for runtime_dir in (host.runtime_dir, make_socket_dir()):
        got = coherency("serve", same, "--name", "other", "--runtime-dir", runtime_dir)
        assert got.returncode == 2
        assert "another daemon serves" in got.stderr
    host.daemon.stop()
    host.serve()


def test_root_keeps_set_id_bits_after_somebody_else_has_made_files(host: Host) -> None:
    """The agent's threads go to the export as whoever they created something for last."""
    guest = host.mount("a")
    guest.chmod(0o777)
    names = [str(number) for number in range(40)]
    subprocess.run(["touch", *names], check=True, cwd=guest, user=1000, group=1000, extra_groups=[])
    assert (guest / names[0]).stat().st_uid == 1000
    for number in range(8):
        file = guest / f"tool{number}"
        file.touch()
        file.chmod(0o4755)
        fd = os.open(file, os.O_RDWR)
        syscalls.fallocate(fd, 0, 0, 4096)
        os.close(fd)
        assert (host.share / file.name).stat().st_mode & 0o7777 == 0o4755


def test_a_mount_whose_agent_is_stopped_is_not_waited_for(host: Host) -> None:
    guest = host.mount("a")
    host.guests["a"].process.send_signal(signal.SIGSTOP)
    try:
        got = coherency("mount", "test", guest, "--runtime-dir", host.runtime_dir)
    finally:
        host.guests["a"].process.send_signal(signal.SIGCONT)
    assert got.returncode == 1
    assert "does not answer" in got.stderr


def test_daemons_of_others_do_not_hide_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "no daemon").mkdir()
    is_socket = Path.is_socket

    def refused(path: Path) -> bool:
        if "theirs" in path.parts:
            raise PermissionError
        return is_socket(path)

    monkeypatch.setattr(Path, "is_socket", refused)
    assert requests.served_names(tmp_path) == ["theirs"]
