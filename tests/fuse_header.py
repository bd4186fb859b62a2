"""Numbers and layouts of the FUSE protocol, read from the kernel's own header instead of from our code.

What is newer than the header of Debian 12 (7.38) stands in ``NEWER``, with the protocol version that brought it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

HEADER = Path("/usr/include/linux/fuse.h")
DEBIAN_PACKAGE = "linux-libc-dev"

# Source: include/uapi/linux/fuse.h of Linux 6.18, whose change log at the top names the versions.
NEWER = """
/* 7.39 */
enum { FUSE_STATX = 52, };
struct fuse_statx_in {
    uint32_t getattr_flags;
    uint32_t reserved;
    uint64_t fh;
    uint32_t sx_flags;
    uint32_t sx_mask;
};
struct fuse_sx_time {
    int64_t tv_sec;
    uint32_t tv_nsec;
    int32_t __reserved;
};
struct fuse_statx {
    uint32_t mask;
    uint32_t blksize;
    uint64_t attributes;
    uint32_t nlink;
    uint32_t uid;
    uint32_t gid;
    uint16_t mode;
    uint16_t __spare0[1];
    uint64_t ino;
    uint64_t size;
    uint64_t blocks;
    uint64_t attributes_mask;
    struct fuse_sx_time atime;
    struct fuse_sx_time btime;
    struct fuse_sx_time ctime;
    struct fuse_sx_time mtime;
    uint32_t rdev_major;
    uint32_t rdev_minor;
    uint32_t dev_major;
    uint32_t dev_minor;
    uint64_t __spare2[14];
};
struct fuse_statx_out {
    uint64_t attr_valid;
    uint32_t attr_valid_nsec;
    uint32_t flags;
    uint64_t spare[2];
    struct fuse_statx stat;
};
/* 7.40 */
enum { FUSE_NOTIFY_RESEND = 7, };
/* 7.44 */
enum { FUSE_NOTIFY_INC_EPOCH = 8, };
/* 7.45 */
enum { FUSE_COPY_FILE_RANGE_64 = 53, };
"""

_INTEGERS = {
    "uint64_t": (8, False), "int64_t": (8, True), "uint32_t": (4, False), "int32_t": (4, True), "uint16_t": (2, False),
    "char": (1, False),
}  # fmt: skip


class Field(NamedTuple):
    """One integer of a struct; of an array, one element."""

    name: str
    offset: int
    size: int
    signed: bool


class Layout(NamedTuple):
    size: int
    fields: tuple[Field, ...]

    def field(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    def pack(self, **values: int) -> bytes:
        """The struct with these fields set, and all others zero."""
        packed = bytearray(self.size)
        for name, value in values.items():
            field = self.field(name)
            end = field.offset + field.size
            packed[field.offset : end] = value.to_bytes(field.size, "little", signed=field.signed)
        return bytes(packed)

    def unpack(self, data: bytes) -> dict[str, int]:
        """All fields by name."""
        return {
            field.name: int.from_bytes(data[field.offset : field.offset + field.size], "little", signed=field.signed)
            for field in self.fields
        }


class Header(NamedTuple):
    numbers: dict[str, int]  # of #define and of enumerations
    layouts: dict[str, Layout]  # of structs, by their name without "fuse_"


@cache
def header() -> Header:
    """What the installed header says, and ``NEWER``."""
    assert HEADER.exists(), f"{HEADER} is missing: install the Debian package {DEBIAN_PACKAGE}"
    return parse(HEADER.read_text() + NEWER)


def parse(source: str) -> Header:
    """The constants and structs of C text as plain as this header's."""
    text = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    numbers = {}
    for name, value in re.findall(r"^#define\s+(\w+)[ \t]+([^\n]+)$", text, re.MULTILINE):
        if simple := re.fullmatch(r"\(?(\d+)(?:u?ll)?(?:\s*<<\s*(\d+))?\)?", value.strip(), re.IGNORECASE):
            numbers[name] = int(simple[1]) << int(simple[2] or 0)
    for body in re.findall(r"^enum\s*\w*\s*\{(.*?)\};", text, re.DOTALL | re.MULTILINE):
        for name, value in re.findall(r"(\w+)\s*=\s*(\d+)", body):
            numbers[name] = int(value)
    layouts: dict[str, Layout] = {}
    for name, body in re.findall(r"^struct\s+(\w+)\s*\{(.*?)\};", text, re.DOTALL | re.MULTILINE):
        layouts[name.removeprefix("fuse_")] = _layout(body, layouts)
    return Header(numbers, layouts)


def _layout(body: str, known: dict[str, Layout]) -> Layout:
    offset, alignment = 0, 1
    fields: list[Field] = []
    for struct, kind, name, array in re.findall(r"(struct\s+)?(\w+)\s+(\w+)(\[\d*\])?;", body):
        # A nested struct's own fields take the place of it, as "attr.ino".
        nested = known[kind.removeprefix("fuse_")] if struct else None
        inner = nested.fields if nested else (Field("", 0, *_INTEGERS[kind]),)
        step = nested.size if nested else inner[0].size
        align = max(field.size for field in inner)
        offset += -offset % align
        alignment = max(alignment, align)
        count = int(array[1:-1] or 0) if array else 1
        for index in range(count):
            label = f"{name}[{index}]" if array else name
            fields += [
                Field(f"{label}.{each.name}" if each.name else label, offset + each.offset, each.size, each.signed)
                for each in inner
            ]
            offset += step
    return Layout(offset + -offset % alignment, tuple(fields))
