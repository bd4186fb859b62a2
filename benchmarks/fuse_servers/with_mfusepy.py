"""One file, served by mfusepy (libfuse's high-level interface through ctypes). Hands out the same attributes each time.

    with_mfusepy.py one|several MOUNTPOINT

With one thread an operation that waits holds up all others; several is what libfuse does by itself.
"""

from __future__ import annotations

import os
import sys

import mfusepy


class OneFile(mfusepy.Operations):
    use_ns = True

    def __init__(self) -> None:
        self._attributes = {"/": _attributes(os.stat("/")), "/file": _attributes(os.stat(__file__))}

    def getattr(self, path, fh=None):
        return self._attributes[path]

    def open(self, path, flags):
        return 1

    def flush(self, path, fh):
        return 0

    def release(self, path, fh):
        return 0


def _attributes(status: os.stat_result) -> dict[str, int]:
    names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")
    times = ("st_atime", "st_mtime", "st_ctime")
    return {name: getattr(status, name) for name in names} | {name: getattr(status, f"{name}_ns") for name in times}


def main() -> None:
    threads, mountpoint = sys.argv[1:]
    mfusepy.FUSE(OneFile(), mountpoint, foreground=True, nothreads=threads == "one", attr_timeout=0, entry_timeout=0)


if __name__ == "__main__":
    main()
