"""Operations on names and attributes. Each function is a scenario: see `comparing`."""

import ctypes
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

from tests.scenarios.comparing import Scenario, attempt

libc = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD = -100


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def xattr_call(name: str, path: Path, *arguments: Any) -> int:
    """getxattr or listxattr with a buffer size of one's own choice."""
    size = getattr(libc, name)(os.fsencode(path), *arguments)
    if size < 0:
        raise OSError(ctypes.get_errno(), name)
    return int(size)


def facts(path: Path | str | bytes) -> Any:
    status = os.lstat(path)
    return oct(status.st_mode), status.st_nlink, status.st_uid, status.st_gid, status.st_rdev


# --- scenarios: names ---


def directories(d: Path) -> Any:
    (d / "sub").mkdir()
    (d / "sub/below").mkdir(mode=0o700)
    (d / "f").touch()
    results: list[Any] = [os.stat(d / "sub").st_nlink, sorted(os.listdir(d)), sorted(os.listdir(d / "sub"))]
    results += [attempt(os.mkdir, d / name) for name in ("sub", "f", "f/x", "missing/x")]
    results += [attempt(os.rmdir, f"{d}/{name}") for name in ("sub", "f", "missing", "sub/.", "sub/below/..")]
    results += [attempt(os.unlink, d / name) for name in ("sub", "missing", "f/x")] + [attempt(os.listdir, d / "f")]
    os.rmdir(d / "sub/below")
    results += [os.stat(d / "sub").st_nlink]
    os.rmdir(d / "sub")
    os.unlink(d / "f")
    return [*results, os.listdir(d)]


def kinds_in_a_listing(d: Path) -> Any:
    (d / "file").touch()
    (d / "directory").mkdir()
    (d / "link").symlink_to("file")
    os.mkfifo(d / "fifo")
    with os.scandir(d) as entries:
        return sorted(
            (
                e.name,
                e.is_file(follow_symlinks=False),
                e.is_dir(),
                e.is_symlink(),
                e.inode() == e.stat(follow_symlinks=False).st_ino,
            )
            for e in entries
        )


def strange_names(d: Path) -> Any:
    at = os.fsencode(d)
    names = [
        b"\xff\xfe", b"caf\xe9", "café".encode(), b"n" * 255, b" ", b"\n", b"\\x", b"-rf", b"...", b"..a", b"a\tb", b"\x7f\x01",
        "日本語".encode() * 28,
    ]  # fmt: skip
    for name in names:
        Path(os.fsdecode(os.path.join(at, name))).write_bytes(name)
    results: list[Any] = [sorted(os.listdir(at)) == sorted(names)]
    results += [Path(os.fsdecode(os.path.join(at, name))).read_bytes() == name for name in names]
    long = os.path.join(at, b"n" * 256)
    results += [
        attempt(os.stat, long),
        attempt(os.mkdir, long),
        attempt(os.symlink, b"x", long),
        attempt(os.mkfifo, long),
    ]
    results += [attempt(os.open, long, os.O_CREAT), attempt(os.rename, os.path.join(at, b" "), long)]
    results += [attempt(os.link, os.path.join(at, b" "), long), attempt(os.stat, at + b"/" + b"./" * 2100)]
    return [*results, attempt(os.stat, os.path.join(at, b"n" * 1025)), attempt(os.stat, os.path.join(at, b"n" * 5000))]


def symlinks(d: Path) -> Any:
    (d / "sub").mkdir()
    (d / "sub/f").write_text("content")
    targets = {
        "relative": "sub/f",
        "up": "sub/../sub/f",
        "dangling": "nowhere",
        "odd": "\udcff/ \n",
        "long": "x" * 4000,
    }
    for name, target in targets.items():
        os.symlink(target, d / name)
    (d / "absolute").symlink_to("/proc/self/mounts")
    (d / "directory").symlink_to("sub")
    (d / "loop").symlink_to("loop")
    results: list[Any] = [os.readlink(d / name) for name in (*targets, "absolute", "loop")]
    results += [os.lstat(d / "relative").st_size, (d / "relative").read_text(), (d / "up").read_text()]
    results += [
        attempt(os.stat, d / "dangling"),
        attempt(os.stat, d / "loop"),
        os.path.samestat(os.stat(d / "absolute"), os.stat("/proc/self/mounts")),
    ]
    results += [
        attempt(os.symlink, "x", d / "loop"),
        attempt(os.symlink, "", d / "empty"),
        attempt(os.readlink, d / "sub"),
    ]
    results += [
        (d / "directory/f").read_text(),
        attempt(os.rmdir, d / "directory"),
        attempt(os.listdir, d / "dangling"),
    ]
    os.unlink(d / "directory")
    return [*results, (d / "sub/f").exists(), attempt(os.symlink, "y" * 5000, d / "longer")]


