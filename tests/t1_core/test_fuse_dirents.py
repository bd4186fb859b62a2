"""Directory records of the system call, and of the two FUSE replies that they become."""

from hypothesis import assume, given
from hypothesis import strategies as st

from coherency.fuse import abi, replies
from coherency.fuse.replies import DirectoryEntry
from tests.fuse_header import header

PAGE_BYTES = 4096  # the kernel asks for no less

names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name and b"/" not in name)
entries = st.builds(
    DirectoryEntry, st.integers(0, (1 << 64) - 1), st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 15), names
)


def dirent64(entry: DirectoryEntry) -> bytes:
    """A record as getdents64(2) writes it: terminated by a zero byte, padded to eight bytes."""
    head = abi.linux_dirent64
    length = head.size + len(entry.name) + 1
    length += -length % 8
    return (head.pack(entry.ino, entry.offset, length, entry.kind) + entry.name).ljust(length, b"\0")


def filled(size_bytes: int, listing: list[DirectoryEntry]) -> list[DirectoryEntry]:
    """What getdents64(2) returns of the directory into a buffer of this size."""
    taken = []
    for entry in listing:
        size_bytes -= len(dirent64(entry))
        if size_bytes < 0:
            break
        taken.append(entry)
    return taken


def encoded_plus(entry: DirectoryEntry) -> bytes:
    return bytes(abi.entry_out.size + abi.attr.size) + replies.encode_dirent(entry)


@given(st.lists(entries, max_size=20))
def test_records_come_back(listing: list[DirectoryEntry]) -> None:
    assert replies.parse_dirents(b"".join(map(dirent64, listing))) == listing


@given(entries)
def test_dirent(entry: DirectoryEntry) -> None:
    data = replies.encode_dirent(entry)
    layout = header().layouts["dirent"]
    assert layout.unpack(data) == {
        "ino": entry.ino, "off": entry.offset % (1 << 64), "namelen": len(entry.name), "type": entry.kind,
    }  # fmt: skip
    assert data[layout.size :].rstrip(b"\0") == entry.name.rstrip(b"\0")
    assert len(data) % 8 == 0


# --- what was read must fit into the reply: there is no putting back ---


@given(st.integers(PAGE_BYTES, 3 * PAGE_BYTES), st.lists(entries, min_size=1, max_size=200))
def test_readdir_never_overflows(size_bytes: int, listing: list[DirectoryEntry]) -> None:
    taken = filled(replies.dirents_that_fit(size_bytes), listing)
    assert taken, "an empty reply would end the directory"
    assert sum(len(replies.encode_dirent(entry)) for entry in taken) <= size_bytes


@given(st.integers(PAGE_BYTES, 3 * PAGE_BYTES), st.lists(entries, min_size=1, max_size=100))
def test_readdirplus_never_overflows(size_bytes: int, listing: list[DirectoryEntry]) -> None:
    taken = filled(replies.dirents_that_fit_plus(size_bytes), listing)
    assert taken, "an empty reply would end the directory"
    assert sum(len(encoded_plus(entry)) for entry in taken) <= size_bytes


@given(st.integers(PAGE_BYTES, 1 << 20), st.integers(1, 255))
def test_neither_does_with_names_of_one_length(size_bytes: int, length: int) -> None:
    entry = DirectoryEntry(1, 1, 0, b"n" * length)
    record = len(dirent64(entry))
    assert replies.dirents_that_fit(size_bytes) // record * len(replies.encode_dirent(entry)) <= size_bytes
    assert replies.dirents_that_fit_plus(size_bytes) // record * len(encoded_plus(entry)) <= size_bytes


@given(st.integers(PAGE_BYTES, 1 << 20), st.integers(1, 255))
def test_a_bound_of_everything_would_overflow(size_bytes: int, length: int) -> None:
    """Negative control: short names do grow."""
    entry = DirectoryEntry(1, 1, 0, b"n" * length)
    assume(len(dirent64(entry)) < len(replies.encode_dirent(entry)))
    assert size_bytes // len(dirent64(entry)) * len(encoded_plus(entry)) > size_bytes
