"""``GuestAgent`` is compared with ``os``: the same questions about the same tree must have the same answers.

``os`` is asked about the share itself, where no cache of ours is in between.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeAlias

import pytest

from coherency import GuestAgent
from coherency.errors import DaemonUnavailable
from tests.guests import Host

Question: TypeAlias = Callable[[Any, Any], Any]  # asked of os or of an agent, about a path

NAMES = [
    b"file", b"directory", b"directory/inner", b"directory/inner/leaf", b"nothing", b"file/below",
    b"relative", b"dangling", b"loop", b"loop-a", b"to-directory", b"to-directory/inner", b"up/file", b"directory/back",
    b"through", b"slash", b"dot", b"chain/19", b"chain/40", b"to-loop", b"self", b"self/self/self/file",
    b"n\xf6n utf-8 \xff", "ünïcode €".encode(), b"with\nnewline", b"fifo", b"x" * 255, b"x" * 256,
    b"directory/../file", b"to-directory/../file", b"directory/./inner/..", b"nothing/..", b"file/..", b"dangling/..",
    b".", b"", b"directory//inner", b"/file", b"//directory", b"/",
]  # fmt: skip
SUFFIXES = [b"", b"/", b"/.", b"/..", b"//", b"/leaf", b"/nothing/deeper"]


def make_tree(root: Path) -> None:
    (root / "directory/inner/leaf").mkdir(parents=True)
    (root / "directory/deep").mkdir()
    (root / "file").write_bytes(b"x" * 1234)
    (root / "file").chmod(0o4711)
    os.chown(root / "file", 1000, 2000)
    os.mkfifo(root / "fifo")
    for target, name in (
        ("directory/inner", "relative"), ("no/where", "dangling"), ("loop", "loop"), ("loop-b", "loop-a"),
        ("loop-a", "loop-b"), ("directory", "to-directory"), (".", "self"), ("directory/deep/../..", "up"),
        ("../file", "directory/back"), ("to-directory/inner", "through"), ("file/", "slash"), ("file/.", "dot"),
        ("loop/on", "to-loop"),
    ):  # fmt: skip
        (root / name).symlink_to(target)
    (root / "chain").mkdir()
    (root / "chain/0").symlink_to("../file")
    for number in range(1, 41):
        (root / f"chain/{number}").symlink_to(f"{number - 1}")
    for encoded in (b"n\xf6n utf-8 \xff", "ünïcode €".encode(), b"with\nnewline", b"x" * 255):
        (root / os.fsdecode(encoded)).write_bytes(encoded)
    os.setxattr(root / "file", "user.origin", b"a \0 value")
    os.setxattr(root / "directory", "user.empty", b"")
    os.setxattr(root / "relative", "trusted.note", b"of the symlink", follow_symlinks=False)


@pytest.fixture(scope="module")
def host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    directory = make_socket_dir()
    (directory / "share").mkdir()
    make_tree(directory / "share")
    with Host(directory) as host:
        yield host


@pytest.fixture(scope="module")
def agent(host: Host) -> Iterator[GuestAgent]:
    with host.agent() as agent:
        yield agent


def status(found: os.stat_result) -> tuple[Any, ...]:
    """All that is kept coherent: not the time of the last access, nor the blocks that are allocated later."""
    fields = ("mode", "ino", "nlink", "uid", "gid", "size", "mtime_ns", "ctime_ns", "blksize", "rdev")
    return tuple(getattr(found, f"st_{field}") for field in fields)


def entry_facts(entry: Any) -> tuple[Any, ...]:
    return (
        entry.name, entry.inode(), entry.is_symlink(), entry.is_dir(follow_symlinks=False),
        entry.is_file(follow_symlinks=False), answer(entry.is_dir, about=entry.path), answer(entry.is_file, about=entry.path),
        answer(lambda: status(entry.stat()), about=entry.path), status(entry.stat(follow_symlinks=False)),
    )  # fmt: skip


def entries(found: Any) -> list[tuple[Any, ...]]:
    with found as iterator:
        return sorted(map(entry_facts, iterator))


QUESTIONS: dict[str, Question] = {
    "stat": lambda who, path: status(who.stat(path)),
    "stat of the link": lambda who, path: status(who.stat(path, follow_symlinks=False)),
    "lstat": lambda who, path: status(who.lstat(path)),
    "exists": lambda who, path: (os.path.exists if who is os else who.exists)(path),
    "listdir": lambda who, path: sorted(who.listdir(path)),
    "scandir": lambda who, path: entries(who.scandir(path)),
    "readlink": lambda who, path: who.readlink(path),
    "getxattr": lambda who, path: who.getxattr(path, "user.origin"),
    "getxattr by bytes": lambda who, path: who.getxattr(path, b"user.empty"),
    "getxattr of the link": lambda who, path: who.getxattr(path, "trusted.note", follow_symlinks=False),
}


class Refusal(NamedTuple):
    kind: type[OSError]
    number: int | None
    text: str | None
    names_the_path: bool


def answer(ask: Callable[..., Any], *arguments: Any, about: Any) -> Any:
    """What was said, or how it was refused."""
    try:
        return ask(*arguments)
    except OSError as error:
        return Refusal(type(error), error.errno, error.strerror, error.filename == about)


def paths() -> list[bytes]:
    plain = (b".", b"", b"/")
    return [
        *(name + suffix for name, suffix in itertools.product(NAMES, SUFFIXES) if name not in plain),
        *plain, b"./", b"directory/..", b"self/.//self",
    ]  # fmt: skip


LEADS_OUT = {b"up/..", b"self/.."}


def compare(host: Host, agent: GuestAgent, question: str, paths: list[bytes]) -> list[Any]:
    """Assert that ``os`` and the agent agree; returns what they said."""
    ask = QUESTIONS[question]
    outcomes = []
    conversions: tuple[Callable[[bytes], Any], ...] = (bytes, os.fsdecode)
    for path, convert in itertools.product(paths, conversions):
        if path in LEADS_OUT:
            continue
        form = convert(path)
        original = convert(b"/".join((os.fsencode(host.share), path)) if path else b"")
        expected = answer(ask, os, original, about=original)
        for _ in range(2):  # fetched, and then from the cache
            assert answer(ask, agent, form, about=form) == expected, form
        outcomes.append(expected)
    return outcomes


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_os(host: Host, agent: GuestAgent, question: str) -> None:
    outcomes = compare(host, agent, question, paths())
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    assert len(outcomes) > len(refused)
    assert refused or question == "exists"


@pytest.mark.alone
def test_symlinks_lead_as_far_as_for_os(host: Host, agent: GuestAgent) -> None:
    """The most that they may. When something is mounted meanwhile, wherever, the kernel begins anew, and counts on."""
    for question in QUESTIONS:
        compare(host, agent, question, [name + suffix for name in (b"chain/38", b"chain/39", b"chain/40") for suffix in SUFFIXES])


def test_a_cache_with_room_for_little_gives_the_same_answers(host: Host) -> None:
    with GuestAgent.connect(host.name, runtime_dir=host.runtime_dir, capacity=6) as agent:
        for question in QUESTIONS:
            compare(host, agent, question, paths()[::13])
        assert agent.statistics().entries <= 6


def test_path_objects(host: Host, agent: GuestAgent) -> None:
    class BytesPath:
        def __fspath__(self) -> bytes:
            return b"directory"

    for path, plain in ((PurePath("directory/inner"), "directory/inner"), (BytesPath(), b"directory")):
        for name, ask in QUESTIONS.items():
            assert answer(ask, agent, path, about=plain) == answer(ask, agent, plain, about=plain), name
        assert {type(name) for name in agent.listdir(path)} == {type(plain)}
    for wrong in (3.5, None, object()):
        with pytest.raises(TypeError):
            agent.lstat(wrong)  # type: ignore[arg-type]


def test_names_with_a_null_byte_are_no_names(agent: GuestAgent) -> None:
    for path in ("fi\0le", b"\0", "file\0"):
        for name, ask in QUESTIONS.items():
            if name == "exists":
                assert ask(agent, path) is False
            else:
                with pytest.raises(ValueError, match="null"):
                    ask(agent, path)


@pytest.fixture
def own_host(make_socket_dir: Callable[[], Path]) -> Iterator[Host]:
    """For what the other tests had better not find."""
    directory = make_socket_dir()
    (directory / "share").mkdir()
    make_tree(directory / "share")
    with Host(directory) as host:
        yield host


def test_what_leads_out_of_the_share_is_refused(own_host: Host) -> None:
    with own_host.agent() as agent:
        refuse_what_leads_out(own_host, agent)


def refuse_what_leads_out(host: Host, agent: GuestAgent) -> None:
    outside = host.directory / "outside"
    outside.write_text("not shared")
    for name, target in (
        ("absolute", str(outside)), ("absolute-inside", str(host.share / "file")), ("root", "/"), ("above", ".."),
        ("directory/above", "../../outside"), ("deep-above", "directory/deep/../../../outside"), ("via", "absolute"),
    ):  # fmt: skip
        link = host.export / name
        link.symlink_to(target)
        assert agent.readlink(name) == target
        assert stat.S_ISLNK(agent.lstat(name).st_mode)
        assert not agent.exists(name)
    for path in (
        "..", "../share/file", "../outside", "directory/../../outside", "/..", "up/..", "self/../outside", "above/outside",
        "absolute", "absolute-inside", "root", "root/etc/passwd", "directory/above", "deep-above", "via", "above",
    ):  # fmt: skip
        for form in (path, os.fsencode(path)):
            with pytest.raises(OSError, match=os.strerror(errno.EXDEV)) as refused:
                agent.stat(form)
            assert (refused.value.errno, refused.value.filename) == (errno.EXDEV, form)
            with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
                agent.listdir(form)
    names = {entry.name: entry for entry in agent.scandir()}
    assert names["above"].is_symlink()
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        names["above"].is_dir()


@pytest.mark.parametrize("followlinks", [False, True])
@pytest.mark.parametrize("topdown", [False, True])
def test_walk(host: Host, agent: GuestAgent, topdown: bool, followlinks: bool) -> None:
    # Not all of the tree: its symlinks lead in circles.
    for top in ("directory", b"directory", "directory/inner/", "to-directory", "nothing", "file"):
        original = os.path.join(host.share, os.fsdecode(top))
        expected = walk(os.walk, original if isinstance(top, str) else os.fsencode(original), topdown, followlinks)
        assert walk(agent.walk, top, topdown, followlinks) == expected


def walk(how: Callable[..., Any], top: Any, topdown: bool, followlinks: bool) -> tuple[list[Any], list[Any]]:
    """What was yielded, by relative paths, and the errors."""
    errors: list[OSError] = []
    steps = [
        (os.path.relpath(root, top), sorted(directories), sorted(others))
        for root, directories, others in how(top, topdown=topdown, followlinks=followlinks, onerror=errors.append)
    ]
    return sorted(steps), [(type(error), error.errno, error.filename == top) for error in errors]


def test_walk_goes_up_or_down(agent: GuestAgent) -> None:
    down = [root for root, _, _ in agent.walk("directory")]
    up = [root for root, _, _ in agent.walk("directory", topdown=False)]
    assert (down[0], up[-1]) == ("directory", "directory")
    assert down.index("directory/inner") < down.index("directory/inner/leaf")
    assert up.index("directory/inner") > up.index("directory/inner/leaf")


def test_walk_obeys_what_the_caller_removes(agent: GuestAgent) -> None:
    seen = []
    for root, directories, _ in agent.walk("directory"):
        seen.append(root)
        directories[:] = [name for name in directories if name != "inner"]
    assert seen == ["directory", "directory/deep"]


def test_nobody_serves(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DaemonUnavailable, match=r"no daemon serves 'absent' .*; start it with: coherency serve"):
        GuestAgent.connect("absent", runtime_dir=socket_dir)
    monkeypatch.setenv("COHERENCY_RUNTIME_DIR", str(socket_dir / "elsewhere"))
    with pytest.raises(DaemonUnavailable):
        GuestAgent.connect("absent")


def test_the_environment_names_the_runtime_directory(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHERENCY_RUNTIME_DIR", str(host.runtime_dir))
    with GuestAgent.connect(host.name) as agent:
        assert agent.exists("file")


def test_hits_need_no_trip_and_statistics_say_so(host: Host) -> None:
    with host.agent() as agent:
        agent.stat("directory/inner/leaf")
        before, trips = agent.statistics(), host.host_trips()
        for _ in range(100):
            agent.stat("directory/inner/leaf")
        after = agent.statistics()
        assert host.host_trips() == trips
        assert (after.hits, after.misses, after.refreshes) == (before.hits + 100, before.misses, before.refreshes)
        assert after.lower_requests == before.lower_requests
        (host.export / "directory/inner/leaf").chmod(0o700)
        assert stat.S_IMODE(agent.stat("directory/inner/leaf").st_mode) == 0o700
        assert agent.statistics().refreshes == before.refreshes + 1
        assert host.host_trips() > trips


def test_an_attribute_that_is_not_set_is_remembered(host: Host) -> None:
    with host.agent() as agent:
        for _ in range(3):
            with pytest.raises(OSError, match="No data available") as refusal:
                agent.getxattr("directory/inner/leaf", "user.late")
            assert (refusal.value.errno, refusal.value.filename) == (errno.ENODATA, "directory/inner/leaf")
        before = agent.statistics()
        assert before.hits == 2
        os.setxattr(host.export / "directory/inner/leaf", "user.late", b"now")
        assert agent.getxattr("directory/inner/leaf", "user.late") == b"now"
        assert agent.statistics().lower_requests > before.lower_requests
        os.removexattr(host.export / "directory/inner/leaf", "user.late")


# ---- a tree that changes ----


class Gardener:
    """Changes a tree at random, as seeded, keeping a few names busy."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)

    def change(self) -> None:
        names = [f"{a}{b}" for a in ("", "d0/", "d1/", "d0/d2/") for b in ("d0", "d1", "d2", "x", "y", "z")]
        one, other = (self.root / name for name in self.random.sample(names, 2))
        value = self.random.randrange(1, 512)
        operation = self.random.choice((
            one.mkdir, one.mkdir, one.unlink, one.rmdir, one.touch, lambda: one.write_bytes(b"x" * value),
            lambda: one.rename(other), lambda: one.rename(other), lambda: os.link(one, other),
            lambda: one.symlink_to(self.random.choice(names)), lambda: one.chmod(value),
            lambda: os.setxattr(one, "user.origin", b"%d" % value), lambda: os.removexattr(one, "user.origin"),
            lambda: os.utime(one, ns=(1, value)),
        ))  # fmt: skip
        with contextlib.suppress(OSError):
            operation()


