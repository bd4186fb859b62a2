"""What a tree looks like to whoever asks the kernel, in a form that can be compared."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Facts(NamedTuple):
    """All of one object that an application can ask for, but the device number and the time of the last access."""

    inode: int
    mode: str
    links: int
    owner: tuple[int, int]
    size: int | None
    device: int
    mtime_ns: int
    ctime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]
    content: str  # a hash, or the target of a symlink

    def portable(self) -> Facts:
        """Without what a copy cannot have in common with its original."""
        size = None if self.mode.startswith("d") else self.size  # how big a directory is depends on its history
        return self._replace(inode=0, ctime_ns=0, size=size)

    def timeless(self) -> Facts:
        """Without what differs between two copies made one after the other."""
        return self.portable()._replace(mtime_ns=0)


def snapshot(root: str | os.PathLike[str]) -> dict[bytes, Facts]:
    """Facts of everything below ``root``, and of itself, by relative path. Symlinks are not followed."""
    top = os.fsencode(root)
    found = {b".": facts(top)}
    for directory, names, files in os.walk(top, onerror=_fail):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            found[os.path.relpath(path, top)] = facts(path)
    return found


def facts(path: str | bytes | os.PathLike[str]) -> Facts:
    status = os.lstat(path)
    return Facts(
        status.st_ino,
        stat.filemode(status.st_mode),
        status.st_nlink,
        (status.st_uid, status.st_gid),
        status.st_size,
        status.st_rdev,
        status.st_mtime_ns,
        status.st_ctime_ns,
        tuple(
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        ),
        _content(path, status.st_mode),
    )


def portable(tree: Mapping[bytes, Facts]) -> dict[bytes, Facts]:
    return {path: each.portable() for path, each in tree.items()}


def timeless(tree: Mapping[bytes, Facts]) -> dict[bytes, Facts]:
    return {path: each.timeless() for path, each in tree.items()}


def hard_links(tree: Mapping[bytes, Facts]) -> set[frozenset[bytes]]:
    """Which paths are names of one object."""
    by_inode: dict[int, set[bytes]] = {}
    for path, each in tree.items():
        by_inode.setdefault(each.inode, set()).add(path)
    return {frozenset(paths) for paths in by_inode.values() if len(paths) > 1}


def differences(mine: Mapping[bytes, Facts], theirs: Mapping[bytes, Facts]) -> list[str]:
    """One line for each path at which the trees differ, for a message that can be read."""
    lines = []
    for path in sorted(mine.keys() | theirs.keys()):
        one, other = mine.get(path), theirs.get(path)
        if one is None or other is None:
            lines.append(f"{path!r}: only {'there' if one is None else 'here'}")
        elif one != other:
            fields = (field for field in Facts._fields if getattr(one, field) != getattr(other, field))
            lines.append(f"{path!r}: " + ", ".join(f"{f} {getattr(one, f)!r} != {getattr(other, f)!r}" for f in fields))
    return lines


def assert_same_tree(mine: str | os.PathLike[str], theirs: str | os.PathLike[str]) -> None:
    """Byte for byte and attribute for attribute, inode numbers included: one tree seen in two places."""
    lines = differences(snapshot(mine), snapshot(theirs))
    assert not lines, "\n".join(lines)


def _content(path: str | bytes | os.PathLike[str], mode: int) -> str:
    if stat.S_ISLNK(mode):
        return os.fsdecode(os.readlink(os.fsencode(path)))
    if stat.S_ISREG(mode):
        return hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
    return ""


def _fail(error: OSError) -> None:
    raise error
