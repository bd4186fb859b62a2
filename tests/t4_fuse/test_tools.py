"""What people run on a mount: each tool must leave the same behind as on a plain directory, and the guests must see it.

In each test a tool works on a guest mount and on a plain directory. Then the guest, a second guest and the share are
compared byte for byte and attribute for attribute, and the result with that of the plain directory.

Not here, since it does not work yet: byte-range and flock locks across guests. Each guest's kernel keeps its own, so two
guests may hold the same lock. The SQLite tests let the guests take turns for that reason.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guests import Host
from tests.snapshots import assert_same_tree, differences, facts, hard_links, portable, snapshot, timeless

OLD_NS = 1_234_567_890_123_456_789
KERNEL_CACHING = ("none", "auto", "always")


@dataclass(frozen=True)
class Bench:
    """Where one test works: the same new directory in a guest, in another guest and in the share; and a plain one."""

    guest: Path
    other: Path
    share: Path
    plain: Path
    scratch: Path  # for sources and the like, on no mount

    def both(self) -> tuple[Path, Path]:
        return self.guest, self.plain

    def assert_everybody_agrees(self) -> None:
        assert_same_tree(self.guest, self.share)
        assert_same_tree(self.other, self.share)


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    with Host(make_socket_dir()) as host:
        for mode in ("access", *KERNEL_CACHING):
            host.mount(mode, mode)
        host.mount("other", "access")
        yield host


@pytest.fixture
def make_bench(host: Host, tmp_path: Path) -> Callable[[str], Bench]:
    def make(mode: str) -> Bench:
        name = f"{tmp_path.name}-{mode}"
        bench = Bench(
            host.directory / mode / name, host.directory / "other" / name, host.share / name,
            tmp_path / "plain", tmp_path / "scratch",
        )  # fmt: skip
        for directory in (bench.guest, bench.plain, bench.scratch):
            directory.mkdir()
        return bench

    return make


@pytest.fixture
def bench(make_bench: Callable[[str], Bench]) -> Bench:
    return make_bench("access")


def run(*command: str | os.PathLike[str], cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed and must not depend on this user's settings."""
    environment = {
        "PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC", "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z",
        "GIT_COMMITTER_NAME": "C", "GIT_COMMITTER_EMAIL": "c@example.org", "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z",
        "PIP_CONFIG_FILE": "/dev/null", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=False)
    output, errors = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{output}{errors}"
    return output


def make_museum(root: Path) -> None:
    """One of each kind of object, with every attribute that a tool can carry over."""
    (root / "directory/deep/er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "file").write_bytes(b"content\n" * 1000)
    (root / "nothing").touch()
    (root / ("x" * 255)).write_text("the longest name")
    with open(root / "sparse", "wb") as file:
        file.write(b"begin")
        file.truncate(1 << 20)
    for number in range(16):
        (root / f"directory/deep/{number}").write_text(str(number))
    Path(os.fsdecode(os.fsencode(root) + b"/n\xf6t utf-8 \xff\n")).write_text("a name")
    os.link(root / "file", root / "directory/hard link")
    os.link(root / "file", root / "hard link")
    os.symlink("file", root / "symlink")
    os.symlink("nowhere/at/all", root / "dangling")
    os.symlink("../..", root / "directory/up")
    os.symlink("directory/deep", root / "to directory")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(7, 99))
    os.mknod(root / "socket", stat.S_IFSOCK | 0o755)
    for name, uid, gid, mode in (
        ("file", 1000, 100, 0o640), ("nothing", 54321, 0, 0o4755), ("sparse", 3, 4, 0o2751),
        ("empty", 1, 2, 0o1777), ("directory", 5, 50, 0o2775), ("symlink", 7, 8, None),
    ):  # fmt: skip
        os.lchown(root / name, uid, gid)
        if mode is not None:
            (root / name).chmod(mode)
    os.setxattr(root / "file", "user.origin", b"a \0 value")
    os.setxattr(root / "file", "user.empty", b"")
    os.setxattr(root / "directory", "user.big", bytes(range(256)) * 8)
    os.setxattr(root / "symlink", "trusted.note", b"on the symlink itself", follow_symlinks=False)
    run("setfacl", "-m", "u:1234:rwx,g:99:r", root / "nothing")
    run("setfacl", "-d", "-m", "u:1234:rx", root / "empty")
    for number, path in enumerate(sorted([*root.rglob("*"), root], reverse=True)):
        os.utime(path, ns=(OLD_NS, OLD_NS + number * 1_000_000_007), follow_symlinks=False)


