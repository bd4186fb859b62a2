"""Short questions and preparations that many scenarios have in common."""

import os
import stat
import time
from pathlib import Path
from typing import Final

_CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h


def mode(path: Path | int) -> int:
    """Permissions, set-id and sticky bits."""
    return stat.S_IMODE(os.lstat(path).st_mode if isinstance(path, Path) else os.fstat(path).st_mode)


def owner(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def links(path: Path | int) -> int:
    return os.lstat(path).st_nlink if isinstance(path, Path) else os.fstat(path).st_nlink


def made(path: Path, bits: int, uid: int = 0, gid: int = 0, content: bytes = b"") -> Path:
    """A file, or a directory if ``bits`` say so, of exactly this mode and owner."""
    if stat.S_ISDIR(bits):
        path.mkdir()
    else:
        path.write_bytes(content)
    os.chown(path, uid, gid)
    os.chmod(path, stat.S_IMODE(bits))
    return path


def wait_for_a_later_time(*paths: Path) -> None:
    """Until the clock that file systems take times from is later than all times of the objects."""
    newest = max(max(status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns) for status in map(os.lstat, paths))
    deadline = time.monotonic() + 30
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= newest:
        assert time.monotonic() < deadline, "the clock stands still, or the objects are of the future"
        time.sleep(0.001)
