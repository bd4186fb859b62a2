"""Replies and notifications to bytes, read back by the field names of the kernel's header."""

import os
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coherency.fuse import replies
from coherency.ids import HostInode, NodeId
from tests.fuse_header import header

INO = HostInode((1 << 64) - 3)
NODE = NodeId((1 << 64) - 2)
U32, U64 = (1 << 32) - 1, (1 << 64) - 1


class Status(NamedTuple):
    """What `encode_attr` reads of an `os.stat_result`, which cannot be made with nanoseconds."""

    st_size: int = 1
    st_blocks: int = 2
    st_atime_ns: int = 3
    st_mtime_ns: int = 4
    st_ctime_ns: int = 5
    st_mode: int = 0o100644
    st_nlink: int = 7
    st_uid: int = 8
    st_gid: int = 9
    st_rdev: int = 0
    st_blksize: int = 4096


def read(struct: str, data: bytes) -> dict[str, int]:
    layout = header().layouts[struct]
    assert len(data) == layout.size
    return layout.unpack(data)


def attr(**status: int) -> bytes:
    return replies.encode_attr(Status(**status), INO)  # type: ignore[arg-type]


# --- attributes ---


def test_the_owner_is_found_in_attributes_and_in_a_statx() -> None:
    assert replies.owner_of(attr(st_uid=1001, st_gid=1002)) == (1001, 1002)
    answered = header().layouts["statx_out"].pack(**{"stat.uid": 1001, "stat.gid": 1002})
    assert replies.owner_in_statx_out(answered) == (1001, 1002)


def test_every_field_of_attr() -> None:
    assert read("attr", attr()) == {
        "ino": INO, "size": 1, "blocks": 2, "atime": 0, "mtime": 0, "ctime": 0, "atimensec": 3, "mtimensec": 4,
        "ctimensec": 5, "mode": 0o100644, "nlink": 7, "uid": 8, "gid": 9, "rdev": 0, "blksize": 4096, "flags": 0,
    }  # fmt: skip


@given(st.integers(-(1 << 62), 1 << 62))
def test_times_before_and_after_1970(time_ns: int) -> None:
    fields = read("attr", attr(st_mtime_ns=time_ns))
    seconds = fields["mtime"] - (1 << 64) if fields["mtime"] >> 63 else fields["mtime"]  # the kernel's is signed
    assert 0 <= fields["mtimensec"] < 10**9
    assert seconds * 10**9 + fields["mtimensec"] == time_ns


def test_half_a_second_before_1970() -> None:
    fields = read("attr", attr(st_atime_ns=-500_000_000))
    assert (fields["atime"], fields["atimensec"]) == (U64, 500_000_000)


# The kernel has 12 bits of major and 20 of minor.
@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
def test_device_numbers_come_back(major: int, minor: int) -> None:
    device = os.makedev(major, minor)
    encoded = read("attr", attr(st_rdev=device))["rdev"]
    assert replies.decode_device(encoded) == device


@pytest.mark.parametrize(
    ("major", "minor", "encoded"), [(1, 3, 0x103), (8, 0, 0x800), (8, 256, 0x100800), (0xFFF, 0xFFFFF, U32)]
)
def test_device_number_as_new_encode_dev(major: int, minor: int, encoded: int) -> None:
    assert read("attr", attr(st_rdev=os.makedev(major, minor)))["rdev"] == encoded


def test_owners_of_32_bits() -> None:
    fields = read("attr", attr(st_uid=U32 - 1, st_gid=U32 - 1))
    assert (fields["uid"], fields["gid"]) == (U32 - 1, U32 - 1)


# --- entries, and for how long they may be believed ---


