"""Requests that no kernel sends: none of them leads out of the directory, holds a descriptor, or ends the service."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coherency.fuse.passthrough import Passthrough
from tests.descriptors import open_descriptors
from tests.fake_kernel import FakeKernel

U64 = (1 << 64) - 1
O_TMPFILE, FATTR = os.O_TMPFILE, {"mode": 1, "uid": 2, "gid": 4, "size": 8, "atime": 16, "mtime": 32}


class Inside:
    """A share with a symlink and a file in it, a precious directory beside it, and a kernel that wants to get there."""

    def __init__(self, directory: Path, kernel: FakeKernel, passthrough: Passthrough) -> None:
        self.kernel, self.passthrough = kernel, passthrough
        self.outside = directory / "outside"
        self.share = directory / "share"

    def node(self, name: bytes, parent: int = 1) -> int:
        answer = self.kernel.ask("LOOKUP", name + b"\0", node=parent)
        assert answer.error == 0
        return answer.read("entry_out")["nodeid"]

    def open(self, name: bytes, flags: int = os.O_RDWR) -> tuple[int, int]:
        node = self.node(name)
        answer = self.kernel.ask("OPEN", node=node, flags=flags)
        assert answer.error == 0
        return node, answer.read("open_out")["fh"]


@pytest.fixture(params=[100, 1], ids=["by-descriptor", "by-handle"])
def inside(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Inside]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("precious")
    (tmp_path / "share").mkdir()
    (tmp_path / "share/file").write_text("content")
    (tmp_path / "share/to_directory").symlink_to(tmp_path / "outside")
    (tmp_path / "share/to_file").symlink_to(tmp_path / "outside/file")
    os.mkfifo(tmp_path / "share/fifo")
    before = open_descriptors()
    passthrough = Passthrough(os.open(tmp_path / "share", os.O_RDONLY), descriptor_limit=request.param)
    with FakeKernel(passthrough) as kernel:
        yield Inside(tmp_path, kernel, passthrough)
        passthrough.nodes.check()
        kernel.session.check()
    assert open_descriptors() <= before
    assert (tmp_path / "outside/file").read_text() == "precious"
    assert os.listdir(tmp_path / "outside") == ["file"]


# --- symlinks ---


def test_symlink_to_a_directory_is_no_directory(inside: Inside) -> None:
    ask, link = inside.kernel.ask, inside.node(b"to_directory")
    other = inside.node(b"file")
    assert ask("LOOKUP", b"file\0", node=link).error == errno.ENOTDIR
    assert ask("MKDIR", b"new\0", node=link, mode=0o755).error == errno.ENOTDIR
    assert ask("MKNOD", b"new\0", node=link, mode=0o100644).error == errno.ENOTDIR
    assert ask("CREATE", b"new\0", node=link, mode=0o644, flags=os.O_RDWR).error == errno.ENOTDIR
    assert ask("SYMLINK", b"new\0target\0", node=link).error == errno.ENOTDIR
    assert ask("LINK", b"new\0", node=link, oldnodeid=other).error == errno.ENOTDIR
    assert ask("UNLINK", b"file\0", node=link).error == errno.ENOTDIR
    assert ask("RMDIR", b"file\0", node=link).error == errno.ENOTDIR
    assert ask("RENAME", b"file\0file\0", node=link, newdir=1).error == errno.ENOTDIR
    assert ask("RENAME2", b"file\0file\0", node=1, newdir=link).error == errno.ENOTDIR
    assert ask("OPENDIR", node=link).error in (errno.ELOOP, errno.ENOTDIR)
    assert ask("TMPFILE", b"\0", node=link, flags=os.O_RDWR, mode=0o600).error in (errno.ELOOP, errno.ENOTDIR)


def test_symlink_to_a_file_is_changed_itself_or_not_at_all(inside: Inside) -> None:
    ask, link = inside.kernel.ask, inside.node(b"to_file")
    before = os.stat(inside.outside / "file")
    assert ask("OPEN", node=link, flags=os.O_RDWR).error == errno.ENXIO
    assert ask("SETATTR", node=link, valid=FATTR["size"], size=0).error == errno.EINVAL
    assert ask("SETATTR", node=link, valid=FATTR["mode"], mode=0o777).error == errno.EOPNOTSUPP
    assert ask("SETATTR", node=link, valid=FATTR["uid"] | FATTR["gid"], uid=1000, gid=1001).error == 0
    assert ask("SETATTR", node=link, valid=FATTR["atime"] | FATTR["mtime"], atime=1, mtime=2).error == 0
    assert ask("SETXATTR", b"user.a\0v", node=link, size=1).error == errno.EPERM
    assert ask("SETXATTR", b"trusted.a\0v", node=link, size=1).error == 0
    assert ask("GETXATTR", b"trusted.a\0", node=link, size=9).payload == b"v"
    assert os.listxattr(inside.outside / "file") == []
    assert ask("GETATTR", node=link).read("attr_out")["attr.uid"] == 1000
    assert ask("LINK", b"second\0", node=1, oldnodeid=link).error == 0
    assert os.path.samestat(os.lstat(inside.share / "second"), os.lstat(inside.share / "to_file"))
    assert os.lstat(inside.share / "to_file").st_mtime == 2
    after = os.stat(inside.outside / "file")
    assert (after.st_uid, after.st_mtime_ns, after.st_ctime_ns, after.st_nlink) == (
        before.st_uid, before.st_mtime_ns, before.st_ctime_ns, before.st_nlink,
    )  # fmt: skip


def test_link_target_is_told_not_followed(inside: Inside) -> None:
    assert inside.kernel.ask("READLINK", node=inside.node(b"to_file")).payload == os.fsencode(inside.outside / "file")
    assert inside.kernel.ask("READLINK", node=inside.node(b"file")).error in (errno.EINVAL, errno.ENOENT)


@pytest.mark.expected_logs("malformed request")
def test_no_name_leads_up(inside: Inside) -> None:
    for name in (b"..", b".", b"../outside", b"/etc", b""):
        assert inside.kernel.ask("LOOKUP", name + b"\0").error == errno.EINVAL
        assert inside.kernel.ask("CREATE", name + b"\0", mode=0o644).error == errno.EINVAL
        assert inside.kernel.ask("RENAME", b"file\0" + name + b"\0", newdir=1).error == errno.EINVAL


# --- what is not there, and what it is not ---


def test_unknown_nodes(inside: Inside) -> None:
    ask = inside.kernel.ask
    for kind, tail in (
        ("LOOKUP", b"a\0"), ("GETATTR", b""), ("SETATTR", b""), ("READLINK", b""), ("MKDIR", b"a\0"), ("UNLINK", b"a\0"),
        ("OPEN", b""), ("OPENDIR", b""), ("CREATE", b"a\0"), ("TMPFILE", b"\0"), ("STATFS", b""), ("STATX", b""),
        ("GETXATTR", b"user.a\0"), ("LISTXATTR", b""), ("REMOVEXATTR", b"user.a\0"), ("ACCESS", b""),
    ):  # fmt: skip
        assert ask(kind, tail, node=99).error == errno.ESTALE, kind
        assert ask(kind, tail, node=U64).error == errno.ESTALE, kind
    assert ask("RENAME", b"file\0b\0", newdir=99).error == errno.ESTALE
    assert ask("LINK", b"b\0", oldnodeid=99).error == errno.ESTALE


def test_unknown_file_handles(inside: Inside) -> None:
    ask, node = inside.kernel.ask, inside.node(b"file")
    for kind, tail in (
        ("READ", b""), ("WRITE", b""), ("FLUSH", b""), ("FSYNC", b""), ("FSYNCDIR", b""), ("READDIR", b""),
        ("READDIRPLUS", b""), ("FALLOCATE", b""), ("LSEEK", b""), ("GETLK", b""), ("SETLK", b""), ("SETLKW", b""),
    ):  # fmt: skip
        assert ask(kind, tail, node=node, fh=99).error == errno.EBADF, kind
    _, fh = inside.open(b"file")
    assert ask("COPY_FILE_RANGE", node=node, fh_in=fh, fh_out=99, len=1).error == errno.EBADF
    assert ask("COPY_FILE_RANGE", node=node, fh_in=99, fh_out=fh, len=1).error == errno.EBADF
    # A handle that is gone is as good as none where the node alone does.
    assert ask("GETATTR", node=node, getattr_flags=1, fh=99).error == 0
    assert ask("SETATTR", node=node, valid=64, fh=99).error == 0
    assert ask("RELEASE", node=node, fh=99).error == 0


def test_released_twice(inside: Inside) -> None:
    node, fh = inside.open(b"file")
    assert inside.kernel.ask("RELEASE", node=node, fh=fh).error == 0
    assert inside.kernel.ask("RELEASE", node=node, fh=fh).error == 0
    assert inside.kernel.ask("READ", node=node, fh=fh, size=9).error == errno.EBADF


def test_only_files_are_opened(inside: Inside) -> None:
    assert inside.kernel.ask("OPEN", node=inside.node(b"fifo"), flags=os.O_RDONLY).error == errno.ENXIO
    assert inside.kernel.ask("OPEN", node=1, flags=os.O_RDONLY).error == errno.ENXIO
    assert inside.kernel.ask("OPENDIR", node=inside.node(b"file")).error == errno.ENOTDIR


def test_numbers_out_of_range(inside: Inside) -> None:
    ask = inside.kernel.ask
    node, fh = inside.open(b"file")
    assert ask("LSEEK", node=node, fh=fh, offset=U64, whence=os.SEEK_DATA).error == errno.ENXIO
    assert ask("LSEEK", node=node, fh=fh, offset=0, whence=77).error == errno.EINVAL
    assert ask("READ", node=node, fh=fh, offset=U64, size=1).error == errno.EINVAL
    assert ask("WRITE", b"a", node=node, fh=fh, offset=U64, size=1).error == errno.EINVAL
    assert ask("FALLOCATE", node=node, fh=fh, offset=U64, length=1).error == errno.EINVAL
    assert ask("FALLOCATE", node=node, fh=fh, offset=0, length=0).error == errno.EINVAL
    assert ask("SETATTR", node=node, valid=FATTR["size"], size=U64).error == errno.EINVAL
    assert ask("COPY_FILE_RANGE", node=node, fh_in=fh, fh_out=fh, off_in=U64, len=1).error == errno.EINVAL
    assert ask("SETATTR", node=node, valid=FATTR["mtime"], mtime=1, mtimensec=10**9 + 5).error == errno.EINVAL
    assert ask("RENAME2", b"file\0x\0", newdir=1, flags=1 << 30).error == errno.EINVAL
    assert (inside.share / "file").read_text() == "content"


def test_names_too_long(inside: Inside) -> None:
    for kind, tail in (("LOOKUP", b""), ("MKDIR", b""), ("CREATE", b""), ("SYMLINK", b"target\0")):
        assert inside.kernel.ask(kind, b"n" * 256 + b"\0" + tail).error == errno.ENAMETOOLONG


# --- creating ---


def test_create_never_opens_what_exists(inside: Inside) -> None:
    """Its permission to be opened has not been checked."""
    ask = inside.kernel.ask
    create: dict[str, Any] = {"mode": 0o644, "flags": os.O_RDWR | os.O_CREAT | os.O_TRUNC}
    assert ask("CREATE", b"file\0", **create).error == errno.ESTALE
    assert ask("CREATE", b"file\0", **(create | {"flags": os.O_RDWR | os.O_EXCL})).error == errno.EEXIST
    assert ask("CREATE", b"to_file\0", **create).error == errno.ESTALE
    assert (inside.share / "file").read_text() == "content"


@pytest.mark.parametrize("order", [(1001, 1002, 0, 1001), (0, 1001, 0)])
def test_each_creation_belongs_to_its_caller(inside: Inside, order: tuple[int, ...]) -> None:
    for number, uid in enumerate(order):
        name = b"%d\0" % number
        assert inside.kernel.ask("MKDIR", name, mode=0o777, umask=0o27 if uid else 0, caller=(uid, uid + 5)).error == 0
        status = os.stat(inside.share / str(number))
        assert (status.st_uid, status.st_gid) == (uid, uid + 5)
        assert status.st_mode & 0o777 == (0o750 if uid else 0o777)


def test_errors_leave_nothing_behind(inside: Inside) -> None:
    """No descriptor, no node, no open file; see also the fixture."""
    node = inside.node(b"file")
    (inside.share / "directory").mkdir()
    before = open_descriptors()
    nodes = inside.passthrough.nodes.statistics()
    ask = inside.kernel.ask
    for _ in range(3):
        assert ask("LOOKUP", b"missing\0").error == errno.ENOENT
        assert ask("CREATE", b"file\0", mode=0o644, flags=os.O_RDWR).error == errno.ESTALE
        assert ask("MKDIR", b"file\0").error == errno.EEXIST
        assert ask("MKNOD", b"file\0", mode=0o100644).error == errno.EEXIST
        assert ask("SYMLINK", b"file\0target\0").error == errno.EEXIST
        assert ask("LINK", b"fifo\0", oldnodeid=node).error == errno.EEXIST
        assert ask("OPENDIR", node=node).error == errno.ENOTDIR
        assert ask("UNLINK", b"directory\0").error == errno.EISDIR
        assert ask("RMDIR", b"file\0").error == errno.ENOTDIR
        assert ask("RENAME", b"missing\0x\0", newdir=1).error == errno.ENOENT
        assert ask("RENAME2", b"file\0fifo\0", newdir=1, flags=1).error == errno.EEXIST
        assert ask("GETXATTR", b"user.missing\0", node=node).error == errno.ENODATA
        assert ask("REMOVEXATTR", b"user.missing\0", node=node).error == errno.ENODATA
        assert ask("SETXATTR", b"nonsense\0v", node=node, size=1).error == errno.EOPNOTSUPP
    assert open_descriptors() <= before
    assert inside.passthrough.nodes.statistics() == nodes
    assert not inside.passthrough._files
