"""Each row of `docs/spec/bump-matrix.md`, handed to the export as a request: exactly the words of the row move.

No mount and no kernel: the real export over a real directory, with a table in a bytearray. What an operation ought to
bump is checked twice: against the document, and against what has changed in the directory.
"""

import contextlib
import errno
import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from coherency.fuse import abi, codec, syscalls
from coherency.fuse.abi import Opcode, SetattrValid
from coherency.fuse.codec import Request
from coherency.ids import HostInode
from tests.bump_matrix import document
from tests.bump_matrix.desk import Desk, apart, desk_at
from tests.bump_matrix.document import NEW_INODE
from tests.bump_matrix.ground import FILE_BYTES, facts_by_inode, lay
from tests.bump_matrix.requests import (
    EXCHANGE,
    NOREPLACE,
    STEPS,
    WHITEOUT,
    create,
    fallocate,
    link,
    rename,
    setattr_body,
    setxattr,
    write,
)

pytestmark = pytest.mark.needs_fuse  # needs root, like every daemon

# What the export changes the share with.
CALLS = (
    (os, "mknod"), (os, "mkdir"), (os, "symlink"), (os, "link"), (os, "unlink"), (os, "rmdir"), (os, "open"),
    (os, "chmod"), (os, "truncate"), (os, "ftruncate"), (os, "setxattr"), (os, "removexattr"), (os, "pwrite"),
    (os, "copy_file_range"), (syscalls, "renameat2"), (syscalls, "chown"), (syscalls, "utimens"), (syscalls, "fallocate"),
)  # fmt: skip


@contextlib.contextmanager
def disk_full(after: int = 0) -> Iterator[None]:
    """All calls that change something fail with ENOSPC, except for the first `after`."""
    with contextlib.ExitStack() as undo:
        left = after

        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, "the disk is full")
                return call(*arguments, **options)

            return instead

        for module, name in CALLS:
            undo.enter_context(mock.patch.object(module, name, failing(getattr(module, name))))
        yield


