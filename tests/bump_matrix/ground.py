"""One small tree on which every row can happen, and everything that can be seen of it.

All that is seen is gathered by the same function, whoever is asked: the share itself, a guest's kernel, a GuestAgent.
"""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # in a virtual machine an import takes seconds
    from coherency.guest_agent.api import GuestAgent

USER, GROUP = 1000, 2000
FILE_BYTES = 16384
LONG_AGO_NS = 1_000_000_000_123_456_789

# What is there at first, what rows bring into being, and what never exists.
NAMES = (
    ".", "file", "other", "setid", "capped", "linked", "link", "dir", "dir/inner", "empty", "into", "into/taken",
    "into/linked", "into/sub", "new", "into/new", "into/new/inner", "empty/inner", "absent",
)  # fmt: skip
# Of what exists, only these: each question through a mount is a request, and there are hundreds of looks.
XATTRS = {
    "file": ("user.colour", "user.new", "system.posix_acl_access"),
    "setid": ("system.posix_acl_access",),
    "capped": ("security.capability",),
    "dir": ("system.posix_acl_default",),
    "new": ("user.colour",),
    "into/new": ("user.colour",),
    "into/taken": ("user.colour",),
}
LISTED = (".", "into")
OPENED = ("file", "other", "setid", "new")

_VFS_CAP_REVISION_2 = 0x02000000
_CAP_NET_RAW = 13
CAPABILITIES = struct.pack("<IIIII", _VFS_CAP_REVISION_2, 1 << _CAP_NET_RAW, 0, 0, 0)

_ACL_VERSION = 2
_ANY = 0xFFFFFFFF


