"""Cuts a peer's stream into control messages.  Nothing here has ever seen a socket or a serial port.

The normative text is `docs/spec/control.md`, sections 2 and 9.  Rules:

1. A frame is looked at only when it is complete and its checksum is right.
2. Whatever bytes arrive, in whatever pieces, the outcome is messages or a `PeerError`, and the memory needed is bounded
   by one frame and one read.
3. On a connection of its own a stream that cannot be a sound frame any more is at fault, for good: it has no later point
   that could be trusted.
4. On a serial line, which agents use one after the other, a frame may have been cut off by the death of its sender.  There
   the next sound frame counts, wherever it begins, also inside one that is not complete; what lies before it is skipped.
5. Hunting is bounded: between two sound frames in bytes and in wrong checksums (`MAX_SKIPPED_BYTES`, `MAX_FALSE_STARTS`), at any
   time in frames that may have begun (`MAX_STARTS`).  None of it can be reached by what others have the daemon tell, such as names.
"""

from __future__ import annotations

import zlib
from typing import Final, NamedTuple

from coherency.errors import FrameError, PeerError
from coherency.protocol import HEADER, MAGIC, MAX_FRAME_BYTES, MAX_PAYLOAD_BYTES, Message, decode_payload

MAX_SKIPPED_BYTES: Final = 2 * MAX_FRAME_BYTES
MAX_FALSE_STARTS: Final = 16
"""Places that look like the beginning of a frame and are none, as a checksum over as much as they announce has shown."""
MAX_STARTS: Final = 256
"""Places that look like it, with a length within the limit, and are not complete: a frame of events may have one in each of them."""
_LENGTH_ENDS: Final = HEADER.size - 4


class DecoderStatistics(NamedTuple):
    """`frames`, `received_bytes` and `skipped_bytes` since the start; `held_bytes` now."""

    frames: int
    received_bytes: int
    held_bytes: int
    skipped_bytes: int


class Decoder:
    """Cuts one peer's stream into messages.  Not for several threads at once."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fault: PeerError | None = None
        self._hunts = False
        self._frames = self._received_bytes = self._skipped_bytes = 0
        # While hunting: where frames may begin that are not complete, and from where on nobody has looked yet.
        self._starts: list[int] = []
        self._looked_at = 0
        self._skipped_since = self._false_starts = 0

    @property
    def at_boundary(self) -> bool:
        """True if no frame has been begun: a stream that ends elsewhere was cut off."""
        return not self._buffer

    def hunt(self) -> None:
        """The stream is a serial line, as has been learnt from a frame of it: rule 4 from here on."""
        self._hunts = True

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by `data`, in their order.

        Raises `PeerError` as soon as the bytes cannot become messages any more, and from then on at every call.
        Messages that came in the same call are lost with it.
        """
        if self._fault is not None:
            raise self._fault
        self._received_bytes += len(data)
        self._buffer += data
        messages = []
        try:
            while (payload := self._find_payload() if self._hunts else self._take_payload()) is not None:
                messages.append(decode_payload(payload))
                self._frames += 1
        except PeerError as fault:
            self._fault = fault
            self._buffer.clear()
            raise
        return messages

    def _take_payload(self) -> bytes | None:
        held = self._buffer
        if not MAGIC.startswith(held[: len(MAGIC)]):
            raise FrameError("a frame without the magic")
        if len(held) >= _LENGTH_ENDS:
            length_bytes = _length_at(held, 0)
            if length_bytes > MAX_PAYLOAD_BYTES:
                raise FrameError(f"a payload of {length_bytes} bytes, at most {MAX_PAYLOAD_BYTES} are allowed")
            end = HEADER.size + length_bytes
            if len(held) >= end:
                payload = _sound_payload(held, 0, end)
                del held[:end]
                if payload is None:
                    raise FrameError("a payload with another checksum than its header says")
                return payload
        return None

    # --- on a serial line ----------------------------------------------------------------------------------------

    def _find_payload(self) -> bytes | None:
        """The payload of the first sound frame, wherever it begins; None if there is none yet."""
        for start in list(self._starts):
            if (payload := self._try(start)) is not None:
                return payload
        while (start := self._next_start()) >= 0:
            self._starts.append(start)
            if (payload := self._try(start)) is not None:
                return payload
            if len(self._starts) > MAX_STARTS:
                raise FrameError(f"more than {MAX_STARTS} beginnings of frames and no end")
        first = self._starts[0] if self._starts else self._looked_at
        self._skipped_bytes += first
        self._skipped_since += first
        self._forget(first)
        if self._skipped_since > MAX_SKIPPED_BYTES:
            raise FrameError(f"more than {MAX_SKIPPED_BYTES} bytes without a sound frame")
        return None

    def _next_start(self) -> int:
        """The next place that nobody has looked at where a frame may begin; -1: there is none yet."""
        held = self._buffer
        while (found := held.find(MAGIC, self._looked_at)) >= 0 and len(held) >= found + _LENGTH_ENDS:
            self._looked_at = found + 1
            if _length_at(held, found) <= MAX_PAYLOAD_BYTES:
                return found
        self._looked_at = found if found >= 0 else max(self._looked_at, len(held) - _begun_magic(held))
        return -1

    def _try(self, start: int) -> bytes | None:
        """The payload of the frame that begins there, if it is complete and sound; if it is only complete it is no start any more."""
        held = self._buffer
        end = start + HEADER.size + _length_at(held, start)
        if end > len(held):
            return None
        payload = _sound_payload(held, start, end)
        if payload is not None:
            self._skipped_bytes += start
            self._forget(end)
            self._skipped_since = self._false_starts = 0
            return payload
        self._starts.remove(start)
        self._false_starts += 1
        if self._false_starts > MAX_FALSE_STARTS:
            raise FrameError(f"more than {MAX_FALSE_STARTS} beginnings of frames without a sound one")
        return None

    def _forget(self, count: int) -> None:
        del self._buffer[:count]
        self._looked_at = max(0, self._looked_at - count)
        self._starts[:] = [start - count for start in self._starts if start >= count]

    # --- introspection -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert rules 2 and 5: between calls less than one frame is held, and nothing after a fault."""
        assert len(self._buffer) < MAX_FRAME_BYTES, self
        assert self._fault is None or not self._buffer, self
        total = self._frames * HEADER.size + len(self._buffer) + self._skipped_bytes
        assert total <= self._received_bytes, self
        if self._fault is None:
            assert self._false_starts <= MAX_FALSE_STARTS, self
            assert len(self._starts) <= MAX_STARTS, self
            assert self._skipped_since <= MAX_SKIPPED_BYTES, self
            assert self._starts == sorted(self._starts), self

    def statistics(self) -> DecoderStatistics:
        """A frozen copy of the counters."""
        return DecoderStatistics(self._frames, self._received_bytes, len(self._buffer), self._skipped_bytes)


def _length_at(held: bytearray, start: int) -> int:
    """What the header that begins there says of its payload."""
    return int.from_bytes(held[start + len(MAGIC) : start + _LENGTH_ENDS], "little")


def _sound_payload(held: bytearray, start: int, end: int) -> bytes | None:
    payload = bytes(held[start + HEADER.size : end])
    checksum = int.from_bytes(held[start + 8 : start + HEADER.size], "little")
    return payload if zlib.crc32(payload) == checksum else None


def _begun_magic(held: bytearray) -> int:
    """How many of the last bytes may be the beginning of the magic."""
    return next((count for count in range(len(MAGIC) - 1, 0, -1) if held.endswith(MAGIC[:count])), 0)
