"""The repository's documents, read by the tests: tables and code blocks."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Block(NamedTuple):
    """A fenced block of code: its language, the other words behind the fence, its lines."""

    language: str
    tags: tuple[str, ...]
    text: str


def blocks(document: Path) -> list[Block]:
    found = re.findall(r"^```(\S+)([^\n]*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, tuple(tags.split()), text) for language, tags, text in found]


def table(document: Path, *headings: str) -> list[list[str]]:
    """The rows of the tables with these headings, all together; fails if there is none."""
    rows: list[list[str]] = []
    found = inside = False
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells == list(headings):
            found = inside = True
        elif not cells:
            inside = False
        elif inside and set(line) - set("|- :"):
            rows.append(cells)
    assert found, f"{document} has no table with the headings {headings}"
    return rows


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)
