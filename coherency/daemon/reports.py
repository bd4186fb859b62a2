"""What a status says of one guest.  Pure."""

from __future__ import annotations

from coherency.daemon.ledger import GuestBooks
from coherency.daemon.peer_states import Peer
from coherency.protocol import GuestReport, Statistics

_NO_COUNTERS = Statistics(0, 0, 0, 0, 0, 0)


def guest_report(peer: Peer, books: GuestBooks | None, *, answered: bool, now_ns: int) -> GuestReport:
    """`books`: what the ledger has of it, None if it is granted nothing; `answered`: its counters are from now."""
    assert peer.snapshot is not None, peer
    guest, counters = peer.snapshot, peer.snapshot.statistics or _NO_COUNTERS
    known = books or GuestBooks(0, 0, 0, now_ns)
    return GuestReport(
        guest_id=guest.guest_id,
        name=guest.name,
        pid=guest.pid,
        mode=guest.mode,
        connected_for_ns=now_ns - guest.connected_at_ns,
        answered=answered,
        hits=counters.hits,
        misses=counters.misses,
        refreshes=counters.refreshes,
        lower_requests=counters.lower_requests,
        entries=counters.entries,
        keys=known.keys,
        recalls=known.recalls,
        unacked=known.unacked,
        lease_left_ns=max(0, known.lease_until_ns - now_ns),
        line=guest.line,
    )
