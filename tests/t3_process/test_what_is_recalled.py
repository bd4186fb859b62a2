"""What each operation of the export makes guests forget, and when: after the words are odd, before anything is changed."""

import errno
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from coherency.daemon.changes import Changes
from coherency.daemon.export import Export
from coherency.daemon.holds import Hold
from coherency.daemon.origins import Origins
from coherency.fuse import codec
from coherency.fuse.abi import Opcode, SetattrValid
from coherency.fuse.codec import Request
from coherency.ids import GrantKey, HostInode
from coherency.leases import introduction, is_names_key, slot_of
from coherency.shm_table import TableWriter, bytes_needed
from tests.bump_matrix.desk import Desk, apart, desk_at
from tests.bump_matrix.ground import facts_by_inode, lay
from tests.bump_matrix.requests import STEPS, Step

pytestmark = pytest.mark.needs_fuse  # needs root, like every daemon

TAKES_NAMES_AWAY = (Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2)


class Witness:
    """Sees what is recalled, and what the share and the table are like at that moment."""

    def __init__(self, desk: Desk, *, answer: BaseException | None = None) -> None:
        self.desk, self.answer = desk, answer
        self.attributes: set[HostInode] = set()
        self.names: set[HostInode] = set()
        self.calls = 0
        self.odd: set[HostInode] = set()
        self.facts: dict[int, Any] = {}
        self.request: Request | None = None

    def revoke(self, keys: Iterable[GrantKey], request: Request | None) -> None:
        self.calls += 1
        self.request = request
        for key in keys:
            (self.names if is_names_key(key) else self.attributes).add(self.desk.table.inodes[slot_of(key)])
        self.odd = {ino for ino, version in self.desk.table.versions().items() if version & 1}
        self.facts = facts_by_inode(self.desk.root)
        if self.answer is not None:
            raise self.answer

    def announce(self, keys: Collection[GrantKey] | None) -> None:
        raise AssertionError("nobody changes anything past the export")


def on_the_ground(root: Path, work: Callable[[Desk], None]) -> None:
    lay(root)

    def at_the_desk() -> None:
        with desk_at(root) as desk:
            work(desk)

    apart(at_the_desk)


def changes_owner(request: Request) -> bool:
    return request.opcode == Opcode.SETATTR and bool(request.body.valid & (SetattrValid.UID | SetattrValid.GID))


def existing(desk: Desk, step: Step, roles: Iterable[str]) -> set[HostInode]:
    paths = [step.roles[role] for role in roles]
    return {desk.ino(path) if isinstance(path, str) else path for path in paths}


@pytest.mark.parametrize("name", STEPS)
def test_all_that_a_change_touches_is_recalled_before_it_is_made(name: str, tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        step = STEPS[name](desk)
        touched = existing(desk, step, step.roles)
        children = [role for role in step.roles if "parent" not in role]
        doubtful = step.request.opcode in TAKES_NAMES_AWAY or changes_owner(step.request)
        led_to = existing(desk, step, children) if doubtful else set()
        before = facts_by_inode(desk.root)
        witness = desk.changes.recalls = Witness(desk)

        asked = desk.ask(step.request)

        assert asked.error == step.error
        assert witness.calls == 1
        assert witness.request is step.request
        assert witness.attributes == touched
        assert witness.names == led_to
        assert witness.odd == touched
        assert witness.facts == before

    on_the_ground(tmp_path, check)


@pytest.mark.parametrize("row", ["unlink", "setattr-owner"])
def test_an_export_that_forgets_what_names_led_to_is_caught(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(Export, "changing", lambda export, request, *inodes, **_: export._changes.change(inodes, request))
    with pytest.raises(AssertionError, match=r"set\(\) == "):
        test_all_that_a_change_touches_is_recalled_before_it_is_made(row, tmp_path)


@pytest.mark.parametrize("name", ["unlink", "create", "write"])
def test_a_change_whose_caller_is_interrupted_meanwhile_is_not_made(name: str, tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        step = STEPS[name](desk)
        before = facts_by_inode(desk.root)
        desk.changes.recalls = Witness(desk, answer=InterruptedError(errno.EINTR, "interrupted"))
        asked = desk.ask(step.request)  # which sees that the words are even afterwards
        assert asked.error == errno.EINTR
        assert facts_by_inode(desk.root) == before

    on_the_ground(tmp_path, check)


def test_nothing_is_recalled_while_changes_are_held(tmp_path: Path) -> None:
    def check(desk: Desk) -> None:
        hold = Hold(2**62)
        witness = Witness(desk)
        desk.changes = Changes(desk.table, recalls=witness, hold=hold)
        desk.export._changes = desk.changes
        hold.give_up()
        assert desk.ask(STEPS["unlink"](desk).request).error == errno.EINTR
        assert witness.calls == 0

    on_the_ground(tmp_path, check)


def test_an_introduction_is_a_name_that_is_not_there_and_tells_the_process(tmp_path: Path) -> None:
    table = TableWriter.create(
        memoryview(bytearray(bytes_needed(16))).cast("Q"), slot_count=16, table_id=(1, 2)
    )
    origins = Origins({0xAB}.__contains__)
    share = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    export = Export(share, Changes(table), descriptor_limit=10, origins=origins)
    names = [introduction(0xAB), introduction(0xAC), introduction(0xAB)[:-1], introduction(0xAB).upper()]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()

    def look_up(name: bytes, node: int = 1) -> bool:
        try:
            export.lookup(Request(2, Opcode.LOOKUP, node, 0, 0, os.getpid(), codec.Name(name)))  # type: ignore[arg-type]
        except OSError as error:
            assert error.errno == errno.EISCONN  # noqa: PT017 - it tells the guest that it was heard
            return False
        return True

    try:
        assert names[0] == b".coherency-00000000000000ab"
        assert all(look_up(name) for name in names[1:])
        assert origins.session_of(os.getpid()) is None
        assert not look_up(names[0])
        assert origins.session_of(os.getpid()) == 0xAB
    finally:
        export.close()