@contextlib.contextmanager
def files_at_most(size_bytes: int) -> Iterator[None]:
    """No file grows beyond that: EFBIG, or a part only is written (Python ignores the signal)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def inodes_of(desk: Desk, roles: Iterable[str | HostInode]) -> frozenset[HostInode]:
    return frozenset(desk.ino(role) if isinstance(role, str) else role for role in roles)


def changed_inodes(before: dict[int, Any], after: dict[int, Any]) -> set[HostInode]:
    return {HostInode(ino) for ino in before | after if before.get(ino) != after.get(ino)}


def on_the_ground(root: Path, work: Callable[[Desk], None], **options: Any) -> None:
    lay(root)

    def at_the_desk() -> None:
        with desk_at(root, **options) as desk:
            work(desk)

    apart(at_the_desk)


def check_row(desk: Desk, name: str, *, forgotten: str | None = None) -> None:
    """Row `name` happens, and exactly its inodes are bumped: the words are odd around the calls, and even afterwards.

    The inode in the role `forgotten` is left out by the export, for a control.
    """
    row, step = document.ROWS[name], STEPS[name](desk)
    assert step.roles.keys() == row.bumped - {NEW_INODE}
    assert step.request.opcode == row.opcode
    existing = inodes_of(desk, step.roles.values())
    before = facts_by_inode(desk.root)
    if forgotten == NEW_INODE:
        desk.table.deaf_to = lambda ino: ino not in existing
    elif forgotten is not None:
        desk.table.deaf_to = inodes_of(desk, [step.roles[forgotten]]).__contains__

    asked = desk.ask(step.request)

    assert asked.error == step.error
    bumped = existing
    if NEW_INODE in row.bumped:
        bumped |= {asked.new_inode if step.appears is None else desk.ino(step.appears)}
    changed = changed_inodes(before, facts_by_inode(desk.root))
    assert asked.begun == existing
    assert asked.applied == bumped
    assert asked.moved == bumped
    assert changed <= bumped, "something has changed that was not bumped"
    assert changed or name in ("create-existing", "tmpfile"), "the row changes nothing"


@pytest.mark.parametrize("name", STEPS)
def test_exactly_the_inodes_of_the_row_are_bumped(name: str, tmp_path: Path) -> None:
    on_the_ground(tmp_path, lambda desk: check_row(desk, name))


@pytest.mark.parametrize("name", STEPS)
def test_the_change_is_ended_when_the_call_fails(name: str, tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        step = STEPS[name](desk)
        existing = inodes_of(desk, step.roles.values())
        before = facts_by_inode(desk.root)
        asked = desk.ask(step.request, disk_full)
        assert asked.error == errno.ENOSPC
        assert asked.begun == asked.applied == asked.moved == existing
        assert facts_by_inode(desk.root) == before

    on_the_ground(tmp_path, check)


@pytest.mark.parametrize("done", range(4))
def test_a_setattr_of_which_a_part_was_done_is_ended(done: int, tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        bits = SetattrValid.MODE | SetattrValid.UID | SetattrValid.SIZE | SetattrValid.MTIME
        body = setattr_body(bits, mode=stat.S_IFREG | 0o600, uid=1, size=1, mtime=(1, 1))
        asked = desk.ask(desk.request(Opcode.SETATTR, "file", body), lambda: disk_full(after=done))
        assert asked.error == errno.ENOSPC
        assert asked.begun == asked.moved == {desk.ino("file")}
        status = os.stat(desk.root / "file")
        applied = [status.st_mode & 0o777 == 0o600, status.st_uid == 1, status.st_size == 1, status.st_mtime == 1]
        assert applied == [True] * done + [False] * (4 - done)

    on_the_ground(tmp_path, check)


@pytest.mark.parametrize("after", [0, 1])
def test_a_kill_of_set_id_bits_is_seen_when_what_follows_fails(after: int, tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        request = write(desk, "setid", 0, b"x", write_flags=abi.WRITE_KILL_SUIDGID)
        asked = desk.ask(request, lambda: disk_full(after=after))
        assert asked.error == errno.ENOSPC
        assert asked.moved == {desk.ino("setid")}
        assert os.stat(desk.root / "setid").st_mode & 0o7777 == (0o775 if after else 0o6775)

    on_the_ground(tmp_path, check)


# Requests that the system really refuses: how they are made, with what error, and which existing inodes are bumped.
REFUSED: dict[str, tuple[Callable[[Desk], Request], int, tuple[str, ...]]] = {
    "create, O_EXCL, of a name that exists": (
        lambda desk: create(desk, "dir", b"inner", os.O_RDWR | os.O_EXCL), errno.EEXIST, ("dir",),
    ),
    "mkdir of a name that exists": (
        lambda desk: desk.request(Opcode.MKDIR, ".", codec.Mkdir(b"file", 0o755, 0)), errno.EEXIST, (".",),
    ),
    "mknod of a name that exists": (
        lambda desk: desk.request(Opcode.MKNOD, ".", codec.Mknod(b"file", stat.S_IFIFO, 0, 0)), errno.EEXIST, (".",),
    ),
    "symlink of a name that exists": (
        lambda desk: desk.request(Opcode.SYMLINK, ".", codec.Symlink(b"file", b"other")), errno.EEXIST, (".",),
    ),
    "link to a name that exists": (lambda desk: link(desk, "file", ".", b"other"), errno.EEXIST, (".", "file")),
    "link of a directory": (lambda desk: link(desk, "dir", ".", b"new"), errno.EPERM, (".", "dir")),
    "unlink of a directory": (
        lambda desk: desk.request(Opcode.UNLINK, ".", codec.Name(b"empty")), errno.EISDIR, (".", "empty"),
    ),
    "rmdir of a file": (
        lambda desk: desk.request(Opcode.RMDIR, ".", codec.Name(b"file")), errno.ENOTDIR, (".", "file"),
    ),
    "rmdir of a directory in use": (
        lambda desk: desk.request(Opcode.RMDIR, ".", codec.Name(b"dir")), errno.ENOTEMPTY, (".", "dir"),
    ),
    "rename over a directory in use": (
        lambda desk: rename(desk, "empty", "dir"), errno.ENOTEMPTY, (".", "empty", "dir"),
    ),
    "rename into itself": (lambda desk: rename(desk, "into", "into/sub/x"), errno.EINVAL, (".", "into", "into/sub")),
    "rename, NOREPLACE, over a file": (
        lambda desk: rename(desk, "file", "into/taken", NOREPLACE), errno.EEXIST, (".", "into", "file", "into/taken"),
    ),
    "rename, EXCHANGE, with nothing": (
        lambda desk: rename(desk, "file", "into/new", EXCHANGE), errno.ENOENT, (".", "into", "file"),
    ),
    "rename, EXCHANGE and WHITEOUT": (
        lambda desk: rename(desk, "file", "other", EXCHANGE | WHITEOUT), errno.EINVAL, (".", "file", "other"),
    ),
    "setattr, size of a directory": (
        lambda desk: desk.request(Opcode.SETATTR, "dir", setattr_body(SetattrValid.SIZE)), errno.EINVAL, ("dir",),
    ),
    "setattr, a time that is none": (
        lambda desk: desk.request(Opcode.SETATTR, "file", setattr_body(SetattrValid.MTIME, mtime=(0, 1 << 31))),
        errno.EINVAL, ("file",),
    ),
    "setxattr of a name that exists": (
        lambda desk: setxattr(desk, "file", b"user.colour", b"blue", flags=os.XATTR_CREATE), errno.EEXIST, ("file",),
    ),
    "removexattr of a name that is not there": (
        lambda desk: desk.request(Opcode.REMOVEXATTR, "file", codec.Name(b"user.new")), errno.ENODATA, ("file",),
    ),
    "write, file not open for writing": (
        lambda desk: write(desk, "file", 0, b"x", flags=os.O_RDONLY), errno.EBADF, ("file",),
    ),
    "fallocate of nothing": (lambda desk: fallocate(desk, "file", 0, 0, 0), errno.EINVAL, ("file",)),
    "copy_file_range, file not open for reading": (
        lambda desk: desk.request(
            Opcode.COPY_FILE_RANGE, "file",
            codec.CopyFileRange(desk.open("file", os.O_WRONLY), 0, desk.node("other"), desk.open("other"), 0, 1),
        ),
        errno.EBADF, ("other",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_system_refuses_is_ended(case: str, tmp_path: Path) -> None:
    make, error, bumped = REFUSED[case]

    def check(desk: Desk) -> None:
        request = make(desk)
        before = facts_by_inode(desk.root)
        asked = desk.ask(request)
        assert errno.errorcode[asked.error] == errno.errorcode[error]
        assert asked.begun == asked.applied == asked.moved == inodes_of(desk, bumped)
        assert facts_by_inode(desk.root) == before

    on_the_ground(tmp_path, check)


# Requests that would make a file too big, and what remains of them.
TOO_BIG: dict[str, tuple[Callable[[Desk], Request], int, int]] = {
    "write": (lambda desk: write(desk, "file", FILE_BYTES, b"x"), errno.EFBIG, FILE_BYTES),
    "write of which a part fits": (
        lambda desk: write(desk, "file", FILE_BYTES - 1, bytes(10)), 0, FILE_BYTES,
    ),
    "fallocate": (lambda desk: fallocate(desk, "file", 0, 0, 2 * FILE_BYTES), errno.EFBIG, FILE_BYTES),
    "setattr, size": (
        lambda desk: desk.request(Opcode.SETATTR, "file", setattr_body(SetattrValid.SIZE, size=FILE_BYTES + 1)),
        errno.EFBIG, FILE_BYTES,
    ),
    "copy_file_range": (
        lambda desk: desk.request(
            Opcode.COPY_FILE_RANGE, "other",
            codec.CopyFileRange(desk.open("other"), 0, desk.node("file"), desk.open("file"), FILE_BYTES, 1),
        ),
        errno.EFBIG, FILE_BYTES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_BIG)
def test_what_does_not_fit_is_ended(case: str, tmp_path: Path) -> None:
    make, error, size = TOO_BIG[case]

    def check(desk: Desk) -> None:
        asked = desk.ask(make(desk), lambda: files_at_most(FILE_BYTES))
        assert asked.error == error
        assert asked.begun == asked.applied == asked.moved == {desk.ino("file")}
        assert os.stat(desk.root / "file").st_size == size

    on_the_ground(tmp_path, check)


# Requests about something that is not there (rule B3).
NOTHING_THERE: dict[str, tuple[Callable[[Desk], Request], int]] = {
    "unlink": (lambda desk: desk.request(Opcode.UNLINK, ".", codec.Name(b"absent")), errno.ENOENT),
    "rmdir": (lambda desk: desk.request(Opcode.RMDIR, ".", codec.Name(b"absent")), errno.ENOENT),
    "rename": (lambda desk: rename(desk, "absent", "new"), errno.ENOENT),
    "write": (lambda desk: desk.request(Opcode.WRITE, "file", codec.Write(99, 0, 0, memoryview(b"x"))), errno.EBADF),
    "open of a directory, O_TRUNC": (
        lambda desk: desk.request(Opcode.OPEN, "dir", codec.Open(os.O_WRONLY | os.O_TRUNC, 0)), errno.ENXIO,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING_THERE)
def test_nothing_found_nothing_bumped(case: str, tmp_path: Path) -> None:
    make, error = NOTHING_THERE[case]

    def check(desk: Desk) -> None:
        asked = desk.ask(make(desk))
        assert asked.error == error
        assert asked.begun is None
        assert not asked.moved

    on_the_ground(tmp_path, check)


def test_an_inode_without_a_name_is_bumped_like_any_other(tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        request, ino = write(desk, "file", 0, b"x"), desk.ino("file")
        desk.ask(desk.request(Opcode.UNLINK, ".", codec.Name(b"file")))
        asked = desk.ask(request)
        assert asked.error == 0
        assert asked.moved == {ino}

    on_the_ground(tmp_path, check)


def test_whichever_name_is_used_the_inode_is_bumped(tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        moved = [desk.ask(write(desk, path, 0, b"x")).moved for path in ("linked", "into/linked")]
        assert moved[0] == moved[1] == {desk.ino("linked")}

    on_the_ground(tmp_path, check)


# ---- requests that bump nothing ----


def _handle(desk: Desk) -> codec.Handle:
    return codec.Handle(desk.open("file"))


def _lock(desk: Desk, flags: int = 0) -> codec.Lock:
    return codec.Lock(desk.open("file"), 1, 0, syscalls.OFFSET_MAX, fcntl.F_WRLCK, os.getpid(), flags)


def _directory(desk: Desk) -> int:
    return desk.open("dir", os.O_RDONLY, opcode=Opcode.OPENDIR)


SILENT: dict[Opcode, Callable[[Desk], Request]] = {
    Opcode.LOOKUP: lambda desk: desk.request(Opcode.LOOKUP, "dir", codec.Name(b"inner")),
    Opcode.FORGET: lambda desk: desk.request(Opcode.FORGET, ".", codec.Forget(((desk.node("file"), 1),))),
    Opcode.BATCH_FORGET: lambda desk: desk.request(Opcode.BATCH_FORGET, ".", codec.Forget(((desk.node("file"), 1),))),
    Opcode.GETATTR: lambda desk: desk.request(Opcode.GETATTR, "file", codec.Getattr(0, 0)),
    Opcode.STATX: lambda desk: desk.request(Opcode.STATX, "file", codec.Statx(0, 0, 0, syscalls.STATX_BASIC_STATS)),
    Opcode.READLINK: lambda desk: desk.request(Opcode.READLINK, "link", codec.Empty()),
    Opcode.ACCESS: lambda desk: desk.request(Opcode.ACCESS, "file", codec.Access(os.W_OK)),
    Opcode.GETXATTR: lambda desk: desk.request(Opcode.GETXATTR, "file", codec.Getxattr(b"user.colour", 100)),
    Opcode.LISTXATTR: lambda desk: desk.request(Opcode.LISTXATTR, "file", codec.Getxattr(b"", 100)),
    Opcode.OPEN: lambda desk: desk.request(Opcode.OPEN, "file", codec.Open(os.O_RDWR, 0)),
    Opcode.READ: lambda desk: desk.request(Opcode.READ, "file", codec.Read(desk.open("file"), 0, 100)),
    Opcode.LSEEK: lambda desk: desk.request(Opcode.LSEEK, "file", codec.Lseek(desk.open("file"), 0, os.SEEK_DATA)),
    Opcode.FLUSH: lambda desk: desk.request(Opcode.FLUSH, "file", codec.Flush(desk.open("file"), 1)),
    Opcode.FSYNC: lambda desk: desk.request(Opcode.FSYNC, "file", codec.Fsync(desk.open("file"), False)),
    Opcode.GETLK: lambda desk: desk.request(Opcode.GETLK, "file", _lock(desk)),
    Opcode.SETLK: lambda desk: desk.request(Opcode.SETLK, "file", _lock(desk)),
    Opcode.SETLKW: lambda desk: desk.request(Opcode.SETLKW, "file", _lock(desk, flags=abi.LK_FLOCK)),
    Opcode.RELEASE: lambda desk: desk.request(Opcode.RELEASE, "file", _handle(desk)),
    Opcode.OPENDIR: lambda desk: desk.request(Opcode.OPENDIR, "dir", codec.Open(os.O_RDONLY, 0)),
    Opcode.READDIR: lambda desk: desk.request(Opcode.READDIR, "dir", codec.Read(_directory(desk), 0, 4096)),
    Opcode.READDIRPLUS: lambda desk: desk.request(Opcode.READDIRPLUS, "dir", codec.Read(_directory(desk), 0, 4096)),
    Opcode.FSYNCDIR: lambda desk: desk.request(Opcode.FSYNCDIR, "dir", codec.Fsync(_directory(desk), False)),
    Opcode.RELEASEDIR: lambda desk: desk.request(Opcode.RELEASEDIR, "dir", codec.Handle(_directory(desk))),
    Opcode.STATFS: lambda desk: desk.request(Opcode.STATFS, ".", codec.Empty()),
    Opcode.SYNCFS: lambda desk: desk.request(Opcode.SYNCFS, ".", codec.Empty()),
    Opcode.DESTROY: lambda desk: desk.request(Opcode.DESTROY, ".", codec.Empty()),
}


@pytest.mark.parametrize("opcode", SILENT, ids=lambda opcode: opcode.name)
def test_what_changes_nothing_bumps_nothing(opcode: Opcode, tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        request = SILENT[opcode](desk)
        before = facts_by_inode(desk.root)
        asked = desk.ask(request)
        assert asked.error == 0
        assert asked.begun is None
        assert not asked.moved
        assert facts_by_inode(desk.root) == before

    on_the_ground(tmp_path, check)


# ---- negative controls ----


@pytest.mark.parametrize("name", STEPS)
def test_control_without_bumps_every_row_is_missed(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        on_the_ground(tmp_path, lambda desk: check_row(desk, name), bumps=False)


@pytest.mark.parametrize(
    ("name", "role"), [(row.name, role) for row in document.ROWS.values() for role in sorted(row.bumped)]
)
def test_control_one_forgotten_inode_is_noticed(name: str, role: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        on_the_ground(tmp_path, lambda desk: check_row(desk, name, forgotten=role))
