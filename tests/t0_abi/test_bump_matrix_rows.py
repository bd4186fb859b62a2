"""`docs/spec/bump-matrix.md` and its tests have the same rows, and every request of the protocol is in it."""

from collections import Counter

from coherency.fuse.abi import Opcode
from tests.bump_matrix import calls, document, requests
from tests.t3_process.test_bump_matrix import SILENT

ROLES = {
    "parent", "old parent", "new parent", "child", "target", "replaced", "exchanged", "new inode", "inode", "file",
    "file written to",
}  # fmt: skip


def test_every_row_is_sent_to_the_export_and_nothing_else_is() -> None:
    assert list(requests.STEPS) == list(document.ROWS)


def test_every_row_happens_between_guests_and_nothing_else_does() -> None:
    assert list(calls.CALLS) == list(document.ROWS)


def test_every_silent_request_is_sent_to_the_export() -> None:
    by_the_session = {Opcode.INIT, Opcode.INTERRUPT}
    assert set(document.SILENT) == SILENT.keys() | by_the_session


def test_no_row_is_there_twice() -> None:
    rows = document.read_rows(document.DOCUMENT.read_text(encoding="utf-8"))
    assert [name for name, times in Counter(row.name for row in rows).items() if times > 1] == []
    assert len(set(document.SILENT)) == len(document.SILENT)


def test_roles_are_known() -> None:
    assert {role for row in document.ROWS.values() for role in row.bumped} == ROLES


def test_every_request_is_in_the_matrix() -> None:
    assert {row.opcode for row in document.ROWS.values()} | set(document.SILENT) == set(Opcode)


def test_only_open_is_in_both_parts() -> None:
    assert {row.opcode for row in document.ROWS.values()} & set(document.SILENT) == {Opcode.OPEN}


def test_a_row_is_read_as_it_is_written() -> None:
    """Control: what the tests above compare with is not empty, and says what the text says."""
    text = (
        "| row | request | when | bumped |\n|---|---|---|---|\n| `a-b` | RENAME2 | x, y | old parent, new inode |\n\n"
    )
    (row,) = document.read_rows(text)
    assert row == document.DocumentRow("a-b", Opcode.RENAME2, "x, y", frozenset({"old parent", "new inode"}))
    assert document.read_silent("| bumps nothing | when |\n|---|---|\n| READ | |\n") == [Opcode.READ]
    assert len(document.ROWS) > 50
