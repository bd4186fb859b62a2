"""Where it is told what has happened in the share: by the export, and by whoever watches the share itself."""

from __future__ import annotations

from coherency.daemon.server import ControlServer
from coherency.events import Event


class Events:
    """Tells guests that want to know.  Thread-safe."""

    def __init__(self, server: ControlServer) -> None:
        self._server = server
        self._subscribers = server.subscribers

    @property
    def wanted(self) -> bool:
        """Whether anybody wants to know: cheap, and worth asking before an event is made.  Takes no lock."""
        return bool(self._subscribers)

    def tell(self, *events: Event, origin: int | None = None, lost: int = 0) -> None:
        """It has happened, in this order, and every cache that it made wrong has been dealt with.  Waits for nobody.

        `origin` is the session of the guest whose doing it was, None if it was no guest's.  `lost`: so many more have happened
        at least, and nobody knows which.
        """
        if (events or lost) and self._subscribers:
            self._server.tell(events, origin, lost=lost)
