"""The window: what virtiofsd serves, so that it and its virtual machines outlive the daemon.

A virtiofsd that serves an export has nothing in its hands but a dead mount when the daemon has ended, and a virtual machine
cannot be given another one. So it serves the window: a directory in which each daemon of the name shows its export in its turn.

Rules:

1. The window is a mount of its own directory on itself, and shared: what is mounted in it afterwards is seen in copies of this mount
   namespace, too, as the sandbox of virtiofsd is one, wherever the host keeps its mounts to itself.
2. There is nothing in it but ``export``.
3. It outlives the daemon, as the POSIX table does; `close` is for who forgets the name.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from coherency.errors import MountError
from coherency.fuse import syscalls
from coherency.fuse.mounts import mount_at
from coherency.rendezvous import EXPORT_DIRECTORY_NAME

_MODE: Final = 0o750


class Window:
    """At `path`, a directory of the daemon's own; nothing exists before `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.export = path / EXPORT_DIRECTORY_NAME
        """Where the export is to be shown."""

    def open(self) -> None:
        """Make it, or take over that of a predecessor, without what that has shown.  Raises `MountError` and `OSError`."""
        self.path.mkdir(mode=_MODE, exist_ok=True)
        self._empty()
        try:
            if mount_at(self.path) is None:
                syscalls.mount(str(self.path), str(self.path), "none", syscalls.MS_BIND, "")
            # Also of a predecessor's, which may have died in between.
            syscalls.mount("none", str(self.path), "none", syscalls.MS_SHARED, "")
        except OSError as error:
            raise MountError(f"cannot mount on {self.path}: {error.strerror} (mounting needs CAP_SYS_ADMIN)") from error
        self.export.mkdir(mode=_MODE, exist_ok=True)

    def close(self) -> None:
        """Remove it: who serves it has an empty directory.  Nothing happens if there is none."""
        self._empty()
        with contextlib.suppress(FileNotFoundError):
            self.export.rmdir()
        while mount_at(self.path) is not None:
            syscalls.umount(str(self.path), syscalls.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

    def _empty(self) -> None:
        while mount_at(self.export) is not None:
            syscalls.umount(str(self.export), syscalls.MNT_DETACH)
