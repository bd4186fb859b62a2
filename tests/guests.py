"""A real daemon and real guests in processes of their own, started the way users start them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from coherency.daemon.service import forget
from coherency.guest_agent.api import GuestAgent
from coherency.guest_agent.client import fetch_status

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


class Program:
    """``coherency ARGUMENTS``, ready when the constructor returns. Standard error goes to a file."""

    def __init__(
        self, log: Path, *arguments: str | os.PathLike[str], doom: tuple[str, int] | None = None, **environment: str
    ) -> None:
        """``doom``: where and when it kills itself, see ``tests.doomed``."""
        self.log = log
        module = ["coherency"] if doom is None else ["tests.doomed", doom[0], str(doom[1])]
        environment = {"PYTHONPATH": str(ROOT)} | environment
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, *(os.fspath(each) for each in arguments)],
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True, env=os.environ | environment,
            )  # fmt: skip
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT_S)
        self.ready_line = os.fsdecode(self.process.stdout.readline()) if readable else ""
        if not self.ready_line:
            self.kill()
            raise AssertionError(f"{arguments} did not get ready:\n{self.logged()}")

    def logged(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.process.args!r} did not end:\n{self.logged()}") from None
        finally:
            self._close()

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)
        self._close()

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            self._close()

    def wait_until_killed(self) -> None:
        """Of a doomed one."""
        assert self.process.wait(STOP_TIMEOUT_S) == -signal.SIGKILL, self.logged()
        self._close()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


class Host:
    """One share with its daemon, and guests to come and go. A context manager that ends all of them."""

    def __init__(self, directory: Path, *serve_options: str, name: str = "test") -> None:
        """``directory``: short (sockets lie below it), empty; ``serve_options`` go to ``coherency serve``."""
        self.directory, self.name, self.serve_options = directory, name, serve_options
        self.share = directory / "share"
        self.runtime_dir = directory / "run"
        self.export = self.runtime_dir / name / "export"
        self.share.mkdir(exist_ok=True)
        self.guests: dict[str, Program] = {}

    def __enter__(self) -> Self:
        self.serve()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.ExitStack() as undo:
            if "posix" in self.serve_options:
                undo.callback(forget, self.runtime_dir, self.name)  # what it has kept for virtual machines
            undo.callback(self.daemon.stop)
            for guest in self.guests.values():
                undo.callback(guest.stop)

    def serve(self, *, doom: tuple[str, int] | None = None) -> None:
        """Start the daemon (again)."""
        self.daemon = Program(
            self.directory / "serve.log",
            "serve", self.share, "--name", self.name, "--runtime-dir", self.runtime_dir, *self.serve_options, doom=doom,
        )  # fmt: skip

    def mount(self, guest: str, cache: str = "access", *options: str, doom: tuple[str, int] | None = None) -> Path:
        """Mount a guest (again); returns where."""
        mountpoint = self.directory / guest
        with contextlib.suppress(FileExistsError):  # exist_ok would stat it, which the mount of a killed guest refuses
            mountpoint.mkdir()
        self.guests[guest] = Program(
            self.directory / f"{guest}.log",
            "mount", self.name, mountpoint, "--cache", cache, "--guest", guest, "--runtime-dir", self.runtime_dir,
            *options, doom=doom,
        )  # fmt: skip
        return mountpoint

    def agent(self) -> GuestAgent:
        """A GuestAgent in this process."""
        return GuestAgent.connect(self.name, runtime_dir=self.runtime_dir)

    def status(self) -> dict[str, Any]:
        return fetch_status(self.runtime_dir, self.name)

    def host_trips(self) -> int:
        """Requests that have reached the export so far."""
        return int(self.status()["requests"])
