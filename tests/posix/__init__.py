"""What a local file system does: small scenarios with exact expectations, by theme.

A scenario gets a new directory, open to everybody, and asserts what is to be. All of them pass on ext4, which shows that
what they expect is right; then a mount of ours has to do the same. In `between` two mounts of one tree take part. Where we
do not do the same it is in `deviations`, with what happens instead, and in `docs/guarantees.md`.
"""

import pytest

_THEMES = ("contents", "directories", "names", "open_files", "permissions", "programs", "renames", "times", "xattrs")
pytest.register_assert_rewrite(*(f"{__name__}.{theme}" for theme in (*_THEMES, "between", "deviations")))

from tests.posix import contents, directories, names, open_files, permissions, programs, renames, times, xattrs  # noqa: E402
from tests.scenarios.comparing import Scenario  # noqa: E402

ALL: list[Scenario] = [
    *permissions.SCENARIOS, *names.SCENARIOS, *renames.SCENARIOS, *open_files.SCENARIOS, *times.SCENARIOS, *contents.SCENARIOS,
    *programs.SCENARIOS, *xattrs.SCENARIOS, *directories.SCENARIOS,
]  # fmt: skip

MATTER_OF_CACHES: list[Scenario] = [
    *open_files.SCENARIOS, *times.SCENARIOS, *contents.SCENARIOS, renames.two_names_of_one_file_stay_two,
    renames.a_moved_directory_has_another_parent, renames.what_is_replaced_loses_a_name, renames.what_is_open_moves_along,
    names.links_of_files_are_counted, names.links_of_directories_are_their_subdirectories, xattrs.set_replaced_and_removed,
    directories.from_the_beginning_it_is_read_anew, directories.where_one_works_moves_along,
]  # fmt: skip
"""What a kernel that remembers too much, or too little, would get wrong."""
