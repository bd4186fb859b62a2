"""What the switchboard wants done: it decides, `server` does it."""

from __future__ import annotations

from typing import NamedTuple

from coherency.daemon.peer_states import PeerId


class Send(NamedTuple):
    """Send `frame`.  If `joined` is not empty this is a Welcome: log who joined.  The table's descriptor goes along if asked for."""

    peer: PeerId
    frame: bytes
    joined: str = ""
    with_table: bool = False


class Drop(NamedTuple):
    """Close the connection.  Send `farewell` if that needs no waiting; log `reason`, as a warning unless `orderly`."""

    peer: PeerId
    who: str
    reason: str
    orderly: bool
    was_guest: bool
    farewell: bytes = b""
    error: Exception | None = None


class Note(NamedTuple):
    """Log that something happened to a guest that is none any more."""

    who: str
    what: str


Action = Send | Drop | Note