def acl(user: int, *, mask: int) -> bytes:
    """An ACL, as the xattr holds it, that lets `user` read and write, limited by `mask` (source: acl(5), posix_acl_xattr.h)."""
    entries = ((0x01, 6, _ANY), (0x02, 6, user), (0x04, 4, _ANY), (0x10, mask, _ANY), (0x20, 4, _ANY))
    return struct.pack("<I", _ACL_VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def lay(root: Path) -> None:
    """Make the tree in the empty directory `root`. Everything in it is old: what changes gets another time."""
    for name in ("dir", "empty", "into", "into/sub"):
        (root / name).mkdir()
    for name in ("other", "capped", "linked", "dir/inner", "into/taken"):
        (root / name).write_text(name)
    (root / "file").write_bytes(bytes(range(256)) * (FILE_BYTES // 256))
    (root / "setid").write_bytes(b"set-id")
    os.chown(root / "setid", USER, GROUP)
    (root / "setid").chmod(0o6775)
    os.link(root / "linked", root / "into/linked")
    (root / "link").symlink_to("file")
    os.setxattr(root / "file", "user.colour", b"red")
    os.setxattr(root / "capped", "security.capability", CAPABILITIES)
    for name in reversed(NAMES):  # a directory after what lies in it
        if os.path.lexists(root / name):
            os.utime(root / name, ns=(LONG_AGO_NS, LONG_AGO_NS), follow_symlinks=False)


class View(Protocol):
    """Whom one may ask about the tree, as one asks `os`; names are relative to it."""

    def stat(self, name: str, /) -> os.stat_result: ...
    def lstat(self, name: str, /) -> os.stat_result: ...
    def listdir(self, name: str, /) -> list[str]: ...
    def entries(self, name: str, /) -> list[tuple[str, int, bool, bool]]: ...
    def readlink(self, name: str, /) -> str: ...
    def getxattr(self, name: str, attribute: str, /) -> bytes: ...


class KernelView:
    """Whatever the kernel says of a directory: of the share the truth, of a mount what a program in that guest sees."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stat(self, name: str) -> os.stat_result:
        return os.stat(self.root / name)

    def lstat(self, name: str) -> os.stat_result:
        return os.lstat(self.root / name)

    def listdir(self, name: str) -> list[str]:
        return os.listdir(self.root / name)

    def entries(self, name: str) -> list[tuple[str, int, bool, bool]]:
        with os.scandir(self.root / name) as found:
            return [(each.name, each.inode(), each.is_dir(follow_symlinks=False), each.is_symlink()) for each in found]

    def readlink(self, name: str) -> str:
        return os.readlink(self.root / name)

    def getxattr(self, name: str, attribute: str) -> bytes:
        return os.getxattr(self.root / name, attribute)

    def xattr_lists(self) -> dict[str, list[str]]:
        """The names of extended attributes."""
        return {name: sorted(os.listxattr(self.root / name)) for name in OPENED if self._is(stat.S_ISREG, name)}

    def contents(self) -> dict[str, bytes]:
        """What open and read give."""
        return {name: (self.root / name).read_bytes() for name in OPENED if self._is(stat.S_ISREG, name)}

    def _is(self, kind: Callable[[int], bool], name: str) -> bool:
        with contextlib.suppress(OSError):
            return kind(os.lstat(self.root / name).st_mode)
        return False


class AgentView:
    """What a GuestAgent says of a directory below the share's root."""

    def __init__(self, agent: "GuestAgent", below: str) -> None:
        self.agent, self.below = agent, below

    def stat(self, name: str) -> os.stat_result:
        return self.agent.stat(f"{self.below}/{name}")

    def lstat(self, name: str) -> os.stat_result:
        return self.agent.lstat(f"{self.below}/{name}")

    def listdir(self, name: str) -> list[str]:
        return self.agent.listdir(f"{self.below}/{name}")

    def entries(self, name: str) -> list[tuple[str, int, bool, bool]]:
        with self.agent.scandir(f"{self.below}/{name}") as found:
            return [(each.name, each.inode(), each.is_dir(follow_symlinks=False), each.is_symlink()) for each in found]

    def readlink(self, name: str) -> str:
        answer: str = self.agent.readlink(f"{self.below}/{name}")
        return answer

    def getxattr(self, name: str, attribute: str) -> bytes:
        return self.agent.getxattr(f"{self.below}/{name}", attribute)


class Attributes(tuple[int, ...]):
    """The attributes that are kept coherent; atime and st_blocks are not (see the document)."""

    __slots__ = ()

    FIELDS = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_mtime_ns", "st_ctime_ns")

    @classmethod
    def of(cls, status: os.stat_result) -> "Attributes":
        return cls(getattr(status, field) for field in cls.FIELDS)

    def __repr__(self) -> str:
        return " ".join(f"{field[3:]}={value:#o}" if field == "st_mode" else f"{field[3:]}={value}"
                        for field, value in zip(self.FIELDS, self, strict=True))  # fmt: skip


def look(view: View) -> dict[str, Any]:
    """Everything that `view` says: answers, or names of errors, by question."""
    seen: dict[str, Any] = {}

    def ask(question: str, answer: Any, *arguments: str) -> Any:
        try:
            seen[question] = answer(*arguments)
        except OSError as error:
            seen[question] = errno.errorcode[error.errno or 0]
        return seen[question]

    for name in NAMES:
        attributes = ask(f"lstat {name}", lambda each: Attributes.of(view.lstat(each)), name)
        if not isinstance(attributes, Attributes):
            continue
        kind = stat.S_IFMT(attributes[0])
        if kind == stat.S_IFDIR:
            ask(f"scandir {name}", lambda each: sorted(view.entries(each)), name)
            if name in LISTED:
                ask(f"listdir {name}", lambda each: sorted(view.listdir(each)), name)
        elif kind == stat.S_IFLNK:
            ask(f"readlink {name}", view.readlink, name)
        if name in (*LISTED, "file", "link"):
            ask(f"stat {name}", lambda each: Attributes.of(view.stat(each)), name)
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            for attribute in XATTRS.get(name, ()):
                ask(f"getxattr {name} {attribute}", view.getxattr, name, attribute)
    return seen


def differences(expected: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """What differs, a line each, for people."""
    return [
        f"{question}: {seen.get(question, 'not asked')} instead of {expected.get(question, 'nothing')}"
        for question in sorted(expected | seen)
        if expected.get(question) != seen.get(question)
    ]


def facts_by_inode(root: Path) -> dict[int, Any]:
    """Everything that guests may cache, by the inode that it is a fact of."""
    view = KernelView(root)
    facts: dict[int, Any] = {}
    for directory, directories, files in os.walk(root):
        for name in (".", *directories, *files):
            path = os.path.relpath(os.path.join(directory, name), root)
            attributes = Attributes.of(view.lstat(path))
            mode, ino = attributes[:2]
            facts[ino] = [
                attributes,
                sorted(view.entries(path)) if stat.S_ISDIR(mode) else None,
                view.readlink(path) if stat.S_ISLNK(mode) else None,
                [(each, os.getxattr(root / path, each)) for each in os.listxattr(root / path, follow_symlinks=False)]
                if not stat.S_ISLNK(mode) else None,
            ]  # fmt: skip
    return facts