SHOWN = [b".", b"d0", b"d1", b"d0/d2", b"x", b"y", b"d0/x", b"d1/y", b"d0/d2/z", b"d2/d0/x"]


def disagreements(root: Path, agents: list[GuestAgent]) -> list[str]:
    """What an agent says otherwise than os does."""
    found = []
    for path, (name, ask) in itertools.product(SHOWN, QUESTIONS.items()):
        original = os.path.join(os.fsencode(root), path)
        expected = answer(ask, os, original, about=original)
        for agent in agents:
            said = answer(ask, agent, path, about=path)
            if said != expected:
                found.append(f"{name} of {path!r}: {said}, and os says {expected}")
    return found


def test_answers_follow_every_change(make_socket_dir: Callable[[], Path]) -> None:
    seed, capacities = 20260729, (5, 1000)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(Host(make_socket_dir(), "--slots", "4"))  # where all share words, refreshes abound
        agents = [
            stack.enter_context(GuestAgent.connect(host.name, runtime_dir=host.runtime_dir, capacity=capacity))
            for capacity in capacities
        ]
        gardener = Gardener(host.export, seed)
        for step in range(150):
            gardener.change()
            if step % 5 == 0:
                assert disagreements(host.share, agents) == [], f"seed {seed}, step {step}"
        for agent, capacity in zip(agents, capacities, strict=True):
            assert 0 < agent.statistics().entries <= capacity
        assert agents[1].statistics().hits > agents[0].statistics().hits


