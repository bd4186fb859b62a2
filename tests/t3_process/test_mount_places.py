"""Where a mount point really is, found without asking what is mounted there (for that see t4_fuse/test_wrong_places.py)."""

import os
from pathlib import Path

import pytest

from coherency.fuse.mounts import place_of

LINKS = {"link": "a/b", "twice": "link", "loop": "loop", "a/up": "../twice/c", "dangling": "nowhere/x"}


@pytest.mark.parametrize(
    "path",
    [".", "..", "/", "link", "twice", "twice/..", "link/../b", "absolute", "a/up", "dangling", "missing", "a/b/", "./a/.././a",
     "loop", "twice/c", "a/..", "absolute/../../.."],
)  # fmt: skip
def test_it_is_where_realpath_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    for name, target in {**LINKS, "absolute": str(tmp_path / "a/b/c")}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    assert str(place_of(Path(path))) == os.path.realpath(path)
    assert str(place_of(tmp_path / path)) == os.path.realpath(tmp_path / path)
