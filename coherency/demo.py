"""The demonstration: a real daemon and two real guests over a copy of Python's standard library.

What happens is told as steps; how it looks is up to the command line. Host trips are counted by the daemon: requests that
reached its export while the watching guest was looking.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from coherency.errors import CoherencyError
from coherency.guest_agent.client import fetch_status

_START_TIMEOUT_S: Final = 20.0
_STOP_TIMEOUT_S: Final = 10.0
_NAME: Final = "demo"
_SKIPPED: Final = shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "test", "tests", "config-*")


@dataclass(frozen=True)
class Step:
    """One thing that guest A did, and what guest B saw then."""

    what: str
    seen: str
    stale: int  # answers of B that differ from the share
    host_trips: int
    milliseconds: float


class Demo:
    """A context manager that has everything running; ``run`` tells the story. Leaves nothing behind."""

    def __init__(self, *, live_dangerously: bool) -> None:
        self._live_dangerously = live_dangerously
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="coherency-demo-")))
            self._share = self._directory / "share"
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def run(self, tell: Callable[[str], None]) -> Iterator[Step]:
        """Every step as it happens; ``tell`` gets what goes on in between."""
        library = sysconfig.get_paths()["stdlib"]
        tell(f"copying {library} ...")
        shutil.copytree(library, self._share, symlinks=True, ignore=_SKIPPED)
        tell("starting one daemon and two guests (--cache strict) ...")
        flags = ["--live-dangerously", "no-recalls"] if self._live_dangerously else []
        self._spawn("serve", str(self._share), "--name", _NAME, *flags)
        a, b = (self._mount(name) for name in ("guest-a", "guest-b"))

        yield self._look("guest B walks the tree for the first time", b, self._compare)
        yield self._look("guest B walks it again: nothing has changed", b, self._compare)

        target = Path("json/decoder.py")
        with open(a / target, "a") as file:
            file.write("# edited by guest A\n")
        yield self._look(f"guest A appends a line to {target}", b, lambda root: self._compare_one(root, target))
        yield self._look("guest B walks everything", b, self._compare)

        (a / "new").mkdir()
        (a / "new/file.txt").write_text("made by guest A\n")
        yield self._look("guest A creates new/file.txt", b, lambda root: self._compare_one(root, Path("new/file.txt")))
        (a / target).chmod(0o600)
        yield self._look(f"guest A makes {target} private", b, lambda root: self._compare_one(root, target))
        (a / "json/tool.py").rename(a / "new/moved.py")
        yield self._look("guest A renames json/tool.py to new/moved.py", b, self._compare)
        shutil.rmtree(a / "email")
        yield self._look("guest A removes the whole directory email", b, self._compare)
        yield self._look("guest B walks it once more: nothing has changed", b, self._compare)

    def _spawn(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "coherency", *arguments, "--runtime-dir", str(self._directory / "run")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env=_environment())
        self._undo.callback(_stop, process)
        if not _first_line(process):
            raise CoherencyError(f"'coherency {' '.join(arguments[:1])}' did not start; what it says stands above")

    def _mount(self, name: str) -> Path:
        mountpoint = self._directory / name
        mountpoint.mkdir()
        self._spawn("mount", _NAME, str(mountpoint), "--cache", "strict", "--guest", name)
        return mountpoint

    def _requests(self) -> int:
        return int(fetch_status(self._directory / "run", _NAME)["requests"])

    def _look(self, what: str, root: Path, look: Callable[[Path], tuple[str, int]]) -> Step:
        before, start_ns = self._requests(), time.perf_counter_ns()
        seen, stale = look(root)
        milliseconds = (time.perf_counter_ns() - start_ns) / 1e6
        return Step(what, f"guest B sees {seen}", stale, self._requests() - before, milliseconds)

    def _compare_one(self, root: Path, path: Path) -> tuple[str, int]:
        mine, truth = _facts(root / path), _facts(self._share / path)
        return _describe(mine), int(mine != truth)

    def _compare(self, root: Path) -> tuple[str, int]:
        mine = dict(_tree(root))
        truth = dict(_tree(self._share))
        stale = sum(mine.get(path) != truth.get(path) for path in mine.keys() | truth.keys())
        return f"{len(mine)} files and directories", stale


def _tree(root: Path) -> Iterator[tuple[str, Any]]:
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            yield os.path.relpath(path, root), _facts(Path(path))


def _facts(path: Path) -> tuple[int, ...] | None:
    """All that a stat tells, but for the device and the time of the last access."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns


def _describe(facts: tuple[int, ...] | None) -> str:
    return "no such file" if facts is None else f"{facts[5]} bytes, {stat.filemode(facts[1])}"


def _environment() -> dict[str, str]:
    """The children run this very package, installed or not."""
    package_parent = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))}


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    """What a child prints when it is ready; empty if it ends, or takes too long."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
    return process.stdout.readline() if ready else b""


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
