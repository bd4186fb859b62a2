"""`coherency.fuse.abi` says what the kernel's header says."""

import re
import struct
from collections.abc import Iterator

import pytest

from coherency.fuse import abi, codec
from coherency.fuse.passthrough import Passthrough
from tests.fuse_header import HEADER, NEWER, Field, header, parse

# abi leaves out what follows these structs in the header's: it is appended by whoever encodes.
WITHOUT = {"entry_out": "attr", "attr_out": "attr", "statx_out": "stat"}
# Layouts of abi that are the beginning of a struct: of an older version of it, or all that matters of it.
BEGINNINGS = {"init_in": "init_in", "setxattr_in_compat": "setxattr_in"}
FILLERS = re.compile(r"(unused|spare|padding|reserved)\w*(\[\d+\])?$|st\.(spare|padding)")

# Each is decoded and carried out; everything else is answered with ENOSYS.
SUPPORTED = """
    LOOKUP FORGET BATCH_FORGET GETATTR STATX SETATTR READLINK SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME RENAME2 LINK OPEN CREATE
    TMPFILE READ WRITE FLUSH RELEASE FSYNC FSYNCDIR STATFS SETXATTR GETXATTR LISTXATTR REMOVEXATTR OPENDIR READDIR
    READDIRPLUS RELEASEDIR GETLK SETLK SETLKW ACCESS INTERRUPT FALLOCATE LSEEK COPY_FILE_RANGE SYNCFS DESTROY INIT
"""


def structs() -> dict[str, struct.Struct]:
    return {name: value for name, value in vars(abi).items() if isinstance(value, struct.Struct)}


def fields_of(layout: struct.Struct) -> Iterator[tuple[int, int, bool]]:
    """Offset, size and sign of each integer of a `struct.Struct` (standard sizes, no alignment)."""
    assert layout.format[0] == "="
    offset = 0
    for count, code in re.findall(r"(\d*)(\w)", layout.format[1:]):
        size = struct.calcsize("=" + code)
        for _ in range(int(count or 1)):
            if code != "x":
                yield offset, size, code.islower()
            offset += size


# --- numbers ---


@pytest.mark.parametrize("opcode", abi.Opcode, ids=lambda opcode: opcode.name)
def test_opcode(opcode: abi.Opcode) -> None:
    assert header().numbers[f"FUSE_{opcode.name}"] == opcode


def test_opcodes_are_the_supported_ones() -> None:
    assert {opcode.name for opcode in abi.Opcode} == set(SUPPORTED.split())


@pytest.mark.parametrize("code", abi.Notify, ids=lambda code: code.name)
def test_notification(code: abi.Notify) -> None:
    assert header().numbers[f"FUSE_NOTIFY_{code.name}"] == code


@pytest.mark.parametrize("flag", abi.InitFlag, ids=lambda flag: flag.name)
def test_init_flag(flag: abi.InitFlag) -> None:
    assert header().numbers[f"FUSE_{flag.name}"] == flag


def setattr_bits() -> dict[str, int]:
    return {name: value for name, value in vars(abi.SetattrValid).items() if name.isupper()}


def test_setattr_bits() -> None:
    ours = {f"FATTR_{name}": value for name, value in setattr_bits().items()}
    assert ours == {name: value for name, value in header().numbers.items() if name.startswith("FATTR_")}


def plain_constants() -> dict[str, int]:
    return {name: value for name, value in vars(abi).items() if name.isupper() and isinstance(value, int)}


@pytest.mark.parametrize("name", sorted(plain_constants().keys() - {"KERNEL_MINOR_VERSION", "OLDEST_MINOR_VERSION"}))
def test_constant(name: str) -> None:
    theirs = {"MIN_READ_BUFFER_BYTES": "FUSE_MIN_READ_BUFFER"}.get(name, name)
    numbers = header().numbers
    assert plain_constants()[name] == numbers[theirs if theirs in numbers else f"FUSE_{theirs}"]


def test_versions() -> None:
    newest = max(int(minor) for minor in re.findall(r"/\* 7\.(\d+) \*/", NEWER))
    assert newest == abi.KERNEL_MINOR_VERSION
    assert header().numbers["FUSE_KERNEL_MINOR_VERSION"] > abi.OLDEST_MINOR_VERSION


# --- layouts ---


@pytest.mark.parametrize("name", sorted(structs().keys() - {"linux_dirent64"}))
def test_layout(name: str) -> None:
    ours = structs()[name]
    theirs = header().layouts[BEGINNINGS.get(name, name.removesuffix("_ext"))]
    fields: list[Field] = list(theirs.fields)
    size = theirs.size
    if rest := WITHOUT.get(name):
        fields = [field for field in fields if not field.name.startswith(f"{rest}.")]
        size = fields[-1].offset + fields[-1].size
    if name in BEGINNINGS:
        fields = [field for field in fields if field.offset < ours.size]
        size = ours.size

    assert ours.size == size
    by_place = {(field.offset, field.size, field.signed): field.name for field in fields}
    covered = {by_place[place] for place in fields_of(ours)}  # a KeyError here: wrong offset, size or sign
    left_out = {field.name for field in fields} - covered
    assert all(FILLERS.match(name) for name in left_out), left_out


def test_dirent_of_the_system_call() -> None:
    # getdents64(2): d_ino, d_off, d_reclen, d_type, then the name.
    assert list(fields_of(abi.linux_dirent64)) == [(0, 8, False), (8, 8, True), (16, 2, False), (18, 1, False)]


def test_what_follows_a_shortened_struct_is_what_the_encoder_appends() -> None:
    layouts = header().layouts
    assert abi.entry_out.size + abi.attr.size == layouts["entry_out"].size
    assert abi.attr_out.size + abi.attr.size == layouts["attr_out"].size
    assert abi.statx_out.size + layouts["statx"].size == layouts["statx_out"].size == 32 + 256


# --- operations ---


def test_every_operation_is_decoded_and_carried_out() -> None:
    by_session = {abi.Opcode.INIT, abi.Opcode.INTERRUPT}
    operations = Passthrough.operations.fget  # type: ignore[attr-defined]
    carried_out = operations(type("AnyPassthrough", (), {name: name for name in dir(Passthrough)}))
    assert set(carried_out) == set(abi.Opcode) - by_session
    assert set(codec._BODIES) | {abi.Opcode.FORGET} == set(abi.Opcode)


# --- negative controls: a comparison that cannot fail compares nothing ---


def test_parser_notices_another_layout() -> None:
    source = re.sub(r"uint32_t\s+umask;", "uint64_t umask;", HEADER.read_text(), count=1)  # of fuse_mknod_in
    assert parse(source).layouts["mknod_in"] != header().layouts["mknod_in"]
    assert parse(source).layouts["mkdir_in"] == header().layouts["mkdir_in"]


def test_parser_aligns_and_nests_as_a_compiler_does() -> None:
    layouts = parse(
        "struct fuse_in { uint64_t a; uint16_t b; };\nstruct fuse_out { uint32_t c; struct fuse_in d[2]; char e[]; };\n"
    ).layouts
    assert layouts["in"].size == 16
    assert [(field.name, field.offset) for field in layouts["out"].fields] == [
        ("c", 0), ("d[0].a", 8), ("d[0].b", 16), ("d[1].a", 24), ("d[1].b", 32),
    ]  # fmt: skip
