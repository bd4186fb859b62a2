"""The machine a benchmark runs on: whether it can be measured at all, and what has to stand beside the figures."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


class CouldNotMeasure(Exception):
    """There are no figures, for the reason given. The script prints it and exits with 1."""


def require_fuse() -> None:
    """Raise :class:`CouldNotMeasure` unless this process can make FUSE mounts."""
    if os.geteuid() != 0:
        raise CouldNotMeasure("mounting needs root")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        raise CouldNotMeasure(f"cannot open /dev/fuse ({error.strerror}): is the fuse module loaded?") from error


def describe(directory: Path) -> dict[str, str]:
    """What the figures depend on. ``directory``: where the share lies."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "kernel": platform.release(),
        "processor": f"{os.cpu_count()} x {_processor()}",
        "python": f"{platform.python_version()}, {_python_build()}",
        "share on": _file_system(directory),
        "load average": load_average(),
    }


def load_average() -> str:
    """Over the last minute: what else was running. Well above 1 means that the figures are too high."""
    return f"{os.getloadavg()[0]:.1f}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", REPOSITORY, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "coherency")
        return git("rev-parse", "--short", "HEAD") + (" with changes that are not committed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _python_build() -> str:
    optimised = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
    return "built with --enable-optimizations" if optimised else "built without --enable-optimizations"


def _file_system(directory: Path) -> str:
    """The type of the file system that ``directory`` lies on."""
    path, longest, kind = os.path.realpath(directory), -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        at = fields[4].rstrip("/")
        if (path + "/").startswith(at + "/") and len(at) >= longest:
            longest, kind = len(at), fields[fields.index("-") + 1]
    return kind
