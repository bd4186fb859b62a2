"""What the kernel tells of a watched file system, from bytes."""

import struct

import pytest

from coherency.daemon import fanotify_events as fan
from coherency.daemon.fanotify import BUFFER_BYTES
from coherency.daemon.fanotify_events import HostEvent, Numbered, can_be_read, events_of_others, numbered
from coherency.leases import MAX_KEYS_PER_MESSAGE
from tests.host_events import FID, FSID, OTHER_PID, PLACE, event, ino32, of_inode, of_name, of_rename, record

OWN_PID = 7


def parsed(buffer: bytes) -> list[HostEvent]:
    return list(events_of_others(buffer, OWN_PID))


def test_an_event_about_a_name() -> None:
    (found,) = parsed(of_name(fan.CREATE, 5, 2, b"file"))
    assert found == HostEvent(fan.CREATE, FSID, ino32(5), ino32(2), b"file", pid=OTHER_PID)


def test_an_event_without_a_name() -> None:
    (found,) = parsed(of_inode(fan.ATTRIB | fan.DELETE_SELF, 5))
    assert found == HostEvent(fan.ATTRIB | fan.DELETE_SELF, FSID, ino32(5), pid=OTHER_PID)


def test_a_directory_itself_is_no_entry_of_itself() -> None:
    (found,) = parsed(event(fan.ATTRIB | fan.ONDIR, record(PLACE, ino32(5), b".")))
    assert found == HostEvent(fan.ATTRIB | fan.ONDIR, FSID, ino32(5), pid=OTHER_PID)


def test_a_rename_has_two_places() -> None:
    (found,) = parsed(of_rename(fan.RENAME, 5, (2, b"old"), (3, b"a much longer new name")))
    assert found == HostEvent(fan.RENAME, FSID, ino32(5), ino32(2), b"old", ino32(3), b"a much longer new name", OTHER_PID)


@pytest.mark.parametrize("name", [b"x" * length for length in range(1, 9)] + [b"\xff" * 255, b"..a", b".a"])
def test_names_are_cut_where_they_end(name: bytes) -> None:
    assert parsed(of_name(fan.DELETE, 5, 2, name) * 2) == [HostEvent(fan.DELETE, FSID, ino32(5), ino32(2), name, pid=OTHER_PID)] * 2


def test_ones_own_events_are_skipped() -> None:
    own, other = of_inode(fan.MODIFY, 1, pid=OWN_PID), of_inode(fan.MODIFY, 2)
    assert [found.target for found in parsed(own + other + own + other)] == [ino32(2)] * 2
    assert OTHER_PID != OWN_PID


def test_a_queue_that_ran_over_is_told_whoever_filled_it() -> None:
    assert parsed(event(fan.Q_OVERFLOW, pid=0)) == [HostEvent(fan.Q_OVERFLOW, 0, None)]
    assert parsed(event(fan.Q_OVERFLOW, pid=OWN_PID)) != []


def test_what_is_new_in_a_later_kernel_is_passed_over() -> None:
    (found,) = parsed(event(fan.CREATE, record(77, b"something else"), record(FID, ino32(5))))
    assert found.target == ino32(5)


@pytest.mark.parametrize("buffer", [event(fan.CREATE, version=4), struct.pack("=IBBHQii", 8, 3, 0, 24, 0, -1, 1)])
def test_another_version_is_refused(buffer: bytes) -> None:
    with pytest.raises(ValueError, match="version"):
        parsed(buffer)


def test_one_read_has_fewer_keys_than_a_recall_may_name() -> None:
    """Each inode has a key, and a second one if it may have lost a name."""
    smallest = {
        of_inode(fan.ATTRIB, 1): 2,
        of_name(fan.DELETE, 1, 2, b"x"): 3,
        of_rename(fan.RENAME, 1, (2, b"x"), (3, b"y")): 4,
    }
    assert max(BUFFER_BYTES // len(each) * keys for each, keys in smallest.items()) <= MAX_KEYS_PER_MESSAGE


# --- numbers --------------------------------------------------------------------------------------------------------

INO = 0x0000_0123_89AB_CDEF


@pytest.mark.parametrize(
    ("handle", "expected"),
    [
        (struct.pack("=IiII", 8, 1, 12, 34), Numbered(12)),
        (struct.pack("=IiIQ", 12, 1, 34, INO), Numbered(INO)),
        (struct.pack("=IiQI", 12, 0x81, INO, 34), Numbered(INO)),
        (struct.pack("=IiQQI", 20, 0x4D, INO, 256, 34), Numbered(INO, 256)),
        (struct.pack("=Ii28s", 28, 0xF8, b""), None),
        (struct.pack("=IiQQ", 16, 1, 1, 2), None),
    ],
    ids=["ext4", "tmpfs", "xfs", "btrfs", "overlay", "with-parent"],
)
def test_the_number_in_a_handle(handle: bytes, expected: Numbered | None) -> None:
    assert numbered(handle) == expected


def test_handles_that_look_alike_and_are_not_are_not_read() -> None:
    fuse = struct.pack("=IiIII", 12, 0x81, 0, 1, 0)  # node id 1, high half first
    assert numbered(fuse) is not None
    assert not can_be_read(fuse, 1)
    assert can_be_read(ino32(12), 12)
