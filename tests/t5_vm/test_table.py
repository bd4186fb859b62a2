"""The version table as a machine has it: the daemon's, live, and nothing that a guest does to it reaches anybody."""

import pytest

from coherency.shm_abi import HEADER_BYTES
from tests.t5_vm.bar import BYTES, overwrite_table, read_table
from tests.t5_vm.bed import NAMES, Bed
from tests.waiting import until


def host_table(bed: Bed) -> bytes:
    with open(bed.host.runtime_dir / bed.host.name / "table", "rb") as file:
        return file.read(BYTES)


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_has_the_table_of_the_daemon_as_it_is_now(bed: Bed, name: str) -> None:
    bed.both_running()
    here, there = host_table(bed), bed.guests[name].machine.call(read_table)
    assert there[:8] == here[:8]  # the magic; most of the rest moves
    until(lambda: bed.guests[name].machine.call(read_table) != there)


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_that_writes_into_the_table_changes_nothing(bed: Bed, name: str) -> None:
    bed.both_running()
    before = host_table(bed)
    bed.guests[name].machine.call(overwrite_table)
    for words in (host_table(bed), *(guest.machine.call(read_table) for guest in bed.guests.values())):
        assert words[:8] == before[:8]
        assert words[HEADER_BYTES:] == before[HEADER_BYTES:]
