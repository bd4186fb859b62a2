"""Which operation sets which times of which object, and who may set them by hand.

``a``, ``m`` and ``c`` are the times of access, of the content and of the inode. What the access time is after reading is in
`deviations`: it depends on who has read.
"""

import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coherency.fuse.syscalls import UTIME_NOW, UTIME_OMIT, utimens
from tests.posix.asking import made, wait_for_a_later_time
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import fallocate, opened
from tests.scenarios.names import EXCHANGE, renameat2

OWNER, OTHER = 1001, 1003
SECOND = 1_000_000_000


def times(path: Path | int) -> tuple[int, int, int]:
    status = os.lstat(path) if isinstance(path, Path) else os.fstat(path)
    return status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns


def set_by(action: Callable[[], Any], **objects: Path | tuple[Path, Path]) -> dict[str, str]:
    """Which times the action has set to now, by the name of the object. A pair: what it is called before and after."""
    pairs = {name: where if isinstance(where, tuple) else (where, where) for name, where in objects.items()}
    before = {name: times(old) for name, (old, _) in pairs.items()}
    wait_for_a_later_time(*(old for old, _ in pairs.values()))
    action()
    changed = {}
    for name, (_, new) in pairs.items():
        after = times(new)
        assert all(now >= then for now, then in zip(after, before[name], strict=True))
        changed[name] = "".join(letter for letter, now, then in zip("amc", after, before[name], strict=True) if now != then)
    return changed


def making(d: Path) -> None:
    (d / "f").touch()
    for action in (
        lambda: os.mkdir(d / "sub"), lambda: os.mkfifo(d / "fifo"), lambda: os.symlink("f", d / "link"),
        lambda: os.close(os.open(d / "new", os.O_CREAT | os.O_EXCL)), lambda: os.mknod(d / "node", stat.S_IFREG | 0o600),
    ):  # fmt: skip
        assert set_by(action, directory=d, f=d / "f") == {"directory": "mc", "f": ""}
    for name in ("sub", "fifo", "link", "new", "node"):
        assert len(set(times(d / name))) == 1, name
        assert times(d / name)[0] <= times(d)[1]
    with opened(d, os.O_RDWR | os.O_TMPFILE) as fd:
        assert len(set(times(fd))) == 1


