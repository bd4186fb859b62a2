"""Links between the documents of the repository lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")])


def broken_links(document: Path) -> list[str]:
    """Targets of relative links that are no file, no directory, or no heading of the file they name."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = document.parent / path if path else document
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(target)
    return broken


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `word`, and more\n")
    (tmp_path / "here.md").write_text(
        "## Here\n[a](other.md) [b](missing.md) [c](other.md#one-word-and-more) [d](other.md#two) [e](https://x.y/z)\n"
        "[f](#here) [g](#there)\n```\n[h](code.md)\n```\n[i](sub/)\n"
    )
    assert broken_links(tmp_path / "here.md") == ["missing.md", "other.md#two", "#there", "sub/"]
