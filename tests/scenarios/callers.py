"""What users without privileges make, may do and may not do. Each function is a scenario: see `comparing`."""

import mmap
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

from tests.scenarios.comparing import Scenario, as_user, attempt


def facts(path: Path | str) -> Any:
    status = os.lstat(path)
    return oct(status.st_mode), status.st_uid, status.st_gid


def made(directory: Path) -> list[Any]:
    return [(name, facts(directory / name)) for name in sorted(os.listdir(directory))]


def make_one_of_each() -> None:
    os.mkdir("directory", 0o7777)
    os.close(os.open("file", os.O_CREAT | os.O_EXCL, 0o6777))
    os.symlink("anything", "link")
    os.mkfifo("fifo", 0o666)
    os.mknod("node", stat.S_IFREG | 0o666)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666)
    os.link(f"/proc/self/fd/{fd}", "temporary", dst_dir_fd=os.open(".", os.O_RDONLY), follow_symlinks=True)


def what_is_made_belongs_to_its_maker(d: Path) -> Any:
    results: list[Any] = []
    for number, (uid, gid, umask) in enumerate([(1001, 1002, 0o22), (0, 0, 0), (1003, 1001, 0o77), (1001, 5, 0)]):
        own = d / str(number)
        own.mkdir()
        own.chmod(0o777)
        results += [as_user(own, make_one_of_each, uid=uid, gid=gid, umask=umask), made(own)]
    return results


def in_a_set_gid_directory(d: Path) -> Any:
    os.chown(d, 0, 5000)
    os.chmod(d, 0o2777)
    return [
        as_user(d, make_one_of_each),
        made(d),
        as_user(d, lambda: os.mkdir("directory/below")),
        facts(d / "directory/below"),
    ]


def by_supplementary_groups(d: Path) -> Any:
    os.chown(d, 0, 5000)
    os.chmod(d, 0o770)
    (d / "f").write_text("secret")
    os.chown(d / "f", 0, 5001)
    os.chmod(d / "f", 0o640)
    results: list[Any] = [as_user(d, make_one_of_each), as_user(d, lambda: Path("f").read_text(), groups=[5000])]
    results += [
        as_user(d, lambda: Path("f").read_text(), groups=[5000, 5001]),
        as_user(d, make_one_of_each, groups=[7, 5000, 8]),
    ]
    results += [
        as_user(d, lambda: os.chown("file", -1, 5000), groups=[5000]),
        as_user(d, lambda: os.chown("file", -1, 5001), groups=[5000]),
    ]
    return [*results, made(d)]


def what_is_denied(d: Path) -> Any:
    (d / "closed").mkdir(mode=0o700)
    (d / "closed/f").touch()
    (d / "sticky").mkdir()
    os.chmod(d / "sticky", 0o1777)
    (d / "sticky/f").touch()
    (d / "f").write_text("f")
    os.chmod(d / "f", 0o644)
    return [
        as_user(d, function) for function in (
            lambda: os.listdir("closed"), lambda: os.stat("closed/f"), lambda: os.mkdir("closed/x"), lambda: os.unlink("sticky/f"),
            lambda: os.rename("sticky/f", "sticky/g"), lambda: os.chmod("f", 0o777), lambda: os.chown("f", 1001, 1002),
            lambda: os.truncate("f", 0), lambda: Path("f").write_text("x"), lambda: Path("f").read_text(),
            lambda: os.utime("f"), lambda: os.utime("f", ns=(1, 2)), lambda: os.setxattr("f", "user.a", b""),
            lambda: os.setxattr("f", "trusted.a", b""), lambda: os.link("f", "again"), lambda: os.mknod("n", stat.S_IFCHR, 259),
            lambda: os.rename("f", "own"), lambda: os.unlink("own"), lambda: os.access("closed", os.X_OK),
            lambda: os.open("closed/f", os.O_CREAT | os.O_RDONLY), lambda: os.chroot("."),
        )
    ]  # fmt: skip


def what_a_writer_may(d: Path) -> Any:
    (d / "f").write_text("f")
    os.chmod(d / "f", 0o666)
    return [
        as_user(d, lambda: Path("f").write_text("written")), (d / "f").read_text(), as_user(d, lambda: os.utime("f")),
        as_user(d, lambda: os.utime("f", ns=(1, 2))), as_user(d, lambda: os.truncate("f", 2)), facts(d / "f"),
        as_user(d, lambda: os.setxattr("f", "user.a", b"v")), as_user(d, lambda: os.getxattr("f", "user.a")),
    ]  # fmt: skip


