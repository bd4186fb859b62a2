"""What stays for virtual machines when a daemon with ``--table posix`` ends: the table, and the window of virtiofsd."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherency.daemon.window import Window
from coherency.fuse import syscalls
from tests.guests import Host, Program
from tests.waiting import until

MS_PRIVATE = 1 << 18
OBJECTS = Path("/dev/shm")
ENOTCONN = "Transport endpoint is not connected"
_SANDBOX = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
place = os.fsencode(sys.argv[1])

def call(function, *arguments):
    if function(*arguments):
        raise OSError(ctypes.get_errno(), "sandbox")

MS_BIND, MS_REC, MNT_DETACH, PIVOT_ROOT = 0x1000, 0x4000, 2, 155
call(libc.mount, place, place, None, MS_BIND | MS_REC, None)
old_root = os.open("/", os.O_RDONLY)
os.chdir(place)
call(libc.syscall, PIVOT_ROOT, b".", b".")
os.fchdir(old_root)
call(libc.umount2, b".", MNT_DETACH)
os.chdir("/")
os.close(old_root)
print("ready", flush=True)
for name in sys.stdin:
    try:
        print(open(name.rstrip()).read(), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


class Sandbox:
    """A process that has locked itself into a directory as virtiofsd does: a slave of the mounts of before, and then its root."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", sys.executable, "-c", _SANDBOX, str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._hear() == "ready"

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip()

    def read(self, name: str) -> str:
        """The line that is in a file, or why it cannot be read."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return self._hear()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def host(socket_dir: Path) -> Iterator[Host]:
    with Host(socket_dir, "--table", "posix", name=f"window-{os.getpid()}") as host:
        (host.share / "file").write_text("1")
        yield host


def coherency(host: Host, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "coherency", *arguments, "--runtime-dir", host.runtime_dir],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def forget(host: Host) -> str:
    done = coherency(host, "forget", host.name)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sandbox_sees_one_daemon_after_the_other(host: Host) -> None:
    window = host.runtime_dir / host.name / "vm"
    with Sandbox(window) as sandbox:
        assert sandbox.read("export/file") == "1"
        host.daemon.stop()
        assert sandbox.read("export/file") == "No such file or directory"
        host.serve()
        assert sandbox.read("export/file") == "1"
        host.daemon.kill()
        assert sandbox.read("export/file") == ENOTCONN
        host.serve()
        assert sandbox.read("export/file") == "1"
        (host.export / "file").write_text("2")
        assert sandbox.read("export/file") == "2"


def test_negative_control_one_that_has_the_export_itself_is_left_with_nothing(host: Host) -> None:
    with Sandbox(host.export) as sandbox:
        assert sandbox.read("file") == "1"
        host.daemon.kill()
        host.serve()
        assert sandbox.read("file") == ENOTCONN


def test_the_table_stays_and_is_taken_over(host: Host) -> None:
    table = OBJECTS / f"coherency-{host.name}"
    before, epoch = table.stat(), host.status()["epoch"]
    host.daemon.stop()
    assert table.stat().st_ino == before.st_ino
    host.serve()
    assert table.stat().st_ino == before.st_ino
    assert host.status()["epoch"] > epoch


def test_forget_removes_both_and_only_if_nobody_serves(host: Host) -> None:
    refused = coherency(host, "forget", host.name)
    assert refused.returncode == 1
    assert f"process {host.daemon.process.pid} is already serving" in refused.stderr
    host.daemon.stop()
    assert sorted(os.listdir(host.runtime_dir / host.name)) == ["vm"]
    assert forget(host) == f"forgot '{host.name}'\n"
    assert os.listdir(host.runtime_dir) == []
    assert not (OBJECTS / f"coherency-{host.name}").exists()
    assert forget(host) == f"there was nothing to forget of '{host.name}'\n"


def test_a_window_whose_maker_died_too_early_is_completed(tmp_path: Path) -> None:
    """It is a mount already, and not shared yet: a sandbox would not see what the next daemon shows."""
    window = Window(tmp_path / "vm")
    window.path.mkdir()
    syscalls.mount(str(window.path), str(window.path), "none", syscalls.MS_BIND, "")
    try:
        syscalls.mount("none", str(window.path), "none", MS_PRIVATE, "")
        window.open()
        (mount,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {window.path} " in line]
        assert " shared:" in mount
    finally:
        window.close()
    assert list(tmp_path.iterdir()) == []


def test_negative_control_with_a_memfd_nothing_stays(socket_dir: Path) -> None:
    with Host(socket_dir) as host:
        assert not (host.runtime_dir / host.name / "vm").exists()
    assert os.listdir(host.runtime_dir) == []


# --- lower directories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", ["export", "vm"])
def test_a_guest_may_be_told_where_the_export_is_to_be_seen(host: Host, lower: str) -> None:
    guest = host.mount("a", "strict", "--lower", os.fspath(host.runtime_dir / host.name / lower))
    assert (guest / "file").read_text() == "1"
    (host.export / "file").write_text("22")
    assert (guest / "file").stat().st_size == 2
    host.daemon.kill()
    host.serve()

    def is_back() -> bool:
        with contextlib.suppress(OSError):
            return (guest / "file").read_text() == "22"
        return False

    until(is_back)


@pytest.mark.parametrize("mode", ["none", "strict"])
def test_and_is_refused_if_it_is_not_there(host: Host, mode: str, tmp_path: Path) -> None:
    """The very directory that is shared is not the export: changes made there would be nobody's."""
    for lower in (host.share, tmp_path):
        with pytest.raises(AssertionError, match="does not lead to"):
            host.mount("b", mode, "--lower", os.fspath(lower))
    assert host.status()["guests"] == []


def test_a_guest_does_not_hide_its_lower_directory(host: Host) -> None:
    (host.share / "dir").mkdir()
    for mountpoint, why in ((host.export / "dir", "lies in"), (host.runtime_dir, "contains")):
        with pytest.raises(AssertionError, match=why):
            Program(
                host.directory / "refused.log",
                "mount", host.name, mountpoint, "--lower", host.export, "--runtime-dir", host.runtime_dir,
            )  # fmt: skip
