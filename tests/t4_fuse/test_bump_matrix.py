"""Each row of `docs/spec/bump-matrix.md` between two mounted guests: what one changes, the other sees at its very next look.

The observers are the other guest's kernel and a GuestAgent in this process. Each has looked before, and has answered a second
look without asking the host; so the look after the change shows what the versions are worth. What is right is what
the share itself says at that moment.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coherency.fuse import syscalls
from coherency.guest_agent.api import GuestAgent
from tests.bump_matrix.calls import CALLS, Place, Refused, opened
from tests.bump_matrix.ground import FILE_BYTES, AgentView, KernelView, differences, lay, look
from tests.guests import Host

GUESTS = {"a": "b", "b": "a"}
"""Who changes, and who looks."""
DEADLINE_S = 30.0
EXTRA_TREES = ("race.a", "race.b", "modes")

CANNOT_BE_STALE = {
    "tmpfile": "a file without a name changes nothing that another guest could have looked at",
}

FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_UNSHARE_RANGE = 0x08, 0x20, 0x40


class Seen(NamedTuple):
    """What everybody says after a change, and what was true before it."""

    before: dict[str, Any]
    truth: dict[str, Any]
    kernel: dict[str, Any]
    agent: dict[str, Any]


class Stage:
    """Two guests in mode access, a GuestAgent, and a tree for each row and direction, laid before any of them looked."""

    def __init__(self, host: Host, mounts: dict[str, Path], agent: GuestAgent) -> None:
        self.host, self.mounts, self.agent = host, mounts, agent

    @classmethod
    @contextlib.contextmanager
    def set_up(cls, directory: Path, *serve_options: str) -> "Iterator[Stage]":
        host = Host(directory, *serve_options)
        for tree in [*(f"{row}.{changer}" for row in CALLS for changer in GUESTS), *EXTRA_TREES]:
            (host.share / tree).mkdir()
            lay(host.share / tree)
        with host:
            mounts = {guest: host.mount(guest) for guest in GUESTS}
            with host.agent() as agent:
                yield cls(host, mounts, agent)

    def views(self, tree: str, changer: str) -> tuple[KernelView, KernelView, AgentView]:
        """The share, the observer's kernel, and the GuestAgent."""
        observer = self.mounts[GUESTS[changer]]
        return KernelView(self.host.share / tree), KernelView(observer / tree), AgentView(self.agent, tree)

    def costs_nothing(self, look_again: Callable[[], object]) -> bool:
        before = self.host.host_trips()
        look_again()
        return self.host.host_trips() == before

    def warm(self, tree: str, changer: str) -> dict[str, Any]:
        """The observers have looked, see the truth, and do not ask the host when they look again. Returns the truth."""
        share, kernel, agent = self.views(tree, changer)
        truth = look(share)
        assert differences(truth, look(kernel)) == []
        assert differences(truth, look(agent)) == []
        assert kernel.contents() == share.contents()
        assert kernel.xattr_lists() == share.xattr_lists()
        # Files that were closed are released later, which counts as a trip: hence until, and not at once.
        deadline = time.monotonic() + DEADLINE_S
        for view in (kernel, agent):
            while not self.costs_nothing(lambda view=view: look(view)):  # type: ignore[misc]
                assert time.monotonic() < deadline, f"{type(view).__name__}: a second look asks the host each time"
        return truth

    def play(self, row: str, changer: str) -> Seen:
        """One row, from the first look to the look after the change. `Refused` if the share cannot do it."""
        tree = f"{row}.{changer}"
        share, kernel, agent = self.views(tree, changer)
        place = Place(self.mounts[changer] / tree, share.root, self.host.daemon.process.pid)
        with contextlib.closing(CALLS[row](place)) as change:
            next(change)
            before = self.warm(tree, changer)
            next(change, None)
            return Seen(before, look(share), look(kernel), look(agent))

    def check_refused(self, row: str, changer: str) -> None:
        """A program on the host cannot do it either."""
        root = self.host.share / f"{row}.{changer}"
        with contextlib.closing(CALLS[row](Place(root, root, os.getpid()))) as change:
            next(change)
            with pytest.raises(Refused):
                next(change)


