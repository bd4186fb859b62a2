"""What a passthrough keeps of what the kernel knows: every look-up is given back, no descriptor is lost, few are needed."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.passthrough import Served, eventually, serve
from tests.scenarios.comparing import attempt
from tests.t4_fuse.conftest import FOREVER

MANY = 250_000
PER_DIRECTORY = 125

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing-cached": {},
    "all-cached": {"kernel_cache": FOREVER},
    "by-handle": {"descriptor_limit": 1},
}


pytestmark = pytest.mark.alone  # the kernel's caches are emptied


@pytest.fixture(params=VARIANTS)
def mount(request: pytest.FixtureRequest, make_socket_dir: Callable[[], Path]) -> Iterator[Served]:
    with serve(make_socket_dir(), **VARIANTS[request.param]) as served:
        yield served


def let_the_kernel_forget() -> None:
    """Drop what is not in use of its caches of names and inodes."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def forgotten(mount: Served) -> bool:
    """Whether the root is all that the kernel knows, and no file is open. Open files are released some time after close()."""
    let_the_kernel_forget()
    statistics = mount.ask("statistics")
    return bool(statistics["nodes"] == 1 and statistics["open_files"] == 0)


def busy(directory: Path) -> None:
    """All kinds of requests that count look-ups, and those that fail."""
    for number in range(20):
        (directory / f"d{number}").mkdir()
        for name in ("a", "b", "c"):
            (directory / f"d{number}/{name}").write_text(name)
        os.link(directory / f"d{number}/a", directory / f"d{number}/hard")
        os.symlink("a", directory / f"d{number}/soft")
        os.mkfifo(directory / f"d{number}/fifo")
        os.rename(directory / f"d{number}/b", directory / f"d{number}/moved")
        os.rename(directory / f"d{number}/moved", directory / f"d{number}/c")
        os.unlink(directory / f"d{number}/c")
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR)
        os.close(fd)
    for path, names, files in os.walk(directory):
        for name in (*names, *files):
            os.stat(os.path.join(path, name), follow_symlinks=False)
            assert not os.path.lexists(os.path.join(path, name + "-missing"))
    with pytest.raises(FileExistsError):
        os.mkdir(directory / "d1")
    with pytest.raises(FileExistsError):
        os.link(directory / "d1/a", directory / "d1/hard")
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(directory / "d1")


def test_all_look_ups_are_given_back(mount: Served) -> None:
    descriptors = mount.statistic("process_descriptors")
    busy(mount.mountpoint)
    held = os.open(mount.mountpoint / "d3/a", os.O_RDONLY)
    assert mount.statistic("nodes") > 20
    # Negative control: what is in use stays, and so would a node whose look-ups were counted too high.
    for _ in range(3):
        assert not forgotten(mount)
    os.close(held)
    eventually(lambda: forgotten(mount))
    mount.ask("check")
    assert mount.statistic("descriptors") == 1
    assert mount.statistic("process_descriptors") == descriptors


def test_removed_trees_are_forgotten_by_themselves(mount: Served) -> None:
    busy(mount.mountpoint)
    subprocess.run(["rm", "-rf", *mount.mountpoint.iterdir()], check=True)
    eventually(lambda: mount.statistic("nodes") == 1)
    mount.ask("check")


def test_a_quarter_of_a_million_inodes_in_few_descriptors(make_socket_dir: Callable[[], Path]) -> None:
    """All known at once, to a server that may open 256 files, 100 of which are for nodes."""
    base = make_socket_dir()
    share, mountpoint = base / "share", base / "mounted"
    share.mkdir()
    mountpoint.mkdir()
    # In memory, where inodes are made and removed faster.
    subprocess.run(["mount", "-t", "tmpfs", "none", share], check=True)
    try:
        for directory in range(MANY // PER_DIRECTORY):
            (share / str(directory)).mkdir()
            at = os.open(share / str(directory), os.O_RDONLY)
            for number in range(PER_DIRECTORY):
                os.mknod(str(number), dir_fd=at)
            os.close(at)
        with Served(
            share, mountpoint, log=base / "log", descriptor_limit=100, open_files=256, kernel_cache=FOREVER
        ) as mount:
            for directory in range(MANY // PER_DIRECTORY):
                os.listdir(mountpoint / str(directory))  # by READDIRPLUS, which makes every inode known
            statistics = mount.ask("statistics")
            assert statistics["nodes"] > MANY
            assert statistics["descriptors"] == 100
            assert statistics["process_descriptors"] < 256
            for directory in range(0, MANY // PER_DIRECTORY, 97):
                path = mountpoint / str(directory) / "77"
                path.write_text("written")
                assert path.read_text() == "written"
                assert os.stat(path).st_ino == os.stat(share / str(directory) / "77").st_ino
            mount.ask("check")
    finally:
        subprocess.run(["umount", share], check=True)


def test_without_the_limit_there_would_be_too_many(make_socket_dir: Callable[[], Path]) -> None:
    """Negative control. And what has run out of descriptors can still be unmounted."""
    with serve(make_socket_dir(), descriptor_limit=100_000, open_files=256) as mount:
        mount.logs_expected = True
        for number in range(300):
            os.mknod(mount.directory / str(number))
        outcomes = {attempt(os.path.getsize, mount.mountpoint / str(number)) for number in range(300)}
        assert outcomes == {0, "EMFILE"}
