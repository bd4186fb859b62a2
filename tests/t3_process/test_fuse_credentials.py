"""Who a thread is when it creates something, whatever it was before and whoever started it."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coherency.fuse import syscalls
from coherency.fuse.credentials import Credentials

USER = (1001, 1002)


def in_a_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(function).result(20)


def created(path: Path) -> tuple[int, int, int]:
    path.touch(0o666)
    status = path.stat()
    return status.st_uid, status.st_gid, status.st_mode & 0o777


def test_files_belong_to_whoever_the_thread_is(tmp_path: Path) -> None:
    credentials = Credentials()

    def work() -> None:
        for number, (ids, umask) in enumerate([(USER, 0o27), (USER, 0), ((0, 0), 0o77), ((0, 5), 0o77), (USER, 0o77)]):
            credentials.become(*ids, umask)
            assert created(tmp_path / str(number)) == (*ids, 0o666 & ~umask)

    in_a_thread(work)


def test_a_thread_does_not_take_over_who_started_it(tmp_path: Path) -> None:
    credentials = Credentials()

    def child() -> None:
        assert created(tmp_path / "before")[:2] == USER  # negative control: it would
        credentials.become(0, 0, 0o22)
        assert created(tmp_path / "after") == (0, 0, 0o644)

    def parent() -> None:
        credentials.become(*USER, 0)
        in_a_thread(child)
        assert created(tmp_path / "parent") == (*USER, 0o666)

    in_a_thread(parent)


def test_the_thread_that_makes_them_and_the_process_stay_as_they_are(tmp_path: Path) -> None:
    before = os.umask(0o22)
    try:
        credentials = Credentials()
        in_a_thread(lambda: credentials.become(*USER, 0o77))
        assert created(tmp_path / "here") == (0, 0, 0o644)
        assert b"\nUmask:\t0022\n" in Path("/proc/thread-self/status").read_bytes()
    finally:
        os.umask(before)


def test_capabilities_stay(tmp_path: Path) -> None:
    """The kernel of the mount has checked the caller; what is to be done must not fail again, for want of its groups."""
    (tmp_path / "closed").mkdir(mode=0o700)
    credentials = Credentials()

    def work() -> None:
        credentials.become(*USER, 0)
        assert created(tmp_path / "closed/x")[:2] == USER
        os.chown(tmp_path / "closed/x", 3, 4)

    in_a_thread(work)


def test_half_a_change_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = Credentials()

    def fail(uid: int, gid: int) -> None:
        syscalls._setfsgid(gid)
        raise PermissionError

    def work() -> None:
        credentials.become(0, 0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "set_fs_ids", fail)
            with pytest.raises(PermissionError):
                credentials.become(*USER, 0)
        credentials.become(0, 0, 0)
        assert created(tmp_path / "x")[:2] == (0, 0)

    in_a_thread(work)


CAP_SYS_BOOT = 22


def capabilities() -> int:
    """Of the calling thread."""
    (line,) = [line for line in Path("/proc/thread-self/status").read_text().splitlines() if line.startswith("CapEff")]
    return int(line.split()[1], 16)


def test_a_capability_is_dropped_by_a_thread_and_those_that_it_starts() -> None:
    before, seen = capabilities(), list[int]()

    def drop() -> None:
        syscalls.drop_capability(CAP_SYS_BOOT)
        seen.append(capabilities())
        child = threading.Thread(target=lambda: seen.append(capabilities()))
        child.start()
        child.join()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert before & 1 << CAP_SYS_BOOT
    assert seen == [before & ~(1 << CAP_SYS_BOOT)] * 2
    assert capabilities() == before
