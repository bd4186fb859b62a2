"""The tables of `docs/spec/bump-matrix.md`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from coherency.fuse.abi import Opcode

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "spec" / "bump-matrix.md"

NEW_INODE = "new inode"


class DocumentRow(NamedTuple):
    name: str
    opcode: Opcode
    when: str
    bumped: frozenset[str]
    """Roles, such as `old parent`."""


def _tables(text: str) -> Iterator[list[list[str]]]:
    block: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif block:
            assert all(len(cells) == len(block[0]) for cells in block), block[0]
            yield block
            block = []


def read_rows(text: str) -> list[DocumentRow]:
    """All rows of all tables whose first column is `row`."""
    found = []
    for head, _, *lines in _tables(text):
        if head == ["row", "request", "when", "bumped"]:
            for name, request, when, bumped in lines:
                roles = frozenset(role.strip() for role in bumped.split(","))
                found.append(DocumentRow(name, Opcode[request], when, roles))
    return found


def read_silent(text: str) -> list[Opcode]:
    """The requests that bump nothing."""
    return [Opcode[line[0]] for head, _, *lines in _tables(text) if head[0] == "bumps nothing" for line in lines]


_TEXT = DOCUMENT.read_text(encoding="utf-8")
ROWS = {row.name: row for row in read_rows(_TEXT)}
SILENT = read_silent(_TEXT)