def linking(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    moved = set_by(lambda: os.link(d / "f", d / "sub/g"), f=d / "f", directory=d, sub=d / "sub")
    assert moved == {"f": "c", "directory": "", "sub": "mc"}


def removing(d: Path) -> None:
    (d / "f").touch()
    os.link(d / "f", d / "g")
    (d / "sub").mkdir()
    assert set_by(lambda: os.unlink(d / "g"), f=d / "f", directory=d, sub=d / "sub") == {"f": "c", "directory": "mc", "sub": ""}
    assert set_by(lambda: os.rmdir(d / "sub"), f=d / "f", directory=d) == {"f": "", "directory": "mc"}
    with opened(d / "f", os.O_RDWR) as fd:
        before = times(fd)
        wait_for_a_later_time(d / "f")
        os.unlink(d / "f")
        after = times(fd)
    assert [now > then for now, then in zip(after, before, strict=True)] == [False, False, True]


def renaming(d: Path) -> None:
    for name in ("from", "to", "sub", "empty", "from/below"):
        (d / name).mkdir()
    for name in ("from/f", "from/h", "to/g", "to/h2"):
        (d / name).touch()
    os.link(d / "to/g", d / "replaced")
    moved = set_by(
        lambda: os.rename(d / "from/f", d / "to/g"), f=(d / "from/f", d / "to/g"), old=d / "from", new=d / "to",
        replaced=d / "replaced",
    )  # fmt: skip
    assert moved == {"f": "c", "old": "mc", "new": "mc", "replaced": "c"}
    moved = set_by(lambda: os.rename(d / "from/h", d / "from/i"), h=(d / "from/h", d / "from/i"), old=d / "from", new=d / "to")
    assert moved == {"h": "c", "old": "mc", "new": ""}
    moved = set_by(
        lambda: os.rename(d / "from/below", d / "to/below"), below=(d / "from/below", d / "to/below"), old=d / "from", new=d / "to"
    )  # fmt: skip
    assert moved == {"below": "c", "old": "mc", "new": "mc"}
    moved = set_by(
        lambda: renameat2(d / "from/i", d / "to/h2", EXCHANGE), i=(d / "from/i", d / "to/h2"), h2=(d / "to/h2", d / "from/i"),
        old=d / "from", new=d / "to",
    )  # fmt: skip
    assert moved == {"i": "c", "h2": "c", "old": "mc", "new": "mc"}
    os.link(d / "to/h2", d / "to/same")
    moved = set_by(lambda: os.rename(d / "to/h2", d / "to/same"), f=d / "to/same", directory=d / "to")
    assert moved == {"f": "", "directory": ""}


def changing_attributes(d: Path) -> None:
    f = made(d / "f", 0o644)
    for action in (
        lambda: os.chmod(f, 0o600), lambda: os.chmod(f, 0o600), lambda: os.chown(f, 5, 6), lambda: os.chown(f, 5, 6),
        lambda: os.setxattr(f, "user.a", b"1"), lambda: os.removexattr(f, "user.a"),
    ):  # fmt: skip
        assert set_by(action, f=f, directory=d) == {"f": "c", "directory": ""}
    assert set_by(lambda: os.utime(f, ns=(times(f)[0], times(f)[1])), f=f) == {"f": "c"}
    (d / "link").symlink_to("f")
    assert set_by(lambda: os.lchown(d / "link", 5, 6), link=d / "link", f=f) == {"link": "c", "f": ""}


def changing_the_content(d: Path) -> None:
    f = d / "f"
    f.write_bytes(b"content")
    with opened(f, os.O_RDWR) as fd, opened(d / "source") as source:
        os.write(source, b"12345")
        actions: dict[str, tuple[Callable[[], Any], str]] = {
            "pwrite": (lambda: os.pwrite(fd, b"x", 0), "mc"),
            "pwrite of nothing": (lambda: os.pwrite(fd, b"", 0), ""),
            "ftruncate": (lambda: os.ftruncate(fd, 3), "mc"),
            "ftruncate to the same size": (lambda: os.ftruncate(fd, 3), "mc"),
            "truncate": (lambda: os.truncate(f, 5), "mc"),
            "truncate to the same size": (lambda: os.truncate(f, 5), "mc"),
            "fallocate": (lambda: os.posix_fallocate(fd, 0, 9000), "mc"),
            "punch a hole": (lambda: fallocate(fd, 1 | 2, 0, 4096), "mc"),
            "copy_file_range": (lambda: os.copy_file_range(source, fd, 3, 0, 0), "mc"),
            "sendfile": (lambda: os.sendfile(fd, source, 0, 3), "mc"),
            "read": (lambda: os.pread(fd, 9, 0), ""),
            "fsync": (lambda: os.fsync(fd), ""),
            "open to write": (lambda: os.close(os.open(f, os.O_WRONLY | os.O_APPEND)), ""),
            "O_TRUNC": (lambda: os.close(os.open(f, os.O_WRONLY | os.O_TRUNC)), "mc"),
            "O_TRUNC of an empty file": (lambda: os.close(os.open(f, os.O_WRONLY | os.O_TRUNC)), "mc"),
        }
        for name, (action, expected) in actions.items():
            got = set_by(action, f=f, directory=d)
            assert (name, got["f"].replace("a", ""), got["directory"]) == (name, expected, "")


def pages_that_are_written_back(d: Path) -> None:
    """A shared mapping: by the time msync has returned at the latest."""
    with opened(d / "f") as fd:
        os.ftruncate(fd, mmap.PAGESIZE)

        def store() -> None:
            with mmap.mmap(fd, mmap.PAGESIZE) as memory:
                memory[0] = 1
                memory.flush()

        assert set_by(store, f=d / "f")["f"].replace("a", "") == "mc"

        def store_privately() -> None:
            with mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE) as memory:
                memory[0] = 2
                memory.flush()

        assert set_by(store_privately, f=d / "f")["f"].replace("a", "") == ""