def test_answers_do_not_follow_without_bumps(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir(), "--live-dangerously", "no-bumps") as host, host.agent() as agent:
        gardener = Gardener(host.export, 1)
        for _ in range(50):
            gardener.change()
        assert disagreements(host.share, [agent]) == []
        for _ in range(50):
            gardener.change()
        assert disagreements(host.share, [agent]) != []


# ---- threads ----

MIN_READS, MIN_WRITES = 500, 100


@dataclass
class Register:
    """A file that only grows, one byte at a time: its size says which write was the last one seen."""

    path: str
    begun: int = 0  # sizes that a write was begun for, and for which it was acknowledged
    acknowledged: int = 0


class Readers:
    """Threads that read sizes while others write, and note each answer that no order of the operations explains.

    Source: Herlihy and Wing, Linearizability, 1990; for a counter it comes down to two comparisons.
    """

    def __init__(self, registers: list[Register], size_of: Callable[[str], int], threads: int) -> None:
        self.registers, self.size_of = registers, size_of
        self.too_old: list[str] = []
        self.from_the_future: list[str] = []
        self.failures: list[BaseException] = []
        self.reads = 0
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(seed,)) for seed in range(threads)]

    def _read(self, seed: int) -> None:
        choose = random.Random(seed).choice
        try:
            while not self.over.is_set():
                register = choose(self.registers)
                acknowledged = register.acknowledged
                seen = self.size_of(register.path)
                begun = register.begun
                self.reads += 1
                if seen < acknowledged:
                    self.too_old.append(f"{register.path}: {seen} after {acknowledged} was acknowledged")
                if seen > begun:
                    self.from_the_future.append(f"{register.path}: {seen} before {begun + 1} was begun")
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            self.failures.append(error)

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()


