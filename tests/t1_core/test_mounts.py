"""Reading the kernel's list of mounts."""

from pathlib import Path

from tests.mounts import Mount, parse_mountinfo


def test_type_is_found_behind_any_number_of_optional_fields() -> None:
    text = (
        b"22 1 0:20 / / rw shared:1 - ext4 /dev/vda rw\n"
        b"90 22 0:50 / /tmp/a rw,nosuid - fuse.coherency-export coherency rw,user_id=0\n"
        b"91 22 0:51 / /tmp/b rw shared:3 master:2 - tmpfs tmpfs rw\n"
    )
    assert parse_mountinfo(text) == [
        Mount(Path("/"), "ext4"),
        Mount(Path("/tmp/a"), "fuse.coherency-export"),
        Mount(Path("/tmp/b"), "tmpfs"),
    ]


def test_escaped_and_undecodable_names_come_back() -> None:
    (mount,) = parse_mountinfo(rb"90 22 0:50 / /tmp/a\040b\134c\012d" + b"\xff rw - fuse.coherency x rw\n")
    assert mount.mountpoint == Path("/tmp/a b\\c\nd\udcff")