def assert_same_copy(copy: Path, original: Path) -> None:
    """All that a copy has in common with its original: everything but inode numbers and ctime."""
    mine, theirs = snapshot(copy), snapshot(original)
    lines = differences(portable(mine), portable(theirs))
    assert not lines, "\n".join(lines)
    assert hard_links(mine) == hard_links(theirs)


# ---- copies ----


def copy_with_cp(source: Path, target: Path) -> None:
    run("cp", "-a", f"{source}/.", target)


def copy_with_rsync(source: Path, target: Path) -> None:
    run("rsync", "-aHAX", "--numeric-ids", f"{source}/", f"{target}/")


def copy_with_tar(source: Path, target: Path) -> None:
    archive = target.parent / f"{target.name}.tar"
    run("tar", "--create", "--file", archive, "--format=posix", "--xattrs", "--xattrs-include=*", "--acls",
        "--sparse", "--warning=no-file-ignored", "-C", source, ".")  # fmt: skip
    run("tar", "--extract", "--file", archive, "-p", "--same-owner", "--numeric-owner", "--xattrs", "--xattrs-include=*",
        "--acls", "-C", target)  # fmt: skip
    archive.unlink()


COPIES = [copy_with_cp, copy_with_rsync, copy_with_tar]


@pytest.fixture(scope="module")
def museum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("museum")
    make_museum(root)
    return root


@pytest.mark.parametrize("copy", COPIES)
def test_copies_into_and_out_of_a_guest_are_complete(
    bench: Bench, museum: Path, copy: Callable[[Path, Path], None]
) -> None:
    original = museum
    if copy is copy_with_tar:  # which archives no sockets
        original = bench.scratch / "without socket"
        original.mkdir()
        run("rsync", "-aHAX", "--numeric-ids", "--exclude=/socket", f"{museum}/", f"{original}/")
    copy(original, bench.guest)
    assert_same_copy(bench.guest, original)
    bench.assert_everybody_agrees()

    inside = bench.guest.parent / f"{bench.guest.name}-2"
    inside.mkdir()
    copy(bench.other, inside)  # from one guest to another
    assert_same_copy(inside, original)
    copy(inside, bench.plain)
    assert_same_copy(bench.plain, original)


@pytest.mark.parametrize("mode", KERNEL_CACHING)
def test_cp_and_rsync_in_other_modes(make_bench: Callable[[str], Bench], museum: Path, mode: str) -> None:
    bench = make_bench(mode)
    copy_with_cp(museum, bench.guest)
    assert_same_copy(bench.guest, museum)
    bench.assert_everybody_agrees()
    copy_with_rsync(bench.guest, bench.plain)
    assert_same_copy(bench.plain, museum)


def test_second_rsync_finds_nothing_to_do(bench: Bench, museum: Path) -> None:
    copy_with_rsync(museum, bench.guest)
    for copy in (bench.guest, bench.other, bench.share):
        for how in ((), ("--checksum",)):
            assert run("rsync", "-aHAXin", "--delete", *how, f"{museum}/", f"{copy}/") == ""

    (bench.guest / "file").write_bytes(b"changed\n" * 1000)  # the same size
    (bench.guest / "surplus").touch()
    changes = run("rsync", "-aHAXin", "--delete", f"{museum}/", f"{bench.other}/").splitlines()
    assert [line.split(maxsplit=1) for line in changes if "file" in line or "surplus" in line] == [
        ["*deleting", "surplus"], [">f..t......", "file"],
    ]  # fmt: skip


