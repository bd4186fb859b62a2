"""One file, served by pyfuse3 (libfuse3's low-level interface in Cython, trio). Hands out the same attributes each time."""

from __future__ import annotations

import os
import sys

import pyfuse3
import trio

FILE_ID = 2


class OneFile(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self._attributes = {
            pyfuse3.ROOT_INODE: _attributes(pyfuse3.ROOT_INODE, os.stat("/")),
            FILE_ID: _attributes(FILE_ID, os.stat(__file__)),
        }

    async def getattr(self, inode, ctx=None):
        return self._attributes[inode]

    async def lookup(self, parent_inode, name, ctx=None):
        return self._attributes[FILE_ID]

    async def open(self, inode, flags, ctx=None):
        return pyfuse3.FileInfo(fh=1)

    async def flush(self, fh):
        pass

    async def release(self, fh):
        pass


def _attributes(inode: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.attr_timeout = entry.entry_timeout = 0
    for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
        setattr(entry, name, getattr(status, name))
    return entry


def main() -> None:
    pyfuse3.init(OneFile(), sys.argv[1], set(pyfuse3.default_options) | {"fsname=with_pyfuse3"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