def now_and_omit(d: Path) -> None:
    f = d / "f"
    f.touch()
    now, omit = (0, UTIME_NOW), (0, UTIME_OMIT)
    with opened(f, os.O_RDWR) as fd:
        for atime, mtime, changed in (
            (now, omit, "ac"), (omit, now, "mc"), (now, now, "amc"), (omit, omit, ""), ((1, 2), omit, "ac"), (omit, (3, 4), "mc"),
        ):  # fmt: skip
            utimens(fd, (5, 6), (7, 8))
            before = times(f)
            assert before[:2] == (5 * SECOND + 6, 7 * SECOND + 8)
            wait_for_a_later_time(f)
            utimens(fd, atime, mtime)
            after = times(f)
            assert "".join(letter for letter, new, old in zip("amc", after, before, strict=True) if new != old) == changed
            for given, got in ((atime, after[0]), (mtime, after[1])):
                if given == now:
                    assert got == after[2]  # the time of the change itself
                elif given != omit:
                    assert got == given[0] * SECOND + given[1]


def far_and_negative_times(d: Path) -> None:
    """What ext4 can hold with 256-byte inodes: 1901 to 2446, in nanoseconds. What is beyond becomes the nearest."""
    f, first, last = d / "f", -(2**31), 2**34 - 2**31 - 1
    f.touch()
    for second in (-1, 0, 1, first, last, 2**31 - 1, 2**31, 2**32, -123_456_789):
        for fraction in (0, 1, 999_999_999):
            if second in (first, last) and fraction:
                continue
            wanted = second * SECOND + fraction
            os.utime(f, ns=(wanted, wanted))
            assert times(f)[:2] == (wanted, wanted)
    os.utime(f, ns=((first - 5) * SECOND, (last + 5) * SECOND))
    assert times(f)[:2] == (first * SECOND, last * SECOND)


def who_may_set_times(d: Path) -> None:
    made(d / "f", 0o666, OWNER, OWNER)
    made(d / "closed", 0o644, OWNER, OWNER)
    for name, uid, to_now, to_something in (
        ("f", OWNER, None, None), ("f", OTHER, None, "EPERM"), ("closed", OTHER, "EACCES", "EPERM"), ("closed", OWNER, None, None),
        ("closed", 0, None, None),
    ):  # fmt: skip
        now, omit = (0, UTIME_NOW), (0, UTIME_OMIT)
        pairs = ((now, now), ((1, 2), (3, 4)), (now, omit), (omit, (3, 4)), (omit, omit))

        def set_all() -> list[Any]:
            with opened(Path(name), os.O_PATH) as fd:  # noqa: B023
                return [attempt(utimens, fd, *pair) for pair in pairs]  # noqa: B023

        got = as_user(d, set_all, uid=uid)
        assert (name, uid, got) == (name, uid, [to_now, to_something, to_something, to_something, None])
    assert attempt(os.utime, d / "no") == "ENOENT"


def a_wrong_number_of_nanoseconds(d: Path) -> None:
    (d / "f").touch()
    with opened(d / "f", os.O_RDWR) as fd:
        before = times(fd)
        assert attempt(utimens, fd, (0, SECOND), (0, 0)) == "EINVAL"
        assert attempt(utimens, fd, (0, 0), (0, -1)) == "EINVAL"
        assert times(fd) == before


def failures_set_nothing(d: Path) -> None:
    (d / "sub/below").mkdir(parents=True)
    (d / "f").touch()
    for action in (
        lambda: os.mkdir(d / "sub"), lambda: os.rmdir(d / "sub"), lambda: os.rename(d / "f", d / "sub"), lambda: os.unlink(d / "no"),
        lambda: os.link(d / "f", d / "sub"), lambda: os.setxattr(d / "f", "odd.a", b""), lambda: os.truncate(d / "sub", 0),
        lambda: os.open(d / "f", os.O_CREAT | os.O_EXCL),
    ):  # fmt: skip
        got = set_by(lambda: attempt(action), d=d, sub=d / "sub", f=d / "f")  # noqa: B023
        assert got == {"d": "", "sub": "", "f": ""}


SCENARIOS: list[Scenario] = [
    making, linking, removing, renaming, changing_attributes, changing_the_content, pages_that_are_written_back, now_and_omit,
    far_and_negative_times, who_may_set_times, a_wrong_number_of_nanoseconds, failures_set_nothing,
]  # fmt: skip