def test_archives_of_guest_and_share_are_equal(bench: Bench, museum: Path) -> None:
    copy_with_rsync(museum, bench.guest)
    archives = []
    archive = bench.scratch / "archive"
    for root in (bench.guest, bench.other, bench.share):
        run("tar", "--create", "--file", archive, "--format=posix", "--sort=name", "--xattrs", "--xattrs-include=*", "--acls",
            "--pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime", "--warning=no-file-ignored", "-C", root, ".")  # fmt: skip
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1] == archives[2]
    assert len(archives[0]) > 100_000


def test_without_bumps_a_copy_is_not_seen(make_socket_dir: Callable[[], Path], museum: Path) -> None:
    """Negative control of all comparisons here."""
    with Host(make_socket_dir(), "--live-dangerously", "no-bumps") as host:
        guest, other = host.mount("guest", "none"), host.mount("other", "access")
        copy_with_cp(museum / "directory/deep", guest)
        assert_same_tree(other, host.share)
        copy_with_cp(museum / "directory", guest)
        assert differences(snapshot(other), snapshot(host.share)) != []


# ---- find ----

PREDICATES: Sequence[Sequence[str]] = (
    ("-printf", r"%P %y %m %#m %U %G %s %n %i %T@ %C@ %l %d\n"),
    ("-type", "f", "-size", "+7k"), ("-type", "f", "-size", "-1"), ("-empty",), ("-type", "d", "-links", "+2"),
    ("-type", "p"), ("-type", "s"), ("-type", "c"), ("-type", "b"), ("-type", "l"), ("-xtype", "l"), ("-xtype", "d"),
    ("-perm", "-4000"), ("-perm", "/2000"), ("-perm", "640"), ("-uid", "1000"), ("-gid", "50"), ("-nouser",),
    ("-samefile", "file"), ("-links", "3"), ("-newer", "file"), ("!", "-newer", "file"), ("-newermt", "2009-02-13"),
    ("-executable",), ("-readable", "-writable"), ("-name", "*link*"), ("-regex", r".*/deep/[0-9]+"), ("-lname", "*deep"),
    ("-maxdepth", "1", "-name", "d*"), ("-mindepth", "3"), ("-path", "*/deep/*", "-prune", "-o", "-print"),
    ("-depth",), ("-follow", "-name", "7"), ("-mount", "-name", "1*"), ("-name", "7", "-exec", "cat", "{}", ";"),
)  # fmt: skip


@pytest.mark.parametrize("mode", ["access", "always"])
def test_find_finds_the_same(make_bench: Callable[[str], Bench], museum: Path, mode: str) -> None:
    bench = make_bench(mode)
    run("rsync", "-aHAX", "--numeric-ids", f"{museum}/", f"{bench.guest}/", "--exclude=/directory/up")
    for predicate in PREDICATES:
        here, there = (
            sorted(run("find", ".", *predicate, cwd=root).splitlines()) for root in (bench.guest, bench.share)
        )
        assert here == there, predicate
        assert here, f"{predicate} finds nothing, so it tests nothing"


# ---- git ----


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    run("git", "init", "-q", "-b", "main", root)
    for commit in range(3):
        for number in range(8):
            file = root / f"package{number % 4}/module{number}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"number = {number}\ncommit = {commit}\n" * (number + 1))
        (root / "script").write_text(f"#!/bin/sh\nexit {commit}\n")
        (root / "script").chmod(0o755)
        if not commit:
            (root / "link").symlink_to("script")
        run("git", "add", "-A", cwd=root)
        run("git", "commit", "-q", "-m", f"commit {commit}", cwd=root)
    return root


