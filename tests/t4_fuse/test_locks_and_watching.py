"""A program on the host and a guest share a file by locks, and the program writes directly in the share."""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherency.daemon import watch
from coherency.daemon.service import Service, ServiceOptions
from coherency.guest_agent.mount import GuestMount, MountOptions
from tests.granting_guest import Gate, InBackground

REWRITE = 'import sys; open(sys.argv[1], "r+").write("new")'
"""In a process of its own: what the daemon's does is the daemon's doing."""


@contextlib.contextmanager
def served(directory: Path) -> Iterator[Service]:
    (directory / "share").mkdir()
    with contextlib.ExitStack() as undo:
        service = Service(ServiceOptions(directory / "share", "test", directory / "run"))
        service.start()
        undo.callback(service.close)
        yield service


@contextlib.contextmanager
def guest_of(directory: Path, mode: str) -> Iterator[Path]:
    (directory / "guest").mkdir()
    mount = GuestMount(MountOptions("test", directory / "guest", directory / "run", mode))
    mount.start()
    try:
        yield directory / "guest"
    finally:
        mount.close()


@pytest.mark.parametrize("mode", ["access", "strict"])
@pytest.mark.parametrize("caught_up", [True, False])
def test_who_has_got_a_lock_reads_what_was_written_directly_before(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str, caught_up: bool
) -> None:
    """Negative control: without catching up the lock comes before what was written has been noticed."""
    monkeypatch.setattr(watch, "_CATCH_UP_S", 60)
    gate = Gate()
    with served(socket_dir) as service, guest_of(socket_dir, mode) as guest:
        assert service.watcher is not None
        assert service.export is not None
        (guest / "file").write_text("old")
        with open(guest / "file", "rb", buffering=0) as file:
            for _ in range(3):  # until nothing is new to anybody
                fcntl.flock(file, fcntl.LOCK_SH)
                assert os.pread(file.fileno(), 9, 0) == b"old"
                fcntl.flock(file, fcntl.LOCK_UN)
            service.watcher.reach = lambda point: gate.pass_through() if point == "read" else None
            if not caught_up:
                service.export.catch_up = lambda: None
            gate.shut()
            try:
                subprocess.run([sys.executable, "-c", REWRITE, socket_dir / "share/file"], check=True)
                gate.await_reached()
                lock = InBackground(lambda: fcntl.flock(file, fcntl.LOCK_SH))
                if caught_up:
                    assert not lock.is_over
                    gate.open()
                lock.wait()
                assert os.pread(file.fileno(), 9, 0) == (b"new" if caught_up else b"old")
            finally:
                gate.open()
