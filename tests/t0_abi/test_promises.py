"""Documents name what exists: tests in `guarantees.md`, messages of the program in `operations.md`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT, code_spans, table

GUARANTEES = ROOT / "docs/guarantees.md"
OPERATIONS = ROOT / "docs/operations.md"
REFERENCES = [span for span in code_spans(GUARANTEES.read_text()) if "::" in span]
MESSAGES = [code_spans(row[0])[0] for row in table(OPERATIONS, "message", "what to do")]


def is_defined(reference: str) -> bool:
    """Whether the file of `file::test` has a top-level function, class or assignment of that name."""
    path, _, name = reference.partition("::")
    file = ROOT / path
    if not file.is_file():
        return False
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets):
            return True
    return False


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_named_test_exists(reference: str) -> None:
    assert is_defined(reference)


def test_a_missing_test_is_found() -> None:
    assert not is_defined("tests/t0_abi/test_promises.py::test_nothing")
    assert not is_defined("tests/t0_abi/test_nothing.py::test_a_named_test_exists")
    assert is_defined("tests/t0_abi/test_promises.py::test_a_named_test_exists")


def promises() -> dict[str, str]:
    """Every promise by its number, with its text."""
    return dict(re.findall(r"^\*\*(G\d+)\.(.*?)(?=^\*\*G|^## )", GUARANTEES.read_text(), re.MULTILINE | re.DOTALL))


def test_every_promise_names_a_test() -> None:
    found = promises()
    assert list(found) == [f"G{number}" for number in range(1, len(found) + 1)]
    assert [number for number, text in found.items() if "::test_" not in text] == []


# --- messages -----------------------------------------------------------------------------------------------------


def templates(package: Path) -> Iterator[str]:
    """Every text in the code, with … for what is put in."""
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sd]", "…", node.value)


TEMPLATES = frozenset(templates(ROOT / "coherency"))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_program(message: str) -> None:
    assert message in TEMPLATES


def test_a_message_that_nobody_says_is_found() -> None:
    assert "the daemon of '…' is in a bad mood" not in TEMPLATES


OPERATORS_BUSINESS = ("UsageError", "MountError", "CoherencyError")
LOGGED = ("warning", "error", "critical", "exception")


def for_the_operator(tree: ast.Module) -> Iterator[str]:
    """What is raised for the operator, or logged as a warning at least, with … for what is put in."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func)
        if name in OPERATORS_BUSINESS or (name.partition(".")[0] in ("log", "_log") and name.endswith(LOGGED)):
            text = node.args[0]
            if isinstance(text, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in text.values)
            elif isinstance(text, ast.Constant):
                yield re.sub(r"%[sd]", "…", str(text.value))


@pytest.mark.parametrize("room", ["daemon", "fuse", "guest_agent"])
def test_what_the_operator_may_read_is_explained(room: str) -> None:
    said = {
        text
        for file in (ROOT / "coherency" / room).rglob("*.py")
        for text in for_the_operator(ast.parse(file.read_text()))
    }
    assert len(said) > 5
    assert said - set(MESSAGES) == set()


def test_an_unexplained_message_is_found() -> None:
    tree = ast.parse('raise UsageError(f"no {x} today")\nlog.warning("lost %s", name)\nlog.info("fine")')
    assert set(for_the_operator(tree)) == {"no … today", "lost …"}
