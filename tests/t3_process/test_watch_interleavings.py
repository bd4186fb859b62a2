"""A guest looks something up while somebody changes it past the export: every order of their steps.

The guest is an agent reduced to what matters: sample, look up through a real `Export`, sample, fetch attributes, register,
check, grant. The watcher is real, too, and stopped between its steps; the kernel's events are made by hand.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coherency.daemon import fanotify_events as fan
from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.daemon.fanotify_events import numbered
from coherency.daemon.owners import Owner, Owners
from coherency.daemon.shown import Shown
from coherency.daemon.watch import Watcher
from coherency.fuse.codec import Request
from coherency.fuse.nodes import Node
from coherency.fuse.passthrough import Passthrough
from coherency.fuse.replies import encode_attr, owner_of
from coherency.ids import GrantKey, HostInode
from coherency.leases import attributes_key, keys_of, names_key
from coherency.shm_table import State, TableReader, TableWriter, bytes_needed
from tests.host_events import of_inode, of_name, of_rename

NAME = b"name"
SLOTS = 1 << 12
POINTS = 11
"""Between two steps of the guest; there are no more in any run."""


class Script:
    """What is done at which point of the guest's way, counted from 0; the rest at the end."""

    def __init__(self, steps: Iterable[tuple[int, Callable[[], object]]]) -> None:
        self._steps = list(steps)
        self.points = 0

    def pass_point(self) -> None:
        while self._steps and self._steps[0][0] <= self.points:
            self._steps.pop(0)[1]()
        self.points += 1

    def finish(self) -> None:
        while self._steps:
            self._steps.pop(0)[1]()


class Told(Shown):
    """With points before and after a number is marked, in the thread of the guest."""

    pass_point: Callable[[], None] = staticmethod(lambda: None)

    def was_shown(self, ino: HostInode, since: int) -> bool:
        pass_point, self.pass_point = self.pass_point, lambda: None  # not for what is done at the point
        pass_point()
        shown = super().was_shown(ino, self.since(since))
        if not shown:
            pass_point()
        self.pass_point = pass_point
        return shown

    def since(self, given: int) -> int:
        return given


