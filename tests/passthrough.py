"""Mounts of a passthrough, served by a child process: the test process is a user like any other."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar, Self

from tests import mounts, passthrough_server

TIMEOUT_S = 30.0


class Served:
    """``directory`` as seen through ``mountpoint``. A context manager; nothing may have been logged when it ends."""

    server: ClassVar[ModuleType] = passthrough_server  # what serves it, with its ``Options``
    descriptor_options: ClassVar[tuple[str, ...]] = ()  # options that are descriptors, which it inherits

    def __init__(self, directory: Path, mountpoint: Path, *, log: Path, **options: Any) -> None:
        self.directory, self.mountpoint, self._log = directory, mountpoint, log
        self.logs_expected = False
        self.writeback = bool(options.get("kernel_cache", {}).get("writeback"))
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.server.__name__, directory, mountpoint, json.dumps(asdict(self.server.Options(**options)))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                pass_fds=[value for name, value in options.items() if name in self.descriptor_options],
            )  # fmt: skip
        self._answer("start")

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of the server."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer(method)

    def _answer(self, question: str) -> Any:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        line = self.process.stdout.readline() if readable else ""
        assert line, f"no answer to {question}:\n{self._log.read_text()}"
        result, error = json.loads(line)
        assert error is None, f"{question}: {error}\n{self._log.read_text()}"
        return result

    def statistic(self, name: str) -> int:
        return int(self.ask("statistics")[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(OSError):
                mounts.detach(self.mountpoint)
            raise
        finally:
            self.process.stdout.close()
        logged = self._log.read_text()
        assert self.logs_expected or not logged, logged
        assert self.process.returncode == 0


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what is going to happen."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def serve(directory: Path, **options: Any) -> Served:
    """A new empty share and its mount, below ``directory``."""
    share, mountpoint = directory / "share", directory / "mounted"
    share.mkdir()
    mountpoint.mkdir()
    return Served(share, mountpoint, log=directory / "server.log", **options)