@pytest.fixture(scope="module")
def stage(make_socket_dir: Callable[[], Path]) -> Iterator[Stage]:
    with Stage.set_up(make_socket_dir()) as stage:
        yield stage


@pytest.fixture(scope="module")
def dangerous_stage(make_socket_dir: Callable[[], Path]) -> Iterator[Stage]:
    with Stage.set_up(make_socket_dir(), "--live-dangerously", "no-bumps") as stage:
        yield stage


@pytest.fixture(scope="module")
def unwatched(make_socket_dir: Callable[[], Path]) -> Iterator[tuple[Host, Path]]:
    """A host that does not see what is made past its export, and a guest."""
    with Host(make_socket_dir(), "--no-watch") as host:
        yield host, host.mount("a")


@pytest.mark.parametrize("changer", GUESTS)
@pytest.mark.parametrize("row", CALLS)
def test_the_next_look_sees_it(stage: Stage, row: str, changer: str) -> None:
    try:
        seen = stage.play(row, changer)
    except Refused:
        stage.check_refused(row, changer)
        return
    assert differences(seen.truth, seen.kernel) == []
    assert differences(seen.truth, seen.agent) == []
    tree = f"{row}.{changer}"
    share, kernel, _ = stage.views(tree, changer)
    assert kernel.xattr_lists() == share.xattr_lists()
    assert kernel.contents() == share.contents()
    assert differences(seen.truth, look(KernelView(stage.mounts[changer] / tree))) == []


@pytest.mark.parametrize("changer", GUESTS)
@pytest.mark.parametrize("row", CALLS)
def test_control_without_bumps_the_next_look_sees_the_past(dangerous_stage: Stage, row: str, changer: str) -> None:
    try:
        seen = dangerous_stage.play(row, changer)
    except Refused:
        dangerous_stage.check_refused(row, changer)
        return
    if row in CANNOT_BE_STALE:
        assert differences(seen.before, seen.truth) == []
        return
    assert differences(seen.before, seen.truth) != []
    assert differences(seen.before, seen.kernel) == []
    assert differences(seen.before, seen.agent) == []


@pytest.mark.parametrize("changer", GUESTS)
def test_o_creat_on_a_name_that_was_absent_a_moment_ago(stage: Stage, changer: str) -> None:
    """The changer knows the name as absent; the other guest makes it; the changer's O_CREAT opens it, O_EXCL fails."""
    tree = f"race.{changer}"
    ours, theirs = self_and_other = stage.mounts[changer] / tree / "new", stage.mounts[GUESTS[changer]] / tree / "new"
    assert not any(path.exists() for path in self_and_other)
    theirs.write_bytes(b"made by the other")
    with pytest.raises(FileExistsError):
        os.open(ours, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with opened(ours, os.O_CREAT | os.O_RDWR) as fd:
        assert os.read(fd, 100) == b"made by the other"
    with opened(ours, os.O_CREAT | os.O_WRONLY | os.O_TRUNC):
        pass
    assert theirs.stat().st_size == 0


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_CREAT | os.O_EXCL])
def test_o_creat_on_a_name_that_was_made_behind_the_export(unwatched: tuple[Host, Path], flags: int) -> None:
    """No version has moved, so the guest still knows the name as absent; the attempt to make it tells otherwise."""
    host, guest = unwatched
    path = guest / f"behind-{flags}"
    assert not path.exists()
    (host.share / path.name).write_bytes(b"made by the host")
    assert not path.exists()
    if flags & os.O_EXCL:
        with pytest.raises(FileExistsError):
            os.open(path, flags | os.O_RDWR)
    else:
        with opened(path, flags | os.O_RDWR) as fd:
            assert os.read(fd, 100) == b"made by the host"
    assert path.exists()


@pytest.mark.parametrize("mode", [FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_UNSHARE_RANGE])
def test_other_modes_of_fallocate_are_refused_by_the_kernel(stage: Stage, mode: int) -> None:
    """So they need no row."""
    with opened(stage.mounts["a"] / "modes" / "file", os.O_RDWR) as fd:
        trips = stage.host.host_trips()
        with pytest.raises(OSError, match="not supported") as refusal:
            syscalls.fallocate(fd, mode, 0, FILE_BYTES // 2)
        assert refusal.value.errno == errno.EOPNOTSUPP
        assert stage.host.host_trips() == trips