class Steps:
    """A watcher whose work is done in steps: look which inodes are concerned, touch, tell."""

    def __init__(self, watcher: Watcher, changes: Changes) -> None:
        self._watcher = watcher
        self._over = False
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        watcher.reach = changes.reach = self._stop
        self._thread = threading.Thread(target=self._run)

    def _stop(self, point: str) -> None:
        if point in ("sorted", "touched"):
            self._came.release()
            assert self._go.acquire(timeout=30)

    def _run(self) -> None:
        try:
            self._watcher.read_and_deal()
        finally:
            self._over = True
            self._came.release()

    def next(self) -> None:
        if self._over:  # nothing of it was of interest
            return
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        assert self._came.acquire(timeout=30)

    def rest(self) -> None:
        while not self._over:
            self.next()

    def end(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


class World:
    """A share with one file, its export, a table, and one guest's kernel."""

    def __init__(
        self, root: Path, kind: str, export: type[Export], changes: type[Changes], shown: Told, owners: Owners
    ) -> None:
        self.root, self.kind = root, kind
        for name in ("name", "new", "other"):
            (root / name).unlink(missing_ok=True)
        (root / "name").touch(0o600)
        (root / "new").touch()
        os.link(root / "name", root / "other")
        words = memoryview(bytearray(bytes_needed(SLOTS))).cast("Q")
        self.table = TableWriter.create(words, slot_count=SLOTS, table_id=(1, 2))
        self.table.set_state(State.SERVING)
        self.reader = TableReader(words)
        self.changes = changes(self.table, recalls=self)
        self.shown = shown
        self.export = export(os.open(root, os.O_RDONLY), self.changes, descriptor_limit=16, shown=self.shown, owners=owners)
        self.watcher = Watcher(
            self, self.changes, shown=self.shown, owners=owners, number_on=self.export.nodes.number_if_met,  # type: ignore[arg-type]
        )  # fmt: skip
        self.registered: set[GrantKey] = set()
        self.names: dict[HostInode, GrantKey] = {}
        self.events = b""

    # the kernel, for the watcher

    @property
    def group(self) -> World:
        return self

    def read(self) -> bytes:
        return self.events

    def owner(self, _fsid: int, _handle: bytes) -> Owner:
        status = (self.root / "name").stat()
        return status.st_uid, status.st_gid

    def identity(self, _fsid: int, handle: bytes) -> tuple[int, int]:
        found = numbered(handle)
        assert found is not None
        return self.export.nodes.root_device, found.ino

    # the control channel, for the changes

    def revoke(self, keys: Iterable[GrantKey], request: Request | None) -> None:
        raise AssertionError("nobody waits")

    def announce(self, keys: Collection[GrantKey] | None) -> None:
        assert keys is not None
        self.registered -= set(keys)

    # the host

    def change(self) -> None:
        here, ino, new = self.root.stat().st_ino, (self.root / "name").stat().st_ino, (self.root / "new").stat().st_ino
        if self.kind == "attributes":
            os.chmod(self.root / "name", 0o644)
            self.events = of_name(fan.ATTRIB, ino, here, b"other")
        elif self.kind == "given away":
            os.chown(self.root / "name", 1001, 1002)
            self.events = of_name(fan.ATTRIB, ino, here, b"other")
        elif self.kind == "removed":
            os.unlink(self.root / "name")
            self.events = of_inode(fan.ATTRIB, ino) + of_name(fan.DELETE, ino, here, NAME)
        else:
            os.rename(self.root / "new", self.root / "name")
            self.events = of_rename(fan.RENAME, new, (here, b"new"), (here, NAME)) + of_inode(fan.ATTRIB, ino)

    def look_up(self, name: bytes = NAME) -> Node | None:
        try:
            return self.export.look_up(self.export.nodes.root, self.export.nodes.mount_fd, name)[0]
        except FileNotFoundError:
            return None

    # the guest, and what is stale at the end

    def run(self, script: Script) -> list[str]:
        """What is stale when everything is over."""
        reader, root = self.reader, self.export.nodes.root
        of_directory = reader.sample(root.ino)
        script.pass_point()
        self.shown.pass_point = script.pass_point
        node = self.look_up()
        script.pass_point()
        if node is None or of_directory is None:
            script.finish()
            return ["the name"] if of_directory and reader.valid(of_directory) and (self.root / "name").exists() else []
        of_child = reader.sample(node.ino)
        script.pass_point()
        attributes = self.export.attributes(node, node.fd)
        self.shown.pass_point = lambda: None
        script.pass_point()
        slot, of_root = reader.slot_of(node.ino), attributes_key(reader.slot_of(root.ino))
        self.registered |= {attributes_key(slot), names_key(slot), of_root}
        script.pass_point()
        granted = of_child is not None and reader.valid(of_child)
        named = granted and reader.valid(of_directory)
        script.pass_point()
        script.finish()

        path = next(path for path in (self.root / "other", self.root / "name") if path.stat().st_ino == node.ino)
        right = attributes == encode_attr(path.stat(), node.ino)
        leads = (self.root / "name").exists() and (self.root / "name").stat().st_ino == node.ino
        stale = []
        if of_child is not None and reader.valid(of_child) and not right:
            stale.append("attributes in the user cache")
        if granted and attributes_key(slot) in self.registered and not right:
            stale.append("attributes in the kernel")
        if reader.valid(of_directory) and not leads:
            stale.append("the name in the user cache")
        if named and names_key(slot) in self.registered and not leads:
            stale.append("the name in the kernel")
        if named and names_key(slot) in self.registered and owner_of(attributes) != owner_of(encode_attr(path.stat(), node.ino)):
            stale.append("the owner in the kernel")  # which decides by that without asking
        return stale

    def close(self) -> None:
        self.watcher.close()
        self.export.close()


@contextmanager
def world(root: Path, kind: str, **parts: Any) -> Iterator[World]:
    made = World(
        root, kind, parts.get("export", Export), parts.get("changes", Changes),
        parts.get("shown", Told)(), parts.get("owners", Owners)(),
    )  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def stale_in_any_order(root: Path, kind: str, until: str = "", **parts: Any) -> set[str]:
    """What is stale in some order; ends early when ``until`` was."""
    found: set[str] = set()
    for order in itertools.combinations_with_replacement(range(POINTS), 4):  # at which point each of the four is made
        with world(root, kind, **parts) as one:
            steps = Steps(one.watcher, one.changes)
            script = Script(zip(order, [one.change, *[steps.next] * 3], strict=True))
            found.update(one.run(script))
            steps.end()
        assert script.points <= POINTS, "more points than orders are made for"
        if until in found:
            break
    return found


KINDS = ("attributes", "removed", "replaced", pytest.param("given away", marks=pytest.mark.needs_fuse))  # needs root


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_stale_in_the_end(tmp_path: Path, kind: str) -> None:
    assert stale_in_any_order(tmp_path, kind) == set()


# --- controls -------------------------------------------------------------------------------------------------------


class MarksAfterTheLookUp(Export):
    """The name was found before anybody could know that it is of interest."""

    def look_up(self, parent: Node, at: int, name: bytes) -> tuple[Node, bytes]:
        node, attr = Passthrough.look_up(self, parent, at, name)
        assert self._shown is not None
        self._shown.mark(node.ino)
        return node, attr


class LooksAtTheInodeAgain(MarksAfterTheLookUp):
    """And what has been found is asked again for its attributes: which does not tell whether it is still called so."""

    def look_up(self, parent: Node, at: int, name: bytes) -> tuple[Node, bytes]:
        node, _ = super().look_up(parent, at, name)
        return node, self.attributes(node, node.fd)


class MarksAfterTheAttributes(Export):
    def look_up(self, parent: Node, at: int, name: bytes) -> tuple[Node, bytes]:
        return Passthrough.look_up(self, parent, at, name)

    def attributes(self, node: Node, fd: int) -> bytes:
        fetched = super().attributes(node, fd)
        assert self._shown is not None
        self._shown.mark(node.ino)
        return fetched


class TellsBeforeItTouches(Changes):
    def made_elsewhere(self, inodes: Iterable[HostInode], leaving: Iterable[HostInode] = ()) -> None:
        slots = self.table.slots_of(inodes)
        assert self.recalls is not None
        self.recalls.announce(keys_of(slots, self.table.slots_of(leaving)))
        self.reach("touched")
        self.table.bump(inodes)


class ForgetsWhatItTold(Owners):
    def another_was_told(self, ino: HostInode, owner: Owner) -> bool:
        return False


@pytest.mark.parametrize(
    ("part", "kind", "stale"),
    [
        pytest.param({"owners": ForgetsWhatItTold}, "given away", "the owner in the kernel", marks=pytest.mark.needs_fuse),
        ({"export": MarksAfterTheLookUp}, "replaced", "the name in the kernel"),
        ({"export": LooksAtTheInodeAgain}, "removed", "the name in the kernel"),
        ({"export": MarksAfterTheAttributes}, "attributes", "attributes in the user cache"),
        ({"changes": TellsBeforeItTouches}, "attributes", "attributes in the kernel"),
        ({"changes": TellsBeforeItTouches}, "replaced", "the name in the kernel"),
    ],
    ids=lambda value: "-".join(each.__name__ for each in value.values()) if isinstance(value, dict) else value,
)  # fmt: skip
def test_control_another_order_within_is_stale(tmp_path: Path, part: dict[str, Any], kind: str, stale: str) -> None:
    assert stale in stale_in_any_order(tmp_path, kind, stale, **part)


# --- two guests: another one is shown the inode under its other name ------------------------------------------------


class BelievesTheMark(Told):
    """Takes what is marked now for what was marked before the look-up."""

    def since(self, given: int) -> int:
        return self.marks


def stale_with_another_guest(root: Path, until: str = "", **parts: Any) -> set[str]:
    found: set[str] = set()
    for order in itertools.combinations_with_replacement(range(8), 3):
        for other in range(6):
            with world(root, "replaced", **parts) as one:
                steps = Steps(one.watcher, one.changes)
                other_guest: Callable[[], object] = partial(one.look_up, b"other")
                does = [*zip(order, (one.change, steps.next, steps.rest), strict=True), (other, other_guest)]
                found.update(one.run(Script(sorted(does, key=lambda step: step[0]))))
                steps.end()
            if until in found:
                return found
    return found


def test_a_mark_by_another_guest_is_not_taken_for_an_earlier_one(tmp_path: Path) -> None:
    assert stale_with_another_guest(tmp_path) == set()


def test_control_who_believes_the_mark_is_stale(tmp_path: Path) -> None:
    assert "the name in the kernel" in stale_with_another_guest(tmp_path, "the name in the kernel", shown=BelievesTheMark)