@pytest.mark.parametrize(
    ("time_ns", "seconds", "rest"),
    [(0, 0, 0), (1, 0, 1), (1_500_000_000, 1, 500_000_000), (replies.FOREVER_NS, 4611686018, 427387903)],
)
def test_timeouts(time_ns: int, seconds: int, rest: int) -> None:
    entry = read("entry_out", replies.encode_entry(NODE, attr(), entry_ns=time_ns))
    assert (entry["entry_valid"], entry["entry_valid_nsec"]) == (seconds, rest)
    assert (entry["attr_valid"], entry["attr_valid_nsec"]) == (0, 0)
    entry = read("entry_out", replies.encode_entry(NODE, attr(), attr_ns=time_ns))
    assert (entry["entry_valid"], entry["entry_valid_nsec"]) == (0, 0)
    assert (entry["attr_valid"], entry["attr_valid_nsec"]) == (seconds, rest)
    assert (entry["nodeid"], entry["generation"], entry["attr.ino"], entry["attr.mode"]) == (NODE, 0, INO, 0o100644)
    out = read("attr_out", replies.encode_attr_out(attr(), time_ns))
    assert (out["attr_valid"], out["attr_valid_nsec"], out["attr.ino"]) == (seconds, rest, INO)


def test_statx_keeps_what_the_kernel_said_but_the_number() -> None:
    layout = header().layouts["statx"]
    known = {field.name: index for index, field in enumerate(layout.fields) if "spare" not in field.name}
    told = layout.pack(**known)[:144] + b"\xee" * 112  # what a newer kernel tells beyond the fields that FUSE knows
    got = read("statx_out", replies.encode_statx_out(told, INO, 1_000_000_002))
    assert (got["attr_valid"], got["attr_valid_nsec"], got["flags"]) == (1, 2, 0)
    known["ino"] = INO
    assert {name: got[f"stat.{name}"] for name in known} == known
    assert all(got[f"stat.__spare2[{index}]"] == 0 for index in range(14))


# --- the small ones ---


def test_header_of_a_reply() -> None:
    assert read("out_header", replies.reply_header(U64, 5)) == {"len": 21, "error": 0, "unique": U64}
    assert read("out_header", replies.reply_header(7, 0, 2)) == {"len": 16, "error": -2, "unique": 7}


def test_init_out() -> None:
    data = replies.encode_init_out(
        38, 1 << 17, 1 << 35 | 1 << 30 | 1, max_write_bytes=1 << 20, max_pages=256, max_background=64
    )
    got = read("init_out", data)
    assert (got["major"], got["minor"], got["max_readahead"]) == (7, 38, 1 << 17)
    assert (got["flags"], got["flags2"]) == (1 << 30 | 1, 1 << 3)
    assert (got["max_background"], got["congestion_threshold"]) == (64, 48)
    assert (got["max_write"], got["time_gran"], got["max_pages"], got["map_alignment"]) == (1 << 20, 1, 256, 0)


def test_small_replies() -> None:
    assert read("open_out", replies.encode_open(U64, 3)) == {"fh": U64, "open_flags": 3, "padding": 0}
    assert read("write_out", replies.encode_written(U32)) == {"size": U32, "padding": 0}
    locked = read("lk_out", replies.encode_lock(1, 2, 3, U32))
    assert locked == {"lk.start": 1, "lk.end": 2, "lk.type": 3, "lk.pid": U32}
    assert read("getxattr_out", replies.encode_xattr_size(65536)) == {"size": 65536, "padding": 0}
    assert read("lseek_out", replies.encode_offset(1 << 40)) == {"offset": 1 << 40}


def test_statfs() -> None:
    status = os.statvfs("/")
    got = read("statfs_out", replies.encode_statfs(status))
    for theirs, ours in (
        ("blocks", "f_blocks"), ("bfree", "f_bfree"), ("bavail", "f_bavail"), ("files", "f_files"), ("ffree", "f_ffree"),
        ("bsize", "f_bsize"), ("namelen", "f_namemax"), ("frsize", "f_frsize"),
    ):  # fmt: skip
        assert got[f"st.{theirs}"] == getattr(status, ours)


def test_notifications() -> None:
    assert read("notify_inval_inode_out", replies.encode_inval_inode(NODE, -1, 0)) == {"ino": NODE, "off": -1, "len": 0}
    for expire_only in (False, True):
        data = replies.encode_inval_entry(NODE, b"n\xffme", expire_only=expire_only)
        fixed = header().layouts["notify_inval_entry_out"].size
        assert read("notify_inval_entry_out", data[:fixed]) == {"parent": NODE, "namelen": 4, "flags": int(expire_only)}
        assert data[fixed:] == b"n\xffme\0"
