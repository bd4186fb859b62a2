"""As whose inodes were shown: exact up to its bounds, and never one too few beyond them."""

from hypothesis import given
from hypothesis import strategies as st

from coherency.daemon.owners import Owner, Owners
from coherency.ids import HostInode

INODES = st.one_of(st.integers(0, 600), st.integers(0, 2**64 - 1)).map(HostInode)
OWNERS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(st.lists(st.tuples(INODES, OWNERS)), st.lists(st.tuples(INODES, OWNERS)))
def test_it_is_exact(told: list[tuple[HostInode, Owner]], asked: list[tuple[HostInode, Owner]]) -> None:
    owners = Owners()
    for ino, owner in told:
        owners.tell(ino, owner)
    for ino, owner in [*told, *asked]:
        others = {each for known, each in told if known == ino} - {owner}
        assert owners.another_was_told(ino, owner) == bool(others)


def test_beyond_its_bound_everybody_may_have_been_told_of() -> None:
    owners = Owners(max_owners=2)
    for uid in (0, 1):
        owners.tell(HostInode(5 + uid), (uid, 0))
    assert not owners.another_was_told(HostInode(5), (0, 0))
    owners.tell(HostInode(7), (2, 0))
    assert owners.another_was_told(HostInode(5), (0, 0))
