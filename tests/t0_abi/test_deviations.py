"""Every deviation from a local file system that is tested is in the tables of `guarantees.md`, and no other."""

from pathlib import Path

from tests.documents import ROOT, code_spans, table
from tests.posix import ALL, between, deviations

HEADINGS = ("deviation", "on ext4", "on our mounts", "why")


def documented(document: Path) -> list[str]:
    return [code_spans(row[0])[0] for row in table(document, *HEADINGS)]


def in_scenarios() -> list[str]:
    return [deviation.look.__name__ for deviation in deviations.ALL]


def test_what_is_tested_is_documented_and_the_other_way_round() -> None:
    assert documented(ROOT / "docs/guarantees.md") == in_scenarios()


def test_an_undocumented_one_is_found(tmp_path: Path) -> None:
    lines = (ROOT / "docs/guarantees.md").read_text().splitlines(keepends=True)
    (tmp_path / "guarantees.md").write_text("".join(line for line in lines if f"`{in_scenarios()[3]}`" not in line))
    assert documented(tmp_path / "guarantees.md") != in_scenarios()


def test_each_says_what_we_do_that_is_not_right() -> None:
    for deviation in deviations.ALL:
        assert deviation.ours
        assert deviation.local not in deviation.ours.values()


def test_no_scenario_is_forgotten() -> None:
    """Functions of the themes that take a directory are scenarios; each is in the list of its module, once."""
    for module in {scenario.__module__ for scenario in [*ALL, *between.SCENARIOS]}:
        listed = [each.__name__ for each in [*ALL, *between.SCENARIOS] if each.__module__ == module]
        path = ROOT / (module.replace(".", "/") + ".py")
        defined = [
            line[4:].partition("(")[0]
            for line in path.read_text().splitlines()
            if line.startswith("def ") and line.endswith(("(d: Path) -> None:", "(here: Path, there: Path) -> None:"))
        ]
        assert sorted(listed) == sorted(defined)
