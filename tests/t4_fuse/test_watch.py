"""What is changed directly in the share, past the export, is seen by every guest that promises more than a timeout.

Each row of the bump matrix is done by this process in the share itself: all rows on ext4, a choice of them elsewhere. The
observers have looked before, so that their caches are warm; then they must come to say what the share says. Nobody promises
how soon: `benchmarks/sharing.py` measures it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.bump_matrix.calls import CALLS, Place, Refused
from tests.bump_matrix.ground import AgentView, KernelView, differences, lay, look
from tests.file_systems import mounted
from tests.guests import Host
from tests.waiting import until

ROWS = [row for row in CALLS if row != "setattr-partial"]
"""That one is a request of a guest's kernel which fails half-way."""
ON_EACH_FILE_SYSTEM = (
    "create", "mkdir", "symlink", "link", "unlink-linked", "rmdir", "rename-directory", "rename-over", "rename-over-linked",
    "rename-over-directory", "rename-exchange", "setattr-mode", "setattr-size", "setxattr-acl", "write", "write-mmap",
    "fallocate", "copy-file-range",
)  # fmt: skip
GUESTS = ("strict", "prompt", "access")
LOOKS = 3
"""The second is answered from memory, and what was not confirmed in time by then is by the third."""


class Observed:
    """A share in which every row has a tree of its own, laid before anybody looked, and those who look."""

    def __init__(self, host: Host, *observers: Callable[[str], KernelView | AgentView]) -> None:
        self.host, self._observers = host, observers

    @classmethod
    @contextlib.contextmanager
    def set_up(
        cls, directory: Path, *serve_options: str, modes: Sequence[str] = GUESTS, rows: Sequence[str] = ROWS
    ) -> Iterator[Observed]:
        host = Host(directory, *serve_options)
        for row in rows:
            (host.share / row).mkdir()
            lay(host.share / row)
        with host:
            mounts = [host.mount(mode, mode) for mode in modes]
            with host.agent() as agent:
                yield cls(
                    host,
                    *(lambda tree, at=at: KernelView(at / tree) for at in mounts),
                    lambda tree: AgentView(agent, tree),
                )

    def truth(self, row: str) -> dict[str, Any]:
        return look(KernelView(self.host.share / row))

    def seen(self, row: str) -> list[dict[str, Any]]:
        return [look(observer(row)) for observer in self._observers]

    def play(self, row: str) -> dict[str, Any]:
        """Warm caches, then the change. Returns what was true before."""
        root = self.host.share / row
        with contextlib.closing(CALLS[row](Place(root, root, os.getpid()))) as change:
            next(change)
            before = self.truth(row)
            for number in range(LOOKS):
                until(lambda: all(differences(before, seen) == [] for seen in self.seen(row)))
                assert differences(before, self.truth(row)) == [], number
            for _ in change:
                pass
        return before

    def await_truth(self, row: str) -> None:
        wrong: list[list[str]] = []

        def all_see_it() -> bool:
            truth = self.truth(row)
            wrong[:] = [differences(truth, seen) for seen in self.seen(row)]
            return not any(wrong)

        try:
            until(all_see_it)
        except AssertionError:
            raise AssertionError(f"{row}: {wrong}") from None


@pytest.fixture(scope="module")
def observed(make_socket_dir: Callable[[], Path]) -> Iterator[Observed]:
    directory = make_socket_dir()
    (directory / "share").mkdir()
    with mounted("ext4", directory / "share"), Observed.set_up(directory) as observed:
        yield observed


@pytest.mark.parametrize("row", ROWS)
def test_every_guest_comes_to_see_it(observed: Observed, row: str) -> None:
    with contextlib.suppress(Refused):
        observed.play(row)
        observed.await_truth(row)
        for _ in range(2):  # what was fetched meanwhile must be right, too
            assert [differences(observed.truth(row), seen) for seen in observed.seen(row)] == [[]] * (len(GUESTS) + 1)


def test_control_without_watching_they_see_the_past(socket_dir: Path) -> None:
    changed = 0
    with Observed.set_up(socket_dir, "--no-watch", modes=("strict",)) as observed:
        for row in ROWS:
            with contextlib.suppress(Refused):
                before = observed.play(row)
                assert [differences(before, seen) for seen in observed.seen(row)] == [[], []], row
                changed += differences(before, observed.truth(row)) != []
    assert changed > len(ROWS) * 3 // 4


@pytest.mark.parametrize("kind", ["tmpfs", "xfs", "btrfs"])
def test_on_this_file_system(socket_dir: Path, kind: str) -> None:
    """That nothing is left to a new epoch shows that each inode is known by its number, also when it is gone."""
    (socket_dir / "share").mkdir()
    with (
        mounted(kind, socket_dir / "share"),
        Observed.set_up(socket_dir, modes=("strict",), rows=ON_EACH_FILE_SYSTEM) as observed,
    ):
        assert observed.host.status()["watching"] == "on"
        for row in ON_EACH_FILE_SYSTEM:
            with contextlib.suppress(Refused):
                observed.play(row)
                observed.await_truth(row)
        assert observed.host.status()["epoch"] == 1
        assert observed.host.status()["host_events"] > len(ON_EACH_FILE_SYSTEM)
