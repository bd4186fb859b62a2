"""One GETATTR, answered by ``coherency.fuse``, by pyfuse3 and by mfusepy: the figures of docs/decisions/0001-own-fuse-session.md.

Every server has a process and a mount of its own and serves one file whose attributes the kernel may not keep, so each
``os.fstat`` of the open file is exactly one GETATTR. They are measured in turns (see ``rounds``). Beside them stand the
two floors: a bare loop in Python, and a C program on libfuse3.

    python benchmarks/fuse_libraries.py [--rounds N] [--json] [--environment DIRECTORY]

What it needs is installed: Debian packages by apt-get, pyfuse3 and mfusepy from PyPI into a virtual environment in
DIRECTORY. A server whose library cannot be had is reported as such, and the others are measured.

Exit codes: 0 measured, 1 could not measure, 2 impossible options. Needs root and /dev/fuse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import REPOSITORY, CouldNotMeasure, describe, load_average, require_fuse
from rounds import calls_per_block, end_progress, interleave, ratio, show_progress, time_calls

SERVERS = Path(__file__).resolve().parent / "fuse_servers"
ENVIRONMENT = REPOSITORY / "build" / "fuse-libraries"
REQUIREMENTS = {"pyfuse3": "pyfuse3==3.5.0", "mfusepy": "mfusepy==3.1.1"}
# What the package is needed for, by a file that it brings.
DEBIAN_PACKAGES = {
    "gcc": Path("/usr/bin/gcc"),
    "pkg-config": Path("/usr/bin/pkg-config"),
    "libfuse3-dev": Path("/usr/include/fuse3/fuse_lowlevel.h"),
}
MFUSEPY, MFUSEPY_ONE = "mfusepy", "mfusepy, one thread"
OWN, OWN_ONE, OWN_QUICK = "coherency.fuse", "coherency.fuse, one thread", "coherency.fuse, quick"
BARE, C = "bare loop in Python", "C, libfuse3"

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_INSTALL_TIMEOUT_S = 900


@dataclass(frozen=True)
class Server:
    """A program that serves the file system on the mount point it gets as its argument."""

    name: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


class NotAvailable(Exception):
    """One server cannot be measured here; the message says why."""


def install_debian_packages() -> None:
    missing = [package for package, file in DEBIAN_PACKAGES.items() if not file.exists()]
    if missing:
        show_progress(f"installing {' '.join(missing)}")
        script = str(REPOSITORY / "scripts" / "install-debian")
        # Without them the servers that need them are reported as not available.
        subprocess.run([script, "to compare FUSE libraries", *missing], stdout=sys.stderr, check=False)


def virtual_environment(directory: Path) -> Path:
    """The interpreter of an environment made from the one that runs this, so that all servers run on the same Python."""
    python = directory / "bin" / "python"
    if not python.exists():
        show_progress(f"making {directory}")
        _run([sys.executable, "-m", "venv", "--clear", str(directory)])
    return python


def library_server(name: str, library: str, directory: Path, *arguments: str) -> Server:
    python = virtual_environment(directory)
    try:
        _run([str(python), "-c", f"import {library}"])
    except NotAvailable:
        show_progress(f"installing {REQUIREMENTS[library]}")
        _run([str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", REQUIREMENTS[library]])
    command = (str(python), str(SERVERS / f"with_{library}.py"), *arguments)
    return Server(name, command, (("FUSE_LIBRARY_PATH", "libfuse3.so.3"),))  # the same C library for both


def c_server(directory: Path) -> Server:
    show_progress("compiling libfuse3.c")
    program = directory / "libfuse3"
    flags = _run(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
    _run(["gcc", "-O2", "-Wall", "-o", str(program), str(SERVERS / "libfuse3.c"), *flags])
    return Server(C, (str(program),))


def own_server(name: str, script: str, *arguments: str) -> Server:
    search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return Server(name, (sys.executable, str(SERVERS / script), *arguments), (("PYTHONPATH", search_path),))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in str(error.stderr or error.stdout).splitlines() if line.strip()]
        raise NotAvailable(f"{command[0]} failed: {lines[-1].strip() if lines else error.returncode}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(str(error)) from error
    return done.stdout


class Mounted:
    """A context manager: the server's file, open."""

    def __init__(self, server: Server, directory: Path) -> None:
        self._server = server
        self._mountpoint = directory / server.name.replace(" ", "-")

    def __enter__(self) -> int:
        self._mountpoint.mkdir()
        environment = os.environ | dict(self._server.environment)
        command = [*self._server.command, str(self._mountpoint)]
        self._process = subprocess.Popen(command, stdout=sys.stderr, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not self._is_mounted():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise NotAvailable("its server did not mount; what it says stands above")
                time.sleep(0.01)
            # A server that does not answer would hold us for ever: then the connection is cut.
            guard = threading.Timer(_START_TIMEOUT_S, self._unmount, ("-f",))
            guard.start()
            try:
                self._file = os.open(self._mountpoint / "file", os.O_RDONLY)
                os.fstat(self._file)
            except OSError as error:
                raise NotAvailable(f"its server does not serve: {error.strerror}") from error
            finally:
                guard.cancel()
        except BaseException:
            self._end()
            raise
        return self._file

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)
        self._end()

    def _end(self) -> None:
        if self._is_mounted():
            self._unmount("-l")
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_mounted(self) -> bool:
        return f" {self._mountpoint} " in Path("/proc/self/mountinfo").read_text()

    def _unmount(self, how: str) -> None:
        subprocess.run(["umount", how, str(self._mountpoint)], stdout=sys.stderr, check=False)