def hard_links(d: Path) -> Any:
    (d / "f").write_text("content")
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    os.link(d / "f", d / "sub/g")
    os.link(d / "link", d / "second link", follow_symlinks=False)
    results: list[Any] = [os.stat(d / "f").st_nlink, os.path.samefile(d / "f", d / "sub/g"), (d / "sub/g").read_text()]
    results += [os.lstat(d / "link").st_nlink, os.path.samestat(os.lstat(d / "link"), os.lstat(d / "second link"))]
    results += [
        attempt(os.link, d / "f", d / "sub/g"),
        attempt(os.link, d / "sub", d / "no"),
        attempt(os.link, d / "no", d / "x"),
    ]
    os.unlink(d / "f")
    (d / "sub/g").write_text("changed")
    return [*results, os.stat(d / "sub/g").st_nlink, (d / "sub/g").read_text()]


def renames(d: Path) -> Any:
    for name in ("a", "b", "c"):
        (d / name).write_text(name)
    for name in ("full", "empty", "full/below"):
        (d / name).mkdir()
    os.link(d / "a", d / "also a")
    results: list[Any] = [attempt(os.rename, f"{d}/{old}", f"{d}/{new}") for old, new in (
        ("missing", "x"), ("a", "full"), ("full", "a"), ("full", "full/below/x"), ("empty", "full"), ("a", "b/x"), ("a", "no/x"),
        ("a", "also a"), ("a", "a"), ("a", "."), ("full/.", "x"),
    )]  # fmt: skip
    with open(d / "c") as c:
        os.rename(d / "a", d / "b")
        os.rename(d / "b", d / "full/below/moved")
        os.rename(d / "c", d / "full/c")
        results += [c.read()]
    os.rename(d / "full/below", d / "empty")
    os.rename(d / "empty", d / "full/here")
    results += [
        (d / "full/here/moved").read_text(),
        sorted(os.listdir(d)),
        sorted(os.listdir(d / "full")),
        os.stat(d / "full").st_nlink,
    ]
    return results


def renames_with_flags(d: Path) -> Any:
    (d / "f").write_text("f")
    (d / "sub").mkdir()
    (d / "sub/g").write_text("g")
    results: list[Any] = [attempt(renameat2, d / old, d / new, flags) for old, new, flags in (
        ("f", "sub/g", NOREPLACE), ("f", "free", NOREPLACE), ("free", "f", NOREPLACE), ("f", "missing", EXCHANGE),
        ("f", "sub/g", NOREPLACE | EXCHANGE), ("f", "x", 1 << 20), ("f", "sub/g", WHITEOUT | EXCHANGE), ("missing", "x", NOREPLACE),
    )]  # fmt: skip
    renameat2(d / "f", d / "sub/g", EXCHANGE)
    results += [(d / "f").read_text(), (d / "sub/g").read_text()]
    (d / "other").mkdir()
    renameat2(d / "other", d / "sub/g", EXCHANGE)  # a directory and a file
    results += [(d / "other").read_text(), os.listdir(d / "sub/g"), os.stat(d).st_nlink, os.stat(d / "sub").st_nlink]
    renameat2(d / "other", d / "moved", WHITEOUT)
    return [*results, (d / "moved").read_text(), facts(d / "other")]


