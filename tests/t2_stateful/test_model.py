"""The models of the protocol: a selection of their searches, each control failing as it must; and what is written about them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, code_spans, table

MODEL = ROOT / "docs" / "model"
CHECK = MODEL / "check.py"
LONGEST_S = 220


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)


def rules() -> list[list[str]]:
    """The table: rule, rows that pass, controls that fail, modules."""
    return table(MODEL / "README.md", "rule", "rows", "controls", "code")


def quick_rows_by_rule() -> list[list[str]]:
    quick = {line.split()[0]: None for line in check("--quick", "--list").stdout.splitlines()}
    found = []
    for _, passing, controls, _ in rules():
        names = [name for name in code_spans(passing + controls) if name in quick]
        found.append(names)
        for name in names:
            del quick[name]
    return found


def rows() -> dict[str, str]:
    """The expected result of each row."""
    lines = [line for line in (MODEL / "rows.txt").read_text().splitlines() if line and not line.startswith("#")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert len({row[0] for row in cells}) == len(cells), "a name is used twice"
    return {row[0]: row[4] for row in cells}


@pytest.mark.parametrize("number", range(1, len(rules()) + 1))
def test_the_quick_searches_of_a_rule_come_out_as_expected(number: int) -> None:
    """Rows are searched with the first rule that names them."""
    done = check(rf"^\w+ ({'|'.join(quick_rows_by_rule()[number - 1])}) ", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert any(each["result"] != "pass" for each in json.loads(done.stdout))


def test_control_a_search_that_comes_out_otherwise_is_reported(tmp_path: Path) -> None:
    wrong = tmp_path / "rows.txt"
    wrong.write_text("origin-left-out | keys | -DO0=0 -DREADS=10 -DORIGIN_LEFT_OUT | LIN | pass | *\n")
    done = check("--rows", str(wrong), "--keep", str(tmp_path / "kept"))
    assert done.returncode == 1
    assert "origin-left-out" in done.stderr
    assert "expected: pass" in done.stderr
    assert "assertion violated" in (tmp_path / "kept" / "origin-left-out.LIN" / "counterexample.txt").read_text()


@pytest.mark.parametrize("line", ["one | strict | | LIN | pass", "one | other | | LIN | pass |", "one | keys | | ALL | pass |"])
def test_what_is_no_row_is_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.txt"
    file.write_text(line)
    done = check("--rows", str(file))
    assert done.returncode == 2
    assert "line 1: not" in done.stderr


def test_the_table_of_rules_names_every_row() -> None:
    expected = rows()
    named: dict[str, set[str]] = {"rows": set(), "controls": set()}
    for _, passing, controls, _ in rules():
        named["rows"].update(code_spans(passing))
        named["controls"].update(code_spans(controls))
    assert named["rows"] == {name for name, result in expected.items() if result == "pass"}
    assert named["controls"] == {name for name, result in expected.items() if result != "pass"}


def test_every_rule_has_rows_and_controls_and_code() -> None:
    for rule, passing, controls, code in rules():
        assert code_spans(passing), rule
        assert code_spans(controls), rule
        assert code_spans(code), rule
        assert [path for path in code_spans(code) if not (ROOT / path).is_file()] == [], rule


def test_every_flag_is_one_that_its_model_has() -> None:
    for line in (MODEL / "rows.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            _, model, flags, *_ = (cell.strip() for cell in line.split("|"))
            text = (MODEL / f"{model}.pml").read_text()
            assert [flag for flag in re.findall(r"-D(\w+)", flags) if not re.search(rf"#.*\b{flag}\b", text)] == [], line


def test_the_quick_selection_has_a_control_of_every_rule() -> None:
    quick = {line.split()[0] for line in check("--quick", "--list").stdout.splitlines()}
    assert [rule for rule, _, controls, _ in rules() if not quick & set(code_spans(controls))] == []
    assert quick == {name for names in quick_rows_by_rule() for name in names}


def test_the_recorded_results_are_those_of_the_rows() -> None:
    recorded = [line.split() for line in (MODEL / "results.txt").read_text().splitlines()]
    assert [(name, result) for name, _, _, result in recorded if rows().get(name) != result] == []
    assert {name for name, *_ in recorded} == set(rows())