@pytest.mark.parametrize("mode", ["access", "always"])
def test_git_clone_status_fsck(make_bench: Callable[[str], Bench], repository: Path, mode: str) -> None:
    bench = make_bench(mode)
    for root in bench.both():
        run("git", "clone", "-q", "--no-hardlinks", repository, root / "clone")
        assert run("git", "status", "--porcelain", cwd=root / "clone") == ""
        run("git", "fsck", "--strict", "--full", cwd=root / "clone")
    here, there = (timeless(snapshot(root / "clone")) for root in bench.both())
    # The index holds inode numbers and times, the logs say when the clone was made.
    lines = differences(*({path: each for path, each in tree.items() if not path.startswith((b".git/index", b".git/logs"))}
                          for tree in (here, there)))  # fmt: skip
    assert not lines, "\n".join(lines)
    bench.assert_everybody_agrees()


def test_git_index_of_one_guest_is_fresh_for_all(bench: Bench, repository: Path) -> None:
    clone, elsewhere = bench.guest / "clone", bench.other / "clone"
    run("git", "clone", "-q", repository, clone)
    # diff-files compares all that stat tells (inode, ctime, owner, ...) with the index, and refreshes nothing.
    for root in (clone, elsewhere, bench.share / "clone"):
        assert run("git", "-c", "core.checkStat=default", "diff-files", cwd=root) == ""

    (clone / "package1/module1.py").write_text("edited\n")
    run("git", "commit", "-q", "-am", "in the one", cwd=clone)
    assert run("git", "diff-files", cwd=elsewhere) == ""
    assert run("git", "status", "--porcelain", cwd=elsewhere) == ""
    run("git", "mv", "package2", "renamed", cwd=elsewhere)
    run("git", "commit", "-q", "-m", "in the other", cwd=elsewhere)
    run("git", "repack", "-q", "-a", "-d", cwd=elsewhere)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    assert run("git", "log", "--format=%s", cwd=clone).split("\n")[:3] == ["in the other", "in the one", "commit 2"]
    run("git", "fsck", "--strict", "--full", cwd=clone)
    run("git", "checkout", "-q", "HEAD~3", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=elsewhere) == ""
    bench.assert_everybody_agrees()


# ---- Python ----

WHEEL_FILES = {
    "example/__init__.py": "VERSION = '1.0'\n",
    "example/data/table.csv": "a,b\n" * 100,
    "example/tool.py": "def main():\n    print('installed')\n",
    "example-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: example\nVersion: 1.0\n",
    "example-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "example-1.0.dist-info/entry_points.txt": "[console_scripts]\nexample-tool = example.tool:main\n",
    "example-1.0.dist-info/RECORD": "",
}
# A build backend of the source's own: nothing has to be installed to build it.
BACKEND = """
import zipfile
FILES = {files!r}
def build_wheel(directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(directory + "/example-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    return "example-1.0-py3-none-any.whl"
"""


def pip_install(what: Path, target: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-compile", "--no-build-isolation",
        "--root-user-action=ignore", "--target", target, what)  # fmt: skip


def test_pip_install_a_wheel(bench: Bench) -> None:
    wheel = bench.scratch / "example-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in WHEEL_FILES.items():
            archive.writestr(name, text)
    for root in bench.both():
        pip_install(wheel, root / "site")
    assert_same_installation(bench)


def test_pip_install_from_source_on_the_mount(bench: Bench) -> None:
    for root in bench.both():
        source = root / "source"
        source.mkdir()
        (source / "backend.py").write_text(BACKEND.format(files=WHEEL_FILES))
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        pip_install(source, root / "site")
    assert_same_installation(bench)


def assert_same_installation(bench: Bench) -> None:
    here, there = (timeless(snapshot(root / "site")) for root in bench.both())
    # Scripts and what installs from a directory name the place; those are compared by what they do.
    named = {path for path in here if path.endswith((b"/direct_url.json", b"/RECORD"))}
    lines = differences(*({path: tree[path] for path in tree.keys() - named} for tree in (here, there)))
    assert not lines, "\n".join(lines)
    assert len(here) > 8
    assert here.keys() == there.keys()
    bench.assert_everybody_agrees()
    program = f"import sys; sys.path.insert(0, {str(bench.other / 'site')!r}); import example.tool; example.tool.main()"
    assert run(sys.executable, "-I", "-B", "-c", program) == "installed\n"


