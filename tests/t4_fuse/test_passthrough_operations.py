"""Every operation through a passthrough, whatever the kernel caches and however nodes are reached."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.passthrough import Served
from tests.scenarios import ALL
from tests.scenarios.comparing import Scenario, UserProcess, compare


@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.__name__)
def test_same_as_a_plain_directory(any_mount: Served, scenario: Scenario, tmp_path: Path) -> None:
    compare(scenario, tmp_path, any_mount.mountpoint, any_mount.directory, writeback=any_mount.writeback)
    any_mount.ask("check")


def test_time_of_birth(plain_mount: Served) -> None:
    """Which the kernel asks for with STATX, since Linux 6.6."""
    (plain_mount.mountpoint / "born").touch()

    def told(path: Path) -> list[str]:
        run = subprocess.run(
            ["stat", "-c", "%w %i %s %b %B %h %u %g %f %Y %Z", path], capture_output=True, text=True, check=True
        )
        return run.stdout.split()

    mine, theirs = told(plain_mount.mountpoint / "born"), told(plain_mount.directory / "born")
    assert mine[-10:] == theirs[-10:]
    assert mine == theirs or mine[0] == "-"


def test_users_who_come_at_once_are_not_mixed_up(plain_mount: Served) -> None:
    """Threads of the server have been other users before, and are started by threads that have."""
    users = range(1001, 1009)
    shared = plain_mount.mountpoint / "shared"
    shared.mkdir()
    shared.chmod(0o777)

    def create_many(uid: int) -> None:
        for number in range(40):
            subdirectory = f"{uid}.{number}"
            os.mkdir(subdirectory)
            os.close(os.open(f"{subdirectory}/f", os.O_CREAT, 0o666))

    processes = [UserProcess(shared, lambda: create_many(uid), uid=uid, gid=uid + 100) for uid in users]  # noqa: B023
    assert [process.result() for process in processes] == [None] * len(users)
    names = os.listdir(shared)
    assert len(names) == 40 * len(users)
    for name in names:
        uid = int(name.partition(".")[0])
        for path in (shared / name, shared / name / "f"):
            status = os.stat(path)
            assert (status.st_uid, status.st_gid) == (uid, uid + 100)


@pytest.mark.parametrize(("access", "is_one"), [(os.O_WRONLY, True), (os.O_RDWR, False)])
def test_what_is_appended_is_one_request(plain_mount: Served, access: int, is_one: bool) -> None:
    """Also across the border of a page, so that nobody's comes in between; unless it may be mapped, too, which is the control."""
    path = plain_mount.mountpoint / f"appended to {access}"
    path.write_bytes(b"x" * 4000)
    fd = os.open(path, access | os.O_APPEND)
    before = plain_mount.statistic("requests")
    os.write(fd, b"y" * 200)
    assert (plain_mount.statistic("requests") - before == 1) is is_one
    os.close(fd)
    assert path.read_bytes() == b"x" * 4000 + b"y" * 200
