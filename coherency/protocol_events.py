"""The messages by which guests learn what others do in the share: parts of `protocol`, which sends and receives them.

The normative text is `docs/spec/control.md`, section 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from coherency.events import Event
from coherency.protocol_fields import MAX_ITEMS, Happenings, Unsigned

MAX_EVENTS_PER_MESSAGE: Final = MAX_ITEMS


@dataclass(frozen=True, slots=True)
class Subscribe:
    """The guest wants to be told what others do, until its connection ends."""

    session: Annotated[int, Unsigned(64)]


@dataclass(frozen=True, slots=True)
class Happened:
    """What others have done, in the order in which it was done.  Before these events `lost` others could not be told."""

    lost: Annotated[int, Unsigned(64)]
    events: Annotated[tuple[Event, ...], Happenings(MAX_EVENTS_PER_MESSAGE)]
