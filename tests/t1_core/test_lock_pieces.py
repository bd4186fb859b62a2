"""What an owner has locked, piece by piece, against a byte-by-byte account of it."""

import fcntl
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coherency.fuse.locks import OFFSET_MAX, Piece, Pieces

BYTES = 24
KINDS = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    start = draw(st.integers(0, BYTES - 1))
    end = draw(st.one_of(st.integers(start, BYTES - 1), st.just(OFFSET_MAX)))
    return Piece(start, end, draw(st.sampled_from(KINDS)), draw(st.integers(1, 2)), 7)


@given(st.lists(pieces(), max_size=12))
def test_every_byte_is_locked_as_it_was_last_said(sequence: list[Piece]) -> None:
    ours, last = Pieces(), dict[int, Piece]()
    for piece in sequence:
        ours.put(piece)
        for offset in range(piece.start, min(piece.end, BYTES) + 1):
            last[offset] = piece
    for offset in range(BYTES + 1):
        expected, found = last.get(offset), ours.at(offset)
        if expected is None or expected.kind == fcntl.F_UNLCK:
            assert found is None
        else:
            assert found is not None
            assert found.start <= offset <= found.end
            assert found.is_like(expected)
    for one, other in pairwise(ours):
        assert one.end < other.start
        assert one.end + 1 < other.start or not one.is_like(other), "two pieces that are one"


def test_neighbours_become_one_piece() -> None:
    """However many bytes a program locks one by one."""
    ours = Pieces()
    for offset in [*range(0, 1000, 2), *range(1, 1000, 2)]:
        ours.put(Piece(offset, offset, fcntl.F_WRLCK, 1, 7))
    assert list(ours) == [Piece(0, 999, fcntl.F_WRLCK, 1, 7)]
    ours.put(Piece(0, OFFSET_MAX, fcntl.F_UNLCK, 2, 7))
    assert list(ours) == []
