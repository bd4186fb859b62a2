"""Who may do what: owners, groups, mode bits, sticky and set-gid directories."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.posix.asking import made, mode, owner
from tests.scenarios.comparing import Scenario, as_user, attempt
from tests.scenarios.files import opened

OWNER, GROUP, OTHER = 1001, 1002, 1003


def read(name: str) -> Callable[[], Any]:
    return lambda: Path(name).read_text()


def the_first_class_that_matches_decides(d: Path) -> None:
    """Also when a later one would allow more."""
    made(d / "f", 0o604, OWNER, GROUP, b"text")
    for bits, uid, gid, groups, answer in (
        (0o400, OWNER, 7, (), "text"), (0o077, OWNER, GROUP, (), "EACCES"), (0o707, 7, GROUP, (), "EACCES"),
        (0o040, 7, GROUP, (), "text"), (0o040, 7, 7, (GROUP,), "text"), (0o707, 7, 7, (6, GROUP), "EACCES"),
        (0o004, 7, 7, (), "text"), (0o004, 7, 7, (GROUP,), "EACCES"), (0o770, OTHER, 7, (), "EACCES"), (0, 0, 0, (), "text"),
    ):  # fmt: skip
        os.chmod(d / "f", bits)
        got = as_user(d, read("f"), uid=uid, gid=gid, groups=groups)
        assert (oct(bits), uid, gid, groups, got) == (oct(bits), uid, gid, groups, answer)


def one_of_many_groups_is_enough(d: Path) -> None:
    made(d / "f", 0o640, 0, 7777, b"text")
    many = list(range(20_000, 20_300))
    assert as_user(d, read("f"), groups=many) == "EACCES"
    assert as_user(d, read("f"), groups=[*many, 7777]) == "text"


def what_the_bits_of_a_directory_mean(d: Path) -> None:
    (d / "sub").mkdir()
    (d / "sub/f").touch()
    for bits, expected in (
        (0o700, ["EACCES", "EACCES", "EACCES"]), (0o704, [["f"], "EACCES", "EACCES"]), (0o701, ["EACCES", True, "EACCES"]),
        (0o705, [["f"], True, "EACCES"]), (0o706, [["f"], "EACCES", "EACCES"]), (0o703, ["EACCES", True, None]),
    ):  # fmt: skip
        os.chmod(d / "sub", bits)
        got = as_user(
            d, lambda: [attempt(os.listdir, "sub"), attempt(lambda: os.stat("sub/f").st_size == 0), attempt(os.mkdir, "sub/new")]
        )  # fmt: skip
        assert (oct(bits), got) == (oct(bits), expected)


def root_reads_and_writes_all_and_runs_what_is_a_program(d: Path) -> None:
    made(d / "f", 0, OWNER, GROUP, b"text")
    assert [os.access(d / "f", how) for how in (os.R_OK, os.W_OK, os.X_OK)] == [True, True, False]
    assert (d / "f").read_bytes() == b"text"
    (d / "f").write_bytes(b"other")
    os.chmod(d / "f", 0o001)
    assert os.access(d / "f", os.X_OK)


def access_asks_for_the_real_user(d: Path) -> None:
    made(d / "f", 0o600, OWNER, GROUP)

    def ask() -> list[bool]:
        os.setresuid(7, OWNER, 7)
        return [os.access("f", os.R_OK), os.access("f", os.R_OK, effective_ids=True)]

    assert as_user(d, ask, uid=0, gid=0) == [False, True]


def an_open_file_stays_open_to_who_opened_it(d: Path) -> None:
    made(d / "f", 0o666, 0, 0, b"text")

    def work() -> list[Any]:
        with opened(Path("f"), os.O_RDWR) as fd:
            os.rename("f", "closed/f")
            os.chmod("closed", 0)
            return [os.pread(fd, 9, 0), os.pwrite(fd, b"TEXT", 0), attempt(os.stat, "closed/f")]

    made(d / "closed", stat.S_IFDIR | 0o700, OWNER, GROUP)
    assert as_user(d, work, uid=OWNER) == [b"text", 4, "EACCES"]
    with opened(d / "g", os.O_RDWR | os.O_CREAT, 0o666) as fd:
        os.fchmod(fd, 0)
        assert os.write(fd, b"x") == 1


def who_makes_a_file_may_use_it_whatever_its_mode(d: Path) -> None:
    def work() -> list[Any]:
        with opened(Path("f"), os.O_RDWR | os.O_CREAT, 0o000) as fd:
            return [os.write(fd, b"x"), os.pread(fd, 9, 0), attempt(os.open, "f", os.O_RDONLY)]

    assert as_user(d, work) == [1, b"x", "EACCES"]
    assert mode(d / "f") == 0


def new_files_belong_to_the_effective_user_and_group(d: Path) -> None:
    def work() -> None:
        os.setresgid(5, 6, 5)
        os.setresuid(7, 8, 7)
        Path("f").touch()
        os.mkdir("sub")
        os.symlink("f", "link")

    as_user(d, work, uid=0, gid=0)
    assert [owner(d / name) for name in ("f", "sub", "link")] == [(8, 6)] * 3


def the_umask_takes_bits_away(d: Path) -> None:
    def work() -> None:
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o6777))
        os.mkdir("sub", 0o1777)
        os.mkfifo("fifo", 0o666)
        os.mknod("node", stat.S_IFREG | 0o666)
        os.symlink("f", "link")

    for umask, f, sub, fifo in ((0o000, 0o6777, 0o1777, 0o666), (0o027, 0o6750, 0o1750, 0o640), (0o777, 0o6000, 0o1000, 0)):
        own = d / f"{umask:o}"
        made(own, stat.S_IFDIR | 0o777)
        assert as_user(own, work, umask=umask) is None
        got = [oct(mode(own / name)) for name in ("f", "sub", "fifo", "node", "link")]
        assert got == [oct(bits) for bits in (f, sub, fifo, fifo, 0o777)]


def chmod_ignores_the_umask_and_is_for_the_owner(d: Path) -> None:
    made(d / "f", 0o600, OWNER, GROUP)
    assert as_user(d, lambda: os.chmod("f", 0o777), uid=OWNER, umask=0o77) is None
    assert mode(d / "f") == 0o777
    assert as_user(d, lambda: os.chmod("f", 0o700), uid=OTHER, gid=GROUP) == "EPERM"
    assert as_user(d, lambda: os.chmod("f", 0o7777), uid=OWNER, gid=GROUP) is None
    assert mode(d / "f") == 0o7777


def set_gid_needs_membership(d: Path) -> None:
    """The owner of a file who is not in its group cannot make it set-gid."""
    made(d / "f", 0o755, OWNER, 5000)
    for groups, bits in (((), 0o0755), ((5000,), 0o2755)):
        assert as_user(d, lambda: os.chmod("f", 0o2755), uid=OWNER, groups=groups) is None
        assert mode(d / "f") == bits


def who_may_give_files_away(d: Path) -> None:
    made(d / "f", 0o755, OWNER, GROUP)
    for uid, groups, to, answer in (
        (OWNER, (), (OTHER, -1), "EPERM"), (OWNER, (), (-1, 5000), "EPERM"), (OWNER, (5000,), (-1, 5000), None),
        (OWNER, (5000,), (OWNER, GROUP), None), (OWNER, (), (-1, -1), None), (OTHER, (5000,), (-1, 5000), "EPERM"),
        (0, (), (OTHER, 9), None),
    ):  # fmt: skip
        got = as_user(d, lambda: os.chown("f", *to), uid=uid, gid=GROUP if uid else 0, groups=groups)  # noqa: B023
        assert (uid, groups, to, got) == (uid, groups, to, answer)
    assert owner(d / "f") == (OTHER, 9)


def a_new_owner_takes_set_id_bits_away(d: Path) -> None:
    """Of files, from root as well; set-gid without execution by the group once meant mandatory locks, and stays."""
    for before, after in ((0o6755, 0o755), (0o6745, 0o2745), (0o4644, 0o644), (0o2711, 0o711), (0o1777, 0o1777)):
        made(d / "f", before, OWNER, GROUP)
        os.chown(d / "f", OTHER, -1)
        assert oct(mode(d / "f")) == oct(after)
    made(d / "sub", stat.S_IFDIR | 0o6755, OWNER, GROUP)
    os.chown(d / "sub", OTHER, 5000)
    assert mode(d / "sub") == 0o6755
    made(d / "own", 0o6755, OWNER, GROUP)
    assert as_user(d, lambda: os.chown("own", -1, 5000), uid=OWNER, groups=[5000]) is None
    assert mode(d / "own") == 0o755


def _on(flags: int, use: Callable[[int], Any]) -> Callable[[str], None]:
    def change(name: str) -> None:
        with opened(Path(name), flags) as fd:
            use(fd)

    return change


def _from_source(copy: Callable[[int, int], Any]) -> Callable[[int], None]:
    def change(fd: int) -> None:
        with opened(Path("source"), os.O_RDONLY) as source:
            copy(source, fd)

    return change


WRITERS: dict[str, Callable[[str], None]] = {
    "write": _on(os.O_WRONLY, lambda fd: os.write(fd, b"x")),
    "pwritev": _on(os.O_WRONLY, lambda fd: os.pwritev(fd, [b"x", b"y"], 3)),
    "append": _on(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "truncate": lambda name: os.truncate(name, 3),
    "truncate to the same size": lambda name: os.truncate(name, 7),
    "ftruncate": _on(os.O_RDWR, lambda fd: os.ftruncate(fd, 99)),
    "O_TRUNC": _on(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "fallocate": _on(os.O_RDWR, lambda fd: os.posix_fallocate(fd, 0, 9000)),
    "copy_file_range": _on(os.O_RDWR, _from_source(lambda source, fd: os.copy_file_range(source, fd, 4))),
    "sendfile": _on(os.O_RDWR, _from_source(lambda source, fd: os.sendfile(fd, source, 0, 4))),
}
READERS: dict[str, Callable[[str], None]] = {
    "open": _on(os.O_RDWR, lambda fd: None),
    "read": _on(os.O_RDWR, lambda fd: os.read(fd, 9)),
    "write nothing": _on(os.O_RDWR, lambda fd: os.write(fd, b"")),
}


def _modes_after(d: Path, changes: dict[str, Callable[[str], None]], *before: int, **caller: int) -> dict[str, str]:
    """The modes of files, one for each change and mode, which somebody has changed."""
    (d / "source").write_bytes(b"1234")
    names = {f"{change} of {bits:o}": (change, bits) for change in changes for bits in before}
    for name, (_, bits) in names.items():
        made(d / name, bits, OWNER, GROUP, b"content")

    def work() -> None:
        for name, (change, _) in names.items():
            changes[change](name)

    assert as_user(d, work, **caller) is None
    return {name: f"{mode(d / name):o}" for name in names}


def writing_takes_set_id_bits_away(d: Path) -> None:
    expected = {0o6777: "777", 0o4766: "766", 0o2777: "777", 0o2766: "2766", 0o1777: "1777"}
    found = _modes_after(d, WRITERS, *expected, uid=OTHER, gid=GROUP)
    assert found == {f"{change} of {bits:o}": after for change in WRITERS for bits, after in expected.items()}


def root_writes_and_set_id_bits_stay(d: Path) -> None:
    assert set(_modes_after(d, WRITERS, 0o6777, uid=0, gid=0).values()) == {"6777"}


def neither_reading_nor_failing_takes_set_id_bits_away(d: Path) -> None:
    assert set(_modes_after(d, READERS, 0o6777, uid=OTHER, gid=GROUP).values()) == {"6777"}
    made(d / "closed", 0o6755, OWNER, GROUP)
    assert as_user(d, lambda: os.truncate("closed", 0), uid=OTHER) == "EACCES"
    assert mode(d / "closed") == 0o6755


def entries_leave_the_bits_of_their_directory(d: Path) -> None:
    made(d / "sub", stat.S_IFDIR | 0o7777, OWNER, GROUP)
    assert as_user(d, lambda: os.mkdir("sub/below"), uid=OTHER) is None
    assert mode(d / "sub") == 0o7777


def set_gid_directories_hand_their_group_down(d: Path) -> None:
    made(d / "sub", stat.S_IFDIR | 0o2777, 0, 5000)

    def work() -> None:
        os.mkdir("sub/below", 0o755)
        os.close(os.open("sub/f", os.O_CREAT, 0o644))
        os.close(os.open("sub/program", os.O_CREAT, 0o2755))  # by one who is not of that group
        os.symlink("f", "sub/link")
        os.mkfifo("sub/fifo")
        os.mknod("sub/node", stat.S_IFREG | 0o644)
        os.mkdir("plain")
        os.rename("plain", "sub/plain")

    assert as_user(d, work) is None
    assert [owner(d / "sub" / name) for name in ("below", "f", "program", "link", "fifo", "node")] == [(1001, 5000)] * 6
    assert [oct(mode(d / "sub" / name)) for name in ("below", "f", "program")] == ["0o2755", "0o644", "0o755"]
    assert (owner(d / "sub/plain"), mode(d / "sub/plain")) == ((1001, 1002), 0o755)  # what was moved there keeps its own
    assert as_user(d, lambda: os.mkdir("sub/below/deeper", 0o700)) is None
    assert (owner(d / "sub/below/deeper"), mode(d / "sub/below/deeper")) == ((1001, 5000), 0o2700)

    def program() -> None:
        os.close(os.open("sub/ours", os.O_CREAT, 0o2755))

    assert as_user(d, program, groups=[5000]) is None
    assert mode(d / "sub/ours") == 0o2755


def sticky_directories_protect_what_others_own(d: Path) -> None:
    made(d / "sub", stat.S_IFDIR | 0o1777, OTHER, GROUP)
    actions: dict[str, Callable[[], Any]] = {
        "unlink": lambda: os.unlink("sub/unlinked"),
        "rename": lambda: os.rename("sub/renamed", "sub/again"),
        "move out": lambda: os.rename("sub/moved", "moved"),
        "replace": lambda: os.rename("sub/mine", "sub/replaced"),
        "rmdir": lambda: os.rmdir("sub/empty"),
    }
    for uid, answer in ((7, "EPERM"), (OWNER, None), (OTHER, None), (0, None)):  # nobody; of the file, of the directory; root
        for name in ("unlinked", "renamed", "moved", "replaced"):
            made(d / "sub" / name, 0o666, OWNER, GROUP)
        made(d / "sub/mine", 0o666, uid, GROUP)
        if not (d / "sub/empty").exists():
            made(d / "sub/empty", stat.S_IFDIR | 0o777, OWNER, GROUP)
        got = as_user(d, lambda: {name: attempt(action) for name, action in actions.items()}, uid=uid, gid=GROUP)
        assert (uid, got) == (uid, dict.fromkeys(actions, answer))


def sticky_does_not_keep_from_making_and_linking(d: Path) -> None:
    made(d / "sub", stat.S_IFDIR | 0o1777, OTHER, GROUP)

    def work() -> None:
        os.mkdir("sub/a")
        os.rename("sub/a", "sub/b")
        os.rmdir("sub/b")

    assert as_user(d, work) is None


def removing_needs_the_directory_and_not_the_file(d: Path) -> None:
    made(d / "open", stat.S_IFDIR | 0o777)
    made(d / "closed", stat.S_IFDIR | 0o755)
    for name in ("open", "closed"):
        made(d / name / "f", 0, 0, 0)
        made(d / name / "mine", 0o666, 1001, 1002)
    assert as_user(d, lambda: os.unlink("open/f")) is None
    assert as_user(d, lambda: os.unlink("closed/mine")) == "EACCES"
    assert as_user(d, lambda: os.rename("closed/mine", "closed/x")) == "EACCES"
    assert as_user(d, lambda: os.rename("closed/mine", "open/x")) == "EACCES"
    assert as_user(d, lambda: os.rename("open/mine", "closed/x")) == "EACCES"
    assert as_user(d, lambda: os.link("open/mine", "closed/x")) == "EACCES"


def moving_a_directory_changes_it_too(d: Path) -> None:
    """Its ``..`` does: so it must be writable if it gets another parent."""
    made(d / "sub", stat.S_IFDIR | 0o755, 0, 0)
    made(d / "to", stat.S_IFDIR | 0o777)
    assert as_user(d, lambda: os.rename("sub", "renamed")) is None
    assert as_user(d, lambda: os.rename("renamed", "to/sub")) == "EACCES"
    os.chmod(d / "renamed", 0o757)
    assert as_user(d, lambda: os.rename("renamed", "to/sub")) is None


def what_only_root_may(d: Path) -> None:
    made(d / "f", 0o666)
    for action in (
        lambda: os.mknod("c", stat.S_IFCHR | 0o666, os.makedev(1, 3)), lambda: os.mknod("b", stat.S_IFBLK, os.makedev(7, 0)),
        lambda: os.setxattr("f", "trusted.a", b""), lambda: os.chown("f", 1001, 1002),
    ):  # fmt: skip
        assert as_user(d, action) == "EPERM"
    assert as_user(d, lambda: os.mkfifo("fifo")) is None
    assert as_user(d, lambda: os.open("f", os.O_RDONLY | os.O_NOATIME)) == "EPERM"


def writing_needs_permission_and_truncating_too(d: Path) -> None:
    made(d / "f", 0o644, 0, 0, b"text")
    actions: list[Callable[[], Any]] = [
        lambda: os.open("f", os.O_WRONLY), lambda: os.open("f", os.O_RDWR), lambda: os.truncate("f", 0),
        lambda: os.open("f", os.O_RDONLY | os.O_TRUNC), lambda: os.open("f", os.O_WRONLY | os.O_CREAT),
    ]  # fmt: skip
    assert [as_user(d, action) for action in actions] == ["EACCES"] * 5
    assert as_user(d, lambda: os.open("f", os.O_RDONLY | os.O_CREAT | os.O_EXCL)) == "EEXIST"
    assert (d / "f").read_bytes() == b"text"


SCENARIOS: list[Scenario] = [
    the_first_class_that_matches_decides, one_of_many_groups_is_enough, what_the_bits_of_a_directory_mean,
    root_reads_and_writes_all_and_runs_what_is_a_program, access_asks_for_the_real_user,
    an_open_file_stays_open_to_who_opened_it, who_makes_a_file_may_use_it_whatever_its_mode,
    new_files_belong_to_the_effective_user_and_group, the_umask_takes_bits_away,
    chmod_ignores_the_umask_and_is_for_the_owner, set_gid_needs_membership, who_may_give_files_away,
    a_new_owner_takes_set_id_bits_away, writing_takes_set_id_bits_away, root_writes_and_set_id_bits_stay,
    neither_reading_nor_failing_takes_set_id_bits_away, entries_leave_the_bits_of_their_directory,
    set_gid_directories_hand_their_group_down, sticky_directories_protect_what_others_own,
    sticky_does_not_keep_from_making_and_linking, removing_needs_the_directory_and_not_the_file,
    moving_a_directory_changes_it_too, what_only_root_may, writing_needs_permission_and_truncating_too,
]  # fmt: skip
