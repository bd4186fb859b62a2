"""The rules of rename(2) and renameat2(2)."""

import os
import stat
from pathlib import Path

from tests.posix.asking import links, made
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import opened
from tests.scenarios.names import EXCHANGE, NOREPLACE, WHITEOUT, renameat2

KINDS = ("file", "empty", "full", "link", "dirlink", "fifo")


def make(path: Path, kind: str) -> None:
    if kind == "file":
        path.touch()
    elif kind in ("empty", "full"):
        path.mkdir()
        if kind == "full":
            (path / "below").touch()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "link" else "full")


def what_may_replace_what(d: Path) -> None:
    """Directories replace empty directories; everything else replaces what is no directory."""
    for old in KINDS:
        for new in KINDS:
            source, target = d / f"{old} for {new}", d / f"{new} by {old}"
            make(source, old)
            make(target, new)
            number = os.lstat(source).st_ino
            if old in ("empty", "full"):
                expected = {"empty": None, "full": "ENOTEMPTY"}.get(new, "ENOTDIR")
            else:
                expected = "EISDIR" if new in ("empty", "full") else None
            assert (old, new, attempt(os.rename, source, target)) == (old, new, expected)
            assert os.lstat(source if expected else target).st_ino == number
            assert os.path.lexists(source) == bool(expected)


def a_directory_does_not_go_into_itself(d: Path) -> None:
    (d / "a/b/c").mkdir(parents=True)
    (d / "up").symlink_to("a/b")
    for old, new, answer in (
        ("a", "a/x", "EINVAL"), ("a", "a/b/c", "EINVAL"), ("a/b", "a/b/c/x", "EINVAL"), ("a", "up/x", "EINVAL"),
        ("a/b", "a", "ENOTEMPTY"), ("a/b/c", "a", "ENOTEMPTY"), ("a/b/c", "a/b", "ENOTEMPTY"), ("a", "a", None),
    ):  # fmt: skip
        assert (old, new, attempt(os.rename, d / old, d / new)) == (old, new, answer)
    assert attempt(renameat2, d / "a", d / "a/b", EXCHANGE) == "EINVAL"
    assert attempt(renameat2, d / "a/b", d / "a", EXCHANGE) == "EINVAL"
    os.rename(d / "a/b/c", d / "c")
    os.rename(d / "a", d / "c/a")
    assert (d / "c/a/b").is_dir()


def dot_and_dot_dot_have_no_other_name(d: Path) -> None:
    (d / "sub/below").mkdir(parents=True)
    (d / "f").touch()
    for old, new, answer in (
        ("sub/.", "x", "EBUSY"), ("sub/below/..", "x", "EBUSY"), ("sub", "sub/.", "EBUSY"), ("f", "sub/below/..", "EBUSY"),
        (".", "x", "EBUSY"), ("f", ".", "EBUSY"),
    ):  # fmt: skip
        assert (old, new, attempt(os.rename, f"{d}/{old}", f"{d}/{new}")) == (old, new, answer)
        number = "EEXIST" if new.endswith(".") else "EBUSY"
        assert (old, new, attempt(renameat2, f"{d}/{old}", f"{d}/{new}", NOREPLACE)) == (old, new, number)
    answers = {
        "rmdir .": attempt(os.rmdir, f"{d}/sub/below/."),
        "rmdir ..": attempt(os.rmdir, f"{d}/sub/below/.."),
        "unlink .": attempt(os.unlink, f"{d}/sub/."),
        "unlink ..": attempt(os.unlink, f"{d}/sub/.."),
        "mkdir .": attempt(os.mkdir, f"{d}/sub/."),
        "link .": attempt(os.link, d / "f", f"{d}/sub/."),
        "create .": attempt(os.open, f"{d}/sub/.", os.O_CREAT | os.O_WRONLY),
    }
    assert answers == {
        "rmdir .": "EINVAL", "rmdir ..": "ENOTEMPTY", "unlink .": "EISDIR", "unlink ..": "EISDIR", "mkdir .": "EEXIST",
        "link .": "EEXIST", "create .": "EISDIR",
    }  # fmt: skip