def by_access_control_list(d: Path) -> Any:
    (d / "f").write_text("for one user")
    os.chmod(d / "f", 0o600)
    subprocess.run(["setfacl", "-m", "u:1001:r,g:5000:rw", d / "f"], check=True)
    read, write = (lambda: Path("f").read_text()), (lambda: Path("f").write_text("changed"))
    results: list[Any] = [
        as_user(d, read),
        as_user(d, write),
        as_user(d, read, uid=1009),
        as_user(d, write, uid=1009, groups=[5000]),
    ]
    subprocess.run(["setfacl", "-b", d / "f"], check=True)
    return [*results, as_user(d, read), as_user(d, read, uid=1009, groups=[5000])]


# Each takes the name of a file that its user may write, but does not own.
def write(name: str) -> None:
    os.write(os.open(name, os.O_WRONLY), b"x")


def write_at(name: str) -> None:
    os.pwrite(os.open(name, os.O_RDWR), b"x", 3)


def truncate(name: str) -> None:
    os.truncate(name, 1)


def truncate_open(name: str) -> None:
    os.ftruncate(os.open(name, os.O_RDWR), 1)


def open_truncating(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))


def create_truncating(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))


def allocate(name: str) -> None:
    os.posix_fallocate(os.open(name, os.O_RDWR), 0, 100)


def copy_range(name: str) -> None:
    os.copy_file_range(os.open("source", os.O_RDONLY), os.open(name, os.O_RDWR), 5)


def only_read(name: str) -> None:
    Path(name).read_bytes()


def only_open(name: str) -> None:
    os.close(os.open(name, os.O_RDWR))


def set_id_bits_of_written_files(d: Path) -> Any:
    (d / "source").write_bytes(b"12345")
    results: list[Any] = []
    for change in (
        write, write_at, truncate, truncate_open, open_truncating, create_truncating, allocate, copy_range, only_read, only_open,
    ):  # fmt: skip
        for mode in (0o6777, 0o4766, 0o2777, 0o1777):
            name = f"{change.__name__} {mode:o}"
            (d / name).write_bytes(b"content")
            os.chown(d / name, 1001, 1002)  # of the group: or else Linux drops set-gid of what is no program, too
            os.chmod(d / name, mode)
            results += [(name, as_user(d, lambda: change(name), uid=1009, gid=1002), facts(d / name))]  # noqa: B023
            os.chmod(d / name, mode)
            change(str(d / name)) if change is not copy_range else None  # root's set-id bits stay
            results += [facts(d / name)]
    return results


def set_id_bits_and_owners(d: Path) -> Any:
    results: list[Any] = []
    for mode in (0o6755, 0o6745, 0o2644):
        (d / "f").touch()
        os.chown(d / "f", 1001, 1002)
        os.chmod(d / "f", mode)
        results += [as_user(d, lambda: os.chown("f", -1, 5000), groups=[5000]), facts(d / "f")]
        os.chown(d / "f", 1001, 6000)
        results += [as_user(d, lambda: os.chmod("f", 0o2755)), facts(d / "f")]  # not of its group: no set-gid
        (d / "f").unlink()
    return results


def capabilities_of_written_files(d: Path) -> Any:
    (d / "f").write_bytes(b"program")
    os.chmod(d / "f", 0o777)
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service
    results: list[Any] = []
    for change in (write, truncate, open_truncating):
        os.setxattr(d / "f", "security.capability", capability)
        results += [os.getxattr(d / "f", "security.capability") == capability]
        results += [as_user(d, lambda: change("f")), attempt(os.getxattr, d / "f", "security.capability")]  # noqa: B023
    return results


def written_by_memory(d: Path) -> Any:
    """By somebody who could not open the file again."""

    def work() -> bytes:
        fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o400)
        os.ftruncate(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            memory[:5] = b"paged"
        os.fsync(fd)
        return os.pread(fd, 5, 0)

    return [as_user(d, work), (d / "f").read_bytes()[:6], facts(d / "f")]


SCENARIOS: list[Scenario] = [
    what_is_made_belongs_to_its_maker, in_a_set_gid_directory, by_supplementary_groups, what_is_denied, what_a_writer_may,
    by_access_control_list, set_id_bits_of_written_files, set_id_bits_and_owners, capabilities_of_written_files,
    written_by_memory,
]  # fmt: skip
