"""A test session that leaves a mount behind fails, says which, and cleans up."""

from pathlib import Path

import pytest

from tests import mounts
from tests.t3_process.test_guards import inner, run, write

__all__ = ["inner"]

# A mount whose server never answers: the kernel makes it, and waits for nobody unless it is touched.
LEAKING_TEST = """
import ctypes, os, pytest
libc = ctypes.CDLL(None, use_errno=True)

def mount(directory, kind):
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"test", os.fsencode(directory), kind, 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    return fd

def test_tidy(socket_dir):
    mount(socket_dir, b"fuse.coherency")
    assert libc.umount2(os.fsencode(socket_dir), 2) == 0

def test_leaks(DIRECTORY):
    mount(DIRECTORY, b"fuse.coherency-export")

def test_later():
    pass
"""


@pytest.mark.parametrize("processes", [[], ["--numprocesses=2"]])
@pytest.mark.parametrize("directory", ["socket_dir", "tmp_path"])
def test_mount_left_behind_fails_the_session_and_is_unmounted(
    inner: pytest.Pytester, directory: str, processes: list[str]
) -> None:
    write(inner, "t4_fuse/test_a.py", LEAKING_TEST.replace("DIRECTORY", directory))
    result = run(inner, *processes)
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    (line,) = [line for line in result.outlines if "first seen after" in line]
    assert line.endswith("(fuse.coherency-export), first seen after t4_fuse/test_a.py::test_leaks")
    assert Path(line.split(" ")[0]) not in [mount.mountpoint for mount in mounts.coherency_mounts_below([Path("/")])]


def test_session_without_a_leak_passes(inner: pytest.Pytester) -> None:
    write(inner, "t4_fuse/test_a.py", LEAKING_TEST.replace("DIRECTORY", "socket_dir"))
    result = run(inner, "-k", "not leaks")
    result.assert_outcomes(passed=2, deselected=1)
    assert result.ret == pytest.ExitCode.OK


def test_interrupted_session_still_unmounts_what_its_fixtures_made(inner: pytest.Pytester) -> None:
    interrupted = """
@pytest.fixture(scope="session")
def mounted(make_socket_dir):
    directory = make_socket_dir()
    mount(directory, b"fuse.coherency")
    yield
    print("unmounted by its fixture:", libc.umount2(os.fsencode(directory), 2) == 0)

def test_interrupted(mounted):
    raise KeyboardInterrupt
"""
    write(inner, "t4_fuse/test_a.py", LEAKING_TEST.partition("def test_tidy")[0] + interrupted)
    result = run(inner, "-s")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*unmounted by its fixture: True"])
    result.stdout.no_fnmatch_line("*mounts left behind*")


def test_directory_with_an_old_mount_is_not_deleted_through_it(inner: pytest.Pytester, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write(inner, "t4_fuse/test_a.py", LEAKING_TEST.replace("DIRECTORY", "socket_dir"))
    mount_there = LEAKING_TEST.partition("def test_tidy")[0] + f"mount({str(base)!r}, b'fuse.coherency')"
    inner.runpython(inner.makepyfile(mount_there=mount_there))
    assert [mount.mountpoint for mount in mounts.coherency_mounts_below([base])] == [base]

    refused = run(inner, f"--basetemp={base}", "-k", "later")
    assert refused.ret == 1
    refused.stderr.fnmatch_lines([f"*mounts of an earlier session*{base}"])
    assert mounts.coherency_mounts_below([base]) == []
    assert run(inner, f"--basetemp={base}", "-k", "later").ret == pytest.ExitCode.OK