def measure(rounds: int, environment: Path) -> dict[str, Any]:
    """The JSON document."""
    require_fuse()
    install_debian_packages()
    directory = Path(tempfile.mkdtemp(prefix="coherency-fuse-"))
    candidates: dict[str, Callable[[], Server]] = {
        OWN: lambda: own_server(OWN, "own_session.py", "ordinary"),
        OWN_ONE: lambda: own_server(OWN_ONE, "own_session.py", "alone"),
        OWN_QUICK: lambda: own_server(OWN_QUICK, "own_session.py", "quick"),
        "pyfuse3": lambda: library_server("pyfuse3", "pyfuse3", environment),
        MFUSEPY: lambda: library_server(MFUSEPY, "mfusepy", environment, "several"),
        MFUSEPY_ONE: lambda: library_server(MFUSEPY_ONE, "mfusepy", environment, "one"),
        BARE: lambda: own_server(BARE, "bare_loop.py"),
        C: lambda: c_server(directory),
    }
    unavailable: dict[str, str] = {}
    try:
        with contextlib.ExitStack() as undo:
            machine = describe(directory)
            subjects: dict[str, Callable[[int], float]] = {}
            for name, make in candidates.items():
                try:
                    file = undo.enter_context(Mounted(make(), directory))
                except NotAvailable as error:
                    unavailable[name] = str(error)
                else:
                    subjects[name] = _timer(file)
            if OWN in unavailable:
                raise CouldNotMeasure(f"{OWN}: {unavailable[OWN]}")
            figures = interleave(subjects, rounds, "one GETATTR")
    finally:
        if not any(f" {directory}/" in line for line in Path("/proc/self/mountinfo").read_text().splitlines()):
            shutil.rmtree(directory)
    end_progress()
    results = {}
    for name, series in figures.items():
        results[name] = {
            "median_ns": round(statistics.median(series)),
            "lowest_ns": round(min(series)),
            "times_own": round(ratio(series, figures[OWN]), 3),
        }
    return {
        "machine": machine | {"load average at the end": load_average()},
        "libraries": REQUIREMENTS,
        "rounds": rounds,
        "getattr": results,
        "not_available": unavailable,
    }


def _timer(file: int) -> Callable[[int], float]:
    count = calls_per_block(os.fstat, file)

    def block(_: int) -> float:
        time_calls(os.fstat, file, max(10, count // 20))
        return time_calls(os.fstat, file, count)

    return block


def print_report(document: dict[str, Any]) -> None:
    for name, value in (document["machine"] | {"rounds": document["rounds"]}).items():
        print(f"{name:24} {value}")
    print(f"{'libraries':24} {', '.join(document['libraries'].values())}")
    print(f"\n{'one GETATTR':28}{'ns':>10}{'lowest':>10}{'x ' + OWN:>20}")
    for name, result in document["getattr"].items():
        print(f"{name:28}{result['median_ns']:>10}{result['lowest_ns']:>10}{result['times_own']:>20.2f}")
    for name, reason in document["not_available"].items():
        print(f"{name:28}not measured: {reason}")


def main() -> int:
    parser = argparse.ArgumentParser(description="One GETATTR through coherency.fuse, pyfuse3 and mfusepy.")
    parser.add_argument("--rounds", type=int, default=101, help="how often each server has its turn (default: 101)")
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of a table")
    parser.add_argument(
        "--environment",
        type=Path,
        default=ENVIRONMENT,
        help=f"where the libraries are installed (default: {ENVIRONMENT})",
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        document = measure(options.rounds, options.environment)
    except (CouldNotMeasure, OSError) as error:
        end_progress()
        print(f"fuse_libraries: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print_report(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