def grow(root: Path, register: Register, readers: Readers) -> None:
    with open(root / register.path, "ab", buffering=0) as file:
        while register.acknowledged < MIN_WRITES or (readers.reads < MIN_READS and not readers.failures):
            register.begun += 1
            file.write(b"x")
            register.acknowledged += 1


def read_while_written(host: Host, writer: Path, size_of: Callable[[str], int]) -> Readers:
    registers = [Register(f"{directory}{number}") for directory in ("", "a/", "a/b/") for number in range(2)]
    for register in registers:
        (writer / register.path).parent.mkdir(exist_ok=True)
        (writer / register.path).touch()
    with Readers(registers, size_of, threads=3) as readers:
        writers = [threading.Thread(target=grow, args=(writer, register, readers)) for register in registers]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
    assert not readers.failures, readers.failures
    assert not readers.from_the_future
    assert all((host.share / register.path).stat().st_size == register.acknowledged for register in registers)
    return readers


@pytest.mark.parametrize("where", ["export", "guest"])
def test_threads_never_see_less_than_was_acknowledged(make_socket_dir: Callable[[], Path], where: str) -> None:
    with Host(make_socket_dir(), "--slots", "4") as host, host.agent() as agent:
        writer = host.export if where == "export" else host.mount("guest", "access")
        assert read_while_written(host, writer, lambda path: agent.stat(path).st_size).too_old == []


def test_threads_on_another_mount_never_see_less_than_was_acknowledged(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir()) as host:
        writer, reader = host.mount("writer"), host.mount("reader")
        assert read_while_written(host, writer, lambda path: (reader / path).stat().st_size).too_old == []


def test_threads_see_less_without_bumps(make_socket_dir: Callable[[], Path]) -> None:
    with Host(make_socket_dir(), "--live-dangerously", "no-bumps") as host, host.agent() as agent:
        readers = read_while_written(host, host.export, lambda path: agent.stat(path).st_size)
        assert readers.too_old != []
