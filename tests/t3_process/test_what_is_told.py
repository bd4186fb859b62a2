"""What each operation of the export tells guests that watch: every row of the bump matrix, and when it is told."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coherency.daemon.events import Events
from coherency.events import Event
from coherency.ids import SlotIndex
from tests.bump_matrix.desk import Desk, apart, desk_at
from tests.bump_matrix.ground import lay
from tests.bump_matrix.requests import STEPS
from tests.t3_process.test_bump_matrix import disk_full

pytestmark = pytest.mark.needs_fuse  # needs root, like every daemon

TOLD: dict[str, list[str]] = {
    "create": ["CREATED dir/new"],
    "create-existing": [],
    "mknod": ["CREATED dir/new"],
    "mkdir": ["CREATED dir/new directory"],
    "symlink": ["CREATED dir/new"],
    "tmpfile": [],
    "link": ["CREATED into/new"],
    "link-tmpfile": ["CREATED new"],
    "unlink": ["REMOVED file"],
    "unlink-linked": ["REMOVED linked"],
    "rmdir": ["REMOVED empty directory"],
    "rename": ["RENAMED file to new"],
    "rename-parents": ["RENAMED file to into/new"],
    "rename-directory": ["RENAMED dir to into/new directory"],
    "rename-over": ["RENAMED file to into/taken over it"],
    "rename-over-linked": ["RENAMED file to into/linked over it"],
    "rename-over-directory": ["RENAMED dir to into/sub over it directory"],
    "rename-noreplace": ["RENAMED file to into/new"],
    "rename-exchange": ["RENAMED file to into/taken", "RENAMED into/taken to file"],
    "rename-exchange-directory": ["RENAMED file to into/sub", "RENAMED into/sub to file directory"],
    "rename-whiteout": ["RENAMED file to into/new"],
    "rename-whiteout-over": ["RENAMED file to into/taken over it"],
    "setattr-mode": ["ATTRIBUTES file"],
    "setattr-owner": ["ATTRIBUTES setid"],
    "setattr-group": ["ATTRIBUTES file"],
    "setattr-size": ["MODIFIED file"],
    "setattr-size-handle": ["MODIFIED file"],
    "setattr-times": ["ATTRIBUTES file"],
    "setattr-now": ["ATTRIBUTES file"],
    "setattr-kill": ["MODIFIED setid"],
    "setattr-directory": ["ATTRIBUTES dir directory"],
    "setattr-symlink": ["MODIFIED link", "ATTRIBUTES link"],
    "setattr-partial": [],
    "setxattr": ["ATTRIBUTES file"],
    "removexattr": ["ATTRIBUTES file"],
    "setxattr-acl": ["ATTRIBUTES file"],
    "setxattr-acl-kill": ["ATTRIBUTES setid"],
    "setxattr-acl-default": ["ATTRIBUTES dir directory"],
    "removexattr-acl": ["ATTRIBUTES file"],
    "open-trunc": ["MODIFIED file"],
    "open-trunc-kill": ["MODIFIED setid"],
    "write": ["MODIFIED file"],
    "write-append": ["MODIFIED file"],
    "write-kill": ["MODIFIED setid"],
    "write-capabilities": ["MODIFIED capped"],
    "write-mmap": ["MODIFIED file"],
    "fallocate": ["MODIFIED file"],
    "fallocate-keep-size": ["MODIFIED file"],
    "fallocate-punch-hole": ["MODIFIED file"],
    "fallocate-zero-range": ["MODIFIED file"],
    "fallocate-kill": ["MODIFIED setid"],
    "copy-file-range": ["MODIFIED other"],
    "copy-file-range-kill": ["MODIFIED setid"],
}
"""For each row: the kind, the place, and of a rename the new place, and who had it before."""


class Recorder(Events):
    """Somebody wants to know, and it is written down, with the words that were odd then."""

    def __init__(self, desk: Desk) -> None:
        """Told instead of guests."""
        self.desk = desk
        self.events: list[Event] = []
        self.odd: set[int] = set()

    @property
    def wanted(self) -> bool:
        return True

    def tell(self, *events: Event, origin: int | None = None, lost: int = 0) -> None:
        self.events += events
        self.odd |= {ino for ino, version in self.desk.table.versions().items() if version & 1}


def on_the_ground(root: Path, work: Callable[[Desk, Recorder], None]) -> None:
    lay(root)

    def at_the_desk() -> None:
        with desk_at(root) as desk:
            recorder = Recorder(desk)
            desk.export._events = recorder
            work(desk, recorder)

    apart(at_the_desk)


def inodes(root: Path) -> Iterator[tuple[int, str]]:
    for directory, directories, files in os.walk(root):
        for name in (".", *directories, *files):
            path = os.path.join(directory, name)
            yield os.lstat(path).st_ino, os.path.relpath(path, root)


def told(event: Event, before: dict[int, str], after: dict[int, str]) -> str:
    """In words. An inode is where it was, or, if it is new, where it is."""
    assert event.ino in before or event.ino in after, event

    def place(parent: int, name: bytes) -> str:
        return os.path.normpath(os.path.join(before[parent], os.fsdecode(name))) if parent else "by descriptor"

    words = [event.kind.name, place(event.parent, event.name)]
    if event.new_parent:
        words += ["to", place(event.new_parent, event.new_name)]
    if event.replaced:
        assert before[event.replaced] == place(event.new_parent, event.new_name)
        words.append("over it")
    if event.is_directory:
        words.append("directory")
    return " ".join(words)


@pytest.mark.parametrize("name", STEPS)
def test_what_a_change_tells(name: str, tmp_path: Path) -> None:
    def check(desk: Desk, recorder: Recorder) -> None:
        step = STEPS[name](desk)
        recorder.events.clear()
        before = dict(inodes(desk.root))
        asked = desk.ask(step.request)
        assert asked.error == step.error
        after = dict(inodes(desk.root))
        assert [told(event, before, after) for event in recorder.events] == TOLD[name]
        assert not recorder.odd, "told before the end of the change"

    on_the_ground(tmp_path, check)


@pytest.mark.parametrize("name", ["create", "rename-over", "setattr-mode", "write"])
def test_a_change_that_fails_tells_nothing(name: str, tmp_path: Path) -> None:
    def check(desk: Desk, recorder: Recorder) -> None:
        step = STEPS[name](desk)
        recorder.events.clear()
        assert desk.ask(step.request, disk_full).error
        assert recorder.events == []

    on_the_ground(tmp_path, check)


def test_nothing_is_made_of_a_change_that_nobody_wants_to_know(tmp_path: Path) -> None:
    class Nobody(Recorder):
        @property
        def wanted(self) -> bool:
            return False

        def tell(self, *events: Event, origin: int | None = None, lost: int = 0) -> None:
            raise AssertionError("told all the same")

    def check(desk: Desk, _: Recorder) -> None:
        desk.export._events = Nobody(desk)
        assert not desk.ask(STEPS["create"](desk).request).error

    on_the_ground(tmp_path, check)


def test_control_what_is_told_too_early_is_noticed(tmp_path: Path) -> None:
    """Told by a test double when the words are odd."""

    def check(desk: Desk, recorder: Recorder) -> None:
        step = STEPS["create"](desk)
        begin = desk.table.begin

        def tell_at_once(slots: tuple[SlotIndex, ...]) -> None:
            begin(slots)
            recorder.tell()

        desk.table.begin = tell_at_once  # type: ignore[method-assign]
        desk.ask(step.request)
        assert recorder.odd

    on_the_ground(tmp_path, check)
