"""The tables of `docs/spec/table.md` say what the code does; what its last table claims to be shown has a test."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from coherency import shm_abi
from coherency.shm_abi import WORD_BYTES
from coherency.shm_table import HEARTBEAT_PERIOD_NS, TRUST_MARGIN_NS, TRUST_NS, State, splitmix64

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "docs" / "spec" / "table.md"


def tables() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield every table as (its first column's name, rows by column), with the backquotes taken off."""
    lines = SPEC.read_text(encoding="utf-8").splitlines()
    block: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif block:
            head, rule, *rows = block
            assert all(set(cell) == {"-"} for cell in rule), rule
            assert all(len(row) == len(head) for row in rows), head
            yield head[0], [dict(zip(head, row, strict=True)) for row in rows]
            block = []


def rows_of(first_column: str) -> list[dict[str, str]]:
    found = [rows for name, rows in tables() if name == first_column]
    assert found, f"no table with the first column {first_column!r}"
    return [row for rows in found for row in rows]


def test_fields_have_the_offsets_of_the_spec() -> None:
    specified = {row["field"]: int(row["offset"]) for row in rows_of("field")}
    coded = {
        name.removesuffix("_WORD").lower(): getattr(shm_abi, name) * WORD_BYTES
        for name in dir(shm_abi)
        if name.endswith("_WORD")
    }
    assert specified == coded


def test_fixed_values_are_those_of_the_spec() -> None:
    specified = {row["field"]: int(row["value in ABI 1"], 0) for row in rows_of("field") if row.get("value in ABI 1")}
    assert specified == {
        "magic": shm_abi.MAGIC,
        "abi_version": shm_abi.ABI_VERSION,
        "header_bytes": shm_abi.HEADER_BYTES,
        "slots_offset": shm_abi.SLOTS_OFFSET_BYTES,
        "hash_id": shm_abi.HASH_SPLITMIX64,
    }


def test_states_are_those_of_the_spec() -> None:
    assert {row["state"]: int(row["value"]) for row in rows_of("state")} == {s.name.lower(): s.value for s in State}


def test_hash_vectors_are_those_of_the_spec() -> None:
    rows = rows_of("inode")
    assert len(rows) >= 10
    for row in rows:
        hashed = splitmix64(int(row["inode"], 0))
        assert hashed == int(row["splitmix64"], 0)
        assert hashed & (2**20 - 1) == int(row["slot of 2^20"])
        assert hashed & 7 == int(row["slot of 8"])


def test_times_are_those_of_the_spec() -> None:
    assert {row["constant"]: int(row["milliseconds"]) * 1_000_000 for row in rows_of("constant")} == {
        "heartbeat_period": HEARTBEAT_PERIOD_NS,
        "trust": TRUST_NS,
        "trust_margin": TRUST_MARGIN_NS,
    }


def test_limits_in_the_text_are_those_of_the_code() -> None:
    text = " ".join(SPEC.read_text(encoding="utf-8").split())
    assert "from 1 to 2^28" in text
    assert shm_abi.MAX_SLOT_COUNT == 2**28
    assert "2^20 unless told otherwise" in text
    assert shm_abi.DEFAULT_SLOT_COUNT == 2**20
    assert f"`header_bytes` is at least {shm_abi.HEADER_BYTES}" in text
    assert f"cache line of {shm_abi.CACHE_LINE_BYTES} bytes" in text


def test_rules_are_numbered_without_gaps() -> None:
    found = re.findall(r"^\*\*([RWT])(\d+)[ *]", SPEC.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for letter, last in (("R", 7), ("W", 9), ("T", 7)):
        assert [int(number) for kind, number in found if kind == letter] == list(range(1, last + 1))


@pytest.mark.parametrize("name", [row["shown by"] for row in rows_of("tempting") if row["shown by"] != "the model"])
def test_what_is_said_not_to_work_has_a_control(name: str) -> None:
    definition = re.compile(rf"^(class|def) {re.escape(name)}\b", flags=re.MULTILINE)
    tests = ROOT / "tests"
    assert any(definition.search(path.read_text(encoding="utf-8")) for path in tests.rglob("test_*.py")), name
