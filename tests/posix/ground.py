"""Where scenarios take place: an ext4 file system of its own, a share in it, and the mounts of the share."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

from tests.guests import Host
from tests.posix import directories, names

LOCAL: Final = "ext4"
LOCAL_AGAIN: Final = "ext4-again"
EXPORT: Final = "export"
_IMAGE_BYTES: Final = 512 << 20  # sparse
_TIMEOUT_S: Final = 60
# A file that looks as if it had all the names that it can have, which would take long to make.
_MOST_LINKED: Final = """\
mkdir {directory}
cd /{directory}
write /dev/null {file}
set_inode_field {file} links_count {count}
cd /
"""


class Ground:
    """Places by name: ``ext4``, a plain directory, and ``ext4-again``, where it is mounted a second time; ``export``; else a
    guest, called by its mode, or by ``MODE-something``."""

    def __init__(self, places: dict[str, Path], host: Host) -> None:
        self._places, self._host, self._numbers = places | {EXPORT: host.export}, host, count()

    def place(self, name: str) -> Path:
        """A guest is mounted when it is asked for first."""
        if name not in self._places:
            self._places[name] = self._host.mount(name, name.partition("-")[0])
        return self._places[name]

    def directory(self, purpose: str, *places: str) -> list[Path]:
        """A new empty directory, in which everybody may do everything, as seen in each of the places."""
        name = f"{purpose[:40]}-{next(self._numbers)}"
        found = [self.place(place) / name for place in places]
        found[0].mkdir()
        found[0].chmod(0o777)
        return found


@contextlib.contextmanager
def new_ground(root: Path) -> Iterator[Ground]:
    """``root``: an empty directory with a short path, on which ext4 is mounted meanwhile.

    Not a directory of this machine: who knows what it is on, and how that is mounted.
    """
    image = root.with_suffix(".ext4")
    with open(image, "wb") as file:
        os.truncate(file.fileno(), _IMAGE_BYTES)
    with contextlib.ExitStack() as undo:
        undo.callback(image.unlink)
        _run("mkfs.ext4", "-q", "-F", "-I", "256", "-b", "4096", image)
        for name in ("plain", "share"):
            commands = _MOST_LINKED.format(directory=name, file=names.MOST_LINKED, count=names.LINK_MAX)
            _run("debugfs", "-w", "-f", "-", image, text=commands)
        _run("mount", "-o", "loop,relatime", image, root)
        undo.callback(_run, "umount", "--lazy", root)
        host = Host(root)
        plain, again = root / "plain", root / "again"
        again.mkdir()
        for directory in (plain, host.share):
            directories.prepare(directory)
        _run("mount", "--bind", plain, again)
        undo.callback(_run, "umount", "--lazy", again)
        with host:
            yield Ground({LOCAL: plain, LOCAL_AGAIN: again}, host)


def _run(*command: str | Path, text: str = "") -> None:
    subprocess.run(command, check=True, timeout=_TIMEOUT_S, input=text, text=True, capture_output=True)
