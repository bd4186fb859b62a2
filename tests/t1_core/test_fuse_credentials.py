"""Who may do what by the mode bits: access(2), as far as a server can know it."""

import os
import stat

import pytest

from coherency.fuse.credentials import permits

OWNER = (1000, 2000)
FILE, DIRECTORY = stat.S_IFREG, stat.S_IFDIR
USER, MEMBER, OTHER, ROOT = (1000, 9), (9, 2000), (9, 9), (0, 0)


@pytest.mark.parametrize(
    ("caller", "mode", "mask", "expected"),
    [
        (USER, 0o400, os.R_OK, True),
        (USER, 0o077, os.R_OK, False),  # the owner's bits count, even if others have more
        (USER, 0o700, os.R_OK | os.W_OK | os.X_OK, True),
        (USER, 0o500, os.R_OK | os.W_OK, False),
        (MEMBER, 0o040, os.R_OK, True),
        (MEMBER, 0o707, os.R_OK, False),
        (OTHER, 0o004, os.R_OK, True),
        (OTHER, 0o770, os.R_OK, False),
        (OTHER, 0o001, os.X_OK, True),
        (OTHER, 0o000, os.F_OK, True),
        (ROOT, 0o000, os.R_OK | os.W_OK, True),
        (ROOT, 0o666, os.X_OK, False),
        (ROOT, 0o610, os.X_OK, True),
    ],
)
def test_of_a_file(caller: tuple[int, int], mode: int, mask: int, expected: bool) -> None:
    assert permits(FILE | mode, OWNER, caller, mask) is expected


def test_root_may_enter_every_directory() -> None:
    assert permits(DIRECTORY, OWNER, ROOT, os.X_OK | os.W_OK)
    assert not permits(DIRECTORY | 0o666, OWNER, USER, os.X_OK)


def test_set_id_bits_are_no_permissions() -> None:
    assert not permits(FILE | 0o7000, OWNER, OTHER, os.R_OK)
    assert not permits(FILE | 0o7000, OWNER, USER, os.R_OK)