def two_names_of_one_file_stay_two(d: Path) -> None:
    (d / "a").write_text("content")
    os.link(d / "a", d / "b")
    os.rename(d / "a", d / "b")
    os.rename(d / "b", d / "b")
    assert sorted(os.listdir(d)) == ["a", "b"]
    assert links(d / "a") == 2
    assert attempt(renameat2, d / "a", d / "b", NOREPLACE) == "EEXIST"
    renameat2(d / "a", d / "b", EXCHANGE)
    assert sorted(os.listdir(d)) == ["a", "b"]


def slashes_at_the_end_mean_a_directory(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    (d / "dirlink").symlink_to("sub")
    (d / "dangling").symlink_to("nowhere")
    p = os.fspath(d)
    answers = [
        attempt(os.rename, p + "/f/", p + "/x"), attempt(os.rename, p + "/f", p + "/x/"), attempt(os.rename, p + "/f", p + "/sub/"),
        attempt(os.stat, p + "/f/"), attempt(os.lstat, p + "/f/"), attempt(os.unlink, p + "/f/"),
        attempt(os.unlink, p + "/sub/"), attempt(os.open, p + "/f/", os.O_RDONLY),
        attempt(os.open, p + "/new/", os.O_CREAT | os.O_WRONLY), attempt(os.symlink, "x", p + "/new/"),
        attempt(os.link, p + "/f", p + "/new/"), attempt(os.mkfifo, p + "/new/"), attempt(os.rmdir, p + "/f/"),
        attempt(os.rmdir, p + "/dirlink/"), attempt(os.mkdir, p + "/dangling/"), attempt(os.truncate, p + "/f/", 0),
    ]  # fmt: skip
    assert answers == [
        "ENOTDIR", "ENOTDIR", "ENOTDIR", "ENOTDIR", "ENOTDIR", "ENOTDIR", "EISDIR", "ENOTDIR", "EISDIR", "ENOENT", "ENOENT",
        "ENOENT", "ENOTDIR", "ENOTDIR", "EEXIST", "ENOTDIR",
    ]  # fmt: skip
    assert os.path.samestat(os.lstat(p + "/dirlink/"), os.stat(d / "sub"))
    os.mkdir(p + "/new/")
    os.rename(p + "/new/", p + "/newer//")
    os.rmdir(p + "/newer///")
    assert sorted(os.listdir(d)) == ["dangling", "dirlink", "f", "sub"]


def nothing_is_replaced_if_one_says_so(d: Path) -> None:
    make(d / "f", "file")
    for kind in KINDS:
        make(d / kind, kind)
        assert (kind, attempt(renameat2, d / "f", d / kind, NOREPLACE)) == (kind, "EEXIST")
        renameat2(d / kind, d / f"new {kind}", NOREPLACE)
        assert not os.path.lexists(d / kind)
    assert attempt(renameat2, d / "missing", d / "x", NOREPLACE) == "ENOENT"


def any_two_names_can_be_exchanged(d: Path) -> None:
    (d / "beside").mkdir()
    for one in KINDS:
        for other in KINDS:
            here, there = d / f"{one} {other}", d / f"beside/{other} {one}"
            make(here, one)
            make(there, other)
            numbers = os.lstat(here).st_ino, os.lstat(there).st_ino
            renameat2(here, there, EXCHANGE)
            assert (os.lstat(there).st_ino, os.lstat(here).st_ino) == numbers
    assert links(d / "beside") == 2 + 2 * len(KINDS)
    assert attempt(renameat2, d / "file file", d / "missing", EXCHANGE) == "ENOENT"
    assert attempt(renameat2, d / "missing", d / "file file", EXCHANGE) == "ENOENT"


def a_whiteout_is_left_behind(d: Path) -> None:
    (d / "f").write_text("content")
    renameat2(d / "f", d / "g", WHITEOUT)
    status = os.lstat(d / "f")
    assert (stat.S_IFMT(status.st_mode), status.st_rdev, links(d / "f")) == (stat.S_IFCHR, 0, 1)
    assert (d / "g").read_text() == "content"
    made(d / "mine", 0o644, 1001, 1002)
    assert as_user(d, lambda: renameat2(Path("mine"), Path("moved"), WHITEOUT)) is None
    assert stat.S_ISCHR(os.lstat(d / "mine").st_mode)


def flags_that_contradict_each_other(d: Path) -> None:
    (d / "a").touch()
    (d / "b").touch()
    for flags in (NOREPLACE | EXCHANGE, WHITEOUT | EXCHANGE, 1 << 5, 1 << 31):
        assert attempt(renameat2, d / "a", d / "b", flags) == "EINVAL"


def both_ends_must_be_there(d: Path) -> None:
    (d / "f").touch()
    (d / "sub").mkdir()
    for old, new, answer in (
        ("no", "x", "ENOENT"), ("no/f", "x", "ENOENT"), ("f", "no/x", "ENOENT"), ("f/x", "y", "ENOTDIR"), ("sub", "f/x", "ENOTDIR"),
        ("", "x", "ENOENT"), ("f", "", "ENOENT"),
    ):  # fmt: skip
        got = attempt(os.rename, d / old if old else "", d / new if new else "")
        assert (old, new, got) == (old, new, answer)


def a_moved_directory_has_another_parent(d: Path) -> None:
    (d / "a/sub").mkdir(parents=True)
    (d / "b").mkdir()
    (d / "a/sub/f").write_text("content")
    assert (links(d / "a"), links(d / "b")) == (3, 2)
    with opened(d / "a/sub", os.O_RDONLY | os.O_DIRECTORY) as at:
        os.rename(d / "a/sub", d / "b/moved")
        assert (links(d / "a"), links(d / "b"), links(at)) == (2, 3, 2)
        assert os.stat("..", dir_fd=at).st_ino == os.stat(d / "b").st_ino
        assert os.stat("f", dir_fd=at).st_size == 7
    assert attempt(os.stat, d / "a/sub") == "ENOENT"


def what_is_replaced_loses_a_name(d: Path) -> None:
    (d / "new").write_text("new")
    (d / "old").write_text("old")
    os.link(d / "old", d / "other")
    (d / "gone").write_text("gone")
    with opened(d / "old", os.O_RDONLY) as old, opened(d / "gone", os.O_RDWR) as gone:
        os.rename(d / "new", d / "old")
        assert (links(old), links(d / "other")) == (1, 1)
        os.rename(d / "old", d / "gone")
        assert (links(gone), os.pread(gone, 9, 0), os.write(gone, b"GONE")) == (0, b"gone", 4)
    (d / "sub").mkdir()
    (d / "empty").mkdir()
    with opened(d / "empty", os.O_RDONLY) as empty:
        os.rename(d / "sub", d / "empty")
        assert (links(empty), attempt(os.mkdir, "x", dir_fd=empty)) == (0, "ENOENT")


def what_is_open_moves_along(d: Path) -> None:
    (d / "to").mkdir()
    with opened(d / "f") as fd:
        os.write(fd, b"one")
        os.rename(d / "f", d / "to/g")
        os.write(fd, b" two")
        assert (d / "to/g").read_bytes() == b"one two"
        assert os.path.samestat(os.fstat(fd), os.stat(d / "to/g"))


def the_root_of_a_mount_stays(d: Path) -> None:
    root = next(path for path in d.parents if os.path.ismount(path))
    (d / "sub").mkdir()
    assert attempt(os.rmdir, root) == "EBUSY"
    assert attempt(os.rename, root, root.with_name("elsewhere")) == "EBUSY"


SCENARIOS: list[Scenario] = [
    what_may_replace_what, a_directory_does_not_go_into_itself, dot_and_dot_dot_have_no_other_name,
    two_names_of_one_file_stay_two, slashes_at_the_end_mean_a_directory, nothing_is_replaced_if_one_says_so,
    any_two_names_can_be_exchanged, a_whiteout_is_left_behind, flags_that_contradict_each_other, both_ends_must_be_there,
    a_moved_directory_has_another_parent, what_is_replaced_loses_a_name, what_is_open_moves_along,
    the_root_of_a_mount_stays,
]  # fmt: skip
