"""A daemon and guests of its own for one benchmark, started through the command line and ended without a trace."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from machine import REPOSITORY, CouldNotMeasure

from coherency import GuestAgent
from coherency.guest_agent.client import fetch_status

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0
_NAME = "bench"


class Served:
    """A context manager: an empty share in a directory of its own, with a daemon; guests come by ``mount`` and ``agent``."""

    def __init__(self, *options: str) -> None:
        """``options``: further ones for ``coherency serve``."""
        self._options = options

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self.directory = Path(tempfile.mkdtemp(prefix="coherency-bench-"))
            undo.callback(self._remove)
            self.share = self.directory / "share"
            self.share.mkdir()
            self.runtime_dir = self.directory / "run"
            self.export = self.runtime_dir / _NAME / "export"
            self._undo = undo
            self._spawn("serve", str(self.share), "--name", _NAME, *self._options)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def mount(self, mode: str, name: str = "") -> Path:
        """A guest in a process of its own; returns where it has mounted the share. It is called like its mode by default."""
        name = name or mode
        mountpoint = self.directory / name
        mountpoint.mkdir()
        self._spawn("mount", _NAME, str(mountpoint), "--cache", mode, "--guest", name)
        return mountpoint

    def agent(self) -> GuestAgent:
        """A guest in this process, without a mount."""
        return self._undo.enter_context(GuestAgent.connect(_NAME, runtime_dir=self.runtime_dir))

    def status(self) -> dict[str, Any]:
        """What ``coherency status --json`` prints."""
        return fetch_status(self.runtime_dir, _NAME)

    def host_trips(self) -> int:
        """Requests that have reached the daemon's export so far."""
        return int(self.status()["requests"])

    def table_allocated_bytes(self) -> int:
        """The memory that the version table takes now; what nobody has looked at yet takes none."""
        return os.stat(self.runtime_dir / _NAME / "table").st_blocks * 512

    def _spawn(self, *arguments: str) -> None:
        search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "coherency", *arguments, "--runtime-dir", str(self.runtime_dir)],
            stdout=subprocess.PIPE, start_new_session=True, env=os.environ | {"PYTHONPATH": search_path},
        )  # fmt: skip
        self._undo.callback(_stop, process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
        if not ready or not process.stdout.readline():
            raise CouldNotMeasure(f"'coherency {arguments[0]}' did not start; what it says stands above")

    def _remove(self) -> None:
        """Never through a mount that could not be unmounted."""
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        left = [path for path in mounts if path.startswith(f"{self.directory}/")]
        if left:
            raise CouldNotMeasure(f"still mounted: {', '.join(left)}; please unmount and remove {self.directory}")
        shutil.rmtree(self.directory)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