@pytest.mark.parametrize("mode", ["access", "none"])
def test_compileall(make_bench: Callable[[str], Bench], mode: str) -> None:
    bench = make_bench(mode)
    for root in bench.both():
        for number in range(12):
            module = root / f"package{number % 3}/module{number}.py"
            module.parent.mkdir(exist_ok=True)
            module.write_text(
                textwrap.dedent(f"""
                class Thing{number}:
                    value = {number}
                    def method(self):
                        return self.value
            """)
            )
            os.utime(module, ns=(OLD_NS, OLD_NS + number * 1_000_000_000))
        run(sys.executable, "-m", "compileall", "-q", "-s", root, root)
    here, there = (timeless(snapshot(root)) for root in bench.both())
    assert sum(path.endswith(b".pyc") for path in here) == 12
    # A .pyc holds size and time of its source, so equal files say that these are equal too.
    lines = differences(here, there)
    assert not lines, "\n".join(lines)
    bench.assert_everybody_agrees()

    before = snapshot(bench.share)
    run(sys.executable, "-m", "compileall", "-q", "-s", bench.guest, bench.other)
    assert differences(before, snapshot(bench.share)) == [], "nothing was out of date for the other guest"


# ---- SQLite ----

JOURNAL_MODES = ["delete", "wal"]


@dataclass(frozen=True)
class Turn:
    """What one guest does with the database before the other may."""

    number: int

    def take(self, database: Path) -> None:
        with closing(sqlite3.connect(database)) as connection:
            self.write(connection)

    def write(self, connection: sqlite3.Connection) -> None:
        with connection:
            connection.executemany(
                "INSERT INTO rows (turn, text) VALUES (?, ?)", [(self.number, f"{n} " * n) for n in range(100)]
            )
            connection.execute(
                "UPDATE rows SET text = text || ? WHERE id % 7 = ?", (f"-{self.number}", self.number % 7)
            )
            connection.execute("DELETE FROM rows WHERE id % 11 = ?", (self.number % 11,))


def make_database(database: Path, journal: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        with connection:
            connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, turn INTEGER, text TEXT)")
            connection.execute("CREATE INDEX by_turn ON rows (turn, text)")


def contents(database: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT id, turn, text FROM rows ORDER BY id").fetchall()


@pytest.mark.parametrize("journal", JOURNAL_MODES)
@pytest.mark.parametrize("mode", ["access", "none"])
def test_sqlite_written_by_two_guests_in_turn(make_bench: Callable[[str], Bench], mode: str, journal: str) -> None:
    bench = make_bench(mode)
    make_database(bench.guest / "db", journal)
    make_database(bench.plain / "db", journal)
    for number in range(6):
        Turn(number).take((bench.guest, bench.other)[number % 2] / "db")
        Turn(number).take(bench.plain / "db")
    expected = contents(bench.plain / "db")
    assert len(expected) > 200
    for root in (bench.guest, bench.other):
        assert contents(root / "db") == expected
    assert facts(bench.guest / "db").content == facts(bench.plain / "db").content
    assert sorted(os.listdir(bench.other)) == ["db"], "journals are gone for everybody"
    bench.assert_everybody_agrees()


@pytest.mark.parametrize("journal", JOURNAL_MODES)
def test_sqlite_rolls_back_in_one_guest_what_another_never_sees(bench: Bench, journal: str) -> None:
    make_database(bench.guest / "db", journal)
    Turn(0).take(bench.guest / "db")
    before = contents(bench.other / "db")
    with closing(sqlite3.connect(bench.guest / "db")) as connection:
        connection.execute("PRAGMA cache_size = 1")  # pages reach the disk before the transaction ends
        connection.execute("DELETE FROM rows WHERE id > 3")
        connection.execute("INSERT INTO rows (turn, text) VALUES (99, hex(zeroblob(100000)))")
        connection.rollback()
    assert contents(bench.other / "db") == before == contents(bench.guest / "db")
    bench.assert_everybody_agrees()
