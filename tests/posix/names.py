"""Names and paths: how long, how deep, how many, and what is refused."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.posix.asking import links, made
from tests.scenarios.comparing import Scenario, attempt
from tests.scenarios.files import opened

NAME_MAX, PATH_MAX, LINK_MAX = 255, 4096, 65000
MOST_LINKED = "most-linked"  # a file beside the scenarios' directories, with LINK_MAX names


def every_call(path: str, other: Path) -> dict[str, Any]:
    """What each call that takes a path answers for this one; ``other`` is a file."""
    calls: dict[str, Callable[[], Any]] = {
        "stat": lambda: os.stat(path), "lstat": lambda: os.lstat(path), "access": lambda: os.access(path, os.F_OK) and "there",
        "open": lambda: os.open(path, os.O_RDONLY), "create": lambda: os.open(path, os.O_CREAT | os.O_WRONLY),
        "mkdir": lambda: os.mkdir(path), "mkfifo": lambda: os.mkfifo(path), "symlink": lambda: os.symlink("x", path),
        "link to": lambda: os.link(other, path), "link from": lambda: os.link(path, other.with_name("l")),
        "rename to": lambda: os.rename(other, path), "rename from": lambda: os.rename(path, other.with_name("r")),
        "unlink": lambda: os.unlink(path), "rmdir": lambda: os.rmdir(path), "readlink": lambda: os.readlink(path),
        "chmod": lambda: os.chmod(path, 0o600), "chown": lambda: os.chown(path, 0, 0), "utime": lambda: os.utime(path),
        "truncate": lambda: os.truncate(path, 0), "getxattr": lambda: os.getxattr(path, "user.a"),
        "setxattr": lambda: os.setxattr(path, "user.a", b""), "statfs": lambda: os.statvfs(path),
        "listdir": lambda: os.listdir(path), "chdir": lambda: os.chdir(path),
    }  # fmt: skip
    return {name: attempt(call) for name, call in calls.items()}


def all_answer(path: str, other: Path, expected: str) -> None:
    other.touch()
    answers = every_call(path, other)
    del answers["access"]  # which says no, and not why
    assert answers == dict.fromkeys(answers, expected)
    assert not os.access(path, os.F_OK)


def a_name_has_255_bytes(d: Path) -> None:
    for name in ("n" * NAME_MAX, "é" * 127 + "n"):
        (d / name).write_text("content")
        assert (d / name).read_text() == "content"
        assert name in os.listdir(d)
        os.rename(d / name, d / ("m" + name[1:]))
    all_answer(os.fspath(d / ("n" * 256)), d / "f", "ENAMETOOLONG")
    all_answer(os.fspath(d / ("é" * 128)), d / "f", "ENAMETOOLONG")
    all_answer(os.fspath(d / ("n" * 256) / "below"), d / "f", "ENAMETOOLONG")


def a_path_has_4095_bytes(d: Path) -> None:
    (d / "f").write_text("content")
    start = os.fspath(d) + "/"
    longest = start + "/" * (PATH_MAX - 1 - len(start) - 1) + "f"
    assert len(longest) == PATH_MAX - 1
    assert os.stat(longest).st_size == 7
    all_answer(start + "/" * (PATH_MAX - len(start) - 1) + "f", d / "f", "ENAMETOOLONG")


def trees_are_deeper_than_a_path_is_long(d: Path) -> None:
    name = "d" * 250
    at = os.open(d, os.O_RDONLY)
    for depth in range(20):
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
        os.close(os.open(f"f{depth}", os.O_CREAT, dir_fd=at))
    assert os.listdir(at) == ["f19"]
    assert attempt(os.stat, f"{d}/" + f"{name}/" * 20) == "ENAMETOOLONG"
    for _ in range(20):
        up = os.open("..", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = up
    assert os.path.samestat(os.fstat(at), os.stat(d))
    os.close(at)


def symlinks_lead_40_times_at_most(d: Path) -> None:
    (d / "0").write_text("content")
    for number in range(41):
        (d / str(number + 1)).symlink_to(str(number))
    # When something is mounted meanwhile, wherever, the kernel begins anew, and counts on: 20 are sure.
    assert (d / "20").read_text() == "content"
    assert attempt(os.stat, d / "41") == "ELOOP"
    (d / "self").symlink_to("self")
    (d / "one").symlink_to("other")
    (d / "other").symlink_to("one")
    for name in ("self", "one", "self/below"):
        for call in (os.stat, os.listdir, lambda path: os.open(path, os.O_RDONLY), lambda path: os.truncate(path, 0)):
            assert attempt(call, d / name) == "ELOOP"
    assert attempt(os.open, d / "self", os.O_CREAT | os.O_WRONLY) == "ELOOP"
    assert attempt(os.mkdir, d / "self") == "EEXIST"
    os.rename(d / "self", d / "renamed")
    os.unlink(d / "renamed")


def symlinks_hold_4095_bytes(d: Path) -> None:
    for length in (1, 59, 60, 1000, PATH_MAX - 1):  # ext4 has room for short ones in the inode
        os.symlink("t" * length, d / str(length))
        status = os.lstat(d / str(length))
        assert (os.readlink(d / str(length)), status.st_size) == ("t" * length, length)
        assert status.st_mode == stat.S_IFLNK | 0o777
    assert attempt(os.symlink, "t" * PATH_MAX, d / "long") == "ENAMETOOLONG"
    assert attempt(os.symlink, "", d / "empty") == "ENOENT"
    (d / "f").touch()
    assert [attempt(os.readlink, d / name) for name in ("f", ".", "no")] == ["EINVAL", "EINVAL", "ENOENT"]


def symlinks_have_owners_and_times_of_their_own(d: Path) -> None:
    made(d / "f", 0o640, 7, 8)
    os.symlink("f", d / "link")
    os.lchown(d / "link", 5, 6)
    os.utime(d / "link", ns=(1_000, 2_000), follow_symlinks=False)
    status, target = os.lstat(d / "link"), os.stat(d / "link")
    assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (5, 6, 2_000)
    assert (target.st_uid, target.st_gid) == (7, 8)
    assert target.st_mtime_ns > 2_000
    os.chmod(d / "link", 0o600)
    assert (os.lstat(d / "link").st_mode, os.stat(d / "link").st_mode) == (stat.S_IFLNK | 0o777, stat.S_IFREG | 0o600)


def paths_go_through_directories_only(d: Path) -> None:
    (d / "f").touch()
    os.mkfifo(d / "fifo")
    (d / "link").symlink_to("f")
    for name in ("f/x", "fifo/x", "link/x", "f/x/y"):
        all_answer(os.fspath(d / name), d / "other", "ENOTDIR")
    assert attempt(os.stat, f"{d}/f/..") == "ENOTDIR"


def paths_go_through_what_is_there(d: Path) -> None:
    (d / "dangling").symlink_to("nowhere")
    for name in ("no/x", "dangling/x"):
        all_answer(os.fspath(d / name), d / "other", "ENOENT")
    assert attempt(os.stat, d / "dangling") == "ENOENT"
    assert attempt(os.stat, f"{d}/no/..") == "ENOENT"


def what_is_there_is_not_made_again(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    (d / "dangling").symlink_to("nowhere")
    for name in ("f", "sub", "dangling"):
        path = d / name
        answers = [
            attempt(call, *arguments, path) for call, *arguments in ((os.mkdir,), (os.mkfifo,), (os.symlink, "x"), (os.link, d / "f"))
        ]  # fmt: skip
        assert (name, answers) == (name, ["EEXIST"] * 4)
    assert sorted(os.listdir(d)) == ["dangling", "f", "sub"]


def each_kind_is_removed_its_own_way(d: Path) -> None:
    (d / "full/below").mkdir(parents=True)
    (d / "f").touch()
    (d / "dirlink").symlink_to("full")
    assert [attempt(os.rmdir, d / name) for name in ("full", "f", "dirlink", "no")] == ["ENOTEMPTY", "ENOTDIR", "ENOTDIR", "ENOENT"]
    assert [attempt(os.unlink, d / name) for name in ("full", "no")] == ["EISDIR", "ENOENT"]
    (d / "full/.hidden").touch()
    os.rmdir(d / "full/below")
    assert attempt(os.rmdir, d / "full") == "ENOTEMPTY"
    os.unlink(d / "full/.hidden")
    os.rmdir(d / "full")
    os.unlink(d / "dirlink")
    os.unlink(d / "f")
    assert os.listdir(d) == []


def links_of_files_are_counted(d: Path) -> None:
    (d / "f").write_text("content")
    (d / "sub").mkdir()
    for number in range(10):
        os.link(d / "f", d / f"sub/{number}")
    assert {links(d / "f"), *(links(d / f"sub/{number}") for number in range(10))} == {11}
    os.unlink(d / "sub/0")
    os.rename(d / "sub/1", d / "sub/2")  # one file: nothing happens
    assert links(d / "f") == 10
    (d / "other").touch()
    os.rename(d / "other", d / "sub/3")
    assert (links(d / "f"), links(d / "sub/3")) == (9, 1)
    assert attempt(os.link, d / "sub", d / "x") == "EPERM"
    assert attempt(os.link, d / "no", d / "x") == "ENOENT"
    for kind in ("fifo", "link"):
        os.mkfifo(d / kind) if kind == "fifo" else os.symlink("f", d / kind)
        os.link(d / kind, d / (kind + "2"), follow_symlinks=False)
        assert links(d / kind) == 2
        assert os.path.samestat(os.lstat(d / kind), os.lstat(d / (kind + "2")))


def a_file_has_65000_names(d: Path) -> None:
    most_linked = d.parent / MOST_LINKED
    assert links(most_linked) == LINK_MAX
    assert attempt(os.link, most_linked, d / "one more") == "EMLINK"
    assert os.listdir(d) == []


def links_of_directories_are_their_subdirectories(d: Path) -> None:
    (d / "a").mkdir()
    (d / "b").mkdir()
    assert [links(d), links(d / "a")] == [4, 2]
    for number in range(5):
        (d / f"a/{number}").mkdir()
        (d / f"a/f{number}").touch()
    assert links(d / "a") == 7
    os.rename(d / "a/0", d / "b/0")
    os.rename(d / "a/1", d / "a/2")
    assert [links(d / "a"), links(d / "b")] == [5, 3]
    os.rmdir(d / "a/2")
    assert links(d / "a") == 4
    with opened(d / "a/3", os.O_RDONLY) as fd:
        os.rmdir(d / "a/3")
        assert links(fd) == 0


def other_file_systems_are_elsewhere(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    elsewhere = Path(f"/dev/shm/{os.getpid()}")
    assert os.stat("/dev/shm").st_dev != os.stat(d).st_dev
    elsewhere.touch()
    try:
        assert attempt(os.rename, d / "f", elsewhere) == "EXDEV"
        assert attempt(os.rename, d / "sub", elsewhere) == "EXDEV"
        assert attempt(os.rename, elsewhere, d / "f") == "EXDEV"
        assert attempt(os.link, d / "f", elsewhere.with_suffix(".link")) == "EXDEV"
        assert attempt(os.link, elsewhere, d / "new") == "EXDEV"
    finally:
        elsewhere.unlink()


def names_are_bytes(d: Path) -> None:
    """Neither case nor composition makes two names one."""
    names = [b"a", b"A", "é".encode(), "e\u0301".encode(), b"\xe9", b"\xff", b" a", b"a ", b"a\n", b"*", b"\\", b"..."]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(d), name))).write_bytes(name)
    assert sorted(os.listdir(os.fsencode(d))) == sorted(names)
    for name in names:
        assert Path(os.fsdecode(os.path.join(os.fsencode(d), name))).read_bytes() == name


SCENARIOS: list[Scenario] = [
    a_name_has_255_bytes, a_path_has_4095_bytes, trees_are_deeper_than_a_path_is_long, symlinks_lead_40_times_at_most,
    symlinks_hold_4095_bytes, symlinks_have_owners_and_times_of_their_own, paths_go_through_directories_only,
    paths_go_through_what_is_there, what_is_there_is_not_made_again, each_kind_is_removed_its_own_way,
    links_of_files_are_counted, a_file_has_65000_names, links_of_directories_are_their_subdirectories, other_file_systems_are_elsewhere,
    names_are_bytes,
]  # fmt: skip
