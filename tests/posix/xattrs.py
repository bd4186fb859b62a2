"""Extended attributes, and the access control lists that are kept in them."""

import ctypes
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.posix.asking import made, mode
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import opened
from tests.scenarios.names import xattr_call

OWNER, GROUP, NAMED, OTHER = 1001, 1002, 1003, 1004
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, GROUP_, MASK, OTHER_ = 1, 2, 4, 8, 16, 32
NOBODY = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    """(tag, permissions, id) in the order and form of the kernel: acl(5), linux/posix_acl_xattr.h."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, bits, id_) for tag, bits, id_ in entries)


def usual(user: int, named: int, group: int, mask: int, other: int) -> bytes:
    """With one named user, NAMED."""
    return acl(
        (USER_OBJ, user, NOBODY), (USER, named, NAMED), (GROUP_OBJ, group, NOBODY), (MASK, mask, NOBODY), (OTHER_, other, NOBODY)
    )  # fmt: skip


def allowed(path: str) -> str:
    return "".join(letter for letter, how in (("r", os.R_OK), ("w", os.W_OK), ("x", os.X_OK)) if os.access(path, how))


# --- extended attributes ---


def set_replaced_and_removed(d: Path) -> None:
    f = d / "f"
    f.touch()
    assert attempt(os.setxattr, f, "user.a", b"x", os.XATTR_REPLACE) == "ENODATA"
    os.setxattr(f, "user.a", b"one", os.XATTR_CREATE)
    assert attempt(os.setxattr, f, "user.a", b"x", os.XATTR_CREATE) == "EEXIST"
    os.setxattr(f, "user.a", b"another", os.XATTR_REPLACE)
    assert os.getxattr(f, "user.a") == b"another"
    os.setxattr(f, "user.empty", b"")
    os.setxattr(f, "trusted.a", bytes(range(256)))
    assert os.getxattr(f, "user.empty") == b""
    assert os.getxattr(f, "trusted.a") == bytes(range(256))
    assert sorted(os.listxattr(f)) == ["trusted.a", "user.a", "user.empty"]
    os.removexattr(f, "user.a")
    assert [attempt(call, f, "user.a") for call in (os.getxattr, os.removexattr)] == ["ENODATA"] * 2
    assert sorted(os.listxattr(f)) == ["trusted.a", "user.empty"]
    with opened(f, os.O_RDONLY) as fd:
        os.setxattr(fd, "user.b", b"by descriptor")
        assert os.getxattr(fd, "user.b") == os.getxattr(f, "user.b") == b"by descriptor"


def the_size_of_the_buffer(d: Path) -> None:
    f = d / "f"
    f.touch()
    os.setxattr(f, "user.a", b"value")
    os.setxattr(f, "user.bc", b"")
    buffer = ctypes.create_string_buffer(100)
    assert [attempt(xattr_call, "getxattr", f, b"user.a", buffer, size) for size in (0, 4, 5, 99)] == [5, "ERANGE", 5, 5]
    assert [attempt(xattr_call, "listxattr", f, buffer, size) for size in (0, 14, 15, 99)] == [15, "ERANGE", 15, 15]
    assert attempt(xattr_call, "getxattr", f, b"user.no", buffer, 0) == "ENODATA"
    (d / "bare").touch()
    assert xattr_call("listxattr", d / "bare", buffer, 99) == 0


def names_and_values_that_are_refused(d: Path) -> None:
    f = d / "f"
    f.touch()
    for name, value, answer in (
        ("odd.a", b"", "ENOTSUP"), ("a", b"", "ENOTSUP"), ("user.", b"", "EINVAL"), ("", b"", "ERANGE"),
        ("user." + "n" * 251, b"", "ERANGE"), ("user.a", b"v" * 65537, "E2BIG"), ("user.a", b"v" * 65536, "ENOSPC"),
    ):  # fmt: skip
        assert (name[:9], len(value), attempt(os.setxattr, f, name, value)) == (name[:9], len(value), answer)
    assert attempt(os.getxattr, f, "odd.a") == attempt(os.removexattr, f, "odd.a") == "ENOTSUP"
    assert attempt(os.setxattr, f, "user.a", b"", 3) in ("EINVAL", "ENODATA", "EEXIST")
    assert os.listxattr(f) == []
    os.setxattr(f, "user." + "n" * 250, b"v" * 3000)
    assert os.listxattr(f) == ["user." + "n" * 250]
    assert [attempt(os.listxattr, d / "no"), attempt(os.getxattr, d / "no", "user.a")] == ["ENOENT"] * 2


def what_has_which_attributes(d: Path) -> None:
    (d / "f").touch()
    (d / "link").symlink_to("f")
    (d / "sub").mkdir()
    os.setxattr(d / "sub", "user.a", b"of a directory")
    os.setxattr(d / "link", "user.a", b"followed")
    assert os.getxattr(d / "f", "user.a") == b"followed"
    assert attempt(os.setxattr, d / "link", "user.b", b"", follow_symlinks=False) == "EPERM"
    assert attempt(os.getxattr, d / "link", "user.b", follow_symlinks=False) == "ENODATA"
    os.setxattr(d / "link", "trusted.a", b"of the link", follow_symlinks=False)
    assert os.listxattr(d / "link", follow_symlinks=False) == ["trusted.a"]
    assert os.listxattr(d / "f") == ["user.a"]
    os.link(d / "f", d / "g")
    os.rename(d / "f", d / "moved")
    (d / "g").write_text("content")
    os.chmod(d / "g", 0o600)
    assert os.getxattr(d / "moved", "user.a") == os.getxattr(d / "g", "user.a") == b"followed"


def who_may_read_and_set_attributes(d: Path) -> None:
    made(d / "open", 0o666, OWNER, GROUP)
    made(d / "readable", 0o644, OWNER, GROUP)
    made(d / "closed", 0o600, OWNER, GROUP)
    made(d / "sticky", stat.S_IFDIR | 0o1777, OWNER, GROUP)
    for name in ("open", "readable", "closed", "sticky"):
        os.setxattr(d / name, "user.a", b"value")
        os.setxattr(d / name, "trusted.a", b"secret")
    for name, get, put in (
        ("open", b"value", None), ("readable", b"value", "EACCES"), ("closed", "EACCES", "EACCES"), ("sticky", b"value", "EPERM"),
    ):  # fmt: skip
        by_others: list[Callable[[], Any]] = [
            lambda: os.getxattr(name, "user.a"), lambda: os.setxattr(name, "user.a", b"value"),  # noqa: B023
        ]  # fmt: skip
        by_its_owner: list[Callable[[], Any]] = [
            lambda: os.getxattr(name, "trusted.a"), lambda: os.setxattr(name, "trusted.a", b""),  # noqa: B023
            lambda: os.setxattr(name, "user.b", b""),  # noqa: B023
        ]  # fmt: skip
        got = as_user(d, lambda: [attempt(action) for action in by_others], uid=OTHER, gid=OTHER)  # noqa: B023
        assert (name, got) == (name, [get, put])
        got = as_user(d, lambda: [attempt(action) for action in by_its_owner], uid=OWNER)  # noqa: B023
        assert (name, got) == (name, ["ENODATA", "EPERM", None])
    assert as_user(d, lambda: sorted(os.listxattr("open")), uid=OTHER) == ["user.a", "user.b"]
    assert sorted(os.listxattr(d / "open")) == ["trusted.a", "user.a", "user.b"]


# --- access control lists ---


def a_list_decides_by_user_then_group_then_others(d: Path) -> None:
    made(d / "f", 0o600, OWNER, GROUP)
    os.setxattr(
        d / "f", ACCESS,
        acl((USER_OBJ, 6, NOBODY), (USER, 5, NAMED), (GROUP_OBJ, 4, NOBODY), (GROUP_, 2, 5000), (GROUP_, 1, 5001), (MASK, 7, NOBODY),
            (OTHER_, 1, NOBODY)),
    )  # fmt: skip
    for uid, gid, groups, may in (
        (OWNER, 7, [5000], "rw"), (NAMED, GROUP, [5000], "rx"), (OTHER, GROUP, [], "r"), (OTHER, 7, [5000], "w"),
        (OTHER, 7, [5001], "x"), (OTHER, 7, [5002], "x"),
    ):  # fmt: skip
        assert (uid, gid, groups, as_user(d, lambda: allowed("f"), uid=uid, gid=gid, groups=groups)) == (uid, gid, groups, may)
    # Of several groups one must allow it all: r and w are allowed, but not rw.
    both = as_user(d, lambda: [allowed("f"), os.access("f", os.R_OK | os.W_OK)], uid=OTHER, gid=GROUP, groups=[5000])
    assert both == ["rw", False]


def the_mask_limits_and_is_the_groups_part_of_the_mode(d: Path) -> None:
    made(d / "f", 0o600, OWNER, GROUP)
    os.setxattr(d / "f", ACCESS, usual(6, 7, 7, 5, 0))
    assert mode(d / "f") == 0o650
    assert as_user(d, lambda: allowed("f"), uid=NAMED) == "rx"
    os.chmod(d / "f", 0o624)
    assert os.getxattr(d / "f", ACCESS) == usual(6, 7, 7, 2, 4)
    assert as_user(d, lambda: allowed("f"), uid=NAMED) == "w"
    assert as_user(d, lambda: allowed("f"), uid=OTHER, gid=GROUP) == "w"
    assert as_user(d, lambda: allowed("f"), uid=OTHER, gid=7) == "r"
    os.setxattr(d / "f", ACCESS, usual(4, 0, 0, 7, 1))
    assert mode(d / "f") == 0o471
    assert as_user(d, lambda: allowed("f"), uid=NAMED) == ""
    os.removexattr(d / "f", ACCESS)
    assert mode(d / "f") == 0o471
    assert attempt(os.getxattr, d / "f", ACCESS) == "ENODATA"
    assert as_user(d, lambda: allowed("f"), uid=NAMED, gid=7) == "x"


def a_list_that_says_what_the_mode_says_is_none(d: Path) -> None:
    made(d / "f", 0o777)
    os.setxattr(d / "f", ACCESS, acl((USER_OBJ, 6, NOBODY), (GROUP_OBJ, 4, NOBODY), (OTHER_, 0, NOBODY)))
    assert (mode(d / "f"), os.listxattr(d / "f")) == (0o640, [])
    assert attempt(os.getxattr, d / "f", ACCESS) == "ENODATA"


def directories_hand_their_default_list_down(d: Path) -> None:
    """In place of the umask."""
    made(d / "sub", stat.S_IFDIR | 0o777)
    os.setxattr(d / "sub", DEFAULT, usual(7, 7, 5, 7, 0))
    assert attempt(os.getxattr, d / "sub", ACCESS) == "ENODATA"

    def work() -> None:
        os.close(os.open("sub/f", os.O_CREAT, 0o666))
        os.close(os.open("sub/narrow", os.O_CREAT, 0o600))
        os.mkdir("sub/below", 0o777)
        os.mkfifo("sub/fifo", 0o666)
        os.mknod("sub/node", stat.S_IFREG | 0o666)
        os.symlink("f", "sub/link")

    assert as_user(d, work, umask=0o77) is None
    sub = d / "sub"
    for name in ("f", "fifo", "node"):
        assert (name, oct(mode(sub / name)), os.getxattr(sub / name, ACCESS)) == (name, "0o660", usual(6, 7, 5, 6, 0))
        assert attempt(os.getxattr, sub / name, DEFAULT) == "ENODATA"
    assert (mode(sub / "narrow"), os.getxattr(sub / "narrow", ACCESS)) == (0o600, usual(6, 7, 5, 0, 0))
    assert (oct(mode(sub / "below")), os.getxattr(sub / "below", ACCESS)) == ("0o770", usual(7, 7, 5, 7, 0))
    assert os.getxattr(sub / "below", DEFAULT) == usual(7, 7, 5, 7, 0)
    assert os.listxattr(sub / "link", follow_symlinks=False) == []
    assert as_user(d, lambda: allowed("sub/f"), uid=NAMED) == "rw"
    with opened(sub, os.O_RDWR | os.O_TMPFILE, 0o666) as fd:
        assert oct(mode(fd)) == "0o660"
    os.removexattr(sub, DEFAULT)
    assert as_user(d, lambda: os.mkdir("sub/plain", 0o777), umask=0o77) is None
    assert mode(sub / "plain") == 0o700


def lists_that_are_refused(d: Path) -> None:
    made(d / "f", 0o666, OWNER, GROUP)
    (d / "sub").mkdir()
    (d / "link").symlink_to("f")
    minimal = acl((USER_OBJ, 6, NOBODY), (GROUP_OBJ, 4, NOBODY), (OTHER_, 0, NOBODY))
    assert attempt(os.setxattr, d / "f", DEFAULT, minimal) == "EACCES"
    assert attempt(os.setxattr, d / "link", ACCESS, minimal, follow_symlinks=False) == "ENOTSUP"
    for broken in (
        acl((USER_OBJ, 6, NOBODY)), acl((USER_OBJ, 6, NOBODY), (USER, 6, NAMED), (GROUP_OBJ, 4, NOBODY), (OTHER_, 0, NOBODY)),
        minimal[:-1], b"\1" + minimal[1:],
    ):  # fmt: skip
        assert attempt(os.setxattr, d / "f", ACCESS, broken) in ("EINVAL", "ENOTSUP")
        assert attempt(os.setxattr, d / "sub", DEFAULT, broken) in ("EINVAL", "ENOTSUP")
    assert as_user(d, lambda: os.setxattr("f", ACCESS, minimal), uid=OTHER, gid=GROUP) == "EPERM"
    assert as_user(d, lambda: os.removexattr("f", ACCESS), uid=OTHER, gid=GROUP) == "EPERM"
    assert as_user(d, lambda: os.setxattr("f", ACCESS, minimal), uid=OWNER) is None
    assert mode(d / "f") == 0o640


def a_list_of_who_is_not_of_the_group_takes_set_gid_away(d: Path) -> None:
    for groups, bits in (([], 0o755), ([5000], 0o2755)):
        (d / "f").unlink(missing_ok=True)
        made(d / "f", 0o2755, OWNER, 5000)
        set_ = lambda: os.setxattr("f", ACCESS, usual(7, 5, 5, 5, 5))  # noqa: E731
        assert as_user(d, set_, uid=OWNER, groups=groups) is None
        assert (groups, oct(mode(d / "f"))) == (groups, oct(bits))


def lists_of_directories_let_in(d: Path) -> None:
    made(d / "sub", stat.S_IFDIR | 0o700)
    made(d / "sub/f", 0o644, 0, 0, b"text")
    actions: list[Callable[[], Any]] = [
        lambda: os.listdir("sub"), lambda: Path("sub/f").read_text(), lambda: os.mkdir("sub/new"),
    ]  # fmt: skip
    for named, expected in (
        (0, ["EACCES"] * 3), (1, ["EACCES", "text", "EACCES"]), (5, [["f"], "text", "EACCES"]), (7, [["f"], "text", None]),
    ):  # fmt: skip
        os.setxattr(d / "sub", ACCESS, usual(7, named, 0, 7, 0))
        assert as_user(d, lambda: [attempt(action) for action in actions], uid=NAMED) == expected
        assert as_user(d, lambda: [attempt(action) for action in actions], uid=OTHER) == ["EACCES"] * 3


SCENARIOS: list[Scenario] = [
    set_replaced_and_removed, the_size_of_the_buffer, names_and_values_that_are_refused, what_has_which_attributes,
    who_may_read_and_set_attributes, a_list_decides_by_user_then_group_then_others,
    the_mask_limits_and_is_the_groups_part_of_the_mode, a_list_that_says_what_the_mode_says_is_none,
    directories_hand_their_default_list_down, lists_that_are_refused, a_list_of_who_is_not_of_the_group_takes_set_gid_away,
    lists_of_directories_let_in,
]  # fmt: skip