def special_files(d: Path) -> Any:
    os.mkfifo(d / "fifo", 0o640)
    os.mknod(d / "file", stat.S_IFREG | 0o604)
    os.mknod(d / "character", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(d / "block", stat.S_IFBLK | 0o660, os.makedev(259, 300))
    os.mknod(d / "widest", stat.S_IFCHR | 0o600, os.makedev(0xFFF, 0xFFFFF))
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as calling:
        at = os.open(d, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{at}/socket")
        listening.listen()
        calling.connect(f"/proc/self/fd/{at}/socket")
        os.close(at)
    reading = os.open(d / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(d / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writing, b"through")
    results: list[Any] = [
        os.read(reading, 99),
        attempt(os.open, d / "socket", os.O_RDWR),
        attempt(os.mknod, d / "fifo"),
    ]
    os.close(reading)
    os.close(writing)
    return [*results, *(facts(d / name) for name in sorted(os.listdir(d)))]


def in_a_directory_that_moves(d: Path) -> Any:
    (d / "sub").mkdir()
    at = os.open(d / "sub", os.O_RDONLY | os.O_DIRECTORY)
    os.mkdir("one", dir_fd=at)
    os.rename(d / "sub", d / "elsewhere")
    os.mkdir("two", dir_fd=at)
    results: list[Any] = [
        sorted(os.listdir(at)),
        sorted(os.listdir(d / "elsewhere")),
        os.stat("one", dir_fd=at).st_nlink,
    ]
    os.rmdir("one", dir_fd=at)
    os.rmdir("two", dir_fd=at)
    os.rmdir(d / "elsewhere")
    results += [
        os.fstat(at).st_nlink,
        attempt(os.mkdir, "three", dir_fd=at),
        attempt(os.stat, "one", dir_fd=at),
        os.listdir(at),
    ]
    os.close(at)
    return results


# --- scenarios: attributes ---


def times(d: Path) -> Any:
    (d / "f").touch()
    (d / "link").symlink_to("f")
    (d / "sub").mkdir()
    results: list[Any] = []
    for seconds in (-1, -0.5, -1_000_000_000.25, 0, 0.000000001, 1.999999999, 2**31, 2**32 + 5):
        ns = int(seconds) * 10**9 + round((seconds - int(seconds)) * 10**9)
        os.utime(d / "f", ns=(ns, ns + 1))
        results += [os.stat(d / "f").st_atime_ns, os.stat(d / "f").st_mtime_ns]
    os.utime(d / "f", ns=(1_000, 2_000))
    os.utime(d / "link", ns=(-5, -7_000_000_003), follow_symlinks=False)
    results += [os.lstat(d / "link").st_mtime_ns, os.stat(d / "f").st_mtime_ns]
    subprocess.run(["touch", "-a", "-d", "@9", d / "f"], check=True)  # the other one stays
    results += [os.stat(d / "f").st_atime_ns, os.stat(d / "f").st_mtime_ns]
    subprocess.run(["touch", "-m", d / "f"], check=True)
    results += [os.stat(d / "f").st_atime_ns, os.stat(d / "f").st_mtime > 1e9]
    os.utime(d / "sub", ns=(3, 4))
    return [*results, os.stat(d / "sub").st_mtime_ns, attempt(os.utime, d / "missing")]


def modes(d: Path) -> Any:
    (d / "f").touch()
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    results: list[Any] = []
    for mode in (0, 0o7777, 0o4755, 0o2755, 0o2745, 0o1777, 0o640):
        os.chmod(d / "f", mode)
        os.chmod(d / "sub", mode)
        results += [facts(d / "f"), facts(d / "sub")]
    results += [attempt(os.chmod, d / "link", 0o600), facts(d / "f"), attempt(os.chmod, d / "missing", 0)]
    umask = os.umask(0o27)
    os.mkdir(d / "made", 0o7777)
    os.close(os.open(d / "opened", os.O_CREAT, 0o7666))
    os.umask(umask)
    return [*results, facts(d / "made"), facts(d / "opened")]


def owners(d: Path) -> Any:
    (d / "f").touch(mode=0o755)
    (d / "link").symlink_to("f")
    (d / "sub").mkdir()
    results: list[Any] = []
    for uid, gid in ((5, 6), (-1, 7), (8, -1), (2**32 - 2, 2**32 - 2), (70000, 80000)):
        os.chown(d / "f", uid, gid)
        os.lchown(d / "link", uid, gid)
        os.chown(d / "sub", uid, gid)
        results += [facts(d / "f"), facts(d / "link"), facts(d / "sub")]
    for mode in (0o6755, 0o6745, 0o6711):
        os.chmod(d / "f", mode)
        os.chmod(d / "sub", mode)
        os.chown(d / "f", 5, -1)  # set-id bits go, also when root does it
        os.chown(d / "sub", 5, 5)
        results += [facts(d / "f"), facts(d / "sub")]
    return [*results, attempt(os.chown, d / "missing", 0, 0)]


def set_gid_directories(d: Path) -> Any:
    (d / "sub").mkdir()
    os.chown(d / "sub", 0, 5000)
    os.chmod(d / "sub", 0o2775)
    (d / "sub/below").mkdir()
    (d / "sub/f").touch()
    (d / "sub/link").symlink_to("x")
    os.mkfifo(d / "sub/fifo")
    return [facts(d / "sub" / name) for name in ("below", "f", "link", "fifo")]


def extended_attributes(d: Path) -> Any:
    (d / "f").touch()
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    os.mkfifo(d / "fifo")
    f = d / "f"
    os.setxattr(f, "user.a", b"value")
    os.setxattr(f, "user.empty", b"")
    os.setxattr(f, b"user.\xff", bytes(range(256)))
    os.setxattr(d / "sub", "user.long", b"v" * 2000)
    results: list[Any] = [
        sorted(os.listxattr(f)),
        os.getxattr(f, "user.a"),
        os.getxattr(f, "user.empty"),
        os.getxattr(f, b"user.\xff"),
    ]
    buffer = ctypes.create_string_buffer(4096)
    results += [attempt(xattr_call, "getxattr", f, b"user.a", buffer, size) for size in (0, 4, 5, 6)]
    total = xattr_call("listxattr", f, None, 0)
    results += [total, *(attempt(xattr_call, "listxattr", f, buffer, size) for size in (total - 1, total, 4096))]
    results += [
        attempt(os.setxattr, f, "user.a", b"x", os.XATTR_CREATE),
        attempt(os.setxattr, f, "user.new", b"x", os.XATTR_REPLACE),
    ]
    os.setxattr(f, "user.a", b"other", os.XATTR_REPLACE)
    results += [os.getxattr(f, "user.a")]
    results += [
        attempt(os.getxattr, f, "user.none"),
        attempt(os.removexattr, f, "user.none"),
        attempt(os.getxattr, f, "odd.x"),
    ]
    results += [
        attempt(os.setxattr, f, "odd.x", b""),
        attempt(os.setxattr, f, "user." + "n" * 300, b""),
        attempt(os.setxattr, f, "user.big", b"v" * 70000),
    ]
    os.removexattr(f, "user.empty")
    results += [sorted(os.listxattr(f)), os.listxattr(d / "fifo")]
    results += [
        attempt(os.setxattr, d / "fifo", "user.a", b""),
        attempt(os.setxattr, d / "link", "user.a", b"", follow_symlinks=False),
    ]
    os.setxattr(d / "link", "trusted.a", b"of the link", follow_symlinks=False)
    return [
        *results,
        os.listxattr(f) == os.listxattr(d / "link"),
        os.getxattr(d / "link", "trusted.a", follow_symlinks=False),
    ]


def access_control_lists(d: Path) -> Any:
    def acl(*arguments: str | Path) -> str:
        run = subprocess.run(["getfacl", "-cpn", *arguments], capture_output=True, text=True, check=True)
        return run.stdout

    def set_acl(*arguments: str | Path) -> int:
        return subprocess.run(["setfacl", *arguments], stderr=subprocess.DEVNULL, check=False).returncode

    umask = os.umask(0o77)
    (d / "f").touch(mode=0o640)
    (d / "sub").mkdir()
    results: list[Any] = [
        set_acl("-m", "u:1001:rwx,g:1002:r", d / "f"),
        acl(d / "f"),
        facts(d / "f"),
        os.listxattr(d / "f"),
    ]
    os.chmod(d / "f", 0o604)  # the mask is the group's part of the mode
    results += [
        acl(d / "f"),
        set_acl("-x", "u:1001", d / "f"),
        acl(d / "f"),
        set_acl("-b", d / "f"),
        acl(d / "f"),
        os.listxattr(d / "f"),
    ]
    results += [set_acl("-d", "-m", "u:1001:rwx,o::r,m::rwx", d / "sub"), acl(d / "sub")]
    # A default list stands in for the umask.
    (d / "sub/made").touch(mode=0o666)
    (d / "sub/below").mkdir(mode=0o777)
    os.mkfifo(d / "sub/fifo", 0o666)
    for name in ("made", "below", "fifo"):
        results += [acl(d / "sub" / name), facts(d / "sub" / name)]
    results += [set_acl("-k", d / "sub"), acl(d / "sub"), set_acl("-d", "-m", "u:1001:r", d / "f")]
    os.chmod(d / "f", 0o2755)
    results += [set_acl("-m", "u:1001:r", d / "f"), facts(d / "f")]
    os.umask(umask)
    return results


def what_access_says(d: Path) -> Any:
    results: list[Any] = []
    for mode in (0o000, 0o444, 0o200, 0o111, 0o755):
        (d / f"{mode:o}").touch()
        os.chmod(d / f"{mode:o}", mode)
        results += [os.access(d / f"{mode:o}", how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.X_OK)]
    return [*results, os.access(d / "missing", os.F_OK)]


def file_system_statistics(d: Path) -> Any:
    status = os.statvfs(d)
    return status.f_bsize, status.f_frsize, status.f_blocks, status.f_files, status.f_namemax


SCENARIOS: list[Scenario] = [
    directories, kinds_in_a_listing, strange_names, symlinks, hard_links, renames, renames_with_flags, special_files,
    in_a_directory_that_moves, times, modes, owners, set_gid_directories, extended_attributes, access_control_lists,
    what_access_says, file_system_statistics,
]  # fmt: skip
