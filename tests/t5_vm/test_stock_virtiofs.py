"""What virtiofs does by itself: the controls of all that this level says about ours.

`none` asks each time; `auto` and `always` keep what they were told, for a second and for good. If these two did not show
the past, the machines would not share what they seem to share, and no test of this level would mean anything.
"""

import os

import pytest

from tests.t5_vm.bed import NAMES, OTHER, Bed

ATTEMPTS = 20
"""`auto` forgets by itself after a second: on a busy machine that may come between two looks."""


def looks_back(bed: Bed, mode: str, looker: str, number: int) -> bool:
    """Whether the look of `looker` after the change of the other is as old as the one before; through stock virtiofs."""
    name = f"{mode}-{looker}-{number}"
    (bed.stock / name).write_bytes(b"")
    path = f"/mnt/{mode}/{name}"
    looking, changing = bed.guests[looker].machine, bed.guests[OTHER[looker]].machine
    before = looking.call(os.stat, path)
    changing.call(os.chmod, path, 0o600)
    after = looking.call(os.stat, path)
    assert os.stat(bed.stock / name).st_mode != before.st_mode
    return after.st_mode == before.st_mode


@pytest.mark.parametrize("looker", NAMES)
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_control_auto_and_always_show_the_past(bed: Bed, mode: str, looker: str) -> None:
    assert any(looks_back(bed, mode, looker, number) for number in range(ATTEMPTS))


@pytest.mark.parametrize("looker", NAMES)
def test_none_never_does(bed: Bed, looker: str) -> None:
    assert not any(looks_back(bed, "none", looker, number) for number in range(ATTEMPTS))
