"""Bytes to requests: every kind, every truncation, and the names that may not come through."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coherency.errors import FuseProtocolError
from coherency.fuse import codec
from coherency.fuse.abi import InitFlag, Opcode
from coherency.ids import NodeId
from tests.fuse_messages import GID, NODE, PID, UID, UNIQUE, body, forget_one, message, request

BIG = (1 << 64) - 2  # does not fit into a signed word
NAME = b"n\xe4me \xff\n"

SETATTR: dict[str, Any] = {
    "valid": 0x7F, "fh": 7, "size": BIG, "lock_owner": 1, "atime": 2, "mtime": BIG, "ctime": 4, "atimensec": 5,
    "mtimensec": 6, "ctimensec": 8, "mode": 0o644, "uid": 9, "gid": 10,
}  # fmt: skip
SETATTR_BODY: dict[str, Any] = {
    "valid": 0x7F, "fh": 7, "size": BIG, "atime": (2, 5), "mtime": (-2, 6), "mode": 0o644, "uid": 9, "gid": 10,
}  # fmt: skip

LOCK: dict[str, Any] = {"fh": 1, "owner": 2, "lk.start": 3, "lk.end": BIG, "lk.type": 4, "lk.pid": 5, "lk_flags": 6}

# Request, and what its body must be. A second message of a kind is another form of it.
EXAMPLES: list[tuple[str, bytes, Any]] = [
    ("LOOKUP", request("LOOKUP", NAME + b"\0"), codec.Name(NAME)),
    ("FORGET", request("FORGET", nlookup=BIG), codec.Forget(((NodeId(NODE), BIG),))),
    (
        "BATCH_FORGET",
        request("BATCH_FORGET", forget_one(5, 1) + forget_one(BIG, 3), count=2),
        codec.Forget(((NodeId(5), 1), (NodeId(BIG), 3))),
    ),
    ("BATCH_FORGET", request("BATCH_FORGET", count=0), codec.Forget(())),
    ("GETATTR", request("GETATTR", getattr_flags=1, fh=BIG), codec.Getattr(1, BIG)),
    ("STATX", request("STATX", getattr_flags=1, fh=7, sx_flags=2, sx_mask=0xFFF), codec.Statx(1, 7, 2, 0xFFF)),
    ("SETATTR", request("SETATTR", **SETATTR), codec.Setattr(**SETATTR_BODY)),
    ("READLINK", request("READLINK"), codec.Empty()),
    ("SYMLINK", request("SYMLINK", b"name\0../any/where\0"), codec.Symlink(b"name", b"../any/where")),
    ("MKNOD", request("MKNOD", NAME + b"\0", mode=1, rdev=2, umask=3), codec.Mknod(NAME, 1, 2, 3)),
    ("MKDIR", request("MKDIR", NAME + b"\0", mode=1, umask=3), codec.Mkdir(NAME, 1, 3)),
    ("UNLINK", request("UNLINK", NAME + b"\0"), codec.Name(NAME)),
    ("RMDIR", request("RMDIR", NAME + b"\0"), codec.Name(NAME)),
    ("RENAME", request("RENAME", b"a\0b\0", newdir=BIG), codec.Rename(NodeId(BIG), 0, b"a", b"b")),
    ("RENAME2", request("RENAME2", b"a\0b\0", newdir=6, flags=5), codec.Rename(NodeId(6), 5, b"a", b"b")),
    ("LINK", request("LINK", NAME + b"\0", oldnodeid=6), codec.Link(NodeId(6), NAME)),
    ("OPEN", request("OPEN", flags=1, open_flags=2), codec.Open(1, 2)),
    ("OPENDIR", request("OPENDIR", flags=1, open_flags=2), codec.Open(1, 2)),
    (
        "CREATE",
        request("CREATE", NAME + b"\0", flags=1, mode=2, umask=3, open_flags=4),
        codec.Create(NAME, 1, 2, 3, 4),
    ),
    ("TMPFILE", request("TMPFILE", b"/\0", flags=1, mode=2, umask=3, open_flags=4), codec.Create(b"", 1, 2, 3, 4)),
    ("READ", request("READ", fh=1, offset=BIG, size=3, read_flags=4, lock_owner=5, flags=6), codec.Read(1, BIG, 3)),
    ("READDIR", request("READDIR", fh=1, offset=BIG, size=3), codec.Read(1, BIG, 3)),
    ("READDIRPLUS", request("READDIRPLUS", fh=1, offset=2, size=3), codec.Read(1, 2, 3)),
    (
        "WRITE",
        request("WRITE", b"data", fh=1, offset=2, size=4, write_flags=5, lock_owner=6, flags=7),
        codec.Write(1, 2, 5, memoryview(b"data"), 7),
    ),
    ("FLUSH", request("FLUSH", fh=1, lock_owner=2), codec.Flush(1, 2)),
    ("RELEASE", request("RELEASE", fh=1, flags=2, release_flags=3, lock_owner=4), codec.Handle(1)),
    ("RELEASEDIR", request("RELEASEDIR", fh=BIG), codec.Handle(BIG)),
    ("FSYNC", request("FSYNC", fh=1, fsync_flags=0), codec.Fsync(1, False)),
    ("FSYNC", request("FSYNC", fh=1, fsync_flags=1), codec.Fsync(1, True)),
    ("FSYNCDIR", request("FSYNCDIR", fh=1, fsync_flags=1), codec.Fsync(1, True)),
    ("STATFS", request("STATFS"), codec.Empty()),
    (
        "SETXATTR",
        message("SETXATTR", body("SETXATTR", size=3, flags=2)[:8] + b"user.a\0v\0l"),
        codec.Setxattr(b"user.a", b"v\0l", 2, 0),
    ),
    ("GETXATTR", request("GETXATTR", b"user.a\0", size=9), codec.Getxattr(b"user.a", 9)),
    ("LISTXATTR", request("LISTXATTR", size=9), codec.Getxattr(b"", 9)),
    ("REMOVEXATTR", request("REMOVEXATTR", b"user./\0"), codec.Name(b"user./")),
    *((kind, request(kind, **LOCK), codec.Lock(1, 2, 3, BIG, 4, 5, 6)) for kind in ("GETLK", "SETLK", "SETLKW")),
    ("ACCESS", request("ACCESS", mask=6), codec.Access(6)),
    ("INTERRUPT", message("INTERRUPT", body("INTERRUPT", unique=BIG)), codec.Interrupt(BIG)),
    ("FALLOCATE", request("FALLOCATE", fh=1, offset=2, length=3, mode=4), codec.Fallocate(1, 2, 3, 4)),
    ("LSEEK", request("LSEEK", fh=1, offset=2, whence=3), codec.Lseek(1, 2, 3)),
    ("LSEEK", request("LSEEK", fh=1, offset=BIG, whence=3), codec.Lseek(1, -2, 3)),
    (
        "COPY_FILE_RANGE",
        request("COPY_FILE_RANGE", fh_in=1, off_in=2, nodeid_out=3, fh_out=4, off_out=5, len=6, flags=7),
        codec.CopyFileRange(1, 2, NodeId(3), 4, 5, 6),
    ),
    ("SYNCFS", request("SYNCFS"), codec.Empty()),
    ("DESTROY", request("DESTROY"), codec.Empty()),
    ("INIT", message("INIT", body("INIT", major=7, minor=31, max_readahead=3, flags=5)[:16]), codec.Init(7, 31, 3, 5)),
]  # fmt: skip
IDS = [f"{kind}-{index}" for index, (kind, _, _) in enumerate(EXAMPLES)]


def decode(data: bytes, *, setxattr_ext: bool = False) -> codec.Request:
    return codec.decode(memoryview(data), setxattr_ext=setxattr_ext)


def test_there_is_an_example_of_every_kind() -> None:
    assert {kind for kind, _, _ in EXAMPLES} == {opcode.name for opcode in Opcode}


@pytest.mark.parametrize(("kind", "data", "expected"), EXAMPLES, ids=IDS)
def test_decodes(kind: str, data: bytes, expected: Any) -> None:
    decoded = decode(data)
    assert (decoded.unique, decoded.node) == (UNIQUE, NODE)
    assert (decoded.uid, decoded.gid, decoded.pid) == (UID, GID, PID)
    assert decoded.opcode == Opcode[kind]
    assert not decoded.interrupted
    assert decoded.on_interrupt is None
    assert decoded.body == expected


def test_data_of_a_write_is_a_view_of_the_message() -> None:
    buffer = bytearray(request("WRITE", b"data", fh=1, offset=2, size=4, write_flags=5))
    write = codec.decode(memoryview(buffer)).body
    assert (write.fh, write.offset, write.write_flags, bytes(write.data)) == (1, 2, 5, b"data")
    buffer[-4:] = b"next"
    assert bytes(write.data) == b"next"


def test_setxattr_in_its_extended_form() -> None:
    data = request("SETXATTR", b"user.a\0val", size=3, flags=2, setxattr_flags=1)
    assert decode(data, setxattr_ext=True).body == codec.Setxattr(b"user.a", b"val", 2, 1)


def test_flags_of_init_beyond_32_bits() -> None:
    extended = decode(request("INIT", flags=int(InitFlag.INIT_EXT), flags2=1 << 3)).body
    assert extended.flags == InitFlag.INIT_EXT | InitFlag.HAS_EXPIRE_ONLY
    plain = decode(request("INIT", flags=0, flags2=1 << 3)).body
    assert plain.flags == 0


def test_what_is_unknown_has_no_body() -> None:
    decoded = decode(message(53, b"anything"))
    assert (decoded.opcode, decoded.body, decoded.unique) == (53, None, UNIQUE)


# --- damage ---


def shortened(data: bytes, length: int) -> bytes:
    """The first bytes of a message, whose header admits to be so short."""
    return length.to_bytes(4, "little") + data[4:length]


@pytest.mark.parametrize(("kind", "data", "expected"), EXAMPLES, ids=IDS)
@pytest.mark.parametrize("honest", [False, True], ids=["header-lies", "header-agrees"])
def test_truncated_anywhere(kind: str, data: bytes, expected: Any, honest: bool) -> None:
    whole = decode(data).body
    for length in range(len(data)):
        cut = shortened(data, length) if honest and length >= 4 else data[:length]
        try:
            got = decode(cut).body
        except FuseProtocolError:
            continue
        # Where only bytes without a meaning are gone, the request is the same.
        assert honest
        assert got == whole
        assert kind in ("TMPFILE", "SYNCFS")


def test_extended_setxattr_truncated_anywhere() -> None:
    data = request("SETXATTR", b"user.a\0val", size=3, flags=2, setxattr_flags=1)
    for length in range(4, len(data)):
        with pytest.raises(FuseProtocolError):
            decode(shortened(data, length), setxattr_ext=True)


def test_extensions_are_not_part_of_the_body() -> None:
    extended = message("LOOKUP", b"name\0", extension=b"12345678")
    assert decode(extended).body == codec.Name(b"name")
    too_long = bytearray(message("READLINK", b"", extension=b"12345678"))
    too_long[36:38] = (2).to_bytes(2, "little")
    with pytest.raises(FuseProtocolError):
        decode(bytes(too_long))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"/", b"a/b", b"/etc", b"../x", b"x/"])
def test_what_is_no_name(name: bytes) -> None:
    end = name + b"\0"
    requests = [
        request("LOOKUP", end), request("UNLINK", end), request("RMDIR", end), request("MKNOD", end), request("MKDIR", end),
        request("CREATE", end), request("LINK", end), request("SYMLINK", end + b"target\0"),
        request("RENAME", end + b"b\0"), request("RENAME", b"a\0" + end),
        request("RENAME2", end + b"b\0"), request("RENAME2", b"a\0" + end),
    ]  # fmt: skip
    for data in requests:
        with pytest.raises(FuseProtocolError, match="not a name"):
            decode(data)


def test_names_like_those_are_names() -> None:
    for name in (b"...", b"..a", b".a", b" ", b"\\", b"\xff" * 255):
        assert decode(request("LOOKUP", name + b"\0")).body.name == name


@pytest.mark.parametrize(
    "data",
    [
        request("WRITE", b"dat", size=4),
        request("BATCH_FORGET", forget_one(5, 1), count=2),
        request("BATCH_FORGET", count=(1 << 32) - 1),
        request("RENAME", b"a\0b"),
        request("SYMLINK", b"a\0b"),
        request("GETXATTR", b"user.a", size=1),
        request("REMOVEXATTR", b"user.a"),
    ],
)
def test_counts_and_strings_must_be_there(data: bytes) -> None:
    with pytest.raises(FuseProtocolError):
        decode(data)


@given(st.binary(max_size=200), st.sampled_from([*Opcode, 53, 4096]), st.booleans())
def test_no_bytes_raise_anything_else(payload: bytes, opcode: int, setxattr_ext: bool) -> None:
    try:
        codec.decode(memoryview(message(opcode, payload)), setxattr_ext=setxattr_ext)
    except FuseProtocolError:
        pass


@given(st.binary(max_size=100))
def test_nor_do_bytes_without_a_sound_header(data: bytes) -> None:
    with pytest.raises(FuseProtocolError):
        decode(data)


def test_unique_of_what_cannot_be_decoded() -> None:
    assert codec.unique_of(memoryview(request("LOOKUP", b"..\0"))) == UNIQUE
    assert codec.unique_of(memoryview(request("LOOKUP", b"..\0"))[:39]) is None
